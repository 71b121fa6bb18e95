"""A bisection finds the nodes that a low precision must leave in float32: few of them, in few builds, and tried."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import bridge
from bridge.diff.bisection import Bisection, bisect
from bridge.diff.judges import Judgement, judged
from bridge.diff.search import Search, Step, merged
from bridge.diff.sensitivity import gains
from bridge.errors import UsageError
from bridge.precision import Precision, Rule

from .support import RTX

FORCED = Precision("fp16", rules=(Rule("fp16", "*", "op"),))
"""Every node in float16, whatever its values are."""


# --- the search --------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    ok: bool
    error: float


class Needing:
    """Suffices where all of ``needed`` are raised at least so far."""

    def __init__(self, needed: Mapping[str, str]) -> None:
        self.needed, self.tried = needed, 0

    def __call__(self, raised: Mapping[str, str]) -> Verdict:
        self.tried += 1
        ok = all(raised.get(name) in (kind, "fp32") for name, kind in self.needed.items())
        return Verdict(ok, 0.5 if ok else math.inf)


def ranked(count: int) -> list[Step]:
    return [Step((f"n{place}",), sensitivity=1 / (place + 1)) for place in range(count)]


def searched(steps: Sequence[Step], needed: Mapping[str, str], limit: int = 15) -> tuple[Search, Needing]:
    trial = Needing(needed)
    search = Search(steps, trial, limit)
    search.suffices({})
    search.run()
    return search, trial


@pytest.mark.parametrize("rank", [0, 1, 7, 40, 399])
def test_one_culprit_is_found_whatever_its_rank(rank: int) -> None:
    search, trial = searched(ranked(400), {f"n{rank}": "fp32"})
    assert search.best is not None and f"n{rank}" in search.best
    assert (len(search.best) == 1 and search.minimal) or (rank == 399 and len(search.best) <= 3), search.best
    assert trial.tried == search.used <= 15


@pytest.mark.parametrize("seed", range(20))
def test_several_culprits_are_found_exactly_where_builds_allow_it(seed: int) -> None:
    chosen = random.Random(seed).sample(range(60), 3)
    needed = {f"n{place}": "fp32" for place in chosen}
    search, _ = searched(ranked(60), needed, limit=60)
    assert search.best == needed and search.minimal, (chosen, search.best)


@pytest.mark.parametrize("seed", range(20))
def test_builds_are_never_exceeded_and_what_is_found_has_been_tried(seed: int) -> None:
    source = random.Random(seed)
    needed = {f"n{place}": "fp32" for place in source.sample(range(300), source.randint(1, 30))}
    search, trial = searched(ranked(300), needed, limit=source.randint(2, 15))
    assert trial.tried <= search.limit
    assert search.best is not None and search.known[frozenset(search.best.items())].ok


def test_nothing_suffices_is_known_only_when_all_was_tried() -> None:
    search, _ = searched(ranked(50), {"another": "fp32"})
    assert search.best is None
    assert frozenset(merged(ranked(50)).items()) in search.known


def test_steps_that_only_help_together_stay_together() -> None:
    steps = [Step(("a", "b"), sensitivity=math.inf), *ranked(10)]
    search, trial = searched(steps, {"a": "fp32", "b": "fp32"})
    assert search.best == {"a": "fp32", "b": "fp32"} and trial.tried == 4


def test_a_step_that_brings_too_much_along_is_made_smaller() -> None:
    steps = [Step(("a", "b", "c", "d"), sensitivity=math.inf), *ranked(10)]
    search, _ = searched(steps, {"c": "fp32"})
    assert search.best == {"c": "fp32"} and search.minimal


def test_of_two_precisions_the_lower_one_that_suffices_is_kept() -> None:
    steps = [Step(("a",), "fp16", 3.0), Step(("b",), "fp16", 2.0), Step(("b",), "fp32", 1.0), Step(("a",), "fp32", 0.5)]
    assert searched(steps, {"a": "fp16", "b": "fp16"})[0].best == {"a": "fp16", "b": "fp16"}
    assert searched(steps, {"a": "fp16", "b": "fp32"})[0].best == {"a": "fp16", "b": "fp32"}


# --- what a model's nodes magnify ----------------------------------------------------------------------------------


def saved(text: str, path: Path, **values: Any) -> Path:
    """A model from ONNX's textual form, with initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\n{text}')
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type.lower()}_{index}"
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()
    )
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def test_a_difference_of_large_numbers_magnifies_the_one_and_not_what_was_added(tmp_path: Path) -> None:
    path = saved(
        "g (float[64] x) => (float[64] y) { a = Add(x, k)\n y = Sub(a, k) }", tmp_path / "m.onnx", k=1000 * np.ones(64)
    )
    found = gains(path, {"x": np.random.default_rng(0).standard_normal(64).astype(np.float32)})
    assert found["a"]["y"] == pytest.approx(1000, rel=0.5)
    assert found["x"]["a"] == pytest.approx(1e-3, rel=0.5)


# --- models ------------------------------------------------------------------------------------------------------

NORMAL = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
WEIGHT = np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32) / 6


def found_in(path: Path, inputs: Mapping[str, Any], folder: Path, **options: Any) -> Bisection:
    wanted = {"precision": FORCED, "fixed_rules": False, "target": RTX, **options}
    return bisect(path, inputs, workdir=folder / "out", **wanted)


def names(found: Bisection) -> set[str]:
    return {item.operator for item in found.kept}


OVERFLOWS = """
    s = Mul({x}, big)
    q = Mul(s, s)
    m = ReduceMean <keepdims = 1> (q, axes)
    r = Sqrt(m)
    {y} = Div(s, r)
"""
BIG = "    big = Constant <value = float {200.0}> ()\n    axes = Constant <value = int64[1] {1}> ()\n"
BODIES = {
    "If": "h2 = If (c) <then_branch = yes () => (float[4,32] t) {"
    + BIG
    + OVERFLOWS.format(x="h", y="t")
    + "}, else_branch = no () => (float[4,32] e) { e = Identity(h) }>",
    "Loop": "h2 = Loop (n, c, h) <body = round (int64 i, bool go, float[4,32] before) => (bool on, float[4,32] after) {"
    + BIG
    + "on = Identity(go)\n"
    + OVERFLOWS.format(x="before", y="after")
    + "}>",
    "Scan": "h2 = Scan <num_scan_inputs = 1, body = step (float[32] one) => (float[1,32] other) {"
    + BIG
    + "zero = Constant <value = int64[1] {0}> ()\n row = Unsqueeze(one, zero)\n"
    + OVERFLOWS.format(x="row", y="other")
    + "}> (h)",
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_culprit_inside_of_control_flow_is_found(kind: str, tmp_path: Path) -> None:
    inner = BODIES[kind]
    last = "z = Squeeze(h2, one_axis)\n" if kind == "Scan" else "z = Identity(h2)\n"
    axis = "one_axis = Constant <value = int64[1] {1}> ()\n"
    path = saved(
        f"g (float[4,32] x, bool c, int64 n) => (float[4,32] y) {{ h = MatMul(x, w)\n {axis} {inner}\n {last}"
        " y = MatMul(z, w) }",
        tmp_path / "m.onnx",
        w=WEIGHT,
    )
    found = found_in(path, {"x": NORMAL, "c": np.array(True), "n": np.array(2)}, tmp_path)
    assert found.status == "found" and found.minimal, found.verdict
    assert math.isinf(found.before.error) or found.before.error > 1
    assert names(found) <= {"Mul", "ReduceMean", "Div"} and "Mul" in names(found), found.kept
    assert found.builds <= 15


def overflowing(folder: Path) -> Path:
    text = OVERFLOWS.format(x="h", y="z")
    return saved(
        f"g (float[4,32] x) => (float[4,32] y) {{ h = MatMul(x, w)\n {BIG} {text} y = MatMul(z, w) }}",
        folder / "m.onnx",
        w=WEIGHT,
    )


def test_the_file_makes_the_conversion_pass_and_the_same_question_has_the_same_answer(tmp_path: Path) -> None:
    path = overflowing(tmp_path)
    found = found_in(path, {"x": NORMAL}, tmp_path)
    assert found.status == "found" and found.file is not None
    assert bridge.convert(path, {"x": NORMAL}, precision=FORCED, target=RTX, build=False).status == "failed"
    after = bridge.convert(path, {"x": NORMAL}, precision=found.file, target=RTX, build=False)
    assert after.status == "rewritten", after.error
    again = found_in(path, {"x": NORMAL}, tmp_path / "again")
    assert (again.kept, again.trials) == (found.kept, found.trials)
    facts = json.loads((tmp_path / "out" / "bisection.json").read_text())
    assert facts["schema"] == 1 and facts["status"] == "found" and facts["builds"] == found.builds
    assert [item["node"] for item in facts["kept"]] == [item.node for item in found.kept]


def test_a_tolerance_that_holds_needs_one_build_and_no_file(tmp_path: Path) -> None:
    path = saved("g (float[4,32] x) => (float[4,32] y) { y = MatMul(x, w) }", tmp_path / "m.onnx", w=WEIGHT)
    found = found_in(path, {"x": NORMAL}, tmp_path, precision="fp16")
    assert (found.status, found.builds, found.kept, found.file) == ("held", 1, [], None)
    assert not (tmp_path / "out" / "precision.yaml").exists()


def test_rules_that_were_given_stand_unless_they_need_not(tmp_path: Path) -> None:
    path = overflowing(tmp_path)
    found = found_in(path, {"x": NORMAL}, tmp_path, fixed_rules=True)
    assert found.status == "nothing suffices" and found.file is None
    assert found.verdict.endswith("and there is no node that may be raised."), found.verdict
    assert "fixed_rules=False" in " ".join(found.notes)
    some = Precision("fp16", rules=(Rule("fp16", "Mul", "op"), Rule("fp32", "Div", "op")))
    found = found_in(path, {"x": NORMAL}, tmp_path / "some", precision=some)
    assert found.status == "found" and found.precision.rules[:2] == some.rules


def test_what_no_set_of_nodes_mends_is_said_so(tmp_path: Path) -> None:
    found = found_in(overflowing(tmp_path), {"x": NORMAL}, tmp_path, judge=lambda precision: Judgement(False, 3.0))
    assert found.status == "nothing suffices" and "do not help" in found.verdict
    assert found.precision == FORCED and found.builds <= 15


def test_where_only_float32_throughout_holds_that_is_what_is_tried_and_found(tmp_path: Path) -> None:
    """``convert`` takes no fp16 of which nothing is in float16."""
    asked: list[Precision] = []

    def judge(precision: Precision) -> Judgement:
        asked.append(precision)
        return Judgement(precision.plain, 0.5 if precision.plain else 2.0)

    found = found_in(overflowing(tmp_path), {"x": NORMAL}, tmp_path, judge=judge, fixed_rules=False)
    assert found.status == "found" and found.precision == Precision.of("fp32") in asked
    assert found.file is not None and Precision.of(found.file) == found.precision


def test_another_judge_decides_and_its_latency_is_told(tmp_path: Path) -> None:
    """As an engine does, of which the first is fast and wrong."""
    asked: list[Precision] = []

    def judge(precision: Precision) -> Judgement:
        asked.append(precision)
        ok = any(rule.precision == "fp32" and "matmul" in rule.pattern.lower() for rule in precision.rules)
        return Judgement(ok, 0.5 if ok else 2.0, "y", "example", 1.1 if ok else 1.0)

    found = found_in(overflowing(tmp_path), {"x": NORMAL}, tmp_path, judge=judge)
    assert found.status == "found" and [item.operator for item in found.kept] == ["MatMul"], found.kept
    assert found.judged_by == "caller" and len(asked) == found.builds <= 15
    assert "+10.0%" in found.latency and "1.000 ms" in found.latency


@pytest.mark.parametrize("target", [RTX, "tensorrt-8.5"])
def test_an_outlier_channel_goes_from_int8_to_fp16_and_no_further(tmp_path: Path, target: str) -> None:
    scale = np.ones(32)
    scale[3] = 300
    path = saved(
        "g (float[4,32] x) => (float[4,32] y) { a = MatMul(x, w)\n b = Mul(a, scale)\n c = MatMul(b, v)\n d = Tanh(c)\n"
        " y = MatMul(d, w) }",
        tmp_path / "m.onnx",
        w=WEIGHT,
        v=WEIGHT / scale[:, None],
        scale=scale,
    )
    options = {"tolerance": bridge.Tolerance(0.05, 1e-3, whole=True), "target": target}
    found = found_in(path, {"x": NORMAL}, tmp_path, precision="int8+fp16", **options)
    assert [(item.node, item.precision) for item in found.kept] == [("matmul_2", "fp16")], found.kept
    assert found.fp32_after == found.fp32_before
    alone = found_in(path, {"x": NORMAL}, tmp_path / "alone", precision="int8", **options)
    assert [(item.node, item.precision) for item in alone.kept] == [("matmul_2", "fp32")], alone.kept


def test_samples_are_held_to_the_tolerance_too(tmp_path: Path) -> None:
    text = "g (float[4,32] x) => (float[4,32] y) { h = Mul(x, x)\n q = MatMul(h, w)\n y = Mul(q, tiny) }"
    path = saved(text, tmp_path / "m.onnx", w=np.ones((32, 32)), tiny=np.float32(1e-3))
    quiet, loud = {"x": NORMAL}, {"x": 100 * NORMAL}
    assert found_in(path, quiet, tmp_path, precision="fp16").status == "held"
    found = found_in(path, quiet, tmp_path, precision="fp16", samples=[quiet, loud])
    assert found.status == "found" and found.before.inputs == "sample 1", found.verdict
    with pytest.raises(UsageError, match=r"^samples: there is no"):
        found_in(path, quiet, tmp_path, samples=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp32"}, "nothing that could be raised"),
        ({"builds": 1}, "allow at least 2"),
        ({"colour": 3}, "'colour' is no option"),
        (
            {"precision": "int8", "target": "tensorrt-8.5", "calibration_algorithm": "MINMAX_CALIBRATION"},
            "quantises by itself",
        ),
    ],
)
def test_what_cannot_be_bisected_is_named(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        found_in(overflowing(tmp_path), {"x": NORMAL}, tmp_path, **options)


def test_an_output_that_is_no_longer_finite_is_infinitely_wrong() -> None:
    from bridge.compare import compare_arrays

    one, lost = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    common: dict[str, Any] = {"stages": ("a", "b"), "inputs": "example", "output": "y", "tolerance": None}
    assert judged([compare_arrays(one, one, **common), compare_arrays(one, lost, **common)]).error == math.inf
    assert judged([compare_arrays(lost, lost, **common)]) == Judgement(True, 0.0, "y", "example")


def test_an_overflow_in_a_transformer_is_named_with_its_torch_line_within_the_bars(tmp_path: Path) -> None:
    from benchmarks import bisection

    found, after, _ = bisection.run(bisection.CASES["overflow"], 6, tmp_path, RTX)
    assert bisection.missed(found, after) == []
    line = Path(bisection.__file__).read_text().splitlines()[int(found.kept[0].source.rpartition(":")[2]) - 1]
    assert "energy = torch.einsum" in line
