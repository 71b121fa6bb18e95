"""Models for the rules of passes/rules/deform_conv.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Case, Sketch, Tensors, strategy


@strategy("deform_conv_as_gathers", "deform_conv_by_plugin")
def deformed(s: Sketch) -> Case:
    group, parts = s.integer(1, 2), s.integer(1, 2)
    batch, channels, features = s.integer(1, 2), group * parts * s.integer(1, 2), group * s.integer(1, 2)
    kernel, strides, dilations = ([s.integer(1, 2), s.integer(1, 3)] for _ in range(3))
    pads = [s.integer(0, 2) for _ in range(4)]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    image = [max(1, reach[i] - pads[i] - pads[2 + i]) + s.integer(0, 4) for i in range(2)]
    windows = [(image[i] + pads[i] + pads[2 + i] - reach[i]) // strides[i] + 1 for i in range(2)]
    attrs = {"group": group, "offset_group": parts, "strides": strides, "dilations": dilations, "pads": pads}
    s.input("x", "float32", [batch, channels, *image])
    taps = parts * int(np.prod(kernel))
    s.input("offset", "float32", s.values("float32", [batch, 2 * taps, *windows]) * 2)
    s.operand("weight", s.values("float32", [features, channels // group, *kernel]), static=True)
    extra = [name for name in ("bias", "mask") if s.flag()]
    if "bias" in extra:
        s.operand("bias", s.values("float32", [features]))
    if "mask" in extra:
        s.operand("mask", s.values("float32", [batch, taps, *windows]))

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return g.op.DeformConv(t["x"], t["weight"], t["offset"], t.get("bias"), t.get("mask"), **attrs)

    return s.model(build, opset=s.pick(19, 20))
