"""Sampling of volumes, ``F.grid_sample`` with five axes, for parsers whose GridSample knows images alone."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.rules.shapes import reshape, shape_tensor, size

if TYPE_CHECKING:
    from bridge.target import Target


def _samples_images_alone(target: Target) -> bool:
    """Opset 20 brought volumes; TensorRT 8.5 crashes at them."""
    return target.opset is not None and target.opset < 20


@rule("GridSample", when=_samples_images_alone)
def volume_sampled_by_gathers(node: gs.Node, g: Builder) -> Replacement:
    """Before TensorRT 9, GridSample knows no volumes; a sample is a weighted sum of its eight neighbours."""
    x, grid = node.inputs
    if len(g.shape(x)) != 5:
        return None
    mode, padding = node.attrs.get("mode", "linear"), node.attrs.get("padding_mode", "zeros")
    if mode not in ("linear", "nearest"):
        g.decline(f"the mode {mode!r} of a volume")
    lengths = [g.static_dim(x, axis) for axis in (2, 3, 4)]
    aligned = bool(node.attrs.get("align_corners", 0))
    rows = [size(g, x, 0), size(g, x, 1)]
    flat = reshape(g, x, [*rows, int(np.prod(lengths))])
    grid = g.cast(grid, np.float32)
    points = [size(g, grid, axis) for axis in (1, 2, 3)]
    places = []
    for axis, length in enumerate(lengths):  # the grid has its coordinates in the order x, y, z
        place = g.op.Reshape(g.op.Gather(grid, g.constant(2 - axis), axis=4), [0, -1])
        places.append(_place(g, place, length, aligned, padding))
    if mode == "nearest":
        corners: list[tuple[list[gs.Tensor], gs.Tensor | None]] = [([g.op.Round(place) for place in places], None)]
    else:
        corners = [*_corners(g, places)]
    total: gs.Tensor | None = None
    for corner, weight in corners:
        values = _values(g, flat, corner, lengths, padding)
        if weight is not None:
            values = g.op.Mul(values, g.cast(g.unsqueeze(weight, [1]), g.dtype(x)))
        total = values if total is None else g.op.Add(total, values)
    assert total is not None
    return reshape(g, total, [*rows, *points])


def _number(g: Builder, value: float) -> gs.Constant:
    return g.constant(value, np.float32)


def _place(g: Builder, place: gs.Tensor, length: int, aligned: bool, padding: str) -> gs.Tensor:
    """[N, points]: where along an axis of ``length`` the coordinate, from -1 to 1, lies."""
    scale = (length - 1) / 2 if aligned else length / 2
    place = g.op.Add(g.op.Mul(place, _number(g, scale)), _number(g, (length - 1) / 2))
    if padding == "reflection":
        low = 0.0 if aligned else -0.5
        span = length - 1 - 2 * low
        if span == 0:
            return g.op.Mul(place, _number(g, 0))
        away = g.op.Abs(g.op.Sub(place, _number(g, low)))
        turns = g.op.Floor(g.op.Div(away, _number(g, span)))
        rest = g.op.Sub(away, g.op.Mul(turns, _number(g, span)))
        half = g.op.Mul(turns, _number(g, 0.5))
        odd = g.op.Greater(g.op.Sub(half, g.op.Floor(half)), _number(g, 0.25))
        place = g.op.Add(g.op.Where(odd, g.op.Sub(_number(g, span), rest), rest), _number(g, low))
    if padding != "zeros":
        place = g.op.Min(g.op.Max(place, _number(g, 0)), _number(g, length - 1))
    return place


def _corners(g: Builder, places: list[gs.Tensor]) -> list[tuple[list[gs.Tensor], gs.Tensor]]:
    """The eight neighbours of each point, each with its weight."""
    low = [g.op.Floor(place) for place in places]
    high = [g.op.Add(item, _number(g, 1)) for item in low]
    far = [g.op.Sub(place, item) for place, item in zip(places, low, strict=True)]
    near = [g.op.Sub(_number(g, 1), item) for item in far]
    corners = []
    for sides in product((0, 1), repeat=len(places)):
        place = [(low, high)[side][axis] for axis, side in enumerate(sides)]
        parts = [(near, far)[side][axis] for axis, side in enumerate(sides)]
        corners.append((place, g.op.Mul(g.op.Mul(parts[0], parts[1]), parts[2])))
    return corners


def _values(g: Builder, flat: gs.Tensor, corner: list[gs.Tensor], lengths: list[int], padding: str) -> gs.Tensor:
    """[N, C, points]: the elements of ``flat`` [N, C, places] at ``corner``; outside of it there is nothing."""
    index: gs.Tensor | None = None
    inside: gs.Tensor | None = None
    for place, length in zip(corner, lengths, strict=True):
        kept = g.op.Min(g.op.Max(place, _number(g, 0)), _number(g, length - 1))
        here = g.op.Equal(kept, place)
        inside = here if inside is None else g.op.And(inside, here)
        step = g.cast(kept, np.int64)
        index = step if index is None else g.op.Add(g.op.Mul(index, [length]), step)
    assert index is not None and inside is not None
    sizes = [size(g, flat, 0), size(g, flat, 1), size(g, index, 1)]
    spread = g.op.Expand(g.unsqueeze(index, [1]), shape_tensor(g, sizes))
    values: gs.Tensor = g.op.GatherElements(flat, spread, axis=2)
    if padding != "zeros":
        return values
    nothing = g.constant(0, g.dtype(flat))
    masked: gs.Tensor = g.op.Where(g.unsqueeze(inside, [1]), values, nothing)
    return masked


def _volume(mode: str, padding: str, aligned: int) -> gs.Graph:
    attrs = {"mode": mode, "padding_mode": padding, "align_corners": aligned}
    return example(
        {"x": ("float32", ["n", "c", 3, 4, 5]), "grid": ("float32", ["n", 2, "h", 4, 3])},
        lambda g, x, grid: g.op.GridSample(x, grid, **attrs),
    )


@volume_sampled_by_gathers.example
def linear_with_nothing_outside() -> gs.Graph:
    return _volume("linear", "zeros", 0)


@volume_sampled_by_gathers.example
def linear_with_the_edge_outside() -> gs.Graph:
    return _volume("linear", "border", 1)


@volume_sampled_by_gathers.example
def linear_with_a_mirror_outside() -> gs.Graph:
    return _volume("linear", "reflection", 0)


@volume_sampled_by_gathers.example
def the_nearest_neighbour() -> gs.Graph:
    return _volume("nearest", "zeros", 1)
