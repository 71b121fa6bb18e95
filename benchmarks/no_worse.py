"""No model gets worse by any pass: what TensorRT-RTX builds as it was exported, it builds after the passes.

    python -m benchmarks.no_worse MODELS.py [--only NAME …] [--jobs 1] [--json OUT]

MODELS.py defines ``M`` as for ``benchmarks.torch_models``. A model that builds with no pass at all has to build with
all rules, with all but one of those that applied to it, and with each of these alone. Exceptions are printed, and the
exit status is then 1. Every step is a process of its own, forked from one that has torch and TensorRT loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.torch_models import load

SECONDS = 300


def in_child(work: Callable[..., Any], log: Path, *args: Any) -> tuple[Any, str]:
    """What ``work`` returns (JSON), and what went wrong."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)

    def run() -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        answer.write_text(json.dumps(work(*args)))

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return None, f"no result within {SECONDS} s"
    if not answer.is_file():
        lines = log.read_text(errors="replace").strip().splitlines()
        return None, f"ended with status {child.exitcode}: {lines[-1] if lines else ''}"
    return json.loads(answer.read_text()), ""


def export(case: Any, path: Path) -> str:
    """In a child: writes the model by the newer exporter or the older, and returns its name."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = case[0]().eval()
    try:
        torch.onnx.export(module, case[1], str(path), dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError:
        torch.onnx.export(module, case[1], str(path), dynamo=False, verbose=False)
        return "torchscript"
    return "dynamo"


def build(path: Path) -> list[str]:
    """In a child: what TensorRT-RTX refuses."""
    from tests.support import parse

    return parse(path)


def rewrite(source: Path, result: Path, chosen: list[str] | None) -> list[str]:
    """In a child: writes what the passes make of it with the chosen rules (None: all); returns those that applied."""
    import passes
    from bridge.target import resolve

    rules = passes.all_rules()
    kept = {name: rule for name, rule in rules.items() if chosen is None or name in chosen}
    graph = passes.read(source)
    with mock.patch.object(passes, "all_rules", lambda: kept):
        log = passes.rewrite(graph, resolve("tensorrt-rtx"))
    passes.write(graph, result)
    return [name for name in log.nodes if name in rules]


def check(name: str, case: Any, root: Path) -> dict[str, Any]:
    """The row of one model: how it builds plain, and the steps at which it then does not."""
    folder = root / name
    folder.mkdir(parents=True)
    began = time.monotonic()
    row: dict[str, Any] = {"name": name, "plain": False, "rules": [], "worse": {}, "steps": 0}
    source, log = folder / "exported.onnx", folder / "log"
    row["exporter"], why = in_child(export, log, case, source)
    if not why:
        refused, why = in_child(build, log, source)
        row["plain"] = refused == []
    if not row["plain"]:
        return {**row, "why": why or refused, "seconds": round(time.monotonic() - began, 1)}

    known: dict[str, str] = {}

    def step(label: str, chosen: list[str] | None) -> list[str]:
        result = folder / "rewritten.onnx"
        applied, error = in_child(rewrite, log, source, result, chosen)
        if not error:
            key = hashlib.sha256(result.read_bytes()).hexdigest()
            if key not in known:
                row["steps"] += 1
                refusals, crash = in_child(build, log, result)
                known[key] = crash or "; ".join(refusals)
            error = known[key]
        if error:
            row["worse"][label] = error
        return applied or []

    row["rules"] = step("all rules", None)
    everything = list(importlib.import_module("passes").all_rules())
    for rule in row["rules"]:
        step(f"without {rule}", [item for item in everything if item != rule])
        step(f"only {rule}", [rule])
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here, as they come")
    options = parser.parse_args()

    for heavy in ("onnx", "onnxruntime", "torch.onnx._internal.exporter._core", "passes"):
        importlib.import_module(heavy)  # once, before the children are forked
    importlib.import_module("passes").all_rules()
    importlib.import_module("bridge.target").resolve("tensorrt-rtx")
    models = load(options.models)
    models = {name: case for name, case in models.items() if not options.only or name in options.only}
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pool = stack.enter_context(ThreadPoolExecutor(options.jobs))
        for row in pool.map(lambda item: check(item[0], item[1], root), models.items()):
            rows.append(row)
            shutil.rmtree(root / row["name"])
            for label, error in row["worse"].items():
                print(f"{row['name']}: {label}: {' '.join(error.split())[:300]}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    plain = [row for row in rows if row["plain"]]
    worse = [row for row in plain if row["worse"]]
    applied = sum(bool(row["rules"]) for row in plain)
    print(f"{len(rows)} models; {len(plain)} build with no pass, of which rules apply to {applied}")
    print(
        f"{sum(row['steps'] for row in plain)} rewritten models built; {len(worse)} of the models got worse in a step"
    )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
