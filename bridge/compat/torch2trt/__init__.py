"""The names of torch2trt, for code that imports them and cannot be edited; all of them are the bridge's."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from .torch2trt import *  # noqa: F403 - its __all__ is what is meant


def __getattr__(name: str) -> ModuleType:
    """Its modules, imported when they are first asked for: ``torch2trt.dataset.ListDataset``."""
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"torch2trt has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
