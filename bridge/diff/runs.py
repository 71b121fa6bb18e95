"""Two runs of the same models, with another TensorRT, driver or commit: what has become worse, and beyond which limit.

A run is what ``bridge convert -o DIR`` wrote: its ``summary.json``, or the ``result.json`` of each model.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..batch import SUMMARY
from ..errors import UsageError
from ..result import Comparison, ConversionResult, Status
from ..workspace import RESULT

SCHEMA = 1

Check = Literal["status", "accuracy", "latency", "size"]
CHECKS: tuple[Check, ...] = get_args(Check)

_RANK: Mapping[Status, int] = {"failed": 0, "rewritten": 1, "built": 2, "verified": 3}
LISTED = 50
"""Outputs with a larger error that are listed of one model."""


@dataclass(frozen=True)
class Limits:
    """What counts as a regression. None leaves a check out."""

    status: Literal["drop", "failed"] | None = "drop"
    """``drop``: a lower status (verified, built, rewritten, failed), or no result any more; ``failed``: these two only
    where the model failed or is gone."""
    accuracy: float | None = 2.0
    """How many times as large an output's error may be. An output that no longer agrees is a regression with any."""
    latency: float | None = 1.1
    """How many times as long a call may take."""
    size: float | None = 1.1
    """How many times as large an engine may be."""
    noise: float = 0.01
    """Errors below this share of the tolerance are not compared: what is left of rounding changes with every kernel."""
    latency_noise: float = 0.02
    """Milliseconds that a call may take longer whatever the factor."""

    def __post_init__(self) -> None:
        if self.status not in ("drop", "failed", None):
            raise UsageError(f"status: {self.status!r} is not one of 'drop', 'failed' and None.")
        for name in ("accuracy", "latency", "size"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 1):
                raise UsageError(f"{name}: {value!r} is no factor from 1 on.")
        for name in ("noise", "latency_noise"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UsageError(f"{name}: {getattr(self, name)!r} is not 0 or more.")


@dataclass(frozen=True)
class Change:
    """One thing about one model, in both runs."""

    check: Check
    before: str | float | None
    """A status, the largest absolute error of ``where``, milliseconds or bytes; None where it is not known."""
    after: str | float | None
    factor: float | None = None
    """``after / before``; None where there is none, such as of an error that was 0."""
    regression: bool = False
    improved: bool = False
    where: str = ""
    """Of accuracy, the output, inputs and stages."""
    note: str = ""
    """Why it was not compared, or what else is to know."""


@dataclass(frozen=True)
class ModelChange:
    """One model in both runs."""

    name: str
    status: Change
    accuracy: Change
    latency: Change
    size: Change
    outputs: list[Change] = field(default_factory=list)
    """All whose error became larger than the limit allows, worst first; at most 50."""
    error: str = ""
    """Of the second run, where it failed."""
    notes: list[str] = field(default_factory=list)

    @property
    def changes(self) -> list[Change]:
        return [self.status, self.accuracy, self.latency, self.size]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]


@dataclass(frozen=True)
class Run:
    """One run."""

    path: str
    results: list[ConversionResult]
    started: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    single: bool = False
    """Whether it is one model's conversion."""
    folders: list[str] = field(default_factory=list)
    """Names of the results' own folders, which tell models of one name apart; empty where they are not known."""


@dataclass(frozen=True)
class RunFacts:
    """What a report says of a run as a whole."""

    path: str
    models: int
    started: str
    versions: dict[str, str]


@dataclass(frozen=True)
class RunsReport:
    """What has changed from one run to the other."""

    before: RunFacts
    after: RunFacts
    limits: Limits
    models: list[ModelChange]
    """Those with a regression first, then those that changed."""
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def regressed(self) -> list[ModelChange]:
        return [model for model in self.models if model.regressions]

    @property
    def ok(self) -> bool:
        return not self.regressed

    @property
    def exit_status(self) -> int:
        return 0 if self.ok else 1

    @property
    def verdict(self) -> str:
        """One sentence."""
        count = len(self.models)
        if self.ok:
            better = sum(any(change.improved for change in model.changes) for model in self.models)
            also = f"; {better} of them better in something" if better else ""
            return f"No regression in {count} model{'s' * (count != 1)}{also}."
        kinds = [check for check in CHECKS if any(getattr(model, check).regression for model in self.regressed)]
        worst = self.regressed[0]
        words = " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
        return (
            f"{len(self.regressed)} of {count} model{'s' * (count != 1)} regressed in {words}; first "
            f"{worst.name}: {describe(worst.regressions[0])}."
        )

    def to_dict(self) -> dict[str, Any]:
        return {"schema": self.schema, "verdict": self.verdict, "ok": self.ok, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def compare_runs(a: str | Path | Run, b: str | Path | Run, limits: Limits | None = None) -> RunsReport:
    """What became of the models of run ``a`` in run ``b``. Raises UsageError where one of them cannot be read."""
    limits = limits or Limits()
    before, after = (run if isinstance(run, Run) else read_run(Path(run)) for run in (a, b))
    shared = _shared(before) | _shared(after)
    first, second = _by_name(before, shared), _by_name(after, shared)
    notes = []
    if before.single and after.single and first.keys() != second.keys():
        notes.append(f"{before.results[0].name} is compared with {after.results[0].name}")
        second = {before.results[0].name: after.results[0]}
    elif not first.keys() & second.keys():
        raise UsageError(f"{before.path} and {after.path} have no model in common: are these two runs of the same?")
    names = [*first, *(name for name in second if name not in first)]
    models = [_compare(name, first.get(name), second.get(name), limits) for name in names]
    notes += _renamed(
        {name: result.source for name, result in first.items() if name not in second},
        {name: result.source for name, result in second.items() if name not in first},
    )
    return RunsReport(_facts(before), _facts(after), limits, sorted(models, key=_order), notes)


def _shared(run: Run) -> set[str]:
    """Names that several models have, as those of one model in several precisions do."""
    return {name for name, count in Counter(result.name for result in run.results).items() if count > 1}


def _by_name(run: Run, shared: Set[str]) -> dict[str, ConversionResult]:
    """The models, those of a ``shared`` name by their folders. Raises UsageError where nothing tells two apart."""
    found: dict[str, ConversionResult] = {}
    for result, folder in zip(run.results, run.folders or [""] * len(run.results), strict=True):
        name = f"{folder}/{result.name}" if folder and result.name in shared else result.name
        if name in found:
            raise UsageError(
                f"{run.path}: has several models called {name!r}, and nothing tells them apart; give each its own name."
            )
        found[name] = result
    return found


def _renamed(gone: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Of models that have no namesake, those of one source: names are what is compared, and are not guessed."""
    old, now = ([source for source in sources.values() if source] for sources in (gone, new))
    return [
        f"{a} is only in the first run and {b} only in the second, and both are of {source}: if it was "
        "renamed, give it one name in both"
        for a, source in gone.items()
        for b in new
        if new[b] == source and old.count(source) == now.count(source) == 1
    ]


def _facts(run: Run) -> RunFacts:
    return RunFacts(run.path, len(run.results), run.started, run.versions)


def _order(model: ModelChange) -> tuple[Any, ...]:
    worst = [CHECKS.index(change.check) for change in model.regressions]
    changed = model.status.before != model.status.after or any(change.improved for change in model.changes)
    factor = max((change.factor or math.inf for change in model.regressions), default=0.0)
    return (not worst, min(worst, default=len(CHECKS)), not changed, -factor, model.name)


# --- reading -----------------------------------------------------------------------------------------------------


def is_run(path: Path) -> bool:
    """Whether ``read_run`` would find one there."""
    return any((path / name).is_file() for name in (SUMMARY, RESULT)) or any(path.glob(f"*/{RESULT}"))


def read_run(path: Path) -> Run:
    """A run's folder, or one of its JSON files. Raises UsageError where there is none, or it cannot be read."""
    if path.is_dir():
        for name in (SUMMARY, RESULT):
            if (path / name).is_file():
                return _read_file(path / name, str(path))
        files = sorted(path.glob(f"*/{RESULT}"))
        if not files:
            raise UsageError(f"{path}: holds no {SUMMARY}, no {RESULT} and no folder with one; it is no run.")
        found = [(result, file.parent.name) for file in files for result in _read_file(file, str(file)).results]
        return Run(str(path), [result for result, _ in found], folders=[folder for _, folder in found])
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder.")
    return _read_file(path, str(path))


def _read_file(file: Path, path: str) -> Run:
    from pydantic import TypeAdapter, ValidationError

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(f"{file}: is no JSON, or was cut short: {error}.") from error
    summary = isinstance(values, dict) and isinstance(values.get("models"), list)
    if not summary and not (isinstance(values, dict) and "status" in values):
        raise UsageError(f"{file}: is neither a {SUMMARY} nor a {RESULT}.")
    try:
        results = [
            ConversionResult.from_dict(item, file.parent) for item in (values["models"] if summary else [values])
        ]
        versions = TypeAdapter(dict[str, str]).validate_python(values.get("versions", {}))
    except (ValidationError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: is not what a conversion writes: {' '.join(str(error).split())[:300]}") from error
    if not summary:
        return Run(path, results, single=True, folders=[file.absolute().parent.name])
    return Run(path, results, str(values.get("started", "")), versions)


# --- comparing ---------------------------------------------------------------------------------------------------


def _compare(name: str, a: ConversionResult | None, b: ConversionResult | None, limits: Limits) -> ModelChange:
    error = b.error or "" if b is not None and b.status == "failed" else ""
    status = _status(a, b, limits, " ".join(error.splitlines()[:1])[:300])
    if a is None or b is None:
        accuracy, latency, size = (Change(check, None, None, note=status.note) for check in CHECKS[1:])
        return ModelChange(name, status, accuracy, latency, size, error=error)
    accuracy, outputs, notes = _accuracy(a, b, limits)
    before, after = (result.engine_bytes or _size_of(result.engine) for result in (a, b))
    size = _figure("size", before, after, limits.size, 0, "no engine")
    for what, old, new in (
        ("target", _target(a), _target(b)),
        ("precision", a.precision, b.precision),
        ("exporter", a.exporter, b.exporter),
        ("GPU", a.gpu, b.gpu),
    ):
        if old != new and old and new:
            notes.append(f"{what}: {old} → {new}")
    return ModelChange(name, status, accuracy, _latency(a, b, limits), size, outputs, error, notes)


def _target(result: ConversionResult) -> str:
    return f"{result.target.flavour} {result.target.version}" if result.target is not None else ""


def _size_of(engine: Path | None) -> int | None:
    return engine.stat().st_size if engine is not None and engine.is_file() else None


def _status(a: ConversionResult | None, b: ConversionResult | None, limits: Limits, why: str) -> Change:
    """``why``: what the second one failed for, if it did."""
    if a is None:
        note = "only in the second run" + (f": {why}" if why else "")
        return Change("status", None, b.status if b is not None else None, note=note)
    if b is None:
        return Change("status", a.status, None, regression=limits.status is not None, note="only in the first run")
    worse = _RANK[b.status] < _RANK[a.status]
    judged = limits.status == "drop" or (limits.status == "failed" and b.status == "failed")
    better = _RANK[b.status] > _RANK[a.status]
    return Change("status", a.status, b.status, None, worse and judged, better, note=why if worse else "")


def _latency(a: ConversionResult, b: ConversionResult, limits: Limits) -> Change:
    before, after = (result.latency.gpu if result.latency is not None else None for result in (a, b))
    unknown = "not measured (latency: true, --latency)"
    return _figure("latency", before, after, limits.latency, limits.latency_noise, unknown)


def _figure(
    check: Check, before: float | None, after: float | None, limit: float | None, noise: float, unknown: str
) -> Change:
    """A figure of which less is better."""
    if before is None or after is None:
        missing = [name for name, value in (("first", before), ("second", after)) if value is None]
        where = "either run" if len(missing) == 2 else f"the {missing[0]} run"
        return Change(check, before, after, note=f"{unknown} in {where}")
    factor = after / before if before else None
    worse = limit is not None and after > before * limit and after - before > noise
    better = limit is not None and after * limit < before and before - after > noise
    return Change(check, before, after, factor, worse, better)


Key = tuple[str, str, str, str]


def _accuracy(a: ConversionResult, b: ConversionResult, limits: Limits) -> tuple[Change, list[Change], list[str]]:
    """The change of the worst output, all that are regressions, and notes."""
    first, second = ({_key(item): item for item in result.comparisons} for result in (a, b))
    common = [key for key in first if key in second]
    notes = []
    gone = [key for key in first if key not in second] if a.status == b.status else []
    if gone:
        notes.append(f"no longer compared: {_place(gone[0])}{f' and {len(gone) - 1} more' * (len(gone) > 1)}")
    pairs = [(_error(key, first[key], second[key], limits), second[key]) for key in common]
    changes = [change for change, _ in sorted(pairs, key=lambda pair: _severity(*pair), reverse=True)]
    changes = [*_lost(a, b, limits), *changes]
    if not changes:
        return Change("accuracy", None, None, note="nothing was compared in both runs"), [], notes
    return changes[0], [change for change in changes if change.regression][:LISTED], notes


def _lost(a: ConversionResult, b: ConversionResult, limits: Limits) -> Iterator[Change]:
    """Outputs that the second run says nothing of, which may hide anything; where it failed, its status says so."""
    if b.status == "failed" or limits.accuracy is None:
        return
    there = {item.output for item in b.comparisons}
    for output in dict.fromkeys(item.output for item in a.comparisons if item.output not in there):
        errors = [item.max_abs_error for item in a.comparisons if item.output == output]
        worst = max((error for error in errors if error is not None), default=None)
        yield Change("accuracy", worst, None, regression=True, where=output, note="is no longer compared")


def _key(item: Comparison) -> Key:
    return item.output, item.inputs, item.reference, item.candidate


def _place(key: Key) -> str:
    output, inputs, reference, candidate = key
    return f"{output} at {inputs}, {reference} → {candidate}"


def _error(key: Key, a: Comparison, b: Comparison, limits: Limits) -> Change:
    before, after = a.max_abs_error, b.max_abs_error
    factor = after / before if before and after is not None else None
    lost, won = a.agreed and not b.agreed, b.agreed and not a.agreed
    note = "no longer agrees" + (f": {b.note}" if b.note else "") if lost else "agrees now" if won else ""
    worse = lost or _grew(a, b, limits)
    better = won or _grew(b, a, limits)
    on = limits.accuracy is not None
    return Change(
        "accuracy", before, after, _finite(factor), on and worse, on and better and not worse, _place(key), note
    )


def _grew(a: Comparison, b: Comparison, limits: Limits) -> bool:
    """Whether the error of ``b`` is beyond what the limit makes of that of ``a``, and more than noise."""
    if limits.accuracy is None or a.max_abs_error is None or b.max_abs_error is None:
        return False
    above = b.tolerance_used is None or b.tolerance_used > limits.noise
    return above and b.max_abs_error > limits.accuracy * a.max_abs_error


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _severity(change: Change, now: Comparison) -> tuple[Any, ...]:
    lost = change.note.startswith("no longer")
    factor = (math.inf if change.factor is None else change.factor) if change.regression else 0.0
    return change.regression, lost, factor, change.improved, now.tolerance_used or 0.0, now.max_abs_error or 0.0


def describe(change: Change) -> str:
    """In a few words: ``latency 1.2 ms → 3 ms (2.5 times)``."""
    words = f"{change.check} {figure(change.check, change.before)} → {figure(change.check, change.after)}"
    extra = [f"{change.factor:.3g} times"] if change.factor is not None and change.factor != 1 else []
    extra += [part for part in (change.where, change.note) if part]
    return words + (f" ({'; '.join(extra)})" if extra else "")


def figure(check: Check, value: str | float | None) -> str:
    """A value as people read it."""
    if value is None:
        return "absent" if check == "status" else "–"
    if isinstance(value, str):
        return value
    if check == "latency":
        return f"{value:.3g} ms"
    if check == "size":
        from ..cache import size_words

        return size_words(value)
    return f"{value:.2e}" if value else "0"
