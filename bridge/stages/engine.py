"""From the model to the engine, and what the engine computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..build_plan import few_integers, publish_calibration
from ..compare import Feeds, disagreement, onnx_runner, run_stage
from ..errors import CompareError
from ..gpu import gpu_here
from ..inputs import Array
from ..result import TaskCheck
from ..workspace import BUILD_LOG, CALIBRATION, ENGINE, SIDECAR
from .golden import keep_engine_run
from .state import State


def build_engine(state: State) -> Path:
    """Builds the engine, or takes it out of the cache; returns its path."""
    from ..build import BuildOutcome, build, write_sidecar

    result, settings, partial = state.result, state.settings, state.workspace.partial
    assert result.onnx is not None
    model, engine, log = result.onnx, partial / ENGINE, state.workspace.path(BUILD_LOG)
    plan = replace(state.plan, values=few_integers(state.cases[0].feeds))

    def make(timeout: float | None) -> BuildOutcome:
        return build(
            model,
            engine,
            log,
            target=settings.target,
            profiles=state.profiles,
            compute_capabilities=settings.compute_capabilities,
            timeout=timeout,
            hints=state.hints,
            plugins=state.plugins,
            timing_cache=state.caching.timing_file(),
            plan=plan,
        )

    with state.clock("build"):
        files = {ENGINE: engine, BUILD_LOG: log, CALIBRATION: partial / CALIBRATION}
        outcome, sha256 = state.caching.build(make, files, state.rewritten)
        result.notes.extend(outcome.notes)
        result.precisions, result.not_as_asked = outcome.precisions, outcome.not_as_asked
        told = settings.builder.given()
        write_sidecar(partial / SIDECAR, outcome, result, settings.target, engine, state.plugins, sha256, told)
    publish_calibration(state.plan, state.workspace)
    state.workspace.publish(SIDECAR, ENGINE)
    result.engine = state.workspace.path(ENGINE)
    result.engine_bytes = result.engine.stat().st_size
    return result.engine


def run_engine(state: State, engine: Path) -> None:
    """Runs the engine on all cases. Raises CompareError where it computes something else than the rewritten model."""
    from ..runtime.runner import engine_runner

    with state.clock("run"):
        outputs = run_stage(
            "engine",
            lambda: engine_runner(engine, state.settings.target, state.plugins),
            state.feeds,
        )
    state.result.gpu = gpu_here()
    keep_engine_run(state, outputs)
    comparisons = state.compare(("rewritten", "engine"), state.rewritten, outputs, state.result.computed_in)
    state.hold_to_source("engine", outputs)
    if not all(item.agreed for item in comparisons):
        raise CompareError(f"the engine computes something else: {disagreement(comparisons)}")


def time_engine(state: State) -> None:
    """Keeps how long a call of the engine takes, if that is asked for."""
    if not state.settings.latency:
        return
    from ..runtime.latency import measure_latency

    with state.clock("run"):
        state.result.latency = measure_latency(state.result, state.cases[0].feeds)


def task_check(state: State, engine: Path | None) -> None:
    """Runs the user's own check on the engine or, where none can run, on the model that it was built of."""
    if state.settings.task_check is None:
        return
    from ..exporter_words import user_line

    typed = state.result.onnx != state.result.rewritten_onnx
    where = "engine" if engine is not None else "typed" if typed else "rewritten"
    with state.clock("compare"), _running(state, engine, typed) as run:
        try:
            state.result.task_check = TaskCheck(True, state.settings.task_check(run), where)
        except AssertionError as error:
            state.result.task_check = TaskCheck(False, str(error), where)
            raise CompareError(f"the task check fails on the {where} model: {error}") from error
        except Exception as error:  # the user's code may raise anything, and is named as the cause
            words = f"{type(error).__name__}: {error}{user_line(error)}"
            state.result.task_check = TaskCheck(False, words, where)
            raise CompareError(f"the task check raises on the {where} model: {words}") from error


@contextmanager
def _running(state: State, engine: Path | None, typed: bool) -> Iterator[Callable[[Feeds], dict[str, Array]]]:
    """What runs the engine, or the model: in a lower precision with every value rounded to its type."""
    from ..evaluator import Evaluator
    from ..runtime.runner import engine_runner

    path = state.result.onnx
    assert path is not None

    def as_source(outputs: Mapping[str, Any]) -> dict[str, Array]:
        return {name: np.array(value).astype(state.source_types[name]) for name, value in outputs.items()}

    if engine is None and typed:
        evaluate = Evaluator.of(path).open()
        yield lambda feeds: as_source(evaluate({name: np.asarray(array) for name, array in feeds.items()}))
        return
    target = state.settings.target
    runner = engine_runner(engine, target, state.plugins) if engine is not None else onnx_runner(path, "rewritten")

    def run(feeds: Feeds) -> dict[str, Array]:
        from polygraphy.comparator.data_loader import coerce_feed_dict

        given = {name: np.asarray(array) for name, array in feeds.items()}
        return as_source(active.infer(coerce_feed_dict(given, active.get_input_metadata(use_numpy_dtypes=False))))

    with runner as active:
        yield run
