"""Models for the rules of passes/rules/small_integers.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.model import onnx_dtype

from . import Case, Sketch, Tensors, strategy
from .bitwise import broadcast

BINARY = ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Less", "GreaterOrEqual", "Equal")
COMPARING = ("Less", "GreaterOrEqual", "Equal")


@strategy("compute_in_wider_integers")
def arithmetic(s: Sketch) -> Case:
    kind = np.dtype(s.pick("uint8", "uint8", "int8", "int16", "uint16", "uint32", "uint64"))
    after = s.pick(None, None, "int64", "float32") if kind != np.uint64 else None
    if s.rarely():
        return _reduced(s)
    op = s.pick(*BINARY, "Abs", "Sign", "Clip", "Where", "Pad")
    if kind == np.uint64 and op in ("Div", "Mod"):
        op = "Add"
    a, b = broadcast(s)
    s.input("x", kind, s.integers(kind, a))
    y = s.integers(kind, b)
    s.operand("y", np.where(y == 0, 1, y).astype(kind) if op in ("Div", "Mod") else y)
    low, high = sorted(int(v) for v in s.integers(kind, [2]))
    fmod = s.integer(0, 1)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        x = t["x"]
        if op in ("Abs", "Sign"):
            y = g.node(op, [x], {})
        elif op == "Clip":
            y = g.op.Clip(x, g.constant(low, kind), g.constant(high, kind))
        elif op == "Where":
            y = g.op.Where(g.op.Less(x, t["y"]), x, t["y"])
        elif op == "Pad":
            y = g.op.Pad(g.op.Reshape(x, [-1]), [1, 2], g.constant(low, kind))
        else:
            y = g.node(op, [x, t["y"]], {"fmod": fmod} if op == "Mod" else {})
        return y if after is None or op in COMPARING else g.op.Cast(y, to=onnx_dtype(after))

    return s.model(build, opset=s.pick(14, 18, 20))


def _reduced(s: Sketch) -> Case:
    kind = np.dtype(s.pick("uint8", "int8", "uint32", "uint64"))
    sizes = s.sizes(1, 4)
    axis = s.axis(len(sizes))
    s.input("x", kind, s.integers("uint32" if kind == np.uint64 else kind, sizes).astype(kind))  # ONNX Runtime: doubles
    ops = ("ReduceSum",) if kind in (np.uint32, np.uint64) else ("ReduceMax", "ReduceMin", "ArgMax", "ArgMin")
    op = s.pick(*ops)
    keep = s.integer(0, 1)
    if op.startswith("Arg"):
        return s.model(lambda g, t: g.node(op, [t["x"]], {"axis": axis, "keepdims": keep}), opset=18)
    return s.model(lambda g, t: g.reduce(op, t["x"], [axis], bool(keep)), opset=18)
