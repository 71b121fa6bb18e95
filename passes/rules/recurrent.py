"""Recurrent layers of the batch first: ``layout`` 1 of LSTM, GRU and RNN."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule

STATES = (5, 6)
"""Which inputs are the states to begin with."""
GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}


@rule(*GATES)
def recurrent_layer_with_time_first(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's recurrent layers have time first, and its parser takes no note of ``layout``."""
    if not node.attrs.get("layout", 0):
        return None
    inputs = list(node.inputs)
    for place in (0, *STATES):
        given = g.input(node, place)
        if given is not None:
            inputs[place] = g.op.Transpose(given, perm=[1, 0, 2])
    count = len(node.outputs)
    made = g.node(node.op, inputs, {**node.attrs, "layout": None}, count)
    y, *states = [made] if count == 1 else made
    return [g.op.Transpose(y, perm=[2, 0, 1, 3]), *(g.op.Transpose(state, perm=[1, 0, 2]) for state in states)]


def _batch_first(op: str, outputs: int, states: int) -> gs.Graph:
    random = np.random.default_rng(0)
    weights = [random.standard_normal((1, 4 * GATES[op], size)).astype(np.float32) for size in (3, 4)]

    def build(g: Builder, x: gs.Tensor, *given: gs.Tensor) -> list[gs.Tensor]:
        inputs = [x, *weights, None, None, *given]
        made = g.node(op, inputs, {"hidden_size": 4, "layout": 1}, outputs)
        return [made] if outputs == 1 else list(made)

    shapes = {f"state{index}": ("float32", [2, 1, 4]) for index in range(states)}
    return example({"x": ("float32", [2, 5, 3]), **shapes}, build, 14)


@recurrent_layer_with_time_first.example
def lstm_of_the_batch_first() -> gs.Graph:
    return _batch_first("LSTM", 3, 2)


@recurrent_layer_with_time_first.example
def gru_of_the_batch_first() -> gs.Graph:
    return _batch_first("GRU", 1, 1)


@recurrent_layer_with_time_first.example
def rnn_of_the_batch_first() -> gs.Graph:
    return _batch_first("RNN", 2, 0)
