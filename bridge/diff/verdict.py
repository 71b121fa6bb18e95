"""The verdict of a diff in one sentence, and which layer it names."""

from __future__ import annotations

from collections.abc import Sequence

from .model import Error, LayerDiff, ShapeError, StageError, StageName


def first_diverging(layers: Sequence[LayerDiff]) -> int | None:
    """Index of the first layer that diverges, in the order of stages and graph."""
    return next((index for index, layer in enumerate(layers) if layer.diverges), None)


def agrees(rows: Sequence[StageError], shapes: Sequence[ShapeError]) -> bool:
    found = [error for row in rows for error in (row.carried, row.added)]
    found += [error for case in shapes for error in (case.carried, case.added)]
    return all(error.agreed is not False for error in found if error is not None)


def verdict(
    name: str,
    rows: Sequence[StageError],
    shapes: Sequence[ShapeError],
    shape_notes: Sequence[str],
    layers: Sequence[LayerDiff],
    first: int | None,
    ranking: Sequence[int],
) -> str:
    """In one sentence: whether the stages agree, else which stage is off by how much, and the layer to look at."""
    left_out = {row.stage: row.note for row in rows if row.note}
    not_run = "".join(f"; the {stage} stage was not run ({_short(why)})" for stage, why in left_out.items())
    worst = _worst(rows)
    if worst is None and agrees(rows, shapes):
        compared = list(dict.fromkeys(row.stage for row in rows if not row.note))
        if len(compared) < 2:
            return f"{name}: nothing could be compared{not_run}."
        there = layers[first] if first is not None else None
        but = f", though {there} introduces {_figure(there.introduced)} by itself" if there is not None else ""
        return f"{name}: {_list(compared)} agree on {rows[0].inputs}{but}{not_run}."
    if worst is not None:
        stage, output, error, reference = worst
        what = f"the output {output!r} of the {stage} model is off by {_figure(error)} from {reference}"
    else:
        what = shape_notes[0] if shape_notes else "outputs disagree at some of the shapes"
    return f"{name}: {what}; {_blame(layers, first, ranking)}{not_run}."


def _blame(layers: Sequence[LayerDiff], first: int | None, ranking: Sequence[int]) -> str:
    if first is not None:
        layer = layers[first]
        return (
            f"the first layer that diverges is {layer}, which introduces {_figure(layer.introduced)} between "
            f"{layer.reference} and {layer.candidate}"
        )
    if ranking:
        layer = layers[ranking[0]]
        return f"no single layer diverges, and {layer} introduces most, {_figure(layer.introduced)}"
    return "no layer introduces an error that could be measured"


def _worst(rows: Sequence[StageError]) -> tuple[StageName, str, Error, StageName] | None:
    """The first stage that adds more than it may, or carries more, with its worst output."""
    for figure in ("added", "carried"):
        for stage in dict.fromkeys(row.stage for row in rows):
            wrong = [
                (row, error)
                for row in rows
                if row.stage == stage and (error := getattr(row, figure)) is not None and error.agreed is False
            ]
            if wrong:
                row, error = max(wrong, key=lambda pair: (pair[1].non_finite, pair[1].relative or 0.0))
                reference = row.before if figure == "added" and row.before is not None else rows[0].stage
                return row.stage, row.output, error, reference
    return None


def _figure(error: Error | None) -> str:
    if error is None:
        return "an error without a figure"
    if error.non_finite:
        return f"{error.non_finite} values that are not finite"
    if error.relative is not None:
        return f"{error.relative:.2g} of its norm"
    return f"{error.max_abs:.2g}" if error.max_abs is not None else "another shape"


def _short(words: str) -> str:
    return words.splitlines()[0].rstrip(".")[:200] if words else ""


def _list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
