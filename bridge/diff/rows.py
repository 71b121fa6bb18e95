"""The layers as the page's script takes them: columns instead of rows, and every text once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .model import Error, LayerDiff
from .strips import level, spans

_TEXTS: dict[str, Callable[[LayerDiff], str]] = {
    "name": lambda layer: layer.node or layer.tensor,
    "tensor": lambda layer: layer.tensor,
    "operator": lambda layer: layer.operator,
    "module": lambda layer: layer.module,
    "source": lambda layer: layer.source,
    "precision": lambda layer: layer.precision,
    "shape": lambda layer: " × ".join(map(str, layer.shape)),
    "note": lambda layer: layer.note,
}
_FIGURES: dict[str, Callable[[LayerDiff], float | None]] = {
    "introduced": lambda layer: _of(layer.introduced, "relative"),
    "carried": lambda layer: _of(layer.carried, "relative"),
    "introduced_max": lambda layer: _of(layer.introduced, "max_abs"),
    "carried_max": lambda layer: _of(layer.carried, "max_abs"),
    "largest": lambda layer: layer.largest,
    "introduced_lost": lambda layer: _of(layer.introduced, "non_finite"),
    "carried_lost": lambda layer: _of(layer.carried, "non_finite"),
}


def packed(layers: Sequence[LayerDiff], first_diverging: int | None, ranking: Sequence[int]) -> dict[str, Any]:
    """JSON values. A text is its place in ``texts``, a figure has three digits; what is not known is null.

    ``ranking`` is the order that the table has at first.
    """
    texts: dict[str, int] = {"": 0}

    def place(text: str) -> int:
        return texts.setdefault(text, len(texts))

    columns = {name: [place(text(layer)) for layer in layers] for name, text in _TEXTS.items()}
    return {
        "pairs": [[span.reference, span.candidate, span.start, span.end] for span in spans(layers)],
        "texts": list(texts),
        "columns": columns,
        "figures": {name: [_rounded(figure(layer)) for layer in layers] for name, figure in _FIGURES.items()},
        "levels": {
            "introduced": "".join(level(layer.introduced) for layer in layers),
            "carried": "".join(level(layer.carried) for layer in layers),
        },
        "diverging": [index for index, layer in enumerate(layers) if layer.diverges],
        "first": first_diverging,
        "ranking": list(ranking),
    }


def _of(error: Error | None, name: str) -> float | None:
    value: float | None = getattr(error, name) if error is not None else None
    return value


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.3g}") if value % 1 else float(value)
    return int(short) if short.is_integer() and abs(short) < 1e9 else short


def worst_first(layers: Sequence[LayerDiff], ranking: Iterable[int], count: int) -> list[tuple[int, int, LayerDiff]]:
    """The first ``count`` rows of the table: the index of each, its place between its stages, and the layer."""
    starts = {index: span.start for span in spans(layers) for index in range(span.start, span.end)}
    ranked = list(dict.fromkeys(index for index in ranking if 0 <= index < len(layers)))[:count]
    seen = set(ranked)
    rest = (index for index in range(len(layers)) if index not in seen)
    while len(ranked) < min(count, len(layers)):
        ranked.append(next(rest))
    return [(index, index - starts[index] + 1, layers[index]) for index in ranked]
