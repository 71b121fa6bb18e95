"""The rules of neural networks' operators over their forms: what ONNX Runtime or torch computes, and an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from passes import all_rules
from passes.framework import example
from passes.model import to_proto, write
from tests.support import convert, example_inputs
from tests.test_rule_families import check, check_declined

# --- pooling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[2, 3, 9, 8], ["n", 3, "h", "w"]])
@pytest.mark.parametrize(
    "windows",
    [
        {"kernel_shape": [3, 2], "strides": [2, 3], "ceil_mode": 1},
        {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
        {"kernel_shape": [3, 3], "dilations": [1, 2], "pads": [1, 2, 1, 2]},
        {"kernel_shape": [2, 2], "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    ],
)
def test_maxima_have_their_places_in_images_of_any_size(
    shape: list[Any], windows: dict[str, Any], tmp_path: Path
) -> None:
    graph = example({"x": ("float32", shape)}, lambda g, x: list(g.node("MaxPool", [x], windows, 2)))
    x = np.random.default_rng(0).integers(0, 5, [2, 3, 9, 8]).astype(np.float32)  # many are equal
    check(graph, tmp_path, "maxpool_with_indices_as_slices", {"x": x}, builds=shape[0] == 2)


def test_places_in_four_axes_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    """ONNX Runtime pools at most three, and ONNX's evaluator has other places."""
    graph = example(
        {"x": ("float32", [2, 3, 3, 4, 3, 2])}, lambda g, x: list(g.op.MaxPool(x, kernel_shape=[2] * 4, outputs=2))
    )
    feeds = example_inputs(to_proto(graph))
    windows = np.lib.stride_tricks.sliding_window_view(feeds["x"], (2, 2, 2, 2), (2, 3, 4, 5))
    places = np.lib.stride_tricks.sliding_window_view(
        np.arange(feeds["x"].size).reshape(feeds["x"].shape), (2, 2, 2, 2), (2, 3, 4, 5)
    )
    flat, where = windows.reshape(*windows.shape[:6], -1), places.reshape(*places.shape[:6], -1)
    first = flat.argmax(-1)[..., None]
    expected = [flat.max(-1), np.take_along_axis(where, first, -1)[..., 0]]
    names = [tensor.name for tensor in graph.outputs]
    check(graph, tmp_path, "maxpool_with_indices_as_slices", feeds, dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize("power", [1, 2, 3, 5])
@pytest.mark.parametrize("dilations", [[1], [2]])
def test_powers_are_pooled_over_sequences(power: int, dilations: list[int], tmp_path: Path) -> None:
    attrs = {"p": power, "kernel_shape": [3], "strides": [2], "pads": [1, 0], "dilations": dilations}
    graph = example({"x": ("float32", ["n", 3, 9])}, lambda g, x: g.op.LpPool(x, **attrs))
    check(graph, tmp_path, "lppool_of_any_power")


# --- Resize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 5), (16, 40), (1, 1)])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_antialiasing_of_images_of_any_size_is_torchs(
    mode: str, aligned: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    attrs = {"mode": mode, "antialias": 1, "exclude_outside": 1, "cubic_coeff_a": -0.5}
    attrs["coordinate_transformation_mode"] = "align_corners" if aligned else "half_pixel"
    graph = example(
        {"x": ("float32", ["n", 3, "h", "w"])},
        lambda g, x: g.op.Resize(x, None, None, list(size), axes=[2, 3], **attrs),
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 21)).astype(np.float32)
    y = torch.nn.functional.interpolate(
        torch.from_numpy(x),
        size,
        mode={"linear": "bilinear", "cubic": "bicubic"}[mode],
        align_corners=aligned,
        antialias=True,
    )
    check(graph, tmp_path, "resize_as_matmul", {"x": x}, {graph.outputs[0].name: y.numpy()}, tolerance=3e-6)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_the_aspect_ratio_is_kept_whatever_the_size(policy: str, mode: str, tmp_path: Path) -> None:
    attrs = {"mode": mode, "keep_aspect_ratio_policy": policy, "axes": [2, 3]}
    graph = example({"x": ("float32", [1, 2, "h", "w"])}, lambda g, x: g.op.Resize(x, None, None, [7, 8], **attrs))
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 9)).astype(np.float32)
    check(graph, tmp_path, "resize_as_matmul", {"x": x})


def test_bytes_between_bytes_are_declined(tmp_path: Path) -> None:
    graph = example(
        {"x": ("uint8", [1, 2, 5, 6])},
        lambda g, x: g.op.Resize(x, None, g.constant(np.array([1, 1, 2, 2], np.float32)), mode="linear"),
    )
    check_declined(graph, tmp_path, "resize_as_matmul", "cast to float32")


# --- regions, Fourier, norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("how", ["half_pixel", "output_half_pixel"])
def test_regions_beyond_the_image_are_averaged_as_onnx_runtime_does(ratio: int, how: str, tmp_path: Path) -> None:
    rois = np.array([[-4, -3, 30, 25], [1, 1, 1, 1], [3, 2, 4, 9], [8, 7, 20, 20]], np.float32)
    attrs = {"output_height": 3, "output_width": 2, "sampling_ratio": ratio, "coordinate_transformation_mode": how}
    graph = example(
        {"x": ("float32", [2, 3, 8, 9]), "rois": ("float32", ["r", 4])},
        lambda g, x, rois: g.op.RoiAlign(x, rois, g.constant([0, 1, 1, 0]), **attrs),
        16,
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 9)).astype(np.float32)
    check(graph, tmp_path, "roi_align_as_matmul", {"x": x, "rois": rois}, builds=False)


@pytest.mark.parametrize("length", [1, 2, 9, 16])
@pytest.mark.parametrize(("parts", "attrs"), [(1, {"onesided": 1}), (2, {}), (2, {"inverse": 1})])
def test_a_dft_of_dynamic_length_is_numpys(length: int, parts: int, attrs: dict[str, int], tmp_path: Path) -> None:
    graph = example({"x": ("float32", [2, "t", 3, parts])}, lambda g, x: g.op.DFT(x, None, g.constant(1), **attrs))
    x = np.random.default_rng(0).standard_normal((2, length, 3, parts)).astype(np.float32)
    signal = x[..., 0] + (1j * x[..., 1] if parts == 2 else 0)
    y = (np.fft.ifft if attrs.get("inverse") else np.fft.fft)(signal, axis=1)
    y = y[:, : length // 2 + 1] if attrs.get("onesided") else y
    expected = {graph.outputs[0].name: np.stack([y.real, y.imag], -1).astype(np.float32)}
    check(graph, tmp_path, "dft_as_matmul", {"x": x}, expected)


def test_the_maximum_over_regions_needs_a_number_of_samples(tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", [1, 3, 8, 9]), "rois": ("float32", [1, 4])},
        lambda g, x, rois: g.op.RoiAlign(x, rois, g.constant([0]), mode="max"),
        16,
    )
    check_declined(graph, tmp_path, "roi_align_as_matmul", "set sampling_ratio")


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_batch_statistics_are_torchs(rank: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shape = [6, 3, 4, 2, 5][:rank]
    graph = example(
        {"x": ("float32", ["n", *shape[1:]]), "scale": ("float32", [3]), "bias": ("float32", [3])},
        lambda g, x, scale, bias: g.node(
            "BatchNormalization",
            [x, scale, bias, np.zeros(3, np.float32), np.ones(3, np.float32)],
            {"training_mode": 1},
            3,
        )[0],
        15,
    )
    feeds = example_inputs(to_proto(graph), dynamic=6)
    x, scale, bias = (torch.from_numpy(feeds[name]) for name in ("x", "scale", "bias"))
    y = torch.nn.functional.batch_norm(x, None, None, scale, bias, training=True)
    check(graph, tmp_path, "batchnorm_of_the_batch", feeds, {graph.outputs[0].name: y.numpy()})


@pytest.mark.parametrize("model", all_rules()["recurrent_layer_with_time_first"].examples)
def test_a_file_that_onnx_runtime_has_no_layer_for_is_held_to_onnxs_evaluator(
    model: Callable[[], gs.Graph], tmp_path: Path
) -> None:
    write(model(), tmp_path / "model.onnx")
    result = convert(tmp_path / "model.onnx", workdir=tmp_path / "out", build=False)
    assert result.status == "rewritten", result.error
    assert result.comparisons and all(item.agreed for item in result.comparisons)
