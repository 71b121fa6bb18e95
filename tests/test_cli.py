"""Promises of the command line: its exit status, its words, and that nothing half-written is left behind."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge import cli

from .fake_pipeline import CLI, ROOT, ZOO, run_cli
from .support import has_ended


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    (tmp_path / "zoo.py").write_text(ZOO)
    return tmp_path


def status_of(folder: Path, name: str) -> str:
    return str(json.loads((folder / name / "result.json").read_text())["status"])


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("sources", "status"),
    [
        (["good", "other"], 0),
        (["good", "refused"], 1),
        (["good", "misdescribed"], 2),
        (["segfaults", "misdescribed", "nothing_there"], 1),
        (["misdescribed", "nothing_there"], 2),
    ],
)
def test_the_exit_status_tells_a_wrong_call_from_a_failure(zoo: Path, sources: list[str], status: int) -> None:
    done = run_cli("convert", *(f"zoo:{source}" for source in sources), "-o", "out", cwd=zoo)
    assert done.returncode == status, done.stderr


def test_plain_lines_are_shown_where_there_is_no_terminal_and_a_table_with_the_errors_at_the_end(zoo: Path) -> None:
    done = run_cli("convert", "zoo:good", "zoo:refused", "-o", "out", cwd=zoo)
    lines = [line.rpartition(" (")[0] for line in done.stderr.splitlines()]
    assert lines[:3] == ["[1/2] good: export", "[1/2] good: rewrite", "[1/2] good: build"]
    assert "[1/2] good: verified" in lines
    assert lines[-1] == "[2/2] refused: failed (build)"
    assert "verified: the engine ran, and its outputs agree" in done.stdout
    assert done.stdout.endswith("\nrefused: failed (build), in out/refused\n  the parser refused DFT\n")
    assert "\x1b" not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_terminal_gets_a_live_display(zoo: Path) -> None:
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [*CLI, "convert", "zoo:good", "-o", "out"], cwd=zoo, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(main, 65536):
            shown += data
    except OSError:  # how Linux tells that the other side has closed
        pass
    os.close(main)
    assert process.wait() == 0
    assert b"0 of 1 models" in shown
    assert b"[1/1] good: verified" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zoo:good"], "the following arguments are required: -o/--output"),
        (
            ["zoo:good", "-o", "out", "--shapes", "x=8x3:4x3:2x3"],
            "--shapes: input 'x': min <= opt <= max does not hold",
        ),
        (["zoo:good", "-o", "out", "--shapes", "1x3"], "'1x3' names no input; write INPUT=SHAPE"),
        (["zoo:good", "-o", "out", "--tolerance", "y=1,1", "--tolerance", "y=2,2"], "given twice for 'y'"),
        (
            ["zoo:good", "-o", "out", "--builder", "workspace=1", "--builder", "workspace=2"],
            "given twice for 'workspace'",
        ),
        (["zoo:good", "-o", "out", "--builder", "wrkspace=1"], "--builder: unknown setting 'wrkspace'; did you mean"),
        (["zoo:good", "-o", "out", "--builder", "tf32"], "'tf32' is not of the form NAME=VALUE"),
        (
            ["zoo:good", "-o", "out", *(f"--shapes={item}" for item in ("x=1", "x=2", "x=3", "y=1", "y=2"))],
            "--shapes was given 2 times for 'y' and 3 times for another input",
        ),
        (["zoo:good", "-o", "out", "--tolerance", "1e-3"], "'1e-3' is not of the form RTOL,ATOL or OUTPUT=RTOL,ATOL"),
        (["zoo:good", "-o", "out", "--tolerance", "0,0", "--tolerance", "y=0,0"], "give one for all outputs, or one"),
        (["zoo:good", "-o", "out", "--tolerance", "nan,0"], "--tolerance: should be a finite number, not nan"),
        (["zoo:good", "-o", "out", "--timeout", "0"], "--timeout: should be greater than 0, not 0.0"),
        (["zoo:good", "-o", "out", "--jobs", "0"], "'0' is not a number of models"),
        (["zoo", "-o", "out"], "'zoo' is neither an .onnx file nor of the form package.module:function, nor a .yaml"),
        (["none.onnx", "-o", "out"], "no such file"),
        (["none.yaml", "-o", "out"], "none.yaml: No such file or directory"),
        (["zoo:good", "-o", "zoo.py"], "the folder zoo.py cannot be used: File exists; choose another with -o"),
    ],
)
def test_a_wrong_call_is_refused_with_the_cause_before_anything_is_started(
    zoo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(zoo)
    try:
        status: object = cli.main(["convert", *arguments])
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert status == 2
    assert message in shown.err
    assert shown.out == ""
    assert everything(zoo) == {"zoo.py"}


def test_the_mistakes_of_a_manifest_are_shown_with_their_lines(zoo: Path) -> None:
    (zoo / "nets.yaml").write_text("models:\n  - name: good\n    source: zoo:good\n    profile: {}\n")
    done = run_cli("convert", "nets.yaml", "-o", "out", cwd=zoo)
    assert done.returncode == 2
    assert "nets.yaml:4: model 'good': unknown key 'profile'; did you mean 'profiles'?" in done.stderr
    assert not (zoo / "out").exists()


def test_options_reach_the_conversion_and_win_over_the_manifest(zoo: Path) -> None:
    (zoo / "nets.yaml").write_text(
        "defaults: {precision: fp16, seed: 3}\nmodels: [{name: net, source: zoo:good, precision: bf16}]\n"
    )
    options = [
        "--precision",
        "fp32",
        "--shapes",
        "x:0=1x3:2x3:4x3",
        "--shapes",
        "x:0=8x3:16x3:32x3",
        "--shapes",
        "mask=1x3",
        "--tolerance",
        "y=1e-3,1e-4",
        "--builder",
        "workspace=1073741824",
        "--builder",
        "tf32=true",
        "--builder",
        "hardware_compatibility=ampere_plus",
        "--builder",
        'device_types={"head": "DLA"}',
        "--no-build",
        "--prove",
    ]
    done = run_cli("convert", "nets.yaml", "-o", "out", *options, cwd=zoo)
    assert done.returncode == 0, done.stdout
    received = json.loads((zoo / "out/net/result.json").read_text())["source"]
    for part in (
        "'precision': 'fp32'",
        "'seed': 3",
        "'build': False",
        "'prove': True",
        "'profiles': [{'x:0': ((1, 3), (2, 3), (4, 3)), 'mask': ((1, 3), (1, 3), (1, 3))}, "
        "{'x:0': ((8, 3), (16, 3), (32, 3)), 'mask': ((1, 3), (1, 3), (1, 3))}]",
        "'builder': {'workspace': 1073741824, 'tf32': True, 'hardware_compatibility': 'ampere_plus', "
        "'device_types': {'head': 'DLA'}}",
        "'tolerance': {'y': Tolerance(rtol=0.001, atol=0.0001, whole=False)}",
    ):
        assert part in received, received


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT, signal.SIGINT]])
def test_an_interrupted_build_ends_in_one_error_and_leaves_nothing_half_written(
    zoo: Path, signals: list[signal.Signals]
) -> None:
    process = subprocess.Popen(
        [*CLI, "convert", "zoo:good", "zoo:hangs", "zoo:other", "-o", "out"],
        cwd=zoo,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 30
    while not ((zoo / "hanging").exists() and (zoo / "hanging").read_text()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    for number in signals:
        os.killpg(process.pid, number)
        time.sleep(0.01)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "bridge: interrupted in the middle of hangs: 1 of 3 models have a result"
    assert "Traceback" not in out + err
    assert everything(zoo / "out") == {
        *("good", "good/model.engine", "good/result.json", "good/report.html", "good/convert.log"),
        *("summary.json", "index.html"),
    }
    assert [model["name"] for model in json.loads((zoo / "out/summary.json").read_text())["models"]] == ["good"]
    assert has_ended(int((zoo / "hanging").read_text()))


@pytest.fixture
def no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python leaves parts of it where a file may not become so large, and reads them later."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))


@pytest.mark.usefixtures("no_bytecode")
def test_a_full_disk_costs_the_model_that_needs_the_room_and_is_told_with_the_file(zoo: Path) -> None:
    done = run_cli("convert", "zoo:big", "zoo:good", "-o", "out", cwd=zoo, preexec_fn=limit_files)
    assert done.returncode == 1
    told = f"cannot write {zoo}/out/big: File too large; make room, and run it again"
    assert done.stdout.count("File too large") == 1 and told in done.stdout, done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert (status_of(zoo / "out", "big"), status_of(zoo / "out", "good")) == ("failed", "verified")
    assert everything(zoo / "out/big") == {"result.json", "report.html", "convert.log"}


def limit_files_to_nothing() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.usefixtures("no_bytecode")
def test_a_disk_without_any_room_is_told_with_the_files_and_leaves_none_half_written(zoo: Path) -> None:
    done = run_cli("convert", "zoo:good", "-o", "out", cwd=zoo, preexec_fn=limit_files_to_nothing)
    assert done.returncode == 1
    assert f"{zoo}/out/summary.json" in done.stderr and "File too large" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert everything(zoo / "out") <= {"good", "good/convert.log"}


@pytest.mark.parametrize(
    ("command", "words"),
    [("convert", "package.module:function"), ("explain", "Exit status: 0 where nothing is refused"), ("passes", "why")],
)
def test_help_is_quick_and_imports_nothing_heavy(command: str, words: str) -> None:
    code = f"import sys; from bridge import cli; sys.argv = ['bridge', {command!r}, '--help']\n"
    code += "try: cli.main()\nexcept SystemExit: print([m for m in sys.modules if m in HEAVY])"
    heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "numpy", "pydantic", "ruamel.yaml", "rich", "jinja2"}
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {heavy!r}\n{code}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert words in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_script_is_the_same_command_from_a_checkout(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/convert.py"), "none.onnx", "-o", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"convert.py: no such file: {tmp_path}/none.onnx\n"


def test_the_library_and_an_explanation_are_printed_by_the_same_command(zoo: Path) -> None:
    listed = run_cli("passes", "--target", "tensorrt-8.5", cwd=zoo)
    assert listed.returncode == 0 and "rules for TensorRT 8.5" in listed.stdout, listed.stderr
    refused = run_cli("passes", "--target", "tensorflow", cwd=zoo)
    assert refused.returncode == 2 and "'tensorflow': not one of" in refused.stderr
    missing = run_cli("explain", "nothing.onnx", cwd=zoo)
    assert missing.returncode == 2 and "no such file" in missing.stderr and missing.stdout == ""
    assert "Traceback" not in listed.stderr + refused.stderr + missing.stderr


def test_one_model_of_a_manifest_can_be_converted_alone(zoo: Path) -> None:
    (zoo / "m.yaml").write_text("models:\n  - {name: a, source: 'zoo:good'}\n  - {name: b, source: 'zoo:good'}\n")
    assert run_cli("convert", "m.yaml", "-o", "out", "--only", "b", cwd=zoo).returncode == 0
    assert [item["name"] for item in json.loads((zoo / "out" / "summary.json").read_text())["models"]] == ["b"]
    refused = run_cli("convert", "m.yaml", "-o", "out", "--only", "c", cwd=zoo)
    assert refused.returncode == 2
    assert "no model is called 'c'; there are a, b" in refused.stderr


def test_python_m_bridge_is_the_console_script() -> None:
    done = subprocess.run([sys.executable, "-m", "bridge", "passes"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "svm_classifier_as_kernels" in done.stdout, done.stderr
