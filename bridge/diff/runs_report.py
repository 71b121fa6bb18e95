"""A ``RunsReport`` for people, for a pull request, and for a CI server: text, Markdown, HTML and JUnit XML.

Names and errors are other people's text: each form escapes it in its own way.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from .runs import CHECKS, Change, Limits, ModelChange, RunFacts, RunsReport, describe, figure

if TYPE_CHECKING:
    from jinja2 import Environment

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to write."""
_ROWS = 200
"""Models without a change that Markdown lists; a pull request's comment is at most 65,536 characters."""


def as_text(report: RunsReport) -> str:
    """For a terminal: the verdict, each regression, and what else has changed."""
    lines = [report.verdict]
    lines += [f"  {model.name}: {describe(change)}" for model in report.regressed for change in model.regressions]
    others = [f"  {model.name}: {words}" for model in report.models for words in _others(model)]
    if others:
        lines += ["other changes:", *others]
    lines += [f"note: {note}" for note in report.notes]
    return _clean("\n".join(lines) + "\n")


def _others(model: ModelChange) -> Iterator[str]:
    """What has changed, and is no regression."""
    for change in model.changes:
        moved = change.improved or (change.check == "status" and change.before != change.after)
        if moved and not change.regression:
            yield describe(change)
    yield from model.notes


# --- Markdown ----------------------------------------------------------------------------------------------------


def as_markdown(report: RunsReport) -> str:
    """For a pull request."""
    lines = [f"**{'✓' if report.ok else '✕'} {_escaped(report.verdict)}**", ""]
    if report.regressed:
        lines += [
            f"- {_escaped(model.name)}: {_escaped(describe(change))}"
            for model in report.regressed
            for change in model.regressions
        ]
        lines.append("")
    lines += [f"| model | {' | '.join(CHECKS)} |", f"|{'---|' * (1 + len(CHECKS))}"]
    shown = report.models[: len(report.regressed) + _ROWS]
    for model in shown:
        lines.append(f"| {' | '.join([_escaped(model.name), *map(_cell, model.changes)])} |")
    if len(shown) < len(report.models):
        lines.append(f"\n{len(report.models) - len(shown)} more models without a regression.")
    lines += ["", *(f"- {_escaped(model.name)}: {_escaped(note)}" for model in shown for note in model.notes)]
    lines += [f"- {_escaped(note)}" for note in report.notes]
    lines += [
        "",
        f"Limits: {limits_words(report.limits)}.",
        "",
        "| run | models | started | versions |",
        "|---|---|---|---|",
    ]
    for run in (report.before, report.after):
        cells = [_escaped(text) for text in (run.path, str(run.models), run.started or "–", versions_words(run))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(change: Change) -> str:
    words = _escaped(change_words(change))
    return f"**{words}**" if change.regression else words


def _escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line."""
    plain = re.sub(r"([\\`*_\[\]~$])", r"\\\1", " ".join(_clean(text).split()))
    return re.sub("[&<>|@]", lambda found: f"&#{ord(found[0])};", plain)


# --- words -------------------------------------------------------------------------------------------------------


def change_words(change: Change) -> str:
    """Both values, or one where they are the same."""
    before, after = (figure(change.check, value) for value in (change.before, change.after))
    if change.before is None and change.after is None:
        return "–"
    factor = f" (× {change.factor:.3g})" if change.factor is not None and before != after else ""
    return f"{after}" if before == after else f"{before} → {after}{factor}"


def limits_words(limits: Limits) -> str:
    parts = {"drop": "no lower status", "failed": "no new failure", None: "any status"}[limits.status]
    for check in ("accuracy", "latency", "size"):
        limit = getattr(limits, check)
        parts += f", {check} up to {limit:g} times" if limit is not None else f", any {check}"
    return parts


def versions_words(run: RunFacts) -> str:
    return ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "–"


def changed_versions(report: RunsReport) -> list[tuple[str, str, str]]:
    """Packages that were not the same, with both versions."""
    a, b = report.before.versions, report.after.versions
    if not a or not b:
        return []
    return [
        (name, a.get(name, "–"), b.get(name, "–")) for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)
    ]


# --- JUnit -------------------------------------------------------------------------------------------------------


def as_junit(report: RunsReport) -> str:
    """A test case for each model and check, as CI servers read them: a regression is a failure, and what was not
    measured is skipped."""
    cases = [(model, change) for model in report.models for change in model.changes]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(change.regression for _, change in cases)),
        "errors": "0",
        "skipped": str(sum(_unmeasured(change) for _, change in cases)),
    }
    root = ET.Element("testsuites", {"name": "bridge diff", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": _clean(f"{report.before.path} → {report.after.path}"), **counts})
    for model, change in cases:
        case = ET.SubElement(suite, "testcase", {"classname": _clean(model.name), "name": change.check, "time": "0"})
        if change.regression:
            failure = ET.SubElement(case, "failure", {"type": change.check, "message": _clean(describe(change))})
            failure.text = _clean(_details(model, change))
        elif _unmeasured(change):
            ET.SubElement(case, "skipped", {"message": _clean(change.note)})
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _unmeasured(change: Change) -> bool:
    return not change.regression and (change.before is None or change.after is None)


def _details(model: ModelChange, change: Change) -> str:
    lines = [describe(change)]
    if change.check == "accuracy":
        lines += [describe(other) for other in model.outputs[1:]]
    if change.check == "status" and model.error:
        lines.append(model.error)
    return "\n".join([*lines, *model.notes])


def _clean(text: str) -> str:
    """Without what neither XML nor a terminal should be given: control characters, halves of surrogate pairs."""
    return _NOT_XML.sub("�", text)


# --- HTML --------------------------------------------------------------------------------------------------------


def as_html(report: RunsReport) -> str:
    """One page in the family of the conversions' reports, which refers to nothing outside itself."""
    counts = [
        (check, sum(getattr(model, check).regression for model in report.models), _improved(report, check))
        for check in CHECKS
    ]
    page = _templates().get_template("runs.html").render(report=report, counts=counts, title="Two runs compared")
    return _clean(page)


def _improved(report: RunsReport, check: str) -> int:
    return sum(getattr(model, check).improved for model in report.models)


@cache
def _templates() -> Environment:
    from jinja2 import PackageLoader

    from bridge.report.templates import environment

    made = environment(PackageLoader("bridge.diff"))
    made.globals.update(changed_versions=changed_versions, others=_others)
    made.filters.update(
        change=change_words, describe=describe, limits=limits_words, versions=versions_words, figure=figure
    )
    return made
