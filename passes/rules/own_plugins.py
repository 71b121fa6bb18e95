"""Operators that need a plugin of the bridge's own, where the target's parser takes plugins written in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Condition, example, has_plugin, lacks, rule
from passes.plugins import DEFORM_CONV, NON_MAX_SUPPRESSION

needs_nms = Condition(lambda target: target.only_by_plugin("NonMaxSuppression"))


@rule("NonMaxSuppression", when=needs_nms & has_plugin("NonMaxSuppression"))
def non_max_suppression_by_plugin(node: gs.Node, g: Builder) -> gs.Tensor:
    """TensorRT-RTX has no NonMaxSuppression of its own, and a plugin gives a result of any length."""
    boxes, scores = node.inputs[:2]
    if len(g.shape(boxes)) != 3 or len(g.shape(scores)) != 3:
        g.decline("boxes and scores are no batches")
    most, iou, score = (g.input(node, index) for index in (2, 3, 4))
    most = g.constant([0]) if most is None else most
    bound = max(0, int(g.value(most).reshape(-1)[0])) if isinstance(most, gs.Constant) else -1
    given = [
        g.cast(most, np.int64),
        g.constant([0.0]) if iou is None else g.cast(iou, np.float32),
        g.constant([np.finfo(np.float32).min], np.float32) if score is None else g.cast(score, np.float32),
    ]
    attributes = {"center_point_box": node.attrs.get("center_point_box", 0), "most": bound}
    types = [(np.int64, [None, 3]), (np.int32, [])]
    chosen: gs.Tensor = g.plugin(NON_MAX_SUPPRESSION, [boxes, scores, *given], attributes, types)[0]
    return chosen


def _nms(most: Any, iou: Any = None, score: Any = None, batch: Any = 1, count: Any = 12, **attrs: Any) -> gs.Graph:
    inputs = {"boxes": ("float32", [batch, count, 4]), "scores": ("float32", [batch, 2, count])}
    return example(inputs, lambda g, b, s: g.op.NonMaxSuppression(b, s, most, iou, score, **attrs))


@non_max_suppression_by_plugin.example
def boxes_by_corners() -> gs.Graph:
    return _nms(np.array([5]), np.array([0.3], np.float32), np.array([0.1], np.float32))


@non_max_suppression_by_plugin.example
def boxes_by_centres_without_thresholds() -> gs.Graph:
    return _nms(np.array([3]), center_point_box=1)


@non_max_suppression_by_plugin.example
def any_number_of_boxes_and_of_images() -> gs.Graph:
    return _nms(np.array([2]), np.array([0.5], np.float32), batch="n", count="boxes")


@rule("DeformConv", when=lacks("DeformConv") & has_plugin("DeformConv"))
def deform_conv_by_plugin(node: gs.Node, g: Builder) -> gs.Tensor:
    """TensorRT-RTX has no DeformConv, and sampling by a plugin does without a gather for each corner."""
    x, weight, offset = node.inputs[:3]
    if len(g.shape(x)) != 4:
        g.decline("only of two spatial axes")
    bias, mask = g.input(node, 3), g.input(node, 4)
    attributes = {name: value for name, value in node.attrs.items() if name in DEFORM_CONV.attributes}
    attributes |= {"bias": int(bias is not None), "mask": int(mask is not None)}
    rest = [tensor for tensor in (bias, mask) if tensor is not None]
    result: gs.Tensor = g.plugin(DEFORM_CONV, [x, weight, offset, *rest], attributes)
    return result


def _deform_conv(mask: bool, bias: bool, group: int = 1, offset_group: int = 1, size: Any = 6) -> gs.Graph:
    inputs = {
        "x": ("float32", ["n", 4, size, 6]),
        "offset": ("float32", ["n", 18 * offset_group, size, 6]),
        "mask": ("float32", ["n", 9 * offset_group, size, 6]),
    }
    weight = np.random.default_rng(0).standard_normal((6, 4 // group, 3, 3)).astype(np.float32)

    def build(g: Builder, x: gs.Tensor, offset: gs.Tensor, weights: gs.Tensor) -> gs.Tensor:
        extra = np.arange(6, dtype=np.float32) if bias else None
        options = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": group, "offset_group": offset_group}
        made: gs.Tensor = g.op.DeformConv(x, weight, offset, extra, weights if mask else None, **options)
        return made

    return example(inputs, build)


@deform_conv_by_plugin.example
def with_mask_and_bias() -> gs.Graph:
    return _deform_conv(mask=True, bias=True)


@deform_conv_by_plugin.example
def with_mask_alone_in_groups() -> gs.Graph:
    return _deform_conv(mask=True, bias=False, group=2, offset_group=2)


@deform_conv_by_plugin.example
def without_either() -> gs.Graph:
    return _deform_conv(mask=False, bias=False)
