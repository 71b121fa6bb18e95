"""``torch2trt.converters``: imports, and says at use what takes its place."""

from .gone import CONVERTERS, module_of

__getattr__ = module_of(CONVERTERS, "converters")
