"""Tensors with a number of rows that is known only at run time, as tensors of all places and the number of filled ones.

Detection heads select boxes, gather what belongs to them, and in the end keep a fixed number: the best hundred, or the
first hundred of the selected and of rows of zeros. A target without data-dependent shapes can compute this on all
places of the selection. Here the nodes between the selection and a fixed size are evaluated so, anew: each value is

- ``Plain``: a tensor that has nothing to do with the number of rows (any more),
- ``Rows``: a tensor all of whose places are there along one axis, the filled ones first, or
- ``Numbers``: a small tensor of integers, computed from shapes, some of which depend on the number of rows.

A node that turns rows into plain tensors is where the model is changed; the selection and what lies between are left
without consumers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Declined, Replacement
from passes.ir import is_plugin_call
from passes.rules.shapes import as_tensor, iota, shape_tensor, size


@dataclass(frozen=True)
class Result:
    """A selection: all places of it, of which the first ``count`` [1] along ``axis`` are filled; others do no harm."""

    tensor: gs.Tensor
    count: gs.Tensor
    axis: int = 0
    key: int | None = None
    """What tells which selections are of the same number; None where no other is known to be."""


@dataclass(frozen=True)
class Count:
    """A number of rows: ``sign`` times (the selection's, changed by ``steps`` in turn) plus ``offset``."""

    source: int
    places: int | None = None
    """Of the selection; None where they are as many as a dynamic number of images has."""
    steps: tuple[tuple[str, int], ...] = ()
    sign: int = 1
    offset: int = 0

    def _step(self, op: str, value: int) -> Count:
        if self.sign < 0:
            raise Declined("it computes with the number of rows in a way that is not followed")
        plain = self.plain()
        return replace(plain, steps=(*plain.steps, (op, value)))

    def plain(self) -> Count:
        """Without an offset."""
        if not self.offset:
            return self
        if self.steps and self.steps[-1][0] == "+":
            steps = (*self.steps[:-1], ("+", self.steps[-1][1] + self.offset))
        else:
            steps = (*self.steps, ("+", self.offset))
        return replace(self, steps=tuple(step for step in steps if step != ("+", 0)), offset=0)

    def plus(self, value: int) -> Count:
        moved = replace(self, offset=self.offset + value)
        return moved.plain() if self.sign > 0 else moved

    def limited(self, value: int) -> Count:
        most = self.most
        return self.plain() if most is not None and most <= value else self._step("min", value)

    def negative(self) -> Count:
        return replace(self, sign=-self.sign, offset=-self.offset)

    @property
    def least(self) -> int:
        """How many rows there are at least."""
        return self._of(0)

    @property
    def most(self) -> int | None:
        """How many rows, and places for them, there are at most."""
        return None if self.places is None else self._of(self.places)

    def _of(self, number: int) -> int:
        for op, value in self.plain().steps:
            number = number + value if op == "+" else min(number, value)
        return number


@dataclass(frozen=True)
class Plain:
    tensor: gs.Tensor


@dataclass(frozen=True)
class Rows:
    tensor: gs.Tensor
    axis: int
    count: Count


@dataclass(frozen=True)
class Numbers:
    values: np.ndarray[Any, Any]
    """Of dtype object: int, bool or Count."""


Value: TypeAlias = "Plain | Rows | Numbers"
Source: TypeAlias = "Callable[[Evaluation, gs.Node, list[Value]], Result]"


@dataclass
class Memory:
    """What is known of the tensors of one scope for one sweep."""

    sources: dict[int, tuple[gs.Node, Source]]
    """The nodes that select, by id, and what evaluates each."""
    values: dict[int, Value] = field(default_factory=dict)
    counts: dict[int, gs.Tensor] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    kept: list[gs.Tensor] = field(default_factory=list)
    """Tensors whose id is a key above."""

    @property
    def op(self) -> str:
        """Of the selection that was marked last."""
        return str(next(iter(self.sources.values()))[0].op)


MARK = "rows_memory"


def mark(node: gs.Node, g: Builder, source: Source) -> None:
    """Marks what depends on the selection that ``node`` makes; declines where it leaves the model as it is."""
    memory = Memory({id(node): (node, source)})
    waiting, seen = list(node.outputs), set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        known = tensor.__dict__.get(MARK)
        if known is not None and known is not memory:
            memory.sources.update(known.sources)
        tensor.__dict__[MARK] = memory
        waiting.extend(output for consumer in tensor.outputs for output in consumer.outputs)
    memory.sources.update(_earlier(node))
    Evaluation(g, memory).value(node.outputs[0])  # tells why it cannot be made, if it cannot
    for tensor in _shown(g):
        if id(tensor) in seen and not all(isinstance(item, int) for item in tensor.shape or ["?"]):
            try:
                value = Evaluation(g, memory).value(tensor)
            except Declined:
                continue  # told at the node that it is about
            if isinstance(value, Rows):
                g.decline(
                    f"the number of its results is the size of the output {tensor.name!r}, which the target cannot "
                    "compute; let the model keep a fixed number, such as cat([kept, zeros(100, 6)])[:100]"
                )


def _earlier(node: gs.Node) -> dict[int, tuple[gs.Node, Source]]:
    """The selections that ``node`` selects from."""
    marks = [item.__dict__[MARK] for item in node.inputs if MARK in item.__dict__]
    return {key: value for memory in marks for key, value in memory.sources.items()}


def replaced(node: gs.Node, g: Builder, op: str) -> Replacement:
    """What ``node`` gives, computed on all places, where it turns rows into tensors of a size that is known.

    ``op`` selects the rows; what depends on another operator's selection too is the business of the later one's rule.
    """
    memories = [item.__dict__[MARK] for item in node.inputs if MARK in item.__dict__]
    memory = max(memories, key=lambda item: len(item.sources), default=None)  # the last: it knows the earlier ones too
    if memory is None or memory.op != op:
        return None
    work = Evaluation(g, memory)
    try:
        given = [work.value(tensor) for tensor in node.inputs]
    except Declined:
        return None  # told at the node that it is about
    if all(isinstance(item, Plain) for item in given):
        return None
    try:
        results = work.results(node, given)
    except Declined as reason:
        if node.op in WATCHED:
            g.decline(f"its rows are of a number that is known only at run time: {reason}")
        return None
    if isinstance(results[0], Numbers) and any(tensor is item for tensor in node.outputs for item in _shown(g)):
        results = [Plain(work.number_tensor(results[0]))]
    if not all(isinstance(item, Plain) for item in results):
        return None
    memory.values.update(work.made)
    memory.counts.update(work.counts)
    memory.kept.extend(work.kept)
    return [_as_declared(g, item.tensor, old) for item, old in zip(results, node.outputs, strict=False)]  # type: ignore[union-attr]


def _shown(g: Builder) -> Sequence[gs.Tensor]:
    return g.scope.outputs if g.scope is not None else ()


def _as_declared(g: Builder, tensor: gs.Tensor, old: gs.Tensor) -> gs.Tensor:
    return tensor if old.dtype is None or not old.name else g.cast(tensor, old.dtype)


class Evaluation:
    """Of the nodes between selections and one node, for one application of a rule."""

    def __init__(self, g: Builder, memory: Memory) -> None:
        self.g = g
        self.memory = memory
        self.made: dict[int, Value] = {}
        self.counts: dict[int, gs.Tensor] = {}
        self.kept: list[gs.Tensor] = []
        self.plain: set[int] = set()

    # values

    def value(self, tensor: gs.Tensor) -> Value:
        """Of the tensor, and on the way of all that it is made from; raises Declined where one cannot be evaluated."""
        waiting = [tensor]
        while waiting:
            current = waiting[-1]
            missing = [] if self.known(current) else [i for i in current.inputs[0].inputs if not self.known(i)]
            if missing and not any(id(item) in self.memory.failed for item in current.inputs[0].inputs):
                waiting.extend(missing)
                continue
            if not self.known(current):
                self.evaluate(current)
            waiting.pop()
        if id(tensor) in self.memory.failed:
            raise Declined(self.memory.failed[id(tensor)])
        return self.made.get(id(tensor)) or self.memory.values.get(id(tensor)) or Plain(tensor)

    def known(self, tensor: gs.Tensor) -> bool:
        places = (self.made, self.memory.values, self.memory.failed, self.plain)
        return MARK not in tensor.__dict__ or not tensor.inputs or any(id(tensor) in place for place in places)

    def evaluate(self, tensor: gs.Tensor) -> None:
        """Takes down the value of a tensor, those of whose node's inputs are known."""
        node = tensor.inputs[0]
        self.kept.extend(node.outputs)
        try:
            given = [self.value(item) for item in node.inputs]
            if id(node) in self.memory.sources:
                results: Sequence[Value] = [self.source(node, given)]
            elif all(isinstance(item, Plain) for item in given):
                results = []
            else:
                results = self.results(node, given)
        except Declined as reason:
            self.memory.failed[id(tensor)] = str(reason)
            self.memory.kept.append(tensor)
            return
        for output, result in zip(node.outputs, results, strict=False):
            if not isinstance(result, Plain):  # that one gets a tensor of its own, where it is replaced
                self.made[id(output)] = result
        self.plain |= {id(output) for output in node.outputs} - self.made.keys()

    def source(self, node: gs.Node, given: list[Value]) -> Value:
        result = self.memory.sources[id(node)][1](self, node, given)
        key = id(node) if result.key is None else result.key
        self.counts[key] = result.count
        places = self.g.shape(result.tensor)[result.axis]
        return Rows(result.tensor, result.axis, Count(key, places if isinstance(places, int) else None))

    def results(self, node: gs.Node, given: Sequence[Value]) -> Sequence[Value]:
        handler = HANDLERS.get(node.op)
        if handler is None or (node.domain and not is_plugin_call(node)):
            raise Declined(f"{node.op} of rows is not followed")
        result = handler(self, node, list(given))
        return result if isinstance(result, list) else [result]

    # numbers

    def count(self, count: Count) -> gs.Tensor:
        """As int64 [1]."""
        known = self.counts.get(count.source)
        tensor = known if known is not None else self.memory.counts[count.source]
        for op, number in count.steps:
            tensor = (self.g.op.Add if op == "+" else self.g.op.Min)(tensor, np.array([number]))
        if count.sign < 0:
            tensor = self.g.op.Neg(tensor)
        return self.g.op.Add(tensor, np.array([count.offset])) if count.offset else tensor

    def number_tensor(self, numbers: Numbers) -> gs.Tensor:
        flat = numbers.values.reshape(-1)
        parts = [self.count(item) if isinstance(item, Count) else self.g.constant([int(item)]) for item in flat]
        joined = self.g.op.Concat(*parts, axis=0)
        result: gs.Tensor = self.g.op.Reshape(joined, np.array(numbers.values.shape, np.int64))
        return result

    def numbers(self, value: Value | None) -> np.ndarray[Any, Any]:
        """The integers of a constant, or of Numbers."""
        if isinstance(value, Numbers):
            return value.values
        if isinstance(value, Plain) and isinstance(value.tensor, gs.Constant) and value.tensor.dtype.kind in "iub":
            array = self.g.value(value.tensor)
            if array.size <= 64:
                return array.astype(object)
        raise Declined("it computes a shape from a tensor that is no shape")

    # rows

    def filled(self, rows: Rows) -> gs.Tensor:
        """Of each place of the axis whether it is filled, shaped to be broadcast to the tensor."""
        g = self.g
        below = g.op.Less(iota(g, size(g, rows.tensor, rows.axis)), self.count(rows.count))
        after = len(g.shape(rows.tensor)) - 1 - rows.axis
        return g.unsqueeze(below, list(range(1, after + 1))) if after else below

    def only_filled(self, rows: Rows, other: float | int | bool) -> gs.Tensor:
        """The tensor, with ``other`` in the places that are not filled."""
        g = self.g
        fill = np.array(other).astype(g.dtype(rows.tensor))
        result: gs.Tensor = g.op.Where(self.filled(rows), rows.tensor, fill)
        return result

    def repeated(self, rows: Rows) -> gs.Tensor:
        """The tensor, with the last filled row in the places that are not."""
        g = self.g
        last = g.op.Max(g.op.Sub(self.count(rows.count), np.array([1])), np.array([0]))
        index = g.op.Min(iota(g, size(g, rows.tensor, rows.axis)), last)
        result: gs.Tensor = g.op.Gather(rows.tensor, index, axis=rows.axis)
        return result

    def places(self, rows: Rows) -> int | None:
        found = self.g.shape(rows.tensor)[rows.axis]
        return found if isinstance(found, int) else None


Handler: TypeAlias = "Callable[[Evaluation, gs.Node, list[Value]], Value | list[Value]]"
HANDLERS: dict[str, Handler] = {}
WATCHED = frozenset(
    ["TopK", "Slice", "Gather", "GatherND", "GatherElements", "ScatterElements", "ScatterND", "Pad", "ArgMax", "ArgMin"]
)
"""Operators that tell why they could not be evaluated: those that detection heads end with."""


def handles(*ops: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(ops, handler))
        return handler

    return register


def rank_of(g: Builder, value: Value) -> int:
    return value.values.ndim if isinstance(value, Numbers) else len(g.shape(value.tensor))


def axis_of(node: gs.Node, rank: int, default: int) -> int:
    return int(node.attrs.get("axis", default)) % rank


def product(sizes: Sequence[Any]) -> int:
    if not all(isinstance(item, int) for item in sizes):
        raise Declined("it depends on a dynamic size beside the number of rows")
    return math.prod(sizes)


def as_shape(work: Evaluation, entries: Sequence[Any], capacity: gs.Tensor | int) -> gs.Tensor:
    """A shape, with the number of places in place of the number of rows."""
    return shape_tensor(work.g, [capacity if isinstance(item, Count) else int(item) for item in entries])


def capacity_of(work: Evaluation, count: Count) -> gs.Tensor | int:
    """How many places a count stands for."""
    if count.most is not None:
        return count.most
    selection = next(
        item
        for item in (*work.made.values(), *work.memory.values.values())
        if isinstance(item, Rows) and item.count == Count(count.source)
    )
    places = as_tensor(work.g, size(work.g, selection.tensor, selection.axis))
    for op, number in count.plain().steps:
        places = (work.g.op.Add if op == "+" else work.g.op.Min)(places, np.array([number]))
    return places
