"""How long a call takes: of every call a figure, on the host and by the GPU's clock."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge.result import ConversionResult
from bridge.runtime import latency

from . import fake_gpu, fake_trt


def test_an_engine_is_called_by_its_inputs_names_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trt.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", fake_gpu.Event)
    monkeypatch.setattr(torch.cuda, "Stream", fake_trt.Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(fake_gpu.Event, "record", lambda event, stream: setattr(event, "at", 0.25 * stream.cuda_stream))
    monkeypatch.setattr(latency, "SECONDS", 0.05)
    engine = tmp_path / "model.engine"
    inputs = {"x": ["FLOAT", [-1, 3]], "b": ["FLOAT", [-1, 3]]}
    shapes = {name: [[1, 3], [4, 3], [8, 3]] for name in inputs}
    engine.write_bytes(fake_trt.plan(inputs=inputs, profiles=[shapes]))
    feeds = {name: np.ones((4, 3), np.float32) for name in ("b", "x")}
    found = latency.measure_latency(ConversionResult("m", engine=engine), feeds)
    assert latency.WARM <= found.calls <= latency.MOST
    assert found.host > 0 and found.gpu == 0.0
