"""``torch.isinf`` and ``nan_to_num`` for parsers without IsInf."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule


@rule("IsInf", when=lacks("IsInf"))
def is_inf_as_comparison(node: gs.Node, g: Builder) -> Replacement:
    """Before TensorRT 8.6 there is no IsInf; infinity is what equals it."""
    x = node.inputs[0]
    both = [bool(node.attrs.get(f"detect_{sign}", 1)) for sign in ("negative", "positive")]
    infinity = g.constant(np.inf, g.dtype(x))
    if all(both):
        return g.op.Equal(g.op.Abs(x), infinity)
    if not any(both):
        return g.op.And(g.op.Equal(x, infinity), g.constant(np.False_))
    return g.op.Equal(g.op.Neg(x) if both[0] else x, infinity)


@is_inf_as_comparison.example
def of_either_sign() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        far = g.op.Div(x, g.constant([0.0, 1.0, 0.0]))
        return [
            g.op.IsInf(far),
            g.op.IsInf(far, detect_negative=0),
            g.op.IsInf(far, detect_positive=0),
            g.op.IsInf(far, detect_positive=0, detect_negative=0),
        ]

    return example({"x": ("float32", ["n", 3])}, build)
