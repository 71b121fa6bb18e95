"""Size, error and latency of a model in several precisions, as ``convert`` measures them.

    python -m benchmarks.trade_off resnet50 [--batch 8] [--target tensorrt]

Four batches of other inputs are what int8 is calibrated with.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import bridge

from .models import MODELS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--precision", nargs="*", default=["fp32", "fp16", "int8+fp16"])
    options = parser.parse_args()
    model = MODELS[options.model]
    with tempfile.TemporaryDirectory() as folder:
        made = bridge.convert(
            model.module(),
            model.inputs(options.batch),
            precision=options.precision,
            target=options.target,
            calibration=[model.inputs(options.batch, seed) for seed in range(1, 5)],
            layers=False,
            workdir=folder,
        )
    print(made.table())
    for precision, result in made.results.items():
        for note in result.notes:
            print(f"{precision}: {note}")
    return 0 if all(result.ok for result in made.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
