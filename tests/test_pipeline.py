"""The promises of ``bridge.convert`` from end to end, with real TensorRT-RTX builds of small models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch
from onnx import TensorProto
from torch import nn

import bridge
from bridge import build as building
from bridge import clock as clocks
from bridge import export, pipeline, target
from bridge.errors import BridgeError, BuildError, CompareError, UsageError
from bridge.result import STATUS_MEANING, ConversionResult, Tolerance

from . import support
from .support import RTX_INSTALLED, run_onnx

ROOT = Path(__file__).parents[1]
FLOAT = TensorProto.FLOAT
pytestmark = pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is promised of a machine without a GPU is tested on one with a GPU too."""
    monkeypatch.setattr(target, "gpu_compute_capabilities", tuple)


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plugin for NonZero that comes along, the parser would refuse nothing here."""
    monkeypatch.setattr("passes.plugins.PLUGINS", {})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = torch.relu(self.conv(image)).mean((2, 3))
        return {"features": features, "scores": self.head(features)}


class Block(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nonzero(x > 0)  # the refused line


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Finds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


def refused_line() -> str:
    with Path(__file__).open() as file:
        return f"{__file__}:{next(n for n, text in enumerate(file, 1) if text.rstrip().endswith('# the refused line'))}"


IMAGE = torch.randn(1, 3, 8, 8)
PROFILES = {"image": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 16))}
X = torch.randn(2, 3)


def convert(source: Any, inputs: Any, folder: Path, **options: Any) -> ConversionResult:
    return support.convert(source, inputs, workdir=folder, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> ConversionResult:
    """A conversion with everything, once for all the tests that only look at it."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "gpu_compute_capabilities", tuple)
        began = time.perf_counter()
        result = convert(Net(), (IMAGE,), tmp_path_factory.mktemp("done"), name="net", profiles=PROFILES)
        result.notes.append(str(time.perf_counter() - began))
    assert result.status == "built", result.error
    return result


def folder_of(result: ConversionResult) -> Path:
    assert result.engine is not None
    return result.engine.parent


# --- a conversion that went well ---------------------------------------------------------------------------------


def test_without_a_gpu_the_engine_is_built_and_never_called_verified(done: ConversionResult) -> None:
    assert (done.status, done.stage, done.error, done.ok) == ("built", None, None, True)
    assert "built, not run: no NVIDIA GPU here" in done.notes
    assert "engine" not in {item.candidate for item in done.comparisons}
    assert "not run" in STATUS_MEANING["built"]


def test_the_folder_holds_the_whole_files_and_nothing_else(done: ConversionResult) -> None:
    assert {item.name for item in folder_of(done).iterdir()} == {
        *("exported.onnx", "rewritten.onnx", "model.engine", "model.engine.json", "build.log", "result.json")
    }
    for name in ("exported.onnx", "rewritten.onnx"):
        onnx.checker.check_model(str(folder_of(done) / name), full_check=True)


def test_every_stage_is_compared_at_every_shape_and_agrees(done: ConversionResult) -> None:
    stages = [("torch", "exported"), ("exported", "rewritten")]
    expected = [
        (*pair, case, output)
        for pair in stages
        for case in ("example", "max")  # the example is the min
        for output in ("features", "scores")
    ]
    assert [(item.reference, item.candidate, item.inputs, item.output) for item in done.comparisons] == expected
    worst = max(item.tolerance_used or 0 for item in done.comparisons)
    assert all(item.agreed for item in done.comparisons) and worst < 0.5, f"{worst} of the tolerance"
    assert [item.reference_shape for item in done.comparisons if item.output == "scores"] == [[1, 4], [4, 4]] * 2


def test_result_json_has_the_names_of_the_result_and_paths_relative_to_its_folder(done: ConversionResult) -> None:
    written = json.loads((folder_of(done) / "result.json").read_text())
    assert list(written) == [field.name for field in dataclasses.fields(ConversionResult)]
    assert (written["onnx"], written["engine"]) == ("rewritten.onnx", "model.engine")
    assert written["exported_onnx"] == "exported.onnx" and written["name"] == "net"
    loaded = ConversionResult.load(folder_of(done) / "result.json")
    assert dataclasses.replace(loaded, notes=done.notes) == done


def test_a_result_can_be_moved_with_its_folder(done: ConversionResult, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder_of(done), tmp_path / "moved")
    assert ConversionResult.load(tmp_path / "moved" / "result.json").engine == tmp_path / "moved" / "model.engine"


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_an_if_in_the_engine_is_told_to_who_runs_it(done: ConversionResult, tmp_path: Path) -> None:
    result = support.convert(Branches(), (torch.ones(2, 3),), workdir=tmp_path)
    assert result.status == "built", result.error
    told = [json.loads((folder / "model.engine.json").read_text()) for folder in (tmp_path, folder_of(done))]
    assert [sidecar["branches"] for sidecar in told] == [True, False]


def test_seconds_are_each_counted_once(done: ConversionResult) -> None:
    wall = float(done.notes[-1])
    assert set(done.seconds) == {"export", "rewrite", "build", "run", "compare"}
    assert all(value >= 0 for value in done.seconds.values())
    total = sum(done.seconds.values())
    assert 0.6 * wall < total <= wall, f"{done.seconds} make {total:.3f} s of {wall:.3f} s"


def test_the_clock_stops_the_outer_stage_while_an_inner_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(now))
    clock = clocks.Clock({}, lambda stage: None)
    with clock("export"), clock("run"):  # at 1; at 3
        pass  # ends at 6, and the outer one at 10
    with clock("run"):  # from 15 to 21
        pass
    assert clock.seconds == {"export": 2.0 + 4.0, "run": 3.0 + 6.0}


def test_an_engine_may_have_several_profiles_and_is_compared_at_the_ends_of_each(tmp_path: Path) -> None:
    profiles = [{"input": ((1, 3), (1, 3), (2, 3))}, {"input": ((8, 3), (16, 3), (32, 3))}]
    one = convert(nn.Linear(3, 2), (X,), tmp_path / "one", profiles=profiles[:1])
    two = convert(nn.Linear(3, 2), (X,), tmp_path / "two", profiles=profiles)
    assert one.status == two.status == "built", (one.error, two.error)
    assert two.inputs[0].profiles == [[list(shape) for shape in item["input"]] for item in profiles]
    assert {item.inputs for item in one.comparisons} == {"example", "min"}
    assert {item.inputs for item in two.comparisons} == {"example", "profile 0 min", "profile 1 min", "profile 1 max"}
    assert two.engine.stat().st_size > one.engine.stat().st_size, "each profile has kernels of its own"
    outside = [{"input": ((4, 3), (4, 3), (4, 3))}, *profiles[1:]]
    with pytest.raises(UsageError, match="profile 0: 'input'"):
        convert(nn.Linear(3, 2), (X,), tmp_path / "none", profiles=outside)


def test_the_sidecar_describes_the_engine_and_its_hashes_are_those_of_the_files(done: ConversionResult) -> None:
    sidecar = json.loads((folder_of(done) / "model.engine.json").read_text())
    assert sidecar["target"] == dataclasses.asdict(done.target)
    assert sidecar["target"]["flavour"] == "tensorrt-rtx" and sidecar["target"]["version"]
    assert [(item["name"], item["profiles"]) for item in sidecar["inputs"]] == [
        ("image", [[list(shape) for shape in PROFILES["image"]]])
    ]
    assert [item["name"] for item in sidecar["outputs"]] == ["features", "scores"]
    assert [item["dtype"] for item in (*sidecar["inputs"], *sidecar["outputs"])] == ["float32"] * 3
    assert sidecar["engine_inputs"][0]["shape"] == [-1, 3, 8, -1]
    for key, path in (("onnx_sha256", done.onnx), ("engine_sha256", done.engine)):
        assert sidecar[key] == hashlib.sha256(path.read_bytes()).hexdigest(), key


def test_the_exported_model_computes_what_torch_does_outside_of_the_bridge_too(done: ConversionResult) -> None:
    torch.manual_seed(0)
    module, image = Net().eval(), torch.randn(3, 3, 8, 11)
    with torch.no_grad():
        expected = module(image)
    for path in (done.exported_onnx, done.onnx):
        found = run_onnx(path, {"image": image.numpy()})
        for name, tensor in expected.items():
            assert np.abs(found[name] - tensor.numpy()).max() < 1e-5, (path, name)


# --- statuses ----------------------------------------------------------------------------------------------------


def test_outputs_that_are_nan_throughout_are_said_to_prove_nothing(tmp_path: Path) -> None:
    nan = torch.full((2, 4), torch.nan)
    found = convert(nn.Linear(4, 3), (nan,), tmp_path, build=False)
    assert "output 'output' is NaN throughout, which proves nothing: give other inputs" in found.notes
    found = convert(nn.Linear(4, 3), (torch.cat([nan, torch.ones(1, 4)]),), tmp_path, build=False)
    assert "NaN" not in " ".join(found.notes)


def test_outputs_of_no_elements_are_said_to_prove_nothing(tmp_path: Path) -> None:
    found = convert(nn.Linear(4, 3), (torch.ones(0, 4),), tmp_path, build=False)
    assert "output 'output' has no elements, which proves nothing: give other inputs" in found.notes


def test_an_opset_that_the_exporter_does_not_write_is_said(tmp_path: Path) -> None:
    found = convert(nn.Linear(4, 3), (torch.ones(1, 4),), tmp_path, build=False, opset=99)
    assert any(note.startswith("opset 99 was asked of the exporter, which wrote ") for note in found.notes), found.notes
    found = convert(nn.Linear(4, 3), (torch.ones(1, 4),), tmp_path, build=False, opset=18)
    assert not any("was asked of the exporter" in note for note in found.notes)


def test_without_the_build_it_is_rewritten(tmp_path: Path) -> None:
    result = convert(nn.Linear(3, 2), (X,), tmp_path, build=False)
    assert (result.status, result.engine) == ("rewritten", None) and "build" not in result.seconds
    assert {item.name for item in tmp_path.iterdir()} == {"exported.onnx", "rewritten.onnx", "result.json"}


def test_for_a_tensorrt_that_is_not_installed_it_is_rewritten_and_the_notes_say_so(tmp_path: Path) -> None:
    result = convert(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.GELU()), (X,), tmp_path, target="tensorrt-8.5")
    assert result.status == "rewritten", result.error
    assert any("TensorRT 8.5 is not installed here" in note for note in result.notes), result.notes
    model = onnx.load(str(result.onnx))
    assert not {node.op_type for node in model.graph.node} & {"LayerNormalization", "Gelu"}
    assert model.opset_import[0].version <= 16, model.opset_import


def test_stages_are_told_in_order_as_they_begin(tmp_path: Path) -> None:
    stages: list[str] = []
    convert(nn.Linear(3, 2), (X,), tmp_path, on_stage=stages.append)
    assert stages == ["export", "rewrite", "build"]


def test_without_a_workdir_there_is_one_and_the_name_is_the_class(tmp_path: Path) -> None:
    result = bridge.convert(nn.Linear(3, 2), (X,), target="tensorrt-rtx", build=False)
    assert result.name == "Linear" and result.onnx is not None and result.onnx.is_file()


def test_what_an_earlier_conversion_left_is_gone(tmp_path: Path) -> None:
    convert(nn.Linear(3, 2), (X,), tmp_path)
    assert (tmp_path / "model.engine").exists()
    (tmp_path / "notes.txt").write_text("mine")
    failed = convert(Finds(), (X,), tmp_path)
    assert failed.status == "failed"
    assert {item.name for item in tmp_path.iterdir()} == {
        *("exported.onnx", "rewritten.onnx", "build.log", "result.json", "notes.txt")
    }


def test_the_engine_is_for_the_compute_capabilities_asked_for(tmp_path: Path) -> None:
    result = convert(nn.Linear(3, 2), (X,), tmp_path, compute_capabilities=["8.9", "12.0"])
    assert result.status == "built", result.error
    assert json.loads((tmp_path / "model.engine.json").read_text())["compute_capabilities"] == ["8.9", "12.0"]


# --- types -------------------------------------------------------------------------------------------------------


def test_float64_becomes_float32_inside_the_graph_and_the_result_says_where(tmp_path: Path) -> None:
    module = nn.Linear(3, 2).double()
    result = convert(module, (X.double(),), tmp_path)
    assert result.status == "built", result.error
    tensors = [*result.inputs, *result.outputs]
    assert [(item.name, item.dtype, item.source_dtype) for item in tensors] == [
        ("input", "float32", "float64"),
        ("output", "float32", "float64"),
    ]
    assert [note for note in result.notes if "float64" in note and "float32" in note], result.notes
    sidecar = json.loads((tmp_path / "model.engine.json").read_text())
    assert [item["source_dtype"] for item in (*sidecar["inputs"], *sidecar["outputs"])] == ["float64"] * 2
    assert {item.dtype for item in [result.outputs[0]]} == {"float32"}
    assert onnx.load(str(result.onnx)).graph.output[0].type.tensor_type.elem_type == FLOAT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.uint8])
def test_an_engine_is_built_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32) * 2

    x = torch.tensor([[0, 1, 2]]).to(dtype)
    result = convert(Doubles(), (x,), tmp_path)
    assert result.status == "built", result.error
    assert result.inputs[0].source_dtype == str(dtype).removeprefix("torch.")


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_refused_node_is_reported_with_its_module_its_line_and_a_hint(
    tmp_path: Path, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "EXPORTERS", (exporter,))
    result = convert(Finds(), (X,), tmp_path)
    assert (result.status, result.stage, result.exporter) == ("failed", "build", exporter), result.error
    [refusal] = result.refusals
    assert refusal.operator == "NonZero" and refusal.module == "encoder.layers.1", refusal
    assert "NonZero" in refusal.words and "the number of its results" in refusal.hint, refusal
    if exporter == "dynamo":
        assert refusal.source == refused_line()
    for words in (refusal.operator, refusal.words, refusal.module, refusal.source, refusal.hint):
        assert words in str(result.error)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["refusals"] == [dataclasses.asdict(refusal)] and written["stage"] == "build"
    assert "[E] " in (tmp_path / "build.log").read_text()


def test_a_refused_operator_of_another_domain_in_an_onnx_file_says_that_a_plugin_is_needed(tmp_path: Path) -> None:
    """ONNX Runtime cannot run it, so that there is nothing to compare with."""
    graph = oh.make_graph(
        [oh.make_node("Frobnicate", ["x"], ["y"], name="n0", domain="my.dom")],
        "g",
        [oh.make_tensor_value_info("x", FLOAT, (2, 3))],
        [oh.make_tensor_value_info("y", FLOAT, (2, 3))],
    )
    opsets = [oh.make_opsetid("", 20), oh.make_opsetid("my.dom", 1)]
    onnx.save(oh.make_model(graph, opset_imports=opsets, ir_version=10), str(tmp_path / "m.onnx"))
    result = convert(tmp_path / "m.onnx", None, tmp_path / "out")
    assert result.status == "failed" and "Frobnicate" in str(result.error), result.error
    assert "my.dom" in str(result.error)


def test_check_raises_what_the_result_would_hold_and_writes_it_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        convert(Finds(), (X,), tmp_path, check=True)
    loaded = ConversionResult.load(tmp_path / "result.json")
    assert loaded.error == str(caught.value) and loaded.refusals == list(caught.value.refusals)


def test_a_builder_that_crashes_or_hangs_fails_the_model_and_leaves_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = "import os, signal, sys; sys.stdin.readline(); os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(building, "COMMAND", (sys.executable, "-c", crash))
    crashed = convert(nn.Linear(3, 2), (X,), tmp_path / "a")
    assert (crashed.status, crashed.stage) == ("failed", "build") and "SIGSEGV" in str(crashed.error)
    monkeypatch.setattr(building, "COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
    hung = convert(nn.Linear(3, 2), (X,), tmp_path / "b", build_timeout=0.5)
    assert (hung.status, hung.stage) == ("failed", "build") and "time-out of 0.5 s" in str(hung.error)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert {item.name for item in folder.iterdir()} == {
            *("exported.onnx", "rewritten.onnx", "build.log", "result.json")
        }


def test_a_pass_that_changes_what_the_model_computes_fails_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import passes

    honest = passes.rewrite

    def wrong(graph: Any, *arguments: Any, **options: Any) -> Any:
        log = honest(graph, *arguments, **options)
        for node in graph.nodes:
            if node.op == "Relu":
                node.op = "Neg"
        return log

    monkeypatch.setattr(passes, "rewrite", wrong)
    result = convert(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (X,), tmp_path)
    assert (result.status, result.stage) == ("failed", "rewrite")
    assert "the passes changed what the model computes: rewritten and exported differ: output 'output'" in str(
        result.error
    )
    bad = [item for item in result.comparisons if not item.agreed]
    assert len(bad) == 1 and (bad[0].tolerance_used or 0) > 1


def test_a_tolerance_is_kept_to_and_named_in_the_error(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    options: dict[str, Any] = {"tolerance": {"output": Tolerance(0.0, 1e-12)}, "build": False}
    result = convert(module, (torch.randn(4, 64),), tmp_path, **options)
    assert (result.status, result.stage) == ("failed", "export"), result.comparisons
    assert "rtol 0, atol 1e-12" in str(result.error)


# --- the user's own check ----------------------------------------------------------------------------------------


def test_a_task_check_runs_the_rewritten_model_where_no_engine_can_run(tmp_path: Path) -> None:
    def check(run: Any) -> str:
        outputs = run({"input": np.ones((5, 3), np.float32)})
        assert outputs["output"].shape == (5, 2)
        return "five rows"

    profiles = {"input": ((1, 3), (2, 3), (8, 3))}
    result = convert(nn.Linear(3, 2), (X,), tmp_path, task_check=check, profiles=profiles)
    assert result.status == "built" and result.task_check is not None, result.error
    assert (result.task_check.passed, result.task_check.message, result.task_check.ran_on) == (
        True,
        "five rows",
        "rewritten",
    )


def test_a_task_check_that_fails_fails_the_model(tmp_path: Path) -> None:
    def check(run: Any) -> str:
        raise AssertionError("no face was found")

    with pytest.raises(CompareError, match="the task check fails on the rewritten model: no face was found"):
        convert(nn.Linear(3, 2), (X,), tmp_path, task_check=check, check=True)
    loaded = ConversionResult.load(tmp_path / "result.json")
    assert loaded.status == "failed" and loaded.task_check is not None and not loaded.task_check.passed


@pytest.mark.parametrize("raised", [KeyError("logits"), RuntimeError("no such picture")])
def test_a_task_check_that_breaks_is_an_error_of_the_model_and_no_traceback(tmp_path: Path, raised: Any) -> None:
    def check(run: Any) -> str:
        raise raised

    result = convert(nn.Linear(3, 2), (X,), tmp_path, task_check=check)
    assert result.status == "failed" and type(raised).__name__ in str(result.error), result.error
    assert Path(__file__).name in str(result.error), result.error


def test_a_task_check_gives_the_wrong_input_and_is_told(tmp_path: Path) -> None:
    result = convert(nn.Linear(3, 2), (X,), tmp_path, task_check=lambda run: str(run({"pixels": np.ones((1, 3))})))
    assert result.status == "failed" and "task check" in str(result.error), result.error


# --- ONNX files --------------------------------------------------------------------------------------------------


def test_an_onnx_file_is_converted_with_given_and_with_generated_inputs(tmp_path: Path) -> None:
    graph = oh.make_graph(
        [oh.make_node("Gather", ["table", "ids"], ["rows"]), oh.make_node("Add", ["rows", "bias"], ["y"])],
        "g",
        [oh.make_tensor_value_info("ids", TensorProto.INT64, ("n",)), oh.make_tensor_value_info("bias", FLOAT, (4,))],
        [oh.make_tensor_value_info("y", FLOAT, ("n", 4))],
        [onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32), "table")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=10), str(path))
    profiles = {"ids": ((1,), (3,), (6,))}
    result = convert(path, {"ids": np.array([9, 0, 1])}, tmp_path / "a", profiles=profiles)
    assert result.status == "built" and result.name == "m", result.error
    assert result.exported_onnx == path and result.exporter is None
    assert any("inputs generated (seed 0" in note and note.endswith(": bias") for note in result.notes), result.notes
    assert {item.inputs for item in result.comparisons} == {"example", "min", "max"}
    generated = convert(path, None, tmp_path / "b", profiles=profiles, build=False, seed=3, int_range=(2, 4))
    assert any("seed 3" in note and "2 to 4" in note for note in generated.notes), generated.notes
    again = convert(path, None, tmp_path / "c", profiles=profiles, build=False, seed=3, int_range=(2, 4))
    assert [item.max_abs_error for item in again.comparisons] == [item.max_abs_error for item in generated.comparisons]


def test_torch_tensors_are_inputs_of_an_onnx_file_too(done: ConversionResult, tmp_path: Path) -> None:
    result = convert(done.exported_onnx, (IMAGE,), tmp_path, profiles=PROFILES, build=False)
    assert result.status == "rewritten", result.error


# --- from end to end through the command line --------------------------------------------------------------------


def test_the_command_line_converts_a_function_of_a_module_and_an_onnx_file_together(
    done: ConversionResult, tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\ndef linear():\n    return torch.nn.Linear(3, 2), (torch.ones(1, 3),)\n"
        "def broken():\n    return torch.nn.Linear(3, 2), (torch.ones(1, 4),)\n"
    )
    call = [sys.executable, str(ROOT / "scripts/convert.py"), "-o", "out", "--target", "tensorrt-rtx", "--no-build"]
    sources = ["nets:linear", "nets:broken"]
    run = subprocess.run([*call, *sources], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    found = {item["name"]: (item["status"], item["stage"]) for item in summary["models"]}
    assert found == {"linear": ("rewritten", None), "broken": ("failed", "export")}
    assert "raises in forward" in run.stdout and "float32[1, 4]" in run.stdout


def test_errors_know_their_stage() -> None:
    assert BridgeError("x").stage == "export" and BuildError("x").stage == "build"
    assert CompareError("x").stage == "compare" and BridgeError("x", "run").stage == "run"


@pytest.fixture
def refuses_what_dynamo_exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The exporters whose models came to the build, of which the newer one's is refused."""
    seen: list[str] = []
    build = pipeline.build_engine

    def refusing(state: Any) -> Path:
        seen.append(str(state.result.exporter))
        if state.result.exporter == "dynamo":
            raise BuildError("it takes no such node")
        return build(state)

    monkeypatch.setattr(pipeline, "build_engine", refusing)
    return seen


def test_where_the_target_refuses_one_exporters_model_the_others_is_tried(
    refuses_what_dynamo_exports: list[str], tmp_path: Path
) -> None:
    result = bridge.convert(Net(), (torch.rand(2, 3, 8, 8),), workdir=tmp_path, target="tensorrt-rtx")
    assert refuses_what_dynamo_exports == ["dynamo", "torchscript"]
    assert (result.status, result.exporter) == ("built", "torchscript")
    assert any("it takes no such node" in note for note in result.notes), result.notes
    assert result.engine == tmp_path / "model.engine" and result.engine.is_file()
    assert result.onnx == tmp_path / "rewritten.onnx" and result.onnx.is_file()
    producer = onnx.load(tmp_path / "exported.onnx").producer_name
    assert producer == "pytorch" and json.loads((tmp_path / "result.json").read_text())["exporter"] == "torchscript"
    assert not (tmp_path / ".partial").exists()


def test_where_no_other_exporter_helps_the_first_refusal_stays_with_its_files(
    refuses_what_dynamo_exports: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("not with this one")

    monkeypatch.setattr(export, "_by_torchscript", fails)
    result = bridge.convert(Net(), (torch.rand(2, 3, 8, 8),), workdir=tmp_path, target="tensorrt-rtx")
    assert refuses_what_dynamo_exports == ["dynamo"]
    assert (result.status, result.stage, result.exporter) == ("failed", "build", "dynamo")
    assert result.error == "it takes no such node"
    assert (tmp_path / "exported.onnx").is_file() and result.comparisons


class Prefix(nn.Module):
    """The sum of as many columns as an input says."""

    def forward(self, rows: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        columns = count.item()
        torch._check(columns >= 1)
        torch._check(columns <= 8)
        return rows[:, :columns].sum(1)


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_an_engine_for_sizes_that_are_values_is_for_these_and_not_in_the_cache(tmp_path: Path) -> None:
    for count in (3, 4, 4):
        inputs = (torch.randn(2, 8), torch.tensor(count))
        result = bridge.convert(Prefix().eval(), inputs, workdir=tmp_path / "out", cache=tmp_path / "cache")
        assert result.status in ("built", "verified") and not result.from_cache, result.error
        assert [note for note in result.notes if f"no values but the example's ({count})" in note], result.notes
