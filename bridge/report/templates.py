"""The templates of all reports: one family, with one base and one style sheet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import BaseLoader, Environment


def environment(*own: BaseLoader) -> Environment:
    """Templates of ``own`` loaders, and those of the reports of conversions."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    from bridge import __version__

    made = Environment(
        loader=ChoiceLoader([*own, PackageLoader("bridge.report", ".")]),
        # Always, not by file name: names of models, nodes and outputs are other people's text.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(version=__version__)
    return made
