"""Models for the rules of passes/rules/attention.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.ir import Node
from passes.rules.attention import PREVIEW

from . import Arrays, Case, Sketch, Tensors, strategy


@strategy("flex_attention_as_matmuls")
def flexible(s: Sketch) -> Case:
    batch, shared, length, steps = (s.integer(1, 3) for _ in range(4))
    heads, size, out = shared * s.integer(1, 3), s.integer(1, 5), s.integer(1, 5)
    scale, score, prob = s.pick(None, 0.3), s.pick(None, 2.0), s.pick(None, 0.5)
    s.input("query", "float32", [batch, heads, length, size])
    s.input("key", "float32", [batch, shared, steps, size])
    s.input("value", "float32", [batch, shared, steps, out])
    for name, axes in (("query", (1, 3)), ("key", (1,))):
        for axis in axes:  # the heads are reshaped by their number, and the scale is made of the size
            s.inputs[name][1][axis] = s.feeds[name].shape[axis]

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        attrs: dict[str, Any] = {} if scale is None else {"scale": scale}
        for name, factor in (("score_mod", score), ("prob_mod", prob)):
            if factor is not None:
                inner = Builder(g.names, g.opset, name)
                formal = gs.Variable(g.names.new("scores"), np.dtype(np.float32), ["B", "H", "L", "S"])
                made = inner.op.Mul(formal, inner.constant(factor))
                attrs[name] = gs.Graph(inner.made, [formal], [made], name=name, opset=g.opset)
        shape = [*t["query"].shape[:3], t["value"].shape[3]]
        result = gs.Variable(g.names.new("y"), np.dtype(np.float32), shape)
        given = [t["query"], t["key"], t["value"]]
        g.made.append(Node("FlexAttention", g.names.new("attention"), attrs, given, [result], domain=PREVIEW))
        return result

    def reference(feeds: Arrays) -> list[np.ndarray]:
        query, key, value = (feeds[name].astype(np.float64) for name in ("query", "key", "value"))
        key, value = (np.repeat(item, heads // shared, axis=1) for item in (key, value))
        scores = query @ key.swapaxes(2, 3) * (scale or size**-0.5) * (score or 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        return [(shares / shares.sum(-1, keepdims=True) * (prob or 1) @ value).astype(np.float32)]

    return s.model(build, opset=s.pick(18, 23), reference=reference)
