"""Types that TensorRT's tensors do not have, carried in wider ones that they do.

uint16, uint32, uint64 and int16 exist nowhere in TensorRT, uint8 only as a network's input or output; of the types of 8
bits and fewer, TensorRT computes in none but int8. Yet ``x.permute(0, 3, 1, 2).float()`` of a uint8 image moves uint8,
``x >> 2`` of an int64 is exported through uint64, and ``mask.to(torch.uint8) + 1`` adds uint8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.model import numpy_dtype, onnx_dtype, type_name
from passes.rules.small_floats import FORMATS, rounded

CARRIERS = {
    **dict.fromkeys(("uint8", "int16", "uint16", "int4", "uint4", "int2", "uint2"), np.int32),
    **dict.fromkeys(("uint32", "uint64"), np.int64),
    **dict.fromkeys(FORMATS, np.float32),
}
"""The type that holds every value; of uint64 the same bits."""

MOVES = {
    "Compress": 1,
    "Concat": None,
    "Expand": 1,
    "Flatten": 1,
    "Gather": 1,
    "GatherElements": 1,
    "GatherND": 1,
    "Identity": 1,
    "Reshape": 1,
    "ReverseSequence": 1,
    "Slice": 1,
    "Split": 1,
    "Squeeze": 1,
    "Tile": 1,
    "Transpose": 1,
    "Trilu": 1,
    "Unsqueeze": 1,
}
"""Operators that move values and compute none, and how many of their inputs are data (None: all)."""

_SUB_BYTE = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2}


def bits(dtype: npt.DTypeLike) -> int:
    kind = np.dtype(dtype)
    return _SUB_BYTE.get(kind.name, kind.itemsize * 8)


def is_integer(dtype: npt.DTypeLike) -> bool:
    """Whether it is a type of integers; NumPy's ``kind`` does not say it of those of 4 bits and fewer."""
    return type_name(np.dtype(dtype)).removeprefix("u").startswith("int")


def is_unsigned(dtype: npt.DTypeLike) -> bool:
    return type_name(np.dtype(dtype)).startswith("uint")


def limits(dtype: npt.DTypeLike) -> tuple[int, int]:
    """The least and the greatest integer of the type."""
    count = bits(dtype)
    return (0, (1 << count) - 1) if is_unsigned(dtype) else (-(1 << (count - 1)), (1 << (count - 1)) - 1)


def carrier(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The type that values of ``dtype`` are computed in."""
    name = type_name(np.dtype(dtype))
    return np.dtype(CARRIERS.get(name, np.int32 if name == "int8" else name))


def carried(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """``x`` in the type that carries its own; constants are converted here and now."""
    wide = carrier(g.dtype(x))
    if isinstance(x, gs.Constant):
        return x if g.dtype(x) == wide else g.constant(np.asarray(x.values).astype(wide))
    return g.cast(x, wide)


def missing(g: Builder, x: gs.Tensor) -> bool:
    """Whether the target has no tensors of the type of ``x``.

    A TensorRT that chooses types by itself takes int8 for quantised numbers, and wants to know their range.
    """
    if x.dtype is None:
        return False
    name = type_name(x.dtype)
    if name == "int8" and g.target is not None and not g.target.strongly_typed:
        return not _is_quantised(x)
    return name in CARRIERS


def _is_quantised(x: gs.Tensor, depth: int = 8) -> bool:
    """Whether ``x`` comes from QuantizeLinear or goes to DequantizeLinear, moved around or not."""
    if _is_dequantised(x, depth):
        return True
    if not x.inputs or depth == 0:
        return False
    node = x.inputs[0]
    return node.op == "QuantizeLinear" or (node.op in MOVES and _is_quantised(node.inputs[0], depth - 1))


def _is_dequantised(x: gs.Tensor, depth: int) -> bool:
    if any(node.op == "DequantizeLinear" for node in x.outputs):
        return True
    moved = [node for node in x.outputs if depth and node.op in MOVES and node.inputs[0] is x]
    return any(_is_dequantised(y, depth - 1) for node in moved for y in node.outputs)


@rule(*MOVES)
def move_wider_integers(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT moves no tensors of this type; it moves a wider one."""
    data = node.inputs[: MOVES[node.op]]
    if not all(missing(g, x) for x in data) or any(_is_quantised(y) for y in node.outputs):
        return None
    narrow = g.dtype(data[0])
    others = node.inputs[len(data) :]
    outputs = len(node.outputs)
    made = g.node(node.op, [*(carried(g, x) for x in data), *others], node.attrs, outputs)
    return [g.cast(y, narrow) for y in (made if outputs > 1 else [made])]


@rule("Cast")
def cast_past_missing_type(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT cannot cast to this type on the way to another; what the detour changes is arithmetic."""
    middle = node.inputs[0]
    if isinstance(middle, gs.Constant) and missing(g, middle):  # whose Cast makes an output of the model
        return g.op.Identity(g.constant(np.asarray(middle.values).astype(numpy_dtype(node.attrs["to"]))))
    before = middle.inputs[0] if middle.inputs else None
    if before is None or before.op != "Cast" or before.domain or middle.dtype is None:
        return None
    x, narrow, wanted = before.inputs[0], np.dtype(middle.dtype), numpy_dtype(node.attrs["to"])
    if x.dtype is None or wanted == narrow:
        return None
    if not missing(g, middle):
        return g.op.Cast(x, to=onnx_dtype(wanted)) if narrow == np.int8 and fits(x, narrow) else None
    given = np.dtype(x.dtype)
    if narrow.name in FORMATS:
        return _cast(g, rounded(g, g.cast(x, np.float32), narrow, before.attrs), wanted)
    if narrow == np.uint64:
        x = carried(g, x) if is_integer(given) or given == np.bool_ else g.cast(x, np.int64)
        signed = is_integer(g.dtype(x)) and not (is_unsigned(given) and given != np.uint64)
        if signed and not (is_integer(wanted) or wanted == np.bool_):
            return _cast(g, _float_of_uint64(g, x), wanted)
        return g.op.Cast(x, to=onnx_dtype(wanted))
    if not fits(x, narrow):
        wide = np.dtype(np.int64) if carrier(given) == np.int64 or bits(narrow) == 32 else np.dtype(np.int32)
        x = wrapped(g, g.cast(x, wide), narrow)
    return g.op.Cast(x, to=onnx_dtype(wanted))


def _cast(g: Builder, x: gs.Tensor, wanted: npt.DTypeLike) -> gs.Tensor:
    """As ``g.cast``, of a tensor that was made here; one of the same type is what the Cast was for."""
    return x if g.dtype(x) == np.dtype(wanted) else g.cast(x, wanted)


def _float_of_uint64(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """The numbers of which int64 ``x`` has the bits, in float32."""
    signed = g.cast(g.cast(x, np.int64), np.float32)
    unsigned = g.op.Add(signed, g.constant(2.0**64, np.float32))
    result: gs.Tensor = g.op.Where(g.op.Less(x, g.constant(0, g.dtype(x))), unsigned, signed)
    return result


def wrapped(g: Builder, x: gs.Tensor, narrow: np.dtype[Any]) -> gs.Tensor:
    """What is left of int32 or int64 values when they are stored as ``narrow``, which has fewer bits."""
    wide, count = g.dtype(x), 1 << bits(narrow)
    if is_unsigned(narrow):
        return g.op.Mod(x, g.constant(count, wide))
    half = g.constant(count // 2, wide)
    return g.op.Sub(g.op.Mod(g.op.Add(x, half), g.constant(count, wide)), half)


def fits(x: gs.Tensor, narrow: np.dtype[Any], depth: int = 8) -> bool:
    """Whether the values of ``x``, by how it is made, are integers that ``narrow`` can hold."""
    least, most = limits(narrow)
    if isinstance(x, gs.Constant):
        values = np.asarray(x.values)
        return bool(values.dtype.kind in "iub" and ((values >= least) & (values <= most)).all())
    if x.dtype is not None and _within(np.dtype(x.dtype), least, most):
        return True
    if not x.inputs or depth == 0 or x.inputs[0].domain:
        return False
    node = x.inputs[0]
    if node.op in MOVES:
        return all(fits(item, narrow, depth - 1) for item in node.inputs[: MOVES[node.op]])
    if node.op == "Cast" and is_integer(x.dtype) and node.inputs[0].dtype is not None:
        given = np.dtype(node.inputs[0].dtype)
        return _within(given, least, most) or (is_integer(given) and fits(node.inputs[0], narrow, depth - 1))
    if node.op == "Sub" and isinstance(node.inputs[1], gs.Constant):  # the end of ``wrapped``
        half = np.asarray(node.inputs[1].values)
        inner = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        return half.size == 1 and half.item() == -least and inner is not None and _modulus(inner, most - least)
    return _modulus(node, most)


def _within(given: np.dtype[Any], least: int, most: int) -> bool:
    if given == np.bool_:
        return True
    return is_integer(given) and limits(given)[0] >= least and limits(given)[1] <= most


def _modulus(node: gs.Node, most: int) -> bool:
    """Whether the node is a remainder from 0 to at most ``most``."""
    if node.op != "Mod" or node.attrs.get("fmod", 0) or not isinstance(node.inputs[1], gs.Constant):
        return False
    divisor = np.asarray(node.inputs[1].values)
    return bool(divisor.dtype.kind == "i" and (divisor > 0).all() and (divisor - 1 <= most).all())


@move_wider_integers.example
def channels_of_a_uint8_image_first() -> gs.Graph:
    return example({"x": ("uint8", ["n", 4, 5, 3])}, lambda g, x: g.op.Cast(g.op.Transpose(x, perm=[0, 3, 1, 2]), to=1))


@move_wider_integers.example
def parts_of_uint8_joined() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        low, high = g.op.Split(x, outputs=2, axis=1, num_outputs=2)
        result: gs.Tensor = g.op.Reshape(g.op.Concat(high, low, axis=0), [-1])
        return result

    return example({"x": ("uint8", [3, 4])}, build)


@cast_past_missing_type.example
def float_stored_as_uint8() -> gs.Graph:
    return example(
        {"x": ("float32", [3, 4])},
        lambda g, x: g.op.Cast(g.op.Cast(g.op.Mul(g.op.Abs(x), g.constant(100, np.float32)), to=2), to=1),
    )


@cast_past_missing_type.example
def float_cut_off_by_uint64() -> gs.Graph:
    return example(
        {"x": ("float32", [3, 4])},
        lambda g, x: g.op.Cast(g.op.Cast(g.op.Mul(g.op.Abs(x), g.constant(100, np.float32)), to=13), to=1),
    )


@cast_past_missing_type.example
def a_constant_of_int16_as_an_output() -> gs.Graph:
    return example({"x": ("float32", ["n"])}, lambda g, x: [g.op.Cast(g.constant([1, 2], np.int16), to=1), g.op.Neg(x)])


@cast_past_missing_type.example
def int64_kept_in_uint16_and_int16() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        far = g.op.Sub(g.op.Mul(x, g.constant(3 << 14)), g.constant(40000))
        return [g.op.Cast(g.op.Cast(far, to=onnx_dtype(kind)), to=7) for kind in (np.uint16, np.int16, np.uint64)]

    return example({"x": ("int64", ["n", 4])}, build)
