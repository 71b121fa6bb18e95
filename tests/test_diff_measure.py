"""A diff names the stage, the layer and the line that an error comes from, and what it says can be checked."""

from __future__ import annotations

import dataclasses
import json
import math
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
from torch.nn import functional

import bridge
from benchmarks.planted import named, outcomes, plant, plant_same
from bridge.diff import model as model_of_diff
from bridge.diff.measure import diff
from bridge.diff.model import SCHEMA, DiffReport
from bridge.errors import BridgeError, UsageError
from bridge.gpu import gpu_here

from .support import RTX

HERE = Path(__file__)


def convert(module: nn.Module, inputs: Any, folder: Path, **options: Any) -> Path:
    """A finished conversion, without an engine."""
    result = bridge.convert(module.eval(), inputs, workdir=folder, target=RTX, build=False, **options)
    assert result.ok, result.error
    return folder


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.body:
            x = functional.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(7, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = functional.silu(self.deep(functional.gelu(self.down(x))))
        return self.out(torch.cat([x, self.up(low)], 1))


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.norm, self.causal = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16), causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (q, k, v)]
        made = functional.scaled_dot_product_attention(*heads, is_causal=self.causal)
        return x + self.out(made.transpose(1, 2).flatten(2))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 16, 4, 4), nn.Sequential(Attention(False), Attention(False))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.block, self.out = nn.Embedding(20, 16), Attention(True), nn.Linear(16, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.block(self.words(ids)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, (h, _) = self.cells(x)
        return self.out(y), h


class Shared(nn.Module):
    """One module that is called twice, one that changes its input in place, and one that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.act, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.ReLU(True), Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.shared(self.act(self.first(x))))
        left, right = self.last(torch.sin(self.shared(x)))
        return left * right


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for weight in made.parameters():
        nn.init.uniform_(weight, -0.3, 0.3)  # else the layers are copies, whose weights the exporter has once
    return made


def separable() -> nn.Module:
    parts = (nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.GroupNorm(2, 4), nn.Hardswish(), nn.Conv2d(4, 8, 1))
    return nn.Sequential(*parts, nn.InstanceNorm2d(8, affine=True), nn.PReLU(8))


IMAGE = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]] = {
    "residual": (Residual, IMAGE),
    "unet": (Unet, IMAGE),
    "vit": (Vit, IMAGE),
    "language": (Language, (torch.arange(12).reshape(2, 6),)),
    "recurrent": (Recurrent, (torch.linspace(-1, 1, 60).reshape(2, 5, 6),)),
    "shared": (Shared, (torch.linspace(-1, 1, 18).reshape(3, 6),)),
    "encoder": (encoder, (torch.linspace(-1, 1, 160).reshape(2, 5, 16),)),
    "separable": (separable, (torch.linspace(-1, 1, 512).reshape(2, 4, 8, 8),)),
    "signal": (lambda: nn.Sequential(nn.Conv1d(2, 4, 5), nn.ELU(), nn.Conv1d(4, 2, 3)), (torch.randn(1, 2, 40),)),
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), (torch.randn(3, 8),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_fault_planted_in_the_rewritten_model_is_the_first_layer_named(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    constructor, inputs = MODELS[name]
    module = constructor()
    folder = convert(module, inputs, tmp_path / "model")
    tried = list(outcomes(folder, inputs, module, most=2))
    assert tried, "there is no layer with weights to plant a fault in"
    assert not [item for item in tried if not item.found], tried


@pytest.mark.parametrize("name", ["residual", "vit", "encoder", "shared"])
def test_a_fault_of_the_exporter_is_found_between_torch_and_onnx(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    constructor, inputs = MODELS[name]
    module = constructor()
    folder = convert(module, inputs, tmp_path / "model")
    graph = onnx.load(str(folder / "exported.onnx")).graph
    weights = {item.name for item in graph.initializer if item.name.endswith(".weight") and len(item.dims) > 1}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul") and weights & set(node.input)]
    node = products[len(products) // 2]
    weight = next(iter(weights & set(node.input)))
    plant(folder / "exported.onnx", weight, noise=0.2)
    plant_same(folder / "rewritten.onnx", weight, 0.2)

    report = diff(folder, inputs, module=module)

    layer = named(report)
    assert (layer.reference, layer.candidate) == ("torch", "exported"), report.verdict
    path = weight.removeprefix("bridge_module.").removesuffix(".weight")
    nodes = [item for item in products if weight in item.input]
    owners = [path, path[:-1] + str(int(path[-1]) + 1)] if path[-1].isdigit() else [path]  # a BatchNorm after it
    inside = path.startswith(f"{layer.module}.")  # nn.MultiheadAttention does not call what it has
    assert layer.module in owners or layer.node == nodes[0].name or inside, report.verdict
    assert not report.ok
    later = [item for item in report.layers if item.candidate == "exported" and item.diverges]
    assert len(later) <= len(nodes), [str(item) for item in later]  # what comes after it only carries the error


def test_modules_are_found_where_they_are_folded_called_twice_or_return_tuples(tmp_path: Path) -> None:
    module = Shared().eval()
    report = diff(module, MODELS["shared"][1], workdir=tmp_path, target=RTX, build=False)
    rows = [(row.module, row.operator) for row in report.layers if row.reference == "torch"]
    assert rows.count(("shared", "Linear")) == 2 and ("act", "ReLU") in rows
    assert ("last.a", "Linear") in rows and ("last.b", "Linear") in rows
    assert report.ok and report.first_diverging is None, report.verdict

    residual = Residual().eval()
    for item in residual.modules():
        if isinstance(item, nn.BatchNorm2d):
            nn.init.uniform_(item.running_mean, 0.1, 0.5)  # else it does nothing, and may be taken for what it reads
    folded = diff(residual, IMAGE, workdir=tmp_path / "folded", target=RTX, build=False)
    there = {row.module: row for row in folded.layers if row.reference == "torch"}
    assert "stem.1" in there and "stem.0" not in there, sorted(there)
    assert there["stem.1"].operator == "BatchNorm2d" and there["stem.1"].source.startswith(str(HERE))
    assert not [row for row in folded.layers if row.diverges]
    assert any("have no tensor of their own" in note and "stem.0" in note for note in folded.notes), folded.notes


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Any, Path]:
    """A small conversion with a dynamic batch, and a fault in its rewritten model."""
    torch.manual_seed(3)
    module = MODELS["mlp"][0]()
    folder = tmp_path_factory.mktemp("mlp") / "model"
    profiles = {"input": ((1, 8), (3, 8), (6, 8))}
    inputs = MODELS["mlp"][1]
    convert(module, inputs, folder, profiles=profiles)
    plant(folder / "rewritten.onnx", "bridge_module.2.weight")
    return module, inputs, folder


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_the_stage_table_agrees_with_numpy(mlp: tuple[nn.Module, Any, Path], tmp_path: Path) -> None:
    from .support import run_onnx

    module, inputs, folder = mlp
    folder = copied(folder, tmp_path)
    items = [(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)),) for seed in range(4)]
    report = diff(folder, inputs, module=module, samples=items)
    with torch.no_grad():
        expected = np.concatenate([module(*item).numpy() for item in items]).astype(np.float64)
    found = np.concatenate(
        [next(iter(run_onnx(folder / "rewritten.onnx", {"input": item[0].numpy()}).values())) for item in items]
    ).astype(np.float64)
    row = next(row for row in report.stages if row.stage == "rewritten")
    assert row.carried is not None and row.added is not None and row.before == "exported"
    assert row.inputs == "4 samples"
    relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert row.carried.relative == pytest.approx(relative, rel=1e-3)
    assert row.carried.max_abs == pytest.approx(np.abs(found - expected).max(), rel=1e-3)
    assert row.carried.mean_abs == pytest.approx(np.abs(found - expected).mean(), rel=1e-3)
    assert row.carried.agreed is False and not report.ok
    assert [row.stage for row in report.stages] == ["torch", "exported", "rewritten", "engine"]
    engine = report.stages[-1]
    assert engine.added is None and "no engine" in engine.note


def test_inputs_of_a_folders_module_are_generated_where_its_arguments_are_the_models(
    mlp: tuple[nn.Module, Any, Path], tmp_path: Path
) -> None:
    module, _, folder = mlp
    report = diff(copied(folder, tmp_path), module=module, layers=False)
    assert [row.stage for row in report.stages][:2] == ["torch", "exported"], report.stages
    assert "rewritten model is off" in report.verdict  # the planted fault
    assert any("generated" in note for note in report.notes), report.notes

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *things: torch.Tensor) -> torch.Tensor:
            return self.inner(*things)

    with pytest.raises(UsageError, match="give example inputs"):
        diff(copied(folder, tmp_path / "renamed"), module=Renamed())


def test_the_verdict_names_stage_output_and_layer_in_a_sentence(
    mlp: tuple[nn.Module, Any, Path], tmp_path: Path
) -> None:
    module, inputs, folder = mlp
    report = diff(copied(folder, tmp_path), inputs, module=module)
    assert report.verdict.count("\n") == 0 and report.verdict.endswith(".")
    for words in ("the rewritten model is off by", "first layer that diverges is Gemm", "(2", "engine"):
        assert words in report.verdict, report.verdict


def test_the_worst_sample_is_kept_and_reproduces_the_error(mlp: tuple[nn.Module, Any, Path], tmp_path: Path) -> None:
    module, inputs, folder = mlp
    folder = copied(folder, tmp_path)
    quiet = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    items = [(quiet * 1e-4,), (quiet * 1e-3,), (quiet * 30,), (quiet * 1e-2,)]
    report = diff(folder, inputs, module=module, samples=items)
    assert report.samples is not None
    assert report.samples.count == 4 and report.samples.worst == "item 2", report.samples
    marks = {(item.stage, item.figure): item for item in report.samples.percentiles}
    largest = [item.max_abs for item in report.samples.errors if item.stage == "rewritten"]
    assert marks["rewritten", "max_abs"].max == pytest.approx(max(value for value in largest if value is not None))
    assert marks["rewritten", "max_abs"].p50 < marks["rewritten", "max_abs"].max
    again = diff(folder, module=module, inputs=inputs, samples=folder / "worst", workdir=tmp_path / "again")
    mine = next(item for item in report.samples.errors if (item.sample, item.stage) == ("item 2", "rewritten"))
    assert again.samples is not None
    theirs = next(item for item in again.samples.errors if item.stage == "rewritten")
    assert theirs.max_abs == mine.max_abs and theirs.relative == mine.relative


def test_the_worst_sample_keeps_names_that_numpy_has_as_arguments_of_its_own(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, file: torch.Tensor, allow_pickle: torch.Tensor) -> torch.Tensor:
            return file * 2 + allow_pickle

    module, inputs = Named(), (torch.ones(2), torch.full((2,), 3.0))
    diff(module, inputs, workdir=tmp_path, target=RTX, build=False)
    with np.load(tmp_path / "worst" / "sample.npz") as kept:
        assert {name: kept[name].tolist() for name in kept.files} == {"file": [1, 1], "allow_pickle": [3, 3]}
    assert diff(tmp_path, samples=tmp_path / "worst", module=module, inputs=inputs).ok


def first_sign(outputs: list[dict[str, np.ndarray]], inputs: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """A metric: the share of rows whose first output is positive, and how many samples there are."""
    assert all(set(item) == {"input"} for item in inputs)
    rows = np.concatenate([next(iter(item.values()))[:, 0] > 0 for item in outputs])
    return {"positive": float(rows.mean()), "samples": float(len(outputs))}


def raising(outputs: Any, inputs: Any) -> float:
    raise LookupError("no labels")


def test_a_users_metric_is_measured_at_each_stage(mlp: tuple[nn.Module, Any, Path], tmp_path: Path) -> None:
    module, inputs, folder = mlp
    folder = copied(folder, tmp_path)
    items = [(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)),) for seed in range(5)]
    report = diff(folder, inputs, module=module, samples=items, metric=f"{__name__}:first_sign", layers=False)
    with torch.no_grad():
        expected = np.mean([(module(*item)[:, 0] > 0).numpy() for item in items])
    found = {(item.name, item.stage): item for item in report.metrics}
    assert found["positive", "torch"].value == pytest.approx(expected)
    assert found["samples", "rewritten"].value == 5
    assert found["positive", "engine"].value is None and "no engine" in found["positive", "engine"].note
    assert ("first_sign", "engine") not in found, "rows have the names of what the function returns"


def greedy(outputs: list[dict[str, np.ndarray]], inputs: list[dict[str, np.ndarray]]) -> float:
    """A metric that works in place."""
    found = float(sum(abs(array).sum() for item in (*outputs, *inputs) for array in item.values()))
    for item in (*outputs, *inputs):
        for array in item.values():
            array[...] = 0
    return found


def test_a_metric_may_change_what_it_is_given(mlp: tuple[nn.Module, Any, Path], tmp_path: Path) -> None:
    module, inputs, folder = mlp
    folder = copied(folder, tmp_path)
    report = diff(folder, inputs, module=module, metric=greedy)
    values = [item.value for item in report.metrics if item.stage in ("torch", "exported")]
    assert values[0] == pytest.approx(values[1], rel=1e-4), "the inputs are whole at each stage"
    with np.load(folder / "worst" / "sample.npz") as kept:
        np.testing.assert_array_equal(kept["input"], inputs[0].numpy())
    plain = diff(folder, inputs, module=module)
    assert report.layers == plain.layers and report.outputs == plain.outputs


def leaving(outputs: Any, inputs: Any) -> float:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("metric", "names", "words"),
    [
        (raising, ["raising"], "raises LookupError: no labels"),
        (leaving, ["leaving"], "raises SystemExit: 0"),
        (lambda outputs, inputs: np.zeros(3), ["<lambda>"], r"is an array of shape [3], and no number"),
        (lambda outputs, inputs: torch.zeros(2, 1), ["<lambda>"], r"is an array of shape [2, 1], and no number"),
        (lambda outputs, inputs: {"good": 1.0, "much": 10**400}, ["much"], "is beyond float64"),
        (lambda outputs, inputs: {"good": 1.0, "said": "text"}, ["said"], "is a str, and no number"),
        (lambda outputs, inputs: None, ["<lambda>"], "is a NoneType, and no number"),
        (lambda outputs, inputs: {}, ["<lambda>"], "returns a dict with nothing in it"),
        (lambda: 1.0, ["<lambda>"], "raises TypeError"),
    ],
)
def test_a_metric_that_comes_to_no_number_costs_itself_and_the_exit_status(
    mlp: tuple[nn.Module, Any, Path], tmp_path: Path, metric: Any, names: list[str], words: str
) -> None:
    module, inputs, folder = mlp
    report = diff(copied(folder, tmp_path), inputs, module=module, metric=metric, layers=False)
    failed = [item for item in report.metrics if item.failed]
    assert {item.stage for item in failed} == {"torch", "exported", "rewritten"}
    assert list(dict.fromkeys(item.name for item in failed)) == names
    assert all(item.value is None and words in item.note for item in failed), failed
    assert not [item for item in report.metrics if item.stage != "engine" and item not in failed and item.value != 1]
    agreeing = dataclasses.replace(report, ok=True)
    assert agreeing.exit_status == 1 and dataclasses.replace(agreeing, metrics=[]).exit_status == 0
    assert DiffReport.from_dict(json.loads(report.to_json())) == report


class Overflowing(nn.Module):
    """A cube beyond float16 for some inputs, in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.out = nn.Linear(8, 64), Gate(), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.gate(self.inner(x)))


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cube = x * x * x
        return cube / (1 + cube.abs())


def test_an_overflow_in_fp16_that_a_sample_shows_is_named_with_its_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, usual = Overflowing().eval(), torch.randn(2, 8)
    samples = [(usual,), (usual * 200,)]
    report = diff(
        module, (usual,), workdir=tmp_path, target=RTX, build=False, precision="fp16", samples=samples, tolerance=None
    )
    assert not report.ok and report.samples is not None and report.samples.worst == "item 1", report.verdict
    layer = named(report)
    line = next(number for number, text in enumerate(HERE.read_text().splitlines(), 1) if "cube = x * x * x" in text)
    assert (layer.module, layer.source) == ("gate", f"{HERE}:{line}"), report.verdict
    assert layer.introduced.non_finite and layer.precision == "float16" and layer.candidate == "typed"


def test_an_onnx_file_is_compared_from_its_own_stage_on(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Neg", ["r"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    report = diff(path, workdir=tmp_path / "out", target=RTX, build=False)
    assert [row.stage for row in report.stages] == ["exported", "rewritten", "engine"]
    assert report.ok and [layer.tensor for layer in report.layers] == ["r", "y"]
    assert all(layer.introduced is not None and layer.introduced.relative == 0 for layer in report.layers)
    with pytest.raises(UsageError, match="no stage 'torch'; give the module that was converted"):
        diff(tmp_path / "out", stages=["torch", "rewritten"])


def test_any_two_stages_can_be_compared(mlp: tuple[nn.Module, Any, Path], tmp_path: Path) -> None:
    module, inputs, folder = mlp
    report = diff(copied(folder, tmp_path), inputs, module=module, stages=["torch", "rewritten"])
    assert {(layer.reference, layer.candidate) for layer in report.layers} == {("torch", "rewritten")}
    assert named(report).module == "2", report.verdict
    assert [row.stage for row in report.stages] == ["torch", "rewritten"]


@pytest.mark.skipif(bool(gpu_here()), reason="a GPU may run the engine")
def test_where_only_one_stage_runs_nothing_was_compared(mlp: tuple[nn.Module, Any, Path], tmp_path: Path) -> None:
    module, inputs, folder = mlp
    report = diff(copied(folder, tmp_path), inputs, module=module, stages=["torch", "engine"])
    assert not report.ok and "nothing could be compared; the engine stage was not run" in report.verdict
    assert report.samples is not None and report.samples.count == 1 and not report.layers


@pytest.mark.parametrize(
    ("file", "error", "words"),
    [
        ("exported.onnx", UsageError, "is not what convert wrote"),
        ("rewritten.onnx", None, "rewritten model does not run"),
    ],
)
def test_a_model_that_is_cut_short_is_named(
    mlp: tuple[nn.Module, Any, Path], tmp_path: Path, file: str, error: type[Exception] | None, words: str
) -> None:
    folder = copied(mlp[2], tmp_path)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    if error is None:
        report = diff(folder, mlp[1])
        assert words in report.verdict and not report.ok
    else:
        with pytest.raises(error, match=f"{file}: {words}"):
            diff(folder, mlp[1])
    (folder / file).unlink()
    with pytest.raises(UsageError, match=f"{file}: no such file"):
        diff(folder, mlp[1])


def test_a_full_disk_is_an_error_that_leaves_nothing_half_written(
    mlp: tuple[nn.Module, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, arrays: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bridge.diff.data.write_npz", full)
    with pytest.raises(BridgeError, match=r"sample\.npz: No space left on device\. Nothing half-written"):
        diff(copied(mlp[2], tmp_path), mlp[1], workdir=tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_new_conversion_leaves_no_old_diff(mlp: tuple[nn.Module, Any, Path], tmp_path: Path) -> None:
    module, inputs, folder = mlp
    folder = copied(folder, tmp_path)
    (folder / "diff.json").write_text("{}")
    convert(module, inputs, folder)
    assert not (folder / "diff.json").exists()


def test_the_module_of_an_output_that_is_not_the_first_is_known(tmp_path: Path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[1][1] * 2

    folder = convert(Last(), (torch.randn(2, 3, 4),), tmp_path)
    plant(folder / "exported.onnx", next(item.name for item in onnx.load(folder / "exported.onnx").graph.initializer))
    report = diff(folder, (torch.randn(2, 3, 4),), module=Last().eval())
    assert named(report).module == "rnn", report.verdict


def test_the_layers_of_an_engine_are_measured_by_one_that_shows_them(
    mlp: tuple[nn.Module, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime stands in for TensorRT: what is built and how it is read is what is tested."""
    from bridge import build as building
    from bridge.compare import onnx_runner
    from bridge.diff import conversion
    from bridge.runtime import runner

    module, inputs, folder = mlp
    folder = copied(folder, tmp_path)
    built: list[list[str]] = []

    def build(model: Path, engine: Path, log: Path, **options: Any) -> building.BuildOutcome:
        made = onnx.load(str(model))
        built.append([item.name for item in made.graph.output])
        for item in made.graph.initializer:
            if item.name == "bridge_module.0.bias":  # this "engine" computes the first layer wrong
                item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) + 1, item.name))
        onnx.save(made, str(engine))
        return building.BuildOutcome()

    engine = folder / "model.engine"
    build(folder / "rewritten.onnx", engine, folder / "log")
    monkeypatch.setattr(building, "build", build)
    monkeypatch.setattr(runner, "engine_runner", lambda path, *rest: onnx_runner(path, "engine"))
    monkeypatch.setattr(conversion.Conversion, "why_no_engine", "")
    monkeypatch.setattr(conversion.Conversion, "run", _running(conversion.Conversion.run, engine))
    values = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**values, "engine": "model.engine"}))

    report = diff(folder, inputs, module=module, stages=["rewritten", "engine"])

    rows = [layer for layer in report.layers if layer.candidate == "engine"]
    assert len(rows) == len(built[1]) >= 3 and len(built) == 2
    assert named(report).module == "0" and [row.diverges for row in rows].count(True) == 1, report.verdict
    last = rows[-1]
    assert last.introduced is not None and last.introduced.relative is not None and last.introduced.relative < 1e-5
    assert last.carried is not None and last.carried.relative is not None and last.carried.relative > 1e-2
    assert not list(folder.glob("*diff-*")), "files were left behind"


def _running(run: Callable[..., Any], engine: Path) -> Callable[..., Any]:
    def instead(self: Any, stage: str, feeds: Any) -> Any:
        from .support import run_onnx

        return [run_onnx(engine, dict(item)) for item in feeds] if stage == "engine" else run(self, stage, feeds)

    return instead


def test_plots_are_bounded_and_of_the_worst_sample(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.Conv2d(1, 4, 3, padding=1), torch.randn(1, 1, 200, 300)
    folder = convert(module, (x,), tmp_path / "model")
    plant(folder / "rewritten.onnx", "bridge_module.weight")
    (data,) = diff(folder, (x,), module=module).outputs
    assert 1900 <= len(data.expected) == len(data.actual) <= 2000
    assert data.heat is not None and (data.heat.height, data.heat.width) == (200, 300)
    assert len(data.heat.cells) == 64 and {len(row) for row in data.heat.cells} == {64}
    assert data.histogram is not None and sum(data.histogram.counts) + data.histogram.zeros == 4 * 200 * 300


def test_a_report_is_json_both_ways_with_a_schema_that_is_documented(
    mlp: tuple[nn.Module, Any, Path], tmp_path: Path
) -> None:
    module, inputs, folder = mlp
    folder = copied(folder, tmp_path)
    report = diff(folder, inputs, module=module)
    assert DiffReport.load(folder / "diff.json") == report
    assert json.loads((folder / "diff.json").read_text())["schema"] == SCHEMA == 1
    (tmp_path / "other.json").write_text('{"schema": 99}')
    with pytest.raises(UsageError, match="schema 99"):
        DiffReport.load(tmp_path / "other.json")
    text = (HERE.parent.parent / "docs" / "diff.md").read_text()
    forms = [getattr(model_of_diff, name) for name in ("DiffReport", "StageError", "LayerDiff", "ShapeError", "Error")]
    forms += [getattr(model_of_diff, name) for name in ("Samples", "SampleError", "Percentiles", "Metric")]
    forms += [getattr(model_of_diff, name) for name in ("OutputData", "Heat")]
    undocumented = [
        f"{form.__name__}.{item.name}"
        for form in forms
        for item in dataclasses.fields(form)
        if f"`{item.name}`" not in text
    ]
    assert not undocumented


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": ["torch", "enigne"]}, "stages: 'enigne' is none"),
        ({"stages": ["torch"]}, "two at least"),
        ({"metric": "nowhere"}, "package.module:function"),
        ({"metric": "math:nowhere"}, "cannot be imported"),
        ({"metric": "math:pi"}, "is a float, and no function"),
        ({"metric": "leaving_at_import:f"}, "cannot be imported: SystemExit: 3"),
        ({"samples": [(torch.zeros(3, 9),)]}, r"samples, item 0: 'input' has the shape \[3, 9\]"),
        ({"samples": []}, "samples: there are none"),
        ({"samples": 3}, "samples: a int"),
        ({"precision": "fp16"}, "precision: .* is a finished conversion"),
        ({"prove": True}, "prove: .* is a finished conversion"),
    ],
)
def test_a_wrong_call_is_refused_by_name(
    mlp: tuple[nn.Module, Any, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    words: str,
) -> None:
    module, inputs, folder = mlp
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "leaving_at_import.py").write_text("raise SystemExit(3)")
    with pytest.raises(UsageError, match=words):
        diff(copied(folder, tmp_path), inputs, **{"module": module, **options})


def test_a_folder_without_a_conversion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no result\.json"):
        diff(tmp_path)


def test_no_figure_is_nan_or_infinite(tmp_path: Path) -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x)

    x = torch.tensor([[-1.0, 0.0, 1.0, math.e]])
    report = diff(Root().eval(), (x,), workdir=tmp_path, target=RTX, build=False)
    assert report.ok, report.verdict
    assert "NaN" not in report.to_json() and "Infinity" not in report.to_json()
