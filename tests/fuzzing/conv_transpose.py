"""Models for the rules of passes/rules/conv_transpose.py."""

from __future__ import annotations

from . import Case, Sketch, strategy


@strategy("conv_transpose_with_zeros_between_the_taps")
def spread(s: Sketch) -> Case:
    spatial, group = s.integer(1, 3), s.integer(1, 2)
    kernel, strides, dilations = ([s.integer(1, 3) for _ in range(spatial)] for _ in range(3))
    attrs = {
        "group": group,
        "strides": strides,
        "dilations": dilations,
        "kernel_shape": s.pick(None, kernel),
        "pads": s.pick(None, [s.integer(0, k - 1) for k in kernel * 2]),
        "output_padding": s.pick(None, [s.integer(0, max(a, b) - 1) for a, b in zip(strides, dilations, strict=True)]),
    }
    s.input("x", "float32", [s.integer(1, 2), group * s.integer(1, 2), *(s.integer(2, 5) for _ in range(spatial))])
    features = s.integer(1, 2)
    s.operand("weight", s.values("float32", [s.feeds["x"].shape[1], features, *kernel]), static=True)
    bias = s.flag()
    if bias:
        s.operand("bias", s.values("float32", [features * group]))
    return s.model(
        lambda g, t: g.node("ConvTranspose", [t["x"], t["weight"], t.get("bias")], attrs), opset=s.pick(13, 20)
    )
