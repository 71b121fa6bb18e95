"""The stages of a conversion, one module each: functions of the ``State`` that they carry on."""
