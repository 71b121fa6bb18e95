"""Resize, GridSample and pooling in forms that came after a parser's time.

``F.interpolate`` (Resize of chosen axes, with a policy for the aspect ratio) and ``F.grid_sample``, whose modes have
other names since opset 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lowering
from passes.model import Array
from passes.rules.shapes import Size, shape_tensor, size

SINCE_18 = ("antialias", "axes", "keep_aspect_ratio_policy")


@lowering("Resize", since=18)
def resize_every_axis(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 18, Resize is given scales or sizes for every axis, and stretches."""
    attrs = dict(node.attrs)
    symmetric = attrs.get("coordinate_transformation_mode") == "half_pixel_symmetric"
    if not symmetric and not any(name in attrs for name in SINCE_18):
        return None
    if attrs.pop("antialias", 0):
        g.decline("antialiasing came with opset 18")
    x = node.inputs[0]
    rank = len(g.shape(x))
    axes = [int(axis) % rank for axis in attrs.pop("axes", None) or range(rank)]
    policy = attrs.pop("keep_aspect_ratio_policy", "stretch")
    roi, scales, sizes = (g.input(node, index) for index in (1, 2, 3))
    if policy != "stretch" and sizes is not None:
        scales, sizes = _one_scale(g, x, axes, g.value(sizes).reshape(-1).tolist(), policy), None
    if symmetric:
        _check_symmetric(g, x, axes, scales)
        attrs["coordinate_transformation_mode"] = "half_pixel"
    if axes != list(range(rank)):
        roi = None if roi is None else g.constant(_every(g.value(roi).reshape(2, -1), axes, rank))
        scales = None if scales is None else _scales(g, scales, axes, rank)
        sizes = None if sizes is None else _sizes(g, x, sizes, axes)
    return g.op.Resize(x, roi, scales, sizes, **attrs)


def _one_scale(g: Builder, x: gs.Tensor, axes: list[int], wanted: list[int], policy: str) -> gs.Tensor:
    """The one scale of all axes that makes none larger than wanted, or none smaller (``not_smaller``)."""
    lengths = [g.static_dim(x, axis) for axis in axes]
    ratios = [size_ / length for size_, length in zip(wanted, lengths, strict=True)]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    single = np.float32(scale)
    for length in lengths:  # sizes are rounded half up where a policy gives them, and down where scales do
        if math.floor(length * scale + 0.5) != math.floor(np.float32(length) * single):
            g.decline(f"the policy {policy!r} makes {length * scale:g} places of {length}, which rounds up")
    return g.constant(np.full(len(axes), single))


def _check_symmetric(g: Builder, x: gs.Tensor, axes: list[int], scales: gs.Tensor | None) -> None:
    """Declines where half_pixel_symmetric is not half_pixel: where a size times its scale is no whole number."""
    if scales is None:
        return
    for axis, scale in zip(axes, g.value(scales).reshape(-1).tolist(), strict=True):
        if scale != int(scale) and (g.static_dim(x, axis) * scale) % 1:
            g.decline(f"half_pixel_symmetric coordinates with the scale {scale} of {g.static_dim(x, axis)} places")


def _every(roi: Array, axes: list[int], rank: int) -> Array:
    full = np.stack([np.zeros(rank, roi.dtype), np.ones(rank, roi.dtype)])
    full[:, axes] = roi
    return full.reshape(-1)


def _scales(g: Builder, scales: gs.Tensor, axes: list[int], rank: int) -> gs.Tensor:
    if isinstance(scales, gs.Constant):
        full = np.ones(rank, np.float32)
        full[axes] = g.value(scales).reshape(-1)
        return g.constant(full)
    places = [axes.index(axis) if axis in axes else len(axes) for axis in range(rank)]
    joined = g.op.Concat(scales, g.constant(np.ones(1, np.float32)), axis=0)
    made: gs.Tensor = g.op.Gather(joined, places, axis=0)
    return made


def _sizes(g: Builder, x: gs.Tensor, sizes: gs.Tensor, axes: list[int]) -> gs.Tensor:
    full: list[Size] = [size(g, x, axis) if axis not in axes else 0 for axis in range(len(g.shape(x)))]
    for index, axis in enumerate(axes):
        if isinstance(sizes, gs.Constant):
            full[axis] = int(g.value(sizes).reshape(-1)[index])
        else:
            full[axis] = g.slice(sizes, [index], [index + 1], [0], [1])
    return shape_tensor(g, full)


def _resize(
    shape: list[int | str],
    scales: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
    opset: int = 19,
    **attrs: object,
) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        factors = None if scales is None else g.constant(np.array(scales, np.float32))
        wanted = None if sizes is None else g.constant(list(sizes))
        made: gs.Tensor = g.op.Resize(x, None, factors, wanted, **attrs)
        return made

    return example({"x": ("float32", shape)}, build, opset)


@resize_every_axis.example
def scales_of_two_axes() -> gs.Graph:
    return _resize(["n", "c", 5, 6], [2.0, 1.5], axes=[2, 3], mode="linear")


@resize_every_axis.example
def sizes_of_two_axes_of_a_dynamic_batch() -> gs.Graph:
    return _resize(["n", 3, 5, 6], None, [7, 4], axes=[-1, -2], mode="nearest", antialias=0)


@resize_every_axis.example
def not_larger_than() -> gs.Graph:
    return _resize([1, 3, 6, 9], None, [9, 12], axes=[2, 3], mode="linear", keep_aspect_ratio_policy="not_larger")


@resize_every_axis.example
def symmetric_half_pixels_to_a_whole_size() -> gs.Graph:
    return _resize([1, 1, 4, 6], [1, 1, 1.5, 0.5], mode="linear", coordinate_transformation_mode="half_pixel_symmetric")


SAMPLE_MODES = {"linear": "bilinear", "cubic": "bicubic", "nearest": "nearest"}


@lowering("GridSample", since=20)
def grid_sample_by_its_older_names(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 20, GridSample's modes are called bilinear and bicubic, and images have two axes."""
    if len(g.shape(node.inputs[0])) != 4:
        g.decline("GridSample of a volume came with opset 20")
    attrs = {**node.attrs, "mode": SAMPLE_MODES[node.attrs.get("mode", "linear")]}
    return g.op.GridSample(*node.inputs, **attrs)


def _grid_sample(mode: str | None, padding: str, aligned: int) -> gs.Graph:
    attrs = {"mode": mode, "padding_mode": padding, "align_corners": aligned}
    return example(
        {"x": ("float32", ["n", 2, 5, 6]), "grid": ("float32", ["n", 3, 4, 2])},
        lambda g, x, grid: g.op.GridSample(x, grid, **attrs),
        20,
    )


@grid_sample_by_its_older_names.example
def linear_and_outside_is_zero() -> gs.Graph:
    return _grid_sample("linear", "zeros", 0)


@grid_sample_by_its_older_names.example
def cubic_and_outside_is_the_edge() -> gs.Graph:
    return _grid_sample("cubic", "border", 1)


@grid_sample_by_its_older_names.example
def of_the_default_mode() -> gs.Graph:
    return _grid_sample(None, "reflection", 0)


POOLING_SINCE = {"AveragePool": ("dilations",), "LpPool": ("ceil_mode", "dilations")}


@lowering("AveragePool", "LpPool", since=18)
def pool_without_newer_attributes(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 19, AveragePool has no dilations; before 18, LpPool neither these nor a ceil_mode."""
    attrs = dict(node.attrs)
    dropped = {name: attrs.pop(name) for name in POOLING_SINCE[node.op] if name in attrs}
    if not dropped:
        return None
    if any(step != 1 for step in dropped.get("dilations", ())):
        g.decline(f"{node.op} with dilations {dropped['dilations']}")
    if dropped.get("ceil_mode", 0) and not _same_rounded_down(node, g):
        g.decline(f"{node.op} whose last window is not full (ceil_mode)")
    return g.node(node.op, node.inputs, attrs)


def _same_rounded_down(node: gs.Node, g: Builder) -> bool:
    """Whether every window of the pooling is full."""
    kernel = list(node.attrs["kernel_shape"])
    count = len(kernel)
    strides = node.attrs.get("strides") or [1] * count
    pads = node.attrs.get("pads") or [0] * (2 * count)
    lengths = [g.static_dim(node.inputs[0], 2 + axis) for axis in range(count)]
    return all(
        (lengths[axis] + pads[axis] + pads[count + axis] - kernel[axis]) % strides[axis] == 0 for axis in range(count)
    )


def _pooled(op: str, opset: int, **attrs: object) -> gs.Graph:
    return example({"x": ("float32", ["n", 2, 6, 6])}, lambda g, x: g.node(op, [x], attrs), opset)


@pool_without_newer_attributes.example
def average_of_neighbours() -> gs.Graph:
    return _pooled("AveragePool", 19, kernel_shape=[2, 2], dilations=[1, 1], strides=[2, 2])


@pool_without_newer_attributes.example
def norm_of_full_windows() -> gs.Graph:
    return _pooled("LpPool", 18, kernel_shape=[2, 2], dilations=[1, 1], strides=[2, 2], ceil_mode=1, p=2)
