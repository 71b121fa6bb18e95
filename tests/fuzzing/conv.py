"""Models for the rules of passes/rules/conv.py."""

from __future__ import annotations

from . import Case, Sketch, strategy


@strategy("conv_with_its_kernel_shape")
def computed(s: Sketch) -> Case:
    spatial, group = s.integer(1, 3), s.integer(1, 2)
    kernel, strides, dilations = ([s.integer(1, most) for _ in range(spatial)] for most in (3, 2, 2))
    attrs = {
        "group": group,
        "strides": s.pick(None, strides),
        "dilations": s.pick(None, dilations),
        "pads": s.pick(None, [s.integer(0, 2) for _ in kernel * 2]),
    }
    shape = [s.integer(1, 2), group * s.integer(1, 2), *(s.integer(5, 7) for _ in range(spatial))]
    s.input("x", "float32", shape)
    features = group * s.integer(1, 2)
    s.operand("weight", s.values("float32", [features, shape[1] // group, *kernel]), static=True)
    if s.flag():
        s.operand("bias", s.values("float32", [features]))
    return s.model(lambda g, t: g.node("Conv", [t["x"], t["weight"], t.get("bias")], attrs), opset=s.pick(11, 13, 20))
