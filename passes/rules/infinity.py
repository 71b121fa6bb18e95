"""``torch.isinf`` and ``nan_to_num`` for parsers without IsInf."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule


@rule("IsInf", when=lacks("IsInf"))
def is_inf_as_comparison(node: gs.Node, g: Builder) -> Replacement:
    """Before TensorRT 8.6 there is no IsInf; infinity is beyond every number.

    It is not compared with itself: TensorRT 8.5 computes with 1e38 where a constant is infinite.
    """
    x = node.inputs[0]
    negative, positive = (bool(node.attrs.get(f"detect_{sign}", 1)) for sign in ("negative", "positive"))
    most = np.finfo(g.dtype(x)).max
    if negative and positive:
        return g.op.Greater(g.op.Abs(x), g.constant(most))
    if negative:
        return g.op.Less(x, g.constant(-most))
    above = g.op.Greater(x, g.constant(most))
    return above if positive else g.op.And(above, g.constant(np.False_))


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
