"""Non-maximum suppression by TensorRT's plugin EfficientNMS_TRT, where the model keeps a fixed number of results.

How many boxes ONNX's NonMaxSuppression selects is known only at run time; the plugin gives a fixed number of places and
says how many of them are filled. Between the two stands ``plugins_rows``: it computes everything up to the node that
makes the size fixed again (``topk(100)``, ``cat([kept, zeros(100, 6)])[:100]``, ``mask[kept] = 1``, …) on all places.
Where nothing does, because the selected boxes themselves leave the model, there is no exact rewrite, and the rule says
how to write the model instead.

The plugin is asked for one class at a time (classes join the batch), since its limit of results is for all classes
together and ONNX's is for each. It compares with ``>=`` where ONNX compares with ``>``; thresholds are one float apart.
Boxes of equal scores come in any order. TensorRT creates no plugin with a negative score threshold: where the model has
such a one, or none, TopK sorts the boxes (those of equal scores as it likes), and the plugin is given their ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, has_plugin, lacks, rule
from passes.plugins import Plugin, register
from passes.rules.plugins_rows import Evaluation, Plain, Result, Rows, Value, mark, replaced
from passes.rules.plugins_rows_parts import EXITS
from passes.rules.shapes import Size, as_tensor, check_intermediate, iota, reshape, shape_tensor, size, times

MOST_CANDIDATES = 4096
"""Boxes of an image and class, best scores first, that the plugin looks at."""

MOST_IMAGES = 1024
"""Images times classes that the plugin can do at a time: one block of threads."""

ACCEPT_CUT = False
"""Whether more than ``MOST_CANDIDATES`` boxes may be given to the plugin, which does not look at those with the lowest
scores. Exact where no image has more boxes of one class above the score threshold. Set it before converting."""

LOWEST = float(-np.finfo(np.float32).max / 2)
"""A score that no finite one is below."""

LEAST_RANK = 0.5
"""What stands for the last rank: above 0.007, from where on the plugin leaves out what is below its threshold."""


def _below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def _above(value: float) -> float:
    return max(float(np.nextafter(np.float32(value), np.float32(np.inf))), float(np.finfo(np.float32).tiny))


# --- the plugin --------------------------------------------------------------------------------------------------


def _efficient_nms(g: Builder, boxes: gs.Tensor, scores: gs.Tensor, **attrs: Any) -> list[gs.Tensor]:
    """What the plugin computes: boxes [b, n, 4] and scores [b, n, c] give count, boxes, scores and classes."""
    if attrs["background_class"] >= 0 or attrs["class_agnostic"]:
        raise ValueError("the reference body of EfficientNMS_TRT has no background class and is not class-agnostic")
    most, classes = attrs["max_output_boxes"], g.static_dim(scores, 2)
    if attrs["score_activation"]:
        scores = g.op.Sigmoid(scores)
    scores = _best(g, scores, classes)
    by_class = g.op.Transpose(scores, perm=[0, 2, 1])
    limits = (g.constant(most), g.constant(np.float32(max(0.0, _below(attrs["iou_threshold"])))))
    threshold = g.constant(np.float32(_below(attrs["score_threshold"])))
    chosen = g.op.NonMaxSuppression(boxes, by_class, *limits, threshold, center_point_box=attrs["box_coding"])
    places = g.op.Gather(chosen, [0, 2, 1], axis=1)  # image, box, class
    ones = g.op.Expand(g.constant(np.float32(1)), g.slice(g.op.Shape(places), [0], [1], [0], [1]))
    kept = g.op.ScatterND(g.op.Expand(g.constant(np.float32(0)), g.op.Shape(scores)), places, ones)
    left = g.op.Where(g.op.Cast(kept, to=9), scores, np.float32(LOWEST))
    pairs = g.op.Reshape(left, np.array([0, -1]))
    padded = g.op.Pad(pairs, np.array([0, 0, 0, most]), np.float32(LOWEST))
    best, where = g.op.TopK(padded, [most], axis=1, outputs=2)
    total = g.reduce("ReduceSum", g.op.Reshape(kept, np.array([0, -1])), [1], keepdims=True)
    number = g.op.Min(g.op.Cast(total, to=7), np.array(most))
    filled = g.op.Less(g.constant(list(range(most))), number)  # [b, most]
    where = g.op.Where(filled, where, np.int64(0))
    corners = _corners(g, boxes) if attrs["box_coding"] else boxes
    anchors = g.op.Expand(g.unsqueeze(g.op.Div(where, np.int64(classes)), [2]), np.array([1, 1, 4]))
    found = g.op.GatherElements(corners, anchors, axis=1)
    return [
        g.op.Cast(number, to=6),
        g.op.Where(g.unsqueeze(filled, [2]), found, np.float32(0)),
        g.op.Where(filled, best, np.float32(0)),
        g.op.Cast(g.op.Mod(where, np.int64(classes)), to=6),
    ]


def _best(g: Builder, scores: gs.Tensor, classes: int) -> gs.Tensor:
    """The scores, those that the plugin does not look at as low as can be."""
    number = g.shape(scores)[1]
    if isinstance(number, int) and number * classes <= MOST_CANDIDATES:
        return scores
    pairs = g.op.Reshape(scores, np.array([0, -1]))
    most = g.op.Min(g.slice(g.op.Shape(pairs), [1], [2], [0], [1]), np.array([MOST_CANDIDATES]))
    best, _ = g.op.TopK(pairs, most, axis=1, outputs=2)
    least = g.unsqueeze(g.reduce("ReduceMin", best, [1], keepdims=True), [2])
    result: gs.Tensor = g.op.Where(g.op.Less(scores, least), np.float32(LOWEST), scores)
    return result


def _corners(g: Builder, boxes: gs.Tensor) -> gs.Tensor:
    """Corners of boxes that are given by centre and size; one of negative size overlaps nothing, like an empty one."""
    centre, size = g.slice(boxes, [0], [2], [-1], [1]), g.slice(boxes, [2], [4], [-1], [1])
    half = g.op.Div(g.op.Max(size, np.float32(0)), np.float32(2))
    joined: gs.Tensor = g.op.Concat(g.op.Sub(centre, half), g.op.Add(centre, half), axis=-1)
    return joined


EFFICIENT_NMS = register(
    Plugin(
        "EfficientNMS_TRT",
        attributes={
            "score_threshold": 0.0,
            "iou_threshold": 0.5,
            "max_output_boxes": int,
            "background_class": -1,
            "score_activation": 0,
            "class_agnostic": 0,
            "box_coding": 0,
        },
        limits={
            "score_threshold": lambda value: value >= 0,
            "iou_threshold": lambda value: value > 0,
            "max_output_boxes": lambda value: value > 0,
            "score_activation": lambda value: value in (0, 1),
            "box_coding": lambda value: value in (0, 1),
        },
        outputs=4,
        reference=_efficient_nms,
    )
)


# --- the rule ----------------------------------------------------------------------------------------------------


@rule("NonMaxSuppression", *EXITS, when=lacks("NonMaxSuppression") & has_plugin("EfficientNMS_TRT", "1"))
def nms_as_efficient_nms(node: gs.Node, g: Builder) -> Replacement:
    """The parser lacks NonMaxSuppression; the plugin EfficientNMS_TRT gives its results in a fixed number of places."""
    if node.op == "NonMaxSuppression":
        mark(node, g, selected)
        return None
    return replaced(node, g, "NonMaxSuppression")


def selected(work: Evaluation, node: gs.Node, given: list[Value]) -> Result:
    """All places of the selected indices [places, 3], the filled ones first, with their number [1]."""
    g = work.g
    threshold = _constant(node, g, 4, None)
    boxes, scores, count = _candidates(work, given)
    classes, number = g.static_dim(scores, 1), g.shape(boxes)[1]
    if not isinstance(number, int):
        number = g.shape(scores)[2]
    most = _most(g, int(_constant(node, g, 2, 0)), number)
    if node.attrs.get("center_point_box", 0):
        boxes = _corners(g, boxes)
    lists = times(g, size(g, scores, 0), classes)
    if isinstance(lists, int) and lists > MOST_IMAGES:
        g.decline(f"{lists} images times classes are more than the {MOST_IMAGES} that the plugin can do")
    length: Size = number if isinstance(number, int) else size(g, scores, 2)
    if classes > 1:
        boxes = g.op.Expand(g.unsqueeze(boxes, [1]), g.constant([1, classes, 1, 1]))
        boxes = _as_lists(g, boxes, lists, [length, 4])
    scores = _as_lists(g, scores, lists, [length])
    limits = {"iou_threshold": _above(float(_constant(node, g, 3, 0.0))), "max_output_boxes": most}
    if threshold is not None and threshold >= 0:
        filled, index = _by_score(g, boxes, scores, float(threshold), limits)
    else:
        if count is None:
            count = as_tensor(g, length)
        filled, index = _by_rank(g, boxes, scores, count, threshold, limits)
    return _in_order(g, filled, index, lists, classes, most)


def _candidates(work: Evaluation, given: list[Value]) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor | None]:
    """Boxes, scores, and of boxes that were selected before how many there are; the others' scores are the lowest."""
    boxes, scores = given[:2]
    if isinstance(boxes, Plain) and isinstance(scores, Plain):
        return boxes.tensor, scores.tensor, None
    if not (isinstance(boxes, Rows) and isinstance(scores, Rows)) or boxes.count != scores.count:
        work.g.decline("boxes and scores are of different numbers")
    if (boxes.axis, scores.axis) != (1, 2):
        work.g.decline("the number of images or of classes is known only at run time")
    return boxes.tensor, work.only_filled(scores, LOWEST), work.count(boxes.count)


def _by_score(
    g: Builder, boxes: gs.Tensor, scores: gs.Tensor, threshold: float, limits: dict[str, Any]
) -> tuple[gs.Tensor, gs.Tensor]:
    """Which places of each list are filled, and by which box, [lists, most], where no score below zero is wanted."""
    attrs = {**limits, "score_threshold": threshold}
    count, kept, values, _ = g.plugin(EFFICIENT_NMS, [boxes, g.unsqueeze(scores, [2])], attrs)
    filled = g.op.Less(iota(g, limits["max_output_boxes"]), g.op.Cast(count, to=7))
    # below a threshold of 0.007, what is below it comes too, at the end
    filled = g.op.And(filled, g.op.Greater(values, np.float32(threshold)))
    pairs = [(g.op.Gather(kept, np.array(at), axis=2), g.op.Gather(boxes, np.array(at), axis=2)) for at in range(4)]
    return filled, _nearest(g, [*pairs, (values, scores)])


def _by_rank(
    g: Builder,
    boxes: gs.Tensor,
    scores: gs.Tensor,
    count: gs.Tensor,
    threshold: float | None,
    limits: dict[str, Any],
) -> tuple[gs.Tensor, gs.Tensor]:
    """As ``_by_score`` for scores of any sign, of which the first ``count`` of each list [1] are some box's.

    The ranks are neighbours in half precision, so that an engine in it tells them apart too.
    """
    number = g.shape(scores)[1]
    best = min(number, MOST_CANDIDATES) if isinstance(number, int) else MOST_CANDIDATES
    if not isinstance(number, int):  # there may be fewer
        scores = g.op.Pad(g.op.Max(scores, np.float32(LOWEST)), np.array([0, 0, 0, best]), np.float32(LOWEST))
    values, order = g.op.TopK(scores, np.array([best]), axis=1, outputs=2)
    some = g.op.Less(order, count)
    if threshold is not None:
        some = g.op.And(some, g.op.Greater(values, np.float32(threshold)))
    order = g.op.Where(some, order, np.int64(0))
    bits = np.float16(LEAST_RANK).view(np.uint16) + np.arange(best, dtype=np.uint16)
    ranks = g.constant(bits[::-1].copy().view(np.float16).astype(np.float32)[None])  # [1, best]
    sorted_boxes = g.op.GatherElements(boxes, g.op.Expand(g.unsqueeze(order, [2]), np.array([1, 1, 4])), axis=1)
    given = g.unsqueeze(g.op.Where(some, ranks, np.float32(0)), [2])
    attrs = {**limits, "score_threshold": LEAST_RANK}
    found, _, values, _ = g.plugin(EFFICIENT_NMS, [sorted_boxes, given], attrs)
    filled = g.op.Less(iota(g, limits["max_output_boxes"]), g.op.Cast(found, to=7))
    index: gs.Tensor = g.op.GatherElements(order, _nearest(g, [(values, ranks)]), axis=1)
    return filled, index


def _most(g: Builder, asked: int, number: int | str | None) -> int:
    """How many boxes of a class are selected at most; declines where the plugin does not look at enough of them."""
    known = number if isinstance(number, int) else None
    if not ACCEPT_CUT and (known is None or known > MOST_CANDIDATES):
        many = "a dynamic number of boxes" if known is None else f"{known} boxes"
        g.decline(
            f"the plugin looks at the best {MOST_CANDIDATES} of {many} only; keep those with topk before NMS, or set "
            "passes.rules.plugins_nms.ACCEPT_CUT"
        )
    most = min(asked, MOST_CANDIDATES if known is None else known)
    if most <= 0:
        g.decline("it selects nothing")
    return min(most, MOST_CANDIDATES)


def _constant(node: gs.Node, g: Builder, index: int, default: Any) -> Any:
    tensor = g.input(node, index)
    return default if tensor is None else g.value(tensor).reshape(-1)[0].item()


def _as_lists(g: Builder, x: gs.Tensor, lists: Size, rest: list[Size]) -> gs.Tensor:
    """``x`` with its first axes, of images and classes, as one."""
    if not isinstance(lists, int) and all(isinstance(item, int) for item in rest):
        return reshape(g, x, [lists, *rest])
    result: gs.Tensor = g.op.Reshape(x, shape_tensor(g, [lists, *rest]))
    result.shape = [item if isinstance(item, int) else None for item in (lists, *rest)]
    return result


def _nearest(g: Builder, pairs: list[tuple[gs.Tensor, gs.Tensor]]) -> gs.Tensor:
    """Of each result [lists, most] which of those given [lists, n] it is, by all that is known of them: the plugin does
    not tell. The nearest one, not an equal one, since an engine in half precision rounds them."""
    result, given = pairs[-1]
    check_intermediate(g, [*g.shape(result), g.shape(given)[1]], "the comparison of every result with every box")
    total: gs.Tensor | None = None
    for result, given in pairs:
        apart = g.op.Abs(g.op.Sub(g.unsqueeze(result, [2]), g.unsqueeze(given, [1])))
        total = apart if total is None else g.op.Add(total, apart)
    index: gs.Tensor = g.op.ArgMin(total, axis=2, keepdims=0)
    return index


def _summed_up(g: Builder, numbers: gs.Tensor, lists: Size) -> gs.Tensor:
    """The sums of the numbers up to each one. Of any number of them by way of the most that there can be: TensorRT 8.5
    adds up all of a square of which both axes are the same unknown size."""
    known = isinstance(lists, int)
    which = iota(g, lists if known else MOST_IMAGES)
    if not known:
        numbers = g.slice(g.op.Concat(numbers, np.zeros(MOST_IMAGES, np.int64), axis=0), [0], [MOST_IMAGES], [0], [1])
    until = g.op.LessOrEqual(g.unsqueeze(which, [0]), g.unsqueeze(which, [1]))  # [list, those up to it]
    ends = g.reduce("ReduceSum", g.op.Mul(g.op.Cast(until, to=7), g.unsqueeze(numbers, [0])), [1])
    return ends if known else g.op.Slice(ends, np.array([0]), as_tensor(g, lists), np.array([0]), np.array([1]))


def _in_order(g: Builder, filled: gs.Tensor, index: gs.Tensor, lists: Size, classes: int, most: int) -> Result:
    """The filled places of all lists, one after the other, as ONNX gives them; then the others."""
    numbers = g.reduce("ReduceSum", g.op.Cast(filled, to=7), [1])  # [lists]
    row = iota(g, times(g, lists, most))
    if isinstance(lists, int) and lists == 1:
        at, place = g.op.Mul(row, np.int64(0)), row
        end = numbers
    else:
        ends = _summed_up(g, numbers, lists)
        past = g.op.GreaterOrEqual(g.unsqueeze(row, [1]), g.unsqueeze(ends, [0]))  # [places, lists]
        at = g.reduce("ReduceSum", g.op.Cast(past, to=7), [1])
        at = g.op.Min(at, g.op.Sub(as_tensor(g, lists), np.array([1])))
        place = g.op.Sub(row, g.op.Sub(g.op.Gather(ends, at, axis=0), g.op.Gather(numbers, at, axis=0)))
        place = g.op.Min(place, np.array([most - 1]))
        end = g.reduce("ReduceSum", numbers, [0], keepdims=True)
    flat = g.op.Add(g.op.Mul(at, np.int64(most)), place)
    box = g.op.Gather(g.op.Reshape(index, np.array([-1])), flat, axis=0)
    image = g.op.Div(at, np.int64(classes))
    columns = [image, g.op.Sub(at, g.op.Mul(image, np.int64(classes))), box]
    rows = g.op.Concat(*(g.unsqueeze(item, [1]) for item in columns), axis=1)
    return Result(rows, end)
