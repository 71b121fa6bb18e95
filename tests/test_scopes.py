"""The modules of nodes that the older exporter made are known by their full names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from bridge import export, torch_source
from bridge.inputs import read_profiles
from bridge.scopes import write_scopes
from passes.provenance import origin_of

from .support import RTX, convert


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict({"p": nn.Linear(4, 4), "q": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})
        self.listed = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.listed[0](self.by_name["q"](self.by_name["p"](x)))


class Outer(nn.Module):
    """``inner`` is called without the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1, self.around = nn.Linear(4, 4), nn.Module()
        self.around.inner = Inner()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.fc(self.around.inner(self.body(self.conv_1(x)))))


def modules(path: Path) -> list[str]:
    nodes = onnx.load(path).graph.node
    return [origin_of(node.name, {item.key: item.value for item in node.metadata_props}).module for node in nodes]


@pytest.mark.parametrize("exporter", [export._by_torchscript, export._by_record])
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            Outer(),
            [
                *("conv_1", "body.0", "body.1.0", "body.1.1", "around.inner.by_name.p", "around.inner.by_name.q.0"),
                *("around.inner.by_name.q.1", "around.inner.listed.0", "fc", "fc"),
            ],
        ),
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), ["0", "1.0"]),
    ],
)
def test_every_node_has_its_module(
    tmp_path: Path, module: nn.Module, expected: list[str], exporter: Callable[..., None]
) -> None:
    x = torch.randn(2, 4)
    source = torch_source.make_source(module.eval(), (x,), None, None)
    source.run({name: x.numpy() for name in source.call.tensors})
    (profiles,) = read_profiles(None, dict.fromkeys(source.call.tensors, (2, 4)))
    with torch.no_grad():
        exporter(source, (x,), profiles, tmp_path / "m.onnx", None)
    assert modules(tmp_path / "m.onnx") == expected


def test_two_modules_that_a_name_may_be_of_are_none(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Relu", ["x"], ["y"], name=name) for name in ("/down/Relu", "/only/Relu", "Relu_3")]
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [])), path)
    write_scopes(path, ["a", "a.down", "b", "b.down", "b.only"])
    assert modules(path) == ["down", "b.only", ""], "what is not known stays as the exporter says it"


def test_rules_for_modules_hold_whichever_exporter_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("not today")

    for exporter in ("_by_dynamo", "_by_record"):
        monkeypatch.setattr(export, exporter, fails)
    asked = {"precision": "fp16", "fp32": ["body.1"]}
    result = convert(Outer(), (torch.randn(2, 4),), workdir=tmp_path, target=RTX, precision=asked)
    assert result.ok, result.error
    graph = onnx.load(tmp_path / "typed.onnx").graph
    types = {item.name: item.data_type for item in graph.initializer}
    wide = [
        node.name for node in graph.node if node.op_type == "Gemm" and types[node.input[1]] == onnx.TensorProto.FLOAT
    ]
    assert wide == ["/bridge_module/body/body.1/body.1.0/Gemm"]
