"""TensorScatter: what a key or value cache is written with, at a place of its own for each sequence."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.rules.shapes import Size, as_tensor, iota, shape_tensor, size


@rule("TensorScatter")
def tensor_scatter_as_scatter(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's TensorScatter is linear and of four axes; any other is a ScatterElements along its axis."""
    cache, update = node.inputs[:2]
    rank = len(g.shape(cache))
    axis = int(node.attrs.get("axis", -2)) % rank
    circular = node.attrs.get("mode", "linear") == "circular"
    if g.target is not None and g.target.takes("TensorScatter") and rank == 4 and axis == 2 and not circular:
        return None
    if axis == 0:
        g.decline("the axis is that of the batch")
    places = _spread(g, iota(g, size(g, update, axis)), axis, rank)
    starts = g.input(node, 2)
    if starts is not None:
        places = g.op.Add(places, _spread(g, g.cast(starts, np.int64), 0, rank))
    if circular:
        places = g.op.Mod(places, as_tensor(g, size(g, cache, axis)))
    sizes: list[Size] = [size(g, update, index) for index in range(rank)]
    return g.op.ScatterElements(cache, g.op.Expand(places, shape_tensor(g, sizes)), update, axis=axis)


def _spread(g: Builder, numbers: gs.Tensor, axis: int, rank: int) -> gs.Tensor:
    """Numbers along ``axis``, ones elsewhere."""
    spread: gs.Tensor = g.op.Reshape(numbers, [-1 if index == axis else 1 for index in range(rank)])
    return spread


def _cache(shape: list[int | str], length: int, axis: int, mode: str) -> gs.Graph:
    update = [length if index == axis % len(shape) else item for index, item in enumerate(shape)]
    return example(
        {"x": ("float32", shape), "u": ("float32", update), "i": ("int64", [shape[0]])},
        lambda g, x, u, i: g.op.TensorScatter(x, u, i, axis=axis, mode=mode),
        opset=24,
    )


@tensor_scatter_as_scatter.example
def a_ring_of_keys() -> gs.Graph:
    return _cache(["n", 2, 5, 4], 4, -2, "circular")


@tensor_scatter_as_scatter.example
def a_cache_of_three_axes() -> gs.Graph:
    return _cache(["n", 6, 4], 3, 1, "linear")
