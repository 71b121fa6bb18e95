"""Models for the rules of passes/rules/quantize.py."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Case, Sketch, Tensors, strategy


def _grid(s: Sketch, kind: np.dtype, sizes: list[int], real: str, opset: int) -> dict[str, int | None]:
    """Draws scales and zero points for the whole, for an axis, or for blocks; returns the attributes."""
    attrs: dict[str, int | None] = {}
    shape: list[int] = s.pick([], [], [1])
    if sizes and s.flag() and opset >= 13:
        axis = s.axis(len(sizes))
        attrs["axis"] = axis
        shape = [sizes[axis]]
        if opset >= 21 and s.flag() and 0 not in sizes:  # of which ONNX Runtime crashes
            block = s.integer(1, 3)
            attrs["block_size"] = block
            shape = list(sizes)
            shape[axis] = -(-sizes[axis] // block)
    scale = np.asarray(2.0 ** s.random.integers(-5, 1, shape) if s.flag() else s.random.uniform(0.01, 1, shape))
    s.operand("scale", scale.astype(real))
    if s.flag() or kind not in (np.dtype(np.uint8),):
        zero = np.zeros(shape, kind) if kind == np.int32 or s.rarely() else s.integers(kind, shape)
        s.operand("zero", zero)
    return attrs


@strategy("quantize_in_float")
def quantised(s: Sketch) -> Case:
    opset = s.pick(10, 13, 19, 21, 23)
    real = s.pick("float32", "float32", "float32", "float16") if opset >= 19 else "float32"
    kind = np.dtype(s.pick("uint8", "uint8", "int8", "int8", *(("uint16", "int16") if opset >= 21 else ())))
    sizes = s.sizes(0, 4, empty=True)
    s.input("x", real, (s.values(real, sizes) * s.pick(1, 10, 1000)).astype(real))
    attrs = _grid(s, kind, sizes, real, opset)
    pair, moved = s.flag(), s.rarely()

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        y = g.node("QuantizeLinear", [t["x"], t["scale"], t.get("zero")], attrs)
        if moved:
            y = g.op.Identity(y)
        return g.node("DequantizeLinear", [y, t["scale"], t.get("zero")], attrs) if pair else y

    return s.model(build, opset=opset)


@strategy("dequantize_in_float")
def dequantised(s: Sketch) -> Case:
    opset = s.pick(10, 13, 19, 21, 23)
    real = s.pick("float32", "float32", "float32", "float16") if opset >= 19 else "float32"
    kind = np.dtype(s.pick("uint8", "uint8", "int8", "int32", *(("uint16", "int16") if opset >= 21 else ())))
    sizes = s.sizes(0, 4, empty=True)
    s.input("x", kind, s.integers(kind, sizes))
    attrs = _grid(s, kind, sizes, real, opset)
    return s.model(lambda g, t: g.node("DequantizeLinear", [t["x"], t["scale"], t.get("zero")], attrs), opset=opset)


@strategy("zero_point_in_words")
def around_zero(s: Sketch) -> Case:
    """int8 around a zero point that is left out, which is 0 then."""
    opset = s.pick(13, 19, 21, 23)
    real = s.pick("float32", "float32", "float16") if opset >= 19 else "float32"
    sizes = s.sizes(0, 4)
    stored = opset < 21 or s.flag()  # before, a QuantizeLinear with no zero point gives uint8
    s.input("x", "int8" if stored else real, s.integers("int8", sizes) if stored else s.values(real, sizes))
    axis = s.axis(len(sizes)) if sizes and s.flag() else None
    shape = [] if axis is None else [sizes[axis]]
    s.operand("scale", s.random.uniform(0.01, 1, shape).astype(real))
    attrs = {} if axis is None else {"axis": axis}

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        if stored:
            return g.node("DequantizeLinear", [t["x"], t["scale"]], attrs)
        return g.node("QuantizeLinear", [t["x"], t["scale"]], {**attrs, "output_dtype": onnx.TensorProto.INT8})

    return s.model(build, opset=opset)
