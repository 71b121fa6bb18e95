"""Resize in the forms that TensorRT lacks: antialiased, cropped, of chosen axes, to a kept aspect ratio, of integers.

``F.interpolate(..., antialias=True)``, torchvision's ``Resize`` on tensors, TensorFlow's ``crop_and_resize``. Along one
axis, resizing is a product with a matrix of weights (of the nearest: a Gather). The matrix is a constant where the
lengths are known, and is computed from them where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.model import Array
from passes.rules.numbers import Number, of, sum_along
from passes.rules.shapes import Size, iota, shape_tensor, size

NATIVE_COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
MOST_NATIVE_AXES = {"nearest": 3, "linear": 3, "cubic": 2}
"""How many axes, counted from the last one, TensorRT's Resize changes."""


@dataclass(frozen=True)
class Axis:
    """What becomes of one axis."""

    index: int
    length: Size
    target: Size
    factor: Number
    """Outputs for each input, as the coordinates have it."""
    start: float
    """Of the region of interest, from 0 to 1."""
    end: float

    @property
    def rests(self) -> bool:
        """Whether the axis is known to stay as it is."""
        unscaled = isinstance(self.factor, float) and self.factor == 1
        if isinstance(self.length, int) and isinstance(self.target, int):
            return self.length == self.target and (unscaled or self.length == 1)
        return unscaled and self.target is self.length


@rule("Resize")
def resize_of_chosen_axes(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's Resize misreads sizes of chosen axes where others are dynamic; it is given all of them."""
    if not node.attrs.get("axes") or _needs_matrices(node, g):
        return None
    x = node.inputs[0]
    rank = len(g.shape(x))
    axes = [int(axis) % rank for axis in node.attrs["axes"]]
    if axes == list(range(rank)):
        return None
    scales, sizes = _given(node, g, 2), _given(node, g, 3)
    attrs = {name: value for name, value in node.attrs.items() if name != "axes"}
    if scales is not None:
        factors = np.ones(rank, np.float32)
        factors[axes] = g.value(scales).reshape(-1)
        return g.op.Resize(x, None, g.constant(factors), **attrs)
    if sizes is None:
        return None
    wanted: list[Size] = [size(g, x, axis) if axis not in axes else 0 for axis in range(rank)]
    for place, axis in enumerate(axes):
        wanted[axis] = _entry(g, sizes, place)
    return g.op.Resize(x, None, None, shape_tensor(g, wanted), **attrs)


def _given(node: gs.Node, g: Builder, index: int) -> gs.Tensor | None:
    """An optional input; in opsets 11 and 12, PyTorch and TensorFlow leave it out by a tensor of nothing."""
    tensor = g.input(node, index)
    return None if tensor is not None and tensor.shape is not None and list(tensor.shape) == [0] else tensor


def _entry(g: Builder, sizes: gs.Tensor, place: int) -> Size:
    if isinstance(sizes, gs.Constant):
        return int(g.value(sizes).reshape(-1)[place])
    return g.slice(sizes, [place], [place + 1], [0], [1])


@rule("Resize")
def resize_as_matmul(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's Resize lacks antialiasing, cropping, …; along each axis, resizing is a product with a matrix."""
    if not _needs_matrices(node, g):
        return None
    mode = node.attrs.get("mode", "nearest")
    if node.attrs.get("antialias", 0) and mode == "nearest":
        g.decline("the nearest element has no antialiasing")
    x = node.inputs[0]
    if g.dtype(x).kind in "iub" and mode != "nearest":
        g.decline(f"rounding of {g.dtype(x)} is not defined; cast to float32 before, and round after it")
    kept = g.dtype(x)
    axes = _axes(node, g)
    if kept.kind in "iub" and kept.itemsize == 1 and kept != np.bool_:
        x = g.cast(x, np.int32)
    outside: list[tuple[int, Number]] = []
    coordinates = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    crops = coordinates == "tf_crop_and_resize"
    if not crops and coordinates != "half_pixel_symmetric" and all(map(_same_length, axes)):
        axes = []  # torch and ONNX Runtime copy then, whatever the scales
    for axis in axes:
        if axis.rests and not (crops and (axis.start, axis.end) != (0, 1)):
            continue
        places = _coordinates(node, g, axis)
        if crops:
            last = float(axis.length) - 1 if isinstance(axis.length, int) else of(g, "Sub", _float(g, axis.length), 1.0)
            outside.append((axis.index, of(g, "Or", of(g, "Less", places, 0.0), of(g, "Greater", places, last))))
        x = _nearest(node, g, x, axis, places) if mode == "nearest" else _weighed(node, g, x, axis, places)
    x = _extrapolated(node, g, g.cast(x, kept), outside)
    return x if x.inputs and x is not node.inputs[0] else g.op.Identity(x)


def _same_length(axis: Axis) -> bool:
    return isinstance(axis.length, int) and isinstance(axis.target, int) and axis.length == axis.target


def _needs_matrices(node: gs.Node, g: Builder) -> bool:
    """Whether TensorRT's Resize does not do this form of it."""
    mode, attrs = node.attrs.get("mode", "nearest"), node.attrs
    x = node.inputs[0]
    if g.opset < 11 or x.shape is None or (_given(node, g, 2) is None and _given(node, g, 3) is None):
        return False
    if attrs.get("antialias", 0) or attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return True
    if attrs.get("coordinate_transformation_mode", "half_pixel") not in NATIVE_COORDINATES:
        return True
    if g.dtype(x).kind in "iub":
        return True
    changed = [axis.index for axis in _axes(node, g) if not axis.rests] if _known(node, g) else []
    return bool(changed) and min(changed) < len(x.shape) - MOST_NATIVE_AXES[mode]


def _known(node: gs.Node, g: Builder) -> bool:
    """Whether what is made of each axis is a constant."""
    scales, sizes = _given(node, g, 2), _given(node, g, 3)
    return isinstance(scales if scales is not None else sizes, gs.Constant)


def _axes(node: gs.Node, g: Builder) -> list[Axis]:
    x, y = node.inputs[0], node.outputs[0]
    shape = g.shape(x)
    rank = len(shape)
    chosen = [int(axis) % rank for axis in node.attrs.get("axes") or range(rank)]
    roi, scales, sizes = (_given(node, g, place) for place in (1, 2, 3))
    region = [0.0] * len(chosen) + [1.0] * len(chosen)
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize" and roi is not None:
        region = [float(item) for item in g.value(roi).reshape(-1)]
    ends = list(zip(region[: len(chosen)], region[len(chosen) :], strict=True))
    lengths = [size(g, x, axis) for axis in chosen]
    if scales is not None:
        factors = [float(item) for item in g.value(scales).reshape(-1)]
        targets = [_scaled(g, length, factor, 0.0) for length, factor in zip(lengths, factors, strict=True)]
        return [Axis(*item) for item in _rows(chosen, lengths, targets, factors, ends)]
    assert sizes is not None
    wanted: list[Size] = []
    for place, axis in enumerate(chosen):
        entry = _entry(g, sizes, place)
        found = y.shape[axis] if y.shape is not None and len(y.shape) == rank else None
        if not isinstance(entry, int) and isinstance(found, str) and found and found == shape[axis]:
            wanted.append(lengths[place])
        else:
            wanted.append(found if not isinstance(entry, int) and isinstance(found, int) else entry)
    ratios = [_ratio(g, target, length) for target, length in zip(wanted, lengths, strict=True)]
    policy = node.attrs.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return [Axis(*item) for item in _rows(chosen, lengths, wanted, ratios, ends)]
    one = ratios[0]
    for ratio in ratios[1:]:
        one = of(g, "Min" if policy == "not_larger" else "Max", one, ratio)
    targets = [_scaled(g, length, one, 0.5) for length in lengths]
    return [Axis(*item) for item in _rows(chosen, lengths, targets, [one] * len(chosen), ends)]


def _rows(
    chosen: list[int],
    lengths: list[Size],
    targets: list[Size],
    factors: Sequence[Number],
    ends: list[tuple[float, float]],
) -> list[tuple[int, Size, Size, Number, float, float]]:
    rows = zip(chosen, lengths, targets, factors, ends, strict=True)
    return [(index, length, target, factor, *both) for index, length, target, factor, both in rows]


def _float(g: Builder, value: Size) -> Number:
    return float(value) if isinstance(value, int) else g.cast(value, np.float32)


def _ratio(g: Builder, target: Size, length: Size) -> Number:
    if target is length:
        return 1.0
    return of(g, "Div", _float(g, target), _float(g, length))


def _scaled(g: Builder, length: Size, factor: Number, more: float) -> Size:
    """The size that a factor gives: rounded down, or half up."""
    if isinstance(factor, float) and factor == 1:
        return length
    scaled = of(g, "Floor", of(g, "Add", of(g, "Mul", _float(g, length), factor), more))
    return g.cast(scaled, np.int64) if isinstance(scaled, gs.Tensor) else int(scaled)


# --- where the outputs lie ---------------------------------------------------------------------------------------


def _coordinates(node: gs.Node, g: Builder, axis: Axis) -> Number:
    """[target]: of each output, its place among the inputs."""
    how = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    length, target = _float(g, axis.length), _float(g, axis.target)
    numbers = _numbers(g, axis.target)
    single = isinstance(axis.target, int) and axis.target == 1
    before_last = of(g, "Max", of(g, "Sub", target, 1.0), 1.0)
    if how == "align_corners":
        return of(g, "Div", of(g, "Mul", numbers, of(g, "Sub", length, 1.0)), before_last)
    if how == "tf_crop_and_resize":
        if not isinstance(axis.target, int):
            g.decline("a crop is resized to a dynamic size")
        last = of(g, "Sub", length, 1.0)
        if single:
            return of(g, "Add", numbers, of(g, "Mul", last, (axis.start + axis.end) / 2))
        step = of(g, "Div", of(g, "Mul", last, axis.end - axis.start), before_last)
        return of(g, "Add", of(g, "Mul", numbers, step), of(g, "Mul", last, axis.start))
    if how == "asymmetric":
        return of(g, "Div", numbers, axis.factor)
    middle = of(g, "Div", of(g, "Add", numbers, 0.5), axis.factor)
    if how == "tf_half_pixel_for_nn":
        return middle
    half = of(g, "Sub", middle, 0.5)
    if how == "half_pixel_symmetric":
        adjustment = of(g, "Div", target, of(g, "Mul", length, axis.factor))
        return of(g, "Add", half, of(g, "Mul", of(g, "Div", length, 2.0), of(g, "Sub", 1.0, adjustment)))
    if how == "pytorch_half_pixel":
        return of(g, "Where", of(g, "Greater", target, 1.0), half, of(g, "Mul", numbers, 0.0))
    if how != "half_pixel":
        g.decline(f"the coordinates are {how!r}")
    return half


def _numbers(g: Builder, count: Size) -> Number:
    """0, 1, … as floating-point numbers."""
    return np.arange(count, dtype=np.float64) if isinstance(count, int) else g.cast(iota(g, count), np.float32)


def _nearest(node: gs.Node, g: Builder, x: gs.Tensor, axis: Axis, places: Number) -> gs.Tensor:
    how = node.attrs.get("nearest_mode", "round_prefer_floor")
    if isinstance(places, np.ndarray):
        places = np.asarray(places, np.float32)  # ties are where float32 has them
    if how == "floor":
        chosen = of(g, "Floor", places)
    elif how == "ceil":
        chosen = of(g, "Ceil", places)
    elif how == "round_prefer_ceil":
        chosen = of(g, "Floor", of(g, "Add", places, 0.5))
    else:
        chosen = of(g, "Ceil", of(g, "Sub", places, 0.5))
    chosen = of(g, "Min", of(g, "Max", chosen, 0.0), of(g, "Sub", _float(g, axis.length), 1.0))
    indices = g.cast(chosen, np.int64) if isinstance(chosen, gs.Tensor) else g.constant(np.asarray(chosen, np.int64))
    result: gs.Tensor = g.op.Gather(x, indices, axis=axis.index)
    return result


# --- weights -----------------------------------------------------------------------------------------------------


def _weighed(node: gs.Node, g: Builder, x: gs.Tensor, axis: Axis, places: Number) -> gs.Tensor:
    """``x`` times the matrix of weights along one axis."""
    weights, beyond = _matrix(node, g, axis, places)
    rank = len(g.shape(x))
    if isinstance(weights, np.ndarray):
        if beyond:  # what lies outside of the input is its edge
            inner = weights[:, beyond:-beyond].copy()
            inner[:, 0] += weights[:, :beyond].sum(1)
            inner[:, -1] += weights[:, -beyond:].sum(1)
            weights = inner
        weights = g.constant(weights.astype(g.dtype(x)))
    else:
        assert isinstance(weights, gs.Tensor)
        weights = g.cast(weights, g.dtype(x))
        if beyond:
            pads = [beyond if at % rank == axis.index else 0 for at in range(2 * rank)]
            x = g.op.Pad(x, pads, mode="edge")
    if axis.index == rank - 2:
        product: gs.Tensor = g.op.MatMul(weights, x)
        return product
    if isinstance(weights, gs.Constant):
        across: gs.Tensor = g.constant(np.ascontiguousarray(np.asarray(weights.values).T))
    else:
        across = g.op.Transpose(weights, perm=[1, 0])
    return g.moveaxis(g.op.MatMul(g.moveaxis(x, axis.index, -1), across), -1, axis.index)


def _matrix(node: gs.Node, g: Builder, axis: Axis, places: Number) -> tuple[Number, int]:
    """[target, beyond + length + beyond]: the weight of each input in each output; and how far it goes beyond."""
    smooth, inside = bool(node.attrs.get("antialias", 0)), bool(node.attrs.get("exclude_outside", 0))
    cubic = float(node.attrs.get("cubic_coeff_a", -0.75)) if node.attrs["mode"] == "cubic" else None
    width: Number = 1.0
    if smooth:
        places, width = _smoothing(node, g, axis, places, inside)
    elif cubic is None:
        places = of(g, "Min", of(g, "Max", places, 0.0), of(g, "Sub", _float(g, axis.length), 1.0))
    beyond = 0 if inside or (cubic is None and not smooth) else _reach(g, width, cubic)
    if isinstance(axis.length, int):
        inputs: Number = np.arange(-beyond, axis.length + beyond, dtype=np.float64)
    else:
        wide = g.op.Add(axis.length, [2 * beyond]) if beyond else axis.length
        inputs = of(g, "Sub", g.cast(iota(g, wide), np.float32), float(beyond))
    places = g.unsqueeze(places, [1]) if isinstance(places, gs.Tensor) else np.asarray(places)[:, None]
    distance = of(g, "Abs", of(g, "Sub", inputs, places))
    weights = _filter(g, of(g, "Div", distance, width) if smooth else distance, cubic)
    if smooth or (inside and cubic is not None):
        weights = of(g, "Div", weights, sum_along(g, weights, 1))
    return weights, beyond


def _smoothing(node: gs.Node, g: Builder, axis: Axis, places: Number, inside: bool) -> tuple[Number, Number]:
    """Where the filter of each output is centred, and how wide it is: as wide as an output, or an input.

    With aligned corners, torch centres it at (i + 0.5) · step: see ``_compute_indices_min_size_weights_aa`` in ATen's
    UpSampleKernel.cpp. What lies outside of the input is left out (``exclude_outside``, as in torch and Pillow), or is
    the input's edge.
    """
    how = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    if how == "align_corners" and inside:  # as torch exports it
        last, before_last = (of(g, "Sub", _float(g, item), 1.0) for item in (axis.length, axis.target))
        step = of(g, "Div", last, of(g, "Max", before_last, 1.0))
        step = of(g, "Where", of(g, "Greater", before_last, 0.0), step, 0.0)
        numbers = _numbers(g, axis.target)
        return of(g, "Sub", of(g, "Mul", of(g, "Add", numbers, 0.5), step), 0.5), of(g, "Max", step, 1.0)
    if how not in ("half_pixel", "pytorch_half_pixel") or (how == "pytorch_half_pixel" and axis.target == 1):
        g.decline(f"the coordinates are {how!r}; antialiasing is done for 'half_pixel'")
    return places, of(g, "Max", of(g, "Div", 1.0, axis.factor), 1.0)


def _reach(g: Builder, width: Number, cubic: float | None) -> int:
    """How far a filter of this width reaches beyond the input."""
    if isinstance(width, gs.Tensor):
        g.decline("antialiasing over a dynamic length whose edges are repeated; set exclude_outside")
    return math.ceil(float(width) * (1 if cubic is None else 2)) + 1


def _filter(g: Builder, distance: Number, a: float | None) -> Number:
    """The triangle, or Keys' cubic (1981, equation 4 with a general coefficient ``a``)."""
    if a is None:
        return of(g, "Max", of(g, "Sub", 1.0, distance), 0.0)

    def polynomial(*coefficients: float) -> Number:
        value: Number = coefficients[0]
        for coefficient in coefficients[1:]:
            value = of(g, "Add", of(g, "Mul", value, distance), coefficient)
        return value

    near, far = polynomial(a + 2, -(a + 3), 0.0, 1.0), polynomial(a, -5 * a, 8 * a, -4 * a)
    return of(g, "Where", of(g, "Less", distance, 1.0), near, of(g, "Where", of(g, "Less", distance, 2.0), far, 0.0))


def _extrapolated(node: gs.Node, g: Builder, x: gs.Tensor, outside: list[tuple[int, Number]]) -> gs.Tensor:
    """``x`` with ``extrapolation_value`` wherever one of the coordinates lies outside of the input."""
    rank = len(g.shape(x))
    value = g.constant(node.attrs.get("extrapolation_value", 0.0), g.dtype(x))
    for axis, beyond in outside:
        if isinstance(beyond, gs.Tensor):
            where = g.unsqueeze(beyond, list(range(1, rank - axis))) if axis < rank - 1 else beyond
        elif np.asarray(beyond).any():
            where = g.constant(np.asarray(beyond).reshape([-1] + [1] * (rank - 1 - axis)))
        else:
            continue
        x = g.op.Where(where, value, x)
    return x


# --- examples ----------------------------------------------------------------------------------------------------


def _resize(
    shape: list[int | str],
    sizes: list[int] | None,
    scales: list[float] | None = None,
    opset: int = 20,
    dtype: str = "float32",
    roi: list[float] | None = None,
    **attrs: object,
) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        region = None if roi is None else g.constant(np.array(roi, np.float32))
        factors = None if scales is None else g.constant(np.array(scales, np.float32))
        wanted = None if sizes is None else g.constant(sizes)
        result: gs.Tensor = g.op.Resize(x, region, factors, wanted, **attrs)
        return result

    return example({"x": (dtype, shape)}, build, opset)


@resize_of_chosen_axes.example
def sizes_of_images_in_a_dynamic_batch() -> gs.Graph:
    return _resize(["n", 3, 8, 6], [7, 9], mode="linear", axes=[2, 3])


@resize_of_chosen_axes.example
def scales_of_chosen_axes_in_another_order() -> gs.Graph:
    return _resize(["n", 3, "h", "w"], None, [2.0, 1.5], mode="nearest", axes=[-1, -2])


@resize_as_matmul.example
def sizes_where_scales_are_a_tensor_of_nothing() -> gs.Graph:
    return _resize([2, 8, 6, 3], [2, 7, 9, 3], [], opset=11, mode="cubic", roi=[])


@resize_as_matmul.example
def bilinear_of_torch() -> gs.Graph:
    return _resize([2, 3, 16, 11], [2, 3, 7, 5], mode="linear", exclude_outside=1, antialias=1)


@resize_as_matmul.example
def bicubic_of_torch_one_axis_grows() -> gs.Graph:
    attrs: dict[str, Any] = {"exclude_outside": 1, "cubic_coeff_a": -0.5, "antialias": 1}
    return _resize([2, 3, 16, 11], [2, 3, 7, 20], mode="cubic", **attrs)


@resize_as_matmul.example
def scales_of_a_dynamic_batch() -> gs.Graph:
    return _resize(["n", 3, 16, 12], None, [1, 1, 0.45, 0.5], mode="linear", exclude_outside=1, antialias=1)


@resize_as_matmul.example
def antialiased_images_of_any_size() -> gs.Graph:
    return _resize([1, 3, "h", "w"], [1, 3, 7, 2], mode="cubic", exclude_outside=1, antialias=1, opset=18)


@resize_as_matmul.example
def cubic_with_edges_repeated_on_chosen_axes() -> gs.Graph:
    return _resize(["n", 16, 12, 3], [5, 7], mode="cubic", axes=[1, 2], opset=18, antialias=1)


@resize_as_matmul.example
def cubic_over_three_axes() -> gs.Graph:
    return _resize([1, 5, 6, 4], None, [1.0, 1.5, 2.0, 0.75], mode="cubic", coordinate_transformation_mode="asymmetric")


@resize_as_matmul.example
def channels_last_images_of_any_size_cubic() -> gs.Graph:
    return _resize(["n", "h", "w", 3], None, [1.0, 2.0, 1.5, 1.0], mode="cubic")


@resize_as_matmul.example
def crop_and_resize_with_what_lies_outside() -> gs.Graph:
    attrs: dict[str, Any] = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 10.0}
    return _resize(["n", 1, 4, 4], None, [0.8, 0.8], roi=[0.4, 0.6, 1.2, 1.7], mode="linear", axes=[2, 3], **attrs)


@resize_as_matmul.example
def symmetric_half_pixels() -> gs.Graph:
    attrs: dict[str, Any] = {"coordinate_transformation_mode": "half_pixel_symmetric"}
    return _resize(["n", 1, 4, "w"], None, [1, 1, 0.6, 1.3], mode="linear", opset=19, **attrs)


@resize_as_matmul.example
def nearest_of_half_pixels_as_tensorflow_has_it() -> gs.Graph:
    attrs: dict[str, Any] = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}
    return _resize(["n", 3, 4, "w"], None, [1, 1, 1.75, 2.0], mode="nearest", **attrs)


@resize_as_matmul.example
def not_larger_than_a_box() -> gs.Graph:
    return _resize([1, 2, "h", "w"], [7, 8], mode="linear", axes=[2, 3], keep_aspect_ratio_policy="not_larger")


@resize_as_matmul.example
def nearest_of_integers() -> gs.Graph:
    return _resize(["n", 3, 5, "w"], None, [1, 1, 1.6, 2.5], dtype="int32", mode="nearest", nearest_mode="ceil")


@resize_as_matmul.example
def nearest_of_bytes_not_smaller_than_a_box() -> gs.Graph:
    attrs: dict[str, Any] = {"keep_aspect_ratio_policy": "not_smaller", "dtype": "uint8"}
    return _resize([1, 3, 5, 6], [7, 8], mode="nearest", axes=[2, 3], **attrs)


def _aligned_in_torch(feeds: Mapping[str, Array]) -> list[Array]:
    import torch

    x = torch.from_numpy(feeds["x"])
    y = torch.nn.functional.interpolate(x, size=(7, 20), mode="bicubic", align_corners=True, antialias=True)
    return [y.numpy()]


@resize_as_matmul.example_against(_aligned_in_torch)
def bicubic_of_torch_with_aligned_corners() -> gs.Graph:
    """torch measures from the edge of the first pixel, and ONNX Runtime from its centre: what torch gives is meant."""
    attrs: dict[str, Any] = {
        "exclude_outside": 1,
        "cubic_coeff_a": -0.5,
        "coordinate_transformation_mode": "align_corners",
    }
    return _resize([2, 3, 16, 11], [2, 3, 7, 20], mode="cubic", antialias=1, **attrs)
