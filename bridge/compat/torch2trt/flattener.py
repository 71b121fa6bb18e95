"""``torch2trt.flattener``."""

from bridge import Flattener

__all__ = ["Flattener"]
