"""What only a GPU can show: an engine that runs is verified, and one that computes something else is found out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge import pipeline
from bridge.target import gpu_compute_capabilities, installed

from . import support

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_compute_capabilities(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(installed("tensorrt") is None, reason="the Python package 'tensorrt' is not installed"),
]

IMAGE = torch.randn(2, 3, 16, 16)
PROFILES = {"image": ((1, 3, 16, 16), (2, 3, 16, 16), (5, 3, 16, 16))}


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))


def convert(module: nn.Module, folder: Path, image: torch.Tensor = IMAGE, **options: Any) -> bridge.ConversionResult:
    return support.convert(module, (image,), workdir=folder, target="tensorrt", profiles=PROFILES, **options)


def test_an_engine_that_agrees_at_every_shape_is_verified(tmp_path: Path) -> None:
    result = convert(Net(0), tmp_path)
    assert result.status == "verified", result.error
    ran = [(item.inputs, item.candidate_shape) for item in result.comparisons if item.candidate == "engine"]
    assert ran == [("example", [2, 4]), ("min", [1, 4]), ("max", [5, 4])]
    assert all(item.agreed and item.max_abs_error is not None for item in result.comparisons)


def test_an_engine_of_another_model_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = convert(Net(1), tmp_path / "other")
    assert other.status == "verified", other.error
    honest = pipeline.build_engine

    def swapped(state: Any) -> Path:
        engine = honest(state)
        engine.unlink()  # it may be the cache's too
        shutil.copy(other.engine, engine)
        return engine

    monkeypatch.setattr(pipeline, "build_engine", swapped)
    result = convert(Net(0), tmp_path / "wrong")
    assert (result.status, result.stage) == ("failed", "compare"), result
    assert "the engine computes something else" in str(result.error)
    assert any(not item.agreed for item in result.comparisons if item.candidate == "engine")


def test_an_engine_that_does_not_run_fails_at_that_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = pipeline.build_engine

    def cut(state: Any) -> Path:
        engine = honest(state)
        content = engine.read_bytes()
        engine.unlink()
        engine.write_bytes(content[:1000])
        return engine

    monkeypatch.setattr(pipeline, "build_engine", cut)
    result = convert(Net(0), tmp_path)
    assert (result.status, result.stage) == ("failed", "run"), result.error


def test_the_task_check_runs_on_the_engine(tmp_path: Path) -> None:
    def check(run: Any) -> str:
        assert run({"image": IMAGE.numpy()})["output"].shape == (2, 4)
        return "ran"

    result = convert(Net(0), tmp_path, task_check=check)
    assert result.status == "verified", result.error
    assert result.task_check is not None and result.task_check.ran_on == "engine"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch has no CUDA")
def test_a_module_on_the_gpu_stays_there_and_is_verified(tmp_path: Path) -> None:
    module = Net(0).cuda()
    result = convert(module, tmp_path, IMAGE.cuda())
    assert result.status == "verified", result.error
    assert {item.device.type for item in module.parameters()} == {"cuda"}


class Sorted(nn.Module):
    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.sort(numbers, dim=1)[0]


def test_integers_are_sorted(tmp_path: Path) -> None:
    numbers = torch.randint(0, 100, (2, 10), generator=torch.Generator().manual_seed(0))
    result = bridge.convert(Sorted(), (numbers,), workdir=tmp_path, target="tensorrt")
    assert result.status == "verified", result.error
