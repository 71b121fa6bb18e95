"""Sorts and selections: TopK of more than TensorRT's 3840, and what is unique, selected by a mask, or both.

``x.sort()``, ``x.topk(5000)``, ``torch.unique(x)``, ``x[mask]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Condition, Replacement, example, lacks, rule
from passes.rules.shapes import check_intermediate, iota, shape_tensor, size

MOST = 3840
"""TensorRT's TopK gives no more."""
MOST_ROUNDS = 64
"""How often TopK is run at most for one of ONNX: up to 245,760 elements are sorted."""

takes_nonzero = Condition(lambda target: target.takes("NonZero"))


@rule("TopK")
def long_topk_in_rounds(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's TopK gives 3840 elements at most; what it gave is crossed out, and the next are taken of the rest."""
    x, wanted = node.inputs[0], g.input(node, 1)
    if wanted is None or not isinstance(wanted, gs.Constant):
        return None
    k = int(np.asarray(wanted.values).reshape(-1)[0])
    if k <= MOST:
        return None
    if k > MOST * MOST_ROUNDS:
        g.decline(f"{k:,} elements take more than {MOST_ROUNDS} rounds of {MOST}")
    axis, kind = int(node.attrs.get("axis", -1)) % len(g.shape(x)), g.dtype(x)
    largest = bool(node.attrs.get("largest", 1))
    rest, last = _with_an_end(g, x, kind, largest)
    places, attrs = [], {**node.attrs, "sorted": 1}
    for done in range(0, k, MOST):
        count = min(MOST, k - done)
        _, found = g.node("TopK", [rest, [count]], attrs, 2)
        places.append(found)
        if done + count < k:
            shape = [count if i == axis else size(g, x, i) for i in range(len(g.shape(x)))]
            crossed = g.op.Expand(g.constant(last, g.dtype(rest)), shape_tensor(g, shape))
            rest = g.op.ScatterElements(rest, found, crossed, axis=axis)
    joined = g.op.Concat(*places, axis=axis)
    return [g.op.GatherElements(x, joined, axis=axis), joined]


def _with_an_end(g: Builder, x: gs.Tensor, kind: np.dtype[Any], largest: bool) -> tuple[gs.Tensor, float]:
    """``x`` in a type, or a range, that leaves one value after all others in order; and that value."""
    if kind in (np.int32, np.int16, np.int8, np.uint8, np.uint16):
        return g.cast(x, np.int64), int(np.iinfo(np.int64).min if largest else np.iinfo(np.int64).max)
    if kind == np.int64:  # whose last number counts as the one before it
        limits = np.iinfo(np.int64)
        inside = g.constant(limits.min + 1 if largest else limits.max - 1)
        return g.node("Max" if largest else "Min", [x, inside], {}), int(limits.min if largest else limits.max)
    if kind.name == "bfloat16" or kind == np.float16:
        x = g.cast(x, np.float32)
    end = float(np.finfo(np.float32).max)  # an infinity at the end counts as the last finite number
    bound = g.constant(np.float32(-end if largest else end))
    return g.node("Max" if largest else "Min", [x, bound], {}), -np.inf if largest else np.inf


@rule("Compress")
def compress_by_constant(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no Compress; by a mask that is known it gathers."""
    x, mask = node.inputs
    if not isinstance(mask, gs.Constant):
        return None
    places = np.flatnonzero(np.asarray(mask.values))
    if node.attrs.get("axis") is None:
        return g.op.Gather(g.op.Reshape(x, [-1]), g.constant(places), axis=0)
    return g.op.Gather(x, g.constant(places), axis=int(node.attrs["axis"]))


@rule("Compress", when=lacks("Compress") & takes_nonzero)
def compress_by_nonzero(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no Compress; it is a Gather of the places that NonZero finds."""
    x, mask = node.inputs
    if isinstance(mask, gs.Constant):
        return None
    places = g.op.Reshape(g.op.NonZero(mask), [-1])
    if node.attrs.get("axis") is None:
        return g.op.Gather(g.op.Reshape(x, [-1]), places, axis=0)
    return g.op.Gather(x, places, axis=int(node.attrs["axis"]))


@rule("Unique", when=lacks("Unique") & takes_nonzero)
def unique_by_comparison(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no Unique; every element is compared with every other, and NonZero finds the first of its kind."""
    x, axis = node.inputs[0], node.attrs.get("axis")
    rank = len(g.shape(x))
    rows = g.op.Reshape(x, [-1, 1]) if axis is None else g.moveaxis(x, int(axis), 0)
    if axis is not None:
        width = int(np.prod(g.static_shape(rows)[1:])) if rank > 1 else 1
        rows = g.op.Reshape(rows, [-1, width])
    count = g.shape(rows)[0]
    check_intermediate(g, [count, count, g.shape(rows)[1]], "every element beside every other")
    same, before = _compared(g, rows)
    numbers = iota(g, size(g, rows, 0))
    first_like = g.op.ArgMax(g.cast(same, np.int32), axis=1, keepdims=0)
    is_first = g.op.Equal(first_like, numbers)
    firsts = g.op.Reshape(g.op.NonZero(is_first), [-1])
    counted = g.unsqueeze(g.cast(is_first, np.int32), [0])
    earlier = before if node.attrs.get("sorted", 1) else g.op.Less(g.unsqueeze(numbers, [0]), g.unsqueeze(numbers, [1]))
    rank_of = g.cast(g.reduce("ReduceSum", g.op.Mul(g.cast(earlier, np.int32), counted), [1]), np.int64)
    order = firsts
    if node.attrs.get("sorted", 1):
        order = g.op.ScatterElements(firsts, g.op.Gather(rank_of, firsts), firsts, axis=0)
    flat = g.op.Reshape(x, [-1]) if axis is None else x
    unique = g.op.Gather(flat, order, axis=0 if axis is None else int(axis))
    counts = g.cast(g.reduce("ReduceSum", g.cast(same, np.int32), [1]), np.int64)
    results = [unique, order, g.op.Gather(rank_of, first_like), g.op.Gather(counts, order)]
    return results[: len(node.outputs)]


def _compared(g: Builder, rows: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """[n, n]: whether row j is row i, and whether it comes before it."""
    if g.dtype(rows) == np.bool_:
        rows = g.cast(rows, np.int32)
    here, there = g.unsqueeze(rows, [1]), g.unsqueeze(rows, [0])  # [i, 1, width] and [1, j, width]
    equal, less = g.op.Equal(here, there), g.op.Less(there, here)
    if g.shape(rows)[1] == 1:
        return g.squeeze(equal, [2]), g.squeeze(less, [2])
    different = g.cast(g.op.Not(equal), np.int32)
    same = g.op.Equal(g.reduce("ReduceMax", different, [2]), g.constant(0, np.int32))
    decisive = g.op.ArgMax(different, axis=2, keepdims=1)  # the first place where they differ
    lesser = g.op.GatherElements(g.cast(less, np.int32), decisive, axis=2)
    return same, g.op.Equal(g.squeeze(lesser, [2]), g.constant(1, np.int32))


# --- examples ----------------------------------------------------------------------------------------------------


@long_topk_in_rounds.example
def a_whole_row_sorted() -> gs.Graph:
    return example({"x": ("float32", ["n", 9000])}, lambda g, x: g.op.TopK(x, [9000], outputs=2, largest=0))


@long_topk_in_rounds.example
def many_integers_of_the_first_axis() -> gs.Graph:
    return example(
        {"x": ("int32", [5000, "n"])},
        lambda g, x: g.op.TopK(x, [4000], outputs=2, axis=0),
    )


@compress_by_constant.example
def every_other_column() -> gs.Graph:
    mask = np.array([True, False, True, False])
    return example(
        {"x": ("float32", ["n", 4])},
        lambda g, x: [g.op.Compress(x, g.constant(mask), axis=1), g.op.Compress(x, g.constant(mask[:3]))],
    )


@compress_by_nonzero.example
def columns_by_a_mask() -> gs.Graph:
    return example(
        {"x": ("float32", [3, 4]), "m": ("bool", [4])},
        lambda g, x, m: [g.op.Compress(x, m, axis=-1), g.op.Compress(x, m)],
    )


@unique_by_comparison.example
def sorted_numbers_with_counts() -> gs.Graph:
    return example({"x": ("float32", [6])}, lambda g, x: g.op.Unique(g.op.Round(x), outputs=4))


@unique_by_comparison.example
def counts_alone() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        numbers, _, _, counts = g.op.Unique(x, outputs=4)
        node = numbers.inputs[0]
        node.outputs[1] = node.outputs[2] = gs.Variable("")
        return [numbers, counts]

    return example({"x": ("int64", [6])}, build)


@unique_by_comparison.example
def rows_in_order_of_appearance() -> gs.Graph:
    return example({"x": ("int64", [7, 2])}, lambda g, x: g.op.Unique(x, outputs=4, axis=0, sorted=0))
