"""From a rewritten ONNX file to an engine, in a child process: whatever happens to the builder happens to it alone.

The child is ``python -m bridge.builder``; its result comes back over a pipe, TensorRT's messages over its output.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from passes.provenance import origin_of

from .build_plan import BuildPlan
from .digests import sha256
from .errors import BuildError, BuildTimeout, Refusal
from .inputs import Profiles
from .plugins.loading import NeededPlugin, check_files
from .result import ConversionResult
from .target import Target
from .workspace import write_text

COMMAND: tuple[str, ...] = (sys.executable, "-m", "bridge.builder")
"""Starts a child; the number of its reply pipe is added. A test may give another that stands in for TensorRT."""

NOISE = ("catchCudaError", "Thread context has not been set", "CUDA initialization failure with error: 35")
"""Words of messages that TensorRT-RTX prints on every machine without a GPU."""


@dataclass(frozen=True)
class BuildJob:
    """All that the child needs to know."""

    flavour: str
    onnx: str
    engine: str
    """Empty where the parser alone is to be asked."""
    profiles: list[dict[str, dict[str, list[int]]]]
    """Of each optimization profile, the min, opt and max shape by input."""
    compute_capabilities: list[list[int]] = field(default_factory=list)
    """For TensorRT-RTX: (major, minor) of the GPUs to build for; empty for its default."""
    plugins: list[dict[str, Any]] = field(default_factory=list)
    """The fields of each NeededPlugin."""
    of_tensorrt_8: bool = False
    """Whether the target is a TensorRT 8."""
    strongly_typed: bool = False
    """Whether types are what the graph says, and not what the builder is allowed."""
    paths: list[str] = field(default_factory=list)
    """Where the parent imports modules from, those of plugins among them."""
    precision: str = "fp32"
    """What a weakly typed builder may compute in."""
    layer_precisions: dict[str, str] = field(default_factory=dict)
    """What each ONNX node is to be computed in (``fp32``, ``fp16``, ``int8``, …): of weakly typed networks the builder
    is made to, and of all what comes out is compared with it."""
    low_types: list[str] = field(default_factory=list)
    """The low precisions that the model's own tensors have; a weakly typed builder refuses what it is not allowed."""
    made_by: dict[str, str] = field(default_factory=dict)
    """By the name of a tensor, the ONNX node that makes it."""
    builder: dict[str, Any] = field(default_factory=dict)
    """Settings of BuildSettings that are given."""
    devices: dict[str, str] = field(default_factory=dict)
    """GPU or DLA, by node."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Of int8: files, shapes, algorithm and cache; empty where nothing is calibrated."""
    weights: int = 0
    """How many float32 weights the model has, where a low precision is asked for."""
    values: dict[str, list[int]] = field(default_factory=dict)
    """Of inputs whose values may be sizes, those of the example."""
    timing_cache: str = ""
    """The file of earlier timings of kernels, to which this build adds its own; empty for none."""


@dataclass(frozen=True)
class BuildOutcome:
    """What the child reports."""

    error: str = ""
    refusals: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    compute_capabilities: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    """Inside TensorRT's parser and builder."""
    notes: list[str] = field(default_factory=list)
    precisions: dict[str, float] = field(default_factory=dict)
    """What the engine computes in: the share of the compute, multiply-adds above all, by precision; ``unknown`` where
    TensorRT does not tell."""
    not_as_asked: list[dict[str, Any]] = field(default_factory=list)
    """The largest layers that are not in the precision that was asked for: name, ONNX node, kind, precision, the one
    that was asked for, and share of the compute."""
    branches: bool = False
    """Whether there is an If in the network."""
    by_value: bool = False
    """Whether it was built for the values of an input, which no key of the cache has."""


def build(
    model: Path,
    engine: Path | None,
    log: Path,
    *,
    target: Target,
    profiles: Sequence[Profiles],
    compute_capabilities: Sequence[tuple[int, int]] | None = None,
    timeout: float | None = None,
    hints: Mapping[str, str] | None = None,
    plugins: Sequence[NeededPlugin] = (),
    timing_cache: Path | None = None,
    plan: BuildPlan | None = None,
) -> BuildOutcome:
    """Builds ``model`` into ``engine``, or without that parses it alone, and writes TensorRT's messages to ``log``.

    ``hints`` says, by node or operator, what could help where the parser refuses it. Raises BuildError where the parser
    or builder refuses, crashes (with the signal's name) or takes longer than ``timeout`` seconds, and PluginError where
    a plugin's library is not there.
    """
    check_files(plugins)
    job = BuildJob(
        target.flavour,
        str(model),
        str(engine) if engine is not None else "",
        [
            {name: {key: list(value) for key, value in asdict(one).items()} for name, one in profile.items()}
            for profile in profiles
        ],
        [list(pair) for pair in compute_capabilities or ()],
        [asdict(plugin) for plugin in plugins],
        target.of_tensorrt_8,
        target.strongly_typed,
        [path for path in sys.path if path] if plugins else [],
        timing_cache=str(timing_cache or ""),
        **_planned(plan or BuildPlan()),
    )
    reply, messages, code = _run_child(job, timeout)
    kept = [line for line in messages.splitlines() if not any(word in line for word in NOISE)]
    write_text(log, "\n".join(kept) + "\n" if kept else "")
    errors = [line for line in kept if line.startswith("[E]")]
    last = "\nTensorRT's last errors:\n" + "\n".join(errors[-5:]) if errors else ""
    if code is None:
        raise BuildTimeout(f"the build took longer than its time-out of {timeout:g} s and was stopped.{last}")
    if code < 0:
        name = signal.Signals(-code).name
        note = " (out of memory, perhaps)" if name == "SIGKILL" else ""
        raise BuildError(f"{target} crashed while building: {name}{note}. {_see(log)}{last}")
    try:
        outcome = BuildOutcome(**json.loads(reply))
    except json.JSONDecodeError as error:  # nothing, or cut short
        raised = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", messages, re.MULTILINE)
        why = f" It raised {raised[-1]}" if raised else ""
        raise BuildError(
            f"{target}'s build process ended with status {code} and no result.{why} {_see(log)}{last}"
        ) from error
    if outcome.refusals:
        refusals = _with_origin(outcome.refusals, model, hints or {})
        words = "\n".join(map(str, refusals))
        raise BuildError(f"{target}'s parser refuses {_count(len(refusals))}:\n{words}", tuple(refusals))
    if outcome.error:
        others = [line for line in errors if line.removeprefix("[E] ") not in outcome.error]
        before = "\nIts other errors:\n" + "\n".join(others[-5:]) if others else ""
        raise BuildError(f"{target}: {outcome.error}{before}")
    return outcome


def _planned(plan: BuildPlan) -> dict[str, Any]:
    calibration = plan.calibration.job() if plan.calibration is not None else {}
    return {
        "precision": plan.precision,
        "layer_precisions": dict(plan.layer_precisions),
        "low_types": list(plan.low_types),
        "made_by": dict(plan.made_by),
        "builder": dict(plan.builder),
        "devices": dict(plan.devices),
        "calibration": calibration,
        "weights": plan.weights,
        "values": dict(plan.values),
    }


def _count(number: int) -> str:
    return "a node" if number == 1 else f"{number} nodes"


def _see(log: Path) -> str:
    return f"See {log.name}."


def _run_child(job: BuildJob, timeout: float | None) -> tuple[str, str, int | None]:
    """The child's reply, what it printed, and its exit status (negative for a signal; None where it was stopped)."""
    read_end, write_end = os.pipe()
    child = subprocess.Popen(
        [*COMMAND, str(write_end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(write_end,),
        start_new_session=True,  # Ctrl-C reaches the parent alone, which then stops the child
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_root(), os.environ.get("PYTHONPATH", "")]))},
    )
    os.close(write_end)
    assert child.stdin is not None and child.stdout is not None
    replies: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(read_end, replies), daemon=True)
    errors: list[bytes] = []
    listener = threading.Thread(target=_read_all, args=(os.dup(child.stdout.fileno()), errors), daemon=True)
    reader.start()
    listener.start()
    try:
        # stdin stays open: when this process goes away, however it does, the child reads its end and goes too.
        child.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        child.stdin.flush()
        code: int | None = child.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    except BrokenPipeError:  # it died before reading its job
        code = child.wait()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        reader.join()
        listener.join()
        with contextlib.suppress(BrokenPipeError):  # what it has not read is still to be written
            child.stdin.close()
        child.stdout.close()
    return b"".join(replies).decode(), b"".join(errors).decode(errors="replace"), code


def _root() -> str:
    return str(Path(__file__).resolve().parent.parent)


def _read_all(handle: int, into: list[bytes]) -> None:
    with os.fdopen(handle, "rb") as pipe:
        into.append(pipe.read())


def _with_origin(found: Sequence[Mapping[str, Any]], model: Path, hints: Mapping[str, str]) -> list[Refusal]:
    """Looks up, for each refused node, where in the user's code it came from."""
    nodes: dict[str, onnx.NodeProto] = {}
    graph = onnx.load(str(model), load_external_data=False).graph
    _collect(graph, nodes)
    refusals = []
    for item in found:
        node = nodes.get(item["node"])
        if node is None and 0 <= item["index"] < len(graph.node):  # before TensorRT 10, all that a parser tells
            node = graph.node[item["index"]]
        where = origin_of(node.name, {p.key: p.value for p in node.metadata_props}) if node is not None else None
        name = item["node"] or (node.name if node is not None else "")
        operator = item["operator"] or (node.op_type if node is not None else "")
        refusals.append(
            Refusal(
                operator,
                name,
                item["words"],
                where.module if where else "",
                where.source if where else "",
                hints.get(name) or hints.get(operator, ""),
            )
        )
    return list(dict.fromkeys(refusals))


def _collect(graph: onnx.GraphProto, into: dict[str, onnx.NodeProto]) -> None:
    for node in graph.node:
        into[node.name] = node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _collect(attribute.g, into)


def write_sidecar(
    path: Path,
    outcome: BuildOutcome,
    result: ConversionResult,
    target: Target,
    engine: Path,
    plugins: Sequence[NeededPlugin] = (),
    engine_sha256: str | None = None,
    builder: Mapping[str, Any] | None = None,
) -> None:
    """Writes what the engine is, what it was made of, and which plugins it needs, beside it.

    ``engine_sha256`` is that of the engine, where it is known; ``builder`` what the builder was told.
    """
    assert result.onnx is not None
    sidecar = {
        "target": asdict(target.info),
        "compute_capabilities": [".".join(map(str, pair)) for pair in outcome.compute_capabilities],
        "precision": result.precision,
        "builder": dict(builder or {}),
        "inputs": [asdict(item) for item in result.inputs],
        "outputs": [asdict(item) for item in result.outputs],
        "calling": result.calling.pack() if result.exporter is not None and result.calling is not None else None,
        "engine_inputs": outcome.inputs,
        "engine_outputs": outcome.outputs,
        "plugins": [plugin.record() for plugin in plugins],
        "branches": outcome.branches,
        "tensorrt_seconds": outcome.seconds,
        "onnx_sha256": sha256(result.onnx),
        "engine_sha256": engine_sha256 or sha256(engine),
    }
    write_text(path, json.dumps(sidecar, indent=2) + "\n")
