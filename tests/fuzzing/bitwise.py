"""Models for the rules of passes/rules/bitwise.py."""

from __future__ import annotations

import numpy as np

from . import Case, Sketch, strategy

INTEGERS = ("int64", "int64", "int32", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")


def broadcast(s: Sketch) -> tuple[list[int], list[int]]:
    """Two shapes that broadcast with each other."""
    sizes = s.sizes(0, 4, empty=True)
    a, b = ([1 if s.rarely() else size for size in sizes] for _ in range(2))
    a, b = a[s.integer(0, len(a)) :] if s.rarely() else a, b[s.integer(0, len(b)) :] if s.flag() else b
    return (b, a) if s.flag() else (a, b)


def binary(op: str, s: Sketch) -> Case:
    dtype = s.pick(*INTEGERS)
    a, b = broadcast(s)
    s.input("x", dtype, s.integers(dtype, a))
    s.operand("y", s.integers(dtype, b))
    swapped = s.flag()
    return s.model(lambda g, t: g.node(op, [t["y"], t["x"]] if swapped else [t["x"], t["y"]], {}), opset=18)


@strategy("bitwise_and_as_remainders")
def conjunctions(s: Sketch) -> Case:
    return binary("BitwiseAnd", s)


@strategy("bitwise_or_as_sum")
def disjunctions(s: Sketch) -> Case:
    return binary("BitwiseOr", s)


@strategy("bitwise_xor_as_sum")
def differences(s: Sketch) -> Case:
    return binary("BitwiseXor", s)


@strategy("bitwise_not_as_difference")
def complements(s: Sketch) -> Case:
    dtype = s.pick(*INTEGERS)
    s.input("x", dtype, s.integers(dtype, s.sizes(0, 5, empty=True)))
    return s.model(lambda g, t: g.op.BitwiseNot(t["x"]), opset=18)


@strategy("bitshift_as_power_of_two")
def shifts(s: Sketch) -> Case:
    dtype = np.dtype(s.pick("uint64", "uint32", "uint16", "uint8"))
    a, b = broadcast(s)
    s.input("x", dtype, s.integers(dtype, a))
    s.operand("y", s.random.integers(0, 8 * dtype.itemsize, b).astype(dtype))  # beyond it, ONNX defines nothing
    direction = s.pick("LEFT", "RIGHT")
    return s.model(lambda g, t: g.op.BitShift(t["x"], t["y"], direction=direction), opset=s.pick(11, 18, 20))
