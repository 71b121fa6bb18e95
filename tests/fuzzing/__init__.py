"""Models drawn at random for every rule, which has to be right for all of its operator, not for its examples alone.

A strategy draws models of the operator that a rule rewrites: all ranks, axes, sizes (1 and 0 too), types and attributes
that ONNX allows, not only those that the rule likes. It goes into a module of this folder, named after the rules'.

    @strategy("det_by_cofactors")
    def det(s: Sketch) -> Case:
        n = s.integer(0, 5)
        s.input("x", "float32", [*s.sizes(0, 3), n, n])
        return s.model(lambda g, t: g.op.Det(t["x"]), opset=s.pick(11, 20))

``tests/test_fuzz.py`` draws from it and compares before and after.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from hypothesis import strategies as st

from bridge.target import Target
from passes.framework import Builder, Declined, example
from passes.model import to_proto
from passes.rules.integers import CARRIERS

Arrays = dict[str, np.ndarray]
Reference = Callable[[Arrays], Sequence[np.ndarray]]
"""From the inputs by name to the outputs in order."""
Tensors = Mapping[str, gs.Tensor]


@dataclass
class Case:
    """One model with its inputs, and how to judge what comes out of it."""

    graph: gs.Graph
    feeds: Arrays
    reference: Reference | None = None
    """What gives the true outputs, where ONNX Runtime does not."""
    tolerance: float | None = None
    """Of the largest value of an output; None: as its type has it."""
    builds: bool = True
    """Whether TensorRT-RTX has to accept what comes out."""

    def __repr__(self) -> str:
        feeds = "\n".join(f"{name}: {array!r}" for name, array in self.feeds.items())
        return f"\n{onnx.printer.to_text(to_proto(self.graph))}\n{feeds}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis shows it."""
        printer.text(repr(self))


class Sketch:
    """A model that is being drawn."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any], target: Target) -> None:
        self.draw = draw
        self.target = target
        self.feeds: Arrays = {}
        self.constants: Arrays = {}
        self.inputs: dict[str, tuple[str, list[int | str]]] = {}
        self.builds = True
        """To be set to False by a strategy that draws what TensorRT cannot do by any rule."""
        self._random: np.random.Generator | None = None

    # plain choices

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def rarely(self) -> bool:
        """True of one draw in eight or so."""
        return self.integer(0, 7) == 7

    def sizes(self, least: int, most: int, low: int = 1, high: int = 4, empty: bool = False) -> list[int]:
        """The sizes of ``least`` to ``most`` axes; with ``empty``, now and then one of them is 0."""
        sizes = [self.integer(low, high) for _ in range(self.integer(least, most))]
        if empty and sizes and self.rarely():
            sizes[self.integer(0, len(sizes) - 1)] = 0
        return sizes

    def axis(self, rank: int) -> int:
        """An axis, counted from the front or from the back."""
        return self.integer(-rank, rank - 1)

    def axes(self, rank: int) -> list[int]:
        """Some axes, none twice, in any order, each counted from either end."""
        chosen = self.draw(st.lists(st.integers(0, rank - 1), unique=True, max_size=rank)) if rank else []
        return [axis - rank if self.flag() else axis for axis in chosen]

    # values

    @property
    def random(self) -> np.random.Generator:
        """For values, of which hypothesis needs to know no more than the seed."""
        if self._random is None:
            self._random = np.random.default_rng(self.integer(0, 1 << 20))
        return self._random

    def values(self, dtype: Any, sizes: Sequence[int], special: bool = False) -> np.ndarray:
        """Values of any type: ordinary ones, ties, the type's extremes; ``special``: infinities, NaN and -0 too."""
        kind = np.dtype(dtype)
        if kind.kind == "b":
            return self.random.random(sizes) > 0.5
        if kind.kind in "iu":
            return self.integers(kind, sizes)
        values = self.random.standard_normal(sizes)
        if self.rarely():
            values = np.round(values * 2) / 2
        if special and self.rarely():
            odd = self.random.choice([np.inf, -np.inf, np.nan, -0.0, 0.0], sizes)
            values = np.where(self.random.random(sizes) < 0.2, odd, values)
        return np.asarray(values).astype(kind)

    def integers(self, dtype: Any, sizes: Sequence[int]) -> np.ndarray:
        """Small numbers, or any that the type has (of int64, any that the target can carry)."""
        kind = np.dtype(dtype)
        limits = np.iinfo(kind)
        low, high = int(limits.min), int(limits.max)
        if "int64" not in self.target.types and CARRIERS.get(kind.name, kind) == np.int64:
            low, high = max(low, -(1 << 31)), min(high, (1 << 31) - 1)
        if self.flag():
            low, high = max(low, -3), min(high, 9)
        values = self.random.integers(low, high, sizes, kind, endpoint=True)
        if self.rarely():
            values = np.where(self.random.random(sizes) < 0.3, self.random.choice([low, high], sizes), values)
        return np.asarray(values).astype(kind)

    # inputs

    def input(self, name: str, dtype: Any, sizes: Sequence[int] | np.ndarray, static: bool = False) -> None:
        """An input of these sizes (or of these values), some of whose axes the model may leave dynamic."""
        values = np.asarray(sizes) if isinstance(sizes, (np.ndarray, np.generic)) else self.values(dtype, sizes)
        declared: list[int | str] = list(values.shape)
        if not static and declared and self.flag():
            for axis, size in enumerate(declared):
                if self.flag():
                    declared[axis] = self.pick(f"d{size}", f"{name}_{axis}")
        self.feeds[name] = values
        self.inputs[name] = (np.dtype(dtype).name, declared)

    def operand(self, name: str, values: np.ndarray, static: bool = False) -> None:
        """A constant, or an input whose values are found out at run time."""
        if self.flag():
            self.constants[name] = np.asarray(values)
        else:
            self.input(name, values.dtype, np.asarray(values), static)

    def model(
        self,
        build: Callable[[Builder, Tensors], gs.Tensor | Sequence[gs.Tensor]],
        opset: int = 20,
        reference: Reference | None = None,
        tolerance: float | None = None,
    ) -> Case:
        """The model that ``build`` makes of the tensors by name; one that ONNX itself refuses is drawn again."""

        def body(g: Builder, *tensors: gs.Tensor) -> gs.Tensor | Sequence[gs.Tensor]:
            named = dict(zip(self.inputs, tensors, strict=True))
            return build(g, named | {name: g.constant(values) for name, values in self.constants.items()})

        try:
            graph = example(self.inputs, body, opset)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, onnx.defs.SchemaError, Declined):
            hypothesis.reject()
        return Case(graph, self.feeds, reference, tolerance, self.builds)


STRATEGIES: dict[str, Callable[[Sketch], Case]] = {}
"""By the rule's name."""


def strategy(*rules: str) -> Callable[[Callable[[Sketch], Case]], Callable[[Sketch], Case]]:
    """Registers the decorated function as what draws models for these rules."""

    def register(function: Callable[[Sketch], Case]) -> Callable[[Sketch], Case]:
        for name in rules:
            assert name not in STRATEGIES, f"{name} has two strategies"
            STRATEGIES[name] = function
        return function

    return register


def all_strategies() -> dict[str, Callable[[Sketch], Case]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return STRATEGIES
