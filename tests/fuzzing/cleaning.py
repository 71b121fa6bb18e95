"""Models for the rules of passes/rules/cleaning.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.model import onnx_dtype

from . import Case, Sketch, Tensors, strategy

TYPES = ("float32", "float16", "float64", "bfloat16", "int64", "int32", "bool", "uint8")


def around(s: Sketch, g: Builder, x: gs.Tensor, middle: gs.Tensor) -> list[gs.Tensor]:
    """Outputs that read a tensor in one of the ways that a graph can."""
    ways = {"output": [middle], "read": [g.op.Reshape(middle, [-1])], "both": [middle, g.op.Reshape(middle, [-1])]}
    return [*ways[s.pick(*ways)], *([g.op.Identity(x)] if s.rarely() else [])]


@strategy("drop_identity")
def copies(s: Sketch) -> Case:
    s.input("x", dtype := s.pick(*TYPES), s.values(dtype, s.sizes(0, 5, empty=True), special=True))
    depth, computed = s.integer(1, 3), s.flag()

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        x = g.op.Transpose(t["x"]) if computed else t["x"]
        y = x
        for _ in range(depth):
            y = g.op.Identity(y)
        return around(s, g, x, y)

    return s.model(build, opset=s.pick(13, 20))


@strategy("drop_cast_to_same_type")
def casts(s: Sketch) -> Case:
    s.input("x", dtype := s.pick(*TYPES), s.values(dtype, s.sizes(0, 5, empty=True), special=True))
    kind = s.pick(dtype, dtype, dtype, "float32", "float64")

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        x = g.op.Transpose(t["x"])
        return around(s, g, x, g.op.Cast(x, to=onnx_dtype(kind)))

    return s.model(build, opset=s.pick(13, 20))


@strategy("drop_dropout")
def dropouts(s: Sketch) -> Case:
    s.input("x", dtype := s.pick("float32", "float16", "float64"), s.values(dtype, s.sizes(0, 4, empty=True)))
    opset = s.pick(7, 10, 12, 13, 20)
    mask, training = s.flag() and opset >= 12, s.pick(None, False, False, True)  # before, the mask is not defined
    ratio = s.pick(None, 0.0, 0.5)
    if training and ratio != 0:
        ratio, training = 0.0, s.flag()  # what is drawn at random cannot be compared

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        x = g.op.Transpose(t["x"])
        if opset < 12:
            y = g.node("Dropout", [x], {"ratio": ratio}, 2 if mask else 1)
        else:
            share = None if ratio is None else g.constant(np.array(ratio, s.pick(dtype, np.float32)))
            mode = None if training is None else g.constant(np.array(training))
            y = g.node("Dropout", [x, share, mode], {"seed": s.pick(None, 1)}, 2 if mask else 1)
        return [*around(s, g, x, y[0] if mask else y), *([y[1]] if mask else [])]

    return s.model(build, opset=opset)


@strategy("range_of_scalars")
def ranges(s: Sketch) -> Case:
    dtype = np.dtype(s.pick("int64", "int64", "int32", "float32", "float64", "int16"))
    step = s.pick(1, 2, -1, -3)
    start, count = s.integer(-5, 5), s.integer(0, 6)
    for name, value in (("start", start), ("limit", start + count * step), ("step", step)):
        s.operand(name, np.full(s.pick([], [1]), value, dtype), static=True)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return g.op.Range(t["start"], t["limit"], t["step"])

    def true(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [(start + step * np.arange(count)).astype(dtype)]

    return s.model(build, opset=s.pick(11, 20), reference=true)
