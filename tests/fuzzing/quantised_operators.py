"""Models for the rules of passes/rules/quantised_operators.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.rules.quantised_operators import foreign

from . import Arrays, Case, Sketch, Tensors, strategy

KINDS = ("uint8", "int8")


def _grid(s: Sketch, name: str, kind: Any, count: int | None = None, zero: int | None = None) -> None:
    """Draws a scale (of many digits: results in the middle of two steps go either way) and a zero point."""
    shape = [] if count is None else [count]
    s.operand(f"{name}_scale", s.random.uniform(0.05, 0.2, shape).astype(np.float32))
    s.operand(f"{name}_zero", np.full(shape, zero, kind) if zero is not None else s.random.integers(0, 99, shape, kind))


def _as_constant(s: Sketch, name: str) -> None:
    if name in s.inputs:
        del s.inputs[name]
        s.constants[name] = s.feeds.pop(name)


def _bytes(s: Sketch, kind: Any, sizes: list[int]) -> np.ndarray:
    limits = np.iinfo(kind)
    return s.random.integers(limits.min, limits.max, sizes, kind, endpoint=True)


@strategy("qlinear_conv_as_conv")
def convolutions(s: Sketch) -> Case:
    kind, group = s.pick(*KINDS), s.integer(1, 2)
    weights = "int8" if kind == "int8" else s.pick(*KINDS)
    n, c, m = s.integer(1, 2), s.integer(1, 2) * group, s.integer(1, 2) * group
    s.input("x", kind, _bytes(s, kind, [n, c, 5, 6]), static=True)  # TensorRT's Conv wants to know the channels
    s.operand("w", _bytes(s, weights, [m, c // group, 2, 3]), static=True)
    _grid(s, "x", kind)
    per_channel = s.flag()
    _grid(s, "w", weights, m if per_channel else None, 0 if per_channel or weights == "int8" else None)
    _grid(s, "y", kind)
    bias = s.flag()
    s.constants["bias"] = s.random.integers(-99, 99, [m]).astype(np.int32)
    attrs = {"group": group, "pads": [s.integer(0, 1) for _ in range(4)], "strides": [s.integer(1, 2), 1]}

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero", *(["bias"] if bias else [])]
        return g.node("QLinearConv", [t[name] for name in names], attrs)

    return s.model(build, opset=s.pick(10, 13, 20))


@strategy("qlinear_matmul_as_matmul")
def products(s: Sketch) -> Case:
    kind = s.pick(*KINDS)
    m, k, n = (s.integer(1, 4) for _ in range(3))
    s.input("a", kind, _bytes(s, kind, [*s.sizes(0, 2), m, k]))
    s.operand("b", _bytes(s, kind, [k, n]))
    _grid(s, "a", kind)
    _grid(s, "b", kind, n if s.flag() else None)
    _grid(s, "y", kind)
    names = ["a", "a_scale", "a_zero", "b", "b_scale", "b_zero", "y_scale", "y_zero"]
    return s.model(lambda g, t: g.op.QLinearMatMul(*(t[name] for name in names)), opset=s.pick(10, 13, 20))


@strategy("matmul_integer_in_exact_pieces")
def integer_products(s: Sketch) -> Case:
    left, right = s.pick(*KINDS), s.pick(*KINDS)
    m, n = (s.integer(1, 4) for _ in range(2))
    k = s.pick(1, 3, 300, 5000)
    s.input("a", left, _bytes(s, left, [*s.sizes(0, 2), m, k]))
    s.operand("b", _bytes(s, right, [k, n]), static=True)
    s.operand("a_zero", np.asarray(_bytes(s, left, [])))
    s.operand("b_zero", np.asarray(_bytes(s, right, s.pick([], [n]))))
    zeros = s.integer(0, 2)
    names = ["a", "b", "a_zero", "b_zero"][: 2 + zeros]
    return s.model(lambda g, t: g.op.MatMulInteger(*(t[name] for name in names)), opset=s.pick(10, 13, 20))


@strategy("conv_integer_in_exact_pieces")
def integer_convolutions(s: Sketch) -> Case:
    c, m = s.pick(1, 2, 40), s.integer(1, 3)
    s.input("x", "uint8", _bytes(s, "uint8", [s.integer(1, 2), c, 5, 6]), static=True)
    s.operand("w", _bytes(s, "uint8", [m, c, 3, 3]), static=True)
    s.operand("x_zero", np.asarray(_bytes(s, "uint8", [])))
    s.operand("w_zero", np.asarray(_bytes(s, "uint8", [])))
    names = ["x", "w", "x_zero", "w_zero"][: 2 + s.integer(0, 2)]
    attrs = {"pads": [s.integer(0, 1) for _ in range(4)], "strides": [s.integer(1, 2), 1]}
    return s.model(lambda g, t: g.node("ConvInteger", [t[name] for name in names], attrs), opset=s.pick(10, 13, 20))


@strategy("dynamic_quantize_in_float")
def dynamic(s: Sketch) -> Case:
    s.input("x", "float32", s.sizes(1, 4))
    return s.model(lambda g, t: g.op.DynamicQuantizeLinear(t["x"], outputs=3), opset=s.pick(11, 13, 18))


@strategy("qlinear_operator_in_float")
def onnx_runtimes(s: Sketch) -> Case:
    kind = s.pick(*KINDS)
    op = s.pick("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearGlobalAveragePool")
    sizes = [1, 2, 3, 4] if op == "QLinearGlobalAveragePool" else s.sizes(1, 4)
    for name in ("x", "z"):
        s.input(name, kind, _bytes(s, kind, sizes))
        _grid(s, name, kind)
    _grid(s, "y", kind)
    attrs = {"channels_last": 0} if op == "QLinearGlobalAveragePool" else {}
    shape = [1, 2, 1, 1] if op == "QLinearGlobalAveragePool" else sizes

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        given = [t["x"], t["x_scale"], t["x_zero"]]
        given += [t["z"], t["z_scale"], t["z_zero"]] if op in ("QLinearAdd", "QLinearMul") else []
        return foreign(g, op, [*given, t["y_scale"], t["y_zero"]], kind, list(shape), **attrs)

    return s.model(build)


@strategy("qlinear_softmax_in_float")
def shares(s: Sketch) -> Case:
    kind, sizes, opset = s.pick(*KINDS), s.sizes(1, 4), s.pick(11, 13, 18)
    s.input("x", kind, _bytes(s, kind, sizes))
    _grid(s, "x", kind)
    _grid(s, "y", kind)
    attrs = {"opset": s.pick(11, 18)} | ({"axis": s.axis(len(sizes))} if s.flag() else {})

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        given = [t["x"], t["x_scale"], t["x_zero"], t["y_scale"], t["y_zero"]]
        return foreign(g, "QLinearSoftmax", given, kind, list(sizes), **attrs)

    def reference(feeds: Arrays) -> list[np.ndarray]:
        """What its definition says: ONNX Runtime's kernel takes a share of 1 for 0, and other shares short."""
        t = feeds | s.constants
        x = (t["x"].astype(np.float64) - t["x_zero"]) * t["x_scale"]
        axis = attrs.get("axis", -1) % len(sizes)
        axes = (axis,) if attrs["opset"] >= 13 else tuple(range(axis, len(sizes)))
        powers = np.exp(x - x.max(axes, keepdims=True))
        steps = np.round(powers / powers.sum(axes, keepdims=True) / t["y_scale"]) + t["y_zero"]
        return [np.clip(steps, np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)]

    return s.model(build, opset=opset, reference=reference)


@strategy("qlinear_where_in_float")
def choices(s: Sketch) -> Case:
    kind, sizes = s.pick(*KINDS), s.sizes(1, 4)
    s.input("condition", "bool", [s.pick(1, size) for size in sizes])
    for name in ("x", "z"):
        s.input(name, kind, _bytes(s, kind, sizes))
    for name in ("x", "z", "y"):  # ONNX Runtime asks for constants
        _grid(s, name, kind)
        for part in (f"{name}_scale", f"{name}_zero"):
            _as_constant(s, part)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        names = ["condition", "x", "x_scale", "x_zero", "z", "z_scale", "z_zero", "y_scale", "y_zero"]
        return foreign(g, "QLinearWhere", [t[name] for name in names], kind, list(sizes))

    return s.model(build)


@strategy("qlinear_concat_in_float")
def joined(s: Sketch) -> Case:
    kind, sizes = s.pick(*KINDS), s.sizes(1, 4)
    axis = s.integer(0, len(sizes) - 1)
    s.input("x", kind, _bytes(s, kind, sizes))
    for name in ("x", "z"):
        _grid(s, name, kind)
    for name in ("x", "z"):  # ONNX Runtime asks for constants
        for part in (f"{name}_scale", f"{name}_zero"):
            _as_constant(s, part)
    shape = [size * 2 if i == axis else size for i, size in enumerate(sizes)]

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        x, grid = t["x"], [t["z_scale"], t["z_zero"]]
        given = [t["x_scale"], t["x_zero"], x, *grid, x, t["x_scale"], t["x_zero"]]
        return foreign(g, "QLinearConcat", given, kind, list(shape), axis=axis)

    return s.model(build)


@strategy("qgemm_as_gemm")
def layers(s: Sketch) -> Case:
    m, k, n = (s.integer(1, 4) for _ in range(3))
    ta, tb = s.integer(0, 1), s.integer(0, 1)
    s.input("a", "uint8", _bytes(s, "uint8", [k, m] if ta else [m, k]))
    s.operand("b", _bytes(s, "int8", [n, k] if tb else [k, n]), static=True)
    _grid(s, "a", "uint8")
    _grid(s, "b", "int8", zero=0)
    _grid(s, "y", "uint8")
    s.constants["c"] = s.random.integers(-99, 99, [n]).astype(np.int32)
    names = ["a", "a_scale", "a_zero", "b", "b_scale", "b_zero", "c", "y_scale", "y_zero"]
    return s.model(lambda g, t: foreign(g, "QGemm", [t[name] for name in names], "uint8", [m, n], transA=ta, transB=tb))


@strategy("dynamic_matmul_in_float")
def dynamic_products(s: Sketch) -> Case:
    m, k, n = (s.integer(1, 4) for _ in range(3))
    s.operand("b", _bytes(s, "int8", [k, n]), static=True)
    _grid(s, "b", "int8", n if s.flag() else None)
    if s.flag():
        s.input("a", "float32", [m, k])
        names = ["a", "b", "b_scale", "b_zero"]
        return s.model(lambda g, t: foreign(g, "DynamicQuantizeMatMul", [t[i] for i in names], "float32", [m, n]))
    s.input("a", "uint8", _bytes(s, "uint8", [m, k]))
    _grid(s, "a", "uint8")
    names = ["a", "b", "a_scale", "b_scale", "a_zero", "b_zero"]
    return s.model(lambda g, t: foreign(g, "MatMulIntegerToFloat", [t[i] for i in names], "float32", [m, n]))


@strategy("quantisation_of_the_standard")
def pairs(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    s.input("x", "float32", sizes)
    _grid(s, "x", "uint8")

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        grid = [t["x_scale"], t["x_zero"]]
        stored = foreign(g, "QuantizeLinear", [t["x"], *grid], "uint8", list(sizes))
        return foreign(g, "DequantizeLinear", [stored, *grid], "float32", list(sizes))

    return s.model(build)
