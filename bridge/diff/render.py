"""The reports of a diff for people: one HTML page with all in it, and Markdown for a pull request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from .model import DiffReport

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render_html", "render_markdown"]

PLOTTED = 8
"""Outputs that are plotted, the worst ones: a page of hundreds of plots is neither read nor small."""
_ROWS = 25
"""Of the table of layers, in the page itself: for a printer, and where no script runs."""


def render_html(report: DiffReport) -> str:
    """The page: a single file that needs no network, and runs no script but its own."""
    from . import plots, rows, strips, view

    bands = strips.strips(report.layers, report.first_diverging)
    along = [
        plots.along_layers(
            report.layers, strip.span, report.first_diverging if strip.first is not None else None, f"a{i}"
        )
        for i, strip in enumerate(bands)
    ]
    data = view.worst_data(report)
    html: str = (
        _templates()
        .get_template("diff.html")
        .render(
            report=report,
            view=view,
            strips=list(zip(bands, along, strict=True)),
            legend=strips.LEGEND,
            level=strips.level,
            width=strips.WIDTH,
            left=plots.LEFT,
            right=plots.RIGHT,
            first_rows=rows.worst_first(report.layers, report.ranking, _ROWS),
            data=_embedded(rows.packed(report.layers, report.first_diverging, report.ranking)),
            plots=[plots.of_output(item, f"o{i}") for i, item in enumerate(data[:PLOTTED])],
            unplotted=len(data[PLOTTED:]),
            script=_script(),
            policy=_policy(),
        )
    )
    return html


def render_markdown(report: DiffReport) -> str:
    """The same for a pull request: the verdict, the stages, the worst layers; the long lists are folded."""
    from .markdown import render

    return render(report)


def _breakable(text: str) -> Any:
    """Long names may go on in the next line after a dot or a slash, as people read them."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=\w[./_])(?=\S)", text))


def _embedded(values: Any) -> Any:
    """JSON inside a ``<script>`` element, where no character of it can end the element."""
    from markupsafe import Markup

    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def _script() -> Any:
    from importlib.resources import files

    from markupsafe import Markup

    return Markup((files(__package__) / "templates" / "diff.js").read_text(encoding="utf-8"))


@cache
def _policy() -> Any:
    """What the browser holds the page to: of scripts the one whose digest this is, and nothing from elsewhere."""
    from markupsafe import Markup

    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    return Markup(f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'")


@cache
def _templates() -> Environment:
    from jinja2 import PackageLoader
    from markupsafe import Markup

    from bridge.report import view
    from bridge.report.templates import environment

    from .view import Code

    made = environment(PackageLoader("bridge.diff"))
    made.tests.update(code=lambda part: isinstance(part, Code))
    made.filters.update(breakable=_breakable, drawn=Markup, number=view.number, seconds=view.seconds, shape=view.shape)
    return made
