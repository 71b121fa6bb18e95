"""Models for the rules of passes/rules/activations.py."""

from __future__ import annotations

from . import Case, Sketch, strategy

FLOATS = ("float32", "float32", "float16", "float64")


@strategy("softmax_of_a_vector")
def softmaxes(s: Sketch) -> Case:
    op, opset = s.pick("Softmax", "LogSoftmax", "Hardmax"), s.pick(9, 11, 13, 20)
    sizes = s.sizes(1, 1) if s.flag() else s.sizes(1, 4)
    axis = s.pick(None, s.axis(len(sizes)) if opset >= 11 else s.integer(0, len(sizes) - 1))
    if opset < 13 and len(sizes) == 1:
        axis = 0  # 1 is the default, and a vector has none
    s.input("x", "float32" if opset < 13 else s.pick(*FLOATS), sizes)
    return s.model(lambda g, t: g.node(op, [t["x"]], {"axis": axis}), opset=opset)


@strategy("hardmax_over_a_dynamic_axis")
def hardmaxes(s: Sketch) -> Case:
    opset = s.pick(11, 13, 20)
    sizes = s.sizes(1, 4)
    axis = s.axis(len(sizes)) if opset >= 13 or s.flag() else 0
    dtype = "float32" if opset < 13 else s.pick(*FLOATS)  # ONNX's evaluator does it as 13 says
    values = s.random.integers(0, 3, sizes) if s.flag() else s.random.standard_normal(sizes)  # many are equal
    s.input("x", dtype, values.astype(dtype))
    return s.model(lambda g, t: g.op.Hardmax(t["x"], axis=axis), opset=opset)


@strategy("prelu_of_integers")
def prelus(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    slope = [size if s.flag() else 1 for size in sizes][s.integer(0, len(sizes) - 1) :]
    dtype = s.pick("int32", "int32", "int64", "float32")
    s.input("x", dtype, s.values(dtype, sizes))
    s.operand("slope", s.random.integers(-3, 4, slope).astype(dtype))
    return s.model(lambda g, t: g.op.PRelu(t["x"], t["slope"]), opset=s.pick(9, 16, 20))
