"""What the modules of a torch model take and return while it runs: each tensor, seen by hooks, at each call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compare import Array, Feeds
from ..norms import norm, share
from ..tensors import named_leaves, to_numpy

if TYPE_CHECKING:
    import torch

    from ..torch_source import Source

SEEN = 4096
"""Elements of a tensor that are looked at to tell it from others."""


@dataclass(frozen=True)
class Point:
    """A tensor that a module returned or was given, in one of its calls."""

    module: str
    kind: str
    """The module's class."""
    call: int
    returned: bool
    place: str
    """Where in what it returned or was given, such as ``0`` or ``hidden.1``."""

    @property
    def key(self) -> str:
        call = f" (call {self.call + 1})" if self.call else ""
        return f"{self.module}{call} {'returns' if self.returned else 'takes'} {self.place}".strip()


@dataclass(frozen=True)
class Seen:
    """A few of a tensor's values, by which it is recognised."""

    shape: tuple[int, ...]
    values: Array

    @classmethod
    def of(cls, array: Array) -> Seen:
        flat = array.reshape(-1)
        places = np.linspace(0, max(0, flat.size - 1), min(flat.size, SEEN)).astype(np.int64)
        return cls(tuple(array.shape), flat[places].astype(np.float64))

    def distance(self, other: Seen) -> float:
        """The norm of the difference as a share of this one's; infinite for other shapes or places of NaN."""
        if self.shape != other.shape:
            return float("inf")
        finite = np.isfinite(self.values) & np.isfinite(other.values)
        same = (self.values == other.values) | (np.isnan(self.values) & np.isnan(other.values))
        if not (finite | same).all():
            return float("inf")
        a, b = self.values[finite], other.values[finite]
        with np.errstate(over="ignore"):
            found = share(norm(b - a), norm(a))
        return float("inf") if found is None else found


def look(source: Source, feeds: Feeds) -> tuple[dict[Point, Seen], dict[str, Array]]:
    """Every floating-point tensor that modules take and return, in the order of time, and the model's outputs."""
    found: dict[Point, Seen] = {}

    def keep(point: Point, array: Array) -> None:
        found[point] = Seen.of(array)

    with _hooked(source.module, lambda point: True, keep):
        outputs = source.run(feeds)
    found.update({point: Seen.of(outputs[name]) for name, point in output_points(outputs).items()})
    return found, outputs


def output_points(outputs: Mapping[str, Array]) -> dict[str, Point]:
    """The points of the model's own outputs, by their names; complex ones are other tensors in ONNX."""
    return {name: Point("", "", 0, True, name) for name, array in outputs.items() if array.dtype.kind != "c"}


def values(source: Source, feeds: Feeds, wanted: set[Point]) -> dict[Point, Array]:
    """The tensors at the points that are ``wanted``."""
    found: dict[Point, Array] = {}
    with _hooked(source.module, wanted.__contains__, found.__setitem__):
        outputs = source.run(feeds)
    found.update({point: outputs[name] for name, point in output_points(outputs).items() if point in wanted})
    return found


@contextlib.contextmanager
def _hooked(
    model: torch.nn.Module, wanted: Callable[[Point], bool], keep: Callable[[Point, Array], None]
) -> Iterator[None]:
    """The model in eval mode; each wanted tensor is copied at once, since a later module may change it in place."""
    from ..torch_source import evaluating

    calls: dict[str, int] = {}
    handles: list[Any] = []

    def hook(name: str, kind: str) -> None:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            calls[name] = calls.get(name, -1) + 1
            numbers.append(calls[name])
            for path, tensor in _tensors((*args, kwargs) if kwargs else args):
                take(Point(name, kind, calls[name], False, path), tensor)

        def after(module: Any, args: Any, result: Any) -> None:
            call = numbers.pop()
            for path, tensor in _tensors(result):
                take(Point(name, kind, call, True, path), tensor)

        numbers: list[int] = []  # of the calls under way: a module may call itself
        handles.append(by_name[name].register_forward_pre_hook(before, with_kwargs=True))
        handles.append(by_name[name].register_forward_hook(after))

    def take(point: Point, tensor: Any) -> None:
        if wanted(point):
            keep(point, np.array(to_numpy(tensor)))

    by_name = dict(model.named_modules())
    try:
        for name, module in by_name.items():
            if not name:
                continue  # its outputs have names
            hook(name, type(module).__name__)
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[tuple[str, Any]]:
    """The floating-point tensors in a nested value, with their places; complex ones have no twin in ONNX."""
    import torch

    for path, leaf in named_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.layout == torch.strided:
            yield ".".join(map(str, path)), leaf.detach()
