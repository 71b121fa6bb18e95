"""``torch2trt.contrib``: its training with quantisation is not here."""

from ..gone import QUANTISED, module_of

__getattr__ = module_of(QUANTISED, "contrib")
