"""The verdict of a diff in one sentence, and which layer it names."""

from __future__ import annotations

from collections.abc import Sequence

from .layerwise import EXACT
from .model import NOT_BUILT, Error, LayerDiff, SampleError, ShapeError, StageError, StageName


def first_diverging(layers: Sequence[LayerDiff]) -> int | None:
    """Index of the first layer that diverges, in the order of stages and graph."""
    return next((index for index, layer in enumerate(layers) if layer.diverges), None)


def of_idle(output: str) -> str:
    """The note on an output of which nothing is finite."""
    return f"of the output {output!r} nothing is finite, and nothing was compared"


def agrees(rows: Sequence[StageError], shapes: Sequence[ShapeError]) -> bool:
    """Whether something was compared, nothing of it disagrees, and nothing that could have run did not."""
    return bool(_errors(rows, shapes)) and not _off(rows, shapes)


def _off(rows: Sequence[StageError], shapes: Sequence[ShapeError]) -> bool:
    """Whether anything disagrees, or could have run and did not."""
    wrong = any(error.agreed is False for error in _errors(rows, shapes))
    return wrong or any(row.failed for row in rows) or any(row.failed for row in shapes)


def _errors(rows: Sequence[StageError], shapes: Sequence[ShapeError]) -> list[Error]:
    every: list[StageError | ShapeError] = [*rows, *shapes]
    return [error for row in every for error in (row.carried, row.added) if error is not None]


def verdict(
    name: str,
    rows: Sequence[StageError],
    shapes: Sequence[ShapeError],
    shape_notes: Sequence[str],
    layers: Sequence[LayerDiff],
    first: int | None,
    ranking: Sequence[int],
    samples: Sequence[SampleError] = (),
    idle: Sequence[str] = (),
) -> str:
    """In one sentence: whether the stages agree, else which stage is off by how much, and the layer to look at.

    ``samples`` are all of them; ``idle`` are outputs of which nothing is finite, so that they cannot but agree.
    """
    left_out = {row.stage: row for row in rows if row.note}
    worst = _worst(rows)
    told = _short if worst is None else _reason
    failed = "".join(f"; {told(row.note)}" for row in left_out.values() if row.failed)
    not_run = failed + "".join(
        f"; the {row.stage} stage was not run ({_reason(row.note)})" for row in left_out.values() if not row.failed
    )
    if worst is None and (failed or not _off(rows, shapes)):
        compared = list(dict.fromkeys(row.stage for row in rows if not row.note))
        if len(compared) < 2:
            return f"{name}: nothing could be compared{not_run}."
        there = layers[first] if first is not None else None
        but = f", though {there} introduces {_introduced(there)} by itself" if there is not None else ""
        but += f", though nothing of {', '.join(map(repr, idle))} is finite" if idle else ""
        agree = f"{_list(compared)} agree on {rows[0].inputs}{but}"
        # What does not run is the news, and leads.
        return f"{name}: {not_run.removeprefix('; ')}; {agree}." if failed else f"{name}: {agree}{not_run}."
    if worst is not None:
        row, error, reference = worst
        off = _figure(error, exact=row.integers)
        what = f"the output {row.output!r} of the {row.stage} model is off by {off} from {reference}"
        what += _share(row.stage, samples)
    else:
        what = shape_notes[0] if shape_notes else "outputs disagree at some of the shapes"
    return f"{name}: {what}; {_blame(layers, first, ranking)}{not_run}."


def _share(stage: StageName, samples: Sequence[SampleError]) -> str:
    """On how many of several samples the stage is off, where it is not on all."""
    own = [item for item in samples if item.stage == stage]
    off = sum(not item.agreed for item in own)
    return f" on {off} of {len(own)} samples" if 0 < off < len(own) else ""


def _blame(layers: Sequence[LayerDiff], first: int | None, ranking: Sequence[int]) -> str:
    if first is not None:
        layer = layers[first]
        return (
            f"the first layer that diverges is {layer}{layer.before and f', {layer.before}'}, which introduces "
            f"{_introduced(layer)} between {layer.reference} and {layer.candidate}"
        )
    if ranking:
        layer = layers[ranking[0]]
        return f"no single layer diverges, and {layer} introduces most, {_introduced(layer)}"
    return "no layer introduces an error that could be measured"


def _worst(rows: Sequence[StageError]) -> tuple[StageError, Error, StageName] | None:
    """The first stage that adds more than it may, or carries more: its worst output, and what that is off from."""
    for figure in ("added", "carried"):
        for stage in dict.fromkeys(row.stage for row in rows):
            wrong = [
                (row, error)
                for row in rows
                if row.stage == stage and (error := getattr(row, figure)) is not None and error.agreed is False
            ]
            if wrong:
                row, error = max(wrong, key=lambda pair: (pair[1].non_finite, pair[1].relative or 0.0))
                return row, error, row.before if figure == "added" and row.before is not None else rows[0].stage
    return None


def _introduced(layer: LayerDiff) -> str:
    return _figure(layer.introduced, exact=layer.precision in EXACT)


def _figure(error: Error | None, exact: bool = False) -> str:
    """``exact``: of integers and booleans, whose norm says nothing."""
    if error is None:
        return "an error without a figure"
    if error.non_finite:
        return f"{error.non_finite} values that are not finite"
    if error.relative is not None and not exact:
        return f"{error.relative:.2g} of its norm"
    return f"up to {error.max_abs:.6g}" if error.max_abs is not None else "another shape"


def _reason(note: str) -> str:
    """What the conversion failed for would be a second verdict in the first."""
    return _short(note.partition(":")[0] if note.startswith(NOT_BUILT) else note)


def _short(words: str) -> str:
    return words.splitlines()[0][:200].rstrip(".,:; ") if words else ""


def _list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
