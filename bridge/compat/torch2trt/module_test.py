"""``torch2trt.module_test``: imports, and says at use what takes its place."""

from .gone import TESTS, module_of

__getattr__ = module_of(TESTS, "module_test")
