"""Models for the rules of passes/rules/typed.py."""

from __future__ import annotations

import numpy as np

from passes.model import onnx_dtype

from . import Case, Sketch, strategy
from .bitwise import broadcast


@strategy("float_mod_with_the_divisors_sign")
def remainders(s: Sketch) -> Case:
    kind = np.dtype(s.pick("float32", "float32", "float16"))
    a, b = broadcast(s)
    s.input("x", kind, s.values(kind, a))
    y = s.values(kind, b)
    s.operand("y", np.where(np.abs(y) < 0.1, 1, y).astype(kind))
    fmod = s.integer(0, 1) if s.rarely() else 0

    def reference(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        x, y = feeds["x"], feeds.get("y", s.constants.get("y"))
        return [np.fmod(x, y) if fmod else np.mod(x, y)]

    return s.model(lambda g, t: g.op.Mod(t["x"], t["y"], fmod=fmod), opset=26, reference=reference, tolerance=1e-2)


@strategy("rectify_integers")
def rectified(s: Sketch) -> Case:
    kind = s.pick("int32", "int64")
    s.input("x", kind, s.random.integers(-9, 9, s.sizes(0, 4, empty=True)).astype(kind))
    return s.model(lambda g, t: g.op.Relu(t["x"]), opset=s.pick(14, 20))


@strategy("reduce_integers_as_floats")
def lengths(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    axes = s.axes(len(sizes))
    op = s.pick("ReduceL2", "ReduceLogSum", "ReduceLogSumExp")
    keep = s.flag()
    s.input("x", "int32", s.random.integers(1, 9, sizes).astype(np.int32))
    return s.model(lambda g, t: g.reduce(op, t["x"], axes, keep), opset=s.pick(13, 18, 20))


@strategy("blocks_of_small_types")
def blocks(s: Sketch) -> Case:
    n, c, h, w, b = (s.integer(1, 3) for _ in range(5))
    kind = s.pick("bool", "uint8") if s.target.strongly_typed else "bool"
    if s.flag():
        s.input("x", kind, [n, c, h * b, w * b])
        return s.model(lambda g, t: g.op.SpaceToDepth(t["x"], blocksize=b), opset=s.pick(13, 20))
    s.input("x", kind, [n, c * b * b, h, w])
    mode = s.pick("DCR", "CRD")
    return s.model(lambda g, t: g.op.DepthToSpace(t["x"], blocksize=b, mode=mode), opset=s.pick(13, 20))


@strategy("pow_of_one_type")
def powers(s: Sketch) -> Case:
    a, b = broadcast(s)
    base, exponent = s.pick("float32", "int32", "int64", "float16"), s.pick("float32", "int32", "int64")
    s.input("x", base, s.random.integers(1, 5, a).astype(base))
    s.operand("y", s.random.integers(0, 4, b).astype(exponent))
    return s.model(lambda g, t: g.op.Pow(t["x"], t["y"]), opset=s.pick(12, 13, 20))


@strategy("integer_power_as_products")
def integer_powers(s: Sketch) -> Case:
    a, b = broadcast(s)
    kind = s.pick("int32", "int64")
    s.input("x", kind, s.random.integers(-4, 5, a).astype(kind))
    exponents = s.random.integers(0, 9, b)
    s.operand("y", (np.full(b, exponents.flat[0]) if s.flag() and exponents.size else exponents).astype(kind))
    return s.model(lambda g, t: g.op.Pow(t["x"], t["y"]), opset=s.pick(12, 13, 20))


@strategy("integer_product_as_sums")
def products(s: Sketch) -> Case:
    kind = s.pick("int32", "int64")
    m, k, n = (s.integer(1, 4) for _ in range(3))
    if s.rarely():
        ta, tb = s.integer(0, 1), s.integer(0, 1)
        s.input("x", kind, s.random.integers(-9, 9, [k, m] if ta else [m, k]).astype(kind))
        s.operand("y", s.random.integers(-9, 9, [n, k] if tb else [k, n]).astype(kind))
        return s.model(lambda g, t: g.op.Gemm(t["x"], t["y"], transA=ta, transB=tb), opset=13)
    a, b = broadcast(s)
    a, b = s.pick([k], [*a[:3], m, k]), s.pick([k], [*b[:3], k, n])
    s.input("x", kind, s.random.integers(-9, 9, a).astype(kind))
    s.operand("y", s.random.integers(-9, 9, b).astype(kind))
    return s.model(lambda g, t: g.op.MatMul(t["x"], t["y"]), opset=s.pick(9, 13, 20))


@strategy("bits_of_float32")
def float_bits(s: Sketch) -> Case:
    sizes = s.sizes(0, 3)
    to = s.pick("int32", "uint32")
    if s.flag():
        x = (s.random.standard_normal(sizes) * 2.0 ** s.random.integers(-120, 120, sizes)).astype(np.float32)
        odd = s.random.choice(np.array([0, -0.0, np.inf, -np.inf, 1, 3.4e38], np.float32), sizes)
        s.input("x", "float32", np.where(s.random.random(sizes) < 0.3, odd, x))
        kind = np.dtype(to)
        return s.model(
            lambda g, t: g.op.BitCast(t["x"], to=onnx_dtype(kind)), opset=26, reference=lambda f: [f["x"].view(kind)]
        )
    bits = s.random.integers(0, 1 << 32, sizes, np.uint32)
    bits = np.where(np.isnan(bits.view(np.float32)) | (np.abs(bits.view(np.float32)) < 1e-37), np.uint32(0), bits)
    s.input("x", to, bits.view(to))
    return s.model(
        lambda g, t: g.op.BitCast(t["x"], to=1), opset=26, reference=lambda f: [f["x"].view(np.float32)], tolerance=0
    )


@strategy("bits_of_another_integer")
def reinterpreted(s: Sketch) -> Case:
    given, to = s.pick(
        ("int8", "uint8"),
        ("uint8", "int8"),
        ("int16", "uint16"),
        ("uint16", "int16"),
        ("int32", "uint32"),
        ("uint32", "int32"),
        ("uint64", "int64"),
    )
    s.input("x", given, s.integers(given, s.sizes(0, 3)))
    return s.model(lambda g, t: g.op.BitCast(t["x"], to=onnx_dtype(np.dtype(to))), opset=26)
