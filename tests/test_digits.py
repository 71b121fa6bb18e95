"""The bar of quantisation: trained models lose at most half a point of accuracy, quantised wherever they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from benchmarks import digits
from passes import read
from passes.quantisation import QUANTISABLE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["cnn", "vit"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, digits.Digits]:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = digits.Digits.load()
    module = digits.trained(request.param, data)
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp(request.param)
    x = torch.from_numpy(data.pictures[:4])
    name = "x" if request.param == "vit" else "input"
    profiles = {name: ((1, 1, 8, 8), (4, 1, 8, 8), (512, 1, 8, 8))}
    options: dict[str, Any] = {"target": "tensorrt-rtx-1.7", "build": False, "check": True, "profiles": profiles}
    result = bridge.convert(module, (x,), workdir=folder, **options)
    return result.onnx, data


@pytest.mark.parametrize("method", ["max", "entropy", "percentile"])
def test_int8_loses_at_most_half_a_point_with_every_product_and_convolution_quantised(
    model: tuple[Path, digits.Digits], method: str, tmp_path: Path
) -> None:
    path, data = model
    before = digits.accuracy(path, data)
    log = digits.quantised(path, tmp_path / "int8.onnx", data, "int8", method)
    after = digits.accuracy(tmp_path / "int8.onnx", data)
    able = [node.op for node in read(path).nodes if node.op in QUANTISABLE["int8"]]
    assert log.counts() == {op: able.count(op) for op in set(able)} and not log.declined
    assert before > 95 and after >= before - digits.POINTS, f"{before:.2f}% in fp32, {after:.2f}% in int8"
