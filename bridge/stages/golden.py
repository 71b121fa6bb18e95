"""What the engine is to compute, kept beside it for the machine where it runs (``bridge verify``)."""

from __future__ import annotations

from ..workspace import ENGINE, ENGINE_RUN, ENGINE_RUN_ARRAYS, GOLDEN, GOLDEN_ARRAYS
from .state import Outputs, State


def keep_golden(state: State) -> None:
    """Writes ``golden.npz`` and ``golden.json``, if that is asked for; before the engine runs, so that there is
    evidence of one that does not agree too."""
    if not state.settings.golden:
        return
    from ..diff.evidence import write_golden

    result, space = state.result, state.workspace
    outputs = {"exported" if result.exporter is None else "torch": state.source, "rewritten": state.rewritten}
    with state.clock("compare"):
        write_golden(space.partial, state.cases, outputs, result, state.settings.tolerance, space.folder)
    space.publish(GOLDEN_ARRAYS, GOLDEN)


def keep_engine_run(state: State, outputs: Outputs) -> None:
    """Writes what the engine computed beside the evidence, if that is asked for."""
    if not state.settings.golden:
        return
    from ..diff.bundle import read_bundle
    from ..diff.evidence import write_engine_run

    space = state.workspace
    golden = read_bundle(space.path(GOLDEN), "golden")
    names = [case.name for case in state.cases]
    write_engine_run(space.folder, golden.digest, golden.facts["files"][ENGINE], names, outputs, space.partial)
    space.publish(ENGINE_RUN_ARRAYS, ENGINE_RUN)
