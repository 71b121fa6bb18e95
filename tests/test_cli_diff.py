"""``bridge diff`` of one model, from the command line: what is measured, written and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bridge.diff
from bridge import cli, target

from .support import RTX, RTX_INSTALLED

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return {"y": self.second(torch.relu(self.first(x)))}

class Norm(nn.Module):
    def forward(self, x):
        return x / (x * x).sum(-1, keepdim=True).sqrt()  # a sum of squares beyond float16

class Overflows(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 64), Norm(), nn.Linear(64, 4)

    def forward(self, x):
        return self.last(self.norm(100 * self.first(x)))

def overflows():
    return Overflows(), (torch.randn(2, 8),)

def net():
    print("noise of an exporter")
    return Net(), (torch.randn(2, 8),)

def samples():
    return [(torch.randn(2, 8),) for _ in range(3)]

def leaving(outputs, inputs):
    raise SystemExit(0)

def largest(outputs, inputs):
    return max(float(abs(one["y"]).max()) for one in outputs)
"""
REPORTS = {"diff.json", "diff.html", "diff.md"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(target, "gpu_compute_capabilities", tuple)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "diffnets", raising=False)
    (tmp_path / "diffnets.py").write_text(MODULE)
    return tmp_path


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_a_model_is_converted_measured_reported_and_looked_at_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--target", RTX, "--shapes", "x=1x8:2x8:4x8", "--no-build", "--no-cache", "--json"]
    status = cli.main(["diff", "diffnets:net", "-o", "out", "--samples", "diffnets:samples", *options])
    found = json.loads(capsys.readouterr().out)
    assert status == 0 and found["ok"] is True and found["samples"]["count"] == 3
    assert {row["stage"] for row in found["stages"]} >= {"torch", "exported", "rewritten"}
    assert {path.name for path in (here / "out").iterdir()} >= REPORTS
    assert json.loads((here / "out" / "diff.json").read_text()) == found

    looked = ["diff", "out", "--stages", "torch,exported", "--metric", "diffnets:largest", "--no-layers", "-o", "again"]
    assert cli.main([*looked, "--module", "diffnets:net"]) == 0
    assert "see again/diff.html" in capsys.readouterr().out
    again = json.loads((here / "again" / "diff.json").read_text())
    assert {row["stage"] for row in again["stages"]} == {"torch", "exported"} and not again["layers"]
    assert [metric["name"] for metric in again["metrics"]] == ["largest", "largest"]

    assert cli.main(["diff", "out", "--tolerance", "0,1e-30", "-o", "strict/one"]) == 1
    strict = json.loads((here / "strict" / "one" / "diff.json").read_text())
    assert strict["ok"] is False and (here / "strict" / "one" / strict["samples"]["worst_file"]).is_file()


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_a_metric_that_cannot_be_measured_is_told_of_and_costs_the_exit_status_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["diff", "diffnets:net", "-o", "out", "--target", RTX, "--no-build", "--no-cache", "--no-layers"]
    assert cli.main([*model, "--metric", "diffnets:leaving"]) == 1
    captured = capsys.readouterr()
    assert "torch, exported and rewritten agree" in captured.out and "see out/diff.html" in captured.out
    assert "bridge: metric 'leaving' at torch: raises SystemExit: 0\n" in captured.err
    found = json.loads((here / "out" / "diff.json").read_text())
    assert found["ok"] is True and found["metrics"][0]["note"] == "raises SystemExit: 0"
    assert "failed: raises SystemExit: 0" in (here / "out" / "diff.md").read_text()
    assert "failed: raises SystemExit: 0" in (here / "out" / "diff.html").read_text()


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("output", ["taken.py", "taken.py/deep"])
def test_an_output_folder_that_cannot_be_made_is_refused_in_the_same_words_of_a_model_and_of_a_folder(
    here: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    (here / "taken.py").write_text("# mine\n")
    model = ["diff", "diffnets:net", "--target", RTX, "--no-build", "--no-cache", "--no-layers"]
    assert cli.main([*model, "-o", output]) == 1
    words = capsys.readouterr().err
    assert f"{output}: " in words and "Nothing half-written was left." in words
    assert cli.main([*model, "-o", "out"]) == 0
    capsys.readouterr()
    assert cli.main(["diff", "out", "-o", output]) == 1
    assert capsys.readouterr().err == words.splitlines(True)[-1].replace(str(here / output), output)


def test_a_manifest_that_wants_no_layers_gets_none(here: Path) -> None:
    (here / "models.yaml").write_text("models:\n  - {name: a, source: diffnets:net, precision: fp16, layers: false}\n")
    assert cli.main(["diff", "models.yaml", "-o", "out", "--target", RTX, "--no-build"]) == 0
    assert json.loads((here / "out" / "diff.json").read_text())["layers"] == []
    assert json.loads((here / "out" / "result.json").read_text())["layers"] == []


def test_what_is_called_from_python_is_found_without_knowing_its_file() -> None:
    lazy = "import bridge, bridge.diff, sys; assert not {'torch', 'onnx', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", lazy], check=True)
    for name in bridge.diff.__all__:
        assert callable(getattr(bridge.diff, name)), name
    assert bridge.verify is bridge.diff.verify and bridge.bisect is bridge.diff.bisect
    assert bridge.compare_runs is bridge.diff.compare_runs
    with pytest.raises(AttributeError, match="no attribute 'dif'"):
        bridge.diff.__getattr__("dif")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["diffnets:net"], "-o DIR: name the folder"),
        (["diffnets:net", "-o", "out", "--module", "diffnets:net"], "--module is of a conversion's folder"),
        (["diffnets:net", "-o", "out", "--size", "2"], "--size is of two runs, and one model was given"),
        (["nothing.onnx", "-o", "out"], "no such file"),
        (["models.yaml", "-o", "out"], "models.yaml: holds 2 models; choose one with --only NAME"),
        (["models.yaml", "-o", "out", "--only", "c"], "no model is called 'c'; there are a, b"),
        (["models.yaml", "-o", "out", "--only", "b"], "b: has several precisions; choose one with --precision"),
        (["."], "holds no result.json"),
        (["run"], "run: is a run; give one of its models, such as run/net, or a second run"),
        ([".", "--target", "tensorrt"], "--target is of a conversion, and . is a finished one"),
        ([".", "--precision", "fp16"], "--precision is of a conversion"),
    ],
)
def test_a_wrong_call_is_refused_with_the_cause(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (here / "run" / "net").mkdir(parents=True)
    (here / "run" / "net" / "result.json").write_text("{}")
    (here / "models.yaml").write_text(
        "models:\n  - {name: a, source: diffnets:net}\n  - {name: b, source: diffnets:net, precision: [fp32, fp16]}\n"
    )
    assert cli.main(["diff", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_a_bisection_writes_the_precision_file_that_convert_takes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["diffnets:overflows", "--target", RTX, "--samples", "diffnets:samples", "--no-cache", "-o", "out"]
    assert cli.main(["bisect", *model, "--precision", "fp16"]) == 0
    out = capsys.readouterr().out
    assert "is within its tolerance" in out and (here / "out" / "precision.yaml").is_file() == ("see out" in out)
    assert cli.main(["bisect", *model, "--precision", "fp16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] in ("held", "found")
    assert cli.main(["bisect", *model, "--precision", "fp32"]) == 2
    assert "fp32 has nothing that could be raised" in capsys.readouterr().err
