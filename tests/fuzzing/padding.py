"""Models for the rule of passes/rules/padding.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Case, Sketch, Tensors, strategy


@strategy("cut_before_padding")
def pads(s: Sketch) -> Case:
    sizes = [size + 2 for size in s.sizes(1, 4)]  # so that a cut of one on both sides leaves something
    dtype = s.pick("float32", "float16", "int32", "int64", "bool")
    s.input("x", dtype, sizes)
    axes = sorted(s.axes(len(sizes))) if s.flag() else None
    count = len(sizes) if axes is None else len(axes)
    s.constants["pads"] = np.array([s.integer(-1, 2) for _ in range(2 * count)], np.int64)
    if axes is not None:
        s.constants["axes"] = np.array(axes, np.int64)
    if s.flag():
        s.constants["value"] = np.array(1, dtype)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return g.node("Pad", [t["x"], t["pads"], t.get("value"), t.get("axes")], {"mode": s.pick(None, "constant")})

    return s.model(build, opset=18)
