"""What the diff of an engine's layers takes, for ResNet-50, and whether its row of the stage table is NumPy's.

    python -m benchmarks.layer_diff [--target tensorrt] [--precision fp32]

The conversion is made first, with an empty cache. "Beyond" is all that ``bridge diff`` does after it: the outputs of
all stages, the shapes, and the layers, with the engine that is built to see them. The exit status is 1 where that
takes longer than the bar, the rows differ, or there is no GPU to measure it on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import bridge
from bridge.diff.measure import diff

from .models import MODELS

BAR = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    model = MODELS["resnet50"]
    module, inputs = model.module(), model.inputs(options.batch)
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "conversion", Path(name) / "cache"
        began = time.perf_counter()
        setting = {"target": options.target, "precision": options.precision, "cache": cache}
        report = diff(module, inputs, workdir=folder, layers=True, **setting)
        beyond = time.perf_counter() - began - report.seconds["conversion"]
        print(f"{report.verdict}\nseconds: {report.seconds}; beyond the conversion: {beyond:.1f}")
        pairs = Counter((layer.reference, layer.candidate) for layer in report.layers)
        for (reference, candidate), count in pairs.items():
            print(f"layers from {reference} to {candidate}: {count}")
        for note in report.notes:
            print(f"note: {note}")
        engine = next(row for row in report.stages if row.stage == "engine")
        if engine.carried is None:
            print(f"not measured, the engine did not run: {engine.note}")
            return 1
        with torch.no_grad():
            expected = module(*inputs).numpy().astype(np.float64)
        found = bridge.TRTModule(folder / "model.engine")(*(tensor.cuda() for tensor in inputs))
        difference = found.cpu().numpy().astype(np.float64) - expected
        relative = float(np.linalg.norm(difference) / np.linalg.norm(expected))
        print(f"the engine's row: {engine.carried.max_abs:.3e} at most, {engine.carried.relative:.3e} of the norm")
        print(f"by NumPy:         {np.abs(difference).max():.3e} at most, {relative:.3e} of the norm")
        agrees = np.isclose(engine.carried.relative, relative, rtol=1e-2)
        measured = any(layer.candidate == "engine" and layer.introduced is not None for layer in report.layers)
        return 0 if agrees and measured and beyond < BAR else 1


if __name__ == "__main__":
    sys.exit(main())
