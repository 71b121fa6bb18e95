"""Activations in forms that TensorRT's parsers refuse: a Softmax of a vector, Hardmax over a dynamic axis, …

``torch.softmax(x, 0)`` of a vector, ``F.prelu`` of integers, ``F.elu`` between LSTMs.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.rules.shapes import iota, size


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax_of_a_vector(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's Softmax wants two axes at least; a vector is the only row of a matrix."""
    x = node.inputs[0]
    if x.shape is None or len(x.shape) != 1:
        return None
    rows = g.node(node.op, [g.unsqueeze(x, [0])], {"axis": 1})
    return g.squeeze(rows, [0])


@softmax_of_a_vector.example
def every_kind_of_a_dynamic_vector() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.Softmax(x, axis=0), g.op.LogSoftmax(x), g.op.Hardmax(g.op.Relu(x), axis=-1)]

    return example({"x": ("float32", ["n"])}, build)


@softmax_of_a_vector.example
def softmax_of_a_vector_before_opset_13() -> gs.Graph:
    return example({"x": ("float32", [5])}, lambda g, x: g.op.Softmax(x, axis=0), opset=11)


@rule("Hardmax")
def hardmax_over_a_dynamic_axis(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's Hardmax needs to know the length of its axis; comparing every place with ArgMax's does not."""
    x = node.inputs[0]
    shape = g.shape(x)
    rank = len(shape)
    if rank < 2:
        return None
    axis = int(node.attrs.get("axis", -1 if g.opset >= 13 else 1)) % rank
    flat = g.opset < 13 and axis < rank - 1
    lengths = shape[axis:] if flat else [shape[axis]]
    if all(isinstance(item, int) for item in lengths) and (g.target is None or g.target.takes("Hardmax")):
        return None
    y, along = x, axis
    if flat:  # all axes from this one on are one
        y, along = g.op.Flatten(x, axis=axis), 1
    first = g.op.ArgMax(y, axis=along, keepdims=1)
    places = iota(g, size(g, y, along))
    after = len(g.shape(y)) - 1 - along
    if after:
        places = g.unsqueeze(places, list(range(1, 1 + after)))
    here = g.cast(g.op.Equal(first, places), g.dtype(x))
    return g.op.Reshape(here, g.op.Shape(x)) if flat else here


@hardmax_over_a_dynamic_axis.example
def hardmax_over_the_batch() -> gs.Graph:
    return example({"x": ("float32", ["n", 4, 5])}, lambda g, x: g.op.Hardmax(x, axis=0))


@hardmax_over_a_dynamic_axis.example
def hardmax_over_a_dynamic_rest() -> gs.Graph:
    return example({"x": ("float32", [2, "n", 5])}, lambda g, x: g.op.Hardmax(x, axis=1), opset=11)


@rule("PRelu")
def prelu_of_integers(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's PRelu takes floating-point numbers; of integers it is a choice between two products."""
    x, slope = node.inputs
    if g.dtype(x).kind not in "iu":
        return None
    negative = g.op.Less(x, g.constant(0, g.dtype(x)))
    return g.op.Where(negative, g.op.Mul(x, slope), x)


@prelu_of_integers.example
def prelu_of_int32() -> gs.Graph:
    return example({"x": ("int32", ["n", 4, 5]), "slope": ("int32", [5])}, lambda g, *xs: g.op.PRelu(*xs), opset=16)


LOOPS = frozenset(("GRU", "LSTM", "Loop", "RNN", "Scan"))


@rule("Elu", when=lambda target: not target.builds_elu_beside_loops)
def elu_beside_loops(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT-RTX fails to build an Elu between loops or recurrent layers, or behind one; an exponential it builds."""
    if g.scope is None or not any(item.op in LOOPS for item in g.scope.nodes):
        return None
    x = node.inputs[0]
    dtype = g.dtype(x)
    below = g.op.Sub(g.op.Exp(g.op.Min(x, g.constant(0, dtype))), g.constant(1, dtype))
    alpha = node.attrs.get("alpha", 1.0)
    return g.op.Add(g.op.Relu(x), below if alpha == 1 else g.op.Mul(below, g.constant(alpha, dtype)))


def _recurrent(g: Builder, op: str, x: gs.Tensor) -> gs.Tensor:
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    weights = [np.linspace(-0.5, 0.5, gates * 16, dtype=np.float32).reshape(1, 4 * gates, 4) for _ in range(2)]
    return g.squeeze(g.node(op, [x, *weights], {"hidden_size": 4}), [1])


@elu_beside_loops.example
def elu_between_an_lstm_and_a_gru() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        y = g.op.Elu(_recurrent(g, "LSTM", x))
        return _recurrent(g, "GRU", g.op.Add(y, x))

    return example({"x": ("float32", [5, "n", 4])}, build)


@elu_beside_loops.example
def elus_with_an_alpha_before_and_behind_an_rnn() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        y = g.op.Elu(g.op.Mul(_recurrent(g, "RNN", g.op.Elu(x)), 3.0), alpha=0.5)
        wide = g.op.ConvTranspose(g.op.Transpose(y, perm=[1, 2, 0]), np.ones((4, 4, 4), np.float32), strides=[2])
        cut = g.op.Slice(wide, [0], [-2], [2])
        return g.op.Conv(g.op.Elu(cut), np.ones((4, 4, 3), np.float32))

    return example({"x": ("float32", [5, 2, 4])}, build)
