"""What keeping TensorRT 8 to mixed precisions inside of subgraphs changes: the engine's error and latency in fp16.

    python -m benchmarks.subgraphs [MODEL …] [--target tensorrt]

Each model is built as ``convert`` does, and with the choice of the subgraphs' types left to TensorRT (see
``bridge.subgraphs``). The error is the engine's to torch in float32, as a share of the norm. ``overflow`` is a
transformer with a sum of squares of 2.3e5, which has to stay in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import bridge
from bridge import build

from .bisection import BATCH, TOKENS, WIDTH, Energy, Transformer
from .models import MODELS

LEFT_TO_TENSORRT = """
import bridge.builder, bridge.subgraphs
bridge.subgraphs.Selection.selector = lambda self, trt, network: None
bridge.builder.main()
"""
COMMANDS = {"as convert does": build.COMMAND, "left to TensorRT": (sys.executable, "-c", LEFT_TO_TENSORRT)}
LOOSE = bridge.Tolerance(1.0, 1.0, whole=True)
"""What is wrong is to be shown, and no failure."""

Case = tuple[torch.nn.Module, tuple[torch.Tensor, ...], Any]


def overflow() -> Case:
    """Every node is in float16 but those of the fault."""
    draw = torch.Generator().manual_seed(1)
    inputs = (torch.randn(BATCH, TOKENS, WIDTH, generator=draw),)
    precision = {"precision": "fp16", "fp16": ["op:*"], "fp32": ["blocks.2.fault"]}
    return Transformer(Energy(), 4).eval(), inputs, precision


def of_models(name: str) -> Callable[[], Case]:
    return lambda: (MODELS[name].module(), MODELS[name].inputs(8), "fp16")


CASES = {"overflow": overflow, **{name: of_models(name) for name in MODELS}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*CASES, []])
    parser.add_argument("--target", default="tensorrt")
    options = parser.parse_args()
    ok = True
    for name in options.models or CASES:
        module, inputs, precision = CASES[name]()
        for way, command in COMMANDS.items():
            build.COMMAND = command
            with tempfile.TemporaryDirectory() as folder:
                result = bridge.convert(
                    module,
                    inputs,
                    workdir=folder,
                    target=options.target,
                    precision=precision,
                    tolerance=LOOSE,
                    cache=False,
                    layers=False,
                    latency=True,
                )
            ok &= result.ok
            error = f"{result.source_error.relative:.1e}" if result.source_error is not None else "unknown"
            print(
                f"{name}, {way}: {result.status}, error {error} ({result.latency or 'not timed'}), {result.precisions}"
            )
            for words in filter(None, (result.error, *result.notes)):
                print(f"  {words}", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
