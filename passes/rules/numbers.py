"""Arithmetic that is done at once where the operands are known, and by nodes where they are not."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.model import Array

Number: TypeAlias = "float | Array | gs.Tensor"
"""Known values, in float64; or a tensor, of float32."""

_NUMPY: dict[str, Any] = {
    "Abs": np.abs,
    "Add": np.add,
    "And": np.logical_and,
    "Ceil": np.ceil,
    "Div": np.divide,
    "Equal": np.equal,
    "Floor": np.floor,
    "Greater": np.greater,
    "Less": np.less,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Sub": np.subtract,
    "Where": np.where,
}


def of(g: Builder, op: str, *operands: Number) -> Number:
    """The operator's result: values where all operands are, else a tensor."""
    if not any(isinstance(item, gs.Tensor) for item in operands):
        result = _NUMPY[op](*operands)
        return float(result) if np.ndim(result) == 0 and np.asarray(result).dtype.kind == "f" else np.asarray(result)
    made: gs.Tensor = g.node(op, [tensor(g, item) for item in operands], {})
    return made


def tensor(g: Builder, value: Number) -> gs.Tensor:
    """As an operand: values as a constant of float32, or of bool."""
    if isinstance(value, gs.Tensor):
        return value
    array = np.asarray(value)
    return g.constant(array if array.dtype == np.bool_ else array.astype(np.float32))


def sum_along(g: Builder, value: Number, axis: int) -> Number:
    """The sum along one axis, which is kept."""
    if isinstance(value, gs.Tensor):
        return g.reduce("ReduceSum", value, [axis], keepdims=True)
    return np.asarray(np.sum(value, axis=axis, keepdims=True))
