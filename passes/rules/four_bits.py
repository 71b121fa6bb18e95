"""Weights of four bits as ONNX Runtime stores them, two a byte, in an operator of its own, and those of eight."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.ir import Array
from passes.rules.quantised_operators import MICROSOFT, foreign


@rule("MatMulNBits", domain=MICROSOFT)
def matmul_of_few_bits_as_matmul(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has MatMulNBits; it is a MatMul by what DequantizeLinear gives of blocks of int4."""
    a, packed, scales = node.inputs[:3]
    zeros, order, bias = (g.input(node, index) for index in (3, 4, 5))
    rows, columns, block = (int(node.attrs[name]) for name in ("K", "N", "block_size"))
    bits = int(node.attrs.get("bits", 4))
    if bits not in (4, 8) or order is not None:
        g.decline("its weights are of other than 4 or 8 bits, or in another order")
    if zeros is not None and g.dtype(zeros) != np.uint8:
        g.decline("its zero points are no integers")
    count = -(-rows // block)
    steps = _numbers(g.value(packed), bits).reshape(columns, count, block)
    offset = np.uint8(1 << bits - 1)
    if zeros is not None:
        offset = _numbers(g.value(zeros), bits).reshape(columns, -1)[:, :count, None]
    signed, scale = steps.astype(np.int16) - offset.astype(np.int16), g.value(scales).reshape(columns, count)
    whole = count * block == rows and columns * count > 1
    if bits == 4 and g.opset >= 21 and whole and signed.min() >= -8 and signed.max() <= 7:
        stored = np.ascontiguousarray(signed.reshape(columns, rows).T.astype(ml_dtypes.int4))
        inputs = [g.constant(stored), g.constant(np.ascontiguousarray(scale.T))]
        weights = g.node("DequantizeLinear", inputs, {"axis": 0, "block_size": block})
    else:
        floats = (signed * scale[..., None]).astype(scale.dtype).reshape(columns, -1)[:, :rows]
        weights = g.constant(np.ascontiguousarray(floats.T))
        why = (
            "int4 needs opset 21, whole blocks, and zero points of 8. "
            "MatMulNBitsQuantizer(quant_format=QuantFormat.QDQ) writes such a model"
            if bits == 4
            else "TensorRT has blocks of int4 alone"
        )
        g.note(f"{bits}-bit weights of MatMulNBits became floats: {why}")
    y = g.op.MatMul(a, weights)
    return y if bias is None else g.op.Add(y, bias)


def _numbers(packed: Array, bits: int) -> Array:
    """Of four bits, two numbers a byte, the lower half first."""
    return np.stack([packed & 15, packed >> 4], -1) if bits == 4 else packed


# --- examples ----------------------------------------------------------------------------------------------------


def _of_bits(bits: int, opset: int, zeros: bool) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        rng = np.random.default_rng(0)
        packed, scales = rng.integers(0, 256, (8, 2, 4 * bits), np.uint8), rng.random((8, 2), np.float32)
        offsets = [rng.integers(0, 256, (8, bits // 4), np.uint8)] if zeros else []
        sizes = {"K": 64, "N": 8, "bits": bits, "block_size": 32}
        return foreign(g, "MatMulNBits", [x, packed, scales, *offsets], np.float32, ["n", 8], **sizes)

    return example({"x": ("float32", ["n", 64])}, build, opset)


@matmul_of_few_bits_as_matmul.example
def weights_of_four_bits() -> gs.Graph:
    return _of_bits(4, 21, False)


@matmul_of_few_bits_as_matmul.example
def weights_of_four_bits_with_zero_points_in_an_older_opset() -> gs.Graph:
    return _of_bits(4, 20, True)


@matmul_of_few_bits_as_matmul.example
def weights_of_eight_bits() -> gs.Graph:
    return _of_bits(8, 21, False)


@matmul_of_few_bits_as_matmul.example
def weights_of_eight_bits_with_zero_points() -> gs.Graph:
    return _of_bits(8, 21, True)
