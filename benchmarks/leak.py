"""Whether many calls, and loading and unloading again and again, leave GPU and host memory where they were.

    python -m benchmarks.leak --json OUT.json [--calls 20000] [--cycles 50]

A small convolutional net and an LSTM are converted, called so many times plainly and as CUDA graphs, and loaded from a
state dict, called and deleted so many times. Memory is read before, halfway and after; the first half may fill caches,
and the second must not grow by more than the limit: 8 MiB of the GPU's memory, 1 MiB of what torch has allocated there,
16 MiB of the process's own. Exits with 1 where one did, or a step failed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .timing import read_json, words, write_json

MIB = 1 << 20
LIMITS = {"gpu_used": 8.0, "torch_allocated": 1.0, "host_rss": 16.0}
"""MiB by which the second half may grow."""

Row = dict[str, Any]


def host_rss() -> float:
    """MiB of the process's own memory in use."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def memory() -> dict[str, float]:
    """In MiB, with all work done, caches empty, and free memory given back to the system."""
    import torch

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = {"host_rss": round(host_rss(), 2)}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        found["gpu_used"] = round((total - free) / MIB, 2)
        found["torch_allocated"] = round(torch.cuda.memory_allocated() / MIB, 3)
    return found


def halves(work: Callable[[int], None], times: int, warm: int, read: Callable[[], dict[str, float]] = memory) -> Row:
    """Does ``work`` ``times`` times after some for warming up; what memory was, and what grew beyond its limit."""
    for index in range(warm):
        work(index)
    points = [read()]
    began = time.monotonic()
    for half in range(2):
        for index in range(times // 2):
            work(half * (times // 2) + index)
        points.append(read())
    growth = {key: round(points[2][key] - points[1][key], 3) for key in points[0]}
    too_much = {key: value for key, value in growth.items() if value > LIMITS[key]}
    return {
        "status": "grew" if too_much else "ok",
        "times": times,
        "seconds": round(time.monotonic() - began, 2),
        **dict(zip(("before", "halfway", "after"), points, strict=True)),
        "second_half_mib": growth,
        "beyond_limit": too_much,
    }


def convert(model: str, target: str, gpu: bool) -> tuple[Any, Any]:
    """A module and its inputs; without a GPU the torch module itself, to check this program."""
    import torch

    from .models import MODELS, Small

    torch.manual_seed(0)
    module, inputs = (Small().eval(), (torch.randn(4, 3, 32, 32),))
    if model == "lstm":
        module, inputs = MODELS["lstm"].module(), MODELS["lstm"].inputs(8)
    if not gpu:
        return module, inputs
    from bridge import torch2trt

    made = torch2trt(module, inputs, target=target, name=model, cache=False)
    return made, tuple(tensor.cuda() for tensor in inputs)


def calls(module: Any, inputs: Any, times: int) -> Row:
    """Without waiting for each; every hundredth call waits, as a program that reads its results does."""
    import torch

    gpu = inputs[0].is_cuda

    def work(index: int) -> None:
        module(*inputs)
        if gpu and index % 100 == 99:
            torch.cuda.current_stream().synchronize()

    return halves(work, times, warm=min(200, times))


def cycles(module: Any, inputs: Any, times: int, folder: Path) -> Row:
    """state_dict to a file, a fresh module that loads it, a call, and gone."""
    import torch

    gpu = inputs[0].is_cuda
    path = folder / "state.pt"
    torch.save(module.state_dict(), path)

    def work(index: int) -> None:
        if gpu:
            from bridge import TRTModule

            fresh: Any = TRTModule()
        else:
            import copy

            fresh = copy.deepcopy(module)
        fresh.load_state_dict(torch.load(path, weights_only=True))
        fresh(*inputs)
        if gpu:
            torch.cuda.current_stream().synchronize()
        del fresh
        gc.collect()

    return halves(work, times, warm=min(5, times))


def steps(options: argparse.Namespace, folder: Path, model: str) -> list[tuple[str, Callable[[], Row]]]:
    import torch

    gpu = torch.cuda.is_available()
    module, inputs = convert(model, options.target, gpu)

    def graphed() -> Row:
        module.capture(*inputs)
        return calls(module, inputs, options.calls)

    found = [("calls", lambda: calls(module, inputs, options.calls))]
    found.append(("cycles", lambda: cycles(module, inputs, options.cycles, folder)))
    return [*found, ("graph calls", graphed)] if gpu else found


def main() -> None:
    import tempfile

    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--models", nargs="*", default=["small", "lstm"], choices=("small", "lstm"))
    parser.add_argument("--target", default="tensorrt")
    options = parser.parse_args()
    report: Row = read_json(options.json) or {"rows": {}}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: the torch modules themselves"
    report |= {"gpu": gpu, "python": platform.python_version(), "torch": torch.__version__, "limits_mib": LIMITS}
    failed = False
    for model in options.models:
        try:
            with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
                for name, step in steps(options, Path(folder), model):
                    try:
                        row = step()
                    except Exception as error:  # noqa: BLE001 (the other steps are taken still; this one is named)
                        row = {"status": "failed", "error": words(error)}
                    failed = keep(report, f"{model} {name}", row, options.json) or failed
        except Exception as error:  # noqa: BLE001 (as above, for the conversion)
            failed = (
                keep(report, f"{model} conversion", {"status": "failed", "error": words(error)}, options.json) or failed
            )
    sys.exit(1 if failed else 0)


def keep(report: Row, name: str, row: Row, path: Path) -> bool:
    """Writes the row down; returns whether it is a bad one."""
    report["rows"][name] = row
    write_json(path, report)
    print(f"{name}: {row['status']} {row.get('second_half_mib', row.get('error', ''))}", flush=True)
    return bool(row["status"] != "ok")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    main()
