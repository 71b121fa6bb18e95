"""What quantisation costs in accuracy: a small CNN and a small ViT, trained here on scikit-learn's handwritten digits.

    pip install 'torch-tensorrt-bridge[benchmarks]'
    python -m benchmarks.digits [--method max] [--scheme int8] [--target tensorrt-rtx --build]

Both are trained in torch on the CPU, converted by the bridge, quantised by calibration on training pictures, and run
in ONNX Runtime on the test pictures; with ``--build`` each is also converted to an engine in that precision, which is
run on them where there is a GPU for it. The exit status is 1 where the quantised accuracy is more than half a point
below that of fp32, or there is no engine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

import bridge
from bridge.inputs import Array
from bridge.ranges import METHODS, measure
from bridge.target import resolve
from passes import read, write
from passes.ir import scopes
from passes.quantisation import QUANTISABLE, QuantisationLog, quantise

BATCH = 64
CALIBRATION = 4
"""Batches of training pictures."""
ALGORITHM_OF = {"max": "minmax", "entropy": "entropy", "percentile": "legacy"}
"""What ``convert`` calls them, after TensorRT's calibrators."""
POINTS = 0.5
"""By how much the accuracy may fall, in hundredths."""


class Block(nn.Module):
    """A residual block, as of ResNet."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Conv2d(width, out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def cnn() -> nn.Module:
    """Convolutions with a residual block each, pooling, and two linear layers; 43 thousand weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1),
        nn.ReLU(),
        Block(16, 32, 2),
        Block(32, 32, 1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Attention(nn.Module):
    """Self-attention, by products of activations."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class ViT(nn.Module):
    """Patches of 2 by 2 pixels, three blocks of 64 channels; 152 thousand weights."""

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for index, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * index](x))
            x = x + mlp(self.norms[2 * index + 1](x))
        return self.head(self.norms[-1](x).mean(1))


MODELS = {"cnn": (cnn, 12), "vit": (ViT, 40)}
"""How to make each, and for how many epochs it is trained."""


@dataclass(frozen=True)
class Digits:
    """1,797 pictures of 8 by 8 pixels, a quarter of them for tests."""

    pictures: Array
    labels: Array
    test_pictures: Array
    test_labels: Array

    @classmethod
    def load(cls) -> Digits:
        from sklearn.datasets import load_digits

        data = load_digits()
        order = np.random.default_rng(0).permutation(len(data.target))
        pictures = (data.images[order, None] / 16).astype(np.float32)
        labels, count = data.target[order], 3 * len(order) // 4
        return cls(pictures[:count], labels[:count], pictures[count:], labels[count:])

    def samples(self) -> Iterator[Array]:
        for index in range(CALIBRATION):
            yield self.pictures[index * BATCH : (index + 1) * BATCH]


def trained(name: str, digits: Digits) -> nn.Module:
    """The model, after training on the CPU from a fixed seed."""
    torch.manual_seed(0)
    make, epochs = MODELS[name]
    model = make()
    pictures, labels = torch.from_numpy(digits.pictures), torch.from_numpy(digits.labels)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    steps = epochs * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = nn.functional.cross_entropy(model(pictures[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: Path, digits: Digits) -> float:
    """In percent, of the test pictures in ONNX Runtime, which computes the file as it is."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: digits.test_pictures})
    return 100 * float((scores.argmax(1) == digits.test_labels).mean())


def quantised(model: Path, path: Path, digits: Digits, scheme: str, method: str) -> QuantisationLog:
    """Writes ``model`` to ``path``, quantised in every node that can be."""
    graph = read(model)
    feeds = ({graph.inputs[0].name: pictures} for pictures in digits.samples())
    nodes = {node.name for scope in scopes(graph) for node in scope.nodes if node.op in QUANTISABLE[scheme]}
    log = quantise(graph, scheme, measure(model, feeds, method), nodes)
    write(graph, path)
    return log


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--scheme", choices=list(QUANTISABLE), action="append")
    parser.add_argument("--target", default="tensorrt-rtx-1.7", help="what the model is rewritten for")
    parser.add_argument("--build", action="store_true", help="build the quantised models for the target too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the models are so small that threads wait for each other, above all on a busy machine
    digits, worse = Digits.load(), 0
    for name in options.model or MODELS:
        began = time.perf_counter()
        model = trained(name, digits)
        print(f"{name}: trained in {time.perf_counter() - began:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            worse += _measure(name, model, digits, Path(folder), options)
    return 1 if worse else 0


def _measure(name: str, model: nn.Module, digits: Digits, folder: Path, options: argparse.Namespace) -> int:
    """Prints a line for each way of quantising; returns how many fell too far."""
    result = bridge.convert(model, **conversion(name, digits, folder / "fp32", options.target), build=False, check=True)
    assert result.onnx is not None
    before, worse = accuracy(result.onnx, digits), 0
    print(f"{name}: fp32 {before:.2f}%")
    for scheme in options.scheme or ("int8",):
        for method in ("max",) if scheme == "int4" else options.method or METHODS:  # int4 is for weights alone
            path = folder / f"{scheme}-{method}.onnx"
            began = time.perf_counter()
            log = quantised(result.onnx, path, digits, scheme, method)
            seconds = time.perf_counter() - began
            after = accuracy(path, digits)
            worse += before - after > POINTS
            counts = ", ".join(f"{count} {op}" for op, count in sorted(log.counts().items()))
            print(f"{name}: {scheme} by {method} {after:.2f}% ({seconds:.1f} s; quantised: {counts})", flush=True)
            for reason, nodes in _by_reason(log).items():
                print(f"  not {', '.join(nodes)}: {reason}")
            if options.build:
                worse += not _engine(name, model, digits, folder, before, (options.target, scheme, method))
    return worse


def conversion(name: str, digits: Digits, folder: Path, target: str) -> dict[str, Any]:
    """What ``convert`` is given for both models, in every precision."""
    return {
        "inputs": (torch.from_numpy(digits.pictures[:BATCH]),),
        "workdir": folder,
        "target": target,
        "profiles": {"x" if name == "vit" else "input": ((1, 1, 8, 8), (BATCH, 1, 8, 8), (512, 1, 8, 8))},
    }


def _by_reason(log: QuantisationLog) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for node, reason in log.declined.items():
        found.setdefault(reason, []).append(node)
    return found


def _engine(name: str, model: nn.Module, digits: Digits, folder: Path, before: float, how: tuple[str, ...]) -> bool:
    """Whether the engine that users get is built and, where it runs, as accurate as it should be."""
    target, scheme, method = how
    result = bridge.convert(
        model,
        **conversion(name, digits, folder / f"{scheme}-{method}", target),
        precision=scheme,
        calibration=[(torch.from_numpy(pictures),) for pictures in digits.samples()],
        calibration_algorithm=ALGORITHM_OF[method],
        layers=False,
    )
    size = f"{result.engine.stat().st_size / 2**10:.0f} KiB" if result.engine is not None else "no engine"
    shares = ", ".join(f"{share:.1%} {precision}" for precision, share in result.precisions.items())
    print(f"  engine: {result.status}, {size}, {shares} {result.error or ''}")
    if result.engine is None or resolve(target).why_not_run():
        return result.engine is not None
    scores = bridge.TRTModule.from_result(result)(torch.from_numpy(digits.test_pictures).cuda())
    after = 100 * float((scores.argmax(1).cpu().numpy() == digits.test_labels).mean())
    print(f"  engine: {after:.2f}%", flush=True)
    return before - after <= POINTS


if __name__ == "__main__":
    sys.exit(main())
