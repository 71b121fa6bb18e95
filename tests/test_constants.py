"""Inputs of ONNX files that are constants of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

import bridge
from bridge.cli import main
from bridge.errors import UsageError

from .support import RTX, run_onnx

BRANCHES = """<ir_version: 9, opset_import: ["" : 17]>
    g (float[n, 4] x, bool[1] cached, float scale, float[n, 2] past) => (float[n, m] y) {
        chosen = Squeeze (cached)
        y = If (chosen) <
            then_branch = once () => (float[n, 6] a) { a = Concat <axis = 1> (x, past) },
            else_branch = first () => (float[n, 4] b) { b = Mul (x, scale) }
        >
    }"""
"""As decoders have it that are merged: of two ways one, whose results are of different sizes."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "merged.onnx"
    onnx.save(onnx.parser.parse_model(BRANCHES), path)
    return path


X = np.arange(8, dtype=np.float32).reshape(2, 4)
PAST = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(("cached", "left"), [(True, {"x", "past"}), (False, {"x", "past", "scale"})])
def test_the_branch_of_a_constant_is_all_that_is_left(path: Path, tmp_path: Path, cached: bool, left: Any) -> None:
    feeds = {"x": X, "past": PAST, "scale": np.array(3, np.float32)}
    example = {name: feeds[name] for name in left}
    constants = {"cached": cached} if left == feeds.keys() else {"cached": cached, "scale": 3}
    result = bridge.convert(
        path, example, constants=constants, workdir=tmp_path / "out", target=RTX, build=False, cache=False
    )
    assert result.status == "rewritten", result.error
    assert {item.name for item in result.inputs} == left
    model = onnx.load(str(result.onnx))
    assert "If" not in {node.op_type for node in model.graph.node}
    [found] = run_onnx(result.onnx, example).values()
    np.testing.assert_array_equal(found, np.concatenate([X, PAST], 1) if cached else X * 3)


def test_an_input_that_decides_is_told_with_what_makes_a_constant_of_it(path: Path, tmp_path: Path) -> None:
    result = bridge.convert(
        path,
        {"x": X, "past": PAST, "cached": np.array([True]), "scale": np.array(3, np.float32)},
        workdir=tmp_path / "out",
        target=RTX,
        build=False,
        cache=False,
    )
    told = [note for note in result.notes if "--constant" in note]
    assert len(told) == 1 and "the input 'cached' decides" in told[0], result.notes


def test_the_command_line_and_explain_take_constants(path: Path, tmp_path: Path, capsys: Any) -> None:
    shapes = ["--shapes", "x=1x4:2x4:3x4", "--shapes", "past=1x2:2x2:3x2"]
    constants = ["--constant", "cached=true", "--constant", "scale=2.5"]
    common = [str(path), *shapes, *constants, "--target", RTX, "--no-build"]
    assert main(["convert", *common, "-o", str(tmp_path / "out"), "--no-cache"]) == 0
    kept = bridge.ConversionResult.load(tmp_path / "out" / "merged" / "result.json")
    assert [item.name for item in kept.inputs] == ["x", "past"]
    capsys.readouterr()
    main(["explain", *common])
    assert "If" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"cache": True}, r"'cache': no such input; the model has x, cached, scale, past"),
        ({"cached": 2}, r"'cached': 2 is no bool"),
        ({"cached": [True, False]}, r"'cached': has the shape \[2\]; the model takes \[1\]"),
        ({"scale": "3"}, r"'scale': is a number, a boolean, or nested lists"),
        ({"x": 1.0}, r"'x': has the shape \[\]; the model takes \['n', 4\]"),
    ],
)
def test_a_constant_that_does_not_fit_is_named(path: Path, tmp_path: Path, constants: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        bridge.convert(path, constants=constants, workdir=tmp_path / "out", target=RTX, build=False)


def test_constants_of_a_module_are_its_numbers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="constants: are of an ONNX file's inputs"):
        bridge.convert(torch.nn.Linear(2, 2), (torch.randn(1, 2),), constants={"x": 1}, workdir=tmp_path, target=RTX)
    with pytest.raises(UsageError, match="constants: are of an ONNX file's inputs"):
        bridge.explain(torch.nn.Linear(2, 2), (torch.randn(1, 2),), constants={"x": 1}, target=RTX)
