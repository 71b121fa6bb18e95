"""What a mask selects (``x[mask]``, ``torch.nonzero``), where the model makes its number a fixed one again.

For targets without NonZero: the places that are true are numbered, and each number's place is looked up. What then
becomes of the selected is computed on all places (see ``plugins_rows``).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Condition, Replacement, example, lacks, rule
from passes.rules.plugins_rows import Evaluation, Plain, Result, Rows, Value, mark, replaced
from passes.rules.plugins_rows_parts import EXITS
from passes.rules.shapes import check_intermediate

BLOCK = 128
"""Places that are numbered by comparing each with each; then blocks are."""

by_plugin = Condition(lambda target: target.only_by_plugin("NonZero"))


@rule("NonZero", *EXITS, when=lacks("NonZero") | by_plugin)
def mask_as_places(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no NonZero but by plugin; where the number of what it finds becomes a fixed one, none is needed."""
    if node.op == "NonZero":
        mark(node, g, nonzero)
        return None
    return replaced(node, g, "NonZero")


def nonzero(work: Evaluation, node: gs.Node, given: list[Value]) -> Result:
    """Coordinates [rank, places], those of true elements first, with their number [1]."""
    g, value = work.g, given[0]
    if isinstance(value, Rows):
        mask = g.op.And(g.cast(value.tensor, np.bool_), work.filled(value))
    elif isinstance(value, Plain):
        mask = g.cast(value.tensor, np.bool_)
    else:
        g.decline("it looks for zeros in a shape")
    sizes = g.static_shape(mask)
    places = int(np.prod(sizes, dtype=np.int64))
    if not sizes or not places:
        g.decline("there is nothing to select from")
    check_intermediate(g, [places, BLOCK], "the comparison of places with places")
    flat = g.op.Cast(g.op.Reshape(mask, np.array([places])), to=7)
    number = _numbered(g, flat, places)
    count = g.slice(number, [places - 1], [places], [0], [1])
    slot = g.op.Where(g.op.Greater(flat, np.int64(0)), g.op.Sub(number, np.int64(1)), np.int64(places))
    there = g.op.ScatterElements(np.zeros(places + 1, np.int64), slot, np.arange(places), axis=0)
    left = g.slice(there, [0], [places], [0], [1])
    coordinates = []
    for axis in range(len(sizes) - 1):
        step = np.int64(np.prod(sizes[axis + 1 :], dtype=np.int64))
        coordinates.append(g.op.Div(left, step))
        left = g.op.Sub(left, g.op.Mul(coordinates[-1], step))
    coordinates = [g.unsqueeze(item, [0]) for item in (*coordinates, left)]
    return Result(g.op.Concat(*coordinates, axis=0), count, axis=1, key=id(node.inputs[0]))


def _numbered(g: Builder, ones: gs.Tensor, length: int) -> gs.Tensor:
    """How many ones there are up to each place: sums within blocks, and of the blocks before."""
    blocks = -(-length // BLOCK)
    width = min(length, BLOCK)
    more = blocks * width - length
    padded = g.op.Concat(ones, np.zeros(more, np.int64), axis=0) if more else ones
    rows = g.op.Reshape(padded, np.array([blocks, 1, width]))
    until = np.tril(np.ones((1, width, width), np.int64))
    within = g.reduce("ReduceSum", g.op.Mul(rows, until), [2])  # [blocks, width]
    if blocks == 1:
        return g.op.Reshape(within, np.array([width]))
    totals = g.op.Reshape(g.slice(within, [width - 1], [width], [1], [1]), np.array([blocks]))
    before = g.op.Sub(_numbered(g, totals, blocks), totals)
    numbered = g.op.Reshape(g.op.Add(within, g.unsqueeze(before, [1])), np.array([blocks * width]))
    return g.slice(numbered, [0], [length], [0], [1])


# --- examples ----------------------------------------------------------------------------------------------------


@mask_as_places.example
def sum_and_first_of_the_selected() -> gs.Graph:
    """``x[x > 0].sum()``, and ``cat([x[x > 0], zeros(5)])[:5]``."""

    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        places = g.op.Transpose(g.op.NonZero(g.op.Greater(x, np.float32(0))), perm=[1, 0])
        found = g.op.GatherND(x, places)
        padded = g.op.Concat(found, np.zeros(5, np.float32), axis=0)
        return [g.op.ReduceSum(found, keepdims=0), g.slice(padded, [0], [5], [0], [1]), g.op.Shape(found)]

    return example({"x": ("float32", [7, 30])}, build)


@mask_as_places.example
def rows_above_a_threshold_then_the_best_of_them() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        score = g.op.Gather(x, np.array(0), axis=1)
        kept = g.squeeze(g.op.NonZero(g.op.Greater(score, np.float32(0.1))), [0])
        rows = g.op.Concat(g.op.Gather(x, kept, axis=0), np.full([4, 3], -1, np.float32), axis=0)
        _, best = g.op.TopK(g.op.Gather(rows, np.array(0), axis=1), [4], outputs=2)
        result: gs.Tensor = g.op.Gather(rows, best, axis=0)
        return result

    return example({"x": ("float32", [300, 3])}, build)


@mask_as_places.example
def rows_that_are_added_to_what_is_there() -> gs.Graph:
    """A mixture of experts: ``out.index_add(0, chosen, expert(x[chosen]))``; none and one may be chosen."""

    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        results = []
        for limit, reduction in ((0.1, "add"), (100.0, "add"), (0.1, "mul"), (1.0, "max")):
            chosen = g.op.NonZero(g.op.Greater(g.op.Gather(x, np.array(0), axis=1), np.float32(limit)))
            rows = g.op.Mul(g.op.Gather(x, g.squeeze(chosen, [0]), axis=0), np.float32(3))
            places = g.op.Transpose(chosen, perm=[1, 0])
            results.append(g.op.ScatterND(x, places, rows, reduction=reduction))
        return results

    return example({"x": ("float32", [40, 3])}, build)
