"""Where the rewritten model computes something else for a reason that is known, the error says that reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passes import write
from passes.framework import example

from .support import convert


def _error(folder: Path, body: Callable[..., Any], x: np.ndarray) -> str:
    path = folder / "m.onnx"
    write(example({"x": (x.dtype.name, list(x.shape))}, body, opset=13), path)
    result = convert(path, {"x": x}, workdir=folder / "out", target="tensorrt-8.5", build=False)
    assert result.status == "failed" and result.stage == "rewrite", result
    return str(result.error)


def test_an_input_beyond_int32_is_named_where_the_target_has_no_int64(tmp_path: Path) -> None:
    def smallest(g: Any, x: Any) -> Any:
        return g.op.TopK(x, [1], axis=1, largest=0, outputs=2)

    error = _error(tmp_path, smallest, np.array([[5, 3, 1 << 40]]))
    assert "has no int64, and input 'x' has 1099511627776 at [0, 2]" in error and "passes changed" not in error, error


def test_an_output_beyond_int32_is_named_where_the_target_has_no_int64(tmp_path: Path) -> None:
    error = _error(tmp_path, lambda g, x: g.op.Mul(x, g.constant(1 << 20)), np.array([1, -4096, 7]))
    assert "has -4294967296 at [1], which int32 does not hold" in error and "passes changed" not in error, error


@pytest.mark.parametrize("seed", [None, 1.0])
def test_what_draws_random_numbers_is_named(seed: float | None, tmp_path: Path) -> None:
    """With a seed it can be compared."""

    def body(g: Any, x: Any) -> Any:
        return g.op.Dropout(x, g.constant(0.5, np.float32), g.constant(np.array(True)), seed=seed and int(seed))

    if seed is None:
        error = _error(tmp_path, body, np.ones([64], np.float32))
        assert "draws random numbers, at Dropout" in error and "eval mode" in error, error
        assert "passes changed" not in error, error
        return
    path = tmp_path / "m.onnx"
    write(example({"x": ("float32", [64])}, body, opset=13), path)
    assert convert(path, workdir=tmp_path / "out", target="tensorrt-8.5", build=False).status == "rewritten"
