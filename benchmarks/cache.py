"""What a second conversion takes when its engine comes out of the cache, and where that time goes.

    python -m benchmarks.cache resnet50 [--repeat 5]
    python -m benchmarks.cache large [--layers 28] [--width 5120]

The export is left out: it is torch's, and made each time. Everything after it is counted: rewriting, the search for the
engine, its verification, the comparison of outputs, and writing the files. The cache is a new, empty folder; the module
is made again for each conversion, from the same seed, and each one goes to another working directory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import bridge
from bridge import ConversionResult, cache, caching
from bridge.stages import state

from .overhead import MIB, large, resnet50

PARTS: tuple[tuple[str, Any, str], ...] = (
    ("the key: the model's digest", caching, "engine_key"),
    ("the key of the inputs", caching, "feeds_key"),
    ("outputs read", cache.EngineCache, "outputs"),
    ("engine linked and verified", cache.EngineCache, "take"),
    ("engine hashed and stored", cache.EngineCache, "put"),
    ("outputs stored", cache.EngineCache, "put_outputs"),
    ("outputs compared", state, "compare_stages"),
    ("ONNX Runtime", state, "run_stage"),
)


@contextlib.contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up what the PARTS take."""

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

        return call

    with contextlib.ExitStack() as stack:
        for name, owner, attribute in PARTS:
            stack.enter_context(mock.patch.object(owner, attribute, wrap(name, getattr(owner, attribute))))
        yield


def converted(
    make: Callable[[], Any], example: Any, folder: Path, target: str, hit: bool
) -> tuple[float, dict[str, float]]:
    """Seconds after the export, and those of its parts; ends the program where the engine is ``hit`` and should not be,
    or is not and should."""
    torch.manual_seed(0)
    model = make()
    parts: dict[str, float] = {}
    began = 0.0

    def on_stage(stage: str) -> None:
        nonlocal began
        if stage == "rewrite":
            parts.clear()
            began = time.perf_counter()

    with tempfile.TemporaryDirectory() as workdir, timed(parts):
        result: ConversionResult = bridge.convert(
            model, (example,), workdir=workdir, target=target, cache=folder, on_stage=on_stage, check=True
        )
        total = time.perf_counter() - began
    parts["rewriting"] = result.seconds["rewrite"]
    if result.from_cache != hit:
        raise SystemExit(f"{'not ' * hit}from the cache, by the {result.exporter} exporter: {result.notes}")
    print(f"{'from the cache' if hit else 'built'}: {1000 * total:.0f} ms after the export")
    return total, parts


def show(parts: dict[str, float], total: float) -> None:
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"    {name:30} {1000 * seconds:8.1f} ms")
    print(f"    {'all else':30} {1000 * (total - sum(parts.values())):8.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("resnet50", "large"))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--repeat", type=int, default=5, help="conversions from the cache; the median is shown")
    parser.add_argument("--target", default="tensorrt-rtx")
    options = parser.parse_args()

    small = options.model == "resnet50"
    make = resnet50 if small else lambda: large(options.layers, options.width)
    example = torch.randn(1, 3, 224, 224) if small else torch.randn(1, options.width)
    size = sum(item.numel() * item.element_size() for item in make().state_dict().values())
    packages = ("torch", "onnx", "onnxruntime", "onnx-graphsurgeon", "polygraphy")
    print(f"{platform.machine()}, {os.cpu_count()} cores; " + ", ".join(f"{name} {version(name)}" for name in packages))
    print(f"{options.model}: {size / MIB:.0f} MiB of weights, for {options.target}")
    with tempfile.TemporaryDirectory() as folder:
        first, parts = converted(make, example, Path(folder), options.target, False)
        show(parts, first)
        again = [converted(make, example, Path(folder), options.target, True) for _ in range(options.repeat)]
    median = statistics.median(total for total, _ in again)
    typical = min(again, key=lambda item: abs(item[0] - median))
    print(
        f"the second time takes {100 * median / first:.1f} % of the first (median of {len(again)}); of the median one:"
    )
    show(typical[1], typical[0])


if __name__ == "__main__":
    main()
