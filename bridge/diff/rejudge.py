"""Another tolerance for what was measured: a diff says what it would have said, and nothing runs again."""

from __future__ import annotations

from dataclasses import replace

from ..compare import Tolerances
from ..errors import UsageError
from ..result import Tolerance
from .by_stage import depends_on_shape
from .frontier import tolerance_used
from .layerwise import diverges, limit
from .model import DiffReport, Error, LayerDiff, ShapeError, StageError
from .verdict import agrees, first_diverging, of_idle, verdict

_KEPT = "whether single samples agree is as it was measured"


def rejudge(report: DiffReport, tolerance: Tolerances) -> DiffReport:
    """The same figures, held to ``tolerance``: one for all outputs but integers and booleans, or by output.

    One for all outputs is what layers are held to as well. Raises UsageError where an output is not in the report, or
    the report has not what is needed.
    """
    if tolerance is None:
        return report
    outputs = list(dict.fromkeys(row.output for row in report.stages))
    given = {"": tolerance} if isinstance(tolerance, Tolerance) else dict(tolerance)
    unknown = [name for name in given if name and name not in outputs]
    if unknown:
        raise UsageError(f"tolerance: {unknown[0]!r} is no output; the outputs are {', '.join(outputs)}.")
    exact = {row.output for row in report.stages if row.integers}

    def held_to(output: str) -> Tolerance | None:
        return given.get(output) or (given.get("") if output not in exact else None)

    rows = [_row(row, held_to(row.output)) for row in report.stages]
    shapes = [_shape(row, held_to(row.output)) for row in report.shapes]
    layers = [_layer(layer, given[""]) for layer in report.layers] if "" in given else report.layers
    first = first_diverging(layers)
    said = depends_on_shape(shapes)
    old = depends_on_shape(report.shapes)
    idle = [name for name in outputs if of_idle(name) in report.notes]
    notes = [note for note in report.notes if note not in old]
    words = ", ".join(f"{name or 'all outputs'}: rtol {one.rtol:g}, atol {one.atol:g}" for name, one in given.items())
    return replace(
        report,
        verdict=verdict(report.name, rows, shapes, said, layers, first, report.ranking, idle=idle),
        ok=agrees(rows, shapes),
        layers=layers,
        first_diverging=first,
        stages=rows,
        shapes=shapes,
        notes=[*notes, *said, f"judged anew, from what was measured, with other tolerances ({words}); {_KEPT}"],
    )


def _row(row: StageError, limit: Tolerance | None) -> StageError:
    if limit is None or row.added is None:
        return row
    return replace(row, added=_judged(row.added, limit), carried=_judged(row.carried, limit), tolerance=limit)


def _shape(row: ShapeError, limit: Tolerance | None) -> ShapeError:
    if limit is None:
        return row
    return replace(row, added=_judged(row.added, limit), carried=_judged(row.carried, limit))


def _layer(layer: LayerDiff, given: Tolerance) -> LayerDiff:
    return replace(layer, diverges=diverges(layer.introduced, limit(layer.precision, given)))


def _judged(error: Error | None, limit: Tolerance) -> Error | None:
    if error is None or error.agreed is None:
        return error
    if error.frontier is None:
        if error.max_abs is None:  # another shape: no tolerance makes it agree
            return error
        raise UsageError("diff.json: was written without what other tolerances are judged by; measure again.")
    used = tolerance_used(error.frontier, limit)
    agreed = used is not None and used <= 1 and not error.non_finite
    return replace(error, tolerance_used=used, agreed=agreed)
