"""TensorRT plugins: a user's own (``register``), how they are loaded (``loading``), and those of the bridge.

``python`` turns a small class whose work is done by torch into a plugin of TensorRT; ``nonzero``, ``nms`` and
``deform_conv`` are such. Nothing is imported here: a build loads what its model needs, and no more.
"""
