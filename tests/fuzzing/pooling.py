"""Models for the rules of passes/rules/pooling.py."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Arrays, Case, Sketch, Tensors, strategy


def windows(s: Sketch, spatial: int, dilated: bool) -> dict[str, Any]:
    """The attributes of a pooling of so many axes, some of them left out where they are the default."""
    kernel = [s.integer(1, 3) for _ in range(spatial)]
    strides = [s.integer(1, 3) for _ in range(spatial)]
    dilations = [s.integer(1, 3) if dilated else 1 for _ in range(spatial)]
    attrs: dict[str, Any] = {"kernel_shape": kernel}
    if s.flag():
        attrs["strides"] = strides
    if dilated or s.flag():
        attrs["dilations"] = dilations
    how = s.pick("none", "pads", "pads", "pads", "SAME_UPPER", "SAME_LOWER", "VALID")
    if how == "pads":  # ONNX Runtime wants them smaller than the window
        attrs["pads"] = [s.integer(0, k - 1) for k in kernel * 2]
    elif how != "none":
        attrs["auto_pad"] = how
        if how.startswith("SAME"):  # ONNX Runtime pads by less than nothing where windows leave gaps
            reach = [(k - 1) * d + 1 for k, d in zip(kernel, attrs.get("dilations") or [1] * spatial, strict=True)]
            attrs["strides"] = [min(stride, size) for stride, size in zip(strides, reach, strict=True)]
    attrs["ceil_mode"] = s.pick(None, 0, 1)
    return attrs


def image(s: Sketch, attrs: dict[str, Any]) -> list[int]:
    kernel = attrs["kernel_shape"]
    dilations = attrs.get("dilations") or [1] * len(kernel)
    lengths = [(k - 1) * d + 1 + s.integer(0, 6) for k, d in zip(kernel, dilations, strict=True)]
    return [s.integer(1, 3), s.integer(1, 3), *lengths]


@strategy("dilated_maxpool_as_slices")
def maxima(s: Sketch) -> Case:
    attrs = windows(s, s.integer(1, 3), dilated=True)
    dtype = s.pick("float32", "float32", "float16", "float64", "uint8", "int8")
    s.input("x", dtype, s.values(dtype, image(s, attrs)))
    return s.model(lambda g, t: g.node("MaxPool", [t["x"]], attrs), opset=s.pick(12, 20))


@strategy("maxpool_with_indices_as_slices")
def places_of_maxima(s: Sketch) -> Case:
    attrs = windows(s, s.integer(1, 3), dilated=s.flag())
    attrs["storage_order"] = s.pick(None, 0, 1)
    dtype = s.pick("float32", "float32", "float16", "float64", "uint8")
    sizes = image(s, attrs)
    values = s.values(dtype, sizes)
    if s.flag():
        values = np.asarray(s.random.integers(0, 3, sizes)).astype(dtype)  # many are equal
    s.input("x", dtype, values)
    return s.model(lambda g, t: list(g.node("MaxPool", [t["x"]], attrs, 2)), opset=s.pick(12, 20))


@strategy("dilated_averagepool_as_slices")
def averages(s: Sketch) -> Case:
    attrs = windows(s, s.integer(1, 3), dilated=True)
    attrs["count_include_pad"] = s.pick(None, 0, 1)
    s.input("x", s.pick("float32", "float32", "float16"), image(s, attrs))
    return s.model(lambda g, t: g.node("AveragePool", [t["x"]], attrs), opset=s.pick(19, 20))


@strategy("max_unpool_as_scatter")
def unpooled(s: Sketch) -> Case:
    """Places are of the whole tensor, of the size that the attributes give, or of the one that is given."""
    spatial = s.integer(1, 3)
    kernel = [s.integer(1, 3) for _ in range(spatial)]
    strides = [s.integer(1, 3) for _ in range(spatial)] if s.flag() else None
    pads = [s.integer(0, k - 1) for k in kernel * 2] if s.flag() else None
    sizes = s.sizes(2 + spatial, 2 + spatial)
    inferred = [
        (size - 1) * stride + k - begin - end
        for size, stride, k, begin, end in zip(
            sizes[2:],
            strides or [1] * spatial,
            kernel,
            (pads or [0] * 2 * spatial)[:spatial],
            (pads or [0] * 2 * spatial)[spatial:],
            strict=True,
        )
    ]
    inferred = [*sizes[:2], *(max(0, item) for item in inferred)]
    given = [*sizes[:2], *(item + s.integer(0, 3) for item in inferred[2:])] if s.flag() else None
    whole = given or inferred
    count, room = math.prod(sizes), math.prod(whole)
    hypothesis.assume(count <= room)
    s.input("x", dtype := s.pick("float32", "float32", "float16", "float64"), sizes)
    s.operand("places", s.random.permutation(room)[:count].reshape(sizes).astype(np.int64))
    if given is not None:
        s.constants["size"] = np.array(given, np.int64)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        made = g.op.MaxUnpool(t["x"], t["places"], t.get("size"), kernel_shape=kernel, strides=strides, pads=pads)
        return made

    def true(feeds: Arrays) -> list[np.ndarray]:
        flat = np.zeros(room, dtype)
        where = feeds.get("places", s.constants.get("places"))
        flat[where.reshape(-1)] = feeds["x"].reshape(-1)
        return [flat.reshape(whole)]

    return s.model(build, opset=s.pick(11, 20), reference=true)


@strategy("maxpool_of_uint8")
def maxima_of_bytes(s: Sketch) -> Case:
    attrs = windows(s, s.integer(1, 3), dilated=s.rarely())
    if attrs.get("auto_pad", "").startswith("SAME"):
        attrs.pop("strides", None)  # beyond the window, ONNX Runtime's pads of float32 become negative
    outputs = s.pick(1, 1, 2)
    s.input("x", "uint8", s.values("uint8", image(s, attrs)))
    return s.model(lambda g, t: g.node("MaxPool", [t["x"]], attrs, outputs), opset=s.pick(12, 20))


@strategy("lppool_of_any_power")
def powers(s: Sketch) -> Case:
    opset = s.pick(13, 18, 20)
    attrs = windows(s, s.integer(1, 3), dilated=opset >= 18)
    if opset < 18:
        attrs.pop("ceil_mode")
        attrs.pop("dilations", None)
    attrs["p"] = s.pick(None, 1, 2, 3, 4)
    s.input("x", "float32", image(s, attrs))
    return s.model(lambda g, t: g.node("LpPool", [t["x"]], attrs), opset=opset)
