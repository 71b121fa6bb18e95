"""The data of a diff: samples, the user's metrics, the worst sample as a file, and what plots of it need."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..calibration import misfit
from ..calibration_sources import Samples as Reader
from ..calibration_sources import check_source
from ..compare import Array, Feeds, compare_arrays, first_lines
from ..errors import UsageError
from ..npz import write_npz
from ..workspace import replacing
from .conversion import Conversion
from .model import Heat, Metric, OutputData, Percentiles, SampleError, StageName

WORST = "worst"
"""Folder of the file that reproduces the worst sample."""
POINTS = 2000
CELLS = 64
KEPT = 1000

MetricFunction = Callable[[list[dict[str, Array]], list[dict[str, Array]]], Any]


def read_samples(conversion: Conversion, given: Any) -> Iterator[tuple[str, Feeds]]:
    """The samples and their names; the example where none are given. Raises UsageError for one that does not fit."""
    if given is None:
        yield "example", conversion.example
        return
    example, allowed = conversion.example, conversion.allowed
    count = 0
    try:
        check_source(given)
        for name, feeds in Reader(given, conversion.read, example, allowed):
            fitted = {key: _as(feeds[key], example[key]) for key in example if key in feeds}
            wrong = misfit(fitted, example, allowed)
            if wrong:
                raise UsageError(f"samples, {name}: {wrong}.")
            count += 1
            yield name, fitted
    except UsageError as error:  # the reader is calibration's, and says so
        raise UsageError(str(error).replace("calibration", "samples", 1)) from error
    if not count:
        raise UsageError("samples: there are none.")


def _as(array: Array, usual: Array) -> Array:
    """Floating-point values in the model's own type: files have no bfloat16."""
    if array.dtype != usual.dtype and array.dtype.kind == "f" and "float" in usual.dtype.name:
        return array.astype(usual.dtype)
    return array


def write_worst(folder: Path, feeds: Feeds) -> str:
    """Writes the sample where ``samples=`` reads it again; returns the file's path, relative to ``folder``."""
    place = folder / WORST / "sample.npz"
    place.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: array.astype(np.float32) if array.dtype.name == "bfloat16" else array for name, array in feeds.items()
    }
    with replacing(place) as temporary:
        write_npz(temporary, arrays)
    return place.relative_to(folder).as_posix()


# --- metrics ------------------------------------------------------------------------------------------------------


def read_metric(given: Any) -> tuple[str, MetricFunction] | None:
    """The user's function and its name, from a function or ``package.module:function``. Raises UsageError."""
    if given is None:
        return None
    if callable(given):
        return getattr(given, "__name__", type(given).__name__), given
    module, colon, name = str(given).partition(":")
    if not (isinstance(given, str) and colon and module and name):
        raise UsageError(f"metric: {given!r} is neither a function nor of the form package.module:function.")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything, and is named as the cause
        raise UsageError(f"metric {given!r}: cannot be imported: {_raised(error)}") from error
    if not callable(found):
        raise UsageError(f"metric {given!r}: is a {type(found).__name__}, and no function.")
    return name, found


def measured(
    metric: tuple[str, MetricFunction], stage: StageName, outputs: list[dict[str, Array]], inputs: list[Feeds]
) -> list[Metric]:
    """What the user's function makes of copies of a stage's outputs and their inputs, which it may change."""
    name, function = metric
    try:
        found = function(_copies(outputs), _copies(inputs))
        values = dict(found) if isinstance(found, Mapping) else {name: found}
        made = [_metric(str(key), stage, value) for key, value in values.items()]
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code may raise anything, and costs itself
        return [Metric(name, stage, None, f"raises {_raised(error)}", failed=True)]
    return made or [Metric(name, stage, None, "returns a dict with nothing in it", failed=True)]


def _copies(samples: Sequence[Feeds]) -> list[dict[str, Array]]:
    return [{name: array.copy() for name, array in sample.items()} for sample in samples]


def _metric(name: str, stage: StageName, given: Any) -> Metric:
    """One number; a note where it is none, or not finite."""
    try:
        value = given.item() if hasattr(given, "item") else given
    except (ValueError, RuntimeError):
        return Metric(name, stage, None, f"is an array of shape {list(given.shape)}, and no number", failed=True)
    if not isinstance(value, Real):
        return Metric(name, stage, None, f"is a {type(value).__name__}, and no number", failed=True)
    try:
        number = float(value)
    except OverflowError:
        return Metric(name, stage, None, "is beyond float64", failed=True)
    return Metric(name, stage, number) if math.isfinite(number) else Metric(name, stage, None, str(number))


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_lines(error)}"


# --- what is kept of many samples ---------------------------------------------------------------------------------


def percentiles(errors: Sequence[SampleError]) -> list[Percentiles]:
    """Over the samples, by stage; figures that do not exist are left out."""
    found: list[Percentiles] = []
    for stage in dict.fromkeys(error.stage for error in errors):
        figures: tuple[Literal["relative"], Literal["max_abs"]] = ("relative", "max_abs")
        for figure in figures:
            values = [getattr(error, figure) for error in errors if error.stage == stage]
            known = [value for value in values if value is not None]
            if known:
                marks = [float(value) for value in np.percentile(known, (50, 90, 99, 100))]
                found.append(Percentiles(stage, figure, *marks))
    return found


def worst_first(errors: Sequence[SampleError]) -> list[SampleError]:
    return sorted(errors, key=badness, reverse=True)[:KEPT]


def badness(error: SampleError) -> tuple[bool, float]:
    return not error.agreed, math.inf if error.relative is None else error.relative


# --- plots --------------------------------------------------------------------------------------------------------


def plotted(
    stages: tuple[StageName, StageName], sample: str, output: str, reference: Array, candidate: Array
) -> OutputData | None:
    """A bounded picture of one output; None where the shapes differ, or there is nothing in it."""
    if reference.shape != candidate.shape or not reference.size:
        return None
    a, b = (array.astype(np.float64) for array in (reference, candidate))
    found = compare_arrays(reference, candidate, stages=stages, inputs=sample, output=output, tolerance=None)
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    finite = np.flatnonzero(np.isfinite(flat_a) & np.isfinite(flat_b))
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(b - a)
    places = (
        finite[np.linspace(0, finite.size - 1, min(finite.size, POINTS)).astype(np.int64)] if finite.size else finite
    )
    if finite.size:
        worst = finite[int(np.argmax(error.reshape(-1)[finite]))]
        places = np.unique(np.append(places[:-1] if places.size == POINTS else places, worst))
    return OutputData(
        output,
        *stages,
        sample,
        [float(value) for value in flat_a[places]],
        [float(value) for value in flat_b[places]],
        found.histogram,
        _heat(error),
    )


def _heat(error: Array) -> Heat | None:
    """The mean error over the last two axes, where the output looks like an image: four axes, or two large ones."""
    if error.ndim < 2 or min(error.shape[-2:]) < 4 or (error.ndim < 3 and min(error.shape) < 16):
        return None
    height, width = error.shape[-2:]
    plane = np.where(np.isfinite(error), error, 0.0).reshape(-1, height, width).mean(axis=0)
    rows, columns = min(height, CELLS), min(width, CELLS)
    down = np.add.reduceat(plane, _starts(height, rows), axis=0)
    cells = np.add.reduceat(down, _starts(width, columns), axis=1)
    sizes = np.outer(np.diff([*_starts(height, rows), height]), np.diff([*_starts(width, columns), width]))
    return Heat(height, width, [[float(f"{value:.4g}") for value in row] for row in cells / sizes])


def _starts(size: int, count: int) -> list[int]:
    return [size * index // count for index in range(count)]
