"""A diff with an engine that runs: its row agrees with NumPy, and its layers are measured by engines that show them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bridge
from bridge.diff.measure import diff
from bridge.gpu import gpu_here
from bridge.target import gpu_compute_capabilities, installed

from .test_diff_measure import IMAGE, Residual, named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_compute_capabilities(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(installed("tensorrt") is None, reason="the Python package 'tensorrt' is not installed"),
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def test_the_engines_row_agrees_with_numpy(tmp_path: Path) -> None:
    module = net()
    report = diff(module, IMAGE, workdir=tmp_path, target="tensorrt", layers=False)
    row = next(row for row in report.stages if row.stage == "engine")
    assert row.carried is not None, row.note
    assert f"the engine ran on {gpu_here()}" in report.notes
    assert bridge.ConversionResult.load(tmp_path / "result.json").gpu == gpu_here() != ""
    with torch.no_grad():
        expected = module(*IMAGE).numpy().astype(np.float64)
    engine = bridge.TRTModule(str(tmp_path / "model.engine"))
    found = engine(IMAGE[0].cuda()).cpu().numpy().astype(np.float64)
    relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert row.carried.relative == pytest.approx(relative, rel=1e-2, abs=1e-9)
    assert row.carried.max_abs == pytest.approx(np.abs(found - expected).max(), rel=1e-2, abs=1e-9)


def test_the_layers_of_an_engine_are_measured(tmp_path: Path) -> None:
    report = diff(net(), IMAGE, workdir=tmp_path, target="tensorrt")
    rows = [layer for layer in report.layers if layer.candidate == "engine"]
    assert rows and all(layer.introduced is not None and layer.carried is not None for layer in rows), report.notes
    assert report.ok and not [layer for layer in rows if layer.diverges], report.verdict
    assert any(layer.module == "stem.1" for layer in rows)


@pytest.mark.skipif(getattr(installed("tensorrt"), "strongly_typed", False), reason="this TensorRT is strongly typed")
def test_one_product_of_a_transformer_in_half_is_the_first_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    inputs = (torch.randn(2, 16, 64),)
    options = {"target": "tensorrt", "precision": {"precision": "fp32", "fp16": ["linear1"]}, "layers": False}
    result = bridge.convert(module, inputs, workdir=tmp_path, **options)
    assert result.status == "verified", result.error
    report = diff(tmp_path, inputs, module=module)
    measured = [layer for layer in report.layers if layer.candidate == "engine" and layer.introduced is not None]
    largest = max(measured, key=lambda layer: layer.introduced.relative or 0.0 if layer.introduced else 0.0)
    assert largest.module == "linear1", (largest, report.notes)
    assert not [note for note in report.notes if "come out in" in note], report.notes


def test_one_layer_in_a_lower_precision_is_the_first_named(tmp_path: Path) -> None:
    """Its weights are rounded to seven bits in the engine's model alone: as coarse as one layer in bfloat16."""
    import onnx

    module = net()
    result = bridge.convert(module, IMAGE, workdir=tmp_path / "model", target="tensorrt")
    assert result.ok, result.error
    folder = Path(shutil.copytree(tmp_path / "model", tmp_path / "copy"))
    model = onnx.load(str(folder / "rewritten.onnx"))
    convolution = [node for node in model.graph.node if node.op_type == "Conv"][2]
    weight = next(item for item in model.graph.initializer if item.name == convolution.input[1])
    values = torch.from_numpy(onnx.numpy_helper.to_array(weight).copy()).bfloat16().float().numpy()
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, str(folder / "rewritten.onnx"))
    report = diff(folder, IMAGE, module=module)
    assert named(report).node == convolution.name, report.verdict
