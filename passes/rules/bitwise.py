"""Bitwise operators: ``x & 15``, ``x | y``, ``x ^ y``, ``~x``, ``x << 2``, ``x >> y``. TensorRT's parsers have none.

In two's complement the lowest k bits of an integer are its (floored) remainder by 2^k, negative ones included. From
that a run of bits is a difference of two remainders, and everything else is sums of runs, exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.model import Array, onnx_dtype
from passes.rules.integers import bits, carried, wrapped

MOST_RUNS = 6
"""Runs of ones in a constant mask that are taken one by one; masks with more are compared bit by bit."""


@rule("BitwiseAnd", when=lacks("BitwiseAnd"))
def bitwise_and_as_remainders(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no BitwiseAnd; the bits that a mask keeps are differences of remainders."""
    kind = g.dtype(node.inputs[0])
    a, b = (carried(g, x) for x in node.inputs)
    return _back(g, _and(g, a, b, kind), kind)


@rule("BitwiseOr", when=lacks("BitwiseOr"))
def bitwise_or_as_sum(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no BitwiseOr; it is the sum less what both have."""
    kind = g.dtype(node.inputs[0])
    a, b = (carried(g, x) for x in node.inputs)
    return _back(g, g.op.Add(a, g.op.Sub(b, _and(g, a, b, kind))), kind)


@rule("BitwiseXor", when=lacks("BitwiseXor"))
def bitwise_xor_as_sum(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no BitwiseXor; it is the sum of what only one has."""
    kind = g.dtype(node.inputs[0])
    a, b = (carried(g, x) for x in node.inputs)
    both = _and(g, a, b, kind)
    return _back(g, g.op.Add(g.op.Sub(a, both), g.op.Sub(b, both)), kind)


@rule("BitwiseNot", when=lacks("BitwiseNot"))
def bitwise_not_as_difference(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no BitwiseNot; it is the difference to all ones."""
    kind = g.dtype(node.inputs[0])
    x = carried(g, node.inputs[0])
    ones = np.iinfo(kind).max if kind.kind == "u" and bits(kind) < bits(g.dtype(x)) else -1
    return _back(g, g.op.Sub(g.constant(ones, g.dtype(x)), x), kind)


@rule("BitShift", when=lacks("BitShift"))
def bitshift_as_power_of_two(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no BitShift; it is a product with, or a floored quotient by, a power of two."""
    kind, left = g.dtype(node.inputs[0]), node.attrs["direction"] == "LEFT"
    x, amounts = carried(g, node.inputs[0]), carried(g, node.inputs[1])
    beyond = None
    if isinstance(amounts, gs.Constant):
        values = np.asarray(amounts.values)
        outside = (values < 0) | (values >= bits(kind))
        if outside.any():
            beyond, amounts = g.constant(outside), g.constant(np.where(outside, 0, values))
    elif g.opset >= 28:  # which says what comes of them; before, nothing did
        least, most = g.constant(0, g.dtype(amounts)), g.constant(bits(kind) - 1, g.dtype(amounts))
        inside = g.op.Max(g.op.Min(amounts, most), least)
        beyond, amounts = g.op.Not(g.op.Equal(amounts, inside)), inside
    result = (_shifted_left if left else _shifted_right)(g, x, amounts, kind)
    if beyond is not None:
        zero = g.constant(0, g.dtype(x))
        rest = zero if left or kind.kind == "u" else g.op.Where(g.op.Less(x, zero), g.constant(-1, g.dtype(x)), zero)
        result = g.op.Where(beyond, rest, result)
    return _back(g, result, kind)


# --- parts -------------------------------------------------------------------------------------------------------


def _back(g: Builder, x: gs.Tensor, kind: np.dtype[Any]) -> gs.Tensor:
    made = any(x is output for node in g.made for output in node.outputs)
    if g.dtype(x) == kind:
        return x if made else g.op.Identity(x)
    return g.op.Cast(x, to=onnx_dtype(kind))


def _width(g: Builder, kind: npt.DTypeLike) -> int:
    """How many bits matter: a target without int64 computes it in 32."""
    return min(bits(kind), 32) if _lacks_int64(g) else bits(kind)


def _lacks_int64(g: Builder) -> bool:
    return g.target is not None and "int64" not in g.target.types


def _low(g: Builder, x: gs.Tensor, count: int, width: int) -> gs.Tensor:
    """The lowest ``count`` of ``width`` bits, as a number that is not negative (unless it is all of a signed one)."""
    wide = g.dtype(x)
    if count >= width:
        return x
    if count == width - 1 and count >= 31 and (width == bits(wide) or _lacks_int64(g)):
        largest = g.constant((1 << count) - 1, wide)  # 2^count itself may have no place in the type
        moved = g.op.Add(g.op.Add(x, largest), g.constant(1, wide))
        return g.op.Where(g.op.Less(x, g.constant(0, wide)), moved, x)
    return g.op.Mod(x, g.constant(1 << count, wide))


def _and(g: Builder, a: gs.Tensor, b: gs.Tensor, kind: np.dtype[Any]) -> gs.Tensor:
    width = _width(g, kind)
    if isinstance(a, gs.Constant):
        a, b = b, a
    if isinstance(b, gs.Constant):
        runs = _runs(np.asarray(b.values), width)
        if len(runs) <= MOST_RUNS:
            return _masked(g, a, b, runs, width)
    rank_a, rank_b = len(g.shape(a)), len(g.shape(b))
    bits_a = _bits(g, g.unsqueeze(a, [rank_a]), width)
    bits_b = _bits(g, g.unsqueeze(b, [rank_b]), width)
    both = g.op.Where(g.op.Equal(bits_a, bits_b), bits_a, g.constant(0, g.dtype(a)))
    axis = max(rank_a, rank_b)
    if width <= 32:
        return g.reduce("ReduceSum", both, [axis])
    lower, upper = g.slice(both, [0], [32], [axis], [1]), g.slice(both, [32], [width], [axis], [1])
    sums = [g.reduce("ReduceSum", half, [axis]) for half in (lower, upper)]  # ONNX Runtime sums int64 as doubles
    return g.op.Add(*sums)


def _runs(mask: Array, width: int) -> list[tuple[int, int, Array]]:
    """Neighbouring bits (from, to) that are alike in every element, with the elements that have them."""
    planes = [(mask >> i) & 1 for i in range(width)]
    runs: list[tuple[int, int, Array]] = []
    for i, plane in enumerate(planes):
        if not plane.any():
            continue
        if runs and runs[-1][1] == i and np.array_equal(runs[-1][2], plane):
            runs[-1] = (runs[-1][0], i + 1, plane)
        else:
            runs.append((i, i + 1, plane))
    return runs


def _masked(g: Builder, x: gs.Tensor, mask: gs.Constant, runs: list[tuple[int, int, Array]], width: int) -> gs.Tensor:
    wide = g.dtype(x)
    uniform = np.asarray(mask.values).size == 1 and len(mask.shape) <= len(g.shape(x))
    total: gs.Tensor | None = None
    for first, end, plane in runs:
        piece = _low(g, x, end, width)
        if first:
            piece = g.op.Sub(piece, _low(g, x, first, width))
        if not uniform:
            piece = g.op.Mul(piece, g.constant(plane.astype(wide)))
        total = piece if total is None else g.op.Add(total, piece)
    if total is None or (total is x and not runs):
        return g.op.Mul(x, g.constant(np.zeros(mask.shape, wide)))
    return total


def _bits(g: Builder, x: gs.Tensor, width: int) -> gs.Tensor:
    """``x`` […, 1] as its bits […, width], each with its own weight; that of a sign is negative."""
    wide, rank = g.dtype(x), len(g.shape(x))
    powers = np.array([1 << i for i in range(width - 1)], wide)
    up_to = g.op.Concat(g.op.Mod(x, g.constant(powers)), _low(g, x, width - 1, width), x, axis=rank - 1)
    upper = g.slice(up_to, [1], [width + 1], [rank - 1], [1])
    lower = g.slice(up_to, [0], [width], [rank - 1], [1])
    result: gs.Tensor = g.op.Sub(upper, lower)
    return result


def _powers(g: Builder, amounts: gs.Tensor, table: list[int], like: gs.Tensor) -> gs.Tensor:
    """``table`` at ``amounts``, in the type of ``like``; a power that is too large has the bits of its negative."""
    wide = g.dtype(like)
    values = np.array(table, np.uint64).astype(np.int64).astype(wide)
    if isinstance(amounts, gs.Constant):
        return g.constant(values[np.asarray(amounts.values)])
    result: gs.Tensor = g.op.Gather(g.constant(values), amounts)
    return result


def _shifted_left(g: Builder, x: gs.Tensor, amounts: gs.Tensor, kind: np.dtype[Any]) -> gs.Tensor:
    shifted = g.op.Mul(x, _powers(g, amounts, [1 << s for s in range(bits(kind))], x))
    return shifted if bits(kind) == bits(g.dtype(x)) else wrapped(g, shifted, kind)


def _shifted_right(g: Builder, x: gs.Tensor, amounts: gs.Tensor, kind: np.dtype[Any]) -> gs.Tensor:
    top = bits(g.dtype(x)) - 2  # the largest power of two that the type has
    result = _quotient(g, x, _powers(g, amounts, [1 << min(s, top) for s in range(bits(kind))], x))
    if bits(kind) < bits(g.dtype(x)):
        return result
    result = _quotient(g, result, _powers(g, amounts, [1] * (top + 1) + [2], x))
    if kind.kind == "u":  # the shift filled in copies of what is, unsigned, no sign
        halves = _powers(g, amounts, [0] + [1 << (top + 1 - s) for s in range(1, top + 2)], x)
        zero = g.constant(0, g.dtype(x))
        fill = g.op.Where(g.op.Less(x, zero), halves, zero)
        result = g.op.Add(g.op.Add(result, fill), fill)
    return result


def _quotient(g: Builder, x: gs.Tensor, powers: gs.Tensor) -> gs.Tensor:
    """Floored, as a shift is, where ONNX's Div of integers truncates."""
    if isinstance(powers, gs.Constant) and (np.asarray(powers.values) == 1).all() and powers.shape == ():
        return x
    result: gs.Tensor = g.op.Div(g.op.Sub(x, g.op.Mod(x, powers)), powers)
    return result


# --- examples ----------------------------------------------------------------------------------------------------


def _spread(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """Small numbers made large, and negative ones among them; all fit in int32, which is all that TensorRT 8 has."""
    wide = g.dtype(x)
    result: gs.Tensor = g.op.Mul(g.op.Sub(x, g.constant(1, wide)), g.constant(0x1234567, wide))
    return result


@bitwise_and_as_remainders.example
def and_with_masks() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        masks: list[Array] = [np.array(m, np.int64) for m in (15, 0x7F00FF00, -1, 0, -(1 << 31), [[1], [6], [-2]])]
        return [g.op.BitwiseAnd(_spread(g, x), g.constant(mask)) for mask in masks]

    return example({"x": ("int64", ["n", 3, 4])}, build)


@bitwise_and_as_remainders.example
def and_of_two_tensors() -> gs.Graph:
    return example(
        {"x": ("int32", ["n", 4]), "y": ("int32", [3, 1, 4])},
        lambda g, x, y: g.op.BitwiseAnd(_spread(g, x), g.op.Neg(_spread(g, y))),
    )


@bitwise_and_as_remainders.example
def nibbles_of_uint8() -> gs.Graph:
    return example(
        {"x": ("uint8", [2, 5])},
        lambda g, x: g.op.Cast(g.op.BitwiseAnd(x, g.constant(15, np.uint8)), to=1),
        opset=18,
    )


@bitwise_or_as_sum.example
def or_with_a_mask_and_with_a_tensor() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
        either = g.op.BitwiseOr(_spread(g, x), g.op.Neg(_spread(g, y)))
        result: gs.Tensor = g.op.BitwiseOr(g.constant(0x5A5A5A5A), either)
        return result

    return example({"x": ("int64", ["n", 4]), "y": ("int64", [4])}, build)


@bitwise_xor_as_sum.example
def xor_with_a_mask_and_with_a_tensor() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
        result: gs.Tensor = g.op.BitwiseXor(g.op.BitwiseXor(_spread(g, x), y), g.constant(0x5A5A, np.int32))
        return result

    return example({"x": ("int32", ["n", 4]), "y": ("int32", [4])}, build)


@bitwise_not_as_difference.example
def not_of_int64_and_uint8() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.BitwiseNot(_spread(g, x)), g.op.Cast(g.op.BitwiseNot(y), to=6)]

    return example({"x": ("int64", ["n", 4]), "y": ("uint8", [4])}, build)


def _shift(given: str, through: npt.DTypeLike, directions: tuple[str, ...], amounts: list[int] | None) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        unsigned = g.op.Cast(_spread(g, x), to=onnx_dtype(through))
        by = g.op.Cast(y, to=onnx_dtype(through)) if amounts is None else g.constant(amounts, through)
        return [
            g.op.Cast(g.op.BitShift(unsigned, by, direction=direction), to=onnx_dtype(given))
            for direction in directions
        ]

    return example({"x": (given, ["n", 4]), "y": (given, [4])}, build)


@bitshift_as_power_of_two.example
def int64_shifted_left() -> gs.Graph:
    return _shift("int64", np.uint64, ("LEFT",), [0, 1, 2, 3])


@bitshift_as_power_of_two.example
def int32_shifted_by_a_tensor() -> gs.Graph:
    return _shift("int32", np.uint32, ("LEFT", "RIGHT"), None)


@bitshift_as_power_of_two.example
def int32_shifted_in_uint8() -> gs.Graph:
    return _shift("int32", np.uint8, ("LEFT", "RIGHT"), [0, 1, 4, 7])


@bitshift_as_power_of_two.example
def a_scalar_amount() -> gs.Graph:
    """How ``x >> 2`` of an int64 leaves torch, for numbers that are not negative."""
    return example(
        {"x": ("int64", ["n", 4])},
        lambda g, x: g.op.Cast(g.op.BitShift(g.op.Cast(x, to=13), g.constant(np.uint64(2)), direction="RIGHT"), to=7),
    )
