"""Models for the rules of passes/rules/own_plugins.py."""

from __future__ import annotations

import numpy as np

from . import Case, Sketch, strategy


@strategy("non_max_suppression_by_plugin")
def suppressions(s: Sketch) -> Case:
    """Scores are all different and boxes of any corners: of equal scores, ONNX does not say which comes first."""
    batch, classes, boxes = s.integer(1, 3), s.integer(1, 3), s.integer(1, 9)
    s.input("boxes", "float32", s.random.uniform(0, 4, [batch, boxes, 4]).astype(np.float32))
    scores = s.random.permutation(batch * classes * boxes).reshape([batch, classes, boxes])
    s.input("scores", "float32", (scores / scores.size).astype(np.float32))
    if given := s.integer(0, 3):
        s.operand("most", np.array([s.integer(0, 5)], np.int64))
    if given >= 2:
        s.operand("iou", np.array([s.random.uniform(0, 1)], np.float32))
    if given == 3:
        s.operand("score", np.array([s.random.uniform(0, 1)], np.float32))
    centre = s.pick(None, 0, 1)
    return s.model(
        lambda g, t: g.op.NonMaxSuppression(
            t["boxes"], t["scores"], t.get("most"), t.get("iou"), t.get("score"), center_point_box=centre
        ),
        opset=s.pick(11, 20),
    )
