"""The pages of a diff: what they say, that they stand alone and run nothing of others; that Markdown stays whole."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.diff_report import report_of
from bridge.diff import markdown, rows, strips, view
from bridge.diff.model import (
    STAGES,
    DiffReport,
    Error,
    Heat,
    LayerDiff,
    Metric,
    OutputData,
    Percentiles,
    SampleError,
    Samples,
    ShapeError,
    StageError,
)
from bridge.diff.render import render_html, render_markdown
from bridge.result import Histogram, TargetInfo, Tolerance

from .test_report import EDGES, HOSTILE, Page

AGREED = Error(1.23e-4, 2.34e-3, cosine=0.9876543, psnr=55.55, tolerance_used=0.5, agreed=True)
WRONG = dataclasses.replace(AGREED, relative=0.42, tolerance_used=7.0, agreed=False)


def layer(index: int, error: Error | None = AGREED, **changes: Any) -> LayerDiff:
    values: dict[str, Any] = {
        "reference": "rewritten",
        "candidate": "typed",
        "tensor": f"t{index}",
        "node": f"node_{index}",
        "operator": "Conv",
        "module": f"net.block.{index}",
        "source": f"/home/me/net/blocks.py:{index}",
        "precision": "float16",
        "shape": [1, 8, index + 1],
        "largest": 3.5,
        "introduced": error,
        "carried": error,
    }
    return LayerDiff(**{**values, **changes})


def small(**changes: Any) -> DiffReport:
    values: dict[str, Any] = {
        "verdict": "net: the stages agree.",
        "ok": True,
        "stages": [
            StageError("torch", "y", "3 samples"),
            StageError("exported", "y", "3 samples", "torch", AGREED, AGREED, Tolerance(1e-3, 1e-4)),
        ],
        "layers": [layer(0), layer(1)],
        "ranking": [1, 0],
    }
    return DiffReport("net", **{**values, **changes})


def hostile(text: str = HOSTILE) -> DiffReport:
    """The text of others, in every place where there can be some."""
    error = dataclasses.replace(WRONG, non_finite=3)
    return DiffReport(
        text,
        verdict=text,
        ok=False,
        target=TargetInfo(text, text, installed=False, strongly_typed=True),
        precision=text,
        stages=[
            StageError("torch", text, text),
            StageError("exported", text, text, "torch", error, error, note=text),
            StageError("engine", text, text, note=text),
        ],
        layers=[
            layer(0, error, tensor=text, node=text, operator=text, module=text, source=text, precision=text, note=text)
        ],
        first_diverging=0,
        ranking=[0],
        shapes=[ShapeError(text, {text: [1]}, "exported", text, error, error, text)],
        samples=Samples(
            2,
            [Percentiles("exported", "relative", 1, 2, 3, 4)],
            [SampleError(text, "exported", 1, 1, False)],
            text,
            text,
        ),
        metrics=[Metric(text, "torch", 1.0), Metric(text, "exported", None, text)],
        outputs=[
            OutputData(
                text,
                "torch",
                "exported",
                text,
                [1, 2],
                [1, 3],
                Histogram([0.1, 1], [3], 1),
                Heat(4, 4, [[1, 2], [3, 4]]),
            )
        ],
        notes=[text],
        seconds={text: 1.0},
    )


def scripts(html: str) -> list[tuple[str, str]]:
    """The attributes and the text of each script element, as a browser ends them."""
    return re.findall(r"<script([^>]*)>(.*?)</script", html, re.DOTALL | re.IGNORECASE)


def without_scripts(html: str) -> str:
    """What a reader sees; where lines may break is of no matter."""
    return re.sub(r"<script[^>]*>.*?</script>|<wbr>", "", html, flags=re.DOTALL)


# --- the page ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [small(), hostile(), report_of(200, 2)], ids=["small", "hostile", "decoder"])
def test_the_page_is_one_file_that_needs_no_network_and_runs_its_own_script_alone(report: DiffReport) -> None:
    html = render_html(report)
    (data, text), (attributes, script) = scripts(html)
    assert 'type="application/json"' in data and not attributes
    json.loads(text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in html
    page = Page(without_scripts(html))
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    addresses = {
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in {"src", "href", "srcset", "action", "data", "xlink:href"}
    }
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in addresses)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", html)


def test_names_and_messages_of_others_are_text_and_never_markup() -> None:
    evil = HOSTILE + "</script><script>alert(2)</script><!-- {{ 7 * 7 }} $x$ \u2028"
    html = render_html(hostile(evil))
    assert len(scripts(html)) == 2
    shown = " ".join(evil.split())
    page = Page(without_scripts(html))
    assert page.text.count(shown.split("</script>")[0].split(".")[0]) > 20
    assert not page.all("img")
    packed = json.loads(scripts(html)[0][1])
    assert evil in packed["texts"]


def test_every_id_is_used_once_and_every_label_is_there() -> None:
    page = Page(without_scripts(render_html(report_of(60, 3))))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), sorted(name for name in ids if ids.count(name) > 1)
    wanted = {
        name
        for _, attrs in page.tags
        for names in (
            attrs.get("aria-labelledby", ""),
            attrs.get("href", "")[1:] * attrs.get("href", "").startswith("#"),
        )
        for name in names.split()
    }
    assert wanted <= set(ids), wanted - set(ids)


def test_the_verdict_comes_first_and_then_what_to_do() -> None:
    report = report_of(100, 1)
    text = Page(without_scripts(render_html(report))).text
    layer_ = report.layers[report.first_diverging or 0]
    words = [
        "Diverges",
        view.sentence(report)[:30],
        "What to do next",
        f"Look at {layer_.operator}",
        "Error that each stage",
    ]
    places = [text.index(item) for item in words]
    assert places == sorted(places), dict(zip(words, places, strict=True))
    assert f'fp32: ["node:{layer_.node}"]' in text, "what to write into a precision file"


@pytest.mark.parametrize(
    ("changes", "look"),
    [
        ({}, "built"),
        ({"ok": False}, "failed"),
        ({"stages": [StageError("engine", "y", "1 sample", note="no GPU")]}, "built"),
        ({"stages": [StageError("engine", "y", "1 sample", "typed", AGREED, AGREED)]}, "verified"),
        ({"stages": [StageError("engine", "y", "1 sample", "typed", WRONG, WRONG)], "ok": False}, "failed"),
    ],
)
def test_green_is_for_an_engine_that_ran_and_agrees_alone(changes: dict[str, Any], look: str) -> None:
    html = render_html(small(**changes))
    assert f'class="verdict status-{look}"' in html
    assert ("Agrees, as far as it was run" in html) == (look == "built")


def test_a_stage_that_was_not_run_says_why() -> None:
    report = small(stages=[*small().stages, StageError("engine", "y", "3 samples", "exported", note="no GPU here")])
    text = Page(without_scripts(render_html(report))).text
    assert "engine not run: no GPU here" in text
    assert "The engine was not run (no GPU here). Convert with" in text


def test_every_figure_of_a_stage_is_in_the_table() -> None:
    error = dataclasses.replace(WRONG, relative=1.11e-1, max_abs=2.22e-2, non_finite=1234)
    row = StageError("typed", "logits", "3 samples", "rewritten", dataclasses.replace(error, relative=3.33e-3), error)
    text = Page(without_scripts(render_html(small(stages=[row])))).text
    words = ["logits", "1.11e-01", "2.22e-02", "3.33e-03", "1,234 not finite", "0.9876543", "55.5 dB", "700 %", "✕ no"]
    assert not [word for word in words if word not in text]


def test_shapes_samples_and_metrics_are_there_and_their_sections_only_with_them() -> None:
    report = report_of(50, 1)
    text = Page(without_scripts(render_html(report))).text
    words = [
        "By shape",
        "max input_ids 1 × 2048",
        "By data",
        "worst-sample.npz",
        "22 more are in diff.json",
        "Task metrics",
    ]
    words += ["0.041", "not run", "To know", "Spread over the last two axes"]
    assert not [word for word in words if word not in text]
    bare = Page(without_scripts(render_html(small()))).text
    for word in ("By shape", "By data", "Task metrics", "To know", "Outputs"):
        assert word not in bare, word


def test_where_no_script_runs_the_worst_layers_are_there_in_their_ranking() -> None:
    report = report_of(400, 1)
    page = Page(without_scripts(render_html(report)))
    assert "The 25 that introduce most, of 1,240." in page.text
    names = [report.layers[index].node for index in report.ranking[:25]]
    places = [page.text.index(f"{name} ", page.text.index("Largest value")) for name in names]
    assert places == sorted(places)


def test_the_report_of_a_diff_without_layers_or_stages_is_a_page_too() -> None:
    text = Page(without_scripts(render_html(DiffReport("net", "Nothing could be compared.", ok=True)))).text
    assert "No outputs were compared." in text and "No layers were compared." in text


def test_the_report_of_five_thousand_nodes_is_under_three_megabytes() -> None:
    report = report_of(5000)
    size = len(render_html(report).encode())
    assert size < 3_000_000, f"{size:,} bytes of {len(report.layers):,} rows"


def test_of_hundreds_of_outputs_the_worst_are_shown_and_plotted() -> None:
    one = report_of(50, 1)
    stages = [dataclasses.replace(row, output=f"h{i}") for i in range(150) for row in small().stages]
    stages.append(StageError("typed", "h77", "3 samples", "exported", WRONG, WRONG))
    outputs = [dataclasses.replace(one.outputs[0], output=f"h{i}") for i in range(150)]
    html = render_html(small(stages=stages, outputs=outputs, ok=False))
    page = Page(without_scripts(html))
    assert "142 more outputs" in page.text
    assert page.text.index("h77") < page.text.index("h0 ")
    assert len(page.all("article", "plotted")) == 8 and "of 142 more the data are in diff.json" in page.text
    assert len(html.encode()) < 3_000_000


# --- strips and rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (None, "."),
        (Error(None, None), "."),
        (Error(0.0, 0.0), "0"),
        (Error(None, 0.0), "0"),
        (Error(None, 1e-9), "8"),
        (Error(1e-30, 1e-30), "1"),
        (Error(1e-7, 1.0), "1"),
        (Error(1.1e-7, 1.0), "2"),
        (Error(5e-4, 1.0), "5"),
        (Error(1e-1, 1.0), "7"),
        (Error(0.11, 1.0), "8"),
        (Error(1e300, 1.0), "8"),
        (Error(1e-7, 1e-7, non_finite=1), "x"),
    ],
)
def test_a_level_is_a_decade_of_relative_error(error: Error | None, key: str) -> None:
    assert strips.level(error) == key


def test_one_bad_layer_of_ten_thousand_is_still_seen_on_the_strip() -> None:
    layers = [layer(i, Error(1e-6, 1e-6)) for i in range(10_000)]
    layers[7003] = layer(7003, Error(0.5, 0.5))
    (strip,) = strips.strips(layers, 7003)
    pieces = strip.bands[0].paths["8"]
    assert pieces == "M700 0h1" and strip.first == 700.4
    assert "more: 1" in strip.bands[0].description


@pytest.mark.parametrize("count", [1, 2, 7, 999, 1000, 1001, 4321])
def test_the_pieces_of_a_strip_fill_it_from_end_to_end(count: int) -> None:
    errors = [None, Error(0.0, 0.0), Error(1e-3, 1.0), Error(1e-3, 1.0, non_finite=2)]
    (strip,) = strips.strips([layer(i, errors[i * i % 4]) for i in range(count)], None)
    pieces = sorted(
        (float(start), float(width))
        for path in strip.bands[0].paths.values()
        for start, width in re.findall(r"M([\d.e+]+) 0h([\d.e+]+)", path)
    )
    assert pieces[0][0] == 0 and math.isclose(
        sum(width for _, width in pieces), strips.WIDTH, abs_tol=0.5 * len(pieces)
    )
    for (start, width), (after, _) in pairwise(pieces):
        assert abs(start + width - after) < 0.2


def test_each_pair_of_stages_has_a_strip_of_its_own() -> None:
    layers = [layer(0, reference="torch", candidate="exported"), layer(1), layer(2)]
    found = strips.strips(layers, 2)
    assert [(item.span.reference, item.span.start, item.span.end) for item in found] == [
        ("torch", 0, 1),
        ("rewritten", 1, 3),
    ]
    assert [item.first for item in found] == [None, 750]


def test_what_the_script_is_given_is_what_was_measured() -> None:
    report = report_of(30, 1)
    data = json.loads(json.dumps(rows.packed(report.layers, report.first_diverging, report.ranking), allow_nan=False))
    for index, item in enumerate(report.layers):
        texts = {name: data["texts"][column[index]] for name, column in data["columns"].items()}
        assert texts["name"] == item.node and texts["source"] == item.source and texts["module"] == item.module
        assert texts["shape"] == " × ".join(map(str, item.shape))
        assert item.introduced is not None and item.carried is not None
        assert data["figures"]["introduced"][index] == pytest.approx(item.introduced.relative, rel=1e-2)
        assert data["figures"]["carried_lost"][index] == item.carried.non_finite
    assert data["first"] == report.first_diverging and data["ranking"] == report.ranking


# --- what cannot be measured -------------------------------------------------------------------------------------

figures = st.none() | st.sampled_from([0.0, 5e-324, 1e-300, 1e-7, 1.0, 65504.0, 1e300, 1.7e308]) | st.floats(0, 1e9)
errors = st.none() | st.builds(
    Error, figures, figures, figures, figures, figures, figures, st.integers(0, 9), figures, st.none() | st.booleans()
)
names = st.text(max_size=12)
stages_ = st.sampled_from(STAGES)
layers_ = st.lists(
    st.builds(
        LayerDiff, stages_, stages_, names, names, names, names, names, names, st.lists(st.integers(0, 9), max_size=3),
        figures, errors, errors, st.booleans(), names,
    ),
    max_size=4,
)  # fmt: skip
values = st.lists(st.floats(-1e308, 1e308), min_size=3, max_size=3) | st.just([2.5] * 3) | st.just([0.0] * 3)
data_ = st.builds(
    OutputData, names, stages_, stages_, names, values, values,
    st.none() | st.builds(Histogram, st.just(EDGES), st.just([0] * 8 + [4]) | st.just([0] * 9), st.integers(0, 3)),
    st.none() | st.builds(Heat, st.just(2), st.just(3), st.lists(values, min_size=2, max_size=2)),
)  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    stages=st.lists(
        st.builds(StageError, stages_, names, names, st.none() | stages_, errors, errors, note=names), max_size=4
    ),
    layers=layers_,
    shapes=st.lists(
        st.builds(ShapeError, names, st.just({"x": [1]}), stages_, names, errors, errors, names), max_size=3
    ),
    data=st.lists(data_, max_size=1),
    ok=st.booleans(),
    name=names,
)
def test_whatever_was_or_was_not_measured_there_are_a_page_and_a_comment(
    stages: list[StageError],
    layers: list[LayerDiff],
    shapes: list[ShapeError],
    data: list[OutputData],
    ok: bool,
    name: str,
) -> None:
    first = next((index for index, item in enumerate(layers) if item.diverges), None)
    ranking = list(range(len(layers)))[::-1]
    report = DiffReport(
        name,
        name,
        ok,
        stages=stages,
        layers=layers,
        first_diverging=first,
        ranking=ranking,
        shapes=shapes,
        outputs=data,
    )
    html = render_html(report)
    page = Page(without_scripts(html))
    assert page.text and "nan" not in "".join(attrs.get("d", "") for _, attrs in page.tags)
    whole(render_markdown(report))


# --- Markdown ----------------------------------------------------------------------------------------------------


def whole(text: str) -> None:
    """Fails where a table has a row of another length than its head."""
    columns = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            columns = 0
            continue
        cells = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1
        columns = columns or cells
        assert cells == columns, line


def test_markdown_has_the_verdict_the_stages_and_the_worst_layers() -> None:
    report = report_of(300, 2)
    text = render_markdown(report)
    whole(text)
    guilty = report.layers[report.ranking[0]]
    assert text.startswith("## ✕ decoder-24: diverges\n\n**The rewritten and the typed model differ")
    rows_ = [line for line in text.splitlines() if f"`{guilty.node}` **first to diverge**" in line]
    assert len(rows_) == 1 and guilty.source in rows_[0] and "12 not finite" in rows_[0]
    assert "no GPU here can run the engine" in text and "By shape: 3 of 9 disagree" in text
    assert text.count("<details>") == text.count("</details>") == 3


def test_markdown_of_a_model_with_thousands_of_outputs_and_shapes_fits_a_comment() -> None:
    stages = [dataclasses.replace(row, output=f"h{i}" * 90) for i in range(900) for row in small().stages]
    shapes = [ShapeError(f"sampled {i}", {"x": [1, i]}, "exported", f"h{i}", AGREED, AGREED) for i in range(900)]
    text = render_markdown(small(stages=stages, shapes=shapes, layers=[layer(i, node="n" * 5000) for i in range(50)]))
    assert len(text) < 65_536, len(text)
    assert "892 more outputs" in text and "840 more are in the report" in text


@pytest.mark.parametrize(
    "evil", ["a|b", "a\\|b", "`|`", "``x`", "a\n| b", "<b>@me</b>", "[x](http://a)", "**a**", "\\"]
)
def test_text_of_others_stays_text_in_markdown(evil: str) -> None:
    text = render_markdown(hostile(evil))
    whole(text)
    assert "@me" not in re.sub("`[^`]*`|<code>.*?</code>", "", text)
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    assert "<b>" not in re.sub(r"\\<", "", outside)


def test_a_code_span_holds_backticks() -> None:
    assert markdown.code("a`b``c") == "```a`b``c```"
    assert markdown.code("`") == "`` ` ``"
    assert markdown.code("") == ""
    assert markdown.code("a|b*") == "<code>a&#124;b&#42;</code>"
