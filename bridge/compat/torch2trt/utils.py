"""``torch2trt.utils``: what converters imported from here."""

from .torch2trt import *  # noqa: F403 - its __all__ is what is meant
