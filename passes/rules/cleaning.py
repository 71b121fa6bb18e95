"""Nodes that do nothing: each costs the parser a layer, and hides the patterns that other rules look for."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..framework import Builder, Replacement, example, rule
from ..model import onnx_dtype


@rule("Identity")
def drop_identity(node: gs.Node, g: Builder) -> Replacement:
    """An Identity is the tensor that it copies."""
    return node.inputs[0]


@drop_identity.example
def identity_in_the_middle() -> gs.Graph:
    return example({"x": ("float32", [2, 3])}, lambda g, x: g.op.Relu(g.op.Identity(g.op.Neg(x))))


@rule("Cast")
def drop_cast_to_same_type(node: gs.Node, g: Builder) -> Replacement:
    """A Cast to the type that the tensor has already is the tensor."""
    x = node.inputs[0]
    return x if x.dtype is not None and onnx_dtype(x.dtype) == node.attrs["to"] else None


@drop_cast_to_same_type.example
def float_to_float() -> gs.Graph:
    return example({"x": ("float32", [2, 3])}, lambda g, x: g.op.Relu(g.op.Cast(g.op.Neg(x), to=1)))


@rule("Dropout")
def drop_dropout(node: gs.Node, g: Builder) -> Replacement:
    """Outside of training, Dropout is the tensor that it is given."""
    mode = g.input(node, 2)
    if mode is not None and (not isinstance(mode, gs.Constant) or bool(np.asarray(mode.values).any())):
        ratio = g.input(node, 1)
        if not (isinstance(ratio, gs.Constant) and float(np.asarray(ratio.values)) == 0.0):
            g.decline("the Dropout is in training mode: export the module in eval mode")
    if len(node.outputs) > 1 and g.used(node.outputs[1]):
        if g.opset < 12:
            g.decline("what the mask is outside of training, opset 12 was the first to say")
        return [node.inputs[0], g.op.Expand(g.constant(True, np.bool_), g.op.Shape(node.inputs[0]))]
    return node.inputs[0]


@drop_dropout.example
def dropout_in_inference() -> gs.Graph:
    return example({"x": ("float32", [2, 3])}, lambda g, x: g.op.Relu(g.op.Dropout(g.op.Neg(x))))


@drop_dropout.example
def dropout_of_nothing_with_its_mask() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        y, mask = g.op.Dropout(g.op.Neg(x), g.constant(0.0), g.constant(True, np.bool_), outputs=2)
        return [g.op.Relu(y), mask]

    return example({"x": ("float32", ["n", 3])}, build)


@rule("Range")
def range_of_scalars(node: gs.Node, g: Builder) -> Replacement:
    """Range reads scalars, where ONNX's own definitions of other operators give it vectors of one element."""
    if all(tensor.shape is None or len(tensor.shape) == 0 for tensor in node.inputs):
        return None
    limits = []
    for tensor in node.inputs:
        if isinstance(tensor, gs.Constant):
            limits.append(g.constant(np.asarray(tensor.values).reshape(())))
        else:
            limits.append(g.op.Reshape(tensor, g.constant(np.zeros(0, np.int64))))
    return g.op.Range(*limits)


@range_of_scalars.example
def range_up_to_a_vector_of_one_element() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        end = g.op.Add(g.op.Shape(x, end=1), g.constant([2]))
        return g.op.Cast(g.op.Range(g.constant(0), end, g.constant(1)), to=1)

    return example({"x": ("float32", ["n", 3])}, build)
