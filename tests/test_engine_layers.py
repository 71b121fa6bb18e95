"""The engines that show a model's layers: what they are told of its nodes, and what becomes of what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bridge
from bridge.build import BuildOutcome
from bridge.compare import onnx_runner
from bridge.diff.conversion import finished
from bridge.diff.engine_layers import _Engines, engine_layers
from bridge.diff.figures import apart
from bridge.diff.model import LayerDiff
from bridge.errors import BuildError
from bridge.network_layers import node_names
from bridge.pairs import APART

from .fake_network import ILayer, Tensor


def engines(folder: Path, precision: object) -> _Engines:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    result = bridge.convert(
        module, (torch.randn(2, 4),), workdir=folder, target="tensorrt-8.5", precision=precision, layers=False
    )
    assert result.ok and result.onnx is not None, result.error
    return _Engines(finished(folder, None, None, {}), result.onnx)


def built_as(monkeypatch: pytest.MonkeyPatch, refused: str = "") -> None:
    """Has ONNX Runtime run what would be built; no model with the output ``refused`` is."""

    def build(model: Path, engine: Path, log: Path, **options: Any) -> BuildOutcome:
        made = onnx.load(str(model))
        if refused in [item.name for item in made.graph.output]:
            raise BuildError("no kernel")
        onnx.save(made, str(engine))
        return BuildOutcome(notes=["precisions were preferred"])

    monkeypatch.setattr("bridge.build.build", build)
    monkeypatch.setattr("bridge.runtime.runner.engine_runner", lambda engine, *more: onnx_runner(engine, "engine"))


def rows(found: _Engines) -> tuple[list[LayerDiff], list[str]]:
    return engine_layers(found.conversion, found.conversion.example, None)


def test_what_is_to_be_said_of_the_engines_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = engines(tmp_path, "fp32")
    built_as(monkeypatch)
    layers, notes = rows(found)
    assert layers and all(layer.introduced and layer.introduced.relative == 0.0 for layer in layers)
    assert [note for note in notes if "preferred" in note] == [
        "the engine with its tensors as outputs: precisions were preferred",
        "the engine of the layers apart: precisions were preferred",
    ]


def test_without_one_of_the_engines_the_other_still_says_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = engines(tmp_path, "fp32")
    built_as(monkeypatch, refused=found.tensors[0] + APART)
    layers, notes = rows(found)
    assert all(layer.introduced is None and layer.carried is not None for layer in layers)
    assert [note for note in notes if "of the layers apart cannot be had: no kernel" in note]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".diff")], "nothing is left behind"


def test_a_weakly_typed_engine_of_the_layers_keeps_each_node_in_its_precision(tmp_path: Path) -> None:
    found = engines(tmp_path, {"precision": "fp16", "fp32": ["2"]})
    nodes = {node.name: node.op_type for node in found.side.graph.node}
    products = [name for name, operator in nodes.items() if operator in ("Gemm", "MatMul")]
    assert [found.plan.layer_precisions[name] for name in products] == ["fp16", "fp32"]
    alone = found._plan_apart()
    model = found.pieces(found.tensors).model
    named = [node.name for node in model.graph.node if node.name.endswith(APART)]
    assert {name.removesuffix(APART) for name in named} == nodes.keys()
    assert all(alone.layer_precisions[name] == found.plan.layer_precisions[name.removesuffix(APART)] for name in named)


def test_a_layer_apart_is_found_by_what_it_makes(tmp_path: Path) -> None:
    """TensorRT 8 names some layers as it likes, and knows no metadata."""
    found = engines(tmp_path, "fp16")
    model = found.pieces(found.tensors).model
    layers = [
        ILayer("ELEMENTWISE", "(Unnamed)", [], [Tensor(name) for name in node.output]) for node in model.graph.node
    ]
    assert node_names(layers, found._plan_apart().made_by) == [node.name for node in model.graph.node]


def test_where_float16_may_be_anywhere_a_masks_lowest_value_is_no_error() -> None:
    lowest = float(np.finfo(np.float32).min)
    reference = np.array([1.0, lowest], np.float32)
    candidate = np.array([1.0, -65504.0], np.float32)
    error, of_half = apart(reference, candidate), apart(reference, candidate, 65504.0)
    assert error is not None and error.relative == pytest.approx(1.0)
    assert of_half is not None and of_half.relative == 0.0
    overflow = apart(np.array([1e5], np.float32), np.array([np.inf], np.float32), 65504.0)
    assert overflow is not None and overflow.non_finite == 1
