"""Reductions whose axes are an input (opset 18 on), for parsers that know them as an attribute.

Such a parser ignores the input and reduces over every axis.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lowering

UNMOVED = frozenset(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"))
"""Those that, over no axis, are the tensor itself; the others square it, or take its logarithm."""


@lowering(
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
    *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare"),
    since=18,
)
def reduction_axes_as_attribute(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 18, the axes of a reduction are an attribute."""
    x, axes = node.inputs[0], g.input(node, 1)
    keepdims = int(node.attrs.get("keepdims", 1))
    wanted = [] if axes is None else [int(axis) for axis in g.value(axes).reshape(-1)]
    if not wanted and node.attrs.get("noop_with_empty_axes", 0):
        if node.op in UNMOVED:
            return g.op.Identity(x)
        wanted = _none(node, g)
    return g.node(node.op, [x], {"axes": wanted or None, "keepdims": keepdims})


def _none(node: gs.Node, g: Builder) -> list[int]:
    return g.decline(f"{node.op} over no axis is not the same in every opset")


def _reductions(*ops: str, axes: list[int] | None, opset: int = 18, dtype: str = "float32", **attrs: int) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        given = None if axes is None else g.constant(np.array(axes, np.int64))
        return [g.node(op, [x, given], attrs) for op in ops]

    return example({"x": (dtype, ["n", 4, 5])}, build, opset)


@reduction_axes_as_attribute.example
def over_two_axes() -> gs.Graph:
    return _reductions("ReduceMean", "ReduceMax", "ReduceLogSumExp", axes=[1, -1], keepdims=0)


@reduction_axes_as_attribute.example
def over_one_axis_that_is_kept() -> gs.Graph:
    return _reductions("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd", "ReduceMin", axes=[-1])


@reduction_axes_as_attribute.example
def over_every_axis() -> gs.Graph:
    return _reductions("ReduceMean", "ReduceMin", axes=None, opset=20, noop_with_empty_axes=0)


@reduction_axes_as_attribute.example
def over_no_axis() -> gs.Graph:
    return _reductions("ReduceMean", "ReduceMax", axes=[], opset=20, noop_with_empty_axes=1)


@reduction_axes_as_attribute.example
def of_integers() -> gs.Graph:
    return _reductions("ReduceMax", "ReduceProd", axes=[1], dtype="int64", opset=20, keepdims=0)
