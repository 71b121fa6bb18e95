"""``torch2trt.trt_module``."""

from bridge import TRTModule

__all__ = ["TRTModule"]
