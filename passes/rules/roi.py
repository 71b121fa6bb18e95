"""RoiAlign: ``torchvision.ops.roi_align``, where the target has no plugin for it.

Its average over samples is a product of two matrices for each region: one weighs the rows of the image, one its
columns. Which image of the batch a region lies in is a weight too, so nothing is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, has_plugin, lacks, rule
from passes.rules.numbers import Number, of
from passes.rules.shapes import Size, as_tensor, check_intermediate, iota, product, reshape, size, times


@dataclass(frozen=True)
class Samples:
    """Where the regions are sampled along one axis of the image; R regions, P bins each, K samples each."""

    places: gs.Tensor
    """[R, P, K], not beyond the image."""
    counted: gs.Tensor
    """[R, P, K]: 1 of a sample that lies on the image, 0 of others."""
    count: Number
    """How many samples a bin has: a number, or [R, 1, 1]."""


@rule("RoiAlign", when=lacks("RoiAlign") & ~has_plugin("ROIAlign_TRT", "1"))
def roi_align_as_matmul(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's RoiAlign is a plugin; the average of samples is a product with weights of rows and of columns."""
    x, rois, images = node.inputs
    mode = node.attrs.get("mode", "avg")
    ratio = int(node.attrs.get("sampling_ratio", 0))
    if mode == "max" and not ratio:
        g.decline("the maximum over a number of samples that depends on the region; set sampling_ratio")
    kept = g.dtype(x)
    high, wide = int(node.attrs.get("output_height", 1)), int(node.attrs.get("output_width", 1))
    rows = _samples(node, g, g.cast(rois, np.float32), (1, 3), high, size(g, x, 2), ratio)
    columns = _samples(node, g, g.cast(rois, np.float32), (0, 2), wide, size(g, x, 3), ratio)
    pooled = _maximum if mode == "max" else _average
    return g.cast(pooled(g, g.cast(x, np.float32), g.cast(images, np.int64), rows, columns, (high, wide)), kept)


def _samples(
    node: gs.Node, g: Builder, rois: gs.Tensor, ends: tuple[int, int], bins: int, length: Size, ratio: int
) -> Samples:
    half = node.attrs.get("coordinate_transformation_mode", "half_pixel") == "half_pixel" and g.opset >= 16
    scale = float(node.attrs.get("spatial_scale", 1.0))
    start, end = (
        of(g, "Sub", of(g, "Mul", g.op.Gather(rois, [end], axis=1), scale), 0.5 if half else 0.0) for end in ends
    )
    start, end = (g.unsqueeze(tensor, [2]) for tensor in (start, end) if isinstance(tensor, gs.Tensor))  # [R, 1, 1]
    extent = of(g, "Sub", end, start)
    if not half:
        extent = of(g, "Max", extent, 1.0)
    bin_ = of(g, "Div", extent, float(bins))
    first = of(g, "Add", start, of(g, "Mul", bin_, np.arange(bins, dtype=np.float32)[:, None]))  # [R, P, 1]
    count: Number = float(ratio) if ratio else of(g, "Ceil", bin_)
    step = of(g, "Div", bin_, of(g, "Max", count, 1.0))
    if ratio:
        numbers: Number = np.arange(ratio, dtype=np.float32)
        some: Number = np.ones(1, np.bool_)
    else:  # two lie more than half a pixel apart, so that no more than this lie on the image; the first of them is:
        before = of(g, "Sub", of(g, "Div", of(g, "Sub", -1.0, first), of(g, "Max", step, 1e-6)), 0.5)
        most = g.op.Add(g.op.Mul(as_tensor(g, length), [2]), [4])
        fixed = 2 * length + 4 if isinstance(length, int) else None
        check_intermediate(g, [fixed, bins, *g.shape(rois)[:1], fixed], "the weight of each pixel in each sample")
        near = g.cast(iota(g, most if fixed is None else fixed), np.float32)
        numbers = of(g, "Add", of(g, "Max", of(g, "Floor", before), 0.0), near)
        some = of(g, "Less", numbers, count)
    places = of(g, "Add", first, of(g, "Mul", of(g, "Add", numbers, 0.5), step))  # [R, P, K]
    limit = float(length) if isinstance(length, int) else g.cast(length, np.float32)
    on_image = of(g, "Not", of(g, "Or", of(g, "Less", places, -1.0), of(g, "Greater", places, limit)))
    counted = of(g, "And", on_image, some)
    clamped = of(g, "Min", of(g, "Max", places, 0.0), of(g, "Sub", limit, 1.0))
    assert isinstance(counted, gs.Tensor) and isinstance(clamped, gs.Tensor)
    return Samples(clamped, g.cast(counted, np.float32), count)


def _average(
    g: Builder, x: gs.Tensor, images: gs.Tensor, rows: Samples, columns: Samples, pooled: tuple[int, int]
) -> gs.Tensor:
    high, wide = pooled
    batch, channels, height, width = (size(g, x, axis) for axis in range(4))
    regions = size(g, images, 0)
    check_intermediate(g, [*g.shape(images), high, *g.shape(x)[1:2], *g.shape(x)[3:]], "the rows of each region")
    of_rows, of_columns = _weights(g, rows, height), _weights(g, columns, width)  # [R, high, H], [R, wide, W]
    here = g.op.Equal(g.unsqueeze(images, [1]), iota(g, batch))  # [R, N]
    chosen = g.op.Mul(g.unsqueeze(g.cast(here, np.float32), [1, 3]), g.unsqueeze(of_rows, [2]))  # [R, high, N, H]
    lines = reshape(g, chosen, [times(g, regions, high), times(g, batch, height)])
    flat = reshape(g, g.op.Transpose(x, perm=[0, 2, 1, 3]), [times(g, batch, height), times(g, channels, width)])
    across = reshape(g, g.op.MatMul(lines, flat), [regions, times(g, channels, high), width])
    both = g.op.MatMul(across, g.op.Transpose(of_columns, perm=[0, 2, 1]))  # [R, high · C, wide]
    result: gs.Tensor = g.op.Transpose(reshape(g, both, [regions, high, channels, wide]), perm=[0, 2, 1, 3])
    return result


def _weights(g: Builder, samples: Samples, length: Size) -> gs.Tensor:
    """[R, P, length]: the share of each pixel in each bin."""
    pixels = g.cast(iota(g, length), np.float32)
    distance = g.op.Abs(g.op.Sub(g.unsqueeze(samples.places, [3]), pixels))
    near = of(g, "Mul", of(g, "Max", of(g, "Sub", 1.0, distance), 0.0), g.unsqueeze(samples.counted, [3]))
    assert isinstance(near, gs.Tensor)
    shares = of(g, "Div", g.reduce("ReduceSum", near, [2]), of(g, "Max", samples.count, 1.0))
    assert isinstance(shares, gs.Tensor)
    return shares


def _maximum(
    g: Builder, x: gs.Tensor, images: gs.Tensor, rows: Samples, columns: Samples, pooled: tuple[int, int]
) -> gs.Tensor:
    """Of the four weighed neighbours of each sample, as ONNX has it."""
    high, wide = pooled
    channels, height, width = (size(g, x, axis) for axis in (1, 2, 3))
    regions = size(g, images, 0)
    samples = product(g, rows.places, 1, 3), product(g, columns.places, 1, 3)
    counted = g.op.Mul(_crossed(g, rows.counted, samples, 0), _crossed(g, columns.counted, samples, 1))
    image = times(g, height, width)
    first = g.op.Mul(reshape(g, images, [regions, 1, 1]), as_tensor(g, image))
    pixels = reshape(g, g.op.Transpose(x, perm=[0, 2, 3, 1]), [times(g, size(g, x, 0), image), channels])
    best: gs.Tensor | None = None
    for y, share_of_row in _neighbours(g, rows.places, height):
        for at, share_of_column in _neighbours(g, columns.places, width):
            line = g.op.Mul(_crossed(g, y, samples, 0), as_tensor(g, width))
            place = g.op.Add(first, g.op.Add(line, _crossed(g, at, samples, 1)))
            share = g.op.Mul(_crossed(g, share_of_row, samples, 0), _crossed(g, share_of_column, samples, 1))
            value = g.op.Mul(g.op.Gather(pixels, place, axis=0), g.unsqueeze(g.op.Mul(share, counted), [3]))
            best = value if best is None else g.op.Max(best, value)
    each = g.static_dim(rows.places, 2)
    split = reshape(g, best, [regions, high, each, wide, each, channels]) if best is not None else x
    result: gs.Tensor = g.op.Transpose(g.reduce("ReduceMax", split, [2, 4]), perm=[0, 3, 1, 2])
    return result


def _crossed(g: Builder, values: gs.Tensor, samples: tuple[Size, Size], axis: int) -> gs.Tensor:
    """[R, P, K] as [R, P·K, 1] of the rows, or [R, 1, P·K] of the columns."""
    regions = size(g, values, 0)
    return reshape(g, values, [regions, samples[0], 1] if axis == 0 else [regions, 1, samples[1]])


def _neighbours(g: Builder, places: gs.Tensor, length: Size) -> list[tuple[gs.Tensor, gs.Tensor]]:
    """The two pixels around each place, and their weights."""
    low = g.op.Floor(places)
    share = g.op.Sub(places, low)
    before = g.cast(low, np.int64)
    last = g.op.Sub(as_tensor(g, length), [1])
    after = g.op.Min(g.op.Add(before, [1]), last)
    return [(before, g.op.Sub(g.constant(1.0), share)), (after, share)]


# --- examples ----------------------------------------------------------------------------------------------------


def _roi_align(shape: list[int | str], opset: int = 16, **attrs: object) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, rois: gs.Tensor) -> gs.Tensor:
        corners = g.op.Concat(rois, g.op.Add(rois, g.op.Mul(g.op.Abs(rois), g.constant(7.0))), axis=1)
        result: gs.Tensor = g.op.RoiAlign(x, corners, g.constant([0, 1, 0]), **attrs)
        return result

    return example({"x": ("float32", shape), "rois": ("float32", [3, 2])}, build, opset)


@roi_align_as_matmul.example
def regions_of_a_detector() -> gs.Graph:
    return _roi_align(["n", 3, 8, 9], output_height=3, output_width=2, sampling_ratio=2, spatial_scale=0.5)


@roi_align_as_matmul.example
def as_many_samples_as_pixels() -> gs.Graph:
    return _roi_align([2, 3, 8, 9], output_height=2, output_width=2, spatial_scale=2.0)


@roi_align_as_matmul.example
def maps_of_any_size_in_older_coordinates() -> gs.Graph:
    how = "output_half_pixel"
    return _roi_align([2, "c", "h", "w"], output_height=2, output_width=3, coordinate_transformation_mode=how)


@roi_align_as_matmul.example
def before_half_pixels() -> gs.Graph:
    return _roi_align([2, 3, 8, 9], 11, output_height=3, output_width=3, sampling_ratio=1)


@roi_align_as_matmul.example
def maximum_of_samples() -> gs.Graph:
    return _roi_align(["n", 3, 8, 9], output_height=3, output_width=2, sampling_ratio=2, mode="max")
