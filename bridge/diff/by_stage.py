"""The diff by stage, by sample and by shape: outputs of whole models, each stage against the first and the last one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..compare import Array, Feeds, Tolerances
from ..errors import CompareError, ExportError, RunError
from ..inputs import make_cases, resized
from .conversion import Conversion, Outputs
from .data import MetricFunction, badness, measured
from .figures import Tally
from .model import Error, Metric, SampleError, ShapeError, StageError, StageName

CHUNK = 1 << 28
"""Bytes of inputs and outputs that are held at a time, for each stage."""
LOWERED = ("typed", "engine")
SAMPLED = 3
"""Shapes between min and max that are tried."""


@dataclass
class Stages:
    """The stages of one conversion, and how far they were seen to be apart."""

    conversion: Conversion
    names: list[StageName]
    tolerance: Tolerances
    why: dict[StageName, str] = field(default_factory=dict)
    """Of stages that are not run, the reason."""
    failed: set[StageName] = field(default_factory=set)
    """Of these, the ones that could have run, and do not; and an engine that was to be built, and was not."""

    def __post_init__(self) -> None:
        if "engine" in self.names and self.conversion.why_no_engine:
            self.why["engine"] = self.conversion.why_no_engine
            if self.conversion.result.error:
                self.failed.add("engine")

    @property
    def running(self) -> list[StageName]:
        return [name for name in self.names if name not in self.why]

    def precision(self, stage: StageName) -> str:
        """What the stage may have been computed in."""
        result = self.conversion.result
        return result.computed_in if stage in LOWERED else result.own_precision

    def run(self, feeds: Sequence[Feeds]) -> dict[StageName, Outputs]:
        """What each stage computes. Raises RunError or ExportError where the first of them does not run; others that do
        not are left out from there on."""
        found: dict[StageName, Outputs] = {}
        for stage in self.running:
            try:
                found[stage] = self.conversion.run(stage, feeds)
            except (RunError, ExportError, CompareError) as error:
                if not found:
                    raise
                self.why[stage] = str(error)
                self.failed.add(stage)
        return found

    def tallies(self, stage: StageName, before: StageName, outputs: Iterable[str]) -> dict[str, Tally]:
        precision = self.precision(stage)
        return {name: Tally((before, stage), name, self.tolerance, precision) for name in outputs}


@dataclass
class OverSamples:
    """What was found over all samples."""

    stages: Stages
    metric: tuple[str, MetricFunction] | None = None
    count: int = 0
    worst: tuple[str, Feeds] | None = None
    """Name and inputs of the sample that the last stage is worst on; the first one where no two stages run."""
    errors: list[SampleError] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    carried: dict[tuple[StageName, str], Tally] = field(default_factory=dict)
    added: dict[tuple[StageName, str], Tally] = field(default_factory=dict)
    before: dict[StageName, StageName] = field(default_factory=dict)

    def measure(self, samples: Iterator[tuple[str, Feeds]]) -> None:
        """Runs every stage on all samples. Raises what ``Stages.run`` does, and UsageError where one does not fit."""
        kept: dict[StageName, Outputs] = {}
        inputs: list[Feeds] = []
        self._worst: tuple[bool, float] | None = None
        for names, feeds in _chunks(samples):
            self.worst = self.worst or (names[0], feeds[0])
            found = self.stages.run(feeds)
            self._compare(names, feeds, found)
            self.count += len(names)
            if self.metric is not None:
                inputs += feeds
                for stage, outputs in found.items():
                    kept.setdefault(stage, []).extend(outputs)
        if self.metric is not None:
            for stage in self.stages.running:
                self.metrics += measured(self.metric, stage, kept[stage], inputs)
            names = list(dict.fromkeys(metric.name for metric in self.metrics))
            self.metrics += [Metric(name, stage, None, why) for stage, why in self.stages.why.items() for name in names]

    def _compare(self, names: list[str], feeds: list[Feeds], found: dict[StageName, Outputs]) -> None:
        order = list(found)
        first = order[0]
        self.outputs = self.outputs or list(found[first][0])
        for before, stage in itertools.pairwise(order):
            self.before[stage] = before
            for output in self.outputs:
                if (stage, output) not in self.carried:
                    self.carried.update(self._keyed(stage, first, output))
                    self.added.update(self._keyed(stage, before, output))
        for index, name in enumerate(names):
            for before, stage in itertools.pairwise(order):
                errors = []
                for output in self.outputs:
                    made = found[stage][index][output]
                    self.added[stage, output].add(found[before][index][output], made, name)
                    errors.append(self.carried[stage, output].add(found[first][index][output], made, name))
                self._remember(name, feeds[index], stage, errors, stage == order[-1])

    def _keyed(self, stage: StageName, before: StageName, output: str) -> dict[tuple[StageName, str], Tally]:
        tallies = self.stages.tallies(stage, before, [output])
        return {(stage, output): tallies[output]}

    def _remember(self, name: str, feeds: Feeds, stage: StageName, errors: list[Error], last: bool) -> None:
        """One row for all outputs of a sample: its worst figures."""
        relative = [error.relative for error in errors if error.relative is not None]
        largest = [error.max_abs for error in errors if error.max_abs is not None]
        row = SampleError(
            name,
            stage,
            max(relative, default=None),
            max(largest, default=None),
            all(error.agreed is not False for error in errors),
        )
        self.errors.append(row)
        if last and (self._worst is None or badness(row) > self._worst):
            self._worst, self.worst = badness(row), (name, feeds)

    @property
    def idle(self) -> list[str]:
        """Outputs of which nothing was finite in any sample, so that nothing was compared."""
        return [
            name
            for name in self.outputs
            if (own := [tally for (_, output), tally in self.carried.items() if output == name])
            and all(tally.idle for tally in own)
        ]

    def rows(self) -> list[StageError]:
        """The table from the first stage to the last, output by output."""
        what = f"{self.count} sample{'s' * (self.count != 1)}"
        rows: list[StageError] = []
        for stage in self.stages.names:
            note = self.stages.why.get(stage, "")
            for output in self.outputs:
                carried, added = self.carried.get((stage, output)), self.added.get((stage, output))
                if note or carried is None or added is None:
                    rows.append(StageError(stage, output, what, note=note, failed=stage in self.stages.failed))
                    continue
                figures = carried.error(), added.error()
                rows.append(
                    StageError(stage, output, what, self.before[stage], *figures, added.tolerance, added.integers)
                )
        return rows


def _chunks(samples: Iterator[tuple[str, Feeds]]) -> Iterator[tuple[list[str], list[Feeds]]]:
    """So many samples at a time that their inputs take no more memory than they may, and 64 at most."""
    names: list[str] = []
    feeds: list[Feeds] = []
    total = 0
    for name, item in samples:
        size = sum(array.nbytes for array in item.values())
        if names and (total + size > CHUNK or len(names) == 64):
            yield names, feeds
            names, feeds, total = [], [], 0
        names.append(name)
        feeds.append(item)
        total += size
    if names:
        yield names, feeds


# --- by shape -----------------------------------------------------------------------------------------------------


def shape_cases(conversion: Conversion, seed: int) -> list[tuple[str, Feeds]]:
    """The example's values at the min, opt, max and some other shapes of each profile; nothing where none is dynamic.

    Of one sampled shape all axes are the same way between their min and max: axes that belong together, as the batch of
    two inputs, stay so.
    """
    cases: list[tuple[str, Feeds]] = [
        (case.name, case.feeds) for case in make_cases(conversion.example, conversion.profiles)
    ]
    random = np.random.default_rng(seed)
    for number, profiles in enumerate(conversion.profiles):
        if not any(one.dynamic_axes for one in profiles.values()):
            continue
        prefix = f"profile {number} " if len(conversion.profiles) > 1 else ""
        wanted = [(f"{prefix}opt", {name: one.opt for name, one in profiles.items()})]
        for index, share in enumerate(random.uniform(0.1, 0.9, SAMPLED)):
            shapes = {
                name: tuple(
                    low + round(float(share) * (high - low)) for low, high in zip(one.min, one.max, strict=True)
                )
                for name, one in profiles.items()
            }
            wanted.append((f"{prefix}sampled {index + 1}", shapes))
        for name, shapes in wanted:
            feeds: dict[str, Array] = {key: resized(conversion.example[key], shape) for key, shape in shapes.items()}
            if all(any(feeds[key].shape != other[key].shape for key in feeds) for _, other in cases):
                cases.append((name, feeds))
    return cases if len(cases) > 1 else []


def over_shapes(stages: Stages, cases: Sequence[tuple[str, Feeds]]) -> tuple[list[ShapeError], list[str]]:
    """One row for each case, stage and output; notes on shapes that the model itself does not take."""
    rows: list[ShapeError] = []
    notes: list[str] = []
    for case, feeds in cases:
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        own = Stages(stages.conversion, stages.running, stages.tolerance)
        try:
            found = own.run([feeds])
        except (RunError, ExportError) as error:
            notes.append(f"at the {case} shapes ({_shapes(shapes)}) nothing was compared: {error}")
            continue
        order = list(found)
        for stage, why in own.why.items():
            rows.append(ShapeError(case, shapes, stage, "", note=why, failed=stage in own.failed))
        for before, stage in itertools.pairwise(order):
            for output, made in found[stage][0].items():
                if output not in found[order[0]][0]:
                    continue
                carried, added = (
                    own.tallies(stage, other, [output])[output].add(found[other][0][output], made, case)
                    for other in (order[0], before)
                )
                rows.append(ShapeError(case, shapes, stage, output, carried, added))
    return rows, notes


def _shapes(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def depends_on_shape(rows: Sequence[ShapeError]) -> list[str]:
    """Stages that do not run at some shapes, and outputs that agree at some and not at others, in words."""
    found = [
        f"{row.note.splitlines()[0][:200].rstrip('.,:; ')}, at the {row.case} shapes ({_shapes(row.shapes)})"
        for row in rows
        if row.failed
    ]
    for stage, output in dict.fromkeys((row.stage, row.output) for row in rows):
        added = [
            (row, row.added) for row in rows if (row.stage, row.output) == (stage, output) and row.added is not None
        ]
        wrong = [(row, error) for row, error in added if error.agreed is False]
        right = [row for row, error in added if error.agreed]
        if not (wrong and right):
            continue
        worst, error = max(wrong, key=lambda pair: (pair[1].non_finite, pair[1].relative or 0.0))
        at = "; ".join(f"{row.case}: {_shapes(row.shapes)}" for row, _ in wrong)
        figure = f"{error.relative:.3g} of its norm" if error.relative is not None else "not comparable"
        found.append(
            f"the error of {output!r} depends on the shapes: {stage} adds {figure} at the {worst.case} shapes, and "
            f"agrees at {', '.join(row.case for row in right)} (wrong at {at})"
        )
    return found
