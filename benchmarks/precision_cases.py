"""Every torch model of a collection in float16 and bfloat16: does it build, and how far off is what it computes?

    python -m benchmarks.precision_cases MODELS.py --json OUT.json [--jobs 1] [--seconds 3600] [--only NAME …]

MODELS.py is of the form that ``benchmarks.torch_models`` takes. Each model is converted and built in float32; where
that succeeds, precisions are assigned and cast, without a calibration, and the result is built too. ``evaluate`` runs
it with every value rounded to its type. The error is the largest one of an output's elements, relative to the output's
largest magnitude, against the module itself in torch; integers and booleans are counted where they differ.

Rows that OUT.json has already are kept, so that a run goes on where the last one ended; --again runs the named anew.
"""

from __future__ import annotations

import argparse
import functools
import gc
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .timing import read_json, words, write_json
from .workers import Pool, Row, Say, Work, onnx_runtime_threads

SECONDS = 180
"""That a model may take, in float32 and both low precisions."""
PRECISIONS = ("fp16", "bf16")
BAR = 1e-2
"""The relative error that float16 may have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="rows are read from and written to it")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--again", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="for all of it")
    parser.add_argument("--target", default="tensorrt-rtx")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended

    from .torch_models import load

    report = read_json(options.json) or {"target": options.target, "rows": {}}
    rows: dict[str, Row] = report["rows"]
    names = options.only or list(load(options.models))
    names = [name for name in names if name not in rows or name in options.again]

    def keep(name: str, row: Row) -> None:
        rows[name] = row
        write_json(options.json, report)
        print(one_line(name, row), flush=True)

    setting = {"models": str(options.models.absolute()), "target": options.target}
    with tempfile.TemporaryDirectory() as logs:
        pool = Pool(make_worker, setting, options.jobs, SECONDS, Path(logs))
        left = pool.run(names, deadline, keep)
    print(summary(rows, left))


def one_line(name: str, row: Row) -> str:
    text = f"{row['status']:10} {name:28} {row['seconds']:6.1f} s "
    for precision, found in row.get("precisions", {}).items():
        error = found.get("error")
        worst = found.get("worst")
        text += f" {precision}: {found['low']}/{found['nodes']} nodes, " if "low" in found else f" {precision}: "
        text += " ".join(error.split())[:160] if error else f"{worst:.1e}" if worst is not None else "no floats"
    return text + (" " + " ".join(row["error"].split())[:160] if row.get("error") else "")


def summary(rows: dict[str, Row], left: list[str]) -> str:
    counts = Counter(row["status"] for row in rows.values())
    lines = [", ".join(f"{count} {status} in fp32" for status, count in counts.most_common()) + f" of {len(rows)}"]
    built = {name: row["precisions"] for name, row in rows.items() if row["status"] == "built"}
    for precision in PRECISIONS:
        found = {name: made[precision] for name, made in built.items() if precision in made}
        good = [name for name, made in found.items() if made.get("built")]
        off = {name: made["worst"] for name, made in found.items() if (made.get("worst") or 0) > BAR}
        infinite = [name for name, made in found.items() if made.get("infinite")]
        other = [name for name, made in found.items() if made.get("differ")]
        low = sum(made.get("low", 0) for made in found.values())
        nodes = sum(made.get("nodes", 0) for made in found.values())
        lines.append(f"{precision}: {len(good)} of {len(found)} built; {low} of {nodes} nodes in it")
        lines.append(
            f"  error above {BAR:g}: {', '.join(f'{name} {worst:.2g}' for name, worst in off.items()) or 'none'}"
        )
        lines.append(f"  not finite where torch is: {', '.join(infinite) or 'none'}")
        lines.append(f"  integers or booleans that differ: {', '.join(other) or 'none'}")
        lines += [
            f"  {name}: {' '.join(made['error'].split())[:300]}" for name, made in found.items() if made.get("error")
        ]
    lines += [f"not reached: {len(left)}"] if left else []
    return "\n".join(lines)


# in a worker


def make_worker(setting: dict[str, Any]) -> Work:
    import torch

    from bridge.target import resolve

    from .torch_models import load

    torch.set_num_threads(1)
    onnx_runtime_threads(1)
    return functools.partial(check_model, load(Path(setting["models"])), resolve(setting["target"]))


def check_model(models: dict[str, Any], target: Any, name: str, say: Say) -> Row:
    import torch

    import bridge
    from bridge.tensors import to_numpy
    from bridge.torch_source import make_source

    row: Row = {"status": "built", "precisions": {}}
    constructor, inputs = models[name][:2]
    torch.manual_seed(0)
    module = constructor().eval()
    with tempfile.TemporaryDirectory() as folder:
        say("fp32")
        try:
            result = bridge.convert(module, inputs, name=name, workdir=folder, target=target, cache=False)
        except bridge.BridgeError as error:
            return {"status": "usage", "error": words(error)}
        if not result.ok:
            return {"status": "failed", "error": f"{result.stage}: {result.error}"}
        source = make_source(module, inputs, None, None)
        feeds = {key: to_numpy(tensor) for key, tensor in source.call.tensors.items()}
        with torch.no_grad():
            expected = source.run(feeds)
        for precision in PRECISIONS:
            say(precision)
            try:
                row["precisions"][precision] = check_precision(result.onnx, precision, target, feeds, expected)
            except Exception as error:  # noqa: BLE001 (whatever it is, it is in the report)
                row["precisions"][precision] = {"error": f"{type(error).__name__}: {words(error)}"}
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    return row


def check_precision(model: Any, name: str, target: Any, feeds: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """Casts the rewritten model, and says what became of it."""
    import onnx

    from bridge.assignment import assign
    from bridge.build import build
    from bridge.errors import BuildError
    from bridge.evaluator import evaluate
    from bridge.inputs import read_profiles
    from bridge.plugins.loading import needed_plugins
    from bridge.precision import Precision
    from passes import read, write
    from passes.casts import cast

    precision = Precision.of(name)
    graph = read(model)
    began = time.perf_counter()
    assignment = assign(graph, precision, None, target)
    log = cast(graph, precision.half_dtype, assignment.fp32, precision.io, saturated=assignment.saturated)
    found: dict[str, Any] = {
        "seconds": round(time.perf_counter() - began, 3),
        "nodes": len(assignment.nodes),
        "low": len(assignment.of(name)),
        "casts": log.casts,
        "reasons": assignment.reasons,
        "notes": [*assignment.notes, *log.notes],
        "clamped": log.clamped,
    }
    typed = model.parent / f"{name}.onnx"
    write(graph, typed, beside=model.parent)
    found["invalid"] = _check(onnx, typed)
    again = read(typed)
    twice = cast(again, precision.half_dtype, assignment.fp32, precision.io, saturated=assignment.saturated)
    found["changed_again"] = twice.changed
    try:
        profiles = read_profiles(None, {key: array.shape for key, array in feeds.items()})
        plugins = needed_plugins(graph, target)
        build(
            typed,
            typed.with_suffix(".engine"),
            typed.with_suffix(".log"),
            target=target,
            profiles=profiles,
            plugins=plugins,
            timeout=120,
        )
        found["built"] = True
    except BuildError as error:
        found |= {"built": False, "error": words(error)}
    return found | compare(expected, evaluate(typed, [feeds])[0])


def _check(onnx: Any, path: Path) -> str:
    """What ONNX's checker says against the model."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return words(error, 300)
    return ""


def compare(expected: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    worst: float | None = None
    infinite, differ = [], []
    for name, array in expected.items():
        want, got = np.asarray(array), np.asarray(outputs[name])
        if want.dtype.kind in "iub":
            if not np.array_equal(want, got):
                differ.append(f"{name}: {np.mean(want != got):.3g}" if want.shape == got.shape else f"{name}: shape")
            continue
        want, got = want.astype(np.float64), got.astype(np.float64)
        if want.shape != got.shape:
            infinite.append(f"{name}: shape {list(got.shape)}")
            continue
        known = np.isfinite(want)
        if not np.array_equal(known, np.isfinite(got)):
            infinite.append(name)
        known &= np.isfinite(got)
        if known.any():
            largest = np.abs(want[known]).max() or 1.0
            worst = max(worst or 0.0, float(np.abs(want - got)[known].max() / largest))
    return {"worst": worst, "infinite": infinite, "differ": differ}


if __name__ == "__main__":
    main()
