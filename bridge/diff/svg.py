"""Matplotlib's figures as SVG inside a page: in the page's colours, light or dark, and with its font."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib writes colours as it is given them; these stand for the page's own, which know light from dark.
INK, SOFT, LINE, FAINT = "#010101", "#010102", "#010103", "#010104"
FIRST, SECOND, BAD, PAGE = "#010105", "#010106", "#010107", "#010108"
_NAMES = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    FAINT: "--faint",
    FIRST: "--look-0",
    SECOND: "--look-1",
    BAD: "--bad",
    PAGE: "--page",
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_POINTS = 72
"""Of an inch; matplotlib's SVG has one unit for each, so that a figure's size here is in units of its viewBox."""

_MANY, _DOT = 50, 3.4
"""Dots that are joined, and how wide they are drawn."""


def figure(width: float, height: float) -> Figure:
    """An empty figure of that many units; text in it is 11 units high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _POINTS, height / _POINTS), dpi=_POINTS, facecolor="none", layout="constrained")


def style() -> AbstractContextManager[None]:
    """What a figure is made and written in."""
    from matplotlib import rc_context

    return rc_context(
        {
            "axes.edgecolor": LINE,
            "axes.facecolor": "none",
            "axes.labelcolor": SOFT,
            "axes.labelsize": 11,
            "axes.linewidth": 1,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.size": 11,
            "grid.color": FAINT,
            "legend.frameon": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "bridge",
            "text.color": SOFT,
            # No text is ours alone: a dollar in the name of an output is a dollar.
            "text.parse_math": False,
            "xtick.color": LINE,
            "xtick.labelcolor": SOFT,
            "ytick.color": LINE,
            "ytick.labelcolor": SOFT,
        }
    )


def plain_log_labels(axes: Axes, *which: str) -> None:
    """``1e-06`` along logarithmic axes, as everywhere in the reports."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for name in which:
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))


def inline(drawn: Figure, *, key: str, title: str, description: str) -> str:
    """The figure as an ``<svg>`` element for a page that has others: ``key`` keeps their ids apart.

    ``title`` and ``description`` say in words what it shows, to those who do not see it.
    """
    written = io.StringIO()
    drawn.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(written.getvalue())
    _join_dots(root)
    _drop(root, "metadata", "style")
    _own_ids(root, key)
    for element in root.iter():
        _restyle(element)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-labelledby": f"{key}-title", "aria-describedby": f"{key}-text"})
    for place, (tag, words) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{key}-{'text' if place else 'title'}"})
        element.text = words
        root.insert(place, element)
    return _html(root)


def _drop(root: ElementTree.Element, *names: str) -> None:
    """``style`` too, for it would be the whole page's."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{{{_SVG}}}{name}" for name in names}:
                parent.remove(child)


def _join_dots(root: ElementTree.Element) -> None:
    """Many dots of one kind become one path, a tenth of the size: lines of no length with round ends."""
    for group in list(root.iter(f"{{{_SVG}}}g")):
        dots = [child for child in group if child.tag == f"{{{_SVG}}}use"]
        if len(dots) < _MANY or len(dots) != len(group) or len({dot.get("style") for dot in dots}) > 1:
            continue
        places = "".join(f"M{float(dot.attrib['x']):.1f} {float(dot.attrib['y']):.1f}h0" for dot in dots)
        fill = re.search(r"fill: ([^;]+)", dots[0].attrib["style"])
        clear = re.search(r"fill-opacity: ([^;]+)", dots[0].attrib["style"])
        if fill is None:
            continue
        look = f"fill: none; stroke: {fill[1]}; stroke-width: {_DOT}; stroke-linecap: round"
        for dot in dots:
            group.remove(dot)
        path = ElementTree.SubElement(group, f"{{{_SVG}}}path", {"d": places, "style": look})
        if clear is not None:
            path.set("style", f"{look}; stroke-opacity: {clear[1]}")


def _own_ids(root: ElementTree.Element, key: str) -> None:
    """Ids that nothing refers to go, the others begin with ``key``."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{key}-{name}")
        for attribute, value in element.attrib.items():
            if attribute == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(attribute, f"#{key}-{value[1:]}")
            elif "url(#" in value:
                element.set(attribute, value.replace("url(#", f"url(#{key}-"))


def _restyle(element: ElementTree.Element) -> None:
    if element.tag == f"{{{_SVG}}}path" and "d" in element.attrib:
        element.set("d", _short(element.attrib["d"]))
    for name in ("x", "y", "transform"):
        if name in element.attrib:
            element.set(name, _short(element.attrib[name]))
    text = element.attrib.get("style")
    if text is not None:
        if element.tag == f"{{{_SVG}}}text":
            # The font is the page's; what is left is where the text is anchored and its colour.
            text = re.sub(r"font: [^;]*;?\s*", "", text)
        for colour, name in _NAMES.items():
            text = text.replace(colour, f"var({name})")
        element.set("style", text)


def _short(text: str) -> str:
    """To a tenth of a unit, which no eye can tell from a millionth."""
    text = re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), text)
    return re.sub(r"\s+", " ", text).replace("-0 ", "0 ").strip()


def _html(root: ElementTree.Element) -> str:
    """HTML knows the namespaces of an ``<svg>`` by itself."""
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        link = element.attrib.pop(f"{{{_XLINK}}}href", None)
        if link is not None:
            element.set("href", link)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
