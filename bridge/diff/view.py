"""What the reports of a diff say: its status, the figures to read first, what to do next. The markup is elsewhere."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from bridge.report.view import Fact, capital, number, seconds

from .model import (
    NOT_BUILT,
    STAGES,
    DiffReport,
    Error,
    LayerDiff,
    Metric,
    OutputData,
    Percentiles,
    ShapeError,
    StageError,
    StageName,
)

Look = Literal["verified", "built", "failed"]

STAGE_TITLES: dict[StageName, str] = {
    "torch": "torch",
    "exported": "exported ONNX",
    "rewritten": "rewritten ONNX",
    "typed": "typed ONNX",
    "engine": "engine",
}


@dataclass(frozen=True)
class Status:
    """``look`` is a status of the other reports: green is for an engine that ran, alone."""

    look: Look
    mark: str
    label: str


def status(report: DiffReport) -> Status:
    if not report.ok:
        return Status("failed", "✕", "Diverges")
    if any(item.stage == "engine" and _figures(item) for item in report.stages):
        return Status("verified", "✓", "Agrees")
    return Status("built", "◐", "Agrees, as far as it was run")


def sentence(report: DiffReport) -> str:
    """The verdict below the name, which then need not lead it."""
    return capital(report.verdict.removeprefix(f"{report.name}: "))


def _figures(item: StageError) -> Error | None:
    return item.added or item.carried


# --- figures -----------------------------------------------------------------------------------------------------


def share(value: float | None) -> str:
    """Of the tolerance."""
    if value is None:
        return "–"
    return "under 1 %" if 0 < value < 0.01 else f"{100 * value:,.0f} %" if value < 10 else f"{value:,.0f} times"


def psnr(error: Error) -> str:
    if error.psnr is None:
        return "∞" if error.max_abs == 0 else "–"
    return f"{error.psnr:.1f} dB"


def agreement(error: Error | None) -> tuple[str, str, str]:
    """A class of the style sheet, a mark and a word."""
    if error is None or error.agreed is None:
        return "", "–", "not held to any"
    return ("good", "✓", "yes") if error.agreed else ("bad", "✕", "no")


def severity(error: Error | None) -> tuple[bool, int, float, float]:
    """The order of errors of outputs: those that disagree lead."""
    if error is None:
        return (False, 0, 0.0, 0.0)
    return (error.agreed is False, error.non_finite, error.tolerance_used or 0.0, error.relative or 0.0)


# --- by stage ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputStages:
    """One output from torch to the engine."""

    output: str
    rows: list[StageError]
    disagrees: bool


def outputs(report: DiffReport) -> list[OutputStages]:
    """The outputs, worst first, and of each the stages in their order."""
    grouped: dict[str, list[StageError]] = {}
    for item in report.stages:
        grouped.setdefault(item.output, []).append(item)
    found = [
        OutputStages(
            name,
            sorted(rows, key=lambda row: STAGES.index(row.stage)),
            any(error is not None and error.agreed is False for row in rows for error in (row.added, row.carried)),
        )
        for name, rows in grouped.items()
    ]
    return sorted(found, key=lambda item: _severity_of(item.rows), reverse=True)


def _severity_of(rows: Iterable[StageError]) -> tuple[bool, int, float, float]:
    return max(severity(error) for row in rows for error in (row.added, row.carried))


def worst_data(report: DiffReport) -> list[OutputData]:
    """What can be plotted, the worst outputs first."""
    order = {found.output: place for place, found in enumerate(outputs(report))}
    return sorted(report.outputs, key=lambda data: order.get(data.output, len(order)))


@dataclass(frozen=True)
class StageSummary:
    """The worst output of a stage, or why there is none."""

    stage: StageName
    before: StageName | None
    worst: StageError | None
    outputs: int
    notes: list[str]


def summaries(report: DiffReport) -> list[StageSummary]:
    """One for each stage that the report speaks of."""
    found = []
    for stage in STAGES:
        rows = [item for item in report.stages if item.stage == stage]
        if not rows:
            continue
        measured = [row for row in rows if _figures(row)]
        worst = max(measured, key=lambda row: severity(_figures(row)), default=None)
        before = next((row.before for row in rows if row.before), None)
        notes = list(dict.fromkeys(row.note for row in rows if row.note))
        found.append(StageSummary(stage, before, worst, len(rows), notes))
    return found


def why_not(row: StageError | ShapeError) -> str:
    """In place of figures that there are not."""
    if isinstance(row, StageError) and not row.note:
        return "the reference" if row.before is None else "not measured"
    return row.note if row.failed else f"not run: {row.note}" if row.note else "not measured"


# --- first of all ------------------------------------------------------------------------------------------------


def first_diverging(report: DiffReport) -> LayerDiff | None:
    index = report.first_diverging
    return report.layers[index] if index is not None and 0 <= index < len(report.layers) else None


def facts(report: DiffReport) -> list[Fact]:
    found = []
    layer = first_diverging(report)
    if layer is not None:
        line = layer.source.removeprefix(source_root(report.layers))
        where = ", ".join(filter(None, (layer.node or layer.tensor, layer.module, line)))
        found.append(Fact("First layer that diverges", layer.operator or "a layer", where, alarming=not report.ok))
    measured = [item for item in report.stages if _figures(item)]
    worst = max(measured, key=lambda row: severity(_figures(row)), default=None)
    error = _figures(worst) if worst is not None else None
    if worst is not None and error is not None:
        step = f"{worst.before} → {worst.stage}" if worst.added and worst.before else f"against torch at {worst.stage}"
        words = f"{worst.output}, {step}"
        if error.tolerance_used is not None:
            used = share(error.tolerance_used)
            words += f": {used} {'' if used.endswith('times') else 'of '}the tolerance"
        found.append(Fact("Worst output", _headline(error), words, alarming=error.agreed is False))
    if report.layers:
        diverging = sum(item.diverges for item in report.layers)
        words = f"of {len(report.layers):,} that were compared"
        found.append(Fact("Layers that diverge", f"{diverging:,}", words, alarming=bool(diverging and not report.ok)))
    if report.samples is not None:
        words = f"worst: {report.samples.worst}" if report.samples.worst else "measured by data"
        found.append(Fact("Samples", f"{report.samples.count:,}", words))
    if report.seconds:
        slowest = max(report.seconds, key=lambda part: report.seconds[part])
        found.append(Fact("Time", seconds(sum(report.seconds.values())), f"most of it in {slowest}"))
    return found


def _headline(error: Error) -> str:
    if error.non_finite:
        return f"{error.non_finite:,} not finite"
    return number(error.relative if error.relative is not None else error.max_abs)


class Code(str):
    """A part of a step that is typed or found in a file, and shown so."""

    __slots__ = ()


Step = tuple[str, ...]


def steps(report: DiffReport) -> list[Step]:
    """What to do next, the most urgent first."""
    found: list[Step] = []
    layer = first_diverging(report)
    if layer is not None and not report.ok:
        found += _about(layer, report)
    elif not report.ok:
        found.append(("No single layer diverges: look below at the stage that adds most, and at the ranked layers.",))
    if report.samples is not None and report.samples.worst_file and not report.ok:
        file = report.samples.worst_file
        alone = Code(f"--samples {PurePosixPath(file).parent}")
        found.append((Code(file), " holds the worst sample: with ", alone, " it alone is measured."))
    found += _without_engine(next((item for item in report.stages if item.stage == "engine"), None))
    if not found and status(report).look == "verified":
        found.append(("Nothing: the engine was run, and every output is within its tolerance.",))
    return found or [("Build the engine, and diff again: it has not been compared.",)]


def _without_engine(row: StageError | None) -> list[Step]:
    """What to do where there is an engine's row without figures; what a conversion failed for comes before."""
    if row is None or row.failed or _figures(row):
        return []
    if row.note == NOT_BUILT:
        return [("No engine was built: convert with one to have it compared as well.",)]
    if row.note.startswith(NOT_BUILT):
        return []
    take = ", take the folder to a machine whose GPU can run the engine, and ask there: "
    why = f" ({row.note})" if row.note else ""
    return [(f"The engine was not run{why}. Convert with ", Code("--golden"), take, Code("bridge verify DIR"))]


def _about(layer: LayerDiff, report: DiffReport) -> list[Step]:
    name = Code(layer.node or layer.tensor)
    where: Step = (", made by ", Code(layer.where)) if layer.where else ()
    kind = f"Look at {layer.operator} " if layer.operator else "Look at "
    before = f", {layer.before}" if layer.before else ""
    between = f"{before}: the first layer that diverges, from {layer.reference} to {layer.candidate}."
    return [(kind, name, *where, between), *_remedies(layer, report)]


def _remedies(layer: LayerDiff, report: DiffReport) -> list[Step]:
    if layer.candidate == "exported":
        return [("What torch.onnx wrote for it computes something else: write that line another way, or report it.",)]
    if layer.candidate == "rewritten":
        return [("A pass changed what it computes: ", Code("--prove"), " runs each match of the passes by itself.")]
    if layer.precision not in ("float32", "float64") and layer.node:
        rule = json.dumps([f"node:{layer.node}"], ensure_ascii=False)
        return [
            (
                "If it can stay in float32, say so in a precision file, ",
                Code(f"fp32: {rule}"),
                ", and give that as ",
                Code("--precision"),
                "; ",
                Code("bridge bisect"),
                " finds a smallest set of such nodes and writes that file.",
            )
        ]
    if layer.candidate == "engine" and report.precision == "fp32":
        return [("TensorRT rounds it in another way: if TF32 is on, turn it off (", Code("--builder tf32=false"), ").")]
    return []


# --- by shape, by data, metrics ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapeCase:
    case: str
    shapes: dict[str, list[int]]
    rows: list[ShapeError]


def shape_cases(report: DiffReport) -> list[ShapeCase]:
    """The shapes in their order, and the outputs of each."""
    grouped: dict[str, ShapeCase] = {}
    for item in report.shapes:
        grouped.setdefault(item.case, ShapeCase(item.case, item.shapes, [])).rows.append(item)
    return list(grouped.values())


def percentiles(report: DiffReport) -> list[Percentiles]:
    return report.samples.percentiles if report.samples is not None else []


@dataclass(frozen=True)
class MetricRow:
    name: str
    values: list[str]


def metric_stages(report: DiffReport) -> list[StageName]:
    there = {item.stage for item in report.metrics}
    return [stage for stage in STAGES if stage in there]


def metric_rows(report: DiffReport) -> list[MetricRow]:
    """A row for each metric, a column for each of ``metric_stages``."""
    stages = metric_stages(report)
    found = {(item.name, item.stage): item for item in report.metrics}
    rows = []
    for name in dict.fromkeys(item.name for item in report.metrics):
        items = [found.get((name, stage)) for stage in stages]
        values = [
            "–" if item is None else f"{item.value:.6g}" if item.value is not None else _no_value(item)
            for item in items
        ]
        rows.append(MetricRow(name, values))
    return rows


def _no_value(item: Metric) -> str:
    """``nan`` and the like; of a stage that was not run, the table of stages says why."""
    if item.failed:
        return f"failed: {textwrap.shorten(item.note, 100, placeholder=' …')}"
    return item.note if item.note in ("nan", "inf", "-inf") else "not run"


def source_root(layers: Sequence[LayerDiff]) -> str:
    """The folder that all source lines are below, with its last slash; empty where they have none in common."""
    files = {layer.source.rpartition(":")[0] or layer.source for layer in layers if layer.source}
    if not files:
        return ""
    first, last = min(files), max(files)
    same = next(
        (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
    return first[: first[:same].rfind("/") + 1]
