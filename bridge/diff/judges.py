"""Whether a model in a given precision is within its tolerance: by the evaluator, or by an engine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..assignment import Assignment, assign
from ..compare import compare_stages, onnx_runner, run_stage
from ..errors import BuildError, RunError
from ..precision import Precision
from ..ranges import Range
from ..result import Comparison, ConversionResult
from ..stages.precision import put_in_types
from ..stages.state import Outputs, State

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Feeds = Mapping[str, np.ndarray[Any, Any]]

ROUNDS = 20
"""Runs of an engine whose median time is its latency, after a fifth as many that are not counted."""


@dataclass(frozen=True)
class Judgement:
    """What came of one precision."""

    ok: bool
    error: float
    """The worst output's, as a share of its tolerance: 1 is all that is allowed. Infinite where an output is not finite
    in the same places, or has another shape."""
    output: str = ""
    """The worst one."""
    inputs: str = ""
    """The case or sample where it is worst."""
    milliseconds: float | None = None
    """The engine's latency, copies to and from the GPU included; None where none ran."""


Judge = Callable[[Precision], Judgement]
"""What a user may give in place of the bridge's own."""


def judged(comparisons: Sequence[Comparison], milliseconds: float | None = None) -> Judgement:
    """The worst of the comparisons."""
    worst = max(comparisons, key=_share)
    ok = all(item.agreed for item in comparisons)
    return Judgement(ok, _share(worst), worst.output, worst.inputs, milliseconds)


def _share(item: Comparison) -> float:
    """How much of its tolerance an output takes."""
    lost = item.reference_shape != item.candidate_shape
    lost |= (item.reference_nan, item.reference_inf) != (item.candidate_nan, item.candidate_inf)
    if lost or (not item.agreed and item.tolerance_used is None):
        return math.inf
    used = item.tolerance_used or 0.0
    return used if item.agreed or used > 1 else math.inf  # infinities at other places


@dataclass
class EvaluatorJudge:
    """Makes the typed model as ``convert`` does, and has the evaluator run it, every value rounded to its type."""

    state: State
    ranges: Mapping[str, Range]
    scales: Mapping[str, Range]
    feeds: Sequence[Feeds]
    names: Sequence[str]
    """What the feeds are called."""
    reference: Outputs

    def __call__(self, precision: Precision) -> Judgement:
        from ..evaluator import evaluate

        found = evaluate(self.make(precision), self.feeds)
        return judged(
            compare_stages(
                ("rewritten", "typed"),
                self.names,
                self.reference,
                found,
                self.state.settings.tolerance,
                self.state.result.also_quantised(precision.name),
            )
        )

    def assigned(self, precision: Precision) -> tuple[gs.Graph, Assignment]:
        """The graph as it is before its types are put into it, and what its nodes are to be in."""
        from passes import read

        assert self.state.result.rewritten_onnx is not None
        graph = read(self.state.result.rewritten_onnx)
        return graph, assign(graph, precision, self.ranges, self.state.settings.target)

    def observed(self) -> Mapping[str, Range]:
        """What the reference's tensors hold over all that it is judged on."""
        from ..ranges import measure

        assert self.state.result.rewritten_onnx is not None
        return measure(self.state.result.rewritten_onnx, self.feeds)

    def make(self, precision: Precision) -> Path:
        """Writes the typed model of a precision, in place of the one before."""
        from passes import write

        graph, assignment = self.assigned(precision)
        quantised = not self.state.tensorrt_calibrates
        put_in_types(graph, precision, assignment, self.scales, quantised=quantised)
        path = self.state.workspace.partial / "candidate.onnx"
        write(graph, path, beside=self.state.workspace.folder)
        return path


@dataclass
class EngineJudge:
    """Converts anew, and runs the engine on all feeds."""

    convert: Callable[[Precision, Path], ConversionResult]
    folder: Path
    target: Any
    feeds: Sequence[Feeds]
    names: Sequence[str]
    reference: Outputs
    tolerance: Any

    def __call__(self, precision: Precision) -> Judgement:
        result = self.convert(precision, self.folder)
        if result.engine is None:
            failed = [item for item in result.comparisons if item.candidate == "typed" and not item.agreed]
            if failed:
                return judged(failed)
            error = result.exception
            raise error if error is not None else BuildError(f"{result.name}: no engine was built: {result.error}")
        times: list[float] = []
        outputs = self._run(result.engine, times)
        compared = compare_stages(
            ("rewritten", "engine"), self.names, self.reference, outputs, self.tolerance, result.computed_in
        )
        return judged(compared, statistics.median(times) if times else None)

    def _run(self, engine: Path, times: list[float]) -> Outputs:
        """What the engine computes; ``times`` gets the milliseconds of its runs on the first feeds."""
        from polygraphy.comparator.data_loader import coerce_feed_dict

        from passes import read

        from ..plugins.loading import needed_plugins
        from ..runtime.runner import engine_runner

        plugins = needed_plugins(read(self.folder / "rewritten.onnx"), self.target)
        outputs = run_stage("engine", lambda: engine_runner(engine, self.target, plugins), self.feeds)
        with engine_runner(engine, self.target, plugins) as runner:
            given = coerce_feed_dict(dict(self.feeds[0]), runner.get_input_metadata(use_numpy_dtypes=False))
            for _ in range(ROUNDS // 5 + ROUNDS):
                runner.infer(given)
                times.append(1e3 * runner.last_inference_time())
        del times[: ROUNDS // 5]
        return outputs


def reference_outputs(rewritten: Path, feeds: Sequence[Feeds]) -> Outputs:
    """What the model in float32 computes. Raises RunError where an output is no number to be compared with."""
    outputs = run_stage("rewritten", lambda: onnx_runner(rewritten, "rewritten"), feeds)
    if not any(outputs):
        raise RunError("the model has no outputs to be judged by.")
    return outputs
