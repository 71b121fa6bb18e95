"""What is computed in what: precisions are assigned to nodes, and where the target wants them in the graph, put there.

What the model then computes is compared with what it did before, in ONNX Runtime with every value really rounded,
before an engine is built of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..assignment import Assignment, assign, make_ready
from ..build_plan import plan_build
from ..calibration import CALIBRATORS, METHOD_OF, Calibration, write_calibration
from ..compare import Feeds, disagreement, onnx_runner, run_stage
from ..errors import CompareError, PrecisionError
from ..inputs import hull
from ..workspace import CALIBRATION, QUANTISED, TYPED
from .state import State

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from ..precision import Precision
    from ..ranges import Range

LISTED = 20
"""Layers that are kept in the result."""
COMPARED = 8
"""Calibration samples that the lower precision is compared on, beside the cases."""


def lower(state: State, graph: gs.Graph) -> None:
    """Makes the plan of the build for the rewritten ``graph``, and a typed model of it; ``result.onnx`` becomes what
    the target takes of that. Raises CompareError where the typed model is off by more than the tolerance."""
    settings, result = state.settings, state.result
    of_torch = result.exporter is not None
    if settings.precision.plain:
        with state.clock("rewrite"):
            state.plan = plan_build(settings, graph, of_torch)
            result.notes.extend(state.plan.notes)
        return
    from passes.casts import computes_in_half

    own = settings.target.strongly_typed  # the model says it all
    if settings.calibration_algorithm in CALIBRATORS and settings.precision.scheme == "int8" and own:
        result.notes.append(
            f"calibration_algorithm {settings.calibration_algorithm}: {settings.target} has no calibrators: the model "
            f"is quantised, by {settings.algorithm}"
        )
    with state.clock("precision"):
        calibration = calibration_of(state)
        samples: Callable[[], Iterable[Feeds]] = (lambda: state.feeds) if calibration is None else calibration.samples
        measured = measured_model(state)
        ranges = {} if computes_in_half(graph) else ranges_of(state, samples(), measured)
        assignment = assign(graph, settings.precision, ranges, settings.target)
        result.notes.extend(assignment.notes)
        for node, reason in assignment.reasons.items():
            result.kept.setdefault(reason, []).append(node)
        typed, nodes = None, assignment.nodes
        if nodes:
            typed, nodes = _typed(state, graph, assignment, scales_of(state, samples(), measured))
        state.plan = plan_build(settings, graph, of_torch, nodes, calibration if state.tensorrt_calibrates else None)
        result.notes.extend(state.plan.notes)
    if typed is not None:
        _check(state, typed, list(itertools.islice(samples(), COMPARED)) if calibration is not None else [])
    elif own:
        state.hold_to_source("rewritten", state.rewritten)  # its types were the asked ones before


def calibration_of(state: State) -> Calibration | None:
    """The calibration inputs; the example where there are none given, and TensorRT itself calibrates."""
    settings = state.settings
    builders = state.tensorrt_calibrates
    if settings.calibration is None and not builders:
        if settings.precision.scheme in ("int8", "fp8"):
            state.result.notes.append(_EXAMPLE_ALONE)
        return None
    if settings.calibration is None:
        state.result.notes.append(_EXAMPLE_ALONE)
    assert state.read is not None
    partial, example = state.workspace.partial, state.cases[0].feeds
    made = write_calibration(
        settings.calibration,
        state.read,
        example,
        hull(state.profiles),
        partial / "calibration",
        settings.algorithm,
        partial / CALIBRATION,
        one_shape=builders,
    )
    state.result.notes.extend(made.notes)
    return made


_EXAMPLE_ALONE = "calibrated with the example inputs alone: give calibration= typical ones"


def measured_model(state: State) -> Path:
    """The model whose tensors are measured: the rewritten one, or what it is made into before it is assigned types."""
    from passes import read, write

    assert state.result.rewritten_onnx is not None
    graph = read(state.result.rewritten_onnx)
    if not make_ready(graph, state.settings.precision, state.settings.target):
        return state.result.rewritten_onnx
    path = state.workspace.partial / "measured.onnx"
    write(graph, path, beside=state.workspace.folder)
    return path


def ranges_of(state: State, samples: Iterable[Feeds], model: Path) -> Mapping[str, Range]:
    """What the tensors of ``model`` hold, which decides what can be in the low type, or loses too much as integers."""
    from ..ranges import measure

    return measure(model, samples)


def scales_of(state: State, samples: Iterable[Feeds], model: Path) -> Mapping[str, Range]:
    """The ranges that activations are quantised by, where the model does it; int4 quantises weights alone."""
    from ..ranges import measure

    settings = state.settings
    if settings.precision.scheme not in ("int8", "fp8") or state.tensorrt_calibrates:
        return {}
    method = METHOD_OF[settings.algorithm] if settings.precision.scheme == "int8" else "max"
    return measure(model, samples, method)  # type: ignore[arg-type]


def _typed(
    state: State, graph: gs.Graph, assignment: Assignment, scales: Mapping[str, Range]
) -> tuple[Path | None, dict[str, str]]:
    """The model with the precisions in the graph, None where TensorRT's calibrator alone knows them; and what its nodes
    are in. What of it the target takes is put into ``graph``, and becomes ``result.onnx``.

    Strongly typed targets take all. Weakly typed ones take the quantisation alone, and choose the types themselves; the
    typed model then shows what the engine is allowed to do.
    """
    from passes import read

    settings, result = state.settings, state.result
    precision, own = settings.precision, settings.target.strongly_typed
    quantised = bool(precision.scheme) and not state.tensorrt_calibrates
    nodes = assignment.nodes
    if quantised or own:
        put = put_in_types(graph, precision, assignment, scales, quantised=quantised, cast=own)
        result.notes.extend(note for note in put.notes if note not in result.notes)
        for node, reason in put.declined.items():
            result.kept.setdefault(f"not quantised: {reason}", []).append(node)
        if quantised and not put.quantised:
            raise _nothing_quantised(precision, graph, assignment, result.kept)
        nodes = {**nodes, **{name: assignment.floats[name] for name in put.declined}}
        result.onnx = _written(state, graph, TYPED if own or not precision.half else QUANTISED)
        state.describe(graph)
    if own or not precision.half:
        return (result.onnx if quantised or own else None), nodes
    assert result.onnx is not None
    shown = read(result.onnx)
    put = put_in_types(shown, precision, assignment, scales, quantised=False)
    result.notes.extend(note for note in put.notes if note not in result.notes)
    return _written(state, shown, TYPED), nodes


def _written(state: State, graph: gs.Graph, name: str) -> Path:
    from passes import write

    state.workspace.publish(*write(graph, state.workspace.partial / name, beside=state.workspace.folder))
    return state.workspace.path(name)


@dataclass(frozen=True)
class PutIn:
    """What became of a graph that was given the types of an assignment."""

    notes: list[str]
    declined: dict[str, str]
    """Nodes that were to be quantised and were not, with the reason."""
    quantised: bool
    """Whether anything was."""


def put_in_types(
    graph: gs.Graph,
    precision: Precision,
    assignment: Assignment,
    scales: Mapping[str, Range],
    *,
    quantised: bool,
    cast: bool = True,
) -> PutIn:
    """Puts into the graph, in place, what it is assigned: its quantisation by ``scales``, if ``quantised``, and its
    types of 16 bits, if it is to be ``cast``."""
    from passes import casts
    from passes.quantisation import quantise

    notes: list[str] = []
    declined: dict[str, str] = {}
    found = False
    if quantised and precision.scheme:
        log = quantise(graph, precision.scheme, scales, assignment.of(precision.scheme))  # type: ignore[arg-type]
        notes.extend(log.notes)
        declined.update(log.declined)
        found = bool(log.quantised)
    if precision.half and cast:
        # A quantised node is otherwise in what is around it.
        fp32 = assignment.fp32 | (assignment.of(precision.scheme) if precision.low == "fp32" else frozenset())
        done = casts.cast(graph, precision.half_dtype, fp32, precision.io, saturated=assignment.saturated)
        notes.extend(done.notes)
        for name, largest in done.clamped.items():
            notes.append(f"{name} holds {largest:g} or its negative, beyond {precision.half}: it was cut to the range")
    return PutIn(notes, declined, found)


def _nothing_quantised(
    precision: Precision, graph: gs.Graph, assignment: Assignment, kept: Mapping[str, Sequence[str]]
) -> PrecisionError:
    """With the reasons of the nodes that multiply and add, and what to ask for in its place."""
    from passes.casts import COMPUTE
    from passes.ir import scopes

    products = {node.name for scope in scopes(graph) for node in scope.nodes if node.op in COMPUTE and not node.domain}
    found = {reason: [name for name in nodes if name in products] for reason, nodes in kept.items()}
    listed = [
        f"{reason} ({', '.join(nodes[:3])}{', …' * (len(nodes) > 3)})" for reason, nodes in found.items() if nodes
    ]
    reasons = "; ".join(listed) or (
        "rules ask for other types of all that could be" if products else "there is no operator that has kernels for it"
    )
    wider = "" if precision.scheme == "int8" else "int8, which takes convolutions and weights of any size, or for "
    half = precision.half if any(assignment.floats.get(name) == precision.half for name in products) else ""
    return PrecisionError(
        f"{precision} was asked for, and nothing can be quantised: {reasons}. Ask for {wider}{half or 'fp32'} alone."
    )


def _check(state: State, model: Path, samples: Sequence[Feeds]) -> None:
    """Compares what ``model`` computes with what the rewritten one does, on the cases and on ``samples``."""
    from ..evaluator import evaluate, layer_errors
    from ..layers import table, worst

    result = state.result
    rewritten = result.rewritten_onnx
    assert rewritten is not None
    with state.clock("run"):
        reference = [*state.rewritten]
        if samples:
            reference += run_stage("rewritten", lambda: onnx_runner(rewritten, "rewritten"), samples)
        found = evaluate(model, [*state.feeds, *samples])
    names = [case.name for case in state.cases] + [f"calibration {index}" for index in range(len(samples))]
    comparisons = state.compare(("rewritten", "typed"), reference, found, result.computed_in, names)
    if not state.tensorrt_calibrates:  # of which the model says nothing
        state.hold_to_source("typed", found[: len(state.cases)])
    named = "layers=True names the layers that introduce most of it."
    if state.settings.layers:
        with state.clock("compare"):
            errors = layer_errors(rewritten, model, state.feeds[:1])
            result.layers = worst(errors, LISTED)
        named = f"The layers that introduce most of it, on the example:\n{table(errors)}"
    if not all(item.agreed for item in comparisons):
        raise CompareError(
            f"in {state.settings.precision} the model computes something else: {disagreement(comparisons)}\n{named}\n"
            f"{_ways_out(state)}"
        )


def _ways_out(state: State) -> str:
    precision = state.settings.precision
    ways = ["keep them in fp32 by a precision file, which bridge bisect writes"]
    if precision.half == "fp16" and not state.settings.target.lacks_type("bfloat16"):
        ways.append("ask for bf16 in the place of fp16, if values leave its range")
    if precision.io == "convert":
        ways.append(f"io: keep, if inputs or outputs need more than the range and digits of {precision.half}")
    if precision.scheme in ("int8", "fp8"):
        ways.append("calibrate with more, and more typical, inputs")
    return f"What helps: {'; '.join(ways)}; or give a tolerance."
