"""How long the passes take: over ResNet-50, and over 20,000 nodes of what exporters write.

    python -m benchmarks.passes [--nodes 20000] [--rules] [--profile]

The large model is made here: transformer and convolution blocks of a dynamic batch, with the chains of Shape, Gather
and Concat, the decomposed normalisations and the casts of real exports, and with operators that rules rewrite. Once its
file states all types, as dynamo's does, once none of them. The fastest of three runs counts, in seconds of processor
time: what else the machine does is left out. Exit status 1 beyond a bar.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import inspect
import platform
import pstats
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import passes
from bridge.target import Target, resolve
from passes.framework import Builder, Names
from passes.model import to_proto

TARGETS = ("tensorrt-rtx-1.7", "tensorrt-8.5")
BARS = {"ResNet-50": 0.5, "20,000 nodes": 5.0}
"""Seconds."""
RUNS = 3
WIDTH, HEADS = 64, 4
STEPS = [
    name
    for name, item in vars(passes).items()
    if inspect.isfunction(item) and item.__module__.startswith("passes.") and name not in ("read", "write")
]
"""What ``passes.rewrite`` calls."""


# --- the large model ---------------------------------------------------------------------------------------------


def large(nodes: int) -> gs.Graph:
    graph = gs.Graph(name="large", opset=20, ir_version=10)
    tokens = gs.Variable("tokens", np.dtype(np.float32), ["batch", "time", WIDTH])
    image = gs.Variable("image", np.dtype(np.float32), ["batch", 8, 16, 16])
    graph.inputs = [tokens, image]
    names = Names(graph)
    g = Builder(names, 20, "start")
    x, y = tokens, image
    block = 0
    while len(g.made) < nodes:
        g.stem = f"/blocks.{block}"
        x = attention(g, x, decomposed=block % 3 != 0)
        x = feed_forward(g, x, decomposed=block % 3 != 1)
        y = convolutions(g, y)
        if block % 8 == 0:
            y = rewritten(g, x, y)
        block += 1
    graph.nodes = g.made
    graph.outputs = [x, y]
    for node in graph.nodes:
        node.metadata = {"pkg.torch.onnx.name_scopes": repr(["", node.name]), "pkg.torch.onnx.stack_trace": STACK}
    return graph


STACK = 'File "/home/me/model.py", line 42, in forward\n    x = self.block(x)'


def weight(g: Builder, *sizes: int) -> gs.Constant:
    return g.constant(np.full(sizes, 0.01, np.float32))


def normalised(g: Builder, x: gs.Tensor, decomposed: bool) -> gs.Tensor:
    scale, bias = weight(g, WIDTH), weight(g, WIDTH)
    if not decomposed:
        return g.op.LayerNormalization(x, scale, bias, axis=-1, epsilon=1e-5)
    centred = g.op.Sub(x, g.op.ReduceMean(x, [-1], keepdims=1))
    variance = g.op.ReduceMean(g.op.Pow(centred, g.constant(np.float32(2))), [-1], keepdims=1)
    spread = g.op.Sqrt(g.op.Add(variance, g.constant(np.float32(1e-5))))
    return g.op.Add(g.op.Mul(g.op.Div(centred, spread), scale), bias)


def axis_size(g: Builder, x: gs.Tensor, axis: int) -> gs.Tensor:
    return g.op.Unsqueeze(g.op.Gather(g.op.Shape(x), g.constant(axis), axis=0), [0])


def linear(g: Builder, x: gs.Tensor, outputs: int) -> gs.Tensor:
    return g.op.Add(g.op.MatMul(x, weight(g, int(x.shape[-1]), outputs)), weight(g, outputs))


def attention(g: Builder, x: gs.Tensor, decomposed: bool) -> gs.Tensor:
    h = normalised(g, x, decomposed)
    heads = []
    for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)):
        sizes = [axis_size(g, h, 0), axis_size(g, h, 1), g.constant([HEADS]), g.constant([WIDTH // HEADS])]
        split = g.op.Reshape(linear(g, h, WIDTH), g.op.Concat(*sizes, axis=0))
        split.shape = ["batch", "time", HEADS, WIDTH // HEADS]
        heads.append(g.op.Transpose(split, perm=list(order)))
    scores = g.op.Div(g.op.MatMul(heads[0], heads[1]), g.constant(np.float32(4)))
    mask = g.op.Cast(g.op.Greater(scores, g.constant(np.float32(1e4))), to=onnx.TensorProto.FLOAT)
    shares = g.op.Softmax(g.op.Add(scores, g.op.Mul(mask, g.constant(np.float32(-1e4)))), axis=-1)
    joined = g.op.Transpose(g.op.MatMul(g.op.Identity(shares), heads[2]), perm=[0, 2, 1, 3])
    sizes = [axis_size(g, x, 0), axis_size(g, x, 1), g.constant([WIDTH])]
    flat = g.op.Reshape(joined, g.op.Concat(*sizes, axis=0))
    flat.shape = ["batch", "time", WIDTH]
    return g.op.Add(x, linear(g, flat, WIDTH))


def feed_forward(g: Builder, x: gs.Tensor, decomposed: bool) -> gs.Tensor:
    h = linear(g, normalised(g, x, decomposed), 2 * WIDTH)
    if decomposed:
        half = g.op.Erf(g.op.Div(h, g.constant(np.float32(2**0.5))))
        h = g.op.Mul(g.op.Mul(h, g.op.Add(half, g.constant(np.float32(1)))), g.constant(np.float32(0.5)))
    else:
        h = g.op.Gelu(h)
    low = g.op.Cast(g.op.Cast(h, to=onnx.TensorProto.FLOAT16), to=onnx.TensorProto.FLOAT)
    return g.op.Add(x, linear(g, g.op.Cast(low, to=onnx.TensorProto.FLOAT), WIDTH))


def convolutions(g: Builder, y: gs.Tensor) -> gs.Tensor:
    h = y
    for size in (1, 3, 1):
        h = g.op.Conv(h, weight(g, 8, 8, size, size), weight(g, 8), kernel_shape=[size] * 2, pads=[size // 2] * 4)
        h = g.op.BatchNormalization(h, weight(g, 8), weight(g, 8), weight(g, 8), weight(g, 8))
        h = g.op.Clip(h, g.constant(np.float32(0)), g.constant(np.float32(6)))
    gate = g.op.Sigmoid(g.op.GlobalAveragePool(h))
    return g.op.Add(y, g.op.Mul(h, gate))


def rewritten(g: Builder, x: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
    """``y`` after operators that rules rewrite, and after what folds away."""
    spectrum = g.op.DFT(g.op.Unsqueeze(x, [3]), None, g.constant(2), onesided=1)
    size = g.op.ReduceMean(g.op.Abs(spectrum), [1, 2, 3], keepdims=0)
    places = g.op.Mod(g.op.Range(g.constant(0), g.constant(8), g.constant(1)), g.constant(4))
    added = g.op.ScatterElements(
        weight(g, 8), places, g.op.Mul(weight(g, 8), g.op.ReduceMax(size, keepdims=0)), axis=0, reduction="add"
    )
    pooled = g.op.MaxPool(y, kernel_shape=[3, 3], dilations=[2, 2], pads=[2, 2, 2, 2])
    return g.op.Mul(pooled, g.op.Reshape(g.op.Dropout(added), [1, -1, 1, 1]))


# --- measuring ---------------------------------------------------------------------------------------------------


class Timers:
    """Seconds in each function that was wrapped, less those in wrapped functions inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = 0.0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            outer, self._inside = self._inside, 0.0
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - began
                self.seconds[name] += whole - self._inside
                self._inside = outer + whole

        return call


def measure(name: str, path: Path, target: Target, options: argparse.Namespace) -> bool:
    """Prints what the passes took of the model; True within the bar."""
    best, parts, log, nodes = float("inf"), {}, passes.Log(), 0
    for _ in range(RUNS):
        graph = passes.read(path)
        nodes = len(graph.nodes)
        timers = Timers()
        with ExitStack() as stack:
            for step in STEPS:
                wrapped = timers.timed(step, getattr(passes, step))
                stack.enter_context(mock.patch.object(passes, step, wrapped))
            if options.rules:
                for rule in passes.all_rules().values():
                    wrapped = timers.timed(f"rule {rule.name}", rule.function)
                    stack.enter_context(mock.patch.object(rule, "function", wrapped))
            began = time.process_time()
            done = passes.rewrite(graph, target)
            seconds = time.process_time() - began
        if seconds < best:
            best, parts, log = seconds, dict(timers.seconds), done
    bar = next(limit for key, limit in BARS.items() if name.startswith(key))
    print(f"\n{name}, {nodes:,} nodes, for {target}: {best:.2f} s of {bar} s; {log.changes:,} changes")
    print(
        "  " + ", ".join(f"{step} {seconds:.2f}" for step, seconds in sorted(parts.items(), key=lambda i: -i[1])[:12])
    )
    if options.profile:
        with cProfile.Profile() as profile:
            passes.rewrite(passes.read(path), target)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    return best <= bar


def export_resnet(path: Path) -> None:
    import torch

    from benchmarks.overhead import resnet50

    torch.onnx.export(resnet50(), (torch.randn(1, 3, 224, 224),), str(path), dynamo=True, verbose=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=20000)
    parser.add_argument("--rules", action="store_true", help="the time of each rule too")
    parser.add_argument("--profile", action="store_true", help="the functions that take the most")
    options = parser.parse_args()
    rules = len(passes.all_rules())
    packages = ("onnx", "onnxruntime", "onnx-graphsurgeon")
    print(f"{platform.machine()}; " + ", ".join(f"{p} {version(p)}" for p in packages) + f"; {rules} rules")
    kept = True
    with tempfile.TemporaryDirectory() as folder:
        stated, bare, resnet = (Path(folder) / f"{name}.onnx" for name in ("stated", "bare", "resnet"))
        model = to_proto(large(options.nodes))
        onnx.save(model, str(stated))
        del model.graph.value_info[:]
        onnx.save(model, str(bare))
        export_resnet(resnet)
        for target in map(resolve, TARGETS):
            kept &= measure("ResNet-50", resnet, target, options)
            kept &= measure("20,000 nodes, types stated", stated, target, options)
            kept &= measure("20,000 nodes, no types stated", bare, target, options)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
