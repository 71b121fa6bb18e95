"""The distribution of an output's error, as a small histogram for every comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bridge.result import Comparison, Histogram

from .axis import LogAxis, Tick

_WIDTH = 230.0
_BASE, _TALLEST = 84.0, 66.0
_ZEROS_X, _ZEROS_WIDTH, _AXIS_START = 2.0, 14.0, 36.0


@dataclass(frozen=True)
class HistogramPicture:
    """The share of an output's elements in each decade of absolute error, and apart from them those without any."""

    comparison: Comparison
    elements: int
    all_equal: bool
    bars: str
    """The path of all bars, the zeros' at the left."""
    zeros_middle: float
    ticks: list[Tick]
    tolerance: float | None
    peak: str
    description: str


def histogram_pictures(comparisons: Sequence[Comparison]) -> list[HistogramPicture]:
    """Of one output, all on the same decades so that stages compare by eye; those without counts are left out."""
    low, high = _span([item.histogram for item in comparisons if item.histogram is not None])
    axis = LogAxis(low, high, start=_AXIS_START, end=_WIDTH - 18)
    pictures = (_histogram(item, axis) for item in comparisons)
    return [picture for picture in pictures if picture is not None]


def _filled(histogram: Histogram) -> Iterator[tuple[float, float, int]]:
    """The lower edge, the upper edge and the count of the bins that have elements."""
    bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    return (item for item in bins if item[2])


def _span(histograms: Sequence[Histogram]) -> tuple[int, int]:
    """The decades they cover, at least four: one bar across the whole width would read as a uniform error."""
    ends = [edge for histogram in histograms for low, high, _ in _filled(histogram) for edge in (low, high)]
    edges = [math.log10(edge) for edge in ends if edge > 0]
    if not edges:
        return -8, 0
    low, high = math.floor(min(edges) + 1e-9), math.ceil(max(edges) - 1e-9)
    missing = max(0, 4 - (high - low))
    return low - (missing + 1) // 2, high + missing // 2


def _histogram(comparison: Comparison, axis: LogAxis) -> HistogramPicture | None:
    histogram = comparison.histogram
    if histogram is None or not (elements := sum(histogram.counts) + histogram.zeros):
        return None
    peak = max([*histogram.counts, histogram.zeros])

    def bar(x: float, width: float, count: int) -> str:
        # A single element of a million must not vanish: it is the one that the tolerance is about.
        tall = max(1.5, round(count / peak * _TALLEST, 1))
        return f"M{x:g} {_BASE:g}v-{tall:g}h{max(width, 1):g}V{_BASE:g}z"

    bars = [bar(_ZEROS_X, _ZEROS_WIDTH, histogram.zeros)] if histogram.zeros else []
    for low, high, count in _filled(histogram):
        left = axis.at(low)
        bars.append(bar(left, round(axis.at(high) - left - 1, 1), count))
    atol = comparison.tolerance.atol
    return HistogramPicture(
        comparison=comparison,
        elements=elements,
        all_equal=histogram.zeros == elements,
        bars="".join(bars),
        zeros_middle=_ZEROS_X + _ZEROS_WIDTH / 2,
        ticks=axis.ticks(at_most=3),
        tolerance=axis.at(atol) if axis.holds(atol) else None,
        peak=f"{100 * peak / elements:.0f} %",
        description=_in_words(histogram, elements),
    )


def _in_words(histogram: Histogram, elements: int) -> str:
    parts = [f"exactly equal: {histogram.zeros} of {elements} elements"] if histogram.zeros else []
    return "; ".join([*parts, *(f"{low:g} to {high:g}: {count}" for low, high, count in _filled(histogram))])
