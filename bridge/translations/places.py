"""Loops over the places that ``nonzero()`` finds, as routed experts have them: ``for expert in used.nonzero(): …``.

How many there are is known at run time alone, and torch.export follows no such loop. Where nothing is to be done for a
place that is not found, because no rows belong to it, the loop may go over every place of the mask as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

MOST = 1024
"""Places of the largest mask whose loop is written out."""

NOTE = (
    "exported with every place that nonzero() may find in the loops over what it finds, and as if it found some: the "
    "same where nothing is done for none, as for an expert without tokens"
)

_VIEWS = ["flatten", "reshape", "view", "ravel", "squeeze", "cpu", "to", "long", "int", "clone", "detach", "contiguous"]
_SIZES = (2, 3, 5, 1000, 65537)


@contextlib.contextmanager
def of_every_place() -> Iterator[None]:
    """Within it, torch.export follows such loops, and takes for granted of what nonzero() finds that it is not empty.

    What is exported so may be another thing than the module, and has to be compared at values for which it finds less.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.onnx._internal.exporter import _capture_strategies

    running = mock.patch.object(
        _capture_strategies, "CAPTURE_STRATEGIES", (_capture_strategies.TorchExportNonStrictStrategy,)
    )
    guessing = mock.patch.object(ShapeEnv, "evaluate_expr", _of_some(ShapeEnv.evaluate_expr))
    with running, guessing, _EveryPlace():
        yield


class _EveryPlace(TorchFunctionMode):
    """Knows of what nonzero() returned, and of views of it, the same with every place of the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.all = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor) or args[0] not in self.all:
            result = func(*args, **kwargs)
            if _finds_places(func, args):
                self._learn(args[0], result)
            return result
        places, name = self.all[args[0]], getattr(func, "__name__", "")
        if name == "unbind" and args[1:] in ((), (0,)) and not kwargs:  # what iterating does
            return tuple(torch.tensor(row, device=args[0].device) for row in places.tolist())
        if name == "tolist":
            return places.tolist()
        result = func(*args, **kwargs)
        if (
            name in _VIEWS
            or (name == "__getitem__" and _takes_all(args[1]))
            or (name == "select" and _not_of_rows(args))
        ):
            with _disable_current_modes():
                self.all[result] = func(places, *args[1:], **kwargs)
        return result

    def _learn(self, mask: Tensor, found: Tensor | tuple[Tensor, ...]) -> None:
        if not all(isinstance(size, int) for size in mask.shape) or not 0 < mask.numel() <= MOST:
            return
        with _disable_current_modes():
            places = torch.ones(tuple(mask.shape), dtype=torch.bool).nonzero()
            columns = places.unbind(1)
        if isinstance(found, Tensor):
            self.all[found] = places
        else:
            for axis, column in zip(found, columns, strict=True):
                self.all[axis] = column


def _finds_places(func: Any, args: tuple[Any, ...]) -> bool:
    return func in (Tensor.nonzero, torch.nonzero) or (func is torch.where and len(args) == 1)


def _takes_all(index: Any) -> bool:
    """Whether it takes all rows."""
    first = index[0] if isinstance(index, tuple) and index else index
    return isinstance(first, slice) and first == slice(None)


def _not_of_rows(args: tuple[Any, ...]) -> bool:
    """Whether ``select(tensor, axis, …)`` is along another axis than the first."""
    return len(args) > 1 and args[1] % args[0].dim() != 0


def _of_some(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """``evaluate`` that answers what the program asks of a number of found places as for more than one of them."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    def evaluated(env: Any, expr: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return evaluate(env, expr, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            answers = {expr.xreplace(dict.fromkeys(expr.free_symbols, size)) for size in _SIZES}
            if not expr.free_symbols <= env.size_like or len(answers) > 1 or not answers <= {True, False}:
                raise
            return answers.pop()

    return evaluated
