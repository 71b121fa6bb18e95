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


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_int8_loses_at_most_half_a_point_with_every_product_and_convolution_quantised(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    data = digits.Digits.load()
    path = trained(name, data, tmp_path)
    before = digits.accuracy(path, data)
    able = [node.op for node in read(path).nodes if node.op in QUANTISABLE["int8"]]
    assert before > 95
    for method in ("max", "entropy", "percentile"):
        log = digits.quantised(path, tmp_path / "int8.onnx", data, "int8", method)
        after = digits.accuracy(tmp_path / "int8.onnx", data)
        assert log.counts() == {op: able.count(op) for op in set(able)} and not log.declined
        assert after >= before - digits.POINTS, f"{before:.2f}% in fp32, {after:.2f}% in int8 by {method}"


def trained(name: str, data: digits.Digits, folder: Path) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module = digits.trained(name, data)
    torch.set_num_threads(threads)
    x = torch.from_numpy(data.pictures[:4])
    profiles = {"x" if name == "vit" else "input": ((1, 1, 8, 8), (4, 1, 8, 8), (512, 1, 8, 8))}
    options: dict[str, Any] = {"target": "tensorrt-rtx-1.7", "build": False, "check": True, "profiles": profiles}
    found: Path = bridge.convert(module, (x,), workdir=folder, **options).onnx
    return found
