"""The order of integers, for parsers that order floats alone: ``topk``, ``sort`` and ``argmax`` of int32 and int64.

float32 holds every integer up to 2^24, and equal ones beyond. So places are compared, not values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.rules.integers import fits
from passes.rules.shapes import check_intermediate, iota, size

if TYPE_CHECKING:
    from bridge.target import Target

EXACT = np.dtype(np.int16)
"""Integers of this type and smaller ones are float32s, each of its own."""
MOST_COMPARED = 2048
"""Elements along an axis up to which each is compared with each."""


def _orders_floats_alone(target: Target) -> bool:
    return not target.orders_integers


@rule("ArgMax", "ArgMin", when=_orders_floats_alone)
def place_of_the_extreme_integer(node: gs.Node, g: Builder) -> Replacement:
    """Before TensorRT 8.6, ArgMax takes floats alone; the greatest integer is where the difference to it is 0."""
    x = node.inputs[0]
    if g.dtype(x).kind not in "iu":
        return None
    axis = int(node.attrs.get("axis", 0)) % len(g.shape(x))
    extreme = g.reduce(f"Reduce{node.op[3:]}", x, [axis], keepdims=True)
    here = g.cast(g.op.Equal(x, extreme), np.float32)
    return g.node("ArgMax", [here], {**node.attrs, "axis": axis})


@rule("TopK", when=_orders_floats_alone)
def topk_of_integers(node: gs.Node, g: Builder) -> Replacement:
    """Before TensorRT 8.6, TopK takes floats alone; the places that integers have in their order are floats too."""
    x = node.inputs[0]
    if g.dtype(x).kind not in "iu":
        return None
    count, rank = node.inputs[1], len(g.shape(x))
    axis = int(node.attrs.get("axis", -1)) % rank
    attrs = {"axis": axis, "largest": int(node.attrs.get("largest", 1)), "sorted": node.attrs.get("sorted")}
    keys = x
    if not (g.dtype(x).itemsize < 4 or fits(x, EXACT)):
        keys = _order(g, x, axis, bool(attrs["largest"]))
        attrs["largest"] = 0
    _, indices = g.node("TopK", [g.cast(keys, np.float32), count], attrs, 2)
    return [g.op.GatherElements(x, indices, axis=axis), indices]


def _order(g: Builder, x: gs.Tensor, axis: int, largest: bool) -> gs.Tensor:
    """How many elements along ``axis`` come before each; of equal ones, those with a lower index."""
    rank, length = len(g.shape(x)), g.static_dim(x, axis)
    if length > MOST_COMPARED:
        g.decline(f"the order of {length} integers, more than {MOST_COMPARED}, that may not fit 16 bits")
    check_intermediate(g, [*g.shape(x), length], "every integer with every other")
    turned = g.moveaxis(x, axis, -1)
    mine, other = g.unsqueeze(turned, [rank]), g.unsqueeze(turned, [rank - 1])
    before = g.op.Greater(other, mine) if largest else g.op.Less(other, mine)
    places = iota(g, size(g, turned, rank - 1))
    earlier = g.op.Less(g.unsqueeze(places, [0]), g.unsqueeze(places, [1]))
    ahead = g.op.Or(before, g.op.And(g.op.Equal(other, mine), earlier))
    return g.moveaxis(g.reduce("ReduceSum", g.cast(ahead, np.float32), [rank]), -1, axis)


@place_of_the_extreme_integer.example
def first_of_the_greatest_and_last_of_the_least() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        far = g.op.Add(x, g.constant(1 << 26, np.int32))  # where float32 has every fourth integer
        return [g.op.ArgMax(far, axis=1), g.op.ArgMin(far, axis=0, keepdims=0, select_last_index=1)]

    return example({"x": ("int32", ["n", 7])}, build, 13)


@topk_of_integers.example
def the_largest_integers() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        far = g.op.Add(x, g.constant(1 << 26))
        return list(g.op.TopK(far, [3], axis=1, outputs=2))

    return example({"x": ("int64", ["n", 6, 2])}, build, 18)


@topk_of_integers.example
def the_smallest_of_few_values() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        few = g.op.Cast(g.op.Cast(x, to=9), to=6)
        return [g.op.TopK(few, [2], largest=0, outputs=2)[0]]

    return example({"x": ("float32", ["n", 6])}, build, 18)
