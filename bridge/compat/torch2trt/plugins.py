"""``torch2trt.plugins``: imports, and says at use what takes its place."""

from .gone import PLUGINS, module_of

__getattr__ = module_of(PLUGINS, "plugins")
