"""Models for the rules of passes/rules/integers.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
from hypothesis import strategies as st

from passes.framework import Builder
from passes.model import onnx_dtype

from . import Case, Sketch, Tensors, strategy

NARROW = ("uint8", "uint8", "int16", "uint16", "uint32", "uint64")
Moved = Callable[[Builder, gs.Tensor], "gs.Tensor | list[gs.Tensor]"]


def _move(s: Sketch, sizes: list[int]) -> Moved:
    """An operator that moves the elements of a tensor of these sizes."""
    rank = len(sizes)
    axis = s.axis(rank)
    length = sizes[axis]
    places = np.asarray(s.random.integers(-length, length, s.sizes(0, 2))) if length else np.zeros([0], np.int64)
    order = s.draw(st.permutations(range(rank)))
    steps = s.pick(1, 2, -1)
    start, end = s.integer(-5, 5), s.integer(-5, 5)
    within = np.asarray(s.random.integers(-length, length, sizes)) if length else np.zeros(sizes, np.int64)
    rows = np.stack([s.random.integers(-n, n, [3]) if n else np.zeros(3) for n in sizes[:1]], -1).astype(np.int64)
    ways: dict[str, Moved] = {
        "Concat": lambda g, x: g.op.Concat(x, x, g.op.Transpose(g.op.Transpose(x)), axis=axis),
        "Expand": lambda g, x: g.op.Expand(x, [2, *[1] * rank]),
        "Flatten": lambda g, x: g.op.Flatten(x, axis=axis),
        "Gather": lambda g, x: g.op.Gather(x, g.constant(places), axis=axis),
        "GatherElements": lambda g, x: g.op.GatherElements(x, g.constant(within), axis=axis),
        "GatherND": lambda g, x: g.op.GatherND(x, g.constant(rows)),
        "Reshape": lambda g, x: g.op.Reshape(x, [1, *sizes[:-1], -1] if all(sizes) else sizes),
        "Slice": lambda g, x: g.slice(x, [start], [end], [axis], [steps]),
        "Split": lambda g, x: list(g.op.Split(x, outputs=2, axis=axis, num_outputs=2)) if length > 1 else x,
        "Squeeze": lambda g, x: g.squeeze(g.unsqueeze(x, [axis]), [axis]),
        "Tile": lambda g, x: g.op.Tile(x, [2] * rank),
        "Transpose": lambda g, x: g.op.Transpose(x, perm=list(order)),
    }
    return ways[s.pick(*ways)]


@strategy("move_wider_integers")
def moves(s: Sketch) -> Case:
    dtype = s.pick(*NARROW)
    sizes = s.sizes(1, 4, empty=True)
    steps = [_move(s, sizes)]
    s.input("x", dtype, s.integers(dtype, sizes))
    after = s.pick(None, "float32", "int64")

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        made = steps[0](g, t["x"])
        results = made if isinstance(made, list) else [made]
        return results if after is None else [g.op.Cast(y, to=onnx_dtype(after)) for y in results]

    return s.model(build, opset=s.pick(18, 20))


@strategy("cast_past_missing_type")
def detours(s: Sketch) -> Case:
    given = s.pick("int64", "int64", "int32", "float32", "float16", "bool", "uint8", "int8")
    middle = np.dtype(s.pick(*NARROW))
    wanted = s.pick("float32", "int64", "int32", "bool", "float16", "uint8", "int8")
    sizes = s.sizes(0, 4, empty=True)
    values = s.integers(given, sizes) if np.dtype(given).kind in "iu" else s.values(given, sizes)
    if np.dtype(given).kind == "f":  # what the type cannot hold is anything
        limits = np.iinfo(middle)
        span = min(limits.max, 1000)
        values = np.asarray(s.random.uniform(max(-span, limits.min), span, sizes)).astype(given)
    if middle == np.uint64 and np.dtype(given).kind in "i" and np.dtype(wanted).kind == "f":
        values = np.maximum(values, 0)
    s.input("x", given, values)
    return s.model(lambda g, t: g.op.Cast(g.op.Cast(t["x"], to=onnx_dtype(middle)), to=onnx_dtype(wanted)))
