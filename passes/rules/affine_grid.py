"""AffineGrid: ``F.affine_grid``, of images and of volumes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.rules.numbers import Number, of, tensor
from passes.rules.shapes import Size, iota


@rule("AffineGrid", when=lacks("AffineGrid"))
def affine_grid_as_sums(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no AffineGrid; a place is a sum over the axes of the image, each by a column of the matrix."""
    theta, sizes = node.inputs
    spatial = g.static_dim(sizes, 0) - 2
    dtype = g.dtype(theta)
    columns = [g.slice(theta, [i], [i + 1], [2], [1]) for i in range(spatial + 1)]  # each [N, spatial, 1]
    places: gs.Tensor | None = None
    for axis in range(spatial):  # of the image, the last of which is x
        length = _entry(g, sizes, 2 + axis)
        along = g.cast(tensor(g, _between(g, length, bool(node.attrs.get("align_corners", 0)))), dtype)
        shape = [1] * (spatial + 2)
        shape[1 + axis] = -1
        factor = g.op.Reshape(columns[spatial - 1 - axis], [0, *[1] * spatial, spatial])
        term = g.op.Mul(g.op.Reshape(along, shape), factor)
        places = term if places is None else g.op.Add(places, term)
    return g.op.Add(places, g.op.Reshape(columns[spatial], [0, *[1] * spatial, spatial]))


def _entry(g: Builder, sizes: gs.Tensor, place: int) -> Size:
    if isinstance(sizes, gs.Constant):
        return int(np.asarray(sizes.values).reshape(-1)[place])
    return g.slice(sizes, [place], [place + 1], [0], [1])


def _between(g: Builder, length: Size, corners: bool) -> Number:
    """From -1 to 1, at the centres of so many pixels, or (``corners``) with the outer ones at the ends."""
    if isinstance(length, int):
        if corners and length == 1:
            g.decline("one pixel with aligned corners, of which ONNX and torch think differently")
        numbers: Number = np.arange(length, dtype=np.float64)
        count: Number = float(length)
    else:
        numbers, count = g.cast(iota(g, length), np.float32), g.cast(length, np.float32)
    twice = of(g, "Mul", numbers, 2.0)
    if corners:
        return of(g, "Sub", of(g, "Div", twice, of(g, "Max", of(g, "Sub", count, 1.0), 1.0)), 1.0)
    return of(g, "Sub", of(g, "Div", of(g, "Add", twice, 1.0), count), 1.0)


# --- examples ----------------------------------------------------------------------------------------------------


@affine_grid_as_sums.example
def grid_of_known_size() -> gs.Graph:
    return example(
        {"theta": ("float32", ["n", 2, 3])}, lambda g, theta: g.op.AffineGrid(theta, g.constant([3, 1, 5, 6]))
    )


@affine_grid_as_sums.example
def grid_of_a_volume_with_aligned_corners() -> gs.Graph:
    shape = [2, 1, 4, 5, 6]
    return example(
        {"theta": ("float32", [2, 3, 4])}, lambda g, theta: g.op.AffineGrid(theta, g.constant(shape), align_corners=1)
    )


@affine_grid_as_sums.example
def grid_of_a_volume_of_any_size() -> gs.Graph:
    return example(
        {"theta": ("float32", ["n", 3, 4]), "x": ("float32", ["n", 3, "d", "h", "w"])},
        lambda g, theta, x: g.op.AffineGrid(theta, g.op.Shape(x), align_corners=1),
    )
