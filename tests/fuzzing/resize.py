"""Models for the rules of passes/rules/resize.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Case, Sketch, Tensors, strategy


@strategy("resize_as_matmul")
def refused(s: Sketch) -> Case:
    return s.pick(antialiased, unusual, unusual)(s)


def antialiased(s: Sketch) -> Case:
    mode = s.pick("linear", "cubic")
    rank = s.integer(1, 4) if mode == "linear" else s.pick(2, 4)
    sizes = [s.integer(1, 9) for _ in range(rank)]
    axes = None
    resized = list(range(rank))
    if s.flag():
        resized = sorted({axis % rank for axis in s.axes(rank)}) or [rank - 1]
        axes = [axis - rank if s.rarely() else axis for axis in resized]
    most = 2 if mode == "cubic" else 3
    changing = resized[-most:]
    opset = s.pick(18, 20)
    attrs = {
        "mode": mode,
        "antialias": 1,
        "axes": axes,
        "exclude_outside": s.pick(None, 0, 1) if mode == "cubic" else None,
        "cubic_coeff_a": s.pick(None, -0.5) if mode == "cubic" else None,
        "coordinate_transformation_mode": s.pick(None, "half_pixel", "pytorch_half_pixel", "asymmetric"),
    }
    targets = [s.integer(1, 12) if axis in changing else sizes[axis] for axis in resized]
    dtype = s.pick("float32", "float32", "float64", "float16", "uint8")
    s.input("x", dtype, sizes)
    if s.flag():
        s.constants["sizes"] = np.array(targets, np.int64)
    else:
        more = 0.4 if s.flag() else 1e-4  # of what is not resized, ONNX Runtime ignores the scale
        scales = [(t + more) / sizes[i] if t != sizes[i] else 1.0 for t, i in zip(targets, resized, strict=True)]
        s.constants["scales"] = np.array(scales, np.float32)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return g.op.Resize(t["x"], None, t.get("scales"), t.get("sizes"), **attrs)

    return s.model(build, opset=opset)


def wanted(s: Sketch, sizes: list[int], resized: list[int], changing: list[int], by_size: bool = False) -> None:
    """Scales or sizes of the axes ``resized``, some of which keep their sizes."""
    targets = [s.integer(1, 12) if axis in changing else sizes[axis] for axis in resized]
    if by_size or s.flag():
        s.constants["sizes"] = np.array(targets, np.int64)
    else:
        exact = [t / sizes[axis] for t, axis in zip(targets, resized, strict=True)]
        s.constants["scales"] = np.array(exact if s.flag() else [round(f + 0.03, 2) for f in exact], np.float32)


def unusual(s: Sketch) -> Case:
    """What is not antialiased: cropped, symmetric, of integers, to a kept aspect ratio, of any axes."""
    mode = s.pick("nearest", "linear", "linear", "cubic")
    rank = 4 if mode == "cubic" else s.integer(1, 4)
    sizes = [s.integer(2, 9) for _ in range(rank)]
    axes, resized = None, list(range(rank))
    if s.flag():
        resized = sorted({axis % rank for axis in s.axes(rank)}) or [rank - 1]
        axes = resized
    changing = resized[-2:] if mode == "cubic" else resized[-3:]
    how = s.pick("half_pixel_symmetric", "tf_crop_and_resize", "half_pixel", "asymmetric", "pytorch_half_pixel")
    if mode == "nearest" and how == "half_pixel_symmetric":  # the last digit of float32 decides what is nearest
        how = "half_pixel"
    attrs = {
        "mode": mode,
        "axes": axes,
        "coordinate_transformation_mode": how,
        "exclude_outside": s.pick(None, 0, 1) if mode == "cubic" else None,
        "cubic_coeff_a": s.pick(None, -0.5) if mode == "cubic" else None,
        "extrapolation_value": s.pick(None, 1.5),
        "nearest_mode": s.pick(None, "floor", "ceil", "round_prefer_ceil") if mode == "nearest" else None,
    }
    crops = how == "tf_crop_and_resize"  # to sizes that are scales times sizes: else ONNX and TensorFlow differ
    wanted(s, sizes, resized, changing, by_size=crops)
    if "sizes" in s.constants and not crops:
        attrs["keep_aspect_ratio_policy"] = s.pick(None, "not_larger", "not_smaller")
    if crops:
        targets = s.constants["sizes"].tolist()  # where they are the lengths, ONNX Runtime does not crop
        cropped = [axis in changing and to != sizes[axis] for axis, to in zip(resized, targets, strict=True)]
        starts = [s.random.uniform(-0.2, 0.4) if item else 0.0 for item in cropped]
        ends = [s.random.uniform(0.6, 1.2) if item else 1.0 for item in cropped]
        s.constants["roi"] = np.array(starts + ends, np.float32)
    dtype = s.pick("int32", "uint8", "int8", "float32") if mode == "nearest" else "float32"
    s.input("x", dtype, sizes)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return g.op.Resize(t["x"], t.get("roi"), t.get("scales"), t.get("sizes"), **attrs)

    return s.model(build, opset=s.pick(19, 20))


@strategy("resize_of_chosen_axes")
def chosen(s: Sketch) -> Case:
    mode = s.pick("nearest", "linear", "cubic")
    sizes = [s.integer(1, 3), s.integer(1, 3), s.integer(2, 7), s.integer(2, 7)]
    resized = s.pick([2, 3], [3, 2], [3], [-2, -1], [-1])
    wanted(s, sizes, resized, resized)
    s.input("x", s.pick("float32", "float32", "float16"), sizes)
    attrs = {"mode": mode, "axes": resized}

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return g.op.Resize(t["x"], None, t.get("scales"), t.get("sizes"), **attrs)

    return s.model(build, opset=s.pick(18, 20))
