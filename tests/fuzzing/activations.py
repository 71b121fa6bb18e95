"""Models for the rules of passes/rules/activations.py."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Case, Sketch, Tensors, strategy

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


@strategy("elu_beside_loops")
def elus(s: Sketch) -> Case:
    length, batch, width = (s.integer(1, 4) for _ in range(3))
    kinds = [s.pick("LSTM", "GRU", "RNN", "Identity") if s.rarely() else s.pick("LSTM", "GRU", "RNN") for _ in range(2)]
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}
    alpha = s.pick(None, 1.0, 0.5, -2.0, 0.0)
    s.input("x", "float32", [length, batch, width])

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        y = t["x"]
        for place, kind in enumerate(kinds):
            if kind != "Identity":
                weights = [s.random.standard_normal([1, gates[kind] * width, width]).astype("float32") for _ in "wr"]
                y = g.squeeze(g.node(kind, [y, *weights], {"hidden_size": width}), [1])
            if place == 0:
                y = g.op.Add(g.op.Elu(g.op.Mul(y, 4.0), alpha=alpha), t["x"])
        return y

    return s.model(build, opset=s.pick(9, 13, 14, 20))
