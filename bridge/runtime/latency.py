"""How long a call of an engine takes, as a module and on inputs that are on the GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from ..inputs import Array
from ..result import ConversionResult, Latency
from ..tensors import to_torch
from .calling import Calling
from .module import TRTModule

WARM, MOST, SECONDS = 10, 200, 1.0
"""Calls that are not counted, and the most that are: as many as fit into that time, and 10 at least."""


def measure_latency(result: ConversionResult, feeds: Mapping[str, Array]) -> Latency:
    """Of the engine of ``result`` on the GPU here, called with ``feeds``. Raises RunError where it cannot run."""
    assert result.engine is not None
    module = TRTModule(result.engine)
    names = module.input_names or list(feeds)
    module._calling = Calling((), None, None, tuple(names))  # by the engine's inputs, whatever the source takes
    given = [to_torch(feeds[name]).cuda() for name in names]
    torch.cuda.synchronize()  # the calls are on a stream of their own, that does not wait for the copies
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        return _timed(module, given)


def _timed(module: Any, given: list[torch.Tensor]) -> Latency:
    stream = torch.cuda.current_stream()
    for _ in range(WARM):
        module(*given)
    stream.synchronize()
    found: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(found) < WARM or (len(found) < MOST and time.perf_counter() < end):
        began = time.perf_counter()
        module(*given)
        stream.synchronize()
        found.append((time.perf_counter() - began) * 1e3)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record(stream)
    for _ in found:
        module(*given)
    last.record(stream)
    last.synchronize()
    gpu = first.elapsed_time(last) / len(found)
    return Latency(round(sorted(found)[len(found) // 2], 4), round(gpu, 4), len(found))
