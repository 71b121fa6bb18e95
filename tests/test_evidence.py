"""Golden evidence: what a conversion keeps, and what ``bridge verify`` makes of it, with a GPU and without one."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import bridge
from bridge import cli, target
from bridge.compare import onnx_runner
from bridge.diff import bundle as bundles
from bridge.diff import evidence
from bridge.diff.bundle import EvidenceError, read_bundle, write_bundle
from bridge.diff.evidence import verify, write_golden
from bridge.errors import RunError, UsageError
from bridge.inputs import Case
from bridge.npz import write_npz
from bridge.result import ConversionResult, TensorInfo, Tolerance
from bridge.stages import engine
from bridge.target import gpu_compute_capabilities, installed

from . import support
from .support import RTX_INSTALLED

needs_rtx = pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.head(x)
        return {"scores": scores, "positive": scores > 0, "best": scores.argmax(-1)}


PROFILES = {"x": ((1, 3), (2, 3), (4, 3))}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "gpu" not in request.keywords:
        monkeypatch.setattr(target, "gpu_compute_capabilities", tuple)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not RTX_INSTALLED:
        pytest.skip("tensorrt_rtx is not installed")
    folder = tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "gpu_compute_capabilities", tuple)
        result = support.convert(
            Net(), (torch.randn(2, 3),), workdir=folder, profiles=PROFILES, golden=True, name="net"
        )
    assert result.status == "built", result.error
    return folder


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A copy, as if it had been brought to another machine."""
    return Path(shutil.copytree(converted, tmp_path / "there"))


class FakeGpu:
    """A GPU that runs engines; what they compute comes from ONNX Runtime, off by ``wrong``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.wrong, self.calls = folder, 0.0, 0

    def runner(self, engine: Path, target: Any, plugins: Any = ()) -> Any:
        self.calls += 1
        runner, wrong = onnx_runner(self.folder / "rewritten.onnx", "engine"), self.wrong
        infer = runner.infer_impl

        def off(feeds: Any) -> Any:
            return {
                key: value + np.float32(wrong) if value.dtype == np.float32 else value
                for key, value in infer(feeds).items()
            }

        runner.infer_impl = off
        return runner


@pytest.fixture
def gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    from bridge.runtime import runner

    fake = FakeGpu(folder)
    monkeypatch.setattr(target, "gpu_compute_capabilities", lambda: ((8, 9),))
    monkeypatch.setattr(evidence, "gpu_here", lambda: "Fake GPU")
    monkeypatch.setattr(runner, "engine_runner", fake.runner)
    return fake


def rewrite(path: Path, **changes: Any) -> None:
    """Writes a manifest with other values, and the checksum that they would have."""
    content = {**json.loads(path.read_text()), **changes}
    content.pop("sha256")
    path.write_text(json.dumps({**content, "sha256": bundles._digest(content)}))


# --- arrays and their manifest -----------------------------------------------------------------------------------

ARRAYS: dict[str, Any] = {
    "float": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(3, 2),
    "float8_e5m2": np.arange(4).astype(ml_dtypes.float8_e5m2),
    "float8_e4m3fn": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
    "int4": np.arange(4).astype(ml_dtypes.int4),
    "complex": np.array([1 + 2j, np.nan - 1j], np.complex64),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float16),
    "empty bfloat16": np.zeros((3, 0), ml_dtypes.bfloat16),
    "scalar": np.array(7, np.int64),
    "scalar bfloat16": np.array(1.5, ml_dtypes.bfloat16),
    "big-endian": np.arange(3, dtype=">i4"),
    "a slice": np.arange(12, dtype=ml_dtypes.bfloat16).reshape(3, 4)[:, ::2],
    "not finite": np.array([np.nan, np.inf, -np.inf], np.float16),
    "../a/b\\c.npy \x00": np.array([1], np.uint8),
    "file": np.array([2.0]),
}


def write(folder: Path, arrays: Any = ARRAYS, **facts: Any) -> Path:
    write_bundle(folder / "b.json", folder / "b.npz", "kind", facts, [("one", {"inputs": arrays, "torch": {}})])
    return folder / "b.json"


@pytest.mark.parametrize("name", ARRAYS)
def test_every_kind_of_array_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, {name: ARRAYS[name]})
    ((back,),) = (case.values() for case in read_bundle(path, "kind").tensors("inputs"))
    assert (back.dtype, back.shape) == (ARRAYS[name].dtype, ARRAYS[name].shape)
    assert back.tobytes() == ARRAYS[name].tobytes()


def test_text_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tensors hold numbers"):
        write(tmp_path, {"x": np.array(["a"])})
    assert not list(tmp_path.iterdir())


def test_every_changed_byte_of_the_arrays_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, {"x": np.arange(10)})
    whole = (tmp_path / "b.npz").read_bytes()
    for place in range(0, len(whole), 7):
        (tmp_path / "b.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(EvidenceError, match="cut short or changed"):
            read_bundle(path, "kind")
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.npz").write_bytes(whole[:length])
        with pytest.raises(EvidenceError, match="cut short or changed"):
            read_bundle(path, "kind")


def test_every_cut_or_changed_manifest_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, {"x": np.arange(10)}, precision="fp32")
    whole = path.read_text()
    for length in range(0, len(whole) - 2, 11):  # the last characters are a line's end and a bracket
        path.write_text(whole[:length])
        with pytest.raises(EvidenceError):
            read_bundle(path, "kind")
    path.write_text(whole.replace("fp32", "fp16"))
    with pytest.raises(EvidenceError, match="its checksum is not its own"):
        read_bundle(path, "kind")
    path.write_text("[]")
    with pytest.raises(EvidenceError, match="no manifest of kind"):
        read_bundle(path, "kind")


def test_another_schema_or_kind_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(EvidenceError, match="no manifest of kind 'golden'"):
        read_bundle(path, "golden")
    rewrite(path, schema=99)
    with pytest.raises(EvidenceError, match="schema 99; this version reads schema 1"):
        read_bundle(path, "kind")


def test_a_manifest_whose_arrays_are_not_there_or_elsewhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = json.loads(path.read_text())
    rewrite(path, arrays={**content["arrays"], "file": "../b.npz"})
    with pytest.raises(EvidenceError, match="are not there"):
        read_bundle(path, "kind")
    write(tmp_path)
    (tmp_path / "b.npz").unlink()
    with pytest.raises(EvidenceError, match=r"b\.npz, are not there; copy both"):
        read_bundle(path, "kind")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, arrays: Any) -> None:
        write_npz(path, arrays)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "write_npz", full)
    with pytest.raises(OSError, match=r"No space left.*b\.npz"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_what_was_there_or_nothing_that_could_pass_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"x": np.arange(3)})

    def stop(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, {"x": np.arange(4)})
    assert [path.name for path in tmp_path.iterdir()] == ["b.npz"]
    with pytest.raises(UsageError, match="no such file"):
        read_bundle(tmp_path / "b.json", "kind")


# --- what a conversion keeps -------------------------------------------------------------------------------------


def test_a_conversion_keeps_inputs_outputs_tolerances_checksums_and_versions(converted: Path) -> None:
    kept = read_bundle(converted / "golden.json", "golden")
    assert kept.names == ["example", "min", "max"] and kept.groups == ["inputs", "torch", "rewritten"]
    assert [case["x"].shape for case in kept.tensors("inputs")] == [(2, 3), (1, 3), (4, 3)]
    for inputs, torchs, rewritten in zip(*map(kept.tensors, kept.groups), strict=True):
        wanted = Net()(torch.from_numpy(inputs["x"]))
        assert list(torchs) == list(rewritten) == list(wanted)
        for name, value in wanted.items():
            np.testing.assert_array_equal(torchs[name], value.detach().numpy())
            np.testing.assert_allclose(rewritten[name], torchs[name], rtol=1e-5)
    facts = kept.facts
    assert facts["tolerance"]["scores"] == {"rtol": 1e-3, "atol": 1e-4, "whole": False}
    assert facts["tolerance"]["best"] == {"rtol": 0.0, "atol": 0.0, "whole": False}
    assert set(facts["files"]) == {"model.engine", "exported.onnx", "rewritten.onnx"}
    assert facts["files"]["model.engine"] == json.loads((converted / "model.engine.json").read_text())["engine_sha256"]
    assert facts["versions"]["torch"] == version("torch") and facts["target"]["flavour"] == "tensorrt-rtx"
    assert not [path.name for path in converted.iterdir() if path.name.startswith(".")]


@needs_rtx
def test_without_golden_nothing_is_kept_and_an_older_one_is_removed(folder: Path) -> None:
    result = support.convert(Net(), (torch.randn(2, 3),), workdir=folder, build=False)
    assert result.ok, result.error
    assert not (folder / "golden.json").exists() and not (folder / "golden.npz").exists()


@needs_rtx
def test_evidence_is_kept_without_an_engine_and_of_an_onnx_file(converted: Path, tmp_path: Path) -> None:
    result = support.convert(converted / "exported.onnx", workdir=tmp_path, profiles=PROFILES, build=False, golden=True)
    assert result.status == "rewritten", result.error
    kept = read_bundle(tmp_path / "golden.json", "golden")
    assert kept.groups == ["inputs", "exported", "rewritten"] and set(kept.facts["files"]) == {"rewritten.onnx"}
    report = verify(tmp_path)
    assert report.status == "not run" and "build one of rewritten.onnx" in report.reason
    assert report.verdict.startswith("not run: there is no model.engine"), "nothing was ever built"
    assert verify(tmp_path, run=False).verdict.startswith("not run: there is no engine-run.json")


@needs_rtx
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_of_a_lower_precision_the_tolerance_is_kept_and_the_reference_is_in_the_source_types(
    tmp_path: Path, precision: str
) -> None:
    result = support.convert(Net(), (torch.randn(2, 3),), workdir=tmp_path, precision=precision, golden=True)
    assert result.status == "built", result.error
    kept = read_bundle(tmp_path / "golden.json", "golden")
    assert kept.facts["tolerance"]["scores"]["whole"] and "typed.onnx" in kept.facts["files"]
    assert kept.tensors("rewritten")[0]["scores"].dtype == np.float32


# --- where no GPU can run it -------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_built_not_run_and_never_looks_verified(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["verify", str(folder)]) == 2
    assert capsys.readouterr().out == "net: built, not run: no NVIDIA GPU here\n"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before, "nothing is written"


def test_an_engine_for_another_gpu_or_of_another_version_is_not_run(folder: Path, gpu: FakeGpu) -> None:
    sidecar = json.loads((folder / "model.engine.json").read_text())
    sidecar["compute_capabilities"] = ["7.5"]
    (folder / "model.engine.json").write_text(json.dumps(sidecar))
    report = verify(folder)
    assert report.status == "not run" and "compute capability 7.5, and the one here has 8.9" in report.reason
    sidecar["target"]["version"] = "1.2.0"
    (folder / "model.engine.json").write_text(json.dumps(sidecar))
    assert "built by version 1.2.0" in verify(folder).reason
    assert gpu.calls == 0


def test_the_other_tensorrt_is_missed_in_words(folder: Path) -> None:
    if installed("tensorrt") is not None:
        pytest.skip("the Python package 'tensorrt' is installed")
    facts = json.loads((folder / "golden.json").read_text())
    rewrite(folder / "golden.json", target={**facts["target"], "flavour": "tensorrt"})
    report = verify(folder)
    assert report.status == "not run" and "tensorrt" in report.reason


# --- where a GPU runs it -----------------------------------------------------------------------------------------


def test_an_engine_that_agrees_is_verified_at_every_shape(folder: Path, gpu: FakeGpu) -> None:
    report = verify(folder)
    assert report.status == "verified" and report.exit_status == 0
    assert len(report.comparisons) == 9 and all(item.candidate == "engine" for item in report.comparisons)
    assert report.verdict.startswith("verified, run here, on Fake GPU: all 9 comparisons")
    again = json.loads(report.to_json())
    assert again["schema"] == 1 and again["status"] == "verified" and len(again["comparisons"]) == 9


def test_an_engine_that_computes_something_else_is_found_out(
    folder: Path, gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.wrong = 0.5
    assert cli.main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "net: differs, run here" in out and "scores DIFFERS: off by 0.5 at most" in out


def test_other_tolerances_are_judged_without_running_again(folder: Path, gpu: FakeGpu) -> None:
    gpu.wrong = 0.01
    assert verify(folder).status == "differs"
    assert gpu.calls == 1
    loose = verify(folder, Tolerance(0, 0.1))
    assert loose.status == "verified" and "as it ran on Fake GPU" in loose.verdict
    assert {item.output: item.tolerance.atol for item in loose.comparisons} == {"scores": 0.1, "positive": 0, "best": 0}
    assert verify(folder, {"scores": Tolerance(0, 0.1)}).status == "verified"
    assert verify(folder, Tolerance(0, 1e-3)).status == "differs"
    assert gpu.calls == 1, "it ran once"
    assert verify(folder, Tolerance(0, 0.1), run=True).status == "verified"
    assert gpu.calls == 2


def test_what_was_run_on_the_gpu_is_judged_on_a_machine_without_one(
    folder: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.wrong = 0.01
    verify(folder)
    monkeypatch.setattr(target, "gpu_compute_capabilities", tuple)
    assert cli.main(["verify", str(folder), "--tolerance", "0,0.1"]) == 0
    assert "as it ran on Fake GPU" in capsys.readouterr().out
    assert cli.main(["verify", str(folder), "--recorded"]) == 1
    assert cli.main(["verify", str(folder)]) == 2, "without a tolerance it is to run, and cannot"
    assert cli.main(["verify", str(folder), "--tolerance", "0,0.1", "--run"]) == 2


def test_a_run_of_another_engine_is_not_looked_at(folder: Path, gpu: FakeGpu) -> None:
    verify(folder)
    other = folder / "rebuilt.engine"
    other.write_bytes(b"another")
    report = verify(folder, engine=other, run=False)
    assert report.status == "not run" and any("of another engine" in note for note in report.notes)


def test_a_run_of_another_engine_is_not_looked_at_where_the_folders_own_was_not_copied(
    folder: Path, gpu: FakeGpu
) -> None:
    other = folder / "rebuilt.engine"
    other.write_bytes(b"another")
    assert verify(folder, engine=other).ok, "its run is what is kept"
    (folder / "model.engine").unlink()
    for options in ({"run": False}, {"tolerance": Tolerance(1, 1)}):
        report = verify(folder, **options)
        assert report.status == "not run" and any("of another engine (its SHA" in note for note in report.notes)
        assert report.verdict.startswith("built, not run: ")
    assert verify(folder, engine=other, run=False).ok


def test_that_nothing_tells_which_engine_ran_is_said(folder: Path, gpu: FakeGpu) -> None:
    files = json.loads((folder / "golden.json").read_text())["files"]
    sha256 = files.pop("model.engine")
    rewrite(folder / "golden.json", files=files)
    assert verify(folder).ok
    (folder / "model.engine").unlink()
    report = verify(folder, run=False)
    assert report.ok and report.notes == [
        f"nothing here tells which engine engine-run.json is of; its SHA-256 is {sha256}"
    ]


def test_that_nothing_of_an_output_is_finite_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: dict[str, Any] = {"nan": np.full(3, np.nan, np.float32), "y": np.ones(2, np.float32)}
    outputs["empty"] = np.zeros((0, 2), np.float32)
    infos = [TensorInfo(name, "float32", [], "float32") for name in outputs]
    case = Case("example", {"x": np.zeros(1, np.float32)})
    write_golden(tmp_path, [case], {"torch": [outputs], "rewritten": [outputs]}, ConversionResult("m", outputs=infos))
    (tmp_path / "model.engine").write_bytes(b"engine")
    found = dict(outputs)
    monkeypatch.setattr(evidence, "run_stage", lambda *_: [found])
    monkeypatch.setattr(evidence._Check, "_why_not_run", lambda self: "")
    report = verify(tmp_path)
    assert report.ok and "model agree, though nothing of 'nan' is finite; the worst" in report.verdict
    for words in ("nan agrees: nothing of it is finite", "empty agrees: it is empty", "y agrees: off by 0 at most"):
        assert words in str(report)
    found["nan"] = np.zeros(3, np.float32)
    assert "nan DIFFERS: not finite in the same places" in str(verify(tmp_path))
    found["nan"] = np.zeros(2, np.float32)
    assert "nan DIFFERS: shapes differ: [3] in rewritten, [2] in engine" in str(verify(tmp_path))


def test_another_engine_of_the_same_model_can_be_verified(folder: Path, gpu: FakeGpu) -> None:
    (folder / "model.engine").unlink()
    (folder / "model.engine.json").unlink()
    other = folder / "rebuilt.engine"
    other.write_bytes(b"built on this machine")
    report = verify(folder, engine=other)
    assert report.status == "verified" and "not the engine that the evidence was written beside" in report.notes[0]


def test_torch_itself_can_be_the_reference(folder: Path, gpu: FakeGpu) -> None:
    report = verify(folder, against="torch")
    assert report.ok and {item.reference for item in report.comparisons} == {"torch"}
    with pytest.raises(UsageError, match="'exported' is not in the evidence, which has torch and rewritten"):
        verify(folder, against="exported")


def test_an_engine_without_an_output_is_of_another_model(
    folder: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "run_stage", lambda *_: [{"scores": np.zeros(1)}] * 3)
    with pytest.raises(RunError, match="has no output 'positive'; its outputs are scores"):
        verify(folder)


def test_a_folder_that_cannot_be_written_costs_a_note(
    folder: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(evidence, "write_bundle", full)
    report = verify(folder)
    assert report.ok and report.notes == ["what the engine computed was not kept: Read-only file system"]


def test_complex_bfloat16_boolean_and_empty_outputs_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: dict[str, Any] = {
        "complex": np.array([1 + 2j, 3 - 4j], np.complex64),
        "bfloat16": np.array([1, 2], ml_dtypes.bfloat16),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3.0, np.float32),
    }
    result = ConversionResult("all", outputs=[TensorInfo(name, "float32", [], "float32") for name in outputs])
    case = Case("example", {"x": np.zeros((0,), ml_dtypes.bfloat16)})
    write_golden(tmp_path, [case], {"torch": [outputs], "rewritten": [outputs]}, result)
    (tmp_path / "model.engine").write_bytes(b"engine")
    found = dict(outputs)
    monkeypatch.setattr(evidence, "run_stage", lambda *_: [found])
    monkeypatch.setattr(evidence._Check, "_why_not_run", lambda self: "")
    monkeypatch.setattr(evidence, "gpu_here", lambda: "")
    assert verify(tmp_path).status == "verified"
    assert verify(tmp_path, run=False).status == "verified", "what was kept of the run is the same"
    for name, wrong in {
        "complex": np.array([1 + 2j, 3 + 4j], np.complex64),
        "bfloat16": np.array([1, 4], ml_dtypes.bfloat16),
        "bool": np.array([True, True]),
        "empty": np.zeros((1, 4), np.float32),
        "scalar": np.array(4.0, np.float32),
    }.items():
        found = {**outputs, name: wrong}
        report = verify(tmp_path)
        assert [item.output for item in report.comparisons if not item.agreed] == [name]


@needs_rtx
def test_a_conversion_that_runs_its_engine_keeps_what_it_computed_even_where_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bridge.runtime import runner

    fake = FakeGpu(tmp_path)
    for module in (evidence, engine):
        monkeypatch.setattr(module, "gpu_here", lambda: "Fake GPU")
    monkeypatch.setattr(runner, "engine_runner", fake.runner)
    monkeypatch.setattr(target.Target, "why_not_run", lambda self: None)
    for wrong, status, exit_status in ((0.0, "verified", 0), (0.01, "failed", 1)):
        fake.wrong = wrong
        result = support.convert(Net(), (torch.randn(2, 3),), workdir=tmp_path, golden=True, cache=False)
        assert result.status == status, result.error
        assert result.gpu == "Fake GPU" == json.loads((tmp_path / "result.json").read_text())["gpu"]
        assert cli.main(["verify", str(tmp_path), "--recorded"]) == exit_status
        assert cli.main(["verify", str(tmp_path), "--tolerance", "0,0.1"]) == 0


# --- what was changed, cut or mixed up ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.engine", "rewritten.onnx", "exported.onnx"])
def test_a_changed_model_or_engine_is_refused_by_name(
    folder: Path, gpu: FakeGpu, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (folder / name).read_bytes()
    (folder / name).unlink()  # the engine may be shared with the cache
    (folder / name).write_bytes(content[:-1])
    assert cli.main(["verify", str(folder)]) == 1
    assert f"{folder / name}: is not the file that golden.json was written for" in capsys.readouterr().err
    assert gpu.calls == 0


@pytest.mark.parametrize("name", ["golden.npz", "golden.json"])
def test_cut_evidence_is_refused_by_name(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert cli.main(["verify", str(folder)]) == 1
    assert f"bridge: {folder / name}: " in (err := capsys.readouterr().err) and "cut short" in err


def test_a_run_is_verified_model_by_model_and_a_damaged_one_costs_itself(
    folder: Path, gpu: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for name in ("a", "b"):
        shutil.copytree(folder, run / name)
    assert cli.main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("net: verified") == 2
    (run / "a" / "golden.npz").write_bytes(b"cut")
    assert cli.main(["verify", str(run), "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [model["status"] for model in found["models"]] == ["verified"] and "a/golden.npz" in found["damaged"][0]
    assert cli.main(["verify", str(run), "--engine", str(folder / "model.engine")]) == 2


def test_models_that_were_not_copied_are_not_missed(folder: Path, gpu: FakeGpu, tmp_path: Path) -> None:
    gpu.folder = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    for name in ("exported.onnx", "rewritten.onnx"):
        (folder / name).unlink()
    assert verify(folder).ok


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none"], "none: no such folder"),
        (["empty"], "holds no golden.json; a conversion writes it with golden=True (--golden)"),
        (["{there}", "--tolerance", "y=1,1"], "'y' is no output; the outputs are scores, positive, best"),
        (["{there}", "--tolerance", "1,nan"], "give two finite numbers"),
        (["{there}", "--tolerance", "1,1", "--tolerance", "1,1"], "given twice"),
        (["{there}", "--tolerance", "1,1", "--tolerance", "scores=1,1"], "not both"),
        (["{there}", "--engine", "gone.engine"], "gone.engine: no such file"),
        (["{there}", "--against", "moon"], "'moon' is not in the evidence"),
    ],
)
def test_a_wrong_call_is_refused_with_the_cause(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["verify", *(item.format(there=folder) for item in arguments)]) == 2
    assert words in capsys.readouterr().err


# --- on a real GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_compute_capabilities(), reason="no NVIDIA GPU here")
@pytest.mark.skipif(installed("tensorrt") is None, reason="the Python package 'tensorrt' is not installed")
def test_on_the_gpu_an_engine_is_verified_and_another_one_is_found_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": "tensorrt", "profiles": PROFILES, "golden": True}
    x = torch.randn(2, 3)
    result = bridge.convert(Net(), (x,), workdir=tmp_path / "net", **options)
    assert result.status == "verified", result.error
    assert verify(tmp_path / "net", run=False).status == "verified", "the conversion kept what the engine computed"
    report = verify(tmp_path / "net")
    assert report.status == "verified" and len(report.comparisons) == 9, report
    other = Net()
    nn.init.constant_(other.head.weight, 1.0)
    wrong = bridge.convert(other, (x,), workdir=tmp_path / "other", **options)
    assert wrong.status == "verified", wrong.error
    report = verify(tmp_path / "net", engine=tmp_path / "other" / "model.engine")
    assert report.status == "differs" and any(item.output == "scores" for item in report.comparisons if not item.agreed)
