"""What TRTModule itself costs in a call, with warm caches and with cold ones; needs no GPU.

    python -m benchmarks.cold_calls [--interpreted]

--interpreted: as where the package was installed without a C compiler.

TensorRT's launch of a large engine runs through so much of the driver's code that Python's is out of the processor's
caches afterwards. Here a stand-in for the engine does that by writing to memory. "Before" and "after" are the
microseconds up to the launch and from its end on; of every ``AHEAD`` calls one allocates outputs for the next ones.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridge.runtime import context
from bridge.runtime.context import AHEAD
from bridge.runtime.module import TRTModule

from .timing import median

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import fake_trt

CALLS = 400
CACHES = np.zeros(16 << 20, np.uint8)
"""More than the caches of a core hold."""
TWO_INPUTS: dict[str, Any] = {
    "inputs": {"x": ["FLOAT", [-1, 3]], "b": ["FLOAT", [1, 3]]},
    "profiles": [{"x": [[1, 3], [4, 3], [8, 3]]}],
}


def evict() -> None:
    CACHES[::64] += 1


class Launch:
    """In TensorRT's place: notes when it is called and when it returns."""

    def __init__(self) -> None:
        self.cold = False
        self.began = self.ended = 0

    def __call__(self, stream: int) -> bool:
        self.began = time.perf_counter_ns()
        if self.cold:
            evict()
        self.ended = time.perf_counter_ns()
        return True


def measure(
    module: TRTModule, inputs: tuple[torch.Tensor, ...], launch: Launch, cold: bool
) -> list[tuple[float, float]]:
    """Microseconds before and after the launch, of each call."""
    launch.cold = cold
    found = []
    for _ in range(CALLS):
        if cold:
            evict()
        began = time.perf_counter_ns()
        output = module(*inputs)
        found.append(((launch.began - began) / 1e3, (time.perf_counter_ns() - launch.ended) / 1e3))
        del output
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpreted", action="store_true")
    options = parser.parse_args()
    monkeypatch = pytest.MonkeyPatch()
    if options.interpreted:
        monkeypatch.setattr(context, "ContextLaunch", None)
    elif context.ContextLaunch is None:
        raise SystemExit("bridge.runtime._launch was not compiled; measure with --interpreted, or install a C compiler")
    fake_trt.install(monkeypatch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", [0].__getitem__, raising=False)  # of one GPU, -1
    monkeypatch.setattr(context, "capturing_now", lambda: bool)  # which says False
    launch, make = Launch(), fake_trt.Engine.create_execution_context

    def make_with_launch(engine: fake_trt.Engine) -> fake_trt.Context:
        made: Any = make(engine)
        made.execute_async_v3, made.set_tensor_address = launch, lambda name, address: True
        return made

    monkeypatch.setattr(fake_trt.Engine, "create_execution_context", make_with_launch)
    print("| inputs | caches | before | after | together | one call in 8 |".replace("8", str(AHEAD)))
    print("|---|---|---|---|---|---|")
    x, bias = torch.rand(2, 3), torch.ones(1, 3)
    examples: tuple[tuple[dict[str, Any], tuple[torch.Tensor, ...]], ...] = (({}, (x,)), (TWO_INPUTS, (x, bias)))
    with torch.no_grad():
        for changes, inputs in examples:
            module = TRTModule(fake_trt.plan(**changes))
            for _ in range(10):
                module(*inputs)
            gc.disable()
            for cold in (False, True):
                times = measure(module, inputs, launch, cold)
                sums = sorted(before + after for before, after in times)
                usual = [median([time[place] for time in times]) for place in (0, 1)]
                slow = median(sums[-CALLS // AHEAD :])
                cells = [f"{value:.1f}" for value in (*usual, median(sums), slow)]
                print(f"| {len(inputs)} | {'cold' if cold else 'warm'} | {' | '.join(cells)} |")
            gc.enable()
    monkeypatch.undo()


if __name__ == "__main__":
    main()
