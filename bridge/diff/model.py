"""What a diff found, as plain facts: every report is made of a ``DiffReport``, and ``diff.json`` is one.

``docs/diff.md`` says what each figure means. Readers of the JSON check ``schema``; it grows when a name changes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import UsageError
from ..result import Histogram, TargetInfo, Tolerance
from ..workspace import write_text

SCHEMA = 1

StageName = Literal["torch", "exported", "rewritten", "typed", "engine"]
STAGES: tuple[StageName, ...] = ("torch", "exported", "rewritten", "typed", "engine")
"""In their order. ``typed`` has the precision in the graph; a model in float32 has no such stage."""

NOT_BUILT = "no engine was built"
"""How the note of an engine's rows begins where there is none to run."""


@dataclass(frozen=True)
class Error:
    """How far one tensor is from its reference, over all elements that are finite on both sides.

    ``None`` stands for a figure that does not exist: no relative error to zeros, no error between different shapes.
    """

    relative: float | None
    """The norm of the error, as a share of the norm of the reference."""
    max_abs: float | None
    mean_abs: float | None = None
    max_rel: float | None = None
    """Over the elements whose reference is not 0."""
    cosine: float | None = None
    psnr: float | None = None
    """In dB; None beside ``max_abs == 0`` is infinite."""
    non_finite: int = 0
    """Elements that are infinite or NaN, and something else in the reference."""
    tolerance_used: float | None = None
    """1 is all that the tolerance allows."""
    agreed: bool | None = None
    """Whether it is within the tolerance; None where none is held to it."""
    frontier: list[tuple[float, float]] | None = None
    """Of outputs, points ``(|reference|, error)`` by which any other tolerance can be judged exactly; None where no
    figures exist. Values of integers and booleans are in it like others."""


@dataclass(frozen=True)
class StageError:
    """One output at one stage, over all samples."""

    stage: StageName
    output: str
    inputs: str
    """What it was measured on: ``3 samples``."""
    before: StageName | None = None
    """The stage before it, which ``added`` is measured against; None for the first."""
    carried: Error | None = None
    """Against the first stage: torch or, of an ONNX file, the exported model. None for that stage itself, and where
    the stage was not run."""
    added: Error | None = None
    """Against the stage before."""
    tolerance: Tolerance | None = None
    """What ``added`` was held to."""
    integers: bool = False
    """Whether the output is of integers or booleans, which no tolerance for all outputs is for."""
    note: str = ""
    """Why there are no figures: ``no GPU here can run the engine``."""
    failed: bool = False
    """Whether the stage could have run, and does not."""


@dataclass(frozen=True)
class LayerDiff:
    """One tensor that a layer makes, between two stages."""

    reference: StageName
    candidate: StageName
    tensor: str
    """Its name in the ONNX models."""
    node: str
    """The node that makes it, of the reference; between torch and an ONNX model, of that."""
    operator: str
    """Of that node: ``Conv``. Between torch and the exported model, the class of the module."""
    module: str = ""
    """Path of the torch module; empty where it is not known."""
    source: str = ""
    """File and line of the user's code."""
    precision: str = "float32"
    """What the candidate computes it in."""
    shape: list[int] = field(default_factory=list)
    """On the example."""
    largest: float | None = None
    """The reference's largest finite absolute value."""
    introduced: Error | None = None
    """The output's error where the layer is given the reference's inputs: what the layer does by itself. None where it
    cannot be run by itself; ``note`` says why."""
    carried: Error | None = None
    """Its error in a run from end to end: what came before is in it."""
    diverges: bool = False
    """Whether what it introduces is beyond the limit of its precision (``docs/diff.md``)."""
    note: str = ""

    @property
    def badness(self) -> tuple[int, float]:
        """The order of blame: what is no longer finite comes first, then the largest relative error introduced."""
        found = self.introduced
        return (found.non_finite, found.relative or 0.0) if found is not None else (0, 0.0)

    @property
    def where(self) -> str:
        """The module and line, as far as they are known."""
        return ", ".join(filter(None, (self.module, self.source)))

    @property
    def before(self) -> str:
        """Operators that torch shows no tensor of, ``with Resize before it (net.py:3)``; empty where there are none."""
        words = self.note.partition(";")[0]
        return words if words.startswith("with ") and " before it" in words else ""

    def __str__(self) -> str:
        return f"{self.operator} {self.node or self.tensor}" + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True)
class ShapeError:
    """One output at one stage, at one set of input shapes."""

    case: str
    """``example``, ``min``, ``opt``, ``max`` or ``sampled 1``, …"""
    shapes: dict[str, list[int]]
    """Of the inputs."""
    stage: StageName
    output: str
    carried: Error | None = None
    added: Error | None = None
    note: str = ""
    failed: bool = False
    """Whether the stage could have run, and does not."""


@dataclass(frozen=True)
class SampleError:
    """How far a stage's outputs are from the first stage's, on one sample."""

    sample: str
    stage: StageName
    relative: float | None
    max_abs: float | None
    agreed: bool


@dataclass(frozen=True)
class Percentiles:
    """Of one figure over the samples, at one stage."""

    stage: StageName
    figure: Literal["relative", "max_abs"]
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Samples:
    """The diff by data."""

    count: int
    percentiles: list[Percentiles] = field(default_factory=list)
    errors: list[SampleError] = field(default_factory=list)
    """At most 1,000 of the samples, the worst ones, worst first."""
    worst: str = ""
    """Name of the worst sample."""
    worst_file: str = ""
    """An .npz file with its inputs, relative to the report's folder; ``samples=`` of its folder reproduces it."""


@dataclass(frozen=True)
class Metric:
    """What the user's function made of a stage's outputs, over all samples."""

    name: str
    stage: StageName
    value: float | None
    note: str = ""
    """Why there is none."""
    failed: bool = False
    """Whether the stage ran, and the function came to no number."""


@dataclass(frozen=True)
class Heat:
    """The mean absolute error over an image-like output (its last two axes), in at most 64 x 64 cells."""

    height: int
    width: int
    cells: list[list[float]]


@dataclass(frozen=True)
class OutputData:
    """What plots of one output need, on the worst sample: bounded in size, however large the output."""

    output: str
    reference: StageName
    candidate: StageName
    sample: str
    expected: list[float] = field(default_factory=list)
    """Up to 2,000 values spread evenly over the tensor, the worst among them; only finite ones."""
    actual: list[float] = field(default_factory=list)
    """At the same places."""
    histogram: Histogram | None = None
    heat: Heat | None = None


@dataclass(frozen=True)
class DiffReport:
    """All that a diff found."""

    name: str
    verdict: str
    """One sentence."""
    ok: bool
    """Whether every output that was compared agrees, no stage failed to run, and no engine to be built."""
    target: TargetInfo | None = None
    precision: str = "fp32"
    stages: list[StageError] = field(default_factory=list)
    layers: list[LayerDiff] = field(default_factory=list)
    """Pair of stages after pair of stages, each in the graph's order."""
    first_diverging: int | None = None
    """Index in ``layers`` of the first that diverges; None where none does."""
    ranking: list[int] = field(default_factory=list)
    """Indices in ``layers`` of those that introduce most error, worst first; at most 100."""
    shapes: list[ShapeError] = field(default_factory=list)
    samples: Samples | None = None
    metrics: list[Metric] = field(default_factory=list)
    outputs: list[OutputData] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each part of the measurement."""
    schema: int = SCHEMA

    FILE: ClassVar[str] = "diff.json"

    @property
    def exit_status(self) -> int:
        """0 where it is ``ok``, and all metrics were measured that were asked for."""
        return 0 if self.ok and not any(metric.failed for metric in self.metrics) else 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def write(self, folder: Path) -> Path:
        """Writes ``diff.json``; returns its path."""
        write_text(folder / self.FILE, self.to_json())
        return folder / self.FILE

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffReport:
        """What ``to_dict`` gave. Raises UsageError for another schema, or what is no report."""
        from pydantic import TypeAdapter, ValidationError

        if values.get("schema") != SCHEMA:
            raise UsageError(f"a diff of schema {values.get('schema')!r}; this version reads schema {SCHEMA}.")
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            raise UsageError(f"not a diff's JSON: {str(error).splitlines()[0]}: {error.errors()[0]['loc']}") from error

    @classmethod
    def load(cls, path: Path) -> DiffReport:
        """Reads a ``diff.json``. Raises UsageError where it is not one."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UsageError(f"{path}: cannot be read as a diff: {error}") from error
        if not isinstance(values, dict):
            raise UsageError(f"{path}: holds no diff; bridge diff writes {cls.FILE}.")
        return cls.from_dict(values)
