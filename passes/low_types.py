"""What ONNX's operators take in float16 or bfloat16, from their schemas, and constants rounded to such a type.

A type variable of a schema is bound once for all inputs and outputs that bear it: all of them go low, or none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from .ir import CONTROL_FLOW, Array, Constant, StoredValues, bodies, onnx_dtype

FLOAT32 = np.dtype(np.float32)
FLOAT_TAG = "tensor(float)"
PIECE = 4 << 20
"""Elements of a weight that are in memory at a time while it is rounded."""


@dataclass(frozen=True)
class LowType:
    """A floating-point type of 16 bits."""

    name: str
    """``float16`` or ``bfloat16``."""
    dtype: np.dtype[Any]
    largest: float
    """The largest finite value."""
    smallest: float
    """The smallest positive value that has all its digits."""

    @property
    def number(self) -> int:
        """ONNX's element type."""
        return onnx_dtype(self.dtype)

    @property
    def mask(self) -> float:
        """The magnitude of what stands for infinity: a sum of two such, or of one and anything usual, is finite."""
        return self.largest / 2

    @property
    def tag(self) -> str:
        """Its name in schemas."""
        return f"tensor({self.name})"


@functools.cache
def low_type(name: str) -> LowType:
    """The type called ``name``. Raises ValueError where that is neither float16 nor bfloat16."""
    if name not in ("float16", "bfloat16"):
        raise ValueError(f"low type {name!r}: not one of 'float16', 'bfloat16'")
    dtype = np.dtype(np.float16 if name == "float16" else ml_dtypes.bfloat16)
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return LowType(name, dtype, float(limits.max), float(limits.smallest_normal))


# --- schemas -----------------------------------------------------------------------------------------------------

KEPT = {
    "BatchNormalization": ("T1", "T2", "U"),  # its statistics, of which a variance is easily too small for float16
    "DequantizeLinear": ("T2",),  # from opset 23 on the scale alone
    "LayerNormalization": ("U",),
    "OneHot": ("T2",),
    "Pow": ("T1",),
    "QuantizeLinear": ("T2",),
    "Resize": ("T2",),
    "RoiAlign": ("T2",),
}
"""Type variables that keep the type they have: nothing is gained by rounding what they stand for."""

COUPLED = {"GridSample": ("T2",), "RMSNormalization": ("T",)}
"""Type variables of inputs alone that go low with the outputs all the same: shape inference, or TensorRT, takes them
for one."""

TYPE_ATTRIBUTES = {
    "Bernoulli": "dtype",
    "BlackmanWindow": "output_datatype",
    "Cast": "to",
    "EyeLike": "dtype",
    "HammingWindow": "output_datatype",
    "HannWindow": "output_datatype",
    "MelWeightMatrix": "output_datatype",
    "Multinomial": "dtype",
    "RandomNormal": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniform": "dtype",
    "RandomUniformLike": "dtype",
}
"""By operator the attribute that gives its output an element type."""


@dataclass(frozen=True)
class Signature:
    """The type variables of a node's inputs and outputs; empty for a fixed type, and one of its own in a free list."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: dict[str, frozenset[str]]


def signature(node: gs.Node, opset: int) -> Signature | None:
    """None for what has no schema in this opset."""
    if node.domain:
        return None
    return _signature(node.op, opset, len(node.inputs), len(node.outputs))


@functools.cache
def _signature(op: str, opset: int, inputs: int, outputs: int) -> Signature | None:
    if not onnx.defs.has(op, opset, ""):
        return None
    schema: Any = onnx.defs.get_schema(op, opset, "")
    allowed = {item.type_param_str: frozenset(item.allowed_type_strs) for item in schema.type_constraints}
    return Signature(_variables(schema.inputs, inputs, allowed), _variables(schema.outputs, outputs, allowed), allowed)


def _variables(formal: Any, count: int, allowed: dict[str, frozenset[str]]) -> tuple[str, ...]:
    found = []
    for index in range(count):
        parameter: Any = formal[min(index, len(formal) - 1)] if formal else None
        known = parameter is not None and parameter.type_str in allowed and parameter.is_homogeneous
        found.append(parameter.type_str if known else "")
    return tuple(found)


@dataclass(frozen=True)
class Ports:
    """Which float32 inputs and outputs of a node become low where it is computed in a low type."""

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    either: dict[int, str] = field(default_factory=dict)
    """Inputs that may be of either type, by their type variable: nothing that the node makes has it."""

    @property
    def kept(self) -> Ports:
        """Of the same node where it is computed in float32."""
        return Ports(either=self.either)


def is_float32(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype) == FLOAT32


def is_half(tensor: gs.Tensor) -> bool:
    """Whether it is float16 or bfloat16."""
    return tensor.dtype is not None and np.dtype(tensor.dtype).name in ("float16", "bfloat16")


def ports(node: gs.Node, opset: int, low: LowType) -> Ports:
    """What of ``node``, whose tensors have their types of a float32 model, can be of the low type."""
    known = signature(node, opset)
    if known is None or node.op in CONTROL_FLOW or any(bodies(node)) or _upcasts(node):
        return Ports()
    if node.op == "Constant":
        return Ports()
    bound: dict[str, list[gs.Tensor]] = {}
    made = {name for name in known.outputs if name}
    for name, tensor in (
        *zip(known.inputs, node.inputs, strict=True),
        *zip(known.outputs, node.outputs, strict=True),
    ):
        if name and not tensor.is_empty():
            bound.setdefault(name, []).append(tensor)
    free = {
        name
        for name, tensors in bound.items()
        if {FLOAT_TAG, low.tag} <= known.allowed[name] and all(map(is_float32, tensors))
    }
    kept = KEPT.get(node.op, ())
    lowered = {name for name in free & made if name not in kept}
    lowered |= {name for name in COUPLED.get(node.op, ()) if lowered and name in free}
    return Ports(
        frozenset(index for index, name in enumerate(known.inputs) if name in lowered and _there(node.inputs[index])),
        frozenset(index for index, name in enumerate(known.outputs) if name in lowered and _there(node.outputs[index])),
        {
            index: name
            for index, name in enumerate(known.inputs)
            if name in free - lowered - made and name not in COUPLED.get(node.op, ()) and _there(node.inputs[index])
        },
    )


def _there(tensor: gs.Tensor) -> bool:
    return not tensor.is_empty()


def _upcasts(node: gs.Node) -> bool:
    """Whether the node widens a value of a low type: somebody asked for it."""
    return node.op in ("Cast", "CastLike") and any(map(is_half, node.inputs[:1]))


# --- constants ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """What a constant of float32 holds that is finite; zeros where nothing is."""

    low: float = 0.0
    high: float = 0.0

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))


def extent(constant: gs.Constant) -> Extent:
    """Of the values, read piece by piece and remembered."""
    values = constant._values
    known: Extent | None = getattr(values, "extent", None) if isinstance(values, LazyValues) else None
    if known is not None:
        return known
    lows, highs = [], []
    for piece in pieces(values):
        low, high = (float(piece.min()), float(piece.max())) if piece.size else (0.0, 0.0)
        if not np.isfinite(low) or not np.isfinite(high):
            piece = piece[np.isfinite(piece)]
            low, high = (float(piece.min()), float(piece.max())) if piece.size else (0.0, 0.0)
        lows.append(low)
        highs.append(high)
    found = Extent(min(lows, default=0.0), max(highs, default=0.0))
    if isinstance(values, LazyValues):
        values.extent = found
    return found


def pieces(values: Any) -> Iterator[Array]:
    """The elements in a row, some at a time; of a file, only these are mapped."""
    if isinstance(values, StoredValues) and values.file is not None:
        count = values.nbytes // values.dtype.itemsize
        for start in range(0, count, PIECE):
            size, offset = min(PIECE, count - start), values.offset + start * values.dtype.itemsize
            yield np.memmap(values.file, values.dtype, "r", offset, (size,))
        return
    flat = np.asarray(values.load() if isinstance(values, LazyValues) else values).reshape(-1)
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE]


class RoundedValues(LazyValues):  # type: ignore[misc]
    """Values in a low type that are rounded when they are asked for, which is when the model is written.

    What is finite stays finite: beyond the type's range it becomes ``end``, or its negative.
    """

    def __init__(self, source: Array | LazyValues, low: LowType, end: float) -> None:
        self.source = source
        self.low = low
        self.end = end
        self.shape = tuple(source.shape)
        self.dtype = low.dtype
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * low.dtype.itemsize

    def load(self) -> Array:
        whole = np.empty(self.shape, self.dtype)
        flat, start = whole.reshape(-1), 0
        for piece in self.pieces():
            flat[start : start + piece.size] = piece
            start += piece.size
        return whole

    def pieces(self) -> Iterator[Array]:
        for piece in pieces(self.source):
            yield rounded(piece, self.low, self.end)


def rounded(values: Array, low: LowType, end: float | None = None) -> Array:
    """``values`` in the low type; finite ones beyond its range become ``end``, by default that of the range."""
    with np.errstate(over="ignore"):
        found = values.astype(low.dtype)
    beyond = np.isinf(found) & np.isfinite(values)
    if beyond.any():
        largest = float(np.abs(found[np.isfinite(found)], dtype=low.dtype).max(initial=0))
        last = low.largest if end is None or largest > end else end  # which is not to come before what is in the range
        found[beyond] = np.where(values[beyond] > 0, last, -last).astype(low.dtype)
    return found


def rounded_constant(constant: gs.Constant, low: LowType, name: str, end: float) -> Constant:
    """The constant in the low type, under another name."""
    values = constant._values
    if isinstance(values, StoredValues) and values.nbytes > PIECE:
        return Constant(name, RoundedValues(values, low, end))
    return Constant(name, rounded(np.array(constant.values), low, end))
