"""Translations for what torch.onnx has none for, or a wrong one.

Most are decompositions: torch code that computes an operator by others that torch.onnx translates, put on top of the
exporter's own table; the others write ONNX operators. What torch.onnx does well is not touched. One module per family;
each registers what it knows with ``decomposes`` or ``translates``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from .registry import DECOMPOSITIONS, TRANSLATIONS

__all__ = ["installed", "of_backward", "table"]


def installed() -> AbstractContextManager[None]:
    """Within it, torch.onnx.export decomposes what is listed in this package."""
    _load()
    from .hook import installed as hooked

    return hooked()


def table() -> dict[Any, Callable[..., Any]]:
    """What torch.onnx.export takes as its ``custom_translation_table``."""
    _load()
    return dict(TRANSLATIONS)


def of_backward() -> dict[Any, Callable[..., Any]]:
    """How what autograd runs backward is computed by other operators."""
    _load()
    return {op: function for op, function in DECOMPOSITIONS.items() if "_backward" in str(op)}


def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
