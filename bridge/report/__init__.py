"""The HTML reports: one page for a model, one for a run. Each is a single file, with its styles and pictures inside.

The callers write the files; what is rendered here refers to nothing outside the page but, in the index, the reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from bridge.result import ConversionResult

if TYPE_CHECKING:
    from jinja2 import Environment

    from bridge.trade_off import TradeOff

__all__ = ["render_index", "render_report"]


def render_report(result: ConversionResult) -> str:
    """The page of one model (``report.html``), at whatever stage its conversion ended."""
    from . import stages, view

    return (
        _templates()
        .get_template("report.html")
        .render(
            result=result,
            verdict=view.verdict(result),
            facts=view.facts(result),
            outputs=view.outputs(result),
            picture=stages.stage_picture(result),
            proof_rows=view.proof_rows(result),
            doubtful=view.doubtful(result),
            times=view.times(result),
            shares=view.shares(result),
            lowered=bool(result.precision != "fp32" or result.kept or result.layers),
        )
    )


def render_index(
    results: Sequence[ConversionResult],
    *,
    title: str = "Conversions to TensorRT",
    links: Mapping[str, str],
    trade_offs: Sequence[TradeOff] = (),
) -> str:
    """The page of a run (``index.html``): the results worst first, as ``view.badness`` orders them.

    ``links`` gives the relative href of each model's report, by the name of the model; a model without one is listed
    without a link. ``trade_offs`` are those of the models that were converted to several precisions.
    """
    from . import view

    rows = [view.index_row(result, links.get(result.name)) for result in sorted(results, key=view.badness)]
    values = {"title": title, "rows": rows, "counts": view.counts_per_status(results), "trade_offs": trade_offs}
    return _templates().get_template("index.html").render(**values)


@cache
def _templates() -> Environment:
    from bridge.trade_off import figures

    from . import histogram, view
    from .templates import environment

    made = environment()
    made.globals.update(
        change=view.change,
        figures=figures,
        closeness=view.closeness,
        layer_error=view.layer_error,
        histograms=histogram.histogram_pictures,
        psnr=view.psnr,
        verdict_of=view.verdict,
    )
    made.filters.update(capital=view.capital, number=view.number, seconds=view.seconds, shape=view.shape)
    return made
