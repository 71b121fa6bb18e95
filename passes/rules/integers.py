"""Integer types that TensorRT's tensors do not have, carried in wider ones that they do.

uint16, uint32, uint64 and int16 exist nowhere in TensorRT, uint8 only as a network's input or output. Yet
``x.permute(0, 3, 1, 2).float()`` of a uint8 image moves uint8, and ``x >> 2`` of an int64 is exported through uint64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.model import numpy_dtype, onnx_dtype

CARRIERS = {"uint8": np.int32, "int16": np.int32, "uint16": np.int32, "uint32": np.int64, "uint64": np.int64}
"""The type that holds every value; of uint64 the same bits."""

MOVES = {
    "Concat": None,
    "Expand": 1,
    "Flatten": 1,
    "Gather": 1,
    "GatherElements": 1,
    "GatherND": 1,
    "Identity": 1,
    "Reshape": 1,
    "Slice": 1,
    "Split": 1,
    "Squeeze": 1,
    "Tile": 1,
    "Transpose": 1,
    "Unsqueeze": 1,
}
"""Operators that move values and compute none, and how many of their inputs are data (None: all)."""


def bits(dtype: npt.DTypeLike) -> int:
    return np.dtype(dtype).itemsize * 8


def carrier(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The type that values of ``dtype`` are computed in."""
    name = np.dtype(dtype).name
    return np.dtype(CARRIERS.get(name, np.int32 if name == "int8" else name))


def carried(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """``x`` in the type that carries its own; constants are converted here and now."""
    wide = carrier(g.dtype(x))
    if isinstance(x, gs.Constant):
        return x if g.dtype(x) == wide else g.constant(np.asarray(x.values).astype(wide))
    return g.cast(x, wide)


@rule(*MOVES)
def move_wider_integers(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT moves no tensors of this integer type; it moves a wider one."""
    data = node.inputs[: MOVES[node.op]]
    if any(x.dtype is None or np.dtype(x.dtype).name not in CARRIERS for x in data):
        return None
    narrow = g.dtype(data[0])
    others = node.inputs[len(data) :]
    outputs = len(node.outputs)
    made = g.node(node.op, [*(carried(g, x) for x in data), *others], node.attrs, outputs)
    return [g.cast(y, narrow) for y in (made if outputs > 1 else [made])]


@rule("Cast")
def cast_past_missing_type(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT cannot cast to this integer type on the way to another; what the detour changes is arithmetic."""
    middle = node.inputs[0]
    before = middle.inputs[0] if middle.inputs else None
    if before is None or before.op != "Cast" or before.domain or middle.dtype is None:
        return None
    x = before.inputs[0]
    narrow = np.dtype(middle.dtype)
    if narrow.name not in CARRIERS or x.dtype is None:
        return None
    wanted, given = numpy_dtype(node.attrs["to"]), np.dtype(x.dtype)
    if wanted == narrow:
        return None
    if given.kind == "b" or (given.kind == "u" and narrow.kind == "u" and bits(given) <= bits(narrow)):
        return g.op.Cast(x, to=onnx_dtype(wanted))
    if narrow == np.uint64:
        if given.kind != "i" or wanted.kind not in "iub":
            g.decline(f"{given} through uint64 to {wanted}: values from 2^63 on have no type here")
        return g.op.Cast(x, to=onnx_dtype(wanted))
    if given.kind not in "if" and given.name not in ("bfloat16",):
        return None
    if not fits(x, narrow):
        wide = np.dtype(np.int64) if given == np.int64 or bits(narrow) == 32 else np.dtype(np.int32)
        x = wrapped(g, g.cast(x, wide), narrow)
    return g.op.Cast(x, to=onnx_dtype(wanted))


def wrapped(g: Builder, x: gs.Tensor, narrow: np.dtype[Any]) -> gs.Tensor:
    """What is left of int32 or int64 values when they are stored as ``narrow``, which has fewer bits."""
    wide, count = g.dtype(x), 1 << bits(narrow)
    if narrow.kind == "u":
        return g.op.Mod(x, g.constant(count, wide))
    half = g.constant(count // 2, wide)
    return g.op.Sub(g.op.Mod(g.op.Add(x, half), g.constant(count, wide)), half)


def fits(x: gs.Tensor, narrow: np.dtype[Any], depth: int = 8) -> bool:
    """Whether the values of ``x``, by how it is made, are integers that ``narrow`` can hold."""
    limits = np.iinfo(narrow)
    if isinstance(x, gs.Constant):
        values = np.asarray(x.values)
        return bool(values.dtype.kind in "iub" and ((values >= limits.min) & (values <= limits.max)).all())
    if not x.inputs or depth == 0 or x.inputs[0].domain:
        return False
    node = x.inputs[0]
    if node.op in MOVES:
        return all(fits(item, narrow, depth - 1) for item in node.inputs[: MOVES[node.op]])
    if node.op == "Cast" and np.dtype(x.dtype).kind in "iu" and node.inputs[0].dtype is not None:
        given = np.dtype(node.inputs[0].dtype)
        if given.kind == "b":
            return True
        return given.kind in "iu" and np.iinfo(given).min >= limits.min and np.iinfo(given).max <= limits.max
    if node.op == "Mod" and not node.attrs.get("fmod", 0) and isinstance(node.inputs[1], gs.Constant):
        divisor = np.asarray(node.inputs[1].values)
        return bool(divisor.dtype.kind == "i" and (divisor > 0).all() and (divisor - 1 <= limits.max).all())
    return False


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
def int64_kept_in_uint16_and_int16() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        far = g.op.Sub(g.op.Mul(x, g.constant(3 << 14)), g.constant(40000))
        return [g.op.Cast(g.op.Cast(far, to=onnx_dtype(kind)), to=7) for kind in (np.uint16, np.int16, np.uint64)]

    return example({"x": ("int64", ["n", 4])}, build)
