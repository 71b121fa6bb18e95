"""Several precisions of one model, side by side: ``convert(precision=["fp32", "fp16", "int8+fp16"])``."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, overload

from .errors import Stage
from .precision import Precision, check_precision, labels
from .result import ConversionResult, Latency, SourceError, Status
from .spec import by_precision
from .target import Target, resolve
from .workspace import TRADE_OFF, write_text

if TYPE_CHECKING:
    from .spec import ModelSpec

P = ParamSpec("P")


@dataclass(frozen=True)
class Row:
    """What one precision costs, and what it gives."""

    precision: str
    status: Status
    stage: Stage | None
    """Where it failed, if it did."""
    engine_bytes: int | None
    source_error: SourceError | None
    """Against the source; None where nothing of that precision ran."""
    latency: Latency | None
    """None where no GPU here runs the engine."""
    precisions: dict[str, float]
    """The share of the engine's compute by precision."""
    error: str | None = None

    @classmethod
    def of(cls, precision: str, result: ConversionResult) -> Row:
        size = result.engine.stat().st_size if result.engine is not None else None
        found = (result.source_error, result.latency, dict(result.precisions), result.error)
        return cls(precision, result.status, result.stage, size, *found)


@dataclass(frozen=True)
class TradeOff:
    """Error, size and speed of a model in each precision that was asked for, in the order of asking."""

    name: str
    rows: list[Row]
    results: dict[str, ConversionResult] = field(default_factory=dict, repr=False)
    """Of each row; not in the JSON."""

    @classmethod
    def of(cls, name: str, results: Mapping[str, ConversionResult]) -> TradeOff:
        return cls(name, [Row.of(precision, result) for precision, result in results.items()], dict(results))

    @property
    def ok(self) -> bool:
        """Whether none failed."""
        return all(row.status != "failed" for row in self.rows)

    def __getitem__(self, precision: str) -> ConversionResult:
        return self.results[precision]

    def table(self) -> str:
        """For people: a line for each precision, and under them why those failed that did."""
        lines = [("precision", "status", "engine", "error", "latency", "computes in")]
        lines += [(row.precision, _status(row), *figures(row)) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        text = ["  ".join(line).rstrip() for line in cells]
        text += [f"{row.precision}: {row.error}" for row in self.rows if row.error]
        return "\n".join(text)

    def to_json(self) -> str:
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"name": self.name, "rows": rows}, indent=2, allow_nan=False) + "\n"


def _status(row: Row) -> str:
    return f"failed ({row.stage})" if row.stage else row.status


def figures(row: Row) -> tuple[str, str, str, str]:
    """The engine's size, its error, its latency and what it computes in, as text."""
    error, size = "not known", "–"
    if row.engine_bytes is not None:
        least, unit = next(unit for unit in ((1e9, "GB"), (1e6, "MB"), (0.0, "kB")) if row.engine_bytes >= unit[0])
        size = f"{row.engine_bytes / (least or 1e3):.1f} {unit}"
    if row.source_error is not None:
        lost, relative = row.source_error.non_finite, row.source_error.relative
        error = f"{lost} values not finite" if lost else "–" if relative is None else f"{relative:.1e}"
    latency = f"{row.latency.host:.3g} ms" if row.latency is not None else "not run"
    return size, error, latency, shares_text(row.precisions)


def shares_text(shares: Mapping[str, float]) -> str:
    """Such as ``fp16 99%, fp32 1%``, the largest first."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" if share >= 0.005 else f"{name} <1%" for name, share in ordered) or "–"


def trade_offs(specs: Iterable[ModelSpec], results: Iterable[ConversionResult]) -> list[TradeOff]:
    """Of the models of a run that ask for several precisions, as far as they have results."""
    by_name = {result.name: result for result in results}
    found = []
    for spec in specs:
        names = {label: one.name for label, one in by_precision(spec).items()}
        if names:
            there = {label: by_name[name] for label, name in names.items() if name in by_name}
            found.append(TradeOff.of(spec.name, there))
    return found


class Convert(Protocol[P]):
    """``convert``, for one precision and for a list of them."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> ConversionResult: ...

    @overload
    def __call__(
        self, source: Any, inputs: Any = None, *, precision: list[Any] | tuple[Any, ...], **options: Any
    ) -> TradeOff: ...


def one_or_several(convert: Callable[P, ConversionResult]) -> Convert[P]:
    """Lets ``convert`` take a list of precisions: each is converted in a folder of its own, called after it."""

    @functools.wraps(convert)
    def either(source: Any, inputs: Any = None, **options: Any) -> ConversionResult | TradeOff:
        given = options.get("precision")
        if not isinstance(given, (list, tuple)):
            return convert(source, inputs, **options)
        return _each(convert, source, inputs, labels(given), options)

    return either  # type: ignore[return-value]


def _each(
    convert: Callable[..., ConversionResult],
    source: Any,
    inputs: Any,
    precisions: Mapping[str, Precision],
    options: dict[str, Any],
) -> TradeOff:
    """Raises UsageError before anything is started where the target cannot compute in one of them."""
    from .settings import read_capabilities  # which loads onnx, that a batch does not need

    check, calibration = options.pop("check", False), options.pop("calibration", None)
    target = options.get("target", "auto")
    options["target"] = target if isinstance(target, Target) else resolve(target)
    for precision in precisions.values():
        check_precision(precision, options["target"], read_capabilities(options.get("compute_capabilities")))
    if isinstance(calibration, Iterator):
        calibration = list(calibration)  # it is read for each
    given = options.pop("workdir", None)
    folder = Path(given) if given is not None else Path(tempfile.mkdtemp(prefix="bridge-"))
    results: dict[str, ConversionResult] = {}
    for label, precision in precisions.items():
        own = {**options, "workdir": folder / label, "precision": precision, "latency": True}
        if not precision.plain:
            own |= {"calibration": calibration, "tolerance": None}  # which was for the model's own precision
        results[label] = convert(source, inputs, **own)
    made = TradeOff.of(next(iter(results.values())).name, results)
    write_text(folder / TRADE_OFF, made.to_json())
    failed = [result.exception for result in results.values() if result.exception is not None]
    if check and failed:
        raise failed[0]
    return made
