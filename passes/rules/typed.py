"""Operators that TensorRT has, but not for this type: bool, integers, or floats where it takes integers alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.model import onnx_dtype
from passes.rules.integers import carried, is_integer, is_unsigned, wrapped
from passes.rules.shapes import check_intermediate
from passes.rules.small_floats import Format, leading_power

FLOATS = ("float16", "bfloat16", "float32")
MOST_FACTORS = 31
"""The largest exponent of an integer that is written as a product."""
SINGLE = Format(23, -126, float(np.finfo(np.float32).max), infinity=True)


@rule("Mod")
def float_mod_with_the_divisors_sign(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's Mod of floats has the sign of the dividend; where that is not the divisor's, one divisor is added."""
    x, y = node.inputs
    if g.dtype(x).name not in FLOATS or node.attrs.get("fmod", 0):
        return None
    rest = g.op.Mod(x, y, fmod=1)
    zero = g.constant(0, g.dtype(x))
    apart = g.op.Less(g.op.Mul(g.op.Sign(rest), g.op.Sign(y)), zero)
    return g.op.Where(apart, g.op.Add(rest, y), rest)


@float_mod_with_the_divisors_sign.example
def python_remainder() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 4]), "y": ("float32", [4])},
        lambda g, x, y: g.op.Mod(g.op.Mul(x, g.constant(5.0)), y),
        opset=26,
    )


@rule("Relu")
def rectify_integers(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT rectifies floats; of integers it takes the larger."""
    x = node.inputs[0]
    return g.op.Max(x, g.constant(0, g.dtype(x))) if g.dtype(x) in (np.int32, np.int64) else None


@rectify_integers.example
def relu_of_int32() -> gs.Graph:
    return example({"x": ("int32", ["n", 4])}, lambda g, x: g.op.Relu(g.op.Sub(x, g.constant(1, np.int32))))


@rule("ReduceL2", "ReduceLogSum", "ReduceLogSumExp")
def reduce_integers_as_floats(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT takes roots and logarithms of floats alone; of integers the result is cut off."""
    x = node.inputs[0]
    if g.dtype(x) not in (np.int32, np.int64):
        return None
    reduced = g.node(node.op, [g.cast(x, np.float32), *node.inputs[1:]], node.attrs)
    return g.cast(reduced, g.dtype(x))


@reduce_integers_as_floats.example
def length_of_an_integer_vector() -> gs.Graph:
    return example({"x": ("int32", ["n", 4])}, lambda g, x: g.op.ReduceL2(x, [1]))


@rule("DepthToSpace", "SpaceToDepth")
def blocks_of_small_types(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT moves no blocks of bool and of small integers; float32 holds each of their values."""
    kind = g.dtype(node.inputs[0])
    if kind not in (np.bool_, np.uint8, np.int16, np.uint16):
        return None
    wide = g.cast(node.inputs[0], np.float32)
    return g.cast(g.node(node.op, [wide], node.attrs), kind)


@blocks_of_small_types.example
def mask_to_blocks_and_back() -> gs.Graph:
    return example(
        {"x": ("bool", ["n", 1, 4, 4])},
        lambda g, x: g.op.DepthToSpace(g.op.Not(g.op.SpaceToDepth(x, blocksize=2)), blocksize=2, mode="CRD"),
    )


@rule("Pow")
def pow_of_one_type(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's Pow wants base and exponent of one type; ONNX computes in the wider one and gives the base's."""
    x, y = node.inputs
    if x.dtype is None or y.dtype is None:
        return None  # in the body of a function, which is read as it is
    base, exponent = g.dtype(x), g.dtype(y)
    if base == exponent:
        return None
    if is_integer(base) and not is_integer(exponent):
        wide: np.dtype[Any] = np.dtype(np.float32)
    elif is_integer(base):
        wide = np.dtype(np.int64)
    else:
        wide = base if is_integer(exponent) or base == np.float32 else np.dtype(np.float32)
    if isinstance(y, gs.Constant):
        y = g.constant(np.asarray(y.values).astype(wide))
    return _cast(g, g.op.Pow(g.cast(x, wide), g.cast(y, wide)), base)


def _cast(g: Builder, x: gs.Tensor, dtype: np.dtype[Any]) -> gs.Tensor:
    return x if g.dtype(x) == dtype else g.cast(x, dtype)


@pow_of_one_type.example
def powers_of_other_types() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.Pow(x, y), g.op.Pow(x, g.constant(3)), g.op.Pow(y, g.constant(2.0)), g.op.Pow(y, g.constant(2))]

    return example({"x": ("float32", ["n", 4]), "y": ("int32", [4])}, build)


@rule("Pow", when=lambda target: target.of_tensorrt_8)
def integer_power_as_products(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT 8 takes powers of floats alone; one of an integer is a product, or a float that is rounded."""
    x, y = node.inputs
    if x.dtype is None or y.dtype is None or not is_integer(g.dtype(x)) or g.dtype(y) != g.dtype(x):
        return None
    exponents = np.unique(np.asarray(y.values)) if isinstance(y, gs.Constant) else np.array([])
    if exponents.size == 1 and 0 <= exponents[0] <= MOST_FACTORS:
        return _power(g, x, y, int(exponents[0]))
    g.note("powers of integers are computed as floats, and exact within 2**24 (16777216)")
    power = g.op.Pow(g.cast(x, np.float32), g.cast(y, np.float32))
    return g.cast(g.op.Round(power), g.dtype(x))


def _power(g: Builder, x: gs.Tensor, y: gs.Constant, exponent: int) -> gs.Tensor:
    """``x`` as often as ``exponent`` says, in the shape that it and ``y`` have together."""
    ones = g.constant(np.ones(np.shape(y.values), g.dtype(x)))
    if exponent == 0:
        return g.op.Add(g.op.Mul(x, g.constant(0, g.dtype(x))), ones)
    factors = [x]
    for _ in range(exponent.bit_length() - 1):
        factors.append(g.op.Mul(factors[-1], factors[-1]))
    taken = [factor for place, factor in enumerate(factors) if exponent >> place & 1]
    return functools.reduce(g.op.Mul, [*taken, ones] if np.ndim(y.values) or exponent == 1 else taken)


@integer_power_as_products.example
def powers_of_whole_numbers() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        made = [g.op.Pow(x, g.constant(count, np.int32)) for count in (0, 1, 2, 7)]
        rows = g.op.Pow(x, g.constant(np.full((3, 1), 3), np.int32))
        return [*made, rows, g.op.Pow(x, y), g.op.Pow(g.constant(2, np.int32), y)]

    return example({"x": ("int32", ["n", 4]), "y": ("int32", [4])}, build)


@rule("MatMul", "Gemm")
def integer_product_as_sums(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT multiplies matrices of floats alone; of integers each product is taken and summed."""
    if g.dtype(node.inputs[0]) not in (np.int32, np.int64):
        return None
    a, b = node.inputs[:2]
    if node.op == "Gemm":
        return _integer_gemm(node, g)
    rank_a, rank_b = len(g.shape(a)), len(g.shape(b))
    a = g.unsqueeze(a, [0]) if rank_a == 1 else a
    b = g.unsqueeze(b, [1]) if rank_b == 1 else b
    y = _sums(g, a, g.moveaxis(b, -1, -2))
    rank = len(g.shape(y))
    dropped = ([rank - 2] if rank_a == 1 else []) + ([rank - 1] if rank_b == 1 else [])
    return g.squeeze(y, dropped) if dropped else y


def _sums(g: Builder, a: gs.Tensor, b: gs.Tensor) -> gs.Tensor:
    """[…, m, n]: the products of the rows of ``a`` […, m, k] and ``b`` […, n, k]."""
    rank_a, rank_b = len(g.shape(a)), len(g.shape(b))
    longer = g.shape(a if rank_a >= rank_b else b)
    check_intermediate(g, [*longer[:-2], g.shape(a)[-2], *g.shape(b)[-2:]], "every row times every column")
    products = g.op.Mul(g.unsqueeze(a, [rank_a - 1]), g.unsqueeze(b, [rank_b - 2]))
    return g.reduce("ReduceSum", products, [max(rank_a, rank_b)])


def _integer_gemm(node: gs.Node, g: Builder) -> gs.Tensor:
    a, b = node.inputs[:2]
    kind = g.dtype(a)
    a = g.op.Transpose(a, perm=[1, 0]) if node.attrs.get("transA", 0) else a
    b = b if node.attrs.get("transB", 0) else g.op.Transpose(b, perm=[1, 0])
    alpha, beta = (float(node.attrs.get(name, 1.0)) for name in ("alpha", "beta"))
    if not (alpha.is_integer() and beta.is_integer()):
        g.decline(f"alpha {alpha} and beta {beta} of a product of integers")
    y = _sums(g, a, b)
    y = y if alpha == 1 else g.op.Mul(y, g.constant(int(alpha), kind))
    c = g.input(node, 2)
    if c is None:
        return y
    result: gs.Tensor = g.op.Add(y, c if beta == 1 else g.op.Mul(c, g.constant(int(beta), kind)))
    return result


@integer_product_as_sums.example
def stacks_of_integer_matrices() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor, v: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.MatMul(x, y), g.op.MatMul(x, v), g.op.MatMul(v, y), g.op.MatMul(v, v)]

    return example({"x": ("int32", ["n", 2, 3, 4]), "y": ("int32", [2, 4, 4]), "v": ("int32", [4])}, build)


@integer_product_as_sums.example
def gemm_of_int64() -> gs.Graph:
    return example(
        {"x": ("int64", [4, "n"]), "y": ("int64", [3, 4]), "c": ("int64", [3])},
        lambda g, x, y, c: g.op.Gemm(x, y, c, transA=1, transB=1, alpha=2.0, beta=3.0),
    )


@rule("BitCast", when=lacks("BitCast"))
def bits_of_float32(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no BitCast; sign, exponent and digits of a float32 are found, and put together, by arithmetic."""
    x, to = node.inputs[0], np.dtype(node.outputs[0].dtype)
    if g.dtype(x) == np.float32 and to in (np.int32, np.uint32):
        made = _bits_from_float(g, x)
        return made if to == np.int32 else g.op.BitCast(made, to=onnx_dtype(to))
    if to == np.float32 and g.dtype(x) in (np.int32, np.uint32):
        return _float_from_bits(g, x if g.dtype(x) == np.int32 else g.op.BitCast(x, to=onnx_dtype(np.int32)))
    return None


def _bits_from_float(g: Builder, x: gs.Tensor) -> gs.Tensor:
    zero, one = g.constant(0, np.float32), g.constant(1, np.float32)
    size, infinite = g.op.Abs(x), g.op.IsInf(x)
    plain = g.op.Where(g.op.Or(infinite, g.op.IsNaN(x)), one, size)
    power = leading_power(g, plain, SINGLE)
    exponent = g.op.Round(g.op.Div(g.op.Log(power), g.constant(math.log(2), np.float32)))
    digits = g.op.Mul(g.op.Div(plain, power), g.constant(2.0**23, np.float32))  # the first one counts as an exponent
    steps = g.op.Mul(g.op.Add(g.cast(exponent, np.int32), g.constant(126, np.int32)), g.constant(1 << 23, np.int32))
    bits = g.op.Add(steps, g.cast(digits, np.int32))
    bits = g.op.Where(infinite, g.constant(0x7F800000, np.int32), bits)
    bits = g.op.Where(g.op.IsNaN(x), g.constant(0x7FC00000, np.int32), bits)
    below = g.op.Less(g.op.Where(g.op.Equal(x, zero), g.op.Div(one, x), x), zero)  # of -0, too
    sign = g.op.Where(below, g.constant(np.iinfo(np.int32).min, np.int32), g.constant(0, np.int32))
    result: gs.Tensor = g.op.Add(bits, sign)
    return result


def _float_from_bits(g: Builder, x: gs.Tensor) -> gs.Tensor:
    zero, count = g.constant(0, np.int32), g.constant(1 << 23, np.int32)
    below = g.op.Less(x, zero)
    bits = g.op.Where(below, g.op.Sub(x, g.constant(np.iinfo(np.int32).min, np.int32)), x)
    exponent, digits = g.op.Div(bits, count), g.op.Mod(bits, count)
    first = g.op.Where(g.op.Equal(exponent, zero), zero, count)
    powers = np.exp2(np.arange(256, dtype=np.float64) - 127)
    powers[0] = powers[1]
    powers = np.append(powers[:255], np.inf)  # whose product with 1 is infinity
    share = g.op.Mul(g.cast(g.op.Add(first, digits), np.float32), g.constant(2.0**-23, np.float32))
    value = g.op.Mul(share, g.op.Gather(g.constant(powers.astype(np.float32)), exponent))
    last = g.op.Equal(exponent, g.constant(255, np.int32))
    lost = g.op.And(last, g.op.Greater(digits, zero))
    value = g.op.Where(lost, g.constant(np.nan, np.float32), value)
    result: gs.Tensor = g.op.Where(below, g.op.Neg(value), value)
    return result


@bits_of_float32.example
def float32_as_int32_and_back() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        bits = g.op.BitCast(x, to=onnx_dtype(np.int32))
        return [bits, g.op.BitCast(g.op.Add(bits, g.constant(3, np.int32)), to=onnx_dtype(np.float32))]

    return example({"x": ("float32", ["n", 4])}, build, opset=26)


@rule("BitCast", when=lacks("BitCast"))
def bits_of_another_integer(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no BitCast; between integers of one size it is a Cast that wraps around."""
    x, to = node.inputs[0], np.dtype(node.outputs[0].dtype)
    given = g.dtype(x)
    if given == to:
        return g.op.Identity(x)
    if not (is_integer(given) or given == np.bool_) or not (is_integer(to) or to == np.bool_):
        g.decline(f"the bits of {given} as {to} are no arithmetic on integers")
    wide = carried(g, x) if given != np.bool_ else g.cast(x, np.int32)
    if given.itemsize == 8 or is_unsigned(to) == is_unsigned(given) or given == np.bool_:
        return g.op.Cast(wide, to=onnx_dtype(to))
    if np.int32 in (to, given):
        wide = g.cast(wide, np.int64)
    return g.op.Cast(wide if g.dtype(wide) == to else wrapped(g, wide, to), to=onnx_dtype(to))


@bits_of_another_integer.example
def int8_as_uint8_and_back() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        unsigned = g.op.BitCast(g.op.Neg(x), to=onnx_dtype(np.uint8))
        return [unsigned, g.op.BitCast(unsigned, to=onnx_dtype(np.int8))]

    return example({"x": ("int8", ["n", 4])}, build, opset=26)
