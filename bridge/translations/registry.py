"""The tables that the families fill: torch operators written in other torch operators, or in ONNX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload

Function = TypeVar("Function", bound=Callable[..., Any])

DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {}
"""By operator, a function of its schema that computes it with operators that torch.onnx translates."""

TRANSLATIONS: dict[OpOverload, Callable[..., Any]] = {}
"""By operator, a function of its schema that writes ONNX operators by onnxscript."""


AT_CAPTURE: dict[OpOverload, Callable[..., Any]] = {}
"""Composite operators that are computed so while the module is traced: torch's own way would make axes constant."""


ON_PAIRS: dict[Any, Callable[..., Any]] = {}
"""By operator, a function of a Writer and the operator's arguments with a Pair for each complex one (complex_pairs)."""


class Untranslatable(RuntimeError):
    """What an operator is asked for cannot be written in ONNX; the message says what, and up to where it can."""


def overload(name: str) -> OpOverload | None:
    """The operator ``namespace::packet.overload``; None where this torch has none of that name."""
    namespace, _, rest = name.rpartition("::")
    packet, _, which = rest.partition(".")
    try:
        found: OpOverload = getattr(getattr(getattr(torch.ops, namespace or "aten"), packet), which or "default")
    except AttributeError:
        return None
    return found


def decomposes(*names: str) -> Callable[[Function], Function]:
    """Registers a decomposition of the operators so called: ``kthvalue``, ``sort.stable``, ``torchvision::nms``."""
    return _register(DECOMPOSITIONS, names)


def translates(*names: str) -> Callable[[Function], Function]:
    """Registers a translation to ONNX of the operators so called."""
    return _register(TRANSLATIONS, names)


def replaces(*names: str) -> Callable[[Function], Function]:
    """Registers a decomposition that is used while the module is traced already."""

    def register(function: Function) -> Function:
        return _register(AT_CAPTURE, names)(_register(DECOMPOSITIONS, names)(function))

    return register


def on_pairs(*names: str) -> Callable[[Function], Function]:
    """Registers what the operators so called do to complex tensors in two parts."""
    return _register(ON_PAIRS, names)


def _register(table: dict[Any, Callable[..., Any]], names: tuple[str, ...]) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for name in names:
            found = overload(name)
            if found is not None:
                table[found] = function
        return function

    return register


def static(size: Any, what: str) -> int:
    """``size`` as a number. Raises Untranslatable where it is known at run time alone."""
    if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
        raise Untranslatable(f"{what} is dynamic; it has to be a constant")
    return int(size)
