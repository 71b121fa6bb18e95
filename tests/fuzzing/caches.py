"""Models for the rules of passes/rules/caches.py."""

from __future__ import annotations

from . import Case, Sketch, strategy


@strategy("tensor_scatter_as_scatter")
def caches(s: Sketch) -> Case:
    sizes = s.sizes(2, 4)
    axis = s.integer(1, len(sizes) - 1)
    sizes[axis] += 2
    length = s.integer(1, sizes[axis])
    mode = s.pick("linear", "circular")
    s.input("x", "float32", sizes)
    s.input("u", "float32", [length if index == axis else item for index, item in enumerate(sizes)])
    last = sizes[axis] - (length if mode == "linear" else 1)
    s.operand("i", s.random.integers(0, last, [sizes[0]], endpoint=True))
    given = s.flag()
    return s.model(
        lambda g, t: g.op.TensorScatter(t["x"], t["u"], t["i"] if given else None, axis=axis, mode=mode), opset=24
    )
