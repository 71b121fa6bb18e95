"""Models for the rules of passes/rules/recurrent.py."""

from __future__ import annotations

import numpy as np

from passes.framework import example
from passes.model import to_proto
from passes.rules.recurrent import GATES
from tests.support import run_onnx

from . import Arrays, Case, Sketch, strategy


@strategy("recurrent_layer_with_time_first")
def batch_first(s: Sketch) -> Case:
    """ONNX Runtime has no batch first either: what is true is its layer of time first, on what is turned in NumPy."""
    op, direction = s.pick(*GATES), s.pick("forward", "reverse", "bidirectional")
    directions, outputs = 1 + (direction == "bidirectional"), s.integer(1, 3 if op == "LSTM" else 2)
    batch, time, features, hidden = s.integer(1, 3), s.integer(1, 4), s.integer(1, 3), s.integer(1, 3)
    attrs = {"hidden_size": hidden, "direction": direction}
    rows = directions, GATES[op] * hidden
    weights = [s.values("float32", [*rows, size]) for size in (features, hidden)]
    bias = s.pick(None, s.values("float32", [rows[0], 2 * rows[1]]))
    lengths = s.pick(None, s.random.integers(1, time + 1, batch).astype(np.int32))
    names = ["x"]
    s.input("x", "float32", [batch, time, features])
    for state in range(s.integer(0, 2 if op == "LSTM" else 1)):
        names.append(f"state{state}")
        s.input(names[-1], "float32", [batch, directions, hidden])

    def made(feeds: Arrays) -> list[np.ndarray]:
        turned = {name: np.ascontiguousarray(feeds[name].swapaxes(0, 1)) for name in names}
        shapes = {name: ("float32", list(array.shape)) for name, array in turned.items()}
        model = example(shapes, lambda g, *given: layer(g, given, attrs), 14)
        y, *states = run_onnx(to_proto(model), turned).values()
        return [y.transpose(2, 0, 1, 3), *(state.swapaxes(0, 1) for state in states)]

    def layer(g, given, attrs):
        found = g.node(op, [given[0], *weights, bias, lengths, *given[1:]], attrs, outputs)
        return [found] if outputs == 1 else list(found)

    return s.model(
        lambda g, t: layer(g, [t[name] for name in names], {**attrs, "layout": 1}), opset=s.pick(14, 22), reference=made
    )
