"""DeformConv: ``torchvision.ops.deform_conv2d``, where neither the parser nor a plugin does it.

Every tap of the kernel reads the image at a place of its own. A place is a weighted sum of its neighbours, of which
those outside of the image count as 0; what is read is then one matrix product with the weights of the kernel.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, has_plugin, lacks, rule
from passes.rules.shapes import Size, as_tensor, check_intermediate, iota, product, reshape, size, times


@rule("DeformConv", when=lacks("DeformConv") & ~has_plugin("DeformConv"))
def deform_conv_as_gathers(node: gs.Node, g: Builder) -> Replacement:
    """Without a plugin, TensorRT has no DeformConv; it samples by gathering neighbours, and multiplies by weights."""
    x, weight, offset = node.inputs[:3]
    bias, mask = g.input(node, 3), g.input(node, 4)
    spatial = len(g.shape(x)) - 2
    kernel = list(node.attrs.get("kernel_shape") or g.static_shape(weight)[2:])
    taps, groups = math.prod(kernel), int(node.attrs.get("group", 1))
    parts = int(node.attrs.get("offset_group", 1))
    channels, features = g.static_dim(x, 1), g.static_dim(weight, 0)
    batch, outer = size(g, x, 0), [size(g, offset, 2 + i) for i in range(spatial)]
    places = product(g, offset, 2, 2 + spatial)
    check_intermediate(g, [*g.shape(x)[:2], taps, *g.shape(offset)[2:]], "what every tap of the kernel reads")

    moved = reshape(g, offset, [batch, parts, taps, spatial, *outer])
    pixels = reshape(g, x, [batch, parts, channels // parts, product(g, x, 2, 2 + spatial)])
    at = [_places(node, g, moved, i, kernel, outer) for i in range(spatial)]  # each [N, parts, taps, *outer]
    lengths = [size(g, x, 2 + i) for i in range(spatial)]
    read = _sampled(g, pixels, at, lengths, [batch, parts, times(g, places, taps)], channels // parts)
    if mask is not None:
        read = g.op.Mul(read, reshape(g, mask, [batch, parts, 1, times(g, places, taps)]))
    columns = reshape(g, read, [batch, groups, channels // groups * taps, places])
    rows = reshape(g, weight, [groups, features // groups, channels // groups * taps])
    y = reshape(g, g.op.MatMul(rows, columns), [batch, features, *outer])
    return y if bias is None else g.op.Add(y, reshape(g, bias, [features, *[1] * spatial]))


def _places(node: gs.Node, g: Builder, moved: gs.Tensor, axis: int, kernel: list[int], outer: list[Size]) -> gs.Tensor:
    """[N, parts, taps, …]: where each tap of each window lies along one spatial axis."""
    spatial = len(kernel)
    stride = (node.attrs.get("strides") or [1] * spatial)[axis]
    dilation = (node.attrs.get("dilations") or [1] * spatial)[axis]
    begin = (node.attrs.get("pads") or [0] * 2 * spatial)[axis]
    taps = np.array([place[axis] for place in np.ndindex(*kernel)]) * dilation - begin
    dtype = g.dtype(moved)
    windows = g.op.Mul(g.cast(iota(g, outer[axis]), dtype), g.constant(stride, dtype))
    if axis < spatial - 1:
        windows = g.unsqueeze(windows, list(range(1, spatial - axis)))
    regular = g.op.Add(windows, g.constant(taps.reshape([-1] + [1] * spatial), dtype))
    own = g.squeeze(g.slice(moved, [axis], [axis + 1], [3], [1]), [3])
    places: gs.Tensor = g.op.Add(own, regular)
    return places


def _sampled(
    g: Builder, pixels: gs.Tensor, at: list[gs.Tensor], lengths: list[Size], sizes: list[Size], channels: int
) -> gs.Tensor:
    """[N, parts, channels, taps · places]: the image between its pixels, 0 outside of it."""
    total: gs.Tensor | None = None
    neighbours = [_neighbours(g, places, length) for places, length in zip(at, lengths, strict=True)]
    for corner in itertools.product(*neighbours):
        index, share = corner[0]
        for (place, part), length in zip(corner[1:], lengths[1:], strict=True):
            index = g.op.Add(g.op.Mul(index, as_tensor(g, length)), place)
            share = g.op.Mul(share, part)
        flat = reshape(g, index, [sizes[0], sizes[1], 1, sizes[2]])
        wide = g.op.Expand(flat, g.constant([1, 1, channels, 1]))
        weighed = g.op.Mul(g.op.GatherElements(pixels, wide, axis=3), reshape(g, share, [*sizes[:2], 1, sizes[2]]))
        total = weighed if total is None else g.op.Add(total, weighed)
    assert total is not None
    return total


def _neighbours(g: Builder, places: gs.Tensor, length: Size) -> list[tuple[gs.Tensor, gs.Tensor]]:
    """The two pixels around each place along one axis, and their shares: 0 where there is no such pixel."""
    dtype = g.dtype(places)
    low = g.op.Floor(places)
    beyond = g.op.Sub(places, low)
    last = g.op.Sub(as_tensor(g, length), [1])
    both = []
    for step, share in ((0, g.op.Sub(g.constant(1, dtype), beyond)), (1, beyond)):
        pixel = g.op.Add(low, g.constant(step, dtype)) if step else low
        inside = g.op.Not(g.op.Or(g.op.Less(pixel, g.constant(0, dtype)), g.op.Greater(pixel, g.cast(last, dtype))))
        on = g.op.Max(g.op.Min(g.cast(pixel, np.int64), last), [0])
        both.append((on, g.op.Mul(share, g.cast(inside, dtype))))
    return both


# --- examples ----------------------------------------------------------------------------------------------------


def _deform_conv(
    shape: list[int | str], windows: list[int | str], group: int = 1, parts: int = 1, masked: bool = False, **attrs: Any
) -> gs.Graph:
    weight = np.random.default_rng(0).standard_normal((4, 4 // group, 3, 2)).astype(np.float32)
    inputs = {"x": ("float32", shape), "offset": ("float32", [shape[0], 12 * parts, *windows])}
    if masked:
        inputs["mask"] = ("float32", [shape[0], 6 * parts, *windows])

    def build(g: Builder, x: gs.Tensor, offset: gs.Tensor, *mask: gs.Tensor) -> gs.Tensor:
        bias = g.constant(np.arange(4, dtype=np.float32)) if masked else None
        given = [g.constant(weight), offset, bias, *mask]
        result: gs.Tensor = g.op.DeformConv(x, *given, group=group, offset_group=parts, **attrs)
        return result

    return example(inputs, build, 19)


@deform_conv_as_gathers.example
def deformed_windows_of_a_dynamic_batch() -> gs.Graph:
    return _deform_conv(["n", 4, 6, 7], [5, 6], pads=[1, 0, 0, 0])


@deform_conv_as_gathers.example
def deformed_windows_in_groups_with_weights() -> gs.Graph:
    return _deform_conv([2, 4, 6, 7], [3, 3], 2, 2, True, pads=[1, 0, 1, 0], strides=[2, 2], dilations=[1, 2])
