"""Two runs compared: what counts as a regression, and that every form of the report is well-formed and says it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridge import cli
from bridge.diff.runs import Limits, ModelChange, Run, RunsReport, compare_runs, read_run
from bridge.diff.runs_report import as_html, as_junit, as_markdown, as_text
from bridge.errors import UsageError
from bridge.result import Comparison, ConversionResult, Latency

from .test_report import HOSTILE, Page, compared

UGLY = HOSTILE + " a|b `c` ]]> \x00\x1b[31m \ud800 *d*\nnext line"
"""What a name or an error of other people's can hold."""


def error(output: str, value: float, inputs: str = "example", stage: str = "engine", **changes: Any) -> Comparison:
    return compared("rewritten", stage, output, value, **{"inputs": inputs, "tolerance_used": value / 1e-3, **changes})


def result(name: str, status: Any = "verified", **changes: Any) -> ConversionResult:
    made = ConversionResult(name, status, comparisons=[error("y", 1e-4)])
    made.engine_bytes, made.latency = 1 << 20, Latency(2.0, 1.0, 100)
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def run(*results: ConversionResult, path: str = "run", **facts: Any) -> Run:
    return Run(path, list(results), **facts)


def report(a: ConversionResult, b: ConversionResult, **limits: Any) -> RunsReport:
    return compare_runs(run(a, path="a"), run(b, path="b"), Limits(**limits))


def only(found: RunsReport) -> ModelChange:
    (model,) = found.models
    return model


def write(folder: Path, *results: ConversionResult) -> Path:
    """As a batch does."""
    for item in results:
        (folder / item.name).mkdir(parents=True)
        (folder / item.name / "result.json").write_text(item.to_json(folder / item.name))
    summary = {
        "models": [item.to_dict(folder) for item in results],
        "started": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.9"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


# --- what is a regression ----------------------------------------------------------------------------------------


def test_a_run_is_no_worse_than_itself() -> None:
    found = report(result("net"), result("net"))
    assert found.ok and found.exit_status == 0 and found.verdict == "No regression in 1 model."


@pytest.mark.parametrize(
    ("before", "after", "limit", "regressed"),
    [
        ("verified", "built", "drop", True),
        ("built", "rewritten", "drop", True),
        ("rewritten", "failed", "drop", True),
        ("verified", "built", "failed", False),
        ("verified", "failed", "failed", True),
        ("verified", "failed", None, False),
        ("failed", "failed", "drop", False),
        ("failed", "verified", "drop", False),
    ],
)
def test_a_lower_status_is_a_regression_as_far_as_the_limit_says(
    before: str, after: str, limit: Any, regressed: bool
) -> None:
    found = report(result("net", before), result("net", after), status=limit)
    assert only(found).status.regression is regressed and found.ok is not regressed


def test_why_a_model_failed_is_said_wherever_the_regression_is() -> None:
    broken = result("net", "failed", error="the parser refuses node_7\nand more")
    found = report(result("net"), broken)
    words = "status verified → failed (the parser refuses node_7)"
    for text in (found.verdict, as_text(found), as_markdown(found).replace("\\", ""), as_junit(found)):
        assert words in text, text
    new = compare_runs(run(result("net")), run(result("net"), replace(broken, name="other")))
    assert new.ok and "only in the second run: the parser refuses node_7" in as_text(new)


def test_what_may_have_been_renamed_is_said_and_not_guessed() -> None:
    before = run(result("a", source="nets.A"), result("b", source="nets.B"), result("c"))
    after = run(result("a2", source="nets.A"), result("b", source="nets.B"), result("c"))
    found = compare_runs(before, after)
    assert [model.name for model in found.regressed] == ["a"]
    assert "a is only in the first run and a2 only in the second, and both are of nets.A" in found.notes[0]
    assert found.notes[0] in Page(as_html(found)).text
    twice = compare_runs(before, run(result("a2", source="nets.A"), result("a3", source="nets.A"), result("c")))
    assert not twice.notes, "which of the two it became, nobody knows"


def precisions(folder: Path, **status: Any) -> Path:
    """As ``convert(precision=[…])`` does: models of one name, each in a folder of its own."""
    for name in ("fp32", "fp16", "bf16"):
        place = folder / name
        place.mkdir(parents=True)
        made = result("net", status.get(name, "verified"), precision=name)
        (place / "result.json").write_text(made.to_json(place))
    return folder


def test_models_of_one_name_are_told_apart_by_their_folders_and_none_is_left_out(tmp_path: Path) -> None:
    before, after = precisions(tmp_path / "a"), precisions(tmp_path / "b", fp16="failed")
    found = compare_runs(before, after)
    assert [model.name for model in found.models] == ["fp16/net", "bf16/net", "fp32/net"]
    assert [model.name for model in found.regressed] == ["fp16/net"] and found.exit_status == 1
    assert not compare_runs(before, after / "bf16").ok, "the other two are gone"
    (tmp_path / "c" / "fp16").mkdir(parents=True)
    (after / "fp16" / "result.json").rename(tmp_path / "c" / "fp16" / "result.json")
    one = compare_runs(before, tmp_path / "c")
    names = {model.name: model.status.after for model in one.models}
    assert names == {"fp16/net": "failed", "fp32/net": None, "bf16/net": None}, "the name is shared in one run alone"


def test_models_of_one_name_that_nothing_tells_apart_are_refused() -> None:
    with pytest.raises(UsageError, match="twice: has several models called 'net', and nothing tells them apart"):
        compare_runs(run(result("net")), run(result("net"), result("net", "failed"), path="twice"))


def test_a_model_that_is_gone_is_a_regression_and_a_new_one_is_not() -> None:
    found = compare_runs(run(result("old"), result("both")), run(result("both"), result("new", "failed")))
    regressed = {model.name: bool(model.regressions) for model in found.models}
    assert regressed == {"old": True, "both": False, "new": False}
    assert found.models[0].name == "old", "what regressed comes first"


@pytest.mark.parametrize(
    ("before", "after", "limit", "regressed"),
    [
        (1e-4, 1.9e-4, 2.0, False),
        (1e-4, 2.1e-4, 2.0, True),
        (1e-4, 2.1e-4, 3.0, False),
        (1e-4, 2.1e-4, None, False),
        (0.0, 1e-4, 2.0, True),  # no factor, and more than noise
        (1e-9, 9e-6, 2.0, False),  # 9,000 times, and under 1 % of the tolerance: rounding
    ],
)
def test_an_error_may_grow_by_the_factor_and_within_noise(
    before: float, after: float, limit: float | None, regressed: bool
) -> None:
    a, b = (result("net", comparisons=[error("y", value)]) for value in (before, after))
    change = only(report(a, b, accuracy=limit)).accuracy
    assert change.regression is regressed, change
    assert change.where == "y at example, rewritten → engine"


def test_the_noise_that_is_not_compared_can_be_set() -> None:
    a, b = (result("net", comparisons=[error("y", value)]) for value in (1e-9, 9e-6))
    assert report(a, b).ok and not report(a, b, noise=0.0).ok


def test_an_output_that_no_longer_agrees_is_a_regression_however_large_the_factor_may_be() -> None:
    a = result("net", comparisons=[error("y", 0.9e-3)])
    b = result("net", comparisons=[error("y", 1.1e-3, agreed=False)])
    change = only(report(a, b, accuracy=100.0)).accuracy
    assert change.regression and change.note == "no longer agrees"
    lost = result("net", comparisons=[error("y", 0.0, max_abs_error=None, agreed=False, note="shapes differ")])
    change = only(report(a, lost)).accuracy
    assert change.regression and "shapes differ" in change.note


def test_of_many_outputs_the_worst_regression_is_named_and_all_are_listed() -> None:
    a = result("net", comparisons=[error(name, 1e-4) for name in "xyz"])
    b = result("net", comparisons=[error("x", 3e-4), error("y", 1e-5), error("z", 9e-4)])
    model = only(report(a, b))
    assert model.accuracy.where.startswith("z at example") and model.accuracy.factor == pytest.approx(9)
    assert [change.where[0] for change in model.outputs] == ["z", "x"]


def test_what_is_no_longer_compared_is_said() -> None:
    a = result("net", comparisons=[error("y", 1e-4), error("y", 1e-4, "max")])
    model = only(report(a, result("net")))
    assert model.notes == ["no longer compared: y at max, rewritten → engine"]


def test_an_output_that_is_no_longer_compared_at_all_is_a_regression() -> None:
    a, b = result("net"), result("net", comparisons=[error("logits", 1e-9)])
    change = only(report(a, b)).accuracy
    assert change.regression and (change.where, change.note) == ("y", "is no longer compared")
    assert report(a, b, accuracy=None).ok
    assert not only(report(a, result("net", "failed", comparisons=[]))).accuracy.regression, "its status says it"


@pytest.mark.parametrize(
    ("after", "limits", "regressed", "improved"),
    [
        (1.05, {}, False, False),
        (1.2, {}, True, False),
        (1.2, {"latency": 1.5}, False, False),
        (1.2, {"latency": None}, False, False),
        (0.5, {}, False, True),
        (1.2, {"latency_noise": 0.5}, False, False),
    ],
)
def test_latency_may_grow_by_the_factor(after: float, limits: Any, regressed: bool, improved: bool) -> None:
    change = only(report(result("net"), result("net", latency=Latency(9.0, after, 10)), **limits)).latency
    assert (change.before, change.after, change.regression, change.improved) == (1.0, after, regressed, improved)


def test_a_latency_that_was_not_measured_is_no_regression_and_is_said() -> None:
    change = only(report(result("net"), result("net", latency=None))).latency
    assert not change.regression and change.note == "not measured (latency: true, --latency) in the second run"


def test_an_engine_may_grow_by_the_factor_and_its_file_is_asked_where_the_result_is_silent(tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    engine.write_bytes(bytes(3000))
    a, b = result("net", engine_bytes=1000), result("net", engine_bytes=None, engine=engine)
    change = only(report(a, b)).size
    assert (change.before, change.after, change.regression) == (1000, 3000, True)
    assert report(a, b, size=4.0).ok


def test_another_precision_or_exporter_is_noted() -> None:
    a = result("net", precision="fp32", exporter="dynamo")
    b = result("net", precision="fp16", exporter="torchscript")
    assert only(report(a, b)).notes == ["precision: fp32 → fp16", "exporter: dynamo → torchscript"]


@pytest.mark.parametrize("wrong", [{"accuracy": 0.5}, {"size": float("nan")}, {"status": "worse"}, {"noise": -1.0}])
def test_a_limit_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Limits(**wrong)


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_run_is_read_from_its_summary_its_results_or_one_of_its_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", result("one"), result("two"))
    whole = read_run(folder)
    assert [item.name for item in whole.results] == ["one", "two"] and whole.versions == {"torch": "2.9"}
    assert [item.name for item in read_run(folder / "summary.json").results] == ["one", "two"]
    (folder / "summary.json").unlink()
    assert [item.name for item in read_run(folder).results] == ["one", "two"]
    assert [item.name for item in read_run(folder / "one").results] == ["one"]


def test_two_conversions_are_compared_whatever_they_are_called(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", result("one"), result("two", "failed"))
    found = compare_runs(folder / "one", folder / "two")
    assert found.notes == ["one is compared with two"] and only(found).status.regression


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"models": [', "is no JSON, or was cut short"),
        ("[]", "is neither a summary.json nor a result.json"),
        ('{"models": [{"name": 3, "status": "verified"}]}', "is not what a conversion writes"),
        ('{"models": [4]}', "is not what a conversion writes"),
        ('{"models": [], "versions": ["a"]}', "is not what a conversion writes"),
        ('{"models": [], "versions": null}', "is not what a conversion writes"),
    ],
)
def test_a_run_that_cannot_be_read_is_refused_by_name(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        read_run(tmp_path)
    assert str(tmp_path / "summary.json") in str(caught.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is no run"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="no such file or folder"):
        read_run(tmp_path / "none")
    with pytest.raises(UsageError, match="no model in common"):
        compare_runs(run(result("a"), path="x"), run(result("b"), path="y"))


# --- reports -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bad() -> RunsReport:
    """Every kind of change, and names that hold the marks of every form."""
    slow = result("slow", latency=Latency(3, 3, 10), engine_bytes=9 << 20, precision="fp16")
    before = run(
        *(result(name) for name in ("same", "slow", UGLY, "gone")),
        result("mended", "failed"),
        path=UGLY,
        started="then",
    )
    after = run(result("same"), slow, result(UGLY, "failed", error=UGLY), result("mended"), result("new"), path="b")
    return compare_runs(
        replace(before, versions={"torch": "2.9", "tensorrt": "10.1"}),
        replace(after, versions={"torch": "2.9", "tensorrt": "10.2"}),
    )


def test_the_json_is_plain_and_has_a_version(bad: RunsReport) -> None:
    values = json.loads(bad.to_json())
    assert values["schema"] == 1 and values["ok"] is False and values["verdict"] == bad.verdict
    slow = next(model for model in values["models"] if model["name"] == "slow")
    assert slow["latency"] == {
        "check": "latency",
        "before": 1.0,
        "after": 3,
        "factor": 3.0,
        "regression": True,
        "improved": False,
        "where": "",
        "note": "",
    }


def test_junit_is_well_formed_and_each_regression_is_one_failure(bad: RunsReport) -> None:
    root = ET.fromstring(as_junit(bad).encode())
    cases = root.findall("./testsuite/testcase")
    failures = [(case.get("classname"), case.get("name")) for case in cases if case.find("failure") is not None]
    wanted = [(model.name, change.check) for model in bad.models for change in model.regressions]
    assert len(failures) == len(wanted) == 4 and ("slow", "latency") in failures and ("gone", "status") in failures
    assert root.get("tests") == str(len(cases)) == str(4 * len(bad.models))
    assert root.get("failures") == "4"
    assert root.get("skipped") == str(sum(case.find("skipped") is not None for case in cases))
    ugly = next(case for case in cases if "script" in str(case.get("classname")))
    failure = ugly.find("failure")
    assert failure is not None and failure.text is not None and "<script>alert('x')</script>" in failure.text


def test_markdown_keeps_names_out_of_its_own_marks(bad: RunsReport) -> None:
    text = as_markdown(bad)
    assert text.startswith("**✕ ") and "<script>" not in text and "<img" not in text
    table = [line for line in text.splitlines() if line.startswith("| ") and "→" in line and "status" not in line]
    rows = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert rows == {6, 5}, "every row has the cells of its table"
    assert any("**1 ms → 3 ms (× 3)**" in line.replace("\\", "") for line in table), table


def test_a_long_run_makes_markdown_that_fits_a_comment() -> None:
    before = [result(f"model-{index}") for index in range(1000)]
    text = as_markdown(compare_runs(run(*before), run(*before)))
    assert "800 more models without a regression." in text and len(text) < 65536


def test_the_page_stands_alone_and_says_what_regressed(bad: RunsReport) -> None:
    html = as_html(bad)
    page = Page(html)
    assert "<script" not in html and "http" not in re.sub(r"http-equiv", "", html)
    assert "Regressed" in page.text and "latency 1 ms → 3 ms (3 times)" in page.text
    assert "tensorrt 10.1 → 10.2" in page.text and "torch 2.9" not in page.text
    assert HOSTILE.split(">")[0] in page.text, "names are shown as they are"


def test_the_words_for_a_terminal_name_each_regression_and_what_else_changed(bad: RunsReport) -> None:
    text = as_text(bad)
    assert "slow: size 1 MiB → 9 MiB (9 times)" in text
    assert "gone: status verified → absent (only in the first run)" in text
    assert "mended: status failed → verified" in text and "slow: precision: fp32 → fp16" in text


def test_a_run_of_equals_says_so_in_every_form() -> None:
    found = report(result("net"), result("net"))
    assert "No regression in 1 model." in as_text(found) and "No regression" in Page(as_html(found)).text
    assert as_markdown(found).startswith("**✓ No regression")
    assert ET.fromstring(as_junit(found).encode()).get("failures") == "0"


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    a = write(tmp_path / "a", result("net"), result("other"))
    b = write(tmp_path / "b", result("net", latency=Latency(2, 1.4, 9)), result("other", "built", engine_bytes=1 << 21))
    return str(a), str(b)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 1),
        (["--status", "off", "--latency", "1.5", "--size", "2"], 0),
        (["--status", "off", "--latency", "off", "--size", "off"], 0),
        (["--status", "failed", "--latency", "off", "--size", "off"], 0),
        (["--status", "off", "--latency", "off"], 1),
        (["--status", "off", "--size", "off"], 1),
    ],
)
def test_the_exit_status_is_1_beyond_the_limits(runs: tuple[str, str], arguments: list[str], status: int) -> None:
    assert cli.main(["diff", *runs, *arguments]) == status


def test_all_forms_are_written(runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert cli.main(["diff", *runs, "-o", str(out)]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["runs.html", "runs.json", "runs.md", "runs.xml"]
    assert json.loads((out / "runs.json").read_text())["before"]["path"] == runs[0]
    ET.parse(out / "runs.xml")
    assert "2 of 2 models regressed in status, latency and size" in capsys.readouterr().out


def test_json_on_the_terminal_is_json_alone(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", *runs, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--accuracy", "much"], "'much' is neither a factor"),
        (["--accuracy", "0.1"], "is no factor from 1 on"),
        (["--metric", "m:f"], "--metric is of a model, and two runs were given"),
    ],
)
def test_a_wrong_call_is_refused(
    runs: tuple[str, str], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: int | str | None = cli.main(["diff", *runs, *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2 and words in capsys.readouterr().err
