"""Detection heads that keep a fixed number of results, as exporters write them: examples of ``plugins_nms``."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, example
from passes.rules.plugins_nms import nms_as_efficient_nms as nms

FLOAT = np.float32


def kept_boxes(g: Builder, boxes: gs.Tensor, scores: gs.Tensor, iou: float, **attrs: int) -> gs.Tensor:
    """``torchvision.ops.nms``: the indices of the kept boxes, best first."""
    batch = (g.unsqueeze(boxes, [0]), g.unsqueeze(scores, [0, 1]))
    chosen = g.op.NonMaxSuppression(
        *batch, g.constant([np.iinfo(np.int64).max]), g.constant(np.array([iou], FLOAT)), **attrs
    )
    return g.squeeze(g.op.Gather(chosen, [2], axis=1), [1])


@nms.example
def first_of_the_kept_and_of_rows_of_zeros() -> gs.Graph:
    def build(g: Builder, boxes: gs.Tensor, scores: gs.Tensor) -> gs.Tensor:
        kept = kept_boxes(g, boxes, scores, 0.3)
        found = g.op.Concat(g.op.Gather(boxes, kept), g.unsqueeze(g.op.Gather(scores, kept), [1]), axis=1)
        return g.slice(g.op.Concat(found, np.zeros([6, 5], FLOAT), axis=0), [0], [6], [0], [1])

    return example({"boxes": ("float32", [20, 4]), "scores": ("float32", [20])}, build)


@nms.example
def classes_kept_apart_by_an_offset() -> gs.Graph:
    """``torchvision.ops.batched_nms``, and what Ultralytics does: boxes of different classes are moved apart."""

    def build(g: Builder, predictions: gs.Tensor) -> list[gs.Tensor]:
        rows = g.op.Transpose(g.squeeze(predictions, [0]), perm=[1, 0])
        centre, size = g.slice(rows, [0], [2], [1], [1]), g.op.Abs(g.slice(rows, [2], [4], [1], [1]))
        half = g.op.Div(size, FLOAT(2))
        boxes = g.op.Concat(g.op.Sub(centre, half), g.op.Add(centre, half), axis=1)
        of_classes = g.slice(rows, [4], [99], [1], [1])
        scores, label = g.reduce("ReduceMax", of_classes, [1]), g.op.ArgMax(of_classes, axis=1, keepdims=0)
        label = g.cast(g.unsqueeze(label, [1]), FLOAT)
        kept = kept_boxes(g, g.op.Add(boxes, g.op.Mul(label, FLOAT(7680))), scores, 0.5)
        columns = [boxes, g.unsqueeze(scores, [1]), label]
        places = g.unsqueeze(kept, [1])
        found = g.op.Concat(*(g.op.GatherND(item, places) for item in columns), axis=1)
        best, where = g.op.TopK(
            g.op.Concat(g.op.Gather(found, np.array(4), axis=1), np.zeros(8, FLOAT), axis=0), [8], outputs=2
        )
        padded = g.op.Concat(found, np.zeros([8, 6], FLOAT), axis=0)
        return [g.op.Gather(padded, where, axis=0), best]

    return example({"predictions": ("float32", [1, 7, 30])}, build)


@nms.example
def best_of_all_classes_of_each_image() -> gs.Graph:
    """MMDeploy's: the selected boxes of all images, each image's own among them, a row of zeros, and the best few."""

    def build(g: Builder, boxes: gs.Tensor, scores: gs.Tensor) -> list[gs.Tensor]:
        chosen = g.op.NonMaxSuppression(
            boxes, scores, g.constant([5]), g.constant(np.array([0.5], FLOAT)), g.constant(np.array([0.05], FLOAT))
        )
        image, label, box = (g.op.Gather(chosen, np.array(index), axis=1) for index in range(3))
        score = g.op.GatherND(scores, g.op.Concat(*(g.unsqueeze(item, [1]) for item in (image, label, box)), axis=1))
        corners = g.op.GatherND(boxes, g.op.Concat(g.unsqueeze(image, [1]), g.unsqueeze(box, [1]), axis=1))
        found = g.unsqueeze(g.op.Concat(corners, g.unsqueeze(score, [1]), axis=1), [0])
        own = g.op.Equal(g.unsqueeze(image, [0]), g.constant([[0], [1]]))
        found = g.op.Where(g.unsqueeze(own, [2]), g.op.Tile(found, [2, 1, 1]), FLOAT(0))
        labels = g.op.Where(own, g.op.Tile(g.unsqueeze(label, [0]), [2, 1]), np.int64(-1))
        found = g.op.Concat(found, np.zeros([2, 1, 5], FLOAT), axis=1)
        labels = g.op.Concat(labels, np.zeros([2, 1], np.int64), axis=1)
        _, best = g.op.TopK(g.op.Gather(found, np.array(4), axis=2), [4], axis=1, outputs=2)
        places = g.op.Concat(g.op.Expand(g.constant([[[0]], [[1]]]), [2, 4, 1]), g.unsqueeze(best, [2]), axis=2)
        return [g.op.GatherND(found, places), g.op.GatherND(labels, places)]

    return example({"boxes": ("float32", [2, 12, 4]), "scores": ("float32", [2, 3, 12])}, build)


@nms.example
def mask_of_the_kept_of_any_number_of_images() -> gs.Graph:
    """``mask[kept] = 1``, then the best of ``scores * mask``: without a trace of how many were kept."""

    def build(g: Builder, boxes: gs.Tensor, scores: gs.Tensor) -> list[gs.Tensor]:
        chosen = g.op.NonMaxSuppression(
            boxes, scores, g.constant([4]), g.constant(np.array([0.4], FLOAT)), center_point_box=1
        )
        number = g.slice(g.op.Shape(chosen), [0], [1], [0], [1])
        ones = g.op.ConstantOfShape(number, value=gs.Constant("", np.ones(1, FLOAT)))
        mask = g.op.ScatterND(g.op.Mul(scores, FLOAT(0)), chosen, ones)
        values, _ = g.op.TopK(g.op.Mul(g.op.Sigmoid(scores), mask), [3], outputs=2)
        return [values, g.op.ReduceMax(g.op.GatherND(scores, chosen), keepdims=0)]

    return example({"boxes": ("float32", ["n", 9, 4]), "scores": ("float32", ["n", 2, 9])}, build)


@nms.example
def scores_above_a_negative_threshold() -> gs.Graph:
    """Logits, of which those above -1 are kept, in three classes."""

    def build(g: Builder, boxes: gs.Tensor, scores: gs.Tensor) -> list[gs.Tensor]:
        limits = (g.constant([6]), g.constant(np.array([0.5], FLOAT)), g.constant(np.array([-1], FLOAT)))
        chosen = g.op.NonMaxSuppression(boxes, scores, *limits)
        padded = g.op.Concat(chosen, np.zeros([12, 3], np.int64), axis=0)
        return [g.slice(padded, [0], [12], [0], [1]), g.op.Shape(chosen)]

    return example({"boxes": ("float32", [2, 9, 4]), "scores": ("float32", [2, 3, 9])}, build)


@nms.example
def padded_by_what_is_missing() -> gs.Graph:
    """``F.pad(kept, (0, 10 - len(kept)), value=-1)``, and how many there are."""

    def build(g: Builder, boxes: gs.Tensor, scores: gs.Tensor) -> list[gs.Tensor]:
        kept = kept_boxes(g, boxes, scores, 0.2)
        number = g.op.Shape(kept)
        missing = g.op.Sub(g.constant([10]), number)
        padded = g.op.Pad(kept, g.op.Concat(g.constant([0]), missing, axis=0), g.constant(-1))
        return [padded, g.op.Shape(kept)]

    return example({"boxes": ("float32", [10, 4]), "scores": ("float32", [10])}, build)
