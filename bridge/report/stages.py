"""The picture of the error along the stages: pure functions from comparisons to SVG coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bridge.result import Comparison, ConversionResult

from .axis import LogAxis, Tick, decades
from .view import closeness, number, outputs

_STAGES = ("torch", "exported", "rewritten", "typed", "engine")
_HIGHLIGHTED = 6
"""Outputs with a colour and a dash of their own; among more than that, no reader can tell lines apart."""

_WIDTH, _LEFT, _RIGHT = 900.0, 62.0, 10.0
_REFERENCE_WIDTH = 96.0
_HEADINGS, _BAND, _PLOT = 58.0, 40.0, 250.0

_Height = Callable[[float | None], float]


@dataclass(frozen=True)
class Column:
    """A stage. ``missing`` says why it has no marks; it is empty where it has some."""

    stage: str
    detail: str
    figures: str
    missing: str
    x: float
    width: float
    is_reference: bool

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True)
class Marker:
    x: float
    y: float
    agreed: bool
    title: str


@dataclass(frozen=True)
class Line:
    """One output on one set of inputs, along the stages. ``look`` is its place among the highlighted, or ``rest``."""

    output: str
    inputs: str
    look: str
    path: str
    markers: list[Marker]


@dataclass(frozen=True)
class ToleranceMark:
    x: float
    width: float
    y: float


@dataclass(frozen=True)
class StagePicture:
    """The largest absolute error of every output at every stage, on a logarithmic axis with a line of its own for 0."""

    width: float
    height: float
    top: float
    """Upper end of the columns, under their headings."""
    zero: float
    unknown: float | None
    """Where marks without a figure lie; None where there are none."""
    columns: list[Column]
    ticks: list[Tick]
    tolerances: list[ToleranceMark]
    lines: list[Line]
    """Those to be seen best come last, which SVG draws on top."""
    highlighted: list[str]
    others: int
    input_sets: list[str]
    has_disagreements: bool
    has_relative_tolerance: bool
    description: str


def stage_picture(result: ConversionResult) -> StagePicture | None:
    """None where nothing was compared."""
    comparisons = [item for item in result.comparisons if _is_step(item)]
    if not comparisons:
        return None

    columns = _columns(result, comparisons)
    figures = [item.max_abs_error for item in comparisons if item.max_abs_error is not None]
    unknown = None if len(figures) == len(comparisons) else _HEADINGS + _BAND / 2
    top = _HEADINGS + (0 if unknown is None else _BAND)
    low, high = decades([*figures, *(item.tolerance.atol for item in comparisons)])
    axis = LogAxis(low, high, start=top + _PLOT, end=top)
    zero = top + _PLOT + _BAND

    def height(error: float | None) -> float:
        if error is None:
            return unknown or top
        return axis.at(error) if error > 0 else zero

    worst_first = [output.name for output in outputs(result)]
    lines = _lines(comparisons, worst_first, {column.stage: column for column in columns}, height)
    return StagePicture(
        width=_WIDTH,
        height=zero + 20,
        top=_HEADINGS - 4,
        zero=zero,
        unknown=unknown,
        columns=columns,
        ticks=axis.ticks(at_most=8),
        tolerances=_tolerances(comparisons, columns, height),
        lines=lines,
        highlighted=worst_first[:_HIGHLIGHTED],
        others=max(0, len(worst_first) - _HIGHLIGHTED),
        input_sets=list(dict.fromkeys(item.inputs for item in comparisons)),
        has_disagreements=not all(item.agreed for item in comparisons),
        has_relative_tolerance=any(item.tolerance.rtol > 0 for item in comparisons),
        description="; ".join(
            f"{column.stage}: {column.missing or column.detail + ', ' + column.figures}" for column in columns
        ),
    )


def _is_step(comparison: Comparison) -> bool:
    reference, candidate = comparison.reference, comparison.candidate
    return reference in _STAGES and candidate in _STAGES[_STAGES.index(reference) + 1 :]


def _columns(result: ConversionResult, comparisons: Sequence[Comparison]) -> list[Column]:
    """The stages from the first reference on: an ONNX file as the source has no torch before it, and what stays in the
    source's types no model with others."""
    first = min(_STAGES.index(item.reference) for item in comparisons)
    lowered = result.precision != "fp32" or any(item.candidate == "typed" for item in comparisons)
    stages = [stage for stage in _STAGES[first:] if stage != "typed" or lowered]
    width = (_WIDTH - _LEFT - _RIGHT - _REFERENCE_WIDTH) / (len(stages) - 1)
    columns = [Column(stages[0], "the reference", "", "", _LEFT, _REFERENCE_WIDTH, is_reference=True)]
    for index, stage in enumerate(stages[1:]):
        here = [item for item in comparisons if item.candidate == stage]
        missing = "" if here else _absence(result, stage)
        x = round(_LEFT + _REFERENCE_WIDTH + index * width, 1)
        columns.append(Column(stage, *_heading(here), missing, x, round(width, 1), is_reference=False))
    return columns


def _heading(comparisons: Sequence[Comparison]) -> tuple[str, str]:
    if not comparisons:
        return "", ""
    references = " and ".join(dict.fromkeys(item.reference for item in comparisons))
    errors = [item.max_abs_error for item in comparisons if item.max_abs_error is not None]
    atols = " and ".join(f"{atol:g}" for atol in _atols(comparisons))
    largest = f"at most {number(max(errors))}" if errors else "no figure"
    return f"against {references}", f"{largest}, atol {atols}"


def _atols(comparisons: Sequence[Comparison]) -> list[float]:
    return sorted({item.tolerance.atol for item in comparisons})


def _absence(result: ConversionResult, stage: str) -> str:
    if result.status == "failed":
        return "not reached"
    if stage == "engine":
        return {"built": "not run", "rewritten": "not built"}.get(result.status, "not compared")
    return "not compared"


def _lines(
    comparisons: Sequence[Comparison],
    worst_first: Sequence[str],
    columns: dict[str, Column],
    height: _Height,
) -> list[Line]:
    """Lines stand side by side in a column, in the order of the model, so that equal errors do not hide each other."""
    grouped: dict[tuple[str, str], list[Comparison]] = {}
    for item in comparisons:
        grouped.setdefault((item.output, item.inputs), []).append(item)
    room = min(column.width for column in columns.values() if not column.is_reference) - 40
    step = min(16.0, room / max(1, len(grouped) - 1))
    ranks = {name: rank for rank, name in enumerate(worst_first)}

    lines = []
    for place, ((output, inputs), items) in enumerate(grouped.items()):
        offset = (place - (len(grouped) - 1) / 2) * step
        markers = [
            Marker(
                round(columns[item.candidate].middle + offset, 1),
                height(item.max_abs_error),
                item.agreed,
                f"{output}, {inputs} inputs, {item.reference} → {item.candidate}: "
                f"{number(item.max_abs_error)}, {closeness(item)}",
            )
            for item in sorted(items, key=lambda item: _STAGES.index(item.candidate))
        ]
        path = "M" + "L".join(f"{marker.x} {marker.y}" for marker in markers)
        rank = ranks[output]
        lines.append(Line(output, inputs, str(rank) if rank < _HIGHLIGHTED else "rest", path, markers))
    return sorted(lines, key=lambda line: ranks[line.output], reverse=True)


def _tolerances(comparisons: Sequence[Comparison], columns: Sequence[Column], height: _Height) -> list[ToleranceMark]:
    return [
        ToleranceMark(column.x, column.width, height(atol))
        for column in columns
        for atol in _atols([item for item in comparisons if item.candidate == column.stage])
    ]
