"""The names of torch2trt, for code that imports them and cannot be edited; all of them are the bridge's."""

from .torch2trt import *  # noqa: F403 - its __all__ is what is meant
from .version_utils import module_of_tensorrt

__getattr__ = module_of_tensorrt  # for ``from torch2trt import trt``
