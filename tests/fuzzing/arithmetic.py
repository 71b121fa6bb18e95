"""Models for the rules of passes/rules/arithmetic.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.rules.arithmetic import OF_NUMBERS

from . import Case, Sketch, Tensors, strategy


@strategy("reduce_bool_as_int32")
def reductions(s: Sketch) -> Case:
    sizes = s.sizes(0, 4)
    axes = s.axes(len(sizes))
    keepdims, noop = s.pick(None, 0, 1), s.pick(None, 0, 1)
    op = s.pick("ReduceMax", "ReduceMin")
    s.input("x", s.pick("bool", "bool", "bool", "int32", "float32"), sizes)
    if axes and s.flag():
        s.operand("axes", np.array(axes, np.int64), static=True)
        s.builds = "axes" in s.constants  # its reductions are along axes known when it builds
    elif axes:
        s.constants["axes"] = np.array(axes, np.int64)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return g.node(op, [t["x"], t.get("axes")], {"keepdims": keepdims, "noop_with_empty_axes": noop})

    return s.model(build, opset=20)


@strategy("reduction_of_a_number")
def reductions_of_numbers(s: Sketch) -> Case:
    op = s.pick(*OF_NUMBERS, "ReduceSumSquare")
    dtype = s.pick("float32", "float32", "float16", *(() if "Log" in op else ("int32", "int64")))
    s.input("x", dtype, s.values(dtype, []) if np.dtype(dtype).kind == "f" else np.array(s.integer(-99, 99), dtype))
    attrs = {"keepdims": s.pick(None, 0, 1), "noop_with_empty_axes": s.pick(None, 0)}
    return s.model(lambda g, t: g.node(op, [t["x"]], attrs), opset=18)


@strategy("cumprod_as_masked_products")
def cumulative_products(s: Sketch) -> Case:
    sizes = s.sizes(1, 5, empty=True)
    dtype = s.pick("float32", "float32", "float16", "float64", "int32", "int64")
    values = np.asarray(s.random.uniform(-2, 2, sizes)).astype(dtype)
    if s.rarely() and np.dtype(dtype).kind == "f":
        values = s.values(dtype, sizes, special=True)
    s.input("x", dtype, values)
    axis = np.array(s.axis(len(sizes)), s.pick(np.int64, np.int32))
    s.constants["axis"] = axis.reshape([1]) if s.rarely() else axis
    attrs = {"exclusive": s.pick(None, 0, 1), "reverse": s.pick(None, 0, 1)}
    return s.model(lambda g, t: g.op.CumProd(t["x"], t["axis"], **attrs), opset=26)


@strategy("det_by_cofactors")
def determinants(s: Sketch) -> Case:
    n = s.integer(1, 5)
    dtype = s.pick("float32", "float32", "float64", "float16")
    s.input("x", dtype, [*s.sizes(0, 3, empty=True), n, n])

    def true(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [np.asarray(np.linalg.det(feeds["x"].astype(np.float64))).astype(dtype)]

    return s.model(lambda g, t: g.op.Det(t["x"]), opset=s.pick(11, 20), reference=true)


@strategy("eye_of_a_dynamic_size")
def diagonals(s: Sketch) -> Case:
    s.input("x", s.pick("float32", "float16", "int32", "int64", "bool"), s.sizes(2, 2))
    attrs = {"k": s.pick(None, -1, 0, 2), "dtype": s.pick(None, 1, 7, 6, 9)}
    return s.model(lambda g, t: g.op.EyeLike(t["x"], **attrs), opset=s.pick(13, 20))


@strategy("place_in_a_vector")
def places_of_extremes(s: Sketch) -> Case:
    s.input("x", s.pick("float32", "float16", "int32", "int64", "int8", "uint8"), s.sizes(1, 2))
    attrs = {"axis": s.pick(None, 0, -1), "keepdims": s.pick(None, 0, 1), "select_last_index": s.pick(None, 0, 1)}
    op = s.pick("ArgMax", "ArgMin")
    return s.model(lambda g, t: g.node(op, [t["x"]], attrs), opset=s.pick(13, 20))


@strategy("vector_times_stack")
def products_of_vectors(s: Sketch) -> Case:
    n, left = s.integer(1, 4), s.flag()
    stack = [*s.sizes(0, 3, empty=True), *((n, s.integer(1, 3)) if left else (s.integer(1, 3), n))]
    if s.rarely():
        stack = [n]
    dtype = s.pick("float32", "float32", "float16", "float64", "int32")
    s.builds = dtype != "int32"  # of which it multiplies no matrices
    a, b = (s.values(dtype, sizes) for sizes in ([n], stack))
    if dtype == "int32":  # sums beyond the type differ
        a, b = a % 100, b % 100
    a, b = (a, b) if left else (b, a)
    s.input("x", dtype, a) if left else s.operand("x", a)
    s.operand("y", b) if left else s.input("y", dtype, b)
    return s.model(lambda g, t: g.op.MatMul(t["x"], t["y"]), opset=s.pick(9, 13, 20))
