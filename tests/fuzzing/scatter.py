"""Models for the rules of passes/rules/scatter.py."""

from __future__ import annotations

import math

import numpy as np

from . import Case, Sketch, strategy

TYPES = ("float32", "float32", "float32", "float16", "float64", "int32", "int64", "int8", "uint8", "bool")


def _small(s: Sketch, dtype: str, sizes: list[int], special: bool) -> np.ndarray:
    """Values of which products do not overflow."""
    if np.dtype(dtype).kind in "iu":
        return np.asarray(s.random.integers(0, 4, sizes)).astype(dtype)
    values = s.values(dtype, sizes, special)
    return np.where(np.isnan(values), np.inf, values).astype(dtype)  # ONNX does not say what the larger of NaN and 1 is


@strategy("scatter_elements_with_reduction")
def elements(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    axis = s.axis(len(sizes))
    fewer = s.flag()
    shape = [s.integer(1, size) if fewer else size for size in sizes]
    shape[axis] = s.integer(0 if s.rarely() else 1, 6)
    if s.rarely() and fewer:
        shape[s.integer(0, len(shape) - 1)] = 0
    length = sizes[axis]
    low = -length if s.flag() else 0
    places = np.asarray(s.random.integers(low, length, shape))
    if s.flag() and shape[axis] <= length:
        order = s.random.permuted(
            np.broadcast_to(np.arange(length), [*shape[: axis % len(shape)], *shape[axis % len(shape) + 1 :], length]),
            axis=-1,
        )
        places = np.moveaxis(order[..., : shape[axis]], -1, axis)
    dtype = s.pick(*TYPES)
    special = s.flag()
    s.input("x", dtype, _small(s, dtype, sizes, special))
    s.operand("i", np.ascontiguousarray(places).astype(s.pick(np.int64, np.int64, np.int32)))
    s.operand("u", _small(s, dtype, shape, special))
    opset = s.pick(16, 18, 20)
    reduction = s.pick("add", "mul", *(("max", "min") if opset >= 18 else ()), "none")
    return s.model(lambda g, t: g.op.ScatterElements(t["x"], t["i"], t["u"], axis=axis, reduction=reduction), opset)


@strategy("scatter_elements_of_more_indices_than_places")
def more_indices(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    axis = s.axis(len(sizes))
    fewer = s.flag()
    shape = [s.integer(0 if s.rarely() else 1, size) if fewer else size for size in sizes]
    length = sizes[axis]
    shape[axis] = length + s.integer(0 if s.rarely() else 1, 6)
    places = np.asarray(s.random.integers(-length if s.flag() else 0, length, shape))
    dtype = s.pick(*TYPES)
    s.input("x", dtype, s.values(dtype, sizes, special=True))
    s.operand("i", places.astype(s.pick(np.int64, np.int64, np.int32)))
    s.operand("u", s.values(dtype, shape, special=True))
    return s.model(lambda g, t: g.op.ScatterElements(t["x"], t["i"], t["u"], axis=axis), s.pick(11, 13, 16, 18))


@strategy("scatter_nd_with_reduction")
def rows(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    depth = s.integer(1, len(sizes))
    lead = s.sizes(0, 3, empty=True)
    columns = [s.random.integers(-n if s.flag() else 0, n, lead) for n in sizes[:depth]]
    places = np.stack(columns, -1).astype(np.int64).reshape([*lead, depth])
    if s.flag() and math.prod(lead) <= math.prod(sizes[:depth]):
        chosen = s.random.permutation(math.prod(sizes[:depth]))[: math.prod(lead)]
        places = np.stack(np.unravel_index(chosen, sizes[:depth]), -1).reshape([*lead, depth])
    dtype = s.pick(*TYPES)
    special = s.flag()
    opset = s.pick(16, 18, 20)
    reduction = s.pick("add", "mul", *(("max", "min") if opset >= 18 else ()), "none")
    static = special and reduction == "add"  # dynamic rows are added by a MatMul, where Inf reaches every row
    s.input("x", dtype, _small(s, dtype, sizes, special), static)
    s.operand("i", places.astype(np.int64), static)
    s.operand("u", _small(s, dtype, [*lead, *sizes[depth:]], special), static)
    return s.model(lambda g, t: g.op.ScatterND(t["x"], t["i"], t["u"], reduction=reduction), opset)
