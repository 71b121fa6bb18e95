"""TensorRT's stock plugins on a GPU: what their reference bodies say is what they compute."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import bridge
from bridge.target import gpu_compute_capabilities, installed
from passes import write
from passes.framework import Builder, example
from passes.plugins import PLUGINS
from passes.rules import plugins_instance, plugins_nms_examples, plugins_rows_mask
from passes.rules.plugins_deberta import buckets, scores_model
from passes.rules.plugins_deformable import attention_model
from tests.test_plugin_rules import (
    NEEDED,
    REFUSED,
    detections,
    first_few,
    mmdeploy,
    ssd,
    two_stages,
    ultralytics,
    yolo,
)

F32 = np.float32


def needs(plugin: str) -> pytest.MarkDecorator:
    """Skips where the installed TensorRT lacks the plugin, or has an operator for it that is preferred."""
    target = installed("tensorrt") if gpu_compute_capabilities() else None
    lacking = target is None or not target.has_plugin(plugin, "1") or target.takes("NonMaxSuppression")
    return pytest.mark.skipif(lacking, reason=f"no TensorRT before 8.6 with the plugin {plugin} here")


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_compute_capabilities(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(installed("tensorrt") is None, reason="the Python package 'tensorrt' is not installed"),
]


def assert_verified(
    graph: gs.Graph, folder: Path, plugin: str, inputs: Mapping[str, np.ndarray] | None = None, **options: Any
) -> None:
    """An engine comes out that calls the plugin (or, where the parser makes it, the operator), and agrees."""
    write(graph, folder / "model.onnx")
    result = bridge.convert(
        folder / "model.onnx", dict(inputs or {}), workdir=folder / "out", target="tensorrt", **options
    )
    assert result.status == "verified", result.error
    assert plugin in [node.op_type for node in onnx.load(folder / "out" / "rewritten.onnx").graph.node]
    compared = [item for item in result.comparisons if item.candidate == "engine"]
    assert compared and all(item.agreed for item in compared), compared


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(F32)}


# --- EfficientNMS_TRT ----------------------------------------------------------------------------------------------


@needs("EfficientNMS_TRT")
@pytest.mark.parametrize("lowest", [0, -0.5], ids=str)
@pytest.mark.parametrize("threshold", [None, -0.2, 0.0, 0.003, 0.6, 2.0], ids=str)
@pytest.mark.parametrize(("count", "classes"), [(1, 1), (1, 3), (2, 1), (3, 4)])
def test_nms_gives_what_onnx_selects_in_its_order(
    count: int, classes: int, threshold: Any, lowest: float, tmp_path: Path
) -> None:
    random = np.random.default_rng(count)
    scores = (random.permutation(count * classes * 40) + 1) / (count * classes * 40) + lowest
    inputs = {"boxes": detections(random, 40, count), "scores": scores.reshape(count, classes, 40).astype(F32)}
    graph = first_few(0.45, threshold, 12, 30, classes)(40, count)
    assert_verified(graph, tmp_path, "EfficientNMS_TRT", inputs)


@needs("EfficientNMS_TRT")
def test_nms_at_its_thresholds_is_onnxs(tmp_path: Path) -> None:
    """Boxes that overlap by exactly the threshold, and scores that are exactly the threshold."""
    boxes = np.array([[[0, 0, 2, 2], [0, 0, 2, 1], [4, 4, 5, 5], [0, 0, 1, 1]]], F32)
    inputs = {"boxes": boxes, "scores": np.array([[[0.9, 0.8, 0.25, 0.7]]], F32)}
    assert_verified(first_few(0.5, 0.25, 9, 4)(4), tmp_path, "EfficientNMS_TRT", inputs)


CREATE = """
import json, sys
import numpy as np
import tensorrt
tensorrt.init_libnvinfer_plugins(None, "")
kinds = {"int": (np.int32, tensorrt.PluginFieldType.INT32), "float": (np.float32, tensorrt.PluginFieldType.FLOAT32)}
for name, attributes in json.load(sys.stdin):
    fields = []
    for key, value in attributes.items():
        dtype, kind = kinds[type(value).__name__]
        fields.append(tensorrt.PluginField(key, np.array([value], dtype), kind))
    creator = tensorrt.get_plugin_registry().get_plugin_creator(name, "1", "")
    made = creator.create_plugin(name, tensorrt.PluginFieldCollection(fields))
    print("made" if made is not None else "refused", flush=True)
"""
"""Creates plugins one after the other; a creator that aborts ends it."""


def created(wanted: list[tuple[str, dict[str, Any]]]) -> list[bool]:
    """Whether each plugin can be made with these attributes; one whose creator aborts the process cannot."""
    found: list[bool] = []
    while len(found) < len(wanted):
        child = subprocess.run(
            [sys.executable, "-c", CREATE], input=json.dumps(wanted[len(found) :]), capture_output=True, text=True
        )
        said = [line == "made" for line in child.stdout.split() if line in ("made", "refused")]
        assert said or child.returncode < 0, child.stderr
        found += said + [False] * (child.returncode < 0)
    return found


@needs("EfficientNMS_TRT")
def test_what_is_said_of_refused_attributes_is_what_creators_refuse() -> None:
    wanted, expected = [], []
    for name, values in REFUSED.items():
        given = {**PLUGINS["", name, "1"].attributes, **NEEDED.get(name, {})}
        wanted += [(name, given), *((name, {**given, key: value}) for key, value in values.items())]
        expected += [True, *[False] * len(values)]
    found = created(wanted)
    assert [one for one, made, right in zip(wanted, found, expected, strict=True) if made != right] == []


@needs("EfficientNMS_TRT")
@pytest.mark.parametrize("threshold", [None, -1.0], ids=str)
def test_nms_of_thousands_of_boxes_of_any_scores(threshold: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    boxes = detections(random, 4000)
    boxes[..., 2:] = boxes[..., :2] + (boxes[..., 2:] - boxes[..., :2]) * F32(0.1)
    scores = (random.permutation(4000).reshape(1, 1, 4000).astype(F32) - 2000) / 1000
    graph = first_few(0.5, threshold, 300, 300)(4000)
    assert_verified(graph, tmp_path, "EfficientNMS_TRT", {"boxes": boxes, "scores": scores})


@needs("EfficientNMS_TRT")
def test_nms_of_thousands_of_boxes(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    boxes = detections(random, 4000)
    boxes[..., 2:] = boxes[..., :2] + (boxes[..., 2:] - boxes[..., :2]) * F32(0.1)
    scores = random.permutation(4000).reshape(1, 1, 4000).astype(F32) / 4000
    graph = first_few(0.5, 0.3, 300, 300)(4000)
    assert_verified(graph, tmp_path, "EfficientNMS_TRT", {"boxes": boxes, "scores": scores})


@needs("EfficientNMS_TRT")
def test_nms_of_boxes_apart_by_class(tmp_path: Path) -> None:
    predictions = np.random.default_rng(0).random((1, 7, 30)).astype(F32)
    graph = plugins_nms_examples.classes_kept_apart_by_an_offset()
    assert_verified(graph, tmp_path, "EfficientNMS_TRT", {"predictions": predictions})


@needs("EfficientNMS_TRT")
def test_nms_whose_results_are_padded_by_what_is_missing(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    inputs = {"boxes": detections(random, 10)[0], "scores": random.permutation(10).astype(F32)}
    assert_verified(plugins_nms_examples.padded_by_what_is_missing(), tmp_path, "EfficientNMS_TRT", inputs)


@needs("EfficientNMS_TRT")
def test_nms_of_any_number_of_images(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    boxes = random.random((2, 9, 4)).astype(F32) * F32(0.5) + F32(0.1)
    profiles = {
        "boxes": [(count, 9, 4) for count in (1, 2, 4)],
        "scores": [(count, 2, 9) for count in (1, 2, 4)],
    }
    scores = random.permutation(36).reshape(2, 2, 9).astype(F32) / 36
    graph = plugins_nms_examples.mask_of_the_kept_of_any_number_of_images()
    inputs = {"boxes": boxes, "scores": scores}
    assert_verified(graph, tmp_path, "EfficientNMS_TRT", inputs, profiles=profiles)


@needs("EfficientNMS_TRT")
def test_an_ssd_head(tmp_path: Path) -> None:
    assert_verified(ssd(2), tmp_path, "EfficientNMS_TRT", images(2))


@needs("EfficientNMS_TRT")
def test_an_ssd_head_of_any_number_of_images(tmp_path: Path) -> None:
    profiles = {"image": [(count, 3, 32, 32) for count in (1, 2, 4)]}
    assert_verified(ssd("n"), tmp_path, "EfficientNMS_TRT", images(2), profiles=profiles)


@needs("EfficientNMS_TRT")
def test_a_yolo_head(tmp_path: Path) -> None:
    assert_verified(yolo(1), tmp_path, "EfficientNMS_TRT", images(1))


@needs("EfficientNMS_TRT")
def test_an_mmdeploy_head(tmp_path: Path) -> None:
    assert_verified(mmdeploy(2), tmp_path, "EfficientNMS_TRT", images(2))


@needs("EfficientNMS_TRT")
@pytest.mark.xfail(
    strict=True,
    reason="TensorRT 8.5.3's engine gives other rows, but not where its inner tensors are outputs",
)
def test_an_ultralytics_head(tmp_path: Path) -> None:
    assert_verified(ultralytics(2), tmp_path, "EfficientNMS_TRT", images(2))


@needs("EfficientNMS_TRT")
def test_two_stages(tmp_path: Path) -> None:
    assert_verified(two_stages(1), tmp_path, "ROIAlign_TRT", images(1))


@needs("EfficientNMS_TRT")
def test_what_a_mask_selects(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((7, 30)).astype(F32)
    graph = plugins_rows_mask.sum_and_first_of_the_selected()
    assert_verified(graph, tmp_path, "ScatterElements", {"x": x})


# --- ROIAlign_TRT --------------------------------------------------------------------------------------------------


def regions(boxes: int | str = 6, **attrs: Any) -> tuple[gs.Graph, dict[str, np.ndarray]]:
    """Boxes of which one has no area and one is partly outside, and the model."""
    random = np.random.default_rng(0)
    low = random.random((6, 2)) * 6
    corners = np.concatenate([low, low + random.random((6, 2)) * 8], 1)
    corners[1, 2:] = corners[1, :2]
    inputs = {
        "x": random.standard_normal((3, 2, 9, 11)).astype(F32),
        "boxes": corners.astype(F32),
        "images": np.array([0, 2, 1, 1, 0, 2]),
    }

    def build(g: Builder, x: gs.Tensor, boxes: gs.Tensor, images: gs.Tensor) -> gs.Tensor:
        result: gs.Tensor = g.node("RoiAlign", [x, boxes, images], attrs)
        return result

    shapes: dict[str, Any] = {"x": ("float32", [3, 2, 9, 11]), "boxes": ("float32", [boxes, 4])}
    return example({**shapes, "images": ("int64", [boxes])}, build), inputs


@needs("ROIAlign_TRT")
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("alignment", ["half_pixel", "output_half_pixel"])
def test_roi_align(alignment: str, mode: str, sampling: int, tmp_path: Path) -> None:
    graph, inputs = regions(
        output_height=3,
        output_width=2,
        spatial_scale=0.5,
        sampling_ratio=sampling,
        mode=mode,
        coordinate_transformation_mode=alignment,
    )
    assert_verified(graph, tmp_path, "ROIAlign_TRT", inputs)


@needs("ROIAlign_TRT")
def test_roi_align_of_any_number_of_boxes(tmp_path: Path) -> None:
    graph, inputs = regions("n", output_height=2, output_width=2, sampling_ratio=2)
    profiles = {"boxes": [(count, 4) for count in (1, 6, 9)], "images": [(count,) for count in (1, 6, 9)]}
    assert_verified(graph, tmp_path, "ROIAlign_TRT", inputs, profiles=profiles, int_range=(0, 2))


# --- MultiscaleDeformableAttnPlugin_TRT ----------------------------------------------------------------------------


def attended(batch: int, levels: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    length = sum(height * width for height, width in levels)
    return {
        "value": random.standard_normal((batch, length, 3, 4)).astype(F32),
        "places": (random.random((batch, 5, 3, len(levels), 2, 2)) * 1.4 - 0.2).astype(F32),
        "weights": random.random((batch, 5, 3, len(levels), 2)).astype(F32),
    }


@needs("MultiscaleDeformableAttnPlugin_TRT")
def test_deformable_attention(tmp_path: Path) -> None:
    levels = [(4, 5), (2, 3), (1, 2)]
    graph = attention_model(levels, 2, stack=True)
    assert_verified(graph, tmp_path, "MultiscaleDeformableAttnPlugin_TRT", attended(2, levels))


@needs("MultiscaleDeformableAttnPlugin_TRT")
def test_deformable_attention_of_any_number_of_images(tmp_path: Path) -> None:
    levels = [(4, 5), (2, 3)]
    inputs = attended(2, levels)
    profiles = {name: [(count, *array.shape[1:]) for count in (1, 2, 4)] for name, array in inputs.items()}
    graph = attention_model(levels, "n", stack=False)
    assert_verified(graph, tmp_path, "MultiscaleDeformableAttnPlugin_TRT", inputs, profiles=profiles)


# --- DisentangledAttention_TRT -------------------------------------------------------------------------------------


@needs("DisentangledAttention_TRT")
@pytest.mark.parametrize(("length", "span"), [(64, 128), (128, 64), (256, 128)])
def test_disentangled_attention_counts_distances_in_the_same_buckets(length: int, span: int, tmp_path: Path) -> None:
    """Scores of one query and key are all alike, so that the places gathered from decide."""
    random = np.random.default_rng(0)
    inputs = {name: random.standard_normal((2, length, 8)).astype(F32) for name in ("query", "key")}
    inputs["places"] = random.standard_normal((8, 2 * span)).astype(F32)
    graph = scores_model(buckets(length, span), 2 * span, 2)
    assert_verified(graph, tmp_path, "DisentangledAttention_TRT", inputs)


@needs("DisentangledAttention_TRT")
def test_disentangled_attention_of_heads_and_any_number_of_texts(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    inputs = {name: random.standard_normal((2, 2, 64, 8)).astype(F32) for name in ("query", "key")}
    inputs["places"] = random.standard_normal((8, 256)).astype(F32)
    profiles = {name: [(count, 2, 64, 8) for count in (1, 2, 3)] for name in ("query", "key")}
    far = np.arange(64)[:, None] - np.arange(64)[None, :]
    graph = scores_model(far + 128, 256, "n", heads=2)
    assert_verified(graph, tmp_path, "DisentangledAttention_TRT", inputs, profiles=profiles)


# --- InstanceNormalization_TRT, which the parser makes of the operator ---------------------------------------------


@needs("InstanceNormalization_TRT")
def test_instance_normalization_with_computed_scales(tmp_path: Path) -> None:
    profiles = {"x": [(count, 3, 4, 5) for count in (1, 2, 4)]}
    assert_verified(plugins_instance.scales_that_are_computed(), tmp_path, "InstanceNormalization", profiles=profiles)


@needs("InstanceNormalization_TRT")
def test_instance_normalization_over_four_axes(tmp_path: Path) -> None:
    profiles = {"x": [(count, 3, 2, 3, 2, 4) for count in (1, 2, 4)]}
    assert_verified(plugins_instance.four_spatial_axes(), tmp_path, "InstanceNormalization", profiles=profiles)


@needs("InstanceNormalization_TRT")
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 2, 3, 4)], ids=str)
def test_instance_normalization_over_one_and_three_axes(shape: tuple[int, ...], tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", shape)},
        lambda g, x: g.op.InstanceNormalization(x, np.array([1, 2, 3], F32), np.array([0, 1, -1], F32)),
    )
    assert_verified(graph, tmp_path, "InstanceNormalization")
