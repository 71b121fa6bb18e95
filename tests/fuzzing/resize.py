"""Models for the rules of passes/rules/resize.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Case, Sketch, Tensors, strategy


@strategy("antialiased_resize_as_matmul")
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
        exact = [t / sizes[axis] for t, axis in zip(targets, resized, strict=True)]
        s.constants["scales"] = np.array(exact if s.flag() else [round(f + 0.03, 2) for f in exact], np.float32)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return g.op.Resize(t["x"], None, t.get("scales"), t.get("sizes"), **attrs)

    return s.model(build, opset=opset)
