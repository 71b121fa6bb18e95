"""Pooling that TensorRT's pooling layer does not do: dilation, the places of the maxima, and their inverse.

``F.max_pool2d(..., dilation=2)``, ``F.max_pool2d(..., return_indices=True)``, ``F.max_unpool2d`` and AveragePool with
dilations. A window is a handful of strided slices of the padded input, one for each of its taps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.model import Array
from passes.rules.shapes import product, reshape, shape_tensor, size, times

MOST_TAPS = 256
"""Taps of the largest window whose maxima are located; each costs four nodes."""

END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Axis:
    """How windows lie along one spatial axis."""

    length: int | None
    """Of the input; None where it is dynamic."""
    kernel: int
    stride: int
    dilation: int
    begin: int
    end: int
    extra: int
    """What ``ceil_mode`` lets the last window reach beyond the padding; it is not counted by an average."""
    count: int | None
    """Of windows; None where the length is dynamic."""

    def tap(self, index: int) -> tuple[int, int, int]:
        """Start, end and step of the slice of the padded input that holds this tap of every window."""
        start = index * self.dilation
        if self.count is not None:
            return start, start + (self.count - 1) * self.stride + 1, self.stride
        after = (self.kernel - 1 - index) * self.dilation
        return start, -after if after else END, self.stride


def window_axes(node: gs.Node, g: Builder) -> list[Axis]:
    """The windows of a pooling node, axis by axis; declines where they depend on a dynamic length."""
    lengths = g.shape(node.inputs[0])[2:]
    kernel = node.attrs["kernel_shape"]
    strides = node.attrs.get("strides") or [1] * len(kernel)
    dilations = node.attrs.get("dilations") or [1] * len(kernel)
    pads = node.attrs.get("pads") or [0] * (2 * len(kernel))
    automatic, ceil = node.attrs.get("auto_pad", "NOTSET"), bool(node.attrs.get("ceil_mode", 0))
    axes = []
    for i, (size_, k, s, d) in enumerate(zip(lengths, kernel, strides, dilations, strict=True)):
        length = size_ if isinstance(size_, int) else None
        begin, end = (pads[i], pads[len(kernel) + i]) if automatic == "NOTSET" else (0, 0)
        reach = (k - 1) * d + 1
        count, extra = None, 0
        if automatic.startswith("SAME"):
            if d > 1:
                g.decline(f"auto_pad {automatic} of dilated windows, which ONNX and ONNX Runtime pad differently")
            if length is None:
                g.decline(f"auto_pad {automatic} on spatial axis {i}, whose length is dynamic")
            count = -(-length // s)
            total = max((count - 1) * s + reach - length, 0)
            begin = total // 2 if automatic == "SAME_UPPER" else total - total // 2
            end = total - begin
        elif length is not None:
            room = length + begin + end - reach
            count = (-(-room // s) if ceil else room // s) + 1
            if ceil and (count - 1) * s >= length + begin:  # a window may not start in the padding at the end
                count -= 1
            extra = max((count - 1) * s - room, 0)
        elif ceil and s > 1:
            g.decline(f"ceil_mode on spatial axis {i}, whose length is dynamic")
        axes.append(Axis(length, k, s, d, begin, end, extra, count))
    return axes


@rule("MaxPool")
def dilated_maxpool_as_slices(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's MaxPool has no dilation; the maximum over strided slices, axis after axis, is the same."""
    if _wants_indices(node) or not _is_dilated(node):
        return None
    x = node.inputs[0]
    _check_float(g, x)
    axes = window_axes(node, g)
    return _over_windows(g, "Max", _padded(g, x, axes, -np.inf), axes)


@rule("MaxPool")
def maxpool_with_indices_as_slices(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's MaxPool does not say where the maxima are; comparing the taps of each window one by one does."""
    if not _wants_indices(node):
        return None
    x = node.inputs[0]
    _check_float(g, x)
    axes = window_axes(node, g)
    lengths = [g.static_dim(x, 2 + i) for i in range(len(axes))]
    taps = math.prod(axis.kernel for axis in axes)
    if taps > MOST_TAPS:
        g.decline(f"windows of {taps} taps, more than {MOST_TAPS}")
    if node.attrs.get("storage_order", 0):
        weights = [math.prod(lengths[:i]) for i in range(len(axes))]
    else:
        weights = [math.prod(lengths[i + 1 :]) for i in range(len(axes))]

    padded = _padded(g, x, axes, -np.inf)
    best: gs.Tensor | None = None
    place: gs.Tensor | None = None
    for tap in itertools.product(*(range(axis.kernel) for axis in axes)):
        value = _tap(g, padded, axes, tap)
        offset = g.constant(sum(t * a.dilation * w for t, a, w in zip(tap, axes, weights, strict=True)))
        if best is None:
            best, place = value, offset
        else:
            place = g.op.Where(g.op.Greater(value, best), offset, place)  # of equal ones, the first
            best = g.op.Max(best, value)
    if best is padded:
        best = g.op.Identity(x)

    corners = np.zeros([1, 1] + [1] * len(axes), np.int64)  # of each window, in its own image
    for i, (axis, weight) in enumerate(zip(axes, weights, strict=True)):
        assert axis.count is not None
        along = (np.arange(axis.count) * axis.stride - axis.begin) * weight
        corners = corners + along.reshape([-1 if j == 2 + i else 1 for j in range(2 + len(axes))])
    images = product(g, x, 0, 2)
    if isinstance(images, int):
        starts: gs.Tensor = g.constant(np.arange(images, dtype=np.int64) * math.prod(lengths))
    else:
        numbers = g.op.Range(g.constant(0), g.squeeze(images, [0]), g.constant(1))
        starts = g.op.Mul(numbers, g.constant(math.prod(lengths)))
    starts = reshape(g, starts, [size(g, x, 0), size(g, x, 1), *[1] * len(axes)])
    return [best, g.op.Add(g.op.Add(starts, g.constant(corners)), place)]


@rule("AveragePool")
def dilated_averagepool_as_slices(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's AveragePool has no dilation; the sum of strided slices, axis after axis, is the same."""
    if not _is_dilated(node):
        return None
    x = node.inputs[0]
    _check_float(g, x)
    axes = window_axes(node, g)
    total = _over_windows(g, "Add", _padded(g, x, axes, 0), axes)
    return g.op.Div(total, _counts(g, x, axes, bool(node.attrs.get("count_include_pad", 0))))


def _counts(g: Builder, x: gs.Tensor, axes: Sequence[Axis], padding: bool) -> gs.Tensor:
    """How many elements each window averages; ``padding`` counts too, what ceil_mode adds to it never does."""
    dtype = g.dtype(x)
    if all(axis.extra == 0 and (padding or axis.begin == axis.end == 0) for axis in axes):
        return g.constant(math.prod(axis.kernel for axis in axes), dtype)
    if all(axis.count is not None for axis in axes):
        counts: Array = np.ones([1, 1] + [1] * len(axes))
        for i, axis in enumerate(axes):
            assert axis.length is not None
            edge = float(padding)
            ones = [edge] * axis.begin + [1.0] * axis.length + [edge] * axis.end + [0.0] * axis.extra
            along = np.sum([ones[slice(*axis.tap(t))] for t in range(axis.kernel)], axis=0)
            counts = counts * along.reshape([-1 if j == 2 + i else 1 for j in range(2 + len(axes))])
        return g.constant(counts.astype(dtype))
    lengths = shape_tensor(g, [1, 1, *(size(g, x, 2 + i) for i in range(len(axes)))])
    ones_like = g.op.Expand(g.constant(1, dtype), lengths)
    edge = int(padding)
    inner = [Axis(a.length, a.kernel, a.stride, a.dilation, a.begin, a.end, 0, a.count) for a in axes]
    padded = _padded(g, ones_like, inner, edge)
    outer = [Axis(None, a.kernel, a.stride, a.dilation, 0, 0, a.extra, a.count) for a in axes]
    return _over_windows(g, "Add", _padded(g, padded, outer, 0), axes)


@rule("MaxUnpool", when=lacks("MaxUnpool"))
def max_unpool_as_scatter(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no MaxUnpool; it scatters the maxima into zeros at the places that MaxPool gave."""
    x, places = node.inputs[:2]
    kernel = node.attrs["kernel_shape"]
    given = g.input(node, 2)
    if given is not None:
        image = [int(item) for item in g.value(given).reshape(-1)][2:]
    else:
        strides = node.attrs.get("strides") or [1] * len(kernel)
        pads = node.attrs.get("pads") or [0] * (2 * len(kernel))
        image = [
            (g.static_dim(x, 2 + i) - 1) * s + k - pads[i] - pads[len(kernel) + i]
            for i, (k, s) in enumerate(zip(kernel, strides, strict=True))
        ]
    sizes = [size(g, x, 0), size(g, x, 1), *image]
    total = times(g, product(g, x, 0, 2), math.prod(image))
    zeros = g.op.Expand(g.constant(0, g.dtype(x)), shape_tensor(g, [total]))
    flat = g.op.ScatterElements(zeros, g.op.Reshape(places, [-1]), g.op.Reshape(x, [-1]), axis=0)
    return reshape(g, flat, sizes)


# --- parts -------------------------------------------------------------------------------------------------------


def _is_dilated(node: gs.Node) -> bool:
    return any(d != 1 for d in node.attrs.get("dilations") or ())


def _wants_indices(node: gs.Node) -> bool:
    return len(node.outputs) > 1 and not node.outputs[1].is_empty()


def _check_float(g: Builder, x: gs.Tensor) -> None:
    if g.dtype(x).kind in "iub":
        g.decline(f"pooling of {g.dtype(x)}; cast to float32 before it")


def _padded(g: Builder, x: gs.Tensor, axes: Sequence[Axis], value: float) -> gs.Tensor:
    begins, ends = [axis.begin for axis in axes], [axis.end + axis.extra for axis in axes]
    if not any(begins) and not any(ends):
        return x
    padded: gs.Tensor = g.op.Pad(x, [0, 0, *begins, 0, 0, *ends], g.constant(value, g.dtype(x)))
    return padded


def _tap(g: Builder, padded: gs.Tensor, axes: Sequence[Axis], tap: Sequence[int]) -> gs.Tensor:
    """This tap of every window."""
    starts, ends, steps = zip(*(axis.tap(index) for axis, index in zip(axes, tap, strict=True)), strict=True)
    return g.slice(padded, starts, ends, range(2, 2 + len(axes)), steps)


def _over_windows(g: Builder, op: str, padded: gs.Tensor, axes: Sequence[Axis]) -> gs.Tensor:
    """Max or Add over the taps of every window, one axis after the other."""
    for i, axis in enumerate(axes):
        taps = [axis.tap(index) for index in range(axis.kernel)]
        slices = [g.slice(padded, [start], [end], [2 + i], [step]) for start, end, step in taps]
        padded = slices[0]
        for other in slices[1:]:
            padded = g.node(op, [padded, other], {})
    return padded


# --- examples ----------------------------------------------------------------------------------------------------


def _pool(op: str, shape: list[int | str], outputs: int = 1, opset: int = 20, **attrs: object) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        made = g.node(op, [x], attrs, outputs)
        return list(made) if outputs > 1 else [made]

    return example({"x": ("float32", shape)}, build, opset)


@dilated_maxpool_as_slices.example
def maxpool_2d_dilated_and_padded() -> gs.Graph:
    return _pool("MaxPool", ["n", 4, 16, 15], kernel_shape=[3, 3], pads=[1, 1, 1, 1], dilations=[2, 2])


@dilated_maxpool_as_slices.example
def maxpool_1d_of_dynamic_length() -> gs.Graph:
    return _pool("MaxPool", [2, 3, "t"], kernel_shape=[2], pads=[1, 1], strides=[2], dilations=[3])


@dilated_maxpool_as_slices.example
def maxpool_3d_dilated_with_ceil_mode() -> gs.Graph:
    return _pool(
        "MaxPool",
        [1, 2, 9, 8, 7],
        kernel_shape=[3, 2, 2],
        strides=[2, 3, 2],
        dilations=[2, 1, 3],
        ceil_mode=1,
        opset=13,
    )


@maxpool_with_indices_as_slices.example
def places_in_a_dynamic_batch() -> gs.Graph:
    return _pool("MaxPool", ["n", 4, 8, 9], 2, kernel_shape=[2, 2], strides=[2, 2])


@maxpool_with_indices_as_slices.example
def places_of_dilated_padded_windows() -> gs.Graph:
    return _pool("MaxPool", [2, 3, 9, 10], 2, kernel_shape=[3, 2], pads=[1, 0, 1, 1], strides=[2, 1], dilations=[2, 3])


@maxpool_with_indices_as_slices.example
def places_in_windows_of_the_same_size() -> gs.Graph:
    return _pool("MaxPool", [1, 2, 9, 8], 2, kernel_shape=[3, 2], strides=[2, 1], auto_pad="SAME_LOWER")


@maxpool_with_indices_as_slices.example
def places_in_column_major_order() -> gs.Graph:
    return _pool("MaxPool", [2, 3, 6, 7], 2, kernel_shape=[2, 2], storage_order=1, ceil_mode=1, strides=[2, 2])


@maxpool_with_indices_as_slices.example
def places_of_every_element() -> gs.Graph:
    """How torch's exporter asks for the number of each element."""
    return _pool("MaxPool", [2, 3, 5], 2, kernel_shape=[1], strides=[1])


@dilated_averagepool_as_slices.example
def averagepool_dilated_without_its_padding() -> gs.Graph:
    return _pool("AveragePool", ["n", 3, 12, 11], kernel_shape=[3, 2], pads=[2, 0, 1, 1], dilations=[2, 3])


@dilated_averagepool_as_slices.example
def averagepool_dilated_with_its_padding_and_ceil_mode() -> gs.Graph:
    return _pool(
        "AveragePool",
        [1, 2, 12, 11],
        kernel_shape=[3, 2],
        pads=[1, 1, 1, 1],
        strides=[2, 3],
        dilations=[2, 2],
        count_include_pad=1,
        ceil_mode=1,
    )


@dilated_averagepool_as_slices.example
def averagepool_of_dynamic_length() -> gs.Graph:
    return _pool("AveragePool", [1, 2, "t"], kernel_shape=[3], pads=[1, 1], strides=[2], dilations=[2], opset=19)


@max_unpool_as_scatter.example
def pooled_and_unpooled() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        values, places = g.op.MaxPool(x, outputs=2, kernel_shape=[2, 2], strides=[2, 2])
        result: gs.Tensor = g.op.MaxUnpool(values, places, kernel_shape=[2, 2], strides=[2, 2])
        return result

    return example({"x": ("float32", ["n", 3, 8, 6])}, build)


@max_unpool_as_scatter.example
def unpooled_to_a_given_size() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        values, places = g.op.MaxPool(x, outputs=2, kernel_shape=[2], strides=[2])
        wanted = g.constant([2, 3, 9])
        result: gs.Variable = g.op.MaxUnpool(values, places, wanted, kernel_shape=[2], strides=[2])
        result.shape = [2, 3, 9]  # which inference does not find
        return result

    return example({"x": ("float32", [2, 3, 9])}, build, opset=13)
