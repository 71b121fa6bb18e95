"""Models that ONNX Runtime has optimised and saved."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bridge

from .support import RTX_INSTALLED


class Block(nn.Module):
    """A convolution and a transformer's layer: what is fused most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.qkv, self.out = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.conv(image), 0.1).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(x).chunk(3, -1)
        scores = (query @ key.transpose(1, 2) / 4).softmax(-1)
        x = self.first(x + self.out(scores @ value))
        return self.second(x + self.down(F.gelu(self.up(x))))


def optimised(folder: Path, opset: int, level: onnxruntime.GraphOptimizationLevel) -> Path:
    plain, path = folder / "plain.onnx", folder / "optimised.onnx"
    torch.onnx.export(
        Block().eval(),
        (torch.randn(2, 3, 16, 16),),
        str(plain),
        input_names=["image"],
        dynamic_axes={"image": {0: "n"}},
        opset_version=opset,
        dynamo=False,
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.optimized_model_filepath = level, str(path)
    options.log_severity_level = 3  # that it is for this machine alone
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the older exporter
@pytest.mark.parametrize("opset", [14, 17])
@pytest.mark.parametrize("target", ["tensorrt-rtx-1.7", "tensorrt-8.5"])
def test_what_onnx_runtime_has_fused_is_taken_apart(tmp_path: Path, opset: int, target: str) -> None:
    path = optimised(tmp_path, opset, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    fused = {node.op_type for node in onnx.load(path).graph.node if node.domain or node.op_type == "LayerNormalization"}
    assert {"FusedConv", "FusedMatMul"} <= fused and {"Gelu", "BiasGelu"} & fused, fused
    assert {"LayerNormalization", "SkipLayerNormalization"} & fused, fused
    profiles = {"image": ((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))}
    result = bridge.convert(path, workdir=tmp_path / "out", target=target, profiles=profiles)
    builds = target.startswith("tensorrt-rtx") and RTX_INSTALLED
    assert result.status == ("built" if builds else "rewritten"), result.error
    assert len(result.comparisons) == 3 and all(step.agreed for step in result.comparisons)
    assert not [node for node in onnx.load(tmp_path / "out" / "rewritten.onnx").graph.node if node.domain]


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_in_an_order_for_a_processor_are_told(tmp_path: Path) -> None:
    path = optimised(tmp_path, 17, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    if not any(node.domain == "com.microsoft.nchwc" for node in onnx.load(path).graph.node):
        pytest.skip("this processor has no such order")
    profiles = {"image": ((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))}
    result = bridge.convert(path, workdir=tmp_path / "out", target="tensorrt-rtx", profiles=profiles)
    assert result.status == "failed" and "ORT_ENABLE_EXTENDED" in str(result.error), result.error
