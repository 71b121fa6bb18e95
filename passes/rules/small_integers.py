"""Arithmetic on integers that TensorRT does not compute with: in int32 or int64, wrapped back as NumPy and torch do.

``image + 1`` of uint8, ``x.to(torch.int16) * y``, ``labels.max()`` of int8. Which operators there are, and what each
asks of the type that carries its own, is a table.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.model import onnx_dtype, type_name
from passes.rules.integers import carried, is_integer, is_unsigned, missing, wrapped


class Asks(Enum):
    """What an operator asks of the type that carries its own."""

    BITS = "a value for every value"
    RING = "sums and products up to a multiple of 2^n"
    ORDER = "the order of the values"
    VALUES = "the values themselves"


OPERATORS = {
    **dict.fromkeys(("Equal", "NonZero", "Pad", "ScatterElements", "ScatterND", "Where"), Asks.BITS),
    **dict.fromkeys(("Add", "Mul", "Neg", "Sub", "CumSum", "CumProd", "MatMul", "Gemm"), Asks.RING),
    **dict.fromkeys(("ReduceSum", "ReduceProd", "ReduceSumSquare", "ReduceL1"), Asks.RING),
    **dict.fromkeys(("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Max", "Min", "Clip"), Asks.ORDER),
    **dict.fromkeys(("ReduceMax", "ReduceMin", "ArgMax", "ArgMin", "TopK"), Asks.ORDER),
    **dict.fromkeys(
        ("Abs", "Div", "Mod", "Pow", "Sign", "Relu", "ReduceMean", "ReduceL2", "ReduceLogSum"), Asks.VALUES
    ),
    **dict.fromkeys(("ReduceLogSumExp", "PRelu", "OneHot", "Range", "Resize"), Asks.VALUES),
}

OF_INT8 = frozenset(
    op for op, asks in OPERATORS.items() if asks in (Asks.RING, Asks.VALUES) and op not in ("OneHot", "Relu", "Sign")
) | {"Clip"}
"""Operators that are computed in int32 for int8 too: TensorRT's int8 is made for quantised values, which saturate."""


@rule(*OPERATORS)
def compute_in_wider_integers(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT does not compute with this integer type; the result in a wider one, wrapped, is the same."""
    given = [x for x in node.inputs if not x.is_empty() and x.dtype is not None]
    kinds = {type_name(x.dtype) for x in given if missing(g, x) or (x.dtype == np.int8 and node.op in OF_INT8)}
    if not kinds:
        return None
    asks = OPERATORS[node.op]
    if node.op in ("ScatterElements", "ScatterND") and node.attrs.get("reduction", "none") != "none":
        asks = Asks.RING if node.attrs["reduction"] in ("add", "mul") else Asks.ORDER
    if "uint64" in kinds and asks is Asks.VALUES and node.op != "OneHot":
        g.decline("uint64: values from 2^63 on have no type here")
    moved = "uint64" in kinds and asks is Asks.ORDER
    inputs: list[gs.Tensor | None] = []
    for x in node.inputs:
        if x.is_empty():
            inputs.append(None)
        elif type_name(x.dtype) in kinds:
            wide = carried(g, x) if node.op != "OneHot" else g.cast(x, np.int64)  # ONNX Runtime's has no int32
            inputs.append(_order_of_uint64(g, wide) if moved else wide)
        else:
            inputs.append(x)
    if node.op in ("Max", "Min", "Clip") and inputs[0] is not None and g.dtype(inputs[0]) == np.int64:
        results = [_extreme(g, node.op, inputs)]
    else:
        made = g.node(node.op, inputs, node.attrs, len(node.outputs))
        results = made if len(node.outputs) > 1 else [made]
    return [_back(g, new, old, asks, moved) for old, new in zip(node.outputs, results, strict=True)]


def _order_of_uint64(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """The bits of uint64, moved so that they are in order as int64; the way back is the same."""
    moved: gs.Tensor = g.op.Add(x, g.constant(np.iinfo(np.int64).min, np.int64))
    return moved


def _extreme(g: Builder, op: str, inputs: list[gs.Tensor | None]) -> gs.Tensor:
    """Max, Min or Clip of int64: by comparison, as ONNX Runtime's own are wrong where two are 2^31 or more apart."""
    x, *others = inputs
    for place, other in enumerate(others):
        if other is not None:
            compare = "Greater" if op == "Max" or (op == "Clip" and place == 0) else "Less"
            x = g.op.Where(g.node(compare, [x, other], {}), x, other)
    assert x is not None
    return x if len(others) else g.op.Identity(x)


def _back(g: Builder, new: gs.Tensor, old: gs.Tensor, asks: Asks, moved: bool) -> gs.Tensor:
    """A result in the type that it had."""
    if old.dtype is None or np.dtype(old.dtype) == g.dtype(new):
        return new
    narrow = np.dtype(old.dtype)
    if moved:
        new = _order_of_uint64(g, new)
    exact = asks in (Asks.BITS, Asks.ORDER) or (asks is Asks.VALUES and is_unsigned(narrow))
    if is_integer(narrow) and narrow != np.uint64 and not exact:
        new = wrapped(g, new, narrow)
    result: gs.Tensor = g.op.Cast(new, to=onnx_dtype(narrow))
    return result


@compute_in_wider_integers.example
def uint8_wraps_around() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        far = g.op.Add(x, g.constant(254, np.uint8))
        return [g.op.Add(far, y), g.op.Sub(y, far), g.op.Mul(far, far), g.op.Max(far, y), g.op.Less(far, y)]

    return example({"x": ("uint8", ["n", 4]), "y": ("uint8", [4])}, build)


@compute_in_wider_integers.example
def int8_wraps_around() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        low = g.op.Sub(x, g.constant(-128, np.int8))
        seven, minus_one = g.constant(7, np.int8), g.constant(-1, np.int8)
        return [g.op.Abs(low), g.op.Neg(low), g.op.Mod(low, seven), g.op.Div(low, minus_one)]

    return example({"x": ("int8", ["n", 4])}, build)


@compute_in_wider_integers.example
def uint8_chosen_padded_and_counted() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        chosen = g.op.Where(g.op.Greater(x, g.constant(1, np.uint8)), x, g.constant(9, np.uint8))
        padded = g.op.Pad(chosen, [0, 1, 0, 1], g.constant(3, np.uint8))
        return [padded, g.reduce("ReduceMax", padded, [1]), g.op.ArgMax(padded, axis=1)]

    return example({"x": ("uint8", ["n", 4])}, build)
