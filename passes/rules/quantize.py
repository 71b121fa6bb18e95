"""Quantisation that TensorRT does not do natively: zero points other than 0, and types other than int8.

``torch.fake_quantize_per_tensor_affine(x, 0.05, 10, 0, 255)`` exports as such a QuantizeLinear and DequantizeLinear. An
int8 pair with zero point 0 stays as it is: TensorRT computes in int8 by it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.model import Array, numpy_dtype, onnx_dtype
from passes.rules.shapes import iota, size

MOVES = ("Gather", "GatherND", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""What hands numbers on, and takes them as the first input."""
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What TensorRT does in int8."""
BLOCKS_SINCE = 21
"""The opset that brought scales of blocks."""
BY_NAME = {"uint4": (0, 15), "int4": (-8, 7), "uint2": (0, 3), "int2": (-2, 1)}


@rule("DequantizeLinear")
def dequantize_in_float(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT quantises to int8 around zero; other zero points and types are rounding and clipping in float."""
    x, scale = node.inputs[:2]
    narrow, zero = _type_and_zero(g, g.dtype(x), g.input(node, 2))
    if _is_native(g, node, narrow, zero) and not _is_a_table_of_tensorrt_8(g, node):
        return _scalar_in_float(node, g) or _table_in_float(node, g)
    source = x.inputs[0] if x.inputs and x.inputs[0].op == "QuantizeLinear" and not x.inputs[0].domain else None
    if source is not None and _same_grid(g, node, source):
        return _rounded(g, source, node)
    rank = len(g.shape(x))
    target = numpy_dtype(node.attrs["output_dtype"]) if node.attrs.get("output_dtype") else g.dtype(scale)
    scale_, zero_ = (_along(g, node, item, x, rank) for item in (scale, g.input(node, 2)))
    if all(item is None or isinstance(item, gs.Constant) for item in (x, scale_, zero_)):
        offset = np.zeros((), np.int64) if zero_ is None else np.asarray(zero_.values).astype(np.int64)
        steps = (np.asarray(x.values).astype(np.int64) - offset).astype(np.float64)
        weights = steps * g.value(scale_).astype(np.float64)
        if narrow.name != "int32":
            g.note(f"constants quantised to {narrow.name} are {target} in the engine, and take the memory of that type")
        return g.op.Identity(g.constant(weights.astype(target)))
    _note(g, narrow)
    wide = x if narrow.name in ("uint8", "int8", "int32") else g.cast(x, np.int32)
    steps = g.cast(wide, np.float32)
    if zero_ is not None:
        steps = g.op.Sub(steps, _as_float(g, zero_, np.dtype(np.float32)))
    return g.cast(g.op.Mul(steps, _as_float(g, scale_, np.dtype(np.float32))), target)


def _is_a_table_of_tensorrt_8(g: Builder, node: gs.Node) -> bool:
    """Whether it gives constants that no product takes: TensorRT 8.5 divides those by their scale (measured)."""
    constants = isinstance(node.inputs[0], gs.Constant) and isinstance(node.inputs[1], gs.Constant)
    return g.target is not None and g.target.of_tensorrt_8 and constants and not _is_factor(node.outputs[0])


def _is_factor(x: gs.Tensor) -> bool:
    """Whether a product takes it, moved or not."""
    return any(reader.op in PRODUCTS or (reader.op in MOVES and _is_factor(reader.outputs[0])) for reader in x.outputs)


def _scalar_in_float(node: gs.Node, g: Builder) -> Replacement:
    """The number that a quantised scalar stands for: a builder that gives it axes, to broadcast it, refuses it."""
    x, scale = node.inputs[:2]
    if not (isinstance(x, gs.Constant) and isinstance(scale, gs.Constant) and g.shape(x) == []):
        return None
    kind = numpy_dtype(node.attrs["output_dtype"]) if node.attrs.get("output_dtype") else g.dtype(scale)
    value = g.value(x).astype(np.float64) * g.value(scale).astype(np.float64).reshape(())
    return g.op.Identity(g.constant(value.astype(kind)))


def _table_in_float(node: gs.Node, g: Builder) -> Replacement:
    """Rows of a table, dequantised before they are looked up: a quantised constant may have no other reader."""
    x, scale = node.inputs[:2]
    moved: list[gs.Node] = []
    while x.inputs and x.inputs[0].op in MOVES and not x.inputs[0].domain:
        moved.append(x.inputs[0])
        x = moved[-1].inputs[0]
    if not moved or not isinstance(x, gs.Constant) or g.shape(scale) not in ([], [1]):
        return None
    result: gs.Tensor = g.node("DequantizeLinear", [x, *node.inputs[1:]], node.attrs)
    for mover in reversed(moved):
        result = g.node(mover.op, [result, *mover.inputs[1:]], mover.attrs)
    return result


@rule("QuantizeLinear")
def quantize_in_float(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT quantises to int8 around zero; to other types by rounding and clipping in float, then a Cast."""
    narrow = _quantized_type(node)
    narrow, zero = _type_and_zero(g, narrow, g.input(node, 2))
    readers = node.outputs[0].outputs
    if _is_native(g, node, narrow, zero) or (readers and all(_takes_over(g, reader, node) for reader in readers)):
        return None
    _note(g, narrow)
    x = _single(g, node.inputs[0])
    rank = len(g.shape(x))
    scale, zero_ = (_along(g, node, item, x, rank) for item in (node.inputs[1], g.input(node, 2)))
    y = to_nearest(g, g.op.Div(x, _as_float(g, scale, g.dtype(x))))
    if zero_ is not None:
        y = g.op.Add(y, _as_float(g, zero_, g.dtype(x)))
    low, high = _limits(narrow)
    clipped = clipped_to(g, y, low, high)
    return g.op.Cast(g.op.Cast(clipped, to=onnx_dtype(np.int32)), to=onnx_dtype(narrow))


@rule("QuantizeLinear", "DequantizeLinear", when=lambda target: target.of_tensorrt_8)
def zero_point_in_words(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT 8's parser takes no QuantizeLinear or DequantizeLinear without a zero point, which is 0 then."""
    x, scale = node.inputs[:2]
    kind = _quantized_type(node) if node.op == "QuantizeLinear" else g.dtype(x)
    if g.input(node, 2) is not None or kind != np.int8:
        return None
    attrs = {name: value for name, value in node.attrs.items() if name != "output_dtype" or node.op != "QuantizeLinear"}
    zero = g.constant(np.zeros(g.static_shape(scale), np.int8))
    return g.node(node.op, [x, scale, zero], attrs)


def _takes_over(g: Builder, reader: gs.Node, node: gs.Node) -> bool:
    """Whether ``reader`` will do this node's work together with its own."""
    return reader.op == "DequantizeLinear" and not reader.domain and _same_grid(g, reader, node)


def _same_grid(g: Builder, dequantize: gs.Node, quantize: gs.Node) -> bool:
    """Whether both have the same scales, zero points and axis."""
    for a, b in ((dequantize.inputs[1], quantize.inputs[1]), (g.input(dequantize, 2), g.input(quantize, 2))):
        if a is b:
            continue
        if not (isinstance(a, gs.Constant) and isinstance(b, gs.Constant)):
            return False
        if not np.array_equal(np.asarray(a.values), np.asarray(b.values)):
            return False
    same = all(
        dequantize.attrs.get(name, d) == quantize.attrs.get(name, d) for name, d in (("axis", 1), ("block_size", 0))
    )
    return same and not dequantize.attrs.get("output_dtype")


def _rounded(g: Builder, quantize: gs.Node, dequantize: gs.Node) -> gs.Tensor:
    """Both at once: x to the nearest step of the grid. uint8 around 128 is int8 around 0, which TensorRT has."""
    x, scale = quantize.inputs[:2]
    narrow, zero = _type_and_zero(g, _quantized_type(quantize), g.input(quantize, 2))
    if narrow == np.uint8 and isinstance(zero, gs.Constant) and (np.asarray(zero.values) == 128).all():
        around_zero = g.constant(np.zeros(zero.shape, np.int8))
        attrs = {name: value for name, value in quantize.attrs.items() if name in ("axis", "block_size")}
        stored = g.node("QuantizeLinear", [x, scale, around_zero], attrs)
        result: gs.Tensor = g.node("DequantizeLinear", [stored, scale, around_zero], attrs)
        return result
    _note(g, narrow)
    kept = g.dtype(dequantize.inputs[1])
    x = _single(g, x)
    dtype, rank = g.dtype(x), len(g.shape(x))
    step = _as_float(g, _along(g, quantize, scale, x, rank), dtype)
    steps = to_nearest(g, g.op.Div(x, step))
    low, high = _limits(narrow)
    zero_ = _along(g, quantize, zero, x, rank)
    if zero_ is None or isinstance(zero_, gs.Constant):
        offset = np.zeros((), np.int64) if zero_ is None else np.asarray(zero_.values).astype(np.int64)
        if offset.size == 1:
            least, most = (g.constant(np.asarray(limit - offset.item(), dtype)) for limit in (low, high))
            return g.cast(g.op.Mul(g.op.Min(g.op.Max(steps, least), most), step), kept)
        below, above = (g.constant((limit - offset).astype(dtype)) for limit in (low, high))
    else:
        below, above = (g.op.Sub(g.constant(limit, dtype), _as_float(g, zero_, dtype)) for limit in (low, high))
    return g.cast(g.op.Mul(g.op.Min(g.op.Max(steps, below), above), step), kept)


def _note(g: Builder, narrow: np.dtype[Any]) -> None:
    """Says what is lost where quantised numbers have no kernels; what is int32 is a bias, and loses none."""
    if narrow.name != "int32":
        g.note(
            f"what the model quantises to {narrow.name} is rounded to the same steps in float, and what reads it "
            "computes in float: TensorRT has int8 kernels for steps around 0 alone. For these, quantise symmetrically "
            "(onnxruntime.quantization: QInt8, ActivationSymmetric, WeightSymmetric), or give the model in float and "
            "precision='int8'"
        )


# --- parts -------------------------------------------------------------------------------------------------------


def to_nearest(g: Builder, y: gs.Tensor) -> gs.Tensor:
    """``y`` rounded half to even; before opset 11 there is no Round."""
    if g.opset >= 11:
        result: gs.Tensor = g.op.Round(y)
        return result
    one, half = g.constant(1, g.dtype(y)), g.constant(0.5, g.dtype(y))
    below = g.op.Floor(y)
    rest = g.op.Sub(y, below)
    odd = g.op.Greater(g.op.Sub(g.op.Mul(below, half), g.op.Floor(g.op.Mul(below, half))), g.constant(0, g.dtype(y)))
    up = g.op.Or(g.op.Greater(rest, half), g.op.And(odd, g.op.Not(g.op.Less(rest, half))))
    result = g.op.Where(up, g.op.Add(below, one), below)
    return result


def clipped_to(g: Builder, y: gs.Tensor, low: float, high: float) -> gs.Tensor:
    """``y`` between two numbers; Clip takes them as inputs from opset 11 on alone."""
    if g.opset >= 11:
        result: gs.Tensor = g.op.Clip(y, g.constant(low, g.dtype(y)), g.constant(high, g.dtype(y)))
        return result
    result = g.op.Clip(y, min=float(low), max=float(high))
    return result


def _quantized_type(node: gs.Node) -> np.dtype[Any]:
    output = node.attrs.get("output_dtype")
    return numpy_dtype(output) if output else np.dtype(np.uint8)


def _type_and_zero(g: Builder, narrow: np.dtype[Any], zero: gs.Tensor | None) -> tuple[np.dtype[Any], gs.Tensor | None]:
    return (narrow if zero is None else g.dtype(zero)), zero


def _is_native(g: Builder, node: gs.Node, narrow: np.dtype[Any], zero: gs.Tensor | None) -> bool:
    if narrow.name.startswith("float"):
        return True
    around_zero = zero is None or (isinstance(zero, gs.Constant) and not np.asarray(zero.values).astype(np.int64).any())
    if g.target is not None and narrow.name not in g.target.types:
        return False
    blocks_are_older = g.target is not None and g.target.opset is not None and g.target.opset < BLOCKS_SINCE
    if node.attrs.get("block_size") and blocks_are_older:
        return False
    return narrow.name in ("int8", "int4") and around_zero


def _limits(narrow: np.dtype[Any]) -> tuple[int, int]:
    if narrow.name in BY_NAME:
        return BY_NAME[narrow.name]
    return int(np.iinfo(narrow).min), int(np.iinfo(narrow).max)


def _along(g: Builder, node: gs.Node, item: gs.Tensor | None, x: gs.Tensor, rank: int) -> gs.Tensor | None:
    """A scale or zero point in a shape that broadcasts with ``x``: for all, one an index of ``axis``, or by blocks."""
    if item is None or len(g.shape(item)) == 0:
        return item
    if rank == 0:  # the one element is all that there is
        return g.constant(g.value(item).reshape(())) if isinstance(item, gs.Constant) else g.squeeze(item, [0])
    axis = int(node.attrs.get("axis", 1)) % rank
    block = int(node.attrs.get("block_size", 0))
    if block and len(g.shape(item)) == rank:
        places = iota(g, size(g, x, axis))
        if isinstance(places, gs.Constant):
            places = g.constant(np.asarray(places.values) // block)
            if isinstance(item, gs.Constant):
                return g.constant(np.take(np.asarray(item.values), np.asarray(places.values), axis))
        else:
            places = g.op.Div(places, g.constant(block))
        spread: gs.Tensor = g.op.Gather(item, places, axis=axis)
        return spread
    one = g.shape(item) == [1]
    shape = [-1 if i == axis and not one else 1 for i in range(rank)]
    if isinstance(item, gs.Constant):
        return g.constant(np.asarray(item.values).reshape(shape))
    reshaped: gs.Tensor = g.op.Reshape(item, shape)
    return reshaped


def _single(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """``x`` in float32: half precision has no room for the steps of 16 bits, and integers do not divide."""
    return g.cast(x, np.float32)


def _as_float(g: Builder, item: gs.Tensor, dtype: np.dtype[Any]) -> gs.Tensor:
    if isinstance(item, gs.Constant):
        values = np.asarray(item.values)
        return item if values.dtype == dtype else g.constant(values.astype(dtype))
    return g.cast(item, dtype)


# --- examples ----------------------------------------------------------------------------------------------------


def _pair(
    shape: list[int | str],
    zero: Array | None,
    scale: Any = 0.05,
    opset: int = 20,
    between: bool = False,
    **attrs: int,
) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        steps, place = g.constant(np.asarray(scale, np.float32)), None if zero is None else g.constant(zero)
        stored = g.op.QuantizeLinear(x, steps, place, **attrs)
        if between:
            stored = g.op.Transpose(stored, perm=[1, 0])
        result: gs.Tensor = g.op.DequantizeLinear(stored, steps, place, **attrs)
        return result

    return example({"x": ("float32", shape)}, build, opset)


@dequantize_in_float.example
def fake_quantize_with_a_zero_point() -> gs.Graph:
    return _pair(["n", 8], np.array(10, np.uint8))


@dequantize_in_float.example
def fake_quantize_each_channel_of_int8() -> gs.Graph:
    return _pair(["n", 3, 4], np.array([3, -5, 0], np.int8), [0.02, 0.05, 0.1], 13, axis=-2)


@dequantize_in_float.example
def uint8_around_128() -> gs.Graph:
    return _pair([4, 8], np.array(128, np.uint8))


@dequantize_in_float.example
def weights_of_uint8() -> gs.Graph:
    weights = np.arange(48, dtype=np.uint8).reshape(3, 16)
    return example(
        {"x": ("float32", ["n", 3])},
        lambda g, x: g.op.MatMul(
            x,
            g.op.DequantizeLinear(
                g.constant(weights),
                g.constant(np.array([0.1, 0.2, 0.3], np.float32)),
                g.constant(np.array([7, 0, 99], np.uint8)),
                axis=0,
            ),
        ),
    )


@dequantize_in_float.example
def a_bias_of_int32() -> gs.Graph:
    return example({"x": ("int32", [2, 4])}, lambda g, x: g.op.DequantizeLinear(x, g.constant(np.float32(0.25))))


@dequantize_in_float.example
def a_scalar_of_int8() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 4])},
        lambda g, x: g.op.Mul(
            x, g.op.DequantizeLinear(g.constant(np.int8(-7)), g.constant(np.float32(0.25)), g.constant(np.int8(0)))
        ),
    )


@dequantize_in_float.example
def a_table_of_int8() -> gs.Graph:
    table = np.arange(-24, 24, dtype=np.int8).reshape(6, 8)
    return example(
        {"i": ("int64", ["n", 2])},
        lambda g, i: g.op.DequantizeLinear(
            g.op.Gather(g.constant(table), i, axis=0), g.constant(np.float32(0.25)), g.constant(np.int8(0))
        ),
    )


@dequantize_in_float.example
def a_table_of_int8_whose_rows_are_turned_first() -> gs.Graph:
    table = np.arange(-24, 24, dtype=np.int8).reshape(6, 8)

    def build(g: Builder, i: gs.Tensor) -> gs.Tensor:
        rows = g.op.Transpose(g.op.Gather(g.constant(table), i, axis=0), perm=[1, 0, 2])
        result: gs.Tensor = g.op.DequantizeLinear(rows, g.constant(np.float32(0.25)), g.constant(np.int8(0)))
        return result

    return example({"i": ("int64", ["n", 2])}, build)


@zero_point_in_words.example
def int8_with_no_zero_point() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        steps = g.constant(np.array([0.02, 0.05, 0.1], np.float32))
        stored = g.op.QuantizeLinear(x, steps, axis=1, output_dtype=onnx_dtype(np.int8))
        result: gs.Tensor = g.op.DequantizeLinear(stored, steps, axis=1)
        return result

    return example({"x": ("float32", ["n", 3, 4])}, build, 21)


@quantize_in_float.example
def stored_as_uint8() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 4])},
        lambda g, x: g.op.QuantizeLinear(x, g.constant(np.float32(0.05)), g.constant(np.uint8(30))),
    )


@quantize_in_float.example
def half_precision_in_steps_of_16_bits() -> gs.Graph:
    return example(
        {"x": ("float16", ["n", 4])},
        lambda g, x: g.op.DequantizeLinear(
            g.op.Identity(g.op.QuantizeLinear(x, g.constant(np.float16(0.277)), g.constant(np.uint16(59576)))),
            g.constant(np.float16(0.277)),
            g.constant(np.uint16(59576)),
        ),
        opset=21,
    )


@quantize_in_float.example
def a_scalar_with_a_vector_of_one_scale() -> gs.Graph:
    return example(
        {"x": ("float32", []), "steps": ("float32", [1])},
        lambda g, x, steps: g.op.QuantizeLinear(x, steps, g.constant(np.array([30], np.uint8))),
    )


@quantize_in_float.example
def moved_while_it_is_uint8() -> gs.Graph:
    return _pair([4, 8], np.array(10, np.uint8), between=True)
