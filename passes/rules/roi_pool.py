"""MaxRoiPool: ``torchvision.ops.roi_pool``."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.rules.shapes import check_intermediate, iota, size


@rule("MaxRoiPool", when=lacks("MaxRoiPool"))
def max_roi_pool_by_masks(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no MaxRoiPool; a bin's maximum is one over columns, then rows, of what is masked outside of it."""
    x, rois = node.inputs
    high, wide = node.attrs["pooled_shape"]
    kept, shape = g.dtype(x), g.shape(x)
    check_intermediate(g, [g.shape(rois)[0], *shape[1:], wide], "each region's map, once for each column of bins")
    image = g.op.Cast(g.op.Gather(rois, np.array(0), axis=1), to=7)
    corners = g.slice(g.cast(rois, np.float32), [1], [5], [1], [1])
    places = _rounded(g, g.op.Mul(corners, np.float32(node.attrs.get("spatial_scale", 1.0))))
    columns = _bins(g, places, 0, wide, iota(g, size(g, x, 3)))  # [regions, bins, columns]
    rows = _bins(g, places, 1, high, iota(g, size(g, x, 2)))
    outside = np.array(-np.inf, kept)
    maps = g.unsqueeze(g.op.Gather(x, image, axis=0), [3])  # [regions, channels, rows, 1, columns]
    across = g.reduce("ReduceMax", g.op.Where(g.unsqueeze(columns, [1, 2]), maps, outside), [4])
    found = g.op.Where(g.unsqueeze(rows, [1, 4]), g.unsqueeze(across, [2]), outside)
    filled = g.op.And(g.unsqueeze(_any(g, rows), [1, 3]), g.unsqueeze(_any(g, columns), [1, 2]))
    return g.op.Where(filled, g.reduce("ReduceMax", found, [3]), np.array(0, kept))


def _rounded(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """To the nearest integer, halves away from zero; ONNX's Round takes them to even ones."""
    result: gs.Tensor = g.op.Mul(g.op.Sign(x), g.op.Floor(g.op.Add(g.op.Abs(x), np.float32(0.5))))
    return result


def _bins(g: Builder, corners: gs.Tensor, axis: int, count: int, places: gs.Tensor) -> gs.Tensor:
    """[regions, ``count``, places]: which places along the axis lie in which bin of which region."""
    start, end = (g.op.Gather(corners, np.array([index]), axis=1) for index in (axis, axis + 2))
    length = g.op.Max(g.op.Add(g.op.Sub(end, start), np.float32(1)), np.float32(1))
    step = g.op.Div(length, np.float32(count))  # [regions, 1]
    number = np.arange(count, dtype=np.float32)
    first = g.op.Add(g.op.Floor(g.op.Mul(step, number)), start)
    past = g.op.Add(g.op.Ceil(g.op.Mul(step, number + 1)), start)
    at = g.cast(places, np.float32)
    reached = g.op.Not(g.op.Less(at, g.unsqueeze(first, [2])))
    result: gs.Tensor = g.op.And(reached, g.op.Less(at, g.unsqueeze(past, [2])))
    return result


def _any(g: Builder, mask: gs.Tensor) -> gs.Tensor:
    return g.cast(g.reduce("ReduceMax", g.cast(mask, np.int32), [2]), np.bool_)


@max_roi_pool_by_masks.example
def regions_within_and_beyond_the_image() -> gs.Graph:
    rois = np.array([[0, 1, 2, 6, 7], [1, -3, 0.5, 2.5, 20], [0, 30, 30, 40, 40], [1, 4, 4, 4, 4]], np.float32)
    return example(
        {"x": ("float32", [2, 3, 9, 8])},
        lambda g, x: g.op.MaxRoiPool(x, rois, pooled_shape=[3, 2], spatial_scale=0.75),
    )


@max_roi_pool_by_masks.example
def any_number_of_regions_on_maps_of_any_size() -> gs.Graph:
    return example(
        {"x": ("float32", [1, 2, "h", "w"]), "corners": ("float32", ["r", 4])},
        lambda g, x, corners: g.op.MaxRoiPool(
            x,
            g.op.Concat(g.op.Mul(g.slice(corners, [0], [1], [1], [1]), np.float32(0)), corners, axis=1),
            pooled_shape=[2, 2],
        ),
    )
