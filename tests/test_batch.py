"""Promises of the batch: one model's failure, crash or hang costs that model alone, and the files tell the truth."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bridge import batch, worker
from bridge.errors import UsageError
from bridge.manifest import read_sources
from bridge.progress import Progress
from bridge.result import ConversionResult
from bridge.spec import ModelSpec

from .fake_pipeline import CLI, WORKER, ZOO


@pytest.fixture(autouse=True)
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "COMMAND", WORKER)


def run(*names: str, overrides: dict[str, Any] | None = None, **options: Any) -> dict[str, ConversionResult]:
    specs = read_sources([f"zoo:{name}" for name in names], overrides or {})
    return {result.name: result for result in batch.run_batch(specs, Path("out"), **options)}


def files(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


def gone(pid: int) -> bool:
    """Whether a process is dead: a zombie whose parent has not looked yet is dead too."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def wait_until(what: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.02)


def test_the_folder_of_a_run_holds_what_is_promised(capfd: pytest.CaptureFixture[str]) -> None:
    results = run("good", "other", command=["bridge", "convert"])
    each = {"", "/model.engine", "/result.json", "/report.html", "/convert.log"}
    assert files("out") == {f"{name}{file}" for name in results for file in each} | {"summary.json", "index.html"}
    summary = json.loads(Path("out/summary.json").read_text())
    assert set(summary) == {"models", "started", "seconds", "command", "versions"}
    assert [model["engine"] for model in summary["models"]] == ["good/model.engine", "other/model.engine"]
    assert summary["command"] == ["bridge", "convert"]
    assert {"python", "onnx", "torch"} <= set(summary["versions"])
    assert ConversionResult.from_dict(summary["models"][0], Path("out")) == ConversionResult.load(
        Path("out/good/result.json")
    )
    assert 'href="good/report.html"' in Path("out/index.html").read_text()
    log = Path("out/good/convert.log").read_text()
    assert "noise of build" in log and "noise of a native library" in log
    assert capfd.readouterr() == ("", ""), "a library's noise reached the terminal"


def test_one_model_that_fails_or_crashes_does_not_stop_the_others() -> None:
    results = run("segfaults", "raises", "leaves", "segfaults_in_build", "refused", "misdescribed", "good")
    assert {name: (result.status, result.stage) for name, result in results.items()} == {
        "segfaults": ("failed", "export"),
        "raises": ("failed", "export"),
        "leaves": ("failed", "export"),
        "segfaults_in_build": ("failed", "build"),
        "refused": ("failed", "build"),
        "misdescribed": ("failed", "export"),
        "good": ("verified", None),
    }
    assert "killed by SIGSEGV (Segmentation fault)" in str(results["segfaults"].error)
    assert "exit status 3" in str(results["leaves"].error)
    assert results["refused"].error == "the parser refused DFT"
    assert list(results["segfaults_in_build"].seconds) == ["export", "rewrite", "build"]
    assert "Fatal Python error: Segmentation fault" in Path("out/segfaults/convert.log").read_text()
    for name, result in results.items():
        assert isinstance(result.exception, UsageError) == (name == "misdescribed")
        assert ConversionResult.load(Path("out", name, "result.json").resolve()) == result
        assert Path("out", name, "report.html").exists()
        assert not Path("out", name, ".partial").exists(), name


def test_an_error_in_a_source_names_the_line_of_the_user_and_keeps_the_traceback_in_the_log() -> None:
    line = ZOO[: ZOO.index('wanted["weights"]')].count("\n") + 1
    assert (
        run("raises")["raises"].error == f"zoo:raises raised KeyError: 'weights' (at {Path('zoo.py').resolve()}:{line})"
    )
    assert "Traceback" in Path("out/raises/convert.log").read_text()


@pytest.mark.parametrize(
    ("source", "usage", "message"),
    [
        ("zoo:nothing", True, "zoo:nothing: zoo has no 'nothing'"),
        ("zoo:no_tuple", True, "zoo:no_tuple must return (module, inputs) or (path of an .onnx file, inputs), not 5"),
        ("zoo:os", True, "zoo:os: is a module, not a function"),
        ("no_zoo:net", True, "no_zoo:net: there is no module 'no_zoo'; the current directory"),
        ("broken:net", False, "broken:net could not be imported: ModuleNotFoundError: No module named 'no_such'"),
        ("torn:net", False, "torn:net could not be imported: SyntaxError: '(' was never closed (torn.py, line 1)"),
    ],
)
def test_a_source_that_cannot_be_loaded_is_named_with_the_cause(source: str, usage: bool, message: str) -> None:
    Path("broken.py").write_text("import no_such")
    Path("torn.py").write_text("x = (")
    (result,) = batch.run_batch(read_sources([source], {}), Path("out"))
    assert message in str(result.error)
    assert isinstance(result.exception, UsageError) == usage


def test_a_module_is_a_source_where_its_inputs_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("nets.py").write_text("import torch\nnet = torch.nn.ReLU()\nx = lambda: (torch.ones(2, 3),)\n")
    for source in ("nets:net", "nets:torch.nn.ReLU"):
        with pytest.raises(UsageError, match=f"{source} is a module without inputs: name a function that returns"):
            worker.load_model(ModelSpec(name="net", source=source))
        module, inputs = worker.load_model(ModelSpec(name="net", source=source, inputs="nets:x"))
        assert type(module).__name__ == "ReLU" and inputs[0].shape == (2, 3)


def test_a_model_that_hangs_is_stopped_at_its_timeout() -> None:
    results = run("hangs", "good", overrides={"timeout": 1.0})
    assert str(results["hangs"].error).startswith("stopped after its timeout of 1 s, in 'build'")
    assert results["hangs"].stage == "build"
    assert results["good"].ok
    assert gone(int(Path("hanging").read_text()))
    assert files("out/hangs") == {"result.json", "report.html", "convert.log"}


def test_a_fork_that_outlives_its_model_does_not_hold_up_the_batch() -> None:
    start = time.monotonic()
    result = run("leaves_a_fork_behind")["leaves_a_fork_behind"]
    assert "SIGKILL" in str(result.error) and "memory" in str(result.error)
    assert time.monotonic() - start < 15


def test_nothing_of_an_earlier_run_passes_for_this_one() -> None:
    folder = Path("out/segfaults")
    run("segfaults")
    for name in ("model.engine", "exported.onnx", "build.log"):
        (folder / name).write_text("of yesterday")
    (folder / "notes.txt").write_text("the user's own")
    (folder / ".partial").mkdir()
    result = run("segfaults")["segfaults"]
    assert (result.engine, result.exported_onnx) == (None, None)
    assert files("out/segfaults") == {"result.json", "report.html", "convert.log", "notes.txt"}


def test_jobs_convert_at_the_same_time() -> None:
    assert [result.status for result in run("left", "right", jobs=2).values()] == ["verified"] * 2


def test_the_summary_is_true_after_every_model() -> None:
    seen: list[list[str]] = []

    class Watch(Progress):
        def finished(self, index: int, result: ConversionResult) -> None:
            seen.append([model["status"] for model in json.loads(Path("out/summary.json").read_text())["models"]])

    run("good", "raises", progress=Watch())
    assert seen == [["verified"], ["verified", "failed"]]


def test_files_that_a_full_disk_refuses_are_named_in_one_error_and_the_results_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(batch, "write_text", full)
    with pytest.raises(batch.BatchError) as caught:
        run("good")
    out = Path("out").resolve()
    expected = f"cannot write {out}/good/report.html, {out}/summary.json, {out}/index.html: No space left on device"
    assert str(caught.value) == expected
    assert [result.status for result in caught.value.results] == ["verified"]


def test_a_report_that_cannot_be_made_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(result: ConversionResult) -> str:
        raise ZeroDivisionError("no bins")

    monkeypatch.setattr(batch, "_report", broken)
    with pytest.raises(batch.BatchError, match=r"report\.html: ZeroDivisionError: no bins"):
        run("good")
    assert ConversionResult.load(Path("out/good/result.json")).ok


def test_a_folder_that_cannot_be_used_is_a_wrong_call() -> None:
    Path("out").write_text("a file")
    with pytest.raises(UsageError, match=r"the folder out cannot be used: .*; choose another with -o"):
        run("good")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_dies_with_the_process_that_started_it() -> None:
    parent = subprocess.Popen([*CLI, "convert", "zoo:hangs", "-o", "out"], stderr=subprocess.DEVNULL)
    wait_until(lambda: Path("hanging").exists() and Path("hanging").read_text())
    child = int(Path("hanging").read_text())
    assert not gone(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: gone(child))


def test_a_source_in_its_own_output_folder_is_refused_and_kept(tmp_path: Path) -> None:
    source = tmp_path / "out" / "net" / "exported.onnx"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"the only copy")
    with pytest.raises(UsageError, match=r"exported\.onnx: would be overwritten by a conversion"):
        batch.run_batch([ModelSpec(name="net", source=str(source))], tmp_path / "out")
    assert source.read_bytes() == b"the only copy"
