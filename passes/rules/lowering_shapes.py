"""Split, Pad and Shape in forms that came after a parser's time.

``torch.chunk`` (Split into a number of parts), ``F.pad`` (Pad of chosen axes, and around in a circle).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lowering, rule
from passes.model import Array
from passes.rules.shapes import iota, reshape, size

if TYPE_CHECKING:
    from bridge.target import Target


@lowering("Split", since=18)
def split_by_sizes(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 18, Split is told the sizes of the parts, not how many there are."""
    if "num_outputs" not in node.attrs:
        return None
    x, parts = node.inputs[0], len(node.outputs)
    axis = int(node.attrs.get("axis", 0)) % len(g.shape(x))
    length = size(g, x, axis)
    if isinstance(length, int):
        each = -(-length // parts)
        sizes = [min(each, max(length - each * index, 0)) for index in range(parts)]
        made = g.node("Split", [x, sizes], {"axis": axis}, parts)
        return list(made) if parts > 1 else made
    each_ = g.op.Div(g.op.Add(length, [parts - 1]), [parts])
    ends = [g.op.Mul(each_, [index]) for index in range(parts + 1)]
    return [g.op.Slice(x, ends[index], ends[index + 1], [axis]) for index in range(parts)]


@split_by_sizes.example
def the_last_part_is_smaller() -> gs.Graph:
    return example({"x": ("float32", ["n", 7])}, lambda g, x: g.op.Split(x, outputs=3, axis=-1, num_outputs=3))


@split_by_sizes.example
def parts_of_a_dynamic_axis() -> gs.Graph:
    return example({"x": ("float32", [2, "t", 4])}, lambda g, x: g.op.Split(x, outputs=2, axis=1, num_outputs=2))


@split_by_sizes.example
def one_part() -> gs.Graph:
    return example(
        {"x": ("float32", [3, 4])}, lambda g, x: g.op.Neg(g.op.Split(x, outputs=1, axis=1, num_outputs=1)), 18
    )


@lowering("Pad", since=18)
def pad_every_axis(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 18, Pad is given pads for every axis; before 19 it knows no circle."""
    x, pads = node.inputs[0], node.inputs[1]
    axes, mode = g.input(node, 3), node.attrs.get("mode", "constant")
    if axes is None and mode != "wrap":
        return None
    rank = len(g.shape(x))
    chosen = list(range(rank)) if axes is None else [int(axis) % rank for axis in g.value(axes).reshape(-1)]
    if mode == "wrap":
        return _around(g, x, g.value(pads).reshape(2, -1), chosen)
    if isinstance(pads, gs.Constant):
        full = np.zeros((2, rank), np.int64)
        full[:, chosen] = g.value(pads).reshape(2, -1)
        every: gs.Tensor = g.constant(full.reshape(-1))
    else:
        count = len(chosen)
        places = np.full((2, rank), 2 * count)  # where the zero is
        for index, axis in enumerate(chosen):
            places[:, axis] = (index, count + index)
        every = g.op.Gather(g.op.Concat(pads, [0], axis=0), places.reshape(-1), axis=0)
    return g.op.Pad(x, every, g.input(node, 2), mode=mode)


def _around(g: Builder, x: gs.Tensor, pads: Array, axes: list[int]) -> gs.Tensor:
    """Padded by what is at the other end: along each axis, places counted modulo its size.

    Pads below zero cut, and what is cut off does not come back at the other end.
    """
    for (before, after), axis in zip(pads.T.tolist(), axes, strict=True):
        if min(before, after) < 0:
            x = g.slice(x, [max(-before, 0)], [after if after < 0 else np.iinfo(np.int64).max], [axis], [1])
            before, after = max(before, 0), max(after, 0)
        if before == after == 0:
            continue
        length = size(g, x, axis)
        if isinstance(length, int):
            places: gs.Tensor = g.constant(np.arange(-before, length + after) % length)
        else:
            first = g.op.Sub(length, [before])  # not negative, unless more is padded than there is
            places = g.op.Mod(g.op.Add(iota(g, g.op.Add(length, [before + after])), first), length)
        x = g.op.Gather(x, places, axis=axis)
    return g.op.Identity(x)


def _pad(axes: list[int] | None, pads: list[int], mode: str, shape: list[int | str], opset: int = 19) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        made: gs.Tensor = g.op.Pad(x, pads, None, axes, mode=mode)
        return made

    return example({"x": ("float32", shape)}, build, opset)


@pad_every_axis.example
def of_two_axes_by_a_constant() -> gs.Graph:
    return _pad([-1, 1], [1, 0, 2, 3], "constant", ["n", 3, 4], 18)


@pad_every_axis.example
def of_one_axis_by_its_edge() -> gs.Graph:
    return _pad([-1], [2, 1], "edge", [2, "c", 4])


@pad_every_axis.example
def in_a_circle() -> gs.Graph:
    return _pad(None, [0, 0, 1, 3, 0, 0, 2, -1], "wrap", ["n", 2, 3, 4])


@pad_every_axis.example
def in_a_circle_of_dynamic_size() -> gs.Graph:
    return _pad([1], [2, 3], "wrap", [2, "t", 4])


@pad_every_axis.example
def by_sizes_computed_from_the_shape() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        missing = g.op.Sub([6], g.op.Shape(x, start=1, end=2))
        made: gs.Tensor = g.op.Pad(x, g.op.Concat([0], missing, axis=0), 2.5, [1])
        return made

    return example({"x": ("float32", [2, "t", 4])}, build, 18)


def _reads_whole_shapes(target: Target) -> bool:
    """Of parsers before TensorRT 9 it is not known that they read Shape's attributes, which opset 15 brought."""
    return target.of_tensorrt_8


@rule("Shape", when=_reads_whole_shapes)
def part_of_a_shape_as_slice(node: gs.Node, g: Builder) -> Replacement:
    """Older parsers may not read Shape's start and end; a Slice of the whole shape is the same."""
    if "start" not in node.attrs and "end" not in node.attrs:
        return None
    rank = len(g.shape(node.inputs[0]))
    start, end, _ = slice(node.attrs.get("start", 0), node.attrs.get("end")).indices(rank)
    whole = g.op.Shape(node.inputs[0])
    return whole if (start, end) == (0, rank) else g.slice(whole, [start], [end], [0], [1])


@part_of_a_shape_as_slice.example
def one_size() -> gs.Graph:
    return example({"x": ("float32", ["n", "c", 4])}, lambda g, x: g.op.Shape(x, start=-2, end=2))


@part_of_a_shape_as_slice.example
def the_sizes_from_one_on() -> gs.Graph:
    return example({"x": ("float32", ["n", "c", 4])}, lambda g, x: [g.op.Shape(x, start=1), g.op.Shape(x, start=-9)])


@lowering("SpaceToDepth", since=28)
def space_to_depth_in_either_order(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 28, SpaceToDepth knows one order of what it moves; a Reshape and a Transpose know the other."""
    x, block = node.inputs[0], int(node.attrs["blocksize"])
    if node.attrs.get("mode", "DCR") == "DCR":
        return g.op.SpaceToDepth(x, blocksize=block)
    batch, channels = size(g, x, 0), g.static_dim(x, 1)
    height, width = (g.static_dim(x, axis) // block for axis in (2, 3))
    apart = reshape(g, x, [batch, channels, height, block, width, block])
    moved = g.op.Transpose(apart, perm=[0, 1, 3, 5, 2, 4])
    return reshape(g, moved, [batch, channels * block * block, height, width])


def _in_blocks(feeds: Mapping[str, Array]) -> list[Array]:
    n, c, h, w = feeds["x"].shape
    apart = feeds["x"].reshape(n, c, h // 2, 2, w // 2, 2)
    orders = (apart.transpose(0, 3, 5, 1, 2, 4), apart.transpose(0, 1, 3, 5, 2, 4))
    return [item.reshape(n, c * 4, h // 2, w // 2) for item in orders]


@space_to_depth_in_either_order.example_against(_in_blocks)
def blocks_in_both_orders() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.SpaceToDepth(x, blocksize=2, mode=mode) for mode in ("DCR", "CRD")]

    return example({"x": ("float32", ["n", 3, 4, 6])}, build, 28)
