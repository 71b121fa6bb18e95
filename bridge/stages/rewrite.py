"""From the exported model to one that the target's parser takes, and that computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..advice import RESTRICTIONS
from ..build_plan import quantises
from ..compare import disagreement
from ..errors import RewriteError, RunError
from ..onnx_source import pinned_shapes
from ..plugins.loading import needed_plugins
from ..proof import RANDOM
from ..result import Decline, Rewrite
from ..workspace import REWRITTEN
from .state import Outputs, State

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_graphsurgeon as gs

    from passes import Log

    from ..target import Target

NODES_LISTED = 50


def rewrite(state: State) -> gs.Graph:
    """Writes the model that the parser takes, and returns its graph."""
    from passes import PassError, read, rewrite, write

    result, target = state.result, state.settings.target
    assert result.exported_onnx is not None
    with state.clock("rewrite"):
        graph = read(result.exported_onnx)
        result.quantises = quantises(graph)
        try:
            log = rewrite(graph, target, pinned_shapes(graph, state.profiles), record=state.settings.prove)
        except PassError as error:
            raise RewriteError(str(error)) from error
        state.workspace.publish(*write(graph, state.workspace.partial / REWRITTEN, beside=state.workspace.folder))
    result.onnx = result.rewritten_onnx = state.workspace.path(REWRITTEN)
    result.rewrites = [
        Rewrite(name, log.reasons[name], len(nodes), nodes[:NODES_LISTED]) for name, nodes in log.nodes.items()
    ]
    result.declined = [Decline(rule, where, reason) for (rule, _), (where, reason) in log.declined.items()]
    result.notes.extend(log.notes)
    state.plugins = needed_plugins(graph, target)
    loaded = [plugin for plugin in state.plugins if plugin.loaded]
    result.notes.extend(f"the engine needs {plugin} wherever it runs: {plugin.source}" for plugin in loaded)
    state.describe(graph)
    state.hints = _hints(log, graph, target)
    _prove(state, log)
    return graph


def check_rewritten(state: State, exported: Outputs, known: Outputs | None) -> None:
    """Compares what the rewritten model computes (``known``, where it was computed before) with the exported one."""
    path = state.result.rewritten_onnx
    assert path is not None
    with state.clock("run"):
        try:
            state.rewritten = known if known is not None else state.run_onnx(path, "rewritten", state.feeds_as_taken)
        except RunError as error:
            raise RunError(f"{error}\n{_culprit(state)}") from error
    comparisons = state.compare(("exported", "rewritten"), exported, state.rewritten, state.result.own_precision)
    if state.settings.precision.plain:
        state.hold_to_source("rewritten", state.rewritten)
    if not all(item.agreed for item in comparisons):
        found = disagreement(comparisons)
        if cause := _chance(path) or _beyond_int32(state, exported):
            raise RewriteError(f"{cause}\n{found}")
        raise RewriteError(f"the passes changed what the model computes: {found}\n{_culprit(state)}")


def _chance(path: Path) -> str:
    """Which nodes draw random numbers, and what to do about it; empty where none does."""
    from passes import read
    from passes.ir import scopes
    from passes.provenance import describe

    drawing = [describe(node) for scope in scopes(read(path)) for node in scope.nodes if _draws(node)]
    if not drawing:
        return ""
    more = f" and {len(drawing) - 3} more" if len(drawing) > 3 else ""
    return (
        f"the model draws random numbers, at {', '.join(drawing[:3])}{more}: it gives other outputs each time, and "
        "cannot be compared. Export it in eval mode (model.eval()), or give it the numbers as an input."
    )


def _draws(node: gs.Node) -> bool:
    """Whether it gives other numbers each time: with a seed, ONNX Runtime gives the same."""
    if node.domain or "seed" in node.attrs or node.op != "Dropout":
        return not node.domain and "seed" not in node.attrs and node.op in RANDOM
    training = node.inputs[2] if len(node.inputs) > 2 else None
    values = getattr(training, "values", None)
    return training is not None and not training.is_empty() and (values is None or bool(np.asarray(values).any()))


def _beyond_int32(state: State, exported: Outputs) -> str:
    """What int32 cannot hold of the inputs and outputs, where the target has no int64; empty where all is well."""
    target, limits = state.settings.target, np.iinfo(np.int32)
    if "int64" in target.types:
        return ""
    for kind, runs in (("input", state.feeds), ("output", exported)):
        for run in runs:
            for name, array in run.items():
                if array.dtype != np.int64:
                    continue
                beyond = np.argwhere((array < limits.min) | (array > limits.max))
                if len(beyond):
                    place = tuple(beyond[0].tolist())
                    where = f" at {list(place)}" if place else ""
                    return (
                        f"{target} has no int64, and {kind} {name!r} has {array[place]}{where}, which int32 does not "
                        "hold. Make the numbers smaller, or convert for TensorRT 10 or newer, or RTX, which have int64."
                    )
    return ""


def _hints(log: Log, graph: gs.Graph, target: Target) -> dict[str, str]:
    """By node or operator, what could help where the parser refuses it."""
    hints = {name: f"rule {rule} declined: {reason}" for (rule, name), (_, reason) in log.declined.items()}
    for node in graph.nodes:
        advice = target.advice(node.op, node.domain or "")
        if advice and (node.domain or not target.takes(node.op)):
            hints.setdefault(node.name, advice)
    return {**RESTRICTIONS, **hints}


def _prove(state: State, log: Log) -> None:
    """Checks each match of the passes by itself, if that is asked for."""
    from ..proof import prove

    result = state.result
    if log.recorder is None or result.exported_onnx is None or result.onnx is None:
        return
    with state.clock("compare"):
        result.proofs = prove(log.recorder, result.exported_onnx, result.onnx, state.cases)


def _culprit(state: State) -> str:
    """Which match it was, or how to find out."""
    from ..proof import culprit

    if not state.settings.prove:
        return "prove=True (--prove) names the match that did it"
    return culprit(state.result.proofs, [rewrite.name for rewrite in state.result.rewrites])
