"""Converts every model of a collection and prints what became of each.

    python -m benchmarks.torch_models MODELS.py [--only NAME …] [--target T] [--dynamic] [--jobs 2] [--json OUT]

MODELS.py defines ``M``: by name, a constructor, example inputs, and the dynamic axes of the first input or None.
Each model is converted by ``bridge.convert`` in a process of its own, forked from one that has torch loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

SECONDS = 180


def load(path: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    models: dict[str, Any] = module.M
    return models


def convert_one(name: str, case: Any, target: str, dynamic: bool, folder: Path) -> None:
    """In the child: leaves ``result.json`` in ``folder``."""
    import torch

    import bridge

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    constructor, inputs, axes = case[:3]
    profiles = None
    if dynamic and axes:
        shape = list(inputs[0].shape)
        low = [1 if axis in axes else size for axis, size in enumerate(shape)]
        high = [2 * size + 1 if axis in axes else size for axis, size in enumerate(shape)]
        forward = constructor().forward
        first = forward.__code__.co_varnames[1] if not forward.__code__.co_flags & 0x04 else "a.0"
        profiles = {first: (low, shape, high)}
    module = constructor().eval()
    try:
        result = bridge.convert(
            module, inputs, name=name, workdir=folder, target=target, profiles=profiles, cache=False
        )
    except bridge.BridgeError as error:  # a wrong call: its message is the result
        (folder / "usage").write_text(str(error))
        return
    if result.ok:
        (folder / "beyond").write_text(json.dumps(beyond_tolerance(module, inputs, result)))


def beyond_tolerance(module: Any, inputs: Any, result: Any) -> list[str]:
    """The outputs in which the rewritten model, in ONNX Runtime, and the torch module itself do not agree."""
    from bridge.compare import compare_arrays, onnx_runner, run_stage
    from bridge.tensors import to_numpy
    from bridge.torch_source import make_source

    source = make_source(module, inputs, None, None)
    feeds = {key: to_numpy(tensor) for key, tensor in source.call.tensors.items()}
    expected = source.run(feeds)
    found = run_stage("rewritten", lambda: onnx_runner(result.onnx, "rewritten"), [feeds])[0]
    names = {"stages": ("torch", "rewritten"), "inputs": "example"}
    return [
        output
        for output, array in expected.items()
        if not compare_arrays(array, found[output], output=output, tolerance=None, **names).agreed
    ]


def run(name: str, case: Any, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    folder = root / name
    folder.mkdir(parents=True)
    began = time.monotonic()
    child = multiprocessing.get_context("fork").Process(
        target=convert_one, args=(name, case, options.target, options.dynamic, folder)
    )
    child.start()
    child.join(SECONDS)
    timed_out = child.is_alive()
    if timed_out:
        child.kill()
        child.join()
    row: dict[str, Any] = {"name": name, "seconds": round(time.monotonic() - began, 2)}
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text())
        errors = [item["max_abs_error"] for item in result["comparisons"] if item["max_abs_error"] is not None]
        row.update(
            status=result["status"],
            stage=result["stage"],
            error=result["error"],
            exporter=result["exporter"],
            worst=max(errors, default=None),
            beyond=json.loads((folder / "beyond").read_text()) if (folder / "beyond").is_file() else [],
            rewrites={item["name"]: item["count"] for item in result["rewrites"]},
        )
        if row["status"] != "failed" and not (folder / "beyond").is_file():
            why = "converted, and not compared with torch"
            row.update(status="failed", stage="crash", error=why + "\n" + (folder / "log").read_text()[-2000:])
    elif (folder / "usage").is_file():
        row.update(status="failed", stage="usage", error=(folder / "usage").read_text())
    else:
        why = f"no result within {SECONDS} s" if timed_out else f"process ended with status {child.exitcode}"
        row.update(status="failed", stage="crash", error=why + "\n" + (folder / "log").read_text()[-2000:])
    if not options.keep:
        shutil.rmtree(folder)
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    for row in sorted(rows, key=lambda row: (row["status"], row["stage"] or "", row["name"])):
        line = f"{row['status']:10} {row['stage'] or '':8} {row['name']:28} {row['seconds']:7.1f} s"
        if row.get("beyond"):
            line += f"  BEYOND TOLERANCE: {', '.join(row['beyond'])}"
        elif row["status"] == "failed":
            words = " | ".join((row["error"] or "").splitlines())
            line += f"  {words[:220]}"
        else:
            line += f"  {row['exporter']}, worst {row['worst'] or 0:.1e}"
            line += f"; {', '.join(row['rewrites'])}" if row["rewrites"] else ""
        print(line)
    counts = Counter(row["status"] for row in rows)
    stages = Counter(row["stage"] for row in rows if row["status"] == "failed")
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.most_common()), f"of {len(rows)}")
    beyond = sum(bool(row.get("beyond")) for row in rows)
    print(f"{beyond} not failed whose rewritten model differs from torch beyond tolerance")
    if stages:
        print("failed at: " + ", ".join(f"{stage} {count}" for stage, count in stages.most_common()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--dynamic", action="store_true", help="the models' dynamic axes, from 1 to twice the example")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--keep", type=Path, help="keep each model's folder in here")
    options = parser.parse_args()

    for heavy in ("onnx", "onnxruntime", "torch.onnx._internal.exporter._core"):
        importlib.import_module(heavy)  # once, before the children are forked

    models = load(options.models)
    if options.only:
        models = {name: models[name] for name in options.only}
    if options.dynamic:
        models = {name: case for name, case in models.items() if case[2]}
    with contextlib.ExitStack() as stack:
        root = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows: list[dict[str, Any]] = []
        with ThreadPoolExecutor(options.jobs) as pool:
            for done in as_completed(pool.submit(run, name, case, options, root) for name, case in models.items()):
                rows.append(done.result())
                if options.json:  # after each model, so that a run cut short has not been for nothing
                    options.json.write_text(json.dumps(rows, indent=1))
    packages = ("torch", "onnx", "onnxruntime", "onnx-graphsurgeon", "polygraphy")
    print(f"{platform.machine()}, {os.cpu_count()} cores; " + ", ".join(f"{p} {version(p)}" for p in packages))
    print_table(rows)


if __name__ == "__main__":
    main()
