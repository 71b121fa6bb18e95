"""Faults of other kinds than a weight: integers, stages that do not run, samples, control flow, nothing to compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import bridge
from bridge.diff.measure import diff
from bridge.diff.model import DiffReport

from .support import RTX
from .test_diff_measure import convert

HERE = Path(__file__)


class Chosen(nn.Module):
    """Indices that are computed with, of which only what they choose is in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 33)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.scores(x)
        places = scores.topk(5, -1).indices
        return torch.gather(scores, -1, places - places % 2), places > 7


class Classes(nn.Module):
    """The outputs are integers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(x))).argmax(-1)


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).clamp(-50, 50))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def finished(module: nn.Module, folder: Path, **options: Any) -> nn.Module:
    result = bridge.convert(module.eval(), (X,), workdir=folder, target=RTX, build=False, **options)
    assert result.ok, result.error
    return module


def edited(folder: Path, edit: Callable[[onnx.GraphProto], Any], *names: str) -> None:
    """Changes models of a conversion behind its back."""
    for name in names or ("rewritten",):
        model = onnx.load(str(folder / f"{name}.onnx"))
        edit(model.graph)
        onnx.save(model, str(folder / f"{name}.onnx"))


def turned(operator: str, other: str) -> Callable[[onnx.GraphProto], None]:
    """An edit: the first node with that operator gets another one."""

    def edit(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.op_type == operator).op_type = other

    return edit


def first(report: DiffReport) -> Any:
    assert report.first_diverging is not None, report.verdict
    return report.layers[report.first_diverging]


@pytest.mark.parametrize(
    ("operator", "other", "off"),
    [("Sub", "Add", "'output.0' of the rewritten model is off by 0."), ("Greater", "Less", "off by up to 1 from")],
)
def test_a_layer_of_integers_or_booleans_is_named(operator: str, other: str, off: str, tmp_path: Path) -> None:
    module = finished(Chosen(), tmp_path / "m")
    edited(tmp_path / "m", turned(operator, other))
    report = diff(tmp_path / "m", (X,), module=module)
    layer = first(report)
    assert layer.operator == operator and layer.source.startswith(str(HERE)), report.verdict
    assert layer.precision in ("bool", "int32", "int64") and "which introduces up to " in report.verdict
    assert off in report.verdict and not report.ok, report.verdict


def test_of_a_model_whose_outputs_are_integers_an_exporters_fault_is_named(tmp_path: Path) -> None:
    module = finished(Classes(), tmp_path / "m")
    sound = diff(tmp_path / "m", (X,), module=module)
    assert sound.ok and sound.first_diverging is None, sound.verdict

    weight = "bridge_module.first.weight"

    def edit(graph: onnx.GraphProto) -> None:
        item = next(item for item in graph.initializer if item.name == weight)
        item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) * np.float32(0.5), weight))

    edited(tmp_path / "m", edit, "exported", "rewritten")
    report = diff(tmp_path / "m", (X,), module=module)
    assert (first(report).module, first(report).candidate) == ("first", "exported"), report.verdict

    shutil.rmtree(tmp_path / "m")
    finished(module, tmp_path / "m")
    edited(tmp_path / "m", turned("ArgMax", "ArgMin"), "exported", "rewritten")
    report = diff(tmp_path / "m", (X,), module=module)
    assert first(report).operator == "ArgMin" and not report.ok, report.verdict


def test_a_stage_that_does_not_run_is_no_agreement(tmp_path: Path) -> None:
    module = finished(Clamped(), tmp_path / "m")
    edited(tmp_path / "m", turned("Clip", "Concat"))
    report = diff(tmp_path / "m", (X,), module=module)
    assert not report.ok, report.verdict
    assert report.verdict.startswith("Clamped: the rewritten model does not run: "), report.verdict
    assert "torch and exported agree on 1 sample." in report.verdict
    row = next(row for row in report.stages if row.stage == "rewritten")
    assert row.failed and row.added is None and row.note.count("does not run") == 1, row


class Refused(nn.Module):
    """Determinants larger than those that the passes write out, which TensorRT-RTX has not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x)


def test_an_engine_that_was_refused_is_no_agreement(tmp_path: Path) -> None:
    matrices = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(0))
    report = diff(Refused(), (matrices / 6,), workdir=tmp_path, target=RTX)
    assert not report.ok
    assert report.verdict.startswith("Refused: no engine was built, since the conversion failed: "), report.verdict
    assert "torch, exported and rewritten agree" in report.verdict


def test_a_shape_dependent_error_is_named(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x) * x.shape[0]

    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    folder = convert(Scaled(), (x,), tmp_path / "model", profiles={"x": ((1, 4), (2, 4), (8, 4))})
    path = folder / "rewritten.onnx"
    model = onnx.load(str(path))
    product = next(node for node in model.graph.node if node.op_type == "Mul")
    place = next(i for i, name in enumerate(product.input) if name != product.input[0] or i)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(4, np.float32), "limit"))
    model.graph.node.insert(
        list(model.graph.node).index(product), helper.make_node("Min", [product.input[place], "limit"], ["limited"])
    )
    product.input[place] = "limited"
    onnx.save(model, str(path))

    report = diff(folder, (x,), module=Scaled().eval())

    cases = {row.case: row.added for row in report.shapes if row.stage == "rewritten"}
    assert {"example", "min", "max"} <= cases.keys() and any(name.startswith("sampled") for name in cases)
    right, wrong = cases["example"], cases["max"]
    assert right is not None and right.agreed and wrong is not None and wrong.agreed is False
    assert wrong.relative == pytest.approx(0.5), "8 rows are multiplied by 4"
    assert not report.ok and "depends on the shapes" in report.verdict and "x 8x4" in report.verdict
    assert first(report).operator == "Mul" and any("layers are measured on the max shapes" in n for n in report.notes)


def test_shapes_at_which_a_stage_does_not_run_are_named(tmp_path: Path) -> None:
    module = finished(Clamped(), tmp_path / "m", profiles={"x": ((1, 8), (4, 8), (6, 8))})

    def edit(graph: onnx.GraphProto) -> None:
        """Four rows, whatever comes in."""
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([4, 8]), "four"))
        last = graph.node[-1]
        graph.node.append(helper.make_node("Reshape", ["unshaped", "four"], [last.output[0]]))
        last.output[0] = "unshaped"

    edited(tmp_path / "m", edit)
    report = diff(tmp_path / "m", (X,), module=module)
    assert not report.ok
    assert "the rewritten model does not run: " in report.verdict and "at the min shapes (x 1x8)" in report.verdict
    assert {row.case for row in report.shapes if row.failed} >= {"min", "max"}


def test_the_verdict_says_on_how_many_samples_a_stage_is_off(tmp_path: Path) -> None:
    module = finished(Clamped(), tmp_path / "m")

    def edit(graph: onnx.GraphProto) -> None:
        clip = next(node for node in graph.node if node.op_type == "Clip")
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(20, np.float32), "lower"))
        clip.input[2] = "lower"

    edited(tmp_path / "m", edit)
    report = diff(tmp_path / "m", (X,), module=module, samples=[(X,), (300 * X,), (X / 2,)])
    assert "of its norm from exported on 1 of 3 samples; " in report.verdict, report.verdict
    assert first(report).operator == "Clip" and report.samples is not None and report.samples.worst == "item 1"


def control_flow() -> onnx.ModelProto:
    """An If whose branches multiply, and a Loop that adds, with no word of where they come from."""
    many = []
    for name, factor in (("then", 2.0), ("else", 3.0)):
        constant = onnx.numpy_helper.from_array(np.array(factor, np.float32), f"{name}_factor")
        node = helper.make_node("Mul", ["x", f"{name}_factor"], [f"{name}_y"])
        info = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        many.append(helper.make_graph([node], name, [], [info], [constant]))
    scalar = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("go", 9))]
    state = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("before", "after")]
    steps = [
        helper.make_node("Add", ["before", "one"], ["after"]),
        helper.make_node("Identity", ["go"], ["goes"]),
    ]
    goes = helper.make_tensor_value_info("goes", TensorProto.BOOL, [])
    body = helper.make_graph(steps, "body", [*scalar, state[0]], [goes, state[1]])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0, name="sum"),
        helper.make_node("Greater", ["sum", "zero"], ["positive"], name="positive"),
        helper.make_node("If", ["positive"], ["y"], then_branch=many[0], else_branch=many[1], name="choice"),
        helper.make_node("Loop", ["count", "", "y"], ["z"], body=body, name="steps"),
        helper.make_node("Tanh", ["z"], ["out"], name="last"),
    ]
    constants = {"zero": np.array(0, np.float32), "one": np.array(1, np.float32)}
    graph = helper.make_graph(
        nodes,
        "flow",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8]),
            helper.make_tensor_value_info("count", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [4, 8])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("operator", ["If", "Loop"])
def test_a_fault_inside_of_a_body_is_named_by_the_node_that_has_the_body(operator: str, tmp_path: Path) -> None:
    onnx.save(control_flow(), str(tmp_path / "flow.onnx"))
    inputs = {"x": X / 9, "count": torch.tensor(3)}
    result = bridge.convert(tmp_path / "flow.onnx", inputs, workdir=tmp_path / "m", target=RTX, build=False)
    assert result.ok, result.error

    def edit(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == operator)
        for body in (item.g for item in node.attribute if item.HasField("g")):
            for inner in body.node:
                inner.op_type = {"Mul": "Add", "Add": "Sub"}.get(inner.op_type, inner.op_type)

    edited(tmp_path / "m", edit)
    report = diff(tmp_path / "m", inputs)
    assert first(report).operator == operator and not report.ok, report.verdict


def test_a_model_in_16_bits_that_is_made_one_in_32_does_not_diverge_by_its_own_rounding(tmp_path: Path) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(3 * x.to(torch.bfloat16), -1)

    module = Half().eval()
    report = diff(module, (X,), workdir=tmp_path, target="tensorrt-8.5", build=False)
    rows = [row for row in report.layers if row.candidate == "rewritten"]
    assert max(row.introduced.relative for row in rows if row.introduced) > 1e-3, "the reference does round"
    assert report.ok and report.first_diverging is None, report.verdict


class Odd(nn.Module):
    """An output with NaN in it by right, and one of no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x)
        return torch.log(y), y[:, :0]


def test_nan_by_right_and_outputs_of_no_elements_agree_and_other_nan_does_not(tmp_path: Path) -> None:
    module = finished(Odd(), tmp_path / "m")
    report = diff(tmp_path / "m", (X,), module=module)
    assert report.ok and report.first_diverging is None, report.verdict
    empty = next(row for row in report.layers if 0 in row.shape and row.candidate == "rewritten")
    assert empty.note == "it has no elements", empty
    silent = diff(tmp_path / "m", (X * float("nan"),), module=module)
    assert ", though nothing of 'output.0' is finite" in silent.verdict and silent.ok, silent.verdict
    edited(tmp_path / "m", turned("Log", "Acosh"))
    wrong = diff(tmp_path / "m", (X,), module=module)
    assert first(wrong).operator == "Log" and "values that are not finite" in wrong.verdict, wrong.verdict


class Router(nn.Module):
    """Of one operator's outputs, TopK's, one is the model's own and the other is read between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, places = self.gate(self.norm(x)).softmax(-1).topk(2, -1)
        values = values / values.sum(-1, keepdim=True)
        return self.out(torch.zeros_like(x).scatter(-1, places, values) * x), places


class FrontEnd(nn.Module):
    """Functional code before a module that the exporter folds into the one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loud = torch.log1p(x.abs())
        return self.norm(self.conv(loud - loud.mean(-1, keepdim=True)))


class Peaks(nn.Module):
    """The largest values stay right wherever they are; the boxes at them do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.box = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        f = self.stem(x)
        scores, places = self.score(f).squeeze(-1).topk(3, -1)
        return scores, self.box(x).gather(1, places[..., None].expand(-1, -1, 4))


def test_layers_are_measured_where_one_operator_makes_a_tensor_that_is_seen_and_one_that_is_not(tmp_path: Path) -> None:
    module = finished(Router(), tmp_path / "m")
    sound = diff(tmp_path / "m", (X,), module=module)
    measured = [layer for layer in sound.layers if layer.reference == "torch" and layer.introduced is not None]
    assert {layer.module for layer in measured} >= {"norm", "gate"} and sound.first_diverging is None, sound.notes

    edited(tmp_path / "m", turned("ReduceSum", "ReduceMean"), "exported")
    report = diff(tmp_path / "m", (X,), module=module, stages=("torch", "exported"))
    assert first(report).module in ("", "out") and "ReduceMean" in report.verdict, report.verdict


class Again(nn.Module):
    """A module that is called three times, and functional code before each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.step = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.step(torch.tanh(x))
        return x


def test_functional_code_between_the_calls_of_one_module_is_told_from_the_module(tmp_path: Path) -> None:
    module = finished(Again(), tmp_path / "m")

    def edit(graph: onnx.GraphProto) -> None:
        [node for node in graph.node if node.op_type == "Tanh"][1].op_type = "Softsign"

    edited(tmp_path / "m", edit, "exported")
    report = diff(tmp_path / "m", (X,), module=module, stages=("torch", "exported"))
    assert (first(report).module, first(report).operator) == ("", "Softsign"), report.verdict


def test_layers_in_16_bits_are_measured_where_an_operator_of_two_outputs_is_between(
    tmp_path: Path,
) -> None:
    module = Peaks().eval()
    x = torch.randn(2, 6, 8)
    loose = bridge.Tolerance(10.0, 10.0)
    convert(module, (x,), tmp_path / "m", precision="fp16", tolerance=loose)
    report = diff(tmp_path / "m", (x,), module=module, tolerance=loose)
    low = [layer for layer in report.layers if layer.candidate == "typed"]
    assert {"TopK", "GatherElements"} <= {layer.operator for layer in low}, report.notes


def test_what_is_wrong_before_a_module_is_said_to_be_before_it_with_its_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = FrontEnd().eval(), torch.randn(2, 4, 20)
    nn.init.uniform_(module.norm.running_mean, 0.1, 0.5)
    convert(module, (x,), tmp_path / "m")
    edited(tmp_path / "m", turned("ReduceMean", "ReduceMax"), "exported")
    report = diff(tmp_path / "m", (x,), module=module, stages=("torch", "exported"))
    layer = first(report)
    assert layer.module == "norm" and "ReduceMax" in layer.before, (str(layer), layer.note)
    lines = Path(__file__).read_text().splitlines()
    wrong = 1 + next(place for place, line in enumerate(lines) if "loud.mean(-1, keepdim=True)" in line)
    assert layer.source == f"{HERE}:{wrong}" and f"{HERE}:{wrong - 1}" in layer.before, layer.before
    assert layer.before in report.verdict


def test_that_the_largest_values_are_right_does_not_vouch_for_what_they_were_chosen_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Peaks().eval(), torch.randn(2, 6, 8)
    convert(module, (x,), tmp_path / "m")

    def edit(graph: onnx.GraphProto) -> None:
        """The score reads the places in the other order."""
        _, node, _ = (item for item in graph.node if item.op_type == "MatMul")
        numbers = {"from": -1, "to": -7, "axis": 1, "step": -1}
        graph.initializer.extend(onnx.numpy_helper.from_array(np.array([value]), key) for key, value in numbers.items())
        turned_round = helper.make_node("Slice", [node.input[0], *numbers], ["turned"], f"{node.name}/turned")
        turned_round.metadata_props.extend(node.metadata_props)
        node.input[0] = "turned"
        graph.node.insert(list(graph.node).index(node), turned_round)

    edited(tmp_path / "m", edit, "exported")
    report = diff(tmp_path / "m", (x,), module=module, stages=("torch", "exported"))
    assert first(report).module == "score", report.verdict


def test_what_is_put_behind_a_node_and_takes_its_tensors_name_is_looked_at(tmp_path: Path) -> None:
    module = finished(Clamped(), tmp_path / "m")

    def edit(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type in ("Gemm", "MatMul"))
        name, node.output[0] = node.output[0], "as it was"
        limits = {"low": -0.1, "high": 0.1}
        graph.initializer.extend(
            onnx.numpy_helper.from_array(np.array(value, np.float32), key) for key, value in limits.items()
        )
        behind = helper.make_node("Clip", ["as it was", *limits], [name], "behind")
        graph.node.insert(list(graph.node).index(node) + 1, behind)

    edited(tmp_path / "m", edit)
    report = diff(tmp_path / "m", (X,), module=module)
    assert first(report).module == "first" and first(report).candidate == "rewritten", report.verdict
