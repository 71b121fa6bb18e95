"""The engine that shows a model's layers: what it is told of its nodes, and what becomes of what it computes."""

from __future__ import annotations

from collections.abc import Callable
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
from bridge.diff import engine_layers as shown_layers
from bridge.diff.conversion import finished
from bridge.diff.engine_layers import _Shown, engine_layers, taken_apart
from bridge.diff.figures import apart
from bridge.diff.model import LayerDiff
from bridge.errors import BuildError, RunError


class Choosing(nn.Module):
    """What comes first of a row that is sorted by another one: an index, that nobody but a Gather reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        return self.second(hidden.gather(1, hidden.argsort(1)))


def shown(folder: Path, precision: object, module: nn.Module | None = None) -> _Shown:
    torch.manual_seed(0)
    module = (module or nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))).eval()
    result = bridge.convert(
        module, (torch.randn(2, 4),), workdir=folder, target="tensorrt-8.5", precision=precision, layers=False
    )
    assert result.ok and result.onnx is not None, result.error
    return _Shown(finished(folder, None, None, {}), result.onnx)


def built_as(monkeypatch: pytest.MonkeyPatch, change: Callable[[onnx.ModelProto], None] = lambda model: None) -> None:
    """Has ONNX Runtime run what would be built, with a change."""

    def build(model: Path, engine: Path, log: Path, **options: Any) -> BuildOutcome:
        made = onnx.load(str(model))
        change(made)
        onnx.save(made, str(engine))
        return BuildOutcome(notes=["precisions were preferred"])

    monkeypatch.setattr("bridge.build.build", build)
    monkeypatch.setattr("bridge.runtime.runner.engine_runner", lambda engine, *more: onnx_runner(engine, "engine"))


def larger(product: int) -> Callable[[onnx.ModelProto], None]:
    """One product's weights are one percent larger."""

    def change(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")][product]
        weight = next(item for item in model.graph.initializer if item.name == node.input[1])
        values = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    return change


def rows(found: _Shown) -> tuple[list[LayerDiff], list[str]]:
    return engine_layers(found.conversion, found.conversion.example, None)


MIXED = {"precision": "fp32", "fp16": ["op:Relu"]}
"""Of which the engine's tensors are one output."""


@pytest.mark.parametrize("precision", ["fp32", MIXED])
@pytest.mark.parametrize("marked", [400, 2])
def test_a_sound_engine_introduces_nothing_and_its_notes_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marked: int, precision: object
) -> None:
    monkeypatch.setattr(shown_layers, "MARKED", marked)
    found = shown(tmp_path, precision, Choosing())
    assert found.mixed == (precision == MIXED)
    built_as(monkeypatch)
    layers, notes = rows(found)
    assert [layer.tensor for layer in layers] == found.tensors and len(layers) > 4
    for layer in layers:
        assert layer.introduced and layer.carried, layer
        assert layer.introduced.relative == layer.carried.relative == 0.0
    assert [note for note in notes if "preferred" in note] == [
        "the engine with its tensors as outputs: precisions were preferred"
    ]


@pytest.mark.parametrize("marked", [400, 2])
@pytest.mark.parametrize("product", [0, 1])
def test_what_an_engine_does_otherwise_is_introduced_where_it_does_it_and_carried_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, product: int, marked: int
) -> None:
    monkeypatch.setattr(shown_layers, "MARKED", marked)
    found = shown(tmp_path, "fp32", Choosing())
    built_as(monkeypatch, larger(product))
    layers, _ = rows(found)
    guilty = [layer for layer in layers if layer.introduced and layer.introduced.relative]
    products = [layer for layer in layers if layer.operator in ("Gemm", "MatMul")]
    assert guilty == [products[product]] and guilty[0].diverges
    assert layers[-1].carried is not None and (layers[-1].carried.relative or 0.0) > 1e-3


def half(model: onnx.ModelProto) -> None:
    """Every node's output is rounded to float16, though all is float32."""
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        made = node.output[0]
        node.output[0] = f"{made}/exact"
        steps = {f"{made}/low": ("Cast", {"to": 10}), f"{made}/half": ("Identity", {}), made: ("Cast", {"to": 1})}
        model.graph.node.append(node)
        for source, (output, (operator, attributes)) in zip([node.output[0], *steps], steps.items(), strict=False):
            model.graph.node.append(onnx.helper.make_node(operator, [source], [output], **attributes))


def test_an_engine_that_computes_in_half_what_was_asked_for_in_float32_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT 8.5.3 does with all of a transformer of which one product is to be in half."""
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    found = shown(tmp_path, {"precision": "fp32", "fp16": ["2"]}, module)
    built_as(monkeypatch)
    layers, notes = rows(found)
    assert {layer.precision for layer in layers if layer.operator != "Gemm"} == {"float32"}
    assert not [note for note in notes if "come out in" in note]
    built_as(monkeypatch, half)
    layers, notes = rows(found)
    named = {layer.operator: layer.precision for layer in layers}
    assert named == {"Gemm": "float16", "Tanh": "float16", "Relu": "float32"}, "of half values Relu makes half ones"
    assert [note for note in notes if note.startswith("3 of the 4 layers that were asked for in float32 come out")]


def test_without_the_engine_nothing_is_known_and_the_note_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: onnx.ModelProto) -> None:
        raise BuildError("no kernel")

    found = shown(tmp_path, "fp32")
    built_as(monkeypatch, refuse)
    layers, notes = rows(found)
    assert layers and all(layer.introduced is None and layer.carried is None for layer in layers)
    assert [note for note in notes if "with its tensors as outputs cannot be had: no kernel" in note]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".diff")], "nothing is left behind"


def test_a_weakly_typed_engine_of_the_layers_keeps_each_node_in_its_precision(tmp_path: Path) -> None:
    found = shown(tmp_path, {"precision": "fp16", "fp32": ["2"]})
    products = [node.name for node in found.side.graph.node if node.op_type in ("Gemm", "MatMul")]
    assert [found.plan.layer_precisions[name] for name in products] == ["fp16", "fp32"]


def test_tensors_that_are_one_output_are_told_apart_by_their_shapes() -> None:
    found = taken_apart(np.arange(7), {"a": [2, 2], "none": [0, 3], "b": [], "c": [2]})
    assert {name: values.tolist() for name, values in found.items()} == {
        "a": [[0, 1], [2, 3]],
        "none": [],
        "b": 4,
        "c": [5, 6],
    }
    with pytest.raises(RunError, match="7 values, and 6 are expected"):
        taken_apart(np.arange(7), {"a": [6]})


def test_where_float16_may_be_anywhere_a_masks_lowest_value_is_no_error() -> None:
    lowest = float(np.finfo(np.float32).min)
    reference = np.array([1.0, lowest], np.float32)
    candidate = np.array([1.0, -65504.0], np.float32)
    error, of_half = apart(reference, candidate), apart(reference, candidate, 65504.0)
    assert error is not None and error.relative == pytest.approx(1.0)
    assert of_half is not None and of_half.relative == 0.0
    overflow = apart(np.array([1e5], np.float32), np.array([np.inf], np.float32), 65504.0)
    assert overflow is not None and overflow.non_finite == 1
