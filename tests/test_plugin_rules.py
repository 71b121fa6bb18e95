"""Patterns that become TensorRT's stock plugins: whole detection heads, and what the plugins' kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import bridge
from bridge import target as targets
from passes import Log, read, rewrite, write
from passes.framework import Builder, example
from passes.model import to_proto
from passes.plugins import PLUGINS, PluginMisfit, plugin_calls
from passes.rules import plugins_nms
from passes.rules.plugins_deberta import buckets, scores_model
from passes.rules.plugins_deformable import attention_model
from passes.rules.plugins_nms_examples import kept_boxes
from tests import plugin_kernels
from tests.support import fitted, run_onnx

OLD = targets.resolve("tensorrt-8.5")
F32 = np.float32

Arrays = dict[str, np.ndarray]


def rewritten(graph: gs.Graph, folder: Path) -> tuple[onnx.ModelProto, onnx.ModelProto, gs.Graph, Log]:
    """The model before and after, and the graph with the log."""
    before = to_proto(graph)
    write(graph, folder / "before.onnx")
    after = read(folder / "before.onnx")
    log = rewrite(after, OLD)
    write(after, folder / "after.onnx")
    model = onnx.load(folder / "after.onnx")
    onnx.checker.check_model(model)
    return before, model, after, log


def assert_equal(before: onnx.ModelProto, after: onnx.ModelProto, feeds: Arrays, tolerance: float = 1e-5) -> None:
    expected, found = run_onnx(before, feeds), run_onnx(after, fitted(after, feeds))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance, err_msg=name)


def detections(random: np.random.Generator, count: int, images: int = 1) -> np.ndarray:
    """Corners of boxes in a unit square, many of which overlap."""
    low = random.random((images, count, 2)) * 0.6
    return np.concatenate([low, low + 0.1 + random.random((images, count, 2)) * 0.5], -1).astype(F32)


# --- non-maximum suppression ---------------------------------------------------------------------------------------


def first_few(iou: float, threshold: float | None, most: int, keep: int, classes: int = 1) -> Callable[..., gs.Graph]:
    """Boxes, scores and labels of the first ``keep`` of what is selected, then zeros."""

    def model(count: int, images: int = 1) -> gs.Graph:
        def build(g: Builder, boxes: gs.Tensor, scores: gs.Tensor) -> list[gs.Tensor]:
            limits = [g.constant([most]), g.constant(np.array([iou], F32))]
            if threshold is not None:
                limits.append(g.constant(np.array([threshold], F32)))
            chosen = g.op.NonMaxSuppression(boxes, scores, *limits)
            score = g.unsqueeze(g.op.GatherND(scores, chosen), [1])
            place = g.op.Gather(chosen, np.array([0, 2]), axis=1)
            found = g.op.Concat(g.op.GatherND(boxes, place), score, g.cast(chosen, F32), axis=1)
            return [
                g.slice(g.op.Concat(found, np.zeros([keep, 8], F32), axis=0), [0], [keep], [0], [1]),
                g.op.Shape(chosen),
            ]

        shapes = {"boxes": ("float32", [images, count, 4]), "scores": ("float32", [images, classes, count])}
        return example(shapes, build)

    return model


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.003, 0.6, 2.0])
@pytest.mark.parametrize("most", [3, 1000])
def test_the_plugins_results_are_in_onnxs_order(images, classes, threshold, most, tmp_path: Path) -> None:
    graph = first_few(0.45, threshold, most, 30, classes)(17, images)
    before, after, changed, log = rewritten(graph, tmp_path)
    assert [node.op for node in plugin_calls(changed)] == ["EfficientNMS_TRT"], log.declined
    for seed in range(4):
        random = np.random.default_rng(seed)
        scores = random.permutation(images * classes * 17).reshape(images, classes, 17) / (images * classes * 17)
        feeds = {"boxes": detections(random, 17, images), "scores": scores.astype(F32)}
        assert_equal(before, after, feeds)


def test_a_threshold_is_met_as_onnx_meets_it(tmp_path: Path) -> None:
    """Boxes that overlap by exactly the threshold, and scores that are exactly the threshold."""
    before, after, _, log = rewritten(first_few(0.5, 0.25, 9, 4)(4), tmp_path)
    assert "nms_as_efficient_nms" in log.nodes
    boxes = np.array([[[0, 0, 2, 2], [0, 0, 2, 1], [4, 4, 5, 5], [0, 0, 1, 1]]], F32)
    feeds = {"boxes": boxes, "scores": np.array([[[0.9, 0.8, 0.25, 0.7]]], F32)}
    (found, _) = run_onnx(before, feeds).values()
    assert found[:, 7].tolist()[:2] == [0, 1] and len(set(found[:3, 4])) == 3
    assert_equal(before, after, feeds)


@pytest.mark.parametrize("threshold", [None, -np.inf, -0.5])
def test_without_a_threshold_above_zero_equal_scores_are_in_the_order_of_the_boxes(threshold, tmp_path: Path) -> None:
    """Scores of every size, infinite ones too, and boxes that are the same, some without an area."""
    before, after, _, log = rewritten(first_few(0.5, threshold, 40, 40, 2)(40), tmp_path)
    assert "nms_as_efficient_nms" in log.nodes
    for seed in range(4):
        random = np.random.default_rng(seed)
        boxes = detections(random, 40)
        boxes[:, ::3] = boxes[:, :1]
        boxes[:, 1::4, 2:] = boxes[:, 1::4, :2]
        scores = random.choice([-np.inf, -3e38, -70000, -1, -0.5, 0, 1e-30, 0.25, 0.26, 3e38], (1, 2, 40)).astype(F32)
        with np.errstate(invalid="ignore"):
            assert_equal(before, after, {"boxes": boxes, "scores": scores})


def test_boxes_by_their_centre_and_corners_in_any_order(tmp_path: Path) -> None:
    def build(g: Builder, boxes: gs.Tensor, scores: gs.Tensor, centre: int) -> gs.Tensor:
        kept = kept_boxes(g, boxes, scores, 0.4, center_point_box=centre)
        return g.slice(g.op.Concat(kept, np.zeros(5, np.int64), axis=0), [0], [5], [0], [1])

    for centre in (0, 1):
        shapes = {"boxes": ("float32", [12, 4]), "scores": ("float32", [12])}
        graph = example(shapes, lambda g, boxes, scores, centre=centre: build(g, boxes, scores, centre))
        before, after, _, log = rewritten(graph, tmp_path)
        assert "nms_as_efficient_nms" in log.nodes, log.declined
        random = np.random.default_rng(centre)
        boxes = detections(random, 12)[0]
        if centre:
            boxes[:2, 2] *= -1
        else:
            boxes[::2] = boxes[::2][:, [2, 3, 0, 1]]
        assert_equal(before, after, {"boxes": boxes, "scores": random.permutation(12).astype(F32)})


def test_results_that_leave_the_model_are_declined_with_what_to_write_instead(tmp_path: Path) -> None:
    shapes = {"boxes": ("float32", [20, 4]), "scores": ("float32", [20])}
    graph = example(shapes, lambda g, boxes, scores: g.op.Gather(boxes, kept_boxes(g, boxes, scores, 0.5)))
    _, after, _, log = rewritten(graph, tmp_path)
    said = [reason for (name, _), (_, reason) in log.declined.items() if name == "nms_as_efficient_nms"]
    assert said and "let the model keep a fixed number" in said[0], log.declined
    assert any(node.op_type == "NonMaxSuppression" for node in after.graph.node)


@pytest.mark.parametrize("threshold", [0.9, None, -0.5])
def test_more_boxes_than_the_plugin_looks_at_are_declined_unless_that_is_accepted(
    threshold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = first_few(0.5, threshold, 20, 10)
    _, _, changed, log = rewritten(model(5000), tmp_path)
    assert not list(plugin_calls(changed)) and "ACCEPT_CUT" in str(log.declined), log.declined
    monkeypatch.setattr(plugins_nms, "ACCEPT_CUT", True)
    before, after, changed, _ = rewritten(model(5000), tmp_path)
    assert len(list(plugin_calls(changed))) == 1
    random = np.random.default_rng(0)
    assert_equal(before, after, {"boxes": detections(random, 5000), "scores": random.random((1, 1, 5000)).astype(F32)})


def test_as_many_boxes_as_the_plugin_looks_at_are_sorted(tmp_path: Path) -> None:
    before, after, _, log = rewritten(first_few(0.5, None, 200, 200)(4096), tmp_path)
    assert "nms_as_efficient_nms" in log.nodes and "long_topk_in_rounds" in log.nodes
    (ranks,) = (onnx.numpy_helper.to_array(item) for item in after.graph.initializer if list(item.dims) == [1, 4096])
    assert (np.diff(ranks) < 0).all() and (ranks == ranks.astype(np.float16)).all(), "half precision makes some equal"
    random = np.random.default_rng(0)
    boxes = detections(random, 4096)
    boxes[..., 2:] = boxes[..., :2] + (boxes[..., 2:] - boxes[..., :2]) * F32(0.1)
    assert_equal(before, after, {"boxes": boxes, "scores": random.standard_normal((1, 1, 4096)).astype(F32)})


@pytest.mark.parametrize("threshold", [0.3, None, -0.5])
@pytest.mark.parametrize("classes", [1, 3])
def test_any_number_of_boxes_and_images_where_the_cut_is_accepted(
    classes, threshold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins_nms, "ACCEPT_CUT", True)
    graph = first_few(0.5, threshold, 20, 10, classes)(7, 2)
    for tensor, axis in zip(graph.inputs, (1, 2), strict=True):
        tensor.shape = ["images", *tensor.shape[1:axis], "boxes", *tensor.shape[axis + 1 :]]
    before, after, changed, log = rewritten(graph, tmp_path)
    assert len(list(plugin_calls(changed))) == 1, log.declined
    random = np.random.default_rng(0)
    for images, count in ((1, 4), (3, 50)):
        feeds = {"boxes": detections(random, count, images)}
        feeds["scores"] = random.random((images, classes, count)).astype(F32) - F32(0.2 if threshold is None else 0)
        assert_equal(before, after, feeds)


# --- what the plugins' kernels compute -----------------------------------------------------------------------------


def assert_kernels_agree(graph: gs.Graph, folder: Path, feeds: Arrays, tolerance: float = 1e-5) -> None:
    """With the plugins as they compute, the rewritten model still gives what the model gave."""
    before, after, _, _ = rewritten(graph, folder)
    expected = run_onnx(before, feeds)
    found = plugin_kernels.run(after, fitted(after, feeds))
    for (name, array), other in zip(expected.items(), found, strict=True):
        assert np.abs(array).max() > 0, f"{name} says nothing"
        np.testing.assert_allclose(other, array, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("threshold", [None, -0.2, 0.0, 0.003, 0.6])
@pytest.mark.parametrize(("images", "classes"), [(1, 1), (2, 3)])
def test_efficient_nms_as_it_is_gives_what_onnx_selects(threshold, images, classes, tmp_path: Path) -> None:
    """Its scores below a low threshold come as results too, and it compares with ``>=``."""
    random = np.random.default_rng(0)
    scores = random.permutation(images * classes * 12).reshape(images, classes, 12) / (images * classes * 12) - 0.25
    feeds = {"boxes": detections(random, 12, images), "scores": scores.astype(F32)}
    assert_kernels_agree(first_few(0.4, threshold, 9, 30, classes)(12, images), tmp_path, feeds)


REFUSED = {
    "EfficientNMS_TRT": {
        "score_threshold": -1e-3,
        "iou_threshold": 0.0,
        "max_output_boxes": 0,
        "score_activation": 2,
        "box_coding": 2,
    },
    "ROIAlign_TRT": {
        "coordinate_transformation_mode": 2,
        "mode": 2,
        "output_height": 0,
        "output_width": 0,
        "sampling_ratio": -1,
        "spatial_scale": 0.0,
    },
    "DisentangledAttention_TRT": {"span": -1, "factor": 1 - 1e-9},  # which is 1 in single precision
}
NEEDED = {"EfficientNMS_TRT": {"max_output_boxes": 3}, "DisentangledAttention_TRT": {"span": 4, "factor": 0.5}}


@pytest.mark.parametrize(
    ("name", "attribute"), [(name, attribute) for name, values in REFUSED.items() for attribute in values]
)
def test_no_plugin_is_called_that_its_creator_refuses(name, attribute) -> None:
    given = NEEDED.get(name, {}) | {attribute: REFUSED[name][attribute]}
    with pytest.raises(PluginMisfit, match=attribute):
        example({"x": ("float32", [1])}, lambda g, x: g.plugin(PLUGINS["", name, "1"], [x], given))


def test_a_scale_or_size_that_the_plugin_refuses_is_declined(tmp_path: Path) -> None:
    shapes = {"x": ("float32", [1, 1, 4, 4]), "boxes": ("float32", [2, 4]), "images": ("int64", [2])}
    graph = example(shapes, lambda g, *inputs: g.node("RoiAlign", inputs, {"spatial_scale": -1.0}))
    _, _, changed, log = rewritten(graph, tmp_path)
    assert not list(plugin_calls(changed)) and "a positive scale" in str(log.declined)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("alignment", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_align_as_it_is_gives_what_onnx_does(mode, alignment, sampling, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    low = random.random((6, 2)) * 9 - 1
    boxes = np.concatenate([low, low + random.random((6, 2)) * 8], 1).astype(F32)
    boxes[1, 2:] = boxes[1, :2]  # no area
    feeds = {"x": random.standard_normal((3, 2, 9, 11)).astype(F32), "boxes": boxes, "images": np.arange(6) % 3}
    attrs = {"output_height": 3, "output_width": 2, "spatial_scale": 0.5, "sampling_ratio": sampling, "mode": mode}
    attrs["coordinate_transformation_mode"] = alignment
    shapes = {name: (str(array.dtype), list(array.shape)) for name, array in feeds.items()}
    graph = example(shapes, lambda g, *inputs: g.node("RoiAlign", inputs, attrs))
    assert_kernels_agree(graph, tmp_path, feeds)


def test_deformable_attention_as_it_is_gives_what_sampling_does(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    graph = attention_model([(4, 5), (2, 3), (1, 2)], 2, stack=True)
    feeds = {item.name: random.standard_normal(item.shape).astype(F32) for item in graph.inputs}
    feeds["places"] = (random.random(feeds["places"].shape) * 1.6 - 0.3).astype(F32)
    assert_kernels_agree(graph, tmp_path, feeds)


@pytest.mark.parametrize(("length", "span"), [(64, 128), (128, 64), (512, 256)])
def test_disentangled_attention_as_it_is_counts_the_same_distances(length, span, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    graph = scores_model(buckets(length, span), 2 * span, 2)
    feeds = {item.name: random.standard_normal(item.shape).astype(F32) for item in graph.inputs}
    assert_kernels_agree(graph, tmp_path, feeds, 1e-4)


@pytest.mark.parametrize(("length", "span"), [(64, 64), (128, 96), (64, 16)])
def test_distances_that_versions_of_the_plugin_count_differently_are_declined(length, span, tmp_path: Path) -> None:
    _, _, changed, log = rewritten(scores_model(buckets(length, span), 2 * span, 2), tmp_path)
    assert not list(plugin_calls(changed)) and "versions of the plugin differ" in str(log.declined)


# --- whole detection heads, by convert -----------------------------------------------------------------------------


def head(g: Builder, image: gs.Tensor, channels: int) -> gs.Tensor:
    """A convolution and what becomes of it by row: [n, cells, channels]."""
    random = np.random.default_rng(7)
    weight = g.constant(random.standard_normal((channels, 3, 4, 4)).astype(F32) / 3)
    cells = g.op.Conv(image, weight, strides=[4, 4])
    return g.op.Transpose(g.op.Reshape(cells, np.array([0, channels, -1])), perm=[0, 2, 1])


def anchors(count: int) -> np.ndarray:
    grid = np.stack(np.meshgrid(np.arange(count), np.arange(count)), -1).reshape(-1, 2)
    return ((grid + 0.5) / count).astype(F32)


def decoded(g: Builder, rows: gs.Tensor, count: int) -> gs.Tensor:
    """Corners of the boxes of all cells."""
    centre = g.op.Add(g.constant(anchors(count)[None]), g.op.Mul(g.slice(rows, [0], [2], [2], [1]), F32(0.1)))
    half = g.op.Mul(g.op.Exp(g.slice(rows, [2], [4], [2], [1])), F32(0.2))
    return g.op.Concat(g.op.Sub(centre, half), g.op.Add(centre, half), axis=2)


def ssd(batch: int | str) -> gs.Graph:
    """Softmax over classes and a background, a mask of the selected, the best eight of each image."""

    def build(g: Builder, image: gs.Tensor) -> list[gs.Tensor]:
        rows = head(g, image, 8)
        boxes = decoded(g, rows, 8)
        shares = g.op.Softmax(g.slice(rows, [4], [8], [2], [1]), axis=2)
        scores = g.op.Transpose(g.slice(shares, [1], [4], [2], [1]), perm=[0, 2, 1])
        chosen = g.op.NonMaxSuppression(
            boxes, scores, g.constant([20]), g.constant(np.array([0.5], F32)), g.constant(np.array([0.01], F32))
        )
        number = g.slice(g.op.Shape(chosen), [0], [1], [0], [1])
        ones = g.op.ConstantOfShape(number, value=gs.Constant("", np.ones(1, F32)))
        kept = g.op.Mul(scores, g.op.ScatterND(g.op.Mul(scores, F32(0)), chosen, ones))
        values, where = g.op.TopK(g.op.Reshape(kept, np.array([0, -1])), [8], axis=1, outputs=2)
        cell = g.op.Expand(g.unsqueeze(g.op.Mod(where, np.int64(64)), [2]), np.array([1, 1, 4]))
        return [g.op.GatherElements(boxes, cell, axis=1), values, g.op.Div(where, np.int64(64))]

    return example({"image": ("float32", [batch, 3, 32, 32])}, build)


def yolo(batch: int) -> gs.Graph:
    """The best class of each cell, boxes of other classes moved away, the first ten kept or rows of zeros."""

    def build(g: Builder, image: gs.Tensor) -> gs.Tensor:
        rows = head(g, image, 9)
        boxes = g.squeeze(decoded(g, rows, 8), [0])
        shares = g.op.Sigmoid(g.squeeze(g.slice(rows, [4], [9], [2], [1]), [0]))
        classes = g.op.Mul(g.slice(shares, [1], [5], [1], [1]), g.slice(shares, [0], [1], [1], [1]))
        scores, label = g.reduce("ReduceMax", classes, [1]), g.op.ArgMax(classes, axis=1, keepdims=1)
        label = g.cast(label, F32)
        moved = g.op.Add(boxes, g.op.Mul(label, F32(16)))
        kept = kept_boxes(g, moved, scores, 0.45)
        rows = [g.op.Gather(item, kept) for item in (boxes, g.unsqueeze(scores, [1]), label)]
        padded = g.op.Concat(g.op.Concat(*rows, axis=1), np.zeros([10, 6], F32), axis=0)
        return g.slice(padded, [0], [10], [0], [1])

    return example({"image": ("float32", [batch, 3, 32, 32])}, build)


def mmdeploy(batch: int) -> gs.Graph:
    """The selected boxes of all images, those of each image by a mask, a row of zeros, the best few."""

    def build(g: Builder, image: gs.Tensor) -> list[gs.Tensor]:
        rows = head(g, image, 7)
        boxes, scores = decoded(g, rows, 8), g.op.Sigmoid(g.slice(rows, [4], [7], [2], [1]))
        _, best = g.op.TopK(g.reduce("ReduceMax", scores, [2]), [40], axis=1, outputs=2)
        boxes = g.op.GatherElements(boxes, g.op.Expand(g.unsqueeze(best, [2]), np.array([1, 1, 4])), axis=1)
        scores = g.op.GatherElements(scores, g.op.Expand(g.unsqueeze(best, [2]), np.array([1, 1, 3])), axis=1)
        scores = g.op.Transpose(scores, perm=[0, 2, 1])
        chosen = g.op.NonMaxSuppression(
            boxes, scores, g.constant([30]), g.constant(np.array([0.6], F32)), g.constant(np.array([0.05], F32))
        )
        owner, label, box = (g.op.Gather(chosen, np.array(index), axis=1) for index in range(3))
        score = g.op.GatherND(scores, g.op.Concat(*(g.unsqueeze(item, [1]) for item in (owner, label, box)), axis=1))
        corners = g.op.GatherND(boxes, g.op.Concat(g.unsqueeze(owner, [1]), g.unsqueeze(box, [1]), axis=1))
        found = g.unsqueeze(g.op.Concat(corners, g.unsqueeze(score, [1]), axis=1), [0])
        images = np.arange(batch)
        own = g.op.Equal(g.unsqueeze(owner, [0]), g.constant(images[:, None]))
        found = g.op.Where(g.unsqueeze(own, [2]), g.op.Tile(found, np.array([batch, 1, 1])), F32(0))
        labels = g.op.Where(own, g.op.Tile(g.unsqueeze(label, [0]), np.array([batch, 1])), np.int64(-1))
        found = g.op.Concat(found, np.zeros([batch, 1, 5], F32), axis=1)
        labels = g.op.Concat(labels, np.zeros([batch, 1], np.int64), axis=1)
        _, best = g.op.TopK(g.op.Gather(found, np.array(4), axis=2), [6], axis=1, outputs=2)
        place = g.op.Concat(g.constant(np.tile(images[:, None, None], (1, 6, 1))), g.unsqueeze(best, [2]), axis=2)
        return [g.op.GatherND(found, place), g.op.GatherND(labels, place)]

    return example({"image": ("float32", [batch, 3, 32, 32])}, build)


def ultralytics(batch: int) -> gs.Graph:
    """Of each image, boxes above a score, boxes of other classes moved away, the first five kept, padded by zeros."""

    def build(g: Builder, image: gs.Tensor) -> gs.Tensor:
        rows = head(g, image, 7)
        boxes, shares = decoded(g, rows, 8), g.op.Sigmoid(g.slice(rows, [4], [7], [2], [1]))
        best, labels = g.reduce("ReduceMax", shares, [2]), g.op.ArgMax(shares, axis=2, keepdims=0)
        results = []
        for index in range(batch):
            box, score, label = (g.op.Gather(item, np.array(index), axis=0) for item in (boxes, best, labels))
            places = g.op.Transpose(g.op.NonZero(g.op.Greater(score, F32(0.8))), perm=[1, 0])
            box, score, label = (g.op.GatherND(item, places) for item in (box, score, g.cast(label, F32)))
            label = g.unsqueeze(label, [1])
            kept = kept_boxes(g, g.op.Add(box, g.op.Mul(label, F32(8))), score, 0.5)
            kept = g.slice(kept, [0], [5], [0], [1])
            columns = [g.op.Gather(item, kept, axis=0) for item in (box, g.unsqueeze(score, [1]), label)]
            found = g.op.Concat(*columns, axis=1)
            missing = g.op.Sub(g.constant([5]), g.slice(g.op.Shape(found), [0], [1], [0], [1]))
            pads = g.op.Concat(g.constant([0, 0]), missing, g.constant([0]), axis=0)
            results.append(g.unsqueeze(g.op.Pad(found, pads, F32(0)), [0]))
        return g.op.Concat(*results, axis=0)

    return example({"image": ("float32", [batch, 3, 32, 32])}, build)


def two_stages(batch: int) -> gs.Graph:
    """Faster R-CNN's: proposals kept by NMS, what the map has there, classified, and the best of them."""

    def build(g: Builder, image: gs.Tensor) -> list[gs.Tensor]:
        random = np.random.default_rng(5)
        rows = head(g, image, 5)
        boxes, scores = g.squeeze(decoded(g, rows, 8), [0]), g.squeeze(g.slice(rows, [4], [5], [2], [1]), [0])
        kept = g.slice(kept_boxes(g, boxes, g.squeeze(scores, [1]), 0.5), [0], [20], [0], [1])
        found = g.op.Mul(g.op.Gather(boxes, kept, axis=0), F32(32))
        owner = g.op.Mul(kept, np.int64(0))
        attrs = {"output_height": 3, "output_width": 3, "sampling_ratio": 2}
        pooled = g.node("RoiAlign", [image, found, owner], attrs)
        pooled = g.op.Relu(g.op.Conv(pooled, g.constant(random.standard_normal((4, 3, 3, 3)).astype(F32))))
        logits = g.op.Gemm(g.op.Flatten(pooled), g.constant(random.standard_normal((4, 3)).astype(F32)))
        share = g.op.Softmax(logits, axis=1)
        best = g.op.Concat(g.reduce("ReduceMax", share, [1]), np.zeros(6, F32), axis=0)
        values, where = g.op.TopK(best, [6], outputs=2)
        return [values, g.op.Gather(g.op.Concat(found, np.zeros([6, 4], F32), axis=0), where, axis=0)]

    return example({"image": ("float32", [batch, 3, 32, 32])}, build)


HEADS: dict[str, tuple[gs.Graph, dict[str, Any]]] = {
    "ssd": (ssd(2), {}),
    "ssd of any number of images": (
        ssd("n"),
        {"profiles": {"image": ((1, 3, 32, 32), (2, 3, 32, 32), (5, 3, 32, 32))}},
    ),
    "yolo": (yolo(1), {}),
    "mmdeploy": (mmdeploy(2), {}),
    "ultralytics": (ultralytics(2), {}),
    "two stages": (two_stages(1), {}),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_detection_head_is_rewritten_with_one_plugin_for_each_selection(name, tmp_path: Path) -> None:
    graph, options = HEADS[name]
    write(graph, tmp_path / "head.onnx")
    result = bridge.convert(
        tmp_path / "head.onnx", workdir=tmp_path / "out", target="tensorrt-8.5", prove=True, **options
    )
    assert result.status == "rewritten", result.error
    assert all(proof.status == "proved" for proof in result.proofs), result.proofs
    after = onnx.load(tmp_path / "out" / "rewritten.onnx")
    ops = [node.op_type for node in after.graph.node]
    assert ops.count("EfficientNMS_TRT") == (2 if name == "ultralytics" else 1)
    assert not {"NonMaxSuppression", "NonZero"} & set(ops)
    before = onnx.load(tmp_path / "head.onnx")
    for seed in range(5):
        size = 3 if "any number" in name else before.graph.input[0].type.tensor_type.shape.dim[0].dim_value
        image = np.random.default_rng(seed).standard_normal((size, 3, 32, 32)).astype(F32)
        assert_equal(before, after, {"image": image})


@pytest.mark.parametrize("name", ["ssd", "yolo", "mmdeploy", "ultralytics", "two stages"])
def test_a_detection_head_is_the_same_with_the_plugins_as_they_are(name, tmp_path: Path) -> None:
    graph, _ = HEADS[name]
    image = np.random.default_rng(3).standard_normal((graph.inputs[0].shape[0], 3, 32, 32)).astype(F32)
    assert_kernels_agree(graph, tmp_path, {"image": image}, 1e-4)
