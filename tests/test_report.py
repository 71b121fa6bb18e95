"""The HTML reports: what they must say, what they must never say, and that they stand alone."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import Refusal
from bridge.layers import LayerError, TensorError
from bridge.report import render_index, render_report
from bridge.report.stages import stage_picture
from bridge.report.view import badness, closeness, tolerance_ratio
from bridge.result import (
    Comparison,
    ConversionResult,
    Decline,
    Histogram,
    Rewrite,
    TargetInfo,
    TaskCheck,
    TensorInfo,
    Tolerance,
)
from bridge.trade_off import TradeOff

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
EDGES = [10.0**power for power in range(-9, 1)]


class Page(HTMLParser):
    """A page as its elements and the text that a reader sees; fails where elements are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str]]:
        return [
            attrs
            for name, attrs in self.tags
            if name == tag and (css_class in attrs.get("class", "").split() or not css_class)
        ]


def compared(
    reference: str, candidate: str, output: str = "y", error: float | None = 1e-6, **changes: Any
) -> Comparison:
    histogram = None
    if error is not None:
        counts = [0] * (len(EDGES) - 1)
        if error:
            counts[min(max(math.floor(math.log10(error)) + 9, 0), len(counts) - 1)] = 4
        histogram = Histogram(EDGES, counts, zeros=2 if error else 6)
    values: dict[str, Any] = {
        "reference": reference,
        "candidate": candidate,
        "inputs": "example",
        "output": output,
        "reference_shape": [2, 3],
        "candidate_shape": [2, 3],
        "reference_dtype": "float32",
        "candidate_dtype": "float32",
        "max_abs_error": error,
        "mean_abs_error": error,
        "max_rel_error": error,
        "mean_rel_error": error,
        "cosine_similarity": None if error is None else 1.0,
        "psnr": 120.0 if error else None,
        "tolerance_used": error and error / 2e-3,
        "reference_nan": 0,
        "candidate_nan": 0,
        "reference_inf": 0,
        "candidate_inf": 0,
        "histogram": histogram,
        "agreed": True,
        "tolerance": Tolerance(rtol=1e-3, atol=1e-3),
    }
    return Comparison(**(values | changes))


def built(name: str = "model", **changes: Any) -> ConversionResult:
    values: dict[str, Any] = {
        "status": "built",
        "target": TargetInfo("tensorrt-rtx", "1.7.0", installed=True, strongly_typed=True),
        "exporter": "dynamo",
        "comparisons": [compared("torch", "exported"), compared("exported", "rewritten", error=0.0)],
        "seconds": {"export": 2.0, "build": 61.0},
    }
    return ConversionResult(name, **(values | changes))


def failed(name: str = "model", **changes: Any) -> ConversionResult:
    return ConversionResult(name, **({"status": "failed", "stage": "build", "error": "No.\nBecause."} | changes))


def everything() -> ConversionResult:
    """A result in which every field has something to say, and says it in a hostile way."""
    return built(
        HOSTILE,
        error=HOSTILE,
        source=HOSTILE,
        exported_onnx=Path("/tmp/exported.onnx"),
        onnx=Path("/tmp/model.onnx"),
        engine=Path("/tmp/model.engine"),
        inputs=[TensorInfo(HOSTILE, "int32", ["batch", 3], "int64", [[[1, 3], [2, 3], [8, 3]]])],
        outputs=[TensorInfo(HOSTILE, "float32", ["batch", 3], "float64")],
        rewrites=[Rewrite(HOSTILE, HOSTILE, 60, [HOSTILE] * 50)],
        declined=[Decline(HOSTILE, HOSTILE, HOSTILE)] * 20,
        refusals=[Refusal(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)] * 20,
        comparisons=[compared("torch", "exported", HOSTILE, note=HOSTILE)],
        task_check=TaskCheck(True, HOSTILE, "rewritten"),
        notes=[HOSTILE, "see https://example.com/"],
    )


def results_at_every_end() -> list[ConversionResult]:
    stages = [failed(f"failed-{stage}", stage=stage) for stage in ("export", "rewrite", "build", "run", "compare")]
    return [
        built(),
        built("verified", status="verified", comparisons=[compared("rewritten", "engine")]),
        built("rewritten", status="rewritten"),
        built("nothing-measured", comparisons=[], seconds={}, target=None, exporter=None),
        ConversionResult("failed-nowhere"),
        everything(),
        *stages,
    ]


@pytest.mark.parametrize("result", results_at_every_end(), ids=lambda result: result.name[:20])
def test_a_report_is_one_file_that_needs_no_network_and_runs_nothing(result: ConversionResult) -> None:
    for html in (render_report(result), render_index([result], links={result.name: "model/report.html"})):
        page = Page(html)
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
        addresses = [
            value
            for _, attrs in page.tags
            for name, value in attrs.items()
            if name in {"src", "href", "srcset", "action", "data", "xlink:href"}
        ]
        assert all(value.startswith("#") or value == "model/report.html" for value in addresses), addresses
        assert not re.search(r"@import|url\((?!#)", html)
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_names_and_messages_of_others_are_text_and_never_markup() -> None:
    page = Page(render_report(everything()))
    assert page.text.count(HOSTILE) > 20
    assert f"{HOSTILE} ◐ Built, not run" in Page(render_index([everything()], links={})).text


def test_the_verdict_comes_first() -> None:
    page = Page(render_report(built()))
    places = [page.text.index(words) for words in ("Built, not run ", "No GPU here", "Error along the stages")]
    assert places == sorted(places)
    assert page.all("section")[0]["class"] == "verdict status-built"


def test_what_was_built_and_not_run_never_looks_verified() -> None:
    result = built(task_check=TaskCheck(True, "top-1 is the same", "rewritten"))
    page = Page(render_report(result))
    assert "verified" not in page.text.lower()
    assert not [attrs for _, attrs in page.tags if "status-verified" in attrs.get("class", "")]
    assert "on the rewritten model in ONNX Runtime, not on the engine: top-1 is the same" in page.text
    assert "none with the engine" in page.text
    row = Page(render_index([result], links={}))
    assert "verified" not in row.text.lower()


def test_only_verified_is_green() -> None:
    css = render_report(built())
    rules = dict(re.findall(r"\.status-(\w+) \{ --status: var\(--(\w+)\)", css))
    assert rules == {"verified": "good", "built": "built", "rewritten": "neutral", "failed": "bad"}


def test_an_error_is_shown_in_full_and_a_refusal_with_its_origin_and_way_out() -> None:
    refusal = Refusal("GridSample", "/warp/GridSample", "Only 4D", "flow.warp", "flow.py:61", "Make the depth static.")
    html = render_report(failed(error="line one\n  line two", refusals=[refusal]))
    assert "<pre>line one\n  line two</pre>" in html
    text = Page(html).text
    for words in ("Failed at build", *dataclasses.astuple(refusal)):
        assert words in text, words


def test_a_failed_task_check_is_part_of_the_verdict() -> None:
    page = Page(render_report(built(task_check=TaskCheck(False, "IoU 0.61", "rewritten"))))
    assert "Task check failed" in page.text and "IoU 0.61" in page.text
    assert page.text.index("Task check failed") < page.text.index("Error along the stages")


def test_every_figure_of_a_comparison_is_in_the_table() -> None:
    item = compared(
        "rewritten",
        "engine",
        "logits",
        candidate_shape=[2, 4],
        candidate_dtype="float16",
        max_abs_error=1.11e-1,
        mean_abs_error=2.22e-2,
        max_rel_error=3.33e-3,
        mean_rel_error=4.44e-4,
        cosine_similarity=0.9876543,
        psnr=55.55,
        candidate_nan=7,
        reference_inf=9,
        tolerance=Tolerance(0.01, 0.002),
        agreed=False,
        note="the last row is new",
    )
    text = Page(render_report(built(status="failed", comparisons=[item]))).text
    for words in (
        "rewritten → engine", "example", "2 × 3 → 2 × 4", "float32 → float16", "1.11e-01", "2.22e-02", "3.33e-03",
        "4.44e-04", "0.9876543", "55.5 dB", "0 → 7", "9 → 0", "0.01, 0.002", "✕ no", "the last row is new",
    ):  # fmt: skip
        assert words in text, words


def test_the_psnr_is_infinite_only_where_the_outputs_are_equal() -> None:
    equal = Page(render_report(built(comparisons=[compared("torch", "exported", error=0.0)]))).text
    unknown = Page(render_report(built(comparisons=[compared("torch", "exported", error=None, agreed=False)]))).text
    assert "∞" in equal and "All 6 elements exactly equal" in equal
    assert "∞" not in unknown and "–" in unknown


def test_the_picture_shows_every_stage_and_says_which_did_not_run() -> None:
    page = Page(render_report(built()))
    for words in ("torch the reference", "exported against torch", "rewritten against exported", "engine", "not run"):
        assert words in page.text, words
    labelled = [attrs for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert labelled[0]["aria-labelledby"] == "stages-title stages-text"
    ended = {
        "rewritten": "not built",
        "failed": "not reached",
    }
    for status, words in ended.items():
        assert words in Page(render_report(built(status=status))).text


def test_an_onnx_file_as_the_source_has_no_torch_stage() -> None:
    text = Page(render_report(built(exporter=None, comparisons=[compared("exported", "rewritten")]))).text
    assert "exported the reference" in text
    assert "torch" not in text.replace("torch-tensorrt-bridge", "")


def test_larger_errors_are_drawn_higher_and_exact_zeros_on_a_line_of_their_own() -> None:
    from bridge.report.stages import stage_picture

    errors = {"big": 1e-2, "small": 1e-7, "zero": 0.0, "unknown": None}
    result = built(comparisons=[compared("torch", "exported", name, error) for name, error in errors.items()])
    picture = stage_picture(result)
    assert picture is not None
    heights = {line.output: line.markers[0].y for line in picture.lines}
    assert heights["unknown"] < heights["big"] < heights["small"] < heights["zero"] == picture.zero, heights
    assert heights["big"] < picture.tolerances[0].y < heights["small"], "atol is 1e-3"
    assert "0, exact" in Page(render_report(result)).text


@pytest.mark.parametrize("error", [5e-324, 1e-300, 1.7e308])
def test_errors_at_the_ends_of_float64_can_be_drawn(error: float) -> None:
    result = built(comparisons=[compared("torch", "exported", error=error), compared("exported", "rewritten")])
    assert "nan" not in render_report(result).split("<svg", 1)[1].split("</svg>")[0]


def test_the_histogram_has_a_bar_for_every_decade_with_elements_and_one_for_zeros() -> None:
    from bridge.report.histogram import histogram_pictures

    counts = [0, 0, 10, 0, 1, 0, 0, 0, 0]
    item = compared("torch", "exported", histogram=Histogram(EDGES, counts, zeros=5))
    (picture,) = histogram_pictures([item])
    assert picture.bars.count("M") == 3
    assert picture.elements == 16
    assert picture.description == "exactly equal: 5 of 16 elements; 1e-07 to 1e-06: 10; 1e-05 to 0.0001: 1"


def test_a_histogram_without_bins_is_drawn_from_its_zeros() -> None:
    items = [compared("torch", "exported", histogram=Histogram([], [], zeros)) for zeros in (0, 3)]
    assert "All 3 elements exactly equal" in Page(render_report(built(comparisons=items))).text


def test_one_wrong_element_of_a_million_is_still_visible() -> None:
    from bridge.report.histogram import histogram_pictures

    counts = [0, 0, 999_999, 0, 1, 0, 0, 0, 0]
    (picture,) = histogram_pictures([compared("torch", "exported", histogram=Histogram(EDGES, counts, zeros=0))])
    heights = [float(height) for height in re.findall(r"v-([\d.]+)", picture.bars)]
    assert min(heights) >= 1, heights


def test_what_passes_did_and_declined_is_listed() -> None:
    result = built(
        rewrites=[Rewrite("dft_as_matmul", "the parser has no DFT", 60, [f"/node{i}" for i in range(50)])],
        declined=[Decline("grid_sample_3d", "/warp", "the depth is dynamic")],
    )
    text = Page(render_report(result)).text
    for words in ("dft_as_matmul 60 nodes", "The parser has no DFT", "The first 50 of 60 nodes", "/node49",
                  "grid_sample_3d /warp the depth is dynamic"):  # fmt: skip
        assert words in text, words


def test_the_bars_of_time_are_as_long_as_their_stages_took() -> None:
    page = Page(render_report(built(seconds={"export": 10.0, "build": 40.0, "run": 0.0})))
    assert [float(attrs["width"]) for attrs in page.all("rect", "bar-fill")] == [25.0, 100.0, 0.4]
    assert "10.0 s 20 %" in page.text and "most of it in build" in page.text


def test_changed_types_and_profiles_are_shown() -> None:
    text = Page(render_report(everything())).text
    for words in ("int64 → int32 batch × 3 1 × 3 2 × 3 8 × 3", "float64 → float32", "model.engine", "strongly typed"):
        assert words in text, words
    assert "/tmp/model.engine" not in text, "a report is passed on, and the folder with it"


def test_what_the_builder_was_told_is_shown() -> None:
    told = {"workspace": 1 << 30, "device_types": {HOSTILE: "DLA"}}
    assert "Builder workspace=1073741824 , device_types=" in Page(render_report(built(builder=told))).text
    assert "<dt>Builder" not in render_report(built())


def test_each_of_several_profiles_has_a_line() -> None:
    spans = [[[1, 3], [2, 3], [4, 3]], [[8, 3], [16, 3], [32, 3]]]
    page = render_report(built(inputs=[TensorInfo("x", "float32", ["n", 3], "float32", spans)]))
    assert "<td>1 × 3<br>8 × 3</td>" in page and "<td>4 × 3<br>32 × 3</td>" in page


def test_a_report_of_hundreds_of_outputs_folds_those_that_agree() -> None:
    items = [
        compared(*pair, f"h{i}", error=1e-6, inputs=inputs)
        for i in range(150)
        for pair in (("torch", "exported"), ("exported", "rewritten"))
        for inputs in ("example", "min", "max")
    ]
    items.append(compared("rewritten", "engine", "h77", error=0.5, agreed=False))
    page = Page(render_report(built(status="failed", stage="compare", comparisons=items)))
    blocks = page.all("details", "output")
    assert len(blocks) == 150
    assert ["open" in attrs for attrs in blocks] == [True] + [False] * 149
    assert page.text.index("h77 ✕ 1 of 7 outside the tolerance") < page.text.index("138 more outputs")
    assert len(page.all("g", "line")) == 450


@pytest.mark.parametrize("count", [1, 6, 7, 12, 13])
def test_every_output_is_named_once_among_the_outputs(count: int) -> None:
    page = Page(render_report(built(comparisons=[compared("torch", "exported", f"h{i}") for i in range(count)])))
    assert len(page.all("details", "output")) == count
    assert ("1 other output," in page.text) == (count == 7)
    assert ("1 more output" in page.text) == (count == 13)


def test_the_index_lists_the_worst_first() -> None:
    near = compared("torch", "exported", error=1e-3)
    far = compared("torch", "exported", error=1e-7)
    order = [
        failed("a-failed-at-export", stage="export"),
        failed("failed-at-build"),
        built("task-failed", task_check=TaskCheck(False, "no", "rewritten"), comparisons=[far]),
        built("unmeasured", comparisons=[]),
        built("near-the-tolerance", comparisons=[far, near]),
        built("verified", status="verified", comparisons=[far]),
        built("exact", comparisons=[compared("torch", "exported", error=0.0)]),
    ]
    mixed = [order[place] for place in (3, 6, 0, 5, 2, 4, 1)]
    assert [item.name for item in sorted(mixed, key=badness)] == [item.name for item in order]
    page = Page(render_index(mixed, links={item.name: f"{item.name}/report.html" for item in order}))
    assert [attrs["href"] for attrs in page.all("a")] == [f"{item.name}/report.html" for item in order]


def test_a_large_error_under_a_large_tolerance_is_no_worse_than_a_small_one_at_its_limit() -> None:
    loose = compared("torch", "exported", error=0.1, tolerance=Tolerance(0.0, 10.0), tolerance_used=0.01)
    tight = compared("torch", "exported", error=1e-6, tolerance=Tolerance(0.0, 1.05e-6), tolerance_used=0.95)
    assert badness(built("tight", comparisons=[tight])) < badness(built("loose", comparisons=[loose]))


def test_the_tolerance_ratio_is_the_measured_one_and_infinite_where_no_tolerance_covers_the_difference() -> None:
    half = compared("torch", "exported", error=1e-3, tolerance_used=0.5)
    assert tolerance_ratio(half) == 0.5 and closeness(half) == "50 % of the tolerance"
    assert tolerance_ratio(dataclasses.replace(half, tolerance_used=3.0, agreed=False)) == 3.0
    nan_elsewhere = dataclasses.replace(half, agreed=False)
    assert tolerance_ratio(nan_elsewhere) == math.inf
    must_be_equal = dataclasses.replace(half, tolerance=Tolerance(0.0, 0.0), tolerance_used=None, agreed=False)
    assert tolerance_ratio(must_be_equal) == math.inf and closeness(must_be_equal) == "outside the tolerance"
    assert tolerance_ratio(compared("torch", "exported", error=None, tolerance_used=None)) == 0.0


def test_the_index_counts_each_status_and_shows_the_line_that_matters() -> None:
    results = [failed("f1", seconds={"export": 1.0, "build": 2.5}), failed("f2", error="x" * 1000), built("b")]
    page = Page(render_index(results, title="Nightly", links={"b": "b/report.html"}))
    for words in (
        "Nightly",
        "Failed 2",
        "Built, not run 1",
        "f1 No.",
        "Failed at build",
        "3.5 s",
        "tensorrt-rtx 1.7.0",
    ):
        assert words in page.text, words
    assert "Because." not in page.text
    assert "x" * 300 not in page.text
    assert [attrs["href"] for attrs in page.all("a")] == ["b/report.html"]


def test_an_index_of_nothing_says_so() -> None:
    assert "The run converted nothing." in Page(render_index([], links={})).text


def test_a_result_read_back_from_json_gives_the_same_report(tmp_path: Path) -> None:
    result = everything()
    path = tmp_path / "result.json"
    path.write_text(result.to_json(tmp_path), encoding="utf-8")
    assert render_report(ConversionResult.load(path)) == render_report(result)


def test_importing_the_reports_does_not_import_jinja2() -> None:
    import subprocess
    import sys

    code = "import sys, bridge.report; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def lowered(**changes: Any) -> ConversionResult:
    errors = TensorError(0.25, 1.0, 0), TensorError(0.1, 1.0, 2)
    layer = LayerError("y", HOSTILE, "Conv", "stem", "net.py:7", "float16", 3.0, *errors)
    values: dict[str, Any] = {
        "precision": "int8+fp16",
        "comparisons": [compared("exported", "rewritten"), compared("rewritten", "typed", error=1e-3)],
        "precisions": {"int8": 0.9, "fp16": 0.0995, "fp32": 0.0005},
        "not_as_asked": [
            {"name": "l", "node": "n", "kind": "CONVOLUTION", "precision": "fp32", "asked": "fp16", "share": 0.0005}
        ],
        "kept": {"by default: it adds up": ["node_mean", HOSTILE]},
        "layers": [layer],
    }
    return built(**(values | changes))


def test_a_lowered_precision_is_told_with_what_was_kept_and_the_error_by_layer() -> None:
    page = Page(render_report(lowered()))
    for words in ("int8 90.0 %", "under 0.1 %", "By default: it adds up 2 nodes", "2 values not finite", "net.py:7"):
        assert words in page.text, words
    assert not page.all("img"), "a node's name is text, whatever it is"
    assert "2 nodes kept out of what was asked" in page.text


def test_the_picture_has_the_typed_model_where_there_is_one() -> None:
    assert [column.stage for column in picture_of(lowered())] == ["exported", "rewritten", "typed", "engine"]
    plain = built(comparisons=[compared("torch", "exported")])
    assert "typed" not in [column.stage for column in picture_of(plain)]
    assert "precision.html" not in render_report(plain) and "Not in the low precision" not in render_report(plain)


def picture_of(result: ConversionResult) -> list[Any]:
    picture = stage_picture(result)
    assert picture is not None
    return picture.columns


def test_a_failure_of_the_precision_has_a_sentence() -> None:
    failed = ConversionResult("m", status="failed", stage="precision", error="int4 was asked for")
    assert "cannot be computed in the precision" in Page(render_report(failed)).text


def test_the_index_sets_the_precisions_of_a_model_side_by_side() -> None:
    results = {"fp32": built("m-fp32"), "fp16": built("m-fp16", precisions={"fp16": 1.0})}
    page = Page(render_index(list(results.values()), links={}, trade_offs=[TradeOff.of("m", results)]))
    assert "2 precisions" in page.text and "not run fp16 100%" in page.text
