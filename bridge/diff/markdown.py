"""A diff as Markdown for a pull request: the verdict, the stages, the worst layers; long lists are folded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from bridge.report.view import number
from bridge.report.view import shape as dims

from . import view
from .model import DiffReport, Error, LayerDiff, Samples
from .rows import worst_first

_LAYERS, _OUTPUTS, _SAMPLES, _SHAPES = 10, 8, 5, 60
"""Rows of each kind; GitHub takes 65,536 characters of a comment."""
_LONGEST = 300
"""Characters of a name: one that is longer is cut in the middle."""
_LONGEST_VERDICT = 2000


def render(report: DiffReport) -> str:
    status = view.status(report)
    target = f"{report.target.flavour} {report.target.version}, " if report.target else ""
    lines = [
        f"## {status.mark} {text(report.name)}: {status.label[:1].lower()}{status.label[1:]}",
        "",
        f"**{text(view.sentence(report), _LONGEST_VERDICT)}**",
        "",
        text(f"{target}{report.precision}"),
        "",
        "What to do next:",
        "",
        *(f"{place}. {_step(step)}" for place, step in enumerate(view.steps(report), 1)),
        *_stages(report),
        *_layers(report),
        *_shapes(report),
        *(_samples(report.samples) if report.samples is not None else ()),
        *_metrics(report),
        *_notes(report),
    ]
    return "\n".join(lines) + "\n"


def text(words: str, longest: int = _LONGEST) -> str:
    """As it is, whatever it holds: no mark-up of others, no mention of people, no second line."""
    words = re.sub(r"([\\`*_\[\]<>#|~$&])", r"\\\1", _line(words, longest))
    return words.replace("@", "@\u2060")  # a joiner of no width: nobody is called to a review by a file's name


def code(words: str) -> str:
    """A span of code, in which every character stands for itself, in a table too."""
    words = _line(words)
    if not words:
        return ""
    if "|" in words:
        # In a table it ends the cell, even in a span of code; as an entity it does not.
        return f"<code>{re.sub('[^0-9A-Za-z ]', lambda found: f'&#{ord(found[0])};', words)}</code>"
    fence = "`" * (max(map(len, re.findall("`+", words)), default=0) + 1)
    air = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{air}{words}{air}{fence}"


def _line(words: str, longest: int = _LONGEST) -> str:
    words = " ".join(words.split())
    half = longest // 2
    return words if len(words) <= longest else f"{words[:half]} … {words[-half:]}"


def _step(step: Sequence[str]) -> str:
    return "".join(code(part) if isinstance(part, view.Code) else _spaced(part) for part in step)


def _spaced(part: str) -> str:
    """``text`` with the spaces at its ends, which part it from the code beside it."""
    before, after = part[:1].isspace() * " ", part[-1:].isspace() * " "
    return f"{before}{text(part)}{after}" if part.strip() else " "


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], figures: int) -> Iterator[str]:
    """The last ``figures`` columns are aligned to the right."""
    yield ""
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * (len(heads) - figures) + "---:|" * figures
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield from ("", f"<details><summary>{title}</summary>")
    yield from lines
    yield from ("", "</details>")


def _figure(error: Error | None) -> str:
    if error is None:
        return "–"
    lost = f", {error.non_finite:,} not finite" if error.non_finite else ""
    return f"{number(error.relative)}{lost}"


def _largest(error: Error | None) -> str:
    return number(error.max_abs if error is not None else None)


def _agreement(error: Error | None) -> str:
    _, mark, word = view.agreement(error)
    return f"{mark} {word}" if mark != "–" else mark


def _stages(report: DiffReport) -> Iterator[str]:
    found = view.outputs(report)
    if not found:
        return
    heads = ["output", "stage", "agrees", "added", "max abs", "carried", "of the tolerance"]
    yield from ("", "### Error that each stage adds")
    yield from _table(heads, _stage_rows(found[:_OUTPUTS]), figures=4)
    if found[_OUTPUTS:]:
        yield from ("", f"{len(found) - _OUTPUTS} more outputs, none of them worse, are in the report.")


def _stage_rows(outputs: Sequence[view.OutputStages]) -> Iterator[list[str]]:
    for output in outputs:
        for row in output.rows:
            held = row.added or row.carried
            stage = view.STAGE_TITLES[row.stage]
            if held is None:
                yield [code(output.output), stage, text(view.why_not(row)), *["–"] * 4]
                continue
            figures = [_figure(row.added), _largest(row.added), _figure(row.carried), view.share(held.tolerance_used)]
            yield [code(output.output), stage, _agreement(held), *figures]


def _layers(report: DiffReport) -> Iterator[str]:
    if not report.layers:
        return
    rows = [_layer(index, layer, report) for index, _, layer in worst_first(report.layers, report.ranking, _LAYERS)]
    yield from ("", "### Layers that introduce most")
    heads = ["layer", "operator", "from", "between", "in", "introduced", "carried"]
    yield from _table(heads, rows, figures=2)
    if len(report.layers) > len(rows):
        yield from ("", f"{len(report.layers):,} layers were compared; the report has them all.")


def _layer(index: int, layer: LayerDiff, report: DiffReport) -> list[str]:
    flag = " **first to diverge**" if index == report.first_diverging else ""
    where = " ".join(filter(None, (code(layer.module), code(layer.source))))
    return [
        code(layer.node or layer.tensor) + flag,
        text(layer.operator),
        where,
        f"{layer.reference} → {layer.candidate}",
        text(layer.precision),
        _figure(layer.introduced),
        _figure(layer.carried),
    ]


def _shapes(report: DiffReport) -> Iterator[str]:
    cases = view.shape_cases(report)
    if not cases:
        return
    rows = [
        [
            text(case.case),
            ", ".join(f"{code(name)} {dims(shape)}" for name, shape in case.shapes.items()),
            row.stage,
            code(row.output),
            _agreement(row.added or row.carried) if row.added or row.carried else text(view.why_not(row)),
            _figure(row.added),
            _figure(row.carried),
        ]
        for case in cases
        for row in case.rows
    ]
    held = [error for case in cases for row in case.rows if (error := row.added or row.carried) is not None]
    bad = sum(error.agreed is False for error in held)
    summary = f"By shape: {bad} of {len(held)} disagree" if bad else f"By shape: none of {len(held)} disagrees"
    heads = ["shapes", "inputs", "stage", "output", "agrees", "added", "carried"]
    lines = [*_table(heads, rows[:_SHAPES], figures=2)]
    if rows[_SHAPES:]:
        lines += ["", f"{len(rows) - _SHAPES} more are in the report."]
    yield from _folded(summary, lines)


def _samples(samples: Samples) -> Iterator[str]:
    lines = []
    if samples.worst:
        kept = f", kept in {code(samples.worst_file)}" if samples.worst_file else ""
        lines += ["", f"The worst: {code(samples.worst)}{kept}."]
    if samples.percentiles and samples.count > 1:
        rows = [
            [
                view.STAGE_TITLES[item.stage],
                item.figure.replace("_", " "),
                *map(number, (item.p50, item.p90, item.p99, item.max)),
            ]
            for item in samples.percentiles
        ]
        lines += _table(["stage", "error", "half, at most", "90 %", "99 %", "all"], rows, figures=4)
    if samples.errors and samples.count > 1:
        worst = [
            [
                code(item.sample),
                item.stage,
                "✓ yes" if item.agreed else "✕ no",
                number(item.relative),
                number(item.max_abs),
            ]
            for item in samples.errors[:_SAMPLES]
        ]
        lines += _table(["worst samples", "stage", "agrees", "relative", "max abs"], worst, figures=2)
    yield from _folded(f"By data: {samples.count:,} {'sample' if samples.count == 1 else 'samples'}", lines)


def _metrics(report: DiffReport) -> Iterator[str]:
    stages = view.metric_stages(report)
    if stages:
        yield from ("", "### Task metrics")
        rows = [[code(row.name), *map(text, row.values)] for row in view.metric_rows(report)]
        yield from _table(["metric", *(view.STAGE_TITLES[stage] for stage in stages)], rows, figures=len(stages))


def _notes(report: DiffReport) -> Iterator[str]:
    if report.notes:
        yield from _folded("To know", ["", *(f"- {text(note)}" for note in report.notes)])
