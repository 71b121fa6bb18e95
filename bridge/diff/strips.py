"""The heat strip: every layer of the graph as a piece of a band, the darker the larger its error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .model import Error, LayerDiff, StageName

LEVELS = "12345678"
"""One for each decade of relative error, from 1e-7 or less to more than 1e-1."""
UNKNOWN, EXACT, LOST = ".", "0", "x"
"""Not measured; not a bit of difference; no longer finite."""

WIDTH = 1000
"""Units across. A band of more layers than that shows the worst of those which share a unit."""
_ORDER = UNKNOWN + EXACT + LEVELS + LOST
_LARGEST = tuple(10.0**power for power in range(-7, 0))


def level(error: Error | None) -> str:
    """A character of a fixed scale, so that bands and tables of all reports compare by eye."""
    if error is None:
        return UNKNOWN
    if error.non_finite:
        return LOST
    if error.relative is None:
        # Of a reference of zeros no share can be told; whatever is not zero is all of it.
        return UNKNOWN if error.max_abs is None else LEVELS[-1] if error.max_abs else EXACT
    if error.relative == 0:
        return EXACT
    return LEVELS[sum(error.relative > limit for limit in _LARGEST)]


LEGEND: tuple[tuple[str, str], ...] = (
    (EXACT, "exactly 0"),
    *((str(place + 1), f"to {limit:.0e}") for place, limit in enumerate(_LARGEST)),
    (LEVELS[-1], "more"),
    (LOST, "not finite"),
    (UNKNOWN, "not measured"),
)


@dataclass(frozen=True)
class Span:
    """The layers between two stages: ``start`` to ``end`` among all of a report."""

    reference: StageName
    candidate: StageName
    start: int
    end: int

    @property
    def count(self) -> int:
        return self.end - self.start

    def place(self, index: int) -> float:
        """Where the middle of a layer lies on its band."""
        return round((index - self.start + 0.5) / self.count * WIDTH, 1)


def spans(layers: Sequence[LayerDiff]) -> list[Span]:
    """The pairs of stages, in the report's order."""
    found: list[Span] = []
    for index, layer in enumerate(layers):
        if found and (found[-1].reference, found[-1].candidate) == (layer.reference, layer.candidate):
            start = found.pop().start
        else:
            start = index
        found.append(Span(layer.reference, layer.candidate, start, index + 1))
    return found


@dataclass(frozen=True)
class Band:
    """One error along the layers: of each level, the path of its pieces (``M3 0h2``, …)."""

    title: str
    paths: dict[str, str]
    description: str


@dataclass(frozen=True)
class Strip:
    span: Span
    bands: list[Band]
    first: float | None
    """Where the first layer that diverges lies."""


def strips(layers: Sequence[LayerDiff], first_diverging: int | None) -> list[Strip]:
    """One for each pair of stages."""
    found = []
    for span in spans(layers):
        part = layers[span.start : span.end]
        bands = [
            _band("introduced", [level(layer.introduced) for layer in part]),
            _band("carried", [level(layer.carried) for layer in part]),
        ]
        here = first_diverging is not None and span.start <= first_diverging < span.end
        found.append(Strip(span, bands, span.place(first_diverging) if here and first_diverging is not None else None))
    return found


def _band(title: str, levels: Sequence[str]) -> Band:
    paths: dict[str, list[str]] = {}
    for found, start, end in _runs(_cells(levels)):
        paths.setdefault(found, []).append(f"M{start:g} 0h{end - start:g}")
    counts = {key: levels.count(key) for key, _ in LEGEND}
    words = ", ".join(f"{words}: {counts[key]}" for key, words in LEGEND if counts[key])
    return Band(title, {key: "".join(pieces) for key, pieces in paths.items()}, f"{len(levels)} layers; {words}")


def _cells(levels: Sequence[str]) -> list[str]:
    count = len(levels)
    if count <= WIDTH:
        return list(levels)
    edges = [round(place * count / WIDTH) for place in range(WIDTH + 1)]
    return [max(levels[start:end], key=_ORDER.index) for start, end in pairwise(edges)]


def _runs(cells: Sequence[str]) -> Iterator[tuple[str, float, float]]:
    """Neighbours of one level as one piece: its level, start and end."""
    scale, start = WIDTH / len(cells), 0
    for place in range(1, len(cells) + 1):
        if place == len(cells) or cells[place] != cells[start]:
            yield cells[start], round(start * scale, 1), round(place * scale, 1)
            start = place
