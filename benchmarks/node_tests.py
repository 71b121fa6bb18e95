"""ONNX's own node tests: how many the target builds after the passes, with the outputs that ONNX expects.

    python -m benchmarks.node_tests [--target tensorrt] [--only PATTERN …] [--plain] [--jobs 2] [--json OUT]

A test counts where its rewritten model gives the expected outputs in ONNX Runtime (or, where ONNX Runtime lacks an
operator, in ONNX's reference evaluator), and TensorRT builds an engine from it, which gives them too where a GPU can
run it: TensorRT-RTX's are built and not run. A test that does not build as it is, is tried again with its parameters
(PARAMETERS, else all integers) as constants, as a model in practice has them; the table says how many needed that.
Inputs that sizes depend on have the test's values in the profile. Tests whose inputs TensorRT's types cannot hold are
left out. ``--plain`` builds with no pass.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import platform
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

SECONDS = 120
HELD = {"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "INT64", "INT8", "UINT8", "BOOL"}
"""Element types of inputs that TensorRT can hold, double as float."""
FLOAT_NOISE = 1e-5
"""Tolerance beside the test's own relative one, in units of the largest output: double is computed in float."""


PARAMETERS = {"Dropout": (1, 2), "OneHot": (1, 2), "Resize": (1, 2, 3), "Upsample": (1,)}
"""By operator: which inputs say what is to be done, where that is not just all integers."""


DONE = ("built", "ran")
"""The stages of those that count."""


@dataclass(frozen=True)
class Options:
    """How each test is tried: for which target, by its parser alone, and whether its engines are run."""

    target: str = "tensorrt-rtx"
    plain: bool = False
    run: bool = False


def held(model: onnx.ModelProto) -> bool:
    """Whether every input is a tensor of a type that TensorRT can hold."""
    kinds = [info.type for info in model.graph.input]
    return all(
        kind.HasField("tensor_type") and TensorProto.DataType.Name(kind.tensor_type.elem_type) in HELD for kind in kinds
    )


def with_constants(model: onnx.ModelProto, inputs: list[Any]) -> tuple[onnx.ModelProto, list[Any]] | None:
    """The model with its parameters as initialisers; None where it has none, or no other inputs."""
    fixed = {TensorProto.INT32, TensorProto.INT64}
    named = {
        node.input[i] for node in model.graph.node for i in PARAMETERS.get(node.op_type, ()) if i < len(node.input)
    }
    integers = [info.name in named if named else info.type.tensor_type.elem_type in fixed for info in model.graph.input]
    if not any(integers) or all(integers):
        return None
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.input[:]
    left = []
    for info, array, integer in zip(model.graph.input, inputs, integers, strict=True):
        if integer:
            made.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), info.name))
        else:
            made.graph.input.append(info)
            left.append(array)
    return made, left


def attempt(
    model: onnx.ModelProto, inputs: list[Any], expected: list[Any], rtol: float, how: Options
) -> dict[str, Any]:
    """What becomes of one model: ``stage`` is the one that it failed in, or ``built``, or ``ran``."""
    from bridge.target import resolve
    from passes import read, rewrite, write
    from tests.support import build, fitted, run_engine

    target = resolve(how.target)
    row: dict[str, Any] = {}
    named = {info.name: np.asarray(array) for info, array in zip(model.graph.input, inputs, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(model, str(source))
        if how.plain:
            result = source
        else:
            graph = read(source)
            log = rewrite(graph, target)
            write(graph, result)
            row["rules"] = {name: len(nodes) for name, nodes in log.nodes.items()}
            row["declined"] = sorted({f"{rule}: {why}" for (rule, _), (_, why) in log.declined.items()})
        made = onnx.load(str(result))
        feeds = fitted(made, named)
        wrong = "" if how.plain else differs(made, evaluate(made, feeds), expected, rtol)
        if wrong:
            return {**row, "stage": "outputs", "error": wrong}
        plan, refused = build(result, target, feeds)
        if plan is None:
            return {**row, "stage": "build", "error": "; ".join(refused)}
        if not how.run:
            return {**row, "stage": "built"}
        found = run_engine(plan, target, feeds, Path(folder))
    wrong = differs(made, [found[info.name] for info in made.graph.output], expected, rtol)
    return {**row, "stage": "engine", "error": wrong} if wrong else {**row, "stage": "ran"}


def differs(model: onnx.ModelProto, found: list[Any], expected: list[Any], rtol: float) -> str:
    """How the model's outputs differ from those expected, or nothing."""
    for info, wanted, got in zip(model.graph.output, expected, found, strict=True):
        if not isinstance(got, np.ndarray) or not isinstance(wanted, (np.ndarray, np.generic)):
            return f"{info.name}: no tensor"
        if got.shape != np.shape(wanted):
            return f"{info.name}: shape {got.shape}, not {np.shape(wanted)}"
        exact = np.asarray(wanted).dtype.kind in "iub"
        left, right = (np.asarray(item) if exact else np.asarray(item).astype(np.float64) for item in (got, wanted))
        if exact and not np.array_equal(left, right):
            return f"{info.name}: {(left != right).sum()} of {left.size} differ"
        noise = FLOAT_NOISE * np.abs(right[np.isfinite(right)]).max(initial=0) if not exact else 0
        if not exact and not np.allclose(left, right, rtol=rtol, atol=noise, equal_nan=True):
            return f"{info.name}: differs by up to {np.nanmax(np.abs(left - right)):.2e}"
    return ""


def evaluate(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """The outputs in ONNX Runtime, or in ONNX's reference evaluator where ONNX Runtime lacks something."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    lacking = ort.capi.onnxruntime_pybind11_state
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, feeds))
    except (lacking.NotImplemented, lacking.Fail, ValueError, RuntimeError):  # the last two: no bfloat16 in NumPy
        from onnx.reference import ReferenceEvaluator

        return list(ReferenceEvaluator(model).run(None, feeds))


def as_array(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, TensorProto) else value


def test_one(case: Any, how: Options) -> dict[str, Any]:
    inputs, expected = (list(map(as_array, values)) for values in case.data_sets[0])
    row: dict[str, Any] = {}
    for variant, given in (("as it is", (case.model, inputs)), ("constants", with_constants(case.model, inputs))):
        if given is None:
            break
        try:
            now = attempt(*given, expected, case.rtol, how)
        except Exception as error:  # noqa: BLE001 - whatever a pass, a runtime or the evaluator raises is the result
            now = {"stage": "rewrite", "error": f"{type(error).__name__}: {error}"}
        row = {**now, "variant": variant, "first": row} if row else {**now, "variant": variant}
        if now["stage"] in DONE:
            break
    return row


def collect() -> dict[str, Any]:
    warnings.simplefilter("ignore")  # the tests divide by zero on purpose
    from onnx.backend.test.case.node import collect_testcases

    return {case.name: case for case in collect_testcases(None) if held(case.model)}


def serve(connection: Connection, how: Options) -> None:
    """In the child: a row for each name that comes in."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    cases = collect()
    while name := connection.recv():
        connection.send(test_one(cases[name], how))


class Worker:
    """A child process that tests one model after another, and is replaced when a native library takes it down."""

    def __init__(self, how: Options) -> None:
        self.how = how
        self.process: BaseProcess | None = None

    def run(self, name: str) -> dict[str, Any]:
        context = multiprocessing.get_context("spawn")
        if self.process is None:
            self.connection, other = context.Pipe()
            self.process = context.Process(target=serve, args=(other, self.how), daemon=True)
            self.process.start()
            other.close()
        self.connection.send(name)
        why = f"no result within {SECONDS} s"
        if self.connection.poll(SECONDS):
            try:
                row: dict[str, Any] = self.connection.recv()
            except EOFError:
                self.process.join()
                why = f"ended with status {self.process.exitcode}"
            else:
                return row
        self.process.kill()
        self.process = None
        return {"stage": "crash", "error": why, "variant": ""}


def print_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["stage"] not in DONE:
            words = " ".join((row.get("error") or "").split())
            print(f"{row['stage']:8} {row['name']:60} {','.join(row['operators'])}: {words[:160]}")
    stages = Counter(row["stage"] for row in rows)
    constants = sum(row["stage"] in DONE and row["variant"] == "constants" for row in rows)
    done = ", ".join(f"{stages[stage]} of {len(rows)} {stage}" for stage in DONE if stages[stage]) or "none built"
    print(f"\n{done}, {constants} of them with integer inputs as constants")
    print("not: " + ", ".join(f"{stage} {count}" for stage, count in stages.most_common() if stage not in DONE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("tensorrt-rtx", "tensorrt"), default="tensorrt-rtx")
    parser.add_argument("--only", nargs="*", help="names, or patterns of them")
    parser.add_argument("--plain", action="store_true", help="no pass: what the parser does by itself")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    from bridge.target import gpu_compute_capabilities, resolve

    target = resolve(options.target)
    how = Options(options.target, options.plain, options.target == "tensorrt" and bool(gpu_compute_capabilities()))
    cases = collect()
    names = [name for name in cases if any(fnmatch.fnmatch(name, item) for item in options.only or ["*"])]
    workers: Queue[Worker] = Queue()
    for _ in range(options.jobs):
        workers.put(Worker(how))

    def run(name: str) -> dict[str, Any]:
        worker = workers.get()
        began = time.monotonic()
        row = worker.run(name)
        workers.put(worker)
        operators = sorted({node.op_type for node in cases[name].model.graph.node})
        return {"name": name, "operators": operators, "seconds": round(time.monotonic() - began, 2), **row}

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(run, names))
    packages = ", ".join(f"{package} {version(package)}" for package in ("onnx", "onnxruntime"))
    print(f"{platform.machine()}, {os.cpu_count()} cores; {packages}, {target}")
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
