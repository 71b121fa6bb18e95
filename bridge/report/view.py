"""What the reports say: figures as text, the worst of a result, the order of a run. The markup is in the templates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from bridge.errors import Stage
from bridge.layers import TensorError
from bridge.result import STATUS_MEANING, Comparison, ConversionResult, Proof, Status

_LABELS: Mapping[Status, str] = {
    "failed": "Failed",
    "rewritten": "Rewritten, not built",
    "built": "Built, not run",
    "verified": "Verified",
}
_FAILED_AT: Mapping[Stage, str] = {
    "export": "The source did not become an ONNX model that computes the same.",
    "rewrite": "A pass broke on the model.",
    "precision": "The model cannot be computed in the precision that was asked for.",
    "build": "The target's parser or builder did not accept the model.",
    "run": "A model on the way does not run.",
    "compare": "Two neighbouring stages compute different outputs.",
}
_MARKS: Mapping[Status, str] = {"failed": "✕", "rewritten": "○", "built": "◐", "verified": "✓"}
_FIRST_LINE = 240
"""Characters of an error that the index shows; the report has the rest."""


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def number(value: float | None) -> str:
    """An error: three digits, ``0`` for exactly zero alone, and a dash for a figure that does not exist."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return "0" if value == 0 else f"{value:.2e}"


def psnr(comparison: Comparison) -> str:
    if comparison.psnr is None:
        return "∞" if comparison.max_abs_error == 0 else "–"
    return f"{comparison.psnr:.1f} dB"


def seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shape(dims: Sequence[int | str]) -> str:
    return " × ".join(str(dim) for dim in dims) if dims else "scalar"


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def change(before: object, after: object) -> str:
    return str(after) if before == after else f"{before} → {after}"


def tolerance_ratio(comparison: Comparison) -> float:
    """How much of the tolerance the worst element uses up: 1 is its limit, and infinite what no tolerance covers."""
    used = comparison.tolerance_used
    if comparison.agreed:
        return used or 0.0
    return used if used is not None and used > 1 else math.inf


def closeness(comparison: Comparison) -> str:
    """The distance to the tolerance in words."""
    if comparison.max_abs_error is None:
        return "no finite element to compare" if comparison.agreed else comparison.note or "not comparable"
    if not comparison.agreed:
        return "outside the tolerance"
    if comparison.max_abs_error == 0:
        return "exactly equal"
    ratio = tolerance_ratio(comparison)
    return "under 1 % of the tolerance" if ratio < 0.01 else f"{100 * ratio:.0f} % of the tolerance"


def _severity(comparison: Comparison) -> tuple[bool, float, float]:
    return (not comparison.agreed, tolerance_ratio(comparison), comparison.max_abs_error or 0.0)


def worst(comparisons: Iterable[Comparison]) -> Comparison | None:
    """The comparison that disagrees the most, or comes nearest to it; None where there is none."""
    return max(comparisons, key=_severity, default=None)


@dataclass(frozen=True)
class Output:
    """One output, and all that was measured of it."""

    name: str
    comparisons: list[Comparison]
    worst: Comparison
    disagreements: int


def outputs(result: ConversionResult) -> list[Output]:
    """The outputs that were compared, worst first."""
    grouped: dict[str, list[Comparison]] = {}
    for comparison in result.comparisons:
        grouped.setdefault(comparison.output, []).append(comparison)
    found = [
        Output(name, group, max(group, key=_severity), sum(not item.agreed for item in group))
        for name, group in grouped.items()
    ]
    return sorted(found, key=lambda output: _severity(output.worst), reverse=True)


@dataclass(frozen=True)
class Verdict:
    """``label`` in a few words, and the sentence that says what it does and does not mean."""

    label: str
    mark: str
    sentence: str


def verdict(result: ConversionResult) -> Verdict:
    label, mark = _LABELS[result.status], _MARKS[result.status]
    if result.status == "failed":
        at = f" at {result.stage}" if result.stage else ""
        return Verdict(label + at, mark, _FAILED_AT[result.stage] if result.stage else "The conversion did not finish.")
    meaning = STATUS_MEANING[result.status]
    return Verdict(label, mark, capital(meaning.removeprefix(label.lower() + ": ")) + ".")


@dataclass(frozen=True)
class Fact:
    """A figure large enough to read across the room."""

    title: str
    value: str
    detail: str
    alarming: bool = False


def facts(result: ConversionResult) -> list[Fact]:
    found = []
    largest = worst(result.comparisons)
    if largest is not None:
        agreed = sum(comparison.agreed for comparison in result.comparisons)
        total = len(result.comparisons)
        with_engine = any(comparison.candidate == "engine" for comparison in result.comparisons)
        compared = "comparisons of outputs" if with_engine else "comparisons of outputs, none with the engine"
        found = [
            Fact("Within tolerance", f"{agreed} of {total}", compared, alarming=agreed < total),
            Fact(
                "Worst error",
                number(largest.max_abs_error),
                f"{largest.output}, {largest.reference} → {largest.candidate}: {closeness(largest)}",
                alarming=not largest.agreed,
            ),
        ]
    if result.precisions:
        name, share = max(result.precisions.items(), key=lambda item: item[1])
        kept = sum(map(len, result.kept.values()))
        detail = f"of the compute; {plural(kept, 'node')} kept out of what was asked" if kept else "of the compute"
        found.append(Fact("Computes in", f"{name} {share:.0%}", detail))
    if result.rewrites:
        changed = sum(rewrite.count for rewrite in result.rewrites)
        passes = sum(rewrite.count > 0 for rewrite in result.rewrites)
        found.append(Fact("Nodes changed", str(changed), f"by {passes} {'pass' if passes == 1 else 'passes'}"))
    if result.seconds:
        slowest = max(result.seconds, key=lambda stage: result.seconds[stage])
        found.append(Fact("Time", seconds(sum(result.seconds.values())), f"most of it in {slowest}"))
    if result.from_cache:
        found.append(Fact("Engine", "from the cache", "built by an earlier conversion of the same model"))
    return found


@dataclass(frozen=True)
class ProofRow:
    """The matches of one rule, and what became of them when they were run by themselves."""

    rule: str
    proved: int
    moved: int
    unchecked: int
    max_abs_error: float | None


def proof_rows(result: ConversionResult) -> list[ProofRow]:
    """One row for each rule, those that moved something first."""
    grouped: dict[str, list[Proof]] = {}
    for proof in result.proofs:
        grouped.setdefault(proof.rule, []).append(proof)
    rows = []
    for rule, group in grouped.items():
        statuses = [proof.status for proof in group]
        errors = [proof.max_abs_error for proof in group if proof.max_abs_error is not None]
        counts = (statuses.count("proved"), statuses.count("moved"), statuses.count("not checked"))
        rows.append(ProofRow(rule, *counts, max(errors, default=None)))
    return sorted(rows, key=lambda row: (-row.moved, -row.unchecked, row.rule))


def doubtful(result: ConversionResult) -> list[Proof]:
    """The matches that are not proved, those that moved their outputs first."""
    return sorted(
        (proof for proof in result.proofs if proof.status != "proved"), key=lambda proof: proof.status != "moved"
    )


@dataclass(frozen=True)
class Time:
    """One bar: ``length`` is relative to the longest, ``share`` to the sum, both in percent."""

    stage: str
    seconds: float
    length: float
    share: float


def times(result: ConversionResult) -> list[Time]:
    total, longest = sum(result.seconds.values()) or 1.0, max(result.seconds.values(), default=0.0) or 1.0
    return [
        Time(stage, value, round(100 * value / longest, 2), 100 * value / total)
        for stage, value in result.seconds.items()
    ]


@dataclass(frozen=True)
class Share:
    """What of the compute is in one precision, in percent."""

    precision: str
    percent: float


def shares(result: ConversionResult) -> list[Share]:
    """The largest first."""
    ordered = sorted(result.precisions.items(), key=lambda item: -item[1])
    return [Share(name, 100 * share) for name, share in ordered]


def layer_error(error: TensorError | None) -> str:
    """A layer's error relative to what the reference computes there, or what is lost of it."""
    if error is None:
        return "–"
    return f"{plural(error.non_finite, 'value')} not finite" if error.non_finite else number(error.relative)


def badness(result: ConversionResult) -> tuple[object, ...]:
    """The key that sorts a run worst first.

    Failed results lead, those that came least far before the others; then those whose task check failed, or of which
    an output disagrees; then all others by how much of the tolerance their worst output uses up, where a result that
    measured nothing counts as infinitely bad. Names break ties.
    """
    largest = worst(result.comparisons)
    troubled = (result.task_check is not None and not result.task_check.passed) or bool(largest and not largest.agreed)
    stages: tuple[Stage, ...] = get_args(Stage)
    stage = stages.index(result.stage) if result.status == "failed" and result.stage is not None else len(stages)
    _, ratio, error = _severity(largest) if largest else (False, math.inf, math.inf)
    return (result.status != "failed", stage, not troubled, -ratio, -error, result.name)


@dataclass(frozen=True)
class IndexRow:
    """A line of the index."""

    result: ConversionResult
    href: str | None
    worst: Comparison | None
    seconds: float | None
    first_line: str


def index_row(result: ConversionResult, href: str | None) -> IndexRow:
    lines = (result.error or "").strip().splitlines()
    first = lines[0] if lines else ""
    if len(first) > _FIRST_LINE:
        first = first[: _FIRST_LINE - 1] + "…"
    total = sum(result.seconds.values()) if result.seconds else None
    return IndexRow(result, href, worst(result.comparisons), total, first)


@dataclass(frozen=True)
class StatusCount:
    """How many results of a run ended so."""

    status: Status
    label: str
    mark: str
    count: int


def counts_per_status(results: Sequence[ConversionResult]) -> list[StatusCount]:
    """Worst status first; those that nothing has are left out."""
    found = [
        StatusCount(status, label, _MARKS[status], sum(result.status == status for result in results))
        for status, label in _LABELS.items()
    ]
    return [item for item in found if item.count]
