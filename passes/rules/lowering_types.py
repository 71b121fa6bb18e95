"""Casts and quantisation in forms that came after a parser's time (``saturate``, ``output_dtype``, blocks)."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lowering
from passes.model import numpy_dtype, onnx_dtype

EIGHT_BIT_FLOATS = ("saturate", "round_mode")
"""Attributes that say how a float becomes one of eight bits; they mean nothing for other types."""


@lowering("Cast", "CastLike", since=19)
def cast_without_newer_attributes(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 19, a Cast does not say how it rounds to floats of eight bits, which are none of its types."""
    if not any(name in node.attrs for name in EIGHT_BIT_FLOATS):
        return None
    return g.node(node.op, node.inputs, {k: v for k, v in node.attrs.items() if k not in EIGHT_BIT_FLOATS})


@cast_without_newer_attributes.example
def integers_as_floats() -> gs.Graph:
    return example({"x": ("int32", ["n", 4])}, lambda g, x: g.op.Cast(x, to=1, saturate=1), 19)


@lowering("QuantizeLinear", "DequantizeLinear", since=19)
def quantisation_of_int8(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 19, quantisation knows float32 and 8-bit integers, and takes the type from the zero point."""
    attrs = dict(node.attrs)
    if attrs.pop("block_size", 0):
        g.decline("quantisation in blocks came with opset 21")
    wanted = attrs.pop("output_dtype", 0)
    attrs.pop("saturate", None)
    attrs.pop("precision", None)
    x, scale, zero = node.inputs[0], node.inputs[1], g.input(node, 2)
    kept = numpy_dtype(wanted) if wanted else None
    if node.op == "QuantizeLinear":
        if kept is not None and zero is None:
            zero = g.constant(np.zeros(g.static_shape(scale), kept))
        made: gs.Tensor = g.op.QuantizeLinear(_float32(g, x), _float32(g, scale), zero, **attrs)
        return made
    made = g.op.DequantizeLinear(x, _float32(g, scale), zero, **attrs)
    return g.cast(made, kept or g.dtype(scale))


def _float32(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """Integers stay: QuantizeLinear takes int32 as it is."""
    if g.dtype(x).kind == "i" or g.dtype(x) == np.float32:
        return x
    if isinstance(x, gs.Constant):
        return g.constant(np.asarray(x.values).astype(np.float32))
    return g.cast(x, np.float32)


def _quantised(dtype: str, opset: int, axis: int | None = None, typed: bool = False) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        scale = g.constant(np.array(0.05 if axis is None else [0.05, 0.1, 0.025, 0.5], dtype))
        zero = None if typed else g.constant(np.zeros(np.shape(scale.values), np.int8))
        quantised = {"axis": axis, "output_dtype": onnx.TensorProto.INT8 if typed else None, "saturate": 1}
        low = g.op.QuantizeLinear(x, scale, zero, **quantised)
        back = {"axis": axis, "output_dtype": onnx_dtype(np.dtype(dtype)) if opset >= 23 else None}
        made: gs.Tensor = g.op.DequantizeLinear(low, scale, zero, **back)
        return made

    return example({"x": (dtype, ["n", 4, 3])}, build, opset)


@quantisation_of_int8.example
def of_a_tensor_in_half_precision() -> gs.Graph:
    return _quantised("float16", 19)


@quantisation_of_int8.example
def of_channels_with_a_type_and_no_zero_point() -> gs.Graph:
    return _quantised("float32", 21, axis=1, typed=True)


@quantisation_of_int8.example
def with_a_type_for_the_result() -> gs.Graph:
    return _quantised("float32", 23)
