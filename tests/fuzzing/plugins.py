"""Models for the rules of passes/rules/plugins_*.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.rules.plugins_deberta import buckets

from . import Case, Sketch, Tensors, strategy

F32 = np.float32
Tail = Callable[[Builder, gs.Tensor, gs.Tensor], gs.Tensor]
"""From what is known of the selected boxes [n, columns], and their indices [n, 3], to a tensor of a fixed size."""


# --- non-maximum suppression ---------------------------------------------------------------------------------------


def boxes_and_scores(s: Sketch, images: int, classes: int, count: int, centre: bool, ties: bool) -> None:
    low = s.random.random((images, count, 2)) * 0.7
    size = 0.05 + s.random.random((images, count, 2)) * 0.5
    if s.rarely():
        size = size * s.random.choice([1, 1, 0, -1], size.shape)
    boxes = np.concatenate([low + size / 2, size] if centre else [low, low + size], -1).astype(F32)
    if s.flag() and not centre:
        boxes = boxes[..., [2, 1, 0, 3]]
    total = images * classes * count
    scores = (s.random.permutation(total).reshape(images, classes, count) / max(total, 1)).astype(F32)
    scores = scores * 2 - 1 if s.flag() else scores
    if ties:
        scores = np.where(scores < -0.9, F32(-np.inf), np.round(scores * 3) / F32(3))
    s.input("boxes", "float32", boxes, static=True)
    s.input("scores", "float32", scores, static=True)
    if s.flag():
        for name in ("boxes", "scores"):
            s.inputs[name][1][0] = "images"


def some_tail(s: Sketch, columns: int) -> Tail:
    """How a head makes the number of its boxes a fixed one."""
    keep, column = s.integer(1, 6), s.integer(0, columns - 1)
    zeros = np.zeros([keep, columns], F32)

    def joined(g: Builder, rows: gs.Tensor) -> gs.Tensor:
        return g.op.Concat(*([zeros, rows] if front else [rows, zeros]), axis=0)

    def first(g: Builder, rows: gs.Tensor, chosen: gs.Tensor) -> gs.Tensor:
        return g.slice(joined(g, rows), [0], [keep], [0], [1])

    def best(g: Builder, rows: gs.Tensor, chosen: gs.Tensor) -> gs.Tensor:
        whole = joined(g, rows)
        _, where = g.op.TopK(g.op.Gather(whole, np.array(column), axis=1), [keep], largest=largest, outputs=2)
        return g.op.Gather(whole, where, axis=0)

    def transposed(g: Builder, rows: gs.Tensor, chosen: gs.Tensor) -> gs.Tensor:
        whole = g.op.Transpose(g.op.Mul(joined(g, rows), F32(2)), perm=[1, 0])
        values, where = g.op.TopK(whole, [keep], axis=1, outputs=2)
        return g.op.Add(values, g.op.GatherElements(whole, where, axis=1))

    def reduced(g: Builder, rows: gs.Tensor, chosen: gs.Tensor) -> gs.Tensor:
        whole = g.unsqueeze(joined(g, g.op.Abs(rows)), [0])
        return g.reduce(reduction, whole, [1] if s_keep else [0, 1], keepdims=s_keep)

    def counted(g: Builder, rows: gs.Tensor, chosen: gs.Tensor) -> gs.Tensor:
        return g.op.Add(g.op.Shape(chosen), g.constant([keep, 0]))

    def written(g: Builder, rows: gs.Tensor, chosen: gs.Tensor) -> gs.Tensor:
        number = g.slice(g.op.Shape(chosen), [0], [1], [0], [1])
        places = g.op.Range(g.constant(0), g.squeeze(number, [0]), g.constant(1))
        return g.op.ScatterND(np.full([3000, columns], 3, F32), g.unsqueeze(places, [1]), rows)

    def padded(g: Builder, rows: gs.Tensor, chosen: gs.Tensor) -> gs.Tensor:
        missing = g.op.Sub(g.constant([3000]), g.slice(g.op.Shape(rows), [0], [1], [0], [1]))
        return g.op.Pad(rows, g.op.Concat(g.constant([0, 0]), missing, g.constant([0]), axis=0), F32(keep))

    front, largest, s_keep = s.flag(), int(s.flag()), s.flag()
    reduction = s.pick("ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceL2")
    tail: Tail = s.pick(first, best, transposed, reduced, counted, written, padded)
    return tail


@strategy("nms_as_efficient_nms")
def detection_heads(s: Sketch) -> Case:
    images, classes, count = s.integer(1, 3), s.pick(1, 1, 2, 3), s.integer(1, 12)
    centre = s.flag()
    limits = [np.array([s.pick(1, 3, 100)]), np.array([s.pick(0.0, 0.3, 0.5, 1.0)], F32)]
    if s.flag():
        limits.append(np.array([s.pick(-0.5, 0.0, 0.001, 0.4, 0.9, 2.0)], F32))
    ranked = len(limits) < 3 or limits[2][0] < 0  # elsewhere the plugin gives boxes of equal scores in any order
    boxes_and_scores(s, images, classes, count, centre, ranked and s.flag())
    tails = [some_tail(s, 8) for _ in range(s.integer(1, 3))]

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        places = [g.constant(item) for item in limits]
        chosen = g.op.NonMaxSuppression(t["boxes"], t["scores"], *places, center_point_box=int(centre))
        pairs = g.op.Gather(chosen, np.array([0, 2]), axis=1)
        score = g.unsqueeze(g.op.GatherND(t["scores"], chosen), [1])
        rows = g.op.Concat(g.op.GatherND(t["boxes"], pairs), score, g.cast(chosen, F32), axis=1)
        return [g.op.Mul(result, np.array(2, result.dtype)) for result in (tail(g, rows, chosen) for tail in tails)]

    return s.model(build, opset=s.pick(13, 18, 20))


@strategy("mask_as_places")
def masked(s: Sketch) -> Case:
    """Elements, or rows, that a mask selects, and what is made of them; some have their best taken by NMS."""
    sizes = s.sizes(1, 3, high=14)
    if s.rarely():
        sizes = [s.integer(100, 300)]
    x = s.values("float32", sizes)
    s.input("x", "float32", x, static=s.flag())
    bound = F32(s.pick(-9, 0, 0.5, 9))
    tails = [some_tail(s, 3) for _ in range(s.integer(1, 2))]
    twice = s.flag()

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        mask = g.op.Greater(t["x"], bound)
        places = g.op.Transpose(g.op.NonZero(mask), perm=[1, 0])
        found = g.op.GatherND(t["x"], places)
        if twice:
            again = g.squeeze(g.op.NonZero(g.op.Less(found, F32(1))), [0])
            found, places = g.op.Gather(found, again), g.op.Gather(places, again, axis=0)
        last = g.unsqueeze(g.op.Gather(places, np.array(-1), axis=1), [1])
        column = g.unsqueeze(found, [1])
        rows = g.op.Concat(column, g.cast(last, F32), g.op.Mul(column, column), axis=1)
        return [g.op.Mul(result, np.array(2, result.dtype)) for result in (tail(g, rows, places) for tail in tails)]

    return s.model(build, opset=s.pick(13, 18, 20))


# --- regions -------------------------------------------------------------------------------------------------------


@strategy("roi_align_by_plugin")
def regions(s: Sketch) -> Case:
    images, count = s.integer(1, 3), s.integer(0 if s.rarely() else 1, 5)
    s.input("x", "float32", [images, s.integer(1, 3), s.integer(1, 9), s.integer(1, 9)])
    low = s.random.random((count, 2)) * 12 - 2
    size = np.maximum(s.random.random((count, 2)) * 9 - 1, 0)  # some have no area
    s.input("boxes", "float32", np.concatenate([low, low + size], 1).astype(F32))
    s.input("images", "int64", s.random.integers(0, images, count))
    opset = s.pick(10, 15, 16, 20)
    attrs = {"output_height": s.integer(1, 4), "output_width": s.integer(1, 4), "sampling_ratio": s.integer(0, 3)}
    attrs |= {"spatial_scale": s.pick(None, 1.0, 0.5, 0.25), "mode": s.pick(None, "avg", "max")}
    if opset >= 16:
        attrs["coordinate_transformation_mode"] = s.pick(None, "half_pixel", "output_half_pixel")
    return s.model(lambda g, t: g.node("RoiAlign", [t["x"], t["boxes"], t["images"]], attrs), opset)


# --- attention -----------------------------------------------------------------------------------------------------


@strategy("deformable_attention_by_plugin")
def deformable(s: Sketch) -> Case:
    """Of the values in one tensor or in one of each level, in the order of Deformable DETR or another one."""
    levels = [(s.integer(1, 4), s.integer(1, 4)) for _ in range(s.integer(1, 3))]
    batch, heads, depth, points, queries = (s.integer(1, 3) for _ in range(5))
    length = sum(height * width for height, width in levels)
    s.input("value", "float32", [batch, length, heads, depth], static=s.flag())
    s.input(
        "places", "float32", s.random.random((batch, queries, heads, len(levels), points, 2)).astype(F32) * 1.4 - 0.2
    )
    s.input("weights", "float32", [batch, queries, heads, len(levels), points])
    stack, keepdims, swapped, other = s.flag(), int(s.flag()), s.flag(), s.rarely()

    def image(g: Builder, part: gs.Tensor, height: int, width: int) -> gs.Tensor:
        order = [0, 3, 2, 1] if other and heads == depth else [0, 2, 3, 1]
        return g.op.Reshape(g.op.Transpose(part, perm=order), np.array([-1, depth, height, width]))

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        grids = g.op.Sub(g.op.Mul(t["places"], F32(2)), F32(1))
        start, sampled = 0, []
        for level, (height, width) in enumerate(levels):
            part = g.slice(t["value"], [start], [start + height * width], [1], [1])
            start += height * width
            grid = g.op.Transpose(g.op.Gather(grids, np.array(level), axis=3), perm=[0, 2, 1, 3, 4])
            grid = g.op.Reshape(grid, np.array([-1, queries, points, 2]))
            one = g.op.GridSample(image(g, part, height, width), grid)
            sampled.append(g.unsqueeze(one, [-2]) if stack else one)
        joined = g.op.Concat(*sampled, axis=-2 if stack else -1)
        if stack:
            joined = g.op.Reshape(joined, np.array([-1, depth, queries, len(levels) * points]))
        shares = g.op.Transpose(t["weights"], perm=[0, 2, 1, 3, 4])
        shares = g.op.Reshape(shares, np.array([-1, 1, queries, len(levels) * points]))
        product = g.op.Mul(shares, joined) if swapped else g.op.Mul(joined, shares)
        return g.op.Neg(g.op.ReduceSum(product, np.array([-1]), keepdims=keepdims))

    return s.model(build, opset=s.pick(16, 18, 20))


@strategy("disentangled_attention_by_plugin")
def disentangled(s: Sketch) -> Case:
    """Lengths that are a multiple of 64 and others; distances in buckets, in others, or as they are."""
    length = s.pick(64, 64, 64, 128, 32)
    span = s.pick(16, 32, 128, 130)
    far = np.arange(length)[:, None] - np.arange(length)[None, :]
    index = s.pick(buckets(length, span), buckets(length, span), np.clip(far + span, 0, 2 * span - 1))
    lead = [s.integer(1, 2) for _ in range(s.integer(1, 2))]
    rank, depth = len(lead) + 2, 2
    scale = F32(s.pick(3.0, 1.5, 0.5))
    for name in ("query", "key"):
        s.input(name, "float32", [*lead, length, depth], static=True)
    s.input("places", "float32", [depth, 2 * span])
    inside, whole, masked, divided = s.flag(), s.flag(), s.flag(), s.flag()
    turn = [*range(rank - 2), rank - 1, rank - 2]

    def scaled(g: Builder, x: gs.Tensor) -> gs.Tensor:
        return g.op.Div(x, scale) if divided else g.op.Mul(F32(1) / scale, x)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        key = g.op.Transpose(t["key"], perm=turn)
        content = g.op.MatMul(t["query"], scaled(g, key) if inside else key)
        content = content if inside else scaled(g, content)
        both = []
        for name, places in (("query", index), ("key", index.T)):
            expanded = g.op.Expand(g.constant(np.ascontiguousarray(places)), np.array([*lead, length, length]))
            both.append(g.op.GatherElements(g.op.MatMul(t[name], t["places"]), expanded, axis=s_axis))
        both[1] = g.op.Transpose(both[1], perm=turn)
        total = scaled(g, g.op.Add(*both)) if whole else g.op.Add(scaled(g, both[0]), scaled(g, both[1]))
        total = g.op.Add(content, total)
        if masked:
            total = g.op.Add(total, g.constant(np.linspace(0, 1, length, dtype=F32)))
        return g.op.Softmax(total, axis=-1)

    s_axis = s.pick(-1, rank - 1)
    return s.model(build, opset=s.pick(13, 18, 20))


# --- normalisation -------------------------------------------------------------------------------------------------


@strategy("instance_normalization_for_the_plugin")
def instances(s: Sketch) -> Case:
    channels = s.integer(1, 4)
    s.input("x", "float32", [s.integer(1, 3), channels, *s.sizes(1, 4, low=2)])
    if not isinstance(s.inputs["x"][1][1], int):
        s.inputs["x"][1][1] = channels
    s.operand("scale", s.values("float32", [channels]))
    s.operand("bias", s.values("float32", [channels]))
    epsilon = s.pick(None, 1e-5, 0.1)
    return s.model(
        lambda g, t: g.op.InstanceNormalization(t["x"], t["scale"], t["bias"], epsilon=epsilon), opset=s.pick(13, 20)
    )
