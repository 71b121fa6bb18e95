"""Models for the rules of passes/rules/sorting.py."""

from __future__ import annotations

import numpy as np

from . import Case, Sketch, strategy


@strategy("long_topk_in_rounds")
def selections(s: Sketch) -> Case:
    kind = s.pick("float32", "int32", "int64")
    n = s.pick(3841, 4000, 8000)
    sizes = s.pick([n], [2, n], [n, 2])
    axis = sizes.index(n)
    values = s.random.integers(-500, 500, sizes).astype(kind) if s.flag() else s.random.permutation(sizes[axis])
    s.input(
        "x",
        kind,
        np.broadcast_to(
            values
            if values.shape == tuple(sizes)
            else values.reshape([-1 if i == axis else 1 for i in range(len(sizes))]),
            sizes,
        )
        .astype(kind)
        .copy(),
    )
    k, largest = s.pick(3841, n), s.integer(0, 1)
    return s.model(lambda g, t: g.op.TopK(t["x"], [k], outputs=2, axis=axis, largest=largest), opset=s.pick(11, 20))


@strategy("compress_by_constant", "compress_by_nonzero")
def compressed(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    axis = s.axis(len(sizes)) if s.flag() else None
    count = sizes[axis] if axis is not None else int(np.prod(sizes))
    s.input("x", s.pick("float32", "int64", "bool"), sizes)
    s.operand("m", s.random.random(s.integer(1, count)) > 0.5)
    return s.model(lambda g, t: g.op.Compress(t["x"], t["m"], axis=axis), opset=s.pick(11, 20))


@strategy("unique_by_comparison")
def uniques(s: Sketch) -> Case:
    sizes = s.sizes(1, 3)
    axis = s.axis(len(sizes)) if s.flag() else None
    kind = s.pick("float32", "int64")
    s.input("x", kind, s.random.integers(0, 3, sizes).astype(kind), static=True)
    order = s.integer(0, 1)
    return s.model(lambda g, t: g.op.Unique(t["x"], outputs=4, axis=axis, sorted=order), opset=s.pick(11, 20))
