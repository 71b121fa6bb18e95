"""Pooling that TensorRT's pooling layer does not do: dilation, the places of the maxima, and their inverse.

``F.max_pool2d(..., dilation=2)``, ``F.max_pool2d(..., return_indices=True)``, ``F.max_unpool2d``, AveragePool with
dilations, LpPool of any power, and all of them over four axes and more. A window is a handful of strided slices of the
padded input, one for each of its taps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.model import Array
from passes.rules.shapes import Size, as_tensor, iota, product, reshape, shape_tensor, size, times

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
    begin: Size
    end: Size
    extra: Size
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

    @property
    def unpadded(self) -> Axis:
        """The same windows over an input that is padded already."""
        return replace(self, length=None, begin=0, end=0, extra=0)


def window_axes(node: gs.Node, g: Builder) -> list[Axis]:
    """The windows of a pooling node, axis by axis."""
    x = node.inputs[0]
    kernel = node.attrs["kernel_shape"]
    strides = node.attrs.get("strides") or [1] * len(kernel)
    dilations = node.attrs.get("dilations") or [1] * len(kernel)
    pads = node.attrs.get("pads") or [0] * (2 * len(kernel))
    automatic, ceil = node.attrs.get("auto_pad", "NOTSET"), bool(node.attrs.get("ceil_mode", 0))
    if automatic.startswith("SAME") and any(item > 1 for item in dilations):
        g.decline(f"auto_pad {automatic} of dilated windows, which ONNX and ONNX Runtime pad differently")
    axes = []
    for i, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True)):
        length = size(g, x, 2 + i)
        if automatic.startswith("SAME"):
            axes.append(_same(g, length, k, s, automatic == "SAME_UPPER"))
        else:
            begin, end = (pads[i], pads[len(kernel) + i]) if automatic == "NOTSET" else (0, 0)
            axes.append(_axis(g, length, Axis(None, k, s, d, begin, end, 0, None), begin + end, begin, ceil))
    return axes


def _same(g: Builder, length: Size, k: int, s: int, upper: bool) -> Axis:
    """Windows that begin at every stride, as far as the input goes."""
    if isinstance(length, int):
        count = -(-length // s)
        total = max((count - 1) * s + k - length, 0)
        small, large = total // 2, total - total // 2
        begin, end = (small, large) if upper else (large, small)
        return Axis(length, k, s, 1, begin, end, 0, count)
    starts = g.op.Mul(g.op.Div(g.op.Sub(length, [1]), [s]), [s])  # of the last window
    missing = g.op.Max(g.op.Sub(g.op.Add(starts, [k]), length), [0])
    less = g.op.Div(missing, [2])
    more = g.op.Sub(missing, less)
    return Axis(None, k, s, 1, *((less, more) if upper else (more, less)), 0, None)


def _axis(g: Builder, length: Size, axis: Axis, padding: int, begin: int, ceil: bool) -> Axis:
    """``axis`` with what its length and ``ceil_mode`` make of it."""
    s, reach = axis.stride, (axis.kernel - 1) * axis.dilation + 1
    if isinstance(length, int):
        room = length + padding - reach
        count = (-(-room // s) if ceil else room // s) + 1
        if ceil and (count - 1) * s >= length + begin:  # a window may not start in the padding at the end
            count -= 1
        return replace(axis, length=length, extra=max((count - 1) * s - room, 0), count=count)
    if not ceil or s == 1:
        return axis
    last = g.op.Mul(g.op.Div(g.op.Add(length, [padding - reach + s - 1]), [s]), [s])  # where the last window starts
    extra = g.op.Max(g.op.Sub(last, g.op.Add(length, [padding - reach])), [0])
    inside = g.op.Less(last, g.op.Add(length, [begin]))
    return replace(axis, extra=g.op.Where(inside, extra, [0]))


@rule("MaxPool")
def maxpool_of_uint8(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT computes nothing in uint8; float32 holds all of its numbers."""
    x = node.inputs[0]
    if g.dtype(x) != np.uint8:
        return None
    made = g.node("MaxPool", [g.cast(x, np.float32)], node.attrs, len(node.outputs))
    values, *places = made if isinstance(made, list) else [made]
    return [g.cast(values, np.uint8), *places]


@rule("MaxPool")
def dilated_maxpool_as_slices(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's MaxPool has no dilation; the maximum over strided slices, axis after axis, is the same."""
    if _wants_indices(node) or not _is_unusual(node):
        return None
    kept = g.dtype(node.inputs[0])
    x = _as_float(g, node.inputs[0])
    axes = window_axes(node, g)
    return g.cast(_over_windows(g, "Max", _padded(g, x, axes, -np.inf), axes), kept)


@rule("MaxPool")
def maxpool_with_indices_as_slices(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's MaxPool does not say where the maxima are; comparing the taps of each window one by one does."""
    if not _wants_indices(node):
        return None
    kept = g.dtype(node.inputs[0])
    x = _as_float(g, node.inputs[0])
    axes = window_axes(node, g)
    taps = math.prod(axis.kernel for axis in axes)
    if taps > MOST_TAPS:
        g.decline(f"windows of {taps} taps, more than {MOST_TAPS}")
    padded = _padded(g, x, axes, -np.inf)
    numbers = _padded(g, _numbers(g, x, bool(node.attrs.get("storage_order", 0))), axes, 0)
    best: gs.Tensor | None = None
    place: gs.Tensor | None = None
    for tap in itertools.product(*(range(axis.kernel) for axis in axes)):
        value, number = _tap(g, padded, axes, tap), _tap(g, numbers, axes, tap)
        if best is None:
            best, place = value, number
        else:
            place = g.op.Where(g.op.Greater(value, best), number, place)  # of equal ones, the first
            best = g.op.Max(best, value)
    assert best is not None
    images = g.op.Mul(iota(g, product(g, x, 0, 2)), as_tensor(g, product(g, x, 2, 2 + len(axes))))
    first = reshape(g, images, [size(g, x, 0), size(g, x, 1), *[1] * len(axes)])
    values = g.cast(best, kept)
    return [g.op.Identity(values) if not values.inputs else values, g.op.Add(first, place)]


def _numbers(g: Builder, x: gs.Tensor, column_major: bool) -> gs.Tensor:
    """[1, 1, …]: the number of each element in its image."""
    rank = len(g.shape(x))
    lengths = [size(g, x, axis) for axis in range(2, rank)]
    flat = iota(g, product(g, x, 2, rank))
    if not column_major:
        return reshape(g, flat, [1, 1, *lengths])
    turned = reshape(g, flat, [1, 1, *lengths[::-1]])
    numbers: gs.Tensor = g.op.Transpose(turned, perm=[0, 1, *range(rank - 1, 1, -1)])
    return numbers


@rule("AveragePool")
def dilated_averagepool_as_slices(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's AveragePool has no dilation; the sum of strided slices, axis after axis, is the same."""
    if not _is_unusual(node):
        return None
    x = node.inputs[0]
    axes = window_axes(node, g)
    total = _over_windows(g, "Add", _padded(g, x, axes, 0), axes)
    return g.op.Div(total, _counts(g, x, axes, bool(node.attrs.get("count_include_pad", 0))))


def _counts(g: Builder, x: gs.Tensor, axes: Sequence[Axis], padding: bool) -> gs.Tensor:
    """How many elements each window averages; ``padding`` counts too, what ceil_mode adds to it never does."""
    dtype = g.dtype(x)
    if all(_is_none(a.extra) and (padding or (_is_none(a.begin) and _is_none(a.end))) for a in axes):
        return g.constant(math.prod(axis.kernel for axis in axes), dtype)
    if all(axis.count is not None for axis in axes):
        counts: Array = np.ones([1, 1] + [1] * len(axes))
        for i, axis in enumerate(axes):
            assert axis.length is not None and isinstance(axis.begin, int)
            assert isinstance(axis.end, int) and isinstance(axis.extra, int)
            edge = float(padding)
            ones = [edge] * axis.begin + [1.0] * axis.length + [edge] * axis.end + [0.0] * axis.extra
            along = np.sum([ones[slice(*axis.tap(t))] for t in range(axis.kernel)], axis=0)
            counts = counts * along.reshape([-1 if j == 2 + i else 1 for j in range(2 + len(axes))])
        return g.constant(counts.astype(dtype))
    lengths = shape_tensor(g, [1, 1, *(size(g, x, 2 + i) for i in range(len(axes)))])
    ones_like = g.op.Expand(g.constant(1, dtype), lengths)
    padded = _padded(g, ones_like, [replace(axis, extra=0) for axis in axes], int(padding))
    outer = [replace(axis.unpadded, extra=axis.extra) for axis in axes]
    return _over_windows(g, "Add", _padded(g, padded, outer, 0), axes)


@rule("LpPool")
def lppool_of_any_power(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's LpPool knows powers 1 and 2, two or three axes, no dilation; sums of powers know no limits."""
    power = float(node.attrs.get("p", 2))
    axes = window_axes(node, g)
    usual = power in (1, 2) and len(axes) in (2, 3) and all(_is_none(axis.extra) for axis in axes)
    if usual and not _is_unusual(node):
        return None
    x = node.inputs[0]
    dtype = g.dtype(x)
    powers = g.op.Abs(x)
    if power != 1:
        powers = g.op.Mul(x, x) if power == 2 else g.op.Pow(powers, g.constant(power, dtype))
    total = _over_windows(g, "Add", _padded(g, powers, axes, 0), axes)
    if power == 1:
        return total if total.inputs else g.op.Identity(total)
    return g.op.Sqrt(total) if power == 2 else g.op.Pow(total, g.constant(1 / power, dtype))


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


def _is_unusual(node: gs.Node) -> bool:
    """Whether the windows are dilated, or of more axes than TensorRT's pooling layer has."""
    return any(d != 1 for d in node.attrs.get("dilations") or ()) or len(node.attrs["kernel_shape"]) > 3


def _wants_indices(node: gs.Node) -> bool:
    return len(node.outputs) > 1 and not node.outputs[1].is_empty()


def _as_float(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """Of small integers, all of which float32 holds."""
    return g.cast(x, np.float32) if g.dtype(x).kind in "iub" else x


def _padded(g: Builder, x: gs.Tensor, axes: Sequence[Axis], value: float) -> gs.Tensor:
    ends = [_plus(g, axis.end, axis.extra) for axis in axes]
    pads: list[Size] = [0, 0, *(axis.begin for axis in axes), 0, 0, *ends]
    if all(map(_is_none, pads)):
        return x
    padded: gs.Tensor = g.op.Pad(x, shape_tensor(g, pads), g.constant(value, g.dtype(x)))
    return padded


def _is_none(value: Size) -> bool:
    """Whether it is known to be 0."""
    return isinstance(value, int) and value == 0


def _plus(g: Builder, a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    total: gs.Tensor = g.op.Add(as_tensor(g, a), as_tensor(g, b))
    return total


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


@dilated_maxpool_as_slices.example
def maxpool_dilated_of_dynamic_lengths_with_ceil_mode() -> gs.Graph:
    return _pool("MaxPool", ["n", 2, "h", "w"], kernel_shape=[2, 2], strides=[2, 3], dilations=[2, 1], ceil_mode=1)


@dilated_maxpool_as_slices.example
def maxpool_of_int8_dilated() -> gs.Graph:
    return example({"x": ("int8", ["n", 3, 9])}, lambda g, x: g.op.MaxPool(x, kernel_shape=[3], dilations=[2]))


@maxpool_of_uint8.example
def bytes_of_an_image() -> gs.Graph:
    return example({"x": ("uint8", ["n", 3, 9, 8])}, lambda g, x: g.op.MaxPool(x, kernel_shape=[3, 3], pads=[1] * 4))


@maxpool_with_indices_as_slices.example
def places_in_images_of_any_size() -> gs.Graph:
    return _pool("MaxPool", ["n", "c", "h", "w"], 2, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER")


@lppool_of_any_power.example
def lppool_of_the_third_power() -> gs.Graph:
    return _pool("LpPool", ["n", 3, "h", 8], p=3, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])


@lppool_of_any_power.example
def lppool_of_sequences() -> gs.Graph:
    return _pool("LpPool", ["n", 3, 9], p=1, kernel_shape=[3], strides=[2], auto_pad="SAME_LOWER", opset=13)


@lppool_of_any_power.example
def lppool_dilated() -> gs.Graph:
    return _pool("LpPool", ["n", 3, 9, 8], kernel_shape=[3, 2], dilations=[2, 1], ceil_mode=1, strides=[2, 2])


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
