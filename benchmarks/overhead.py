"""What the bridge itself adds to a conversion, in seconds and in memory, and how much memory a large model takes.

    python -m benchmarks.overhead resnet50
    python -m benchmarks.overhead large [--layers 28] [--width 5120]

Seconds: the wall time of ``bridge.convert`` less what is spent inside torch.onnx.export, ONNX Runtime, the module, and
TensorRT's parser and builder. Memory: the proportional set size (PSS: shared pages and mapped files counted once) of
the process and its children, sampled while the conversion runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

GIB = 1 << 30
MIB = 1 << 20


class Bottleneck(nn.Module):
    """ResNet's block of 1x1, 3x3 and 1x1 convolutions, the stride in the middle."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50 with random weights: its size and its operators are what counts here."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(depth):
            layers.append(Bottleneck(channels, width, stride if index == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)).eval()


def large(layers: int, width: int) -> nn.Module:
    with torch.no_grad():
        made = nn.Sequential(*(item for _ in range(layers) for item in (nn.Linear(width, width), nn.ReLU())))
        for parameter in made.parameters():
            parameter.uniform_(-(width**-0.5), width**-0.5)
    return made.eval()


class Outside:
    """Seconds inside calls that are not the bridge's own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        return call


@contextlib.contextmanager
def watching(samples: list[tuple[float, int, int]]) -> Iterator[None]:
    """Samples the PSS of this process and its descendants until the block ends."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            samples.append((time.perf_counter(), *_tree_pss(os.getpid())))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tree_pss(root: int) -> tuple[int, int]:
    """Bytes of all pages, and of those that are not merely a file's (which the system can drop)."""
    total, anonymous, waiting = 0, 0, [root]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        with contextlib.suppress(OSError):  # it has just ended
            rollup = (process / "smaps_rollup").read_text()
            sizes = {line.split()[0]: int(line.split()[1]) << 10 for line in rollup.splitlines()[1:]}
            total += sizes["Pss:"]
            anonymous += sizes["Pss:"] - sizes["Pss_File:"]
            for task in (process / "task").iterdir():
                waiting.extend(map(int, (task / "children").read_text().split()))
    return total, anonymous


def rewriting_alone(exported: Path, folder: Path) -> tuple[float, int]:
    """Seconds and added memory (bytes) of reading, rewriting and writing a model, in a process of its own."""
    import subprocess
    import sys

    script = f"""
import resource, time
import passes, bridge.target
from pathlib import Path
passes.all_rules(); target = bridge.target.resolve()
import onnxruntime
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; began = time.perf_counter()
graph = passes.read(Path({str(exported)!r}))
passes.rewrite(graph, target)
passes.write(graph, Path({str(folder / "alone.onnx")!r}))
print(time.perf_counter() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    return float(out[0]), int(out[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("resnet50", "large"))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=5120)
    options = parser.parse_args()

    import onnxruntime

    import bridge

    small = options.model == "resnet50"
    model = resnet50() if small else large(options.layers, options.width)
    example = torch.randn(1, 3, 224, 224) if small else torch.randn(1, options.width)
    size = sum(parameter.numel() * parameter.element_size() for parameter in (*model.parameters(), *model.buffers()))
    outside = Outside()
    samples: list[tuple[float, int, int]] = []
    stages: list[tuple[float, str]] = []
    session = onnxruntime.InferenceSession
    patches = (
        mock.patch("torch.onnx.export", outside.timed("torch.onnx.export", torch.onnx.export)),
        mock.patch("torch.onnx.ONNXProgram.save", outside.timed("torch.onnx.export", torch.onnx.ONNXProgram.save)),
        mock.patch(
            "bridge.export.Source.run", outside.timed("the module", __import__("bridge.export").export.Source.run)
        ),
        mock.patch.object(session, "__init__", outside.timed("ONNX Runtime", session.__init__)),
        mock.patch.object(session, "run", outside.timed("ONNX Runtime", session.run)),
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(watching(samples))
        began = time.perf_counter()
        result = bridge.convert(
            model,
            (example,),
            workdir=folder,
            cache=False,
            on_stage=lambda stage: stages.append((time.perf_counter(), stage)),
        )
        total = time.perf_counter() - began
        assert result.exported_onnx is not None
        tensorrt = 0.0
        if result.engine is not None:
            tensorrt = json.loads((result.engine.parent / "model.engine.json").read_text())["tensorrt_seconds"]
        alone = rewriting_alone(result.exported_onnx, Path(folder))
    packages = ("torch", "onnx", "onnxruntime", "onnx-graphsurgeon", "polygraphy")
    print(f"{platform.machine()}, {os.cpu_count()} cores; " + ", ".join(f"{p} {version(p)}" for p in packages))
    print(f"{options.model}: {size / MIB:.0f} MiB of weights; {result.status} for {result.target} {result.error or ''}")
    own = total - sum(outside.seconds.values()) - tensorrt
    for name, seconds in (
        *outside.seconds.items(),
        ("TensorRT", tensorrt),
        ("the bridge itself", own),
        ("in all", total),
    ):
        print(f"  {name:20} {seconds:8.2f} s")
    print(
        f"  reading, rewriting and writing alone: {alone[0]:.2f} s, {alone[1] / MIB:.0f} MiB, "
        f"{alone[1] / size:.2f} times the weights"
    )
    before, highest, kept = samples[0][1], max(item[1] for item in samples), max(item[2] for item in samples)
    print(f"  memory before: {before / GIB:.2f} GiB; highest: {highest / GIB:.2f} GiB", end="")
    print(f", {kept / GIB:.2f} GiB without pages of files")
    ends = [*(when for when, _ in stages[1:]), float("inf")]
    for (start, stage), end in zip(stages, ends, strict=True):
        inside = [item for item in samples if start <= item[0] < end]
        if inside:
            total, anonymous = (max(item[place] for item in inside) / GIB for place in (1, 2))
            print(f"    {stage:10} {total:6.2f} GiB, {anonymous:6.2f} GiB without file pages")


if __name__ == "__main__":
    main()
