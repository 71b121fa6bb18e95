"""Resize with antialiasing: ``F.interpolate(..., antialias=True)`` and torchvision's ``Resize`` on tensors.

TensorRT's Resize has no antialiasing. Along one axis, resizing is a product with a constant matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.model import Array


@rule("Resize")
def antialiased_resize_as_matmul(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's Resize has no antialiasing; along each axis it is a product with a constant matrix."""
    if not node.attrs.get("antialias", 0):
        return None
    x = node.inputs[0]
    mode = node.attrs.get("mode", "nearest")
    if mode not in ("linear", "cubic"):
        g.decline(f"mode {mode!r} has no antialiasing")
    if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        g.decline("the sizes follow the aspect ratio; give both sizes")
    if g.dtype(x).kind in "iub":
        g.decline(f"rounding of {g.dtype(x)} is not defined; cast to float32 before, and round after it")
    rank = len(g.shape(x))
    axes = [int(axis) % rank for axis in node.attrs.get("axes") or range(rank)]
    scales, sizes = g.input(node, 2), g.input(node, 3)
    if sizes is not None:
        targets = [int(item) for item in g.value(sizes).reshape(-1)]
        factors: list[float | None] = [None] * len(targets)
    elif scales is not None:
        factors = [float(item) for item in g.value(scales).reshape(-1)]
        targets = [-1] * len(factors)
    else:
        return None

    dtype = g.dtype(x)
    for axis, target, factor in zip(axes, targets, factors, strict=True):
        length = g.shape(x)[axis]
        if length == target or factor == 1:
            continue
        if not isinstance(length, int):
            g.decline(f"axis {axis} of {x.name!r} is resized, and its size is dynamic")
        if factor is not None:
            target = math.floor(length * factor)
        matrix = _matrix(g, node, length, target, factor).astype(dtype)
        if axis == rank - 2:
            x = g.op.MatMul(g.constant(matrix), x)
        else:
            product = g.op.MatMul(g.moveaxis(x, axis, -1), g.constant(np.ascontiguousarray(matrix.T)))
            x = g.moveaxis(product, -1, axis)
    return g.op.Identity(x) if x is node.inputs[0] else x


def _matrix(g: Builder, node: gs.Node, length: int, target: int, factor: float | None) -> Array:
    coordinates = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    inside = bool(node.attrs.get("exclude_outside", 0))
    if coordinates == "align_corners" and inside:  # as torch exports it
        step = (length - 1) / (target - 1) if target > 1 else 0.0
    elif coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and target > 1):
        step = 1 / factor if factor else length / target
    else:
        g.decline(f"the coordinates are {coordinates!r}; antialiasing is done for 'half_pixel'")
    coefficient = float(node.attrs.get("cubic_coeff_a", -0.75)) if node.attrs["mode"] == "cubic" else None
    return interpolation_matrix(length, target, step, coefficient, inside)


def interpolation_matrix(length: int, target: int, step: float, a: float | None, inside: bool) -> Array:
    """[target, length]: antialiased interpolation along one axis, as torch does it.

    ``step`` is the distance of two outputs in inputs. The filter (a triangle, or the cubic one of coefficient ``a``)
    is as wide as the step, if that is more than 1, and centred at (i + 0.5)·step, also with aligned corners: see
    ``_compute_indices_min_size_weights_aa`` in ATen's UpSampleKernel.cpp. What lies outside of the input is left out
    (``inside``, as in torch and Pillow), or is the input's edge.
    """
    width = max(step, 1.0)
    reach = width * (1 if a is None else 2)
    matrix = np.zeros((target, length))
    for i in range(target):
        centre = (i + 0.5) * step
        places = np.arange(math.floor(centre - reach), math.ceil(centre + reach) + 1)
        weights = _filter((places + 0.5 - centre) / width, a)
        if inside:
            weights = weights * ((places >= 0) & (places < length))
        np.add.at(matrix[i], np.clip(places, 0, length - 1), weights / weights.sum())
    return matrix


def _filter(x: Array, a: float | None) -> Array:
    """The triangle, or Keys' cubic (1981, equation 4 with a general coefficient ``a``)."""
    x = np.abs(x)
    if a is None:
        triangle: Array = np.maximum(1 - x, 0)
        return triangle
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _resize(
    shape: list[int | str], sizes: list[int] | None, scales: list[float] | None = None, opset: int = 20, **attrs: object
) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        factors = None if scales is None else g.constant(np.array(scales, np.float32))
        wanted = None if sizes is None else g.constant(sizes)
        result: gs.Tensor = g.op.Resize(x, None, factors, wanted, antialias=1, **attrs)
        return result

    return example({"x": ("float32", shape)}, build, opset)


@antialiased_resize_as_matmul.example
def bilinear_of_torch() -> gs.Graph:
    return _resize([2, 3, 16, 11], [2, 3, 7, 5], mode="linear", exclude_outside=1)


@antialiased_resize_as_matmul.example
def bicubic_of_torch_one_axis_grows() -> gs.Graph:
    return _resize([2, 3, 16, 11], [2, 3, 7, 20], mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5)


@antialiased_resize_as_matmul.example
def scales_of_a_dynamic_batch() -> gs.Graph:
    return _resize(["n", 3, 16, 12], None, [1, 1, 0.45, 0.5], mode="linear", exclude_outside=1)


@antialiased_resize_as_matmul.example
def cubic_with_edges_repeated_on_chosen_axes() -> gs.Graph:
    return _resize(["n", 16, 12, 3], [5, 7], mode="cubic", axes=[1, 2], opset=18)


def _aligned_in_torch(feeds: Mapping[str, Array]) -> list[Array]:
    import torch

    x = torch.from_numpy(feeds["x"])
    y = torch.nn.functional.interpolate(x, size=(7, 20), mode="bicubic", align_corners=True, antialias=True)
    return [y.numpy()]


@antialiased_resize_as_matmul.example_against(_aligned_in_torch)
def bicubic_of_torch_with_aligned_corners() -> gs.Graph:
    """torch measures from the edge of the first pixel, and ONNX Runtime from its centre: what torch gives is meant."""
    aligned = "align_corners"
    return _resize(
        [2, 3, 16, 11],
        [2, 3, 7, 20],
        mode="cubic",
        exclude_outside=1,
        cubic_coeff_a=-0.5,
        coordinate_transformation_mode=aligned,
    )
