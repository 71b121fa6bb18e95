"""The plots of a diff: error along the layers, expected against actual, its distribution, its spread over a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .model import Error, Heat, LayerDiff, OutputData
from .strips import WIDTH, Span
from .svg import BAD, FAINT, FIRST, LINE, PAGE, SECOND, figure, inline, plain_log_labels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bridge.result import Histogram

LEFT, RIGHT = 76, 10
"""Units beside the plot along the layers; the heat strip below it keeps them too."""
_BEYOND = 1e30
"""Errors larger than this are drawn as if they were no larger."""
_WIDEST = 1e100
"""What an axis can still be divided into steps over."""
_APART = 300
"""Layers that are drawn as columns with gaps between them."""
_SIDE = (360, 270)


@dataclass(frozen=True)
class OutputPlots:
    """Of one output; what its data do not give is empty."""

    data: OutputData
    scatter: str
    histogram: str
    heat: str

    @property
    def all_equal(self) -> bool:
        histogram = self.data.histogram
        return histogram is not None and histogram.zeros > 0 and not any(histogram.counts)


def along_layers(layers: Sequence[LayerDiff], span: Span, first: int | None, key: str) -> str:
    """The relative error that every layer introduces and carries, on a logarithmic scale; empty where all are 0."""
    part = layers[span.start : span.end]
    introduced, carried = ([_drawn(error) for error in errors] for errors in _both(part))
    figures = [value for value in (*introduced, *carried) if value]
    if not figures:
        return ""
    with style():
        drawn = figure(LEFT + WIDTH + RIGHT, 220)
        drawn.set_layout_engine("none")
        axes = drawn.add_axes((LEFT / (LEFT + WIDTH + RIGHT), 0.03, WIDTH / (LEFT + WIDTH + RIGHT), 0.92))
        axes.set_yscale("log")
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(*_decades(figures))
        axes.tick_params(bottom=False, labelbottom=False)
        plain_log_labels(axes, "y")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        if first is not None:
            axes.axvline(span.place(first), color=BAD, linewidth=1.2, linestyle=(0, (3, 3)))
        dots: dict[str, Any] = {"marker": "o", "markersize": 2.5} if span.count <= _APART else {}
        axes.plot(*_with_gaps(carried, span), color=SECOND, linewidth=1.3, **dots)
        _columns(axes, *_per_unit(introduced, span), span.count)
        worst = max(part, key=lambda layer: layer.badness)
        return inline(
            drawn,
            key=key,
            title=f"Relative error along the layers, {span.reference} to {span.candidate}, logarithmic",
            description=f"{span.count} layers. Most is introduced by {worst}: {_words(worst.introduced)}.",
        )


def _columns(axes: Axes, x: Sequence[float], y: Sequence[float], count: int) -> None:
    floor = axes.get_ylim()[0]
    if count <= _APART:
        axes.vlines(x, floor, y, color=FIRST, linewidth=min(6.0, 0.6 * WIDTH / count))
        return
    # Hundreds of thin lines beside each other would shimmer: they are one shape.
    width = WIDTH / min(count, WIDTH)
    heights = np.full(min(count, WIDTH), floor)
    heights[(np.asarray(x) / width).astype(int)] = np.maximum(y, floor)
    axes.stairs(heights, np.arange(heights.size + 1) * width, baseline=floor, fill=True, color=FIRST, linewidth=0)


def of_output(data: OutputData, key: str) -> OutputPlots:
    return OutputPlots(
        data,
        _scatter(data, f"{key}-scatter"),
        _histogram(data, data.histogram, f"{key}-histogram") if data.histogram is not None else "",
        _heat(data, data.heat, f"{key}-heat") if data.heat is not None else "",
    )


def _both(layers: Sequence[LayerDiff]) -> tuple[list[Error | None], list[Error | None]]:
    return [layer.introduced for layer in layers], [layer.carried for layer in layers]


def _drawn(error: Error | None) -> float | None:
    if error is None or error.relative is None or not math.isfinite(error.relative):
        return None
    return min(error.relative, _BEYOND)


def _words(error: Error | None) -> str:
    if error is None:
        return "not measured"
    lost = f", {error.non_finite} elements not finite" if error.non_finite else ""
    return (f"{error.relative:.2e}" if error.relative is not None else "no relative error") + lost


def _decades(figures: Sequence[float]) -> tuple[float, float]:
    """What no engineer would call an error is cut off: twelve decades below the largest."""
    high = max(math.ceil(math.log10(max(figures)) + 0.05), -28)
    low = max(math.floor(math.log10(min(figures)) - 0.05), high - 12, -30)
    return 10.0**low, 10.0 ** max(high, low + 2)


def _per_unit(errors: Sequence[float | None], span: Span) -> tuple[list[float], list[float]]:
    """Where each error is drawn; of those that share a unit, the largest."""
    found: dict[float, float] = {}
    many = span.count > WIDTH
    for place, error in enumerate(errors):
        if error:
            x = span.place(span.start + place)
            x = math.floor(x) + 0.5 if many else x
            found[x] = max(error, found.get(x, 0.0))
    return list(found), list(found.values())


def _with_gaps(errors: Sequence[float | None], span: Span) -> tuple[list[float], list[float]]:
    """As ``_per_unit``, and nothing where nothing is known: no line goes through what is not finite."""
    x, y = _per_unit(errors, span)
    unknown = [span.place(span.start + place) for place, error in enumerate(errors) if error is None]
    if span.count > WIDTH:  # a unit of which one layer is known has a figure
        known = set(x)
        unknown = [middle for place in unknown if (middle := math.floor(place) + 0.5) not in known]
    points = sorted([*zip(x, y, strict=True), *((place, math.nan) for place in unknown)])
    return [place for place, _ in points], [error for _, error in points]


def _scatter(data: OutputData, key: str) -> str:
    expected, actual = np.asarray(data.expected, dtype=np.float64), np.asarray(data.actual, dtype=np.float64)
    usable = np.isfinite(expected) & np.isfinite(actual) if expected.shape == actual.shape else np.zeros(0, bool)
    if not usable.any():
        return ""
    expected, actual = (np.clip(values[usable], -_WIDEST, _WIDEST) for values in (expected, actual))
    with style():
        drawn = figure(*_SIDE)
        axes = drawn.add_subplot()
        low, high = float(min(expected.min(), actual.min())), float(max(expected.max(), actual.max()))
        air = (high - low) * 0.04 or max(abs(high), 1.0) * 0.04
        axes.set_xlim(low - air, high + air)
        axes.set_ylim(low - air, high + air)
        axes.axline((low, low), slope=1, color=LINE, linewidth=1)
        axes.scatter(expected, actual, s=9, color=FIRST, linewidths=0, alpha=0.6)
        place = int(np.abs(actual - expected).argmax())
        axes.scatter(expected[place], actual[place], s=46, facecolor="none", edgecolor=BAD, linewidths=1.4)
        axes.set_xlabel(f"expected: {data.reference}")
        axes.set_ylabel(f"actual: {data.candidate}")
        axes.grid()
        worst = f"The worst: {expected[place]:.6g} expected, {actual[place]:.6g} found."
        return inline(
            drawn,
            key=key,
            title=f"{data.output}: expected values against actual ones",
            description=f"{expected.size} elements; on the diagonal they are equal. {worst}",
        )


def _histogram(data: OutputData, histogram: Histogram, key: str) -> str:
    bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    filled = [(low, high, count) for low, high, count in bins if count and low > 0]
    total = sum(histogram.counts) + histogram.zeros
    if not total or not filled:
        return ""
    with style():
        drawn = figure(*_SIDE)
        axes = drawn.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = _decades([edge for start, end, _ in filled for edge in (start, end)])
        edges, heights = [item[0] for item in filled], [100 * item[2] / total for item in filled]
        widths = [0.92 * (end - start) for start, end, _ in filled]
        axes.bar(edges, heights, width=widths, align="edge", color=FIRST, edgecolor=PAGE, linewidth=0.5)
        axes.set_xlim(low, high)
        axes.set_ylim(min(heights) / 3, 150)
        plain_log_labels(axes, "x")
        _percents(axes)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        equal = f"; exactly equal: {100 * histogram.zeros / total:.3g} %" if histogram.zeros else ""
        axes.set_xlabel(f"absolute error{equal}")
        words = "; ".join(f"{start:.0e} to {end:.0e}: {count}" for start, end, count in filled)
        return inline(
            drawn,
            key=key,
            title=f"{data.output}: elements by absolute error, in percent",
            description=f"{total} elements, {histogram.zeros} of them exactly equal. {words}.",
        )


def _percents(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def _heat(data: OutputData, heat: Heat, key: str) -> str:
    cells = np.asarray(heat.cells, dtype=np.float64)
    if cells.ndim != 2 or not cells.size or not np.isfinite(cells).any():
        return ""
    with style():
        drawn = figure(*_SIDE)
        axes = drawn.add_subplot()
        shown: Any = axes.imshow(
            cells, cmap="magma", vmin=0, extent=(0, heat.width, heat.height, 0), interpolation="nearest", aspect="equal"
        )
        axes.tick_params(length=2)
        axes.locator_params(integer=True)
        bar = drawn.colorbar(shown, ax=axes, format="%.2g", shrink=0.9)
        bar.outline.set_edgecolor(FAINT)
        bar.ax.locator_params(nbins=5)
        row, column = np.unravel_index(int(np.nanargmax(cells)), cells.shape)
        place = (int((row + 0.5) * heat.height / cells.shape[0]), int((column + 0.5) * heat.width / cells.shape[1]))
        return inline(
            drawn,
            key=key,
            title=f"{data.output}: mean absolute error over its last two axes",
            description=f"{heat.height} by {heat.width}; most around row {place[0]}, column {place[1]}: "
            f"{np.nanmax(cells):.2e}; the mean is {np.nanmean(cells):.2e}.",
        )
