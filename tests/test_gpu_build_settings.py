"""Settings that only a GPU can show to have reached the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import BuildError
from bridge.precision import default_tolerance
from bridge.target import gpu_compute_capabilities, installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_compute_capabilities(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(installed("tensorrt") is None, reason="the Python package 'tensorrt' is not installed"),
    pytest.mark.skipif(
        getattr(installed("tensorrt"), "strongly_typed", False), reason="this TensorRT is strongly typed"
    ),
]

IMAGE = torch.randn(8, 64, 56, 56)


class Net(nn.Module):
    """Large enough that kernels of lower precision are the faster ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(64, 128, 3), nn.Conv2d(128, 128, 3), nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.second(torch.relu(self.first(image))))
        return self.head(features.mean((2, 3)))


def convert(folder: Path, **options: Any) -> bridge.ConversionResult:
    return bridge.convert(Net(), (IMAGE,), workdir=folder, target="tensorrt", cache=False, **options)


def loaded(result: bridge.ConversionResult) -> Any:
    """TensorRT's own engine."""
    import tensorrt as trt

    from bridge.runtime.logger import trt_logger

    assert result.status == "verified", result.error
    assert result.engine is not None
    runtime = trt.Runtime(trt_logger(trt))
    engine = runtime.deserialize_cuda_engine(result.engine.read_bytes())
    assert engine is not None
    return engine


def layers(result: bridge.ConversionResult) -> str:
    """What TensorRT says of the engine's layers, the formats of their tensors included."""
    import tensorrt as trt

    engine = loaded(result)  # an inspector does not keep it alive
    words: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return words.lower()


def in_half(result: bridge.ConversionResult) -> bool:
    return any(word in layers(result) for word in ("fp16", "half"))


def test_precision_fp16_changes_the_engine_and_what_it_computes(tmp_path: Path) -> None:
    full, half = convert(tmp_path / "fp32"), convert(tmp_path / "fp16", precision="fp16")
    assert not in_half(full) and in_half(half)
    errors = [
        [item.max_abs_error or 0.0 for item in one.comparisons if item.candidate == "engine"] for one in (full, half)
    ]
    assert max(errors[0]) < max(errors[1]), errors
    used = [item.tolerance for item in half.comparisons if item.candidate == "engine"]
    assert used == [default_tolerance("fp16")]


@pytest.mark.parametrize("algorithm", ["ENTROPY_CALIBRATION_2", "MINMAX_CALIBRATION"])
def test_int8_is_calibrated_by_tensorrt_with_the_given_inputs(tmp_path: Path, algorithm: str) -> None:
    typical = [(torch.randn(8, 64, 56, 56),) for _ in range(3)]
    options: dict[str, Any] = {"calibration": typical, "calibration_algorithm": algorithm}
    result = convert(tmp_path, precision="int8+fp16", **options)
    assert "int8" in layers(result)
    assert (tmp_path / "calibration.cache").read_text().startswith("TRT-")
    (judged,) = [item for item in result.comparisons if item.candidate == "engine"]
    assert judged.agreed and "judged as a whole" in judged.note and (judged.max_abs_error or 0) > 0


def test_a_dynamic_model_is_calibrated_at_the_shape_of_its_example(tmp_path: Path) -> None:
    shape = (64, 56, 56)
    profiles = [{"image": ((1, *shape), (2, *shape), (4, *shape))}, {"image": ((8, *shape), (8, *shape), (16, *shape))}]
    options = {"precision": "int8", "calibration_algorithm": "ENTROPY_CALIBRATION_2"}
    result = convert(tmp_path, profiles=profiles, **options)
    assert "int8" in layers(result) and loaded(result).num_optimization_profiles == 2
    assert any("calibrated with the example inputs alone" in note for note in result.notes), result.notes


def test_each_of_two_profiles_runs_at_its_ends(tmp_path: Path) -> None:
    shape = (64, 56, 56)
    profiles = [{"image": ((1, *shape), (1, *shape), (2, *shape))}, {"image": ((8, *shape), (8, *shape), (12, *shape))}]
    result = convert(tmp_path, profiles=profiles)
    engine = loaded(result)
    assert engine.num_optimization_profiles == 2
    ran = [(item.inputs, item.candidate_shape[0]) for item in result.comparisons if item.candidate == "engine"]
    assert ran == [("example", 8), ("profile 0 min", 1), ("profile 0 max", 2), ("profile 1 max", 12)]


def test_an_engine_is_refittable_where_that_is_asked_for(tmp_path: Path) -> None:
    engines = [loaded(convert(tmp_path / str(flag), builder={"refittable": flag})) for flag in (False, True)]
    assert [engine.refittable for engine in engines] == [False, True]


@pytest.mark.parametrize(
    "builder",
    [
        {"workspace": 1 << 26},
        {"tf32": True, "sparsity": True},
        {"avg_timing_iterations": 2},
        {"device_types": {"head": "GPU"}},
    ],
)
def test_with_each_setting_the_engine_agrees(tmp_path: Path, builder: dict[str, Any]) -> None:
    result = convert(tmp_path, builder=builder, tolerance=bridge.Tolerance(1e-2, 1e-2))
    assert result.status == "verified", result.error


def test_strict_types_build_in_half_precision(tmp_path: Path) -> None:
    assert in_half(convert(tmp_path, precision="fp16", builder={"strict_types": True}))


def test_a_dla_that_is_not_there_is_refused_before_the_build(tmp_path: Path) -> None:
    result = convert(tmp_path, precision="fp16", builder={"default_device": "DLA", "gpu_fallback": True})
    if result.status == "verified":
        pytest.skip("this machine has a DLA")
    assert isinstance(result.exception, BuildError) and "there is no DLA on this machine" in str(result.error)
