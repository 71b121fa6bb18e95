"""Other tolerances for what was measured: exactly what measuring with them would have said, and nothing runs again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as some
import numpy as np
import pytest

from bridge import cli
from bridge.compare import compare_arrays
from bridge.diff.figures import Tally
from bridge.diff.frontier import frontier, merged, tolerance_used
from bridge.diff.model import DiffReport, Error, LayerDiff, ShapeError, StageError
from bridge.diff.rejudge import rejudge
from bridge.diff.verdict import of_idle, verdict
from bridge.errors import UsageError
from bridge.result import Tolerance

NUMBERS = arrays.arrays(
    np.float32,
    some.integers(0, 40),
    elements=some.sampled_from([0.0, -1.0, 1.0, 3.0, 1e-6, 1e6, np.inf, np.nan]) | some.floats(-100, 100, width=32),
)
LIMITS = some.sampled_from([0.0, 1e-6, 1e-3, 0.5, 1.0, 100.0]) | some.floats(0, 10)


@hypothesis.given(NUMBERS, some.integers(0, 2**32 - 1), LIMITS, LIMITS)
def test_a_frontier_says_of_any_tolerance_what_all_elements_do(
    reference: Any, seed: int, rtol: float, atol: float
) -> None:
    random = np.random.default_rng(seed)
    noise = random.standard_normal(reference.shape) * 10.0 ** random.integers(-6, 3, reference.shape)
    candidate = (reference + noise * (random.random(reference.shape) > 0.3)).astype(np.float32)
    tolerance = Tolerance(rtol, atol)
    whole = compare_arrays(reference, candidate, stages=("a", "b"), inputs="", output="y", tolerance=tolerance)
    for points in (
        frontier(reference, candidate),
        merged([frontier(reference[i::3], candidate[i::3]) for i in range(3)]),
    ):
        used = tolerance_used(points, tolerance)
        if whole.tolerance_used is None:
            assert used is None or not points
        else:
            assert used == pytest.approx(whole.tolerance_used, rel=1e-9), points


def test_a_frontier_of_many_elements_is_small() -> None:
    random = np.random.default_rng(0)
    reference = random.standard_normal(3_000_000).astype(np.float32)
    points = frontier(reference, reference * (1 + 1e-3 * random.standard_normal(reference.size).astype(np.float32)))
    assert 1 < len(points) < 50
    assert points == sorted(points) and [y for _, y in points] == sorted(y for _, y in points)


def row(
    stage: Any, before: Any, output: str, reference: Any, candidate: Any, given: Any = None, precision: str = "fp32"
) -> StageError:
    tally = Tally((before, stage), output, given, precision)
    tally.add(np.asarray(reference), np.asarray(candidate), "one")
    error = tally.error()
    return StageError(stage, output, "1 sample", before, error, error, tally.tolerance, tally.integers)


def report(given: Any = None) -> DiffReport:
    """``y`` is off by 0.01 at 1, and by 1 at 1000; the integers ``n`` by 1."""
    rows = [
        StageError("torch", "y", "1 sample"),
        row("exported", "torch", "y", [1.0, 1000.0], [1.01, 1001.0], given),
        row("exported", "torch", "n", [1, 2], [1, 3], given),
    ]
    error = rows[1].added
    return DiffReport(
        "net", "?", False, stages=rows, shapes=[ShapeError("min", {"x": [1]}, "exported", "y", error, error)]
    )


def agreed(found: DiffReport) -> dict[str, bool | None]:
    return {one.output: one.added.agreed for one in found.stages if one.added is not None}


@pytest.mark.parametrize(
    ("tolerance", "wanted"),
    [
        (Tolerance(1e-3, 1e-4), False),
        (Tolerance(1e-2, 1e-4), True),
        (Tolerance(0, 0.5), False),
        (Tolerance(0, 1.5), True),
        (Tolerance(1e-3, 1e-2), True),
        (Tolerance(0.9e-3, 1e-2), False),
    ],
)
def test_a_diff_judged_anew_says_what_measuring_again_would(tolerance: Tolerance, wanted: bool) -> None:
    anew, measured = rejudge(report(), tolerance), report(tolerance)
    assert agreed(anew) == agreed(measured) == {"y": wanted, "n": False}
    for one, other in zip(anew.stages, measured.stages, strict=True):
        assert one.tolerance == other.tolerance
        if one.added is not None and other.added is not None:
            assert one.added.tolerance_used == (
                None if other.added.tolerance_used is None else pytest.approx(other.added.tolerance_used)
            )
    shape = anew.shapes[0].added
    assert shape is not None and shape.agreed is wanted
    assert "judged anew" in anew.notes[-1] and f"atol {tolerance.atol:g}" in anew.notes[-1]


def test_layers_are_held_to_a_tolerance_for_all_outputs() -> None:
    layers = [
        LayerDiff("exported", "rewritten", name, name, "Op", precision=precision, introduced=Error(relative, 1.0))
        for name, precision, relative in (("a", "float32", 5e-3), ("b", "float32", 5e-2), ("i", "int64", 1e-9))
    ]
    found = dataclasses.replace(report(), layers=layers, first_diverging=None, ranking=[1, 0, 2])
    for rtol, expected in ((1e-3, "abi"), (1e-2, "bi"), (0.1, "i")):
        anew = rejudge(found, Tolerance(rtol, 1e3))
        assert [layer.tensor for layer in anew.layers if layer.diverges] == list(expected)
        assert anew.first_diverging is not None and anew.layers[anew.first_diverging].tensor == expected[0]
    assert rejudge(found, {"y": Tolerance(1, 1)}).layers == layers


def test_integers_are_loosened_by_name_alone() -> None:
    assert agreed(rejudge(report(), Tolerance(1, 5))) == {"y": True, "n": False}
    anew = rejudge(report(), {"n": Tolerance(0, 1), "y": Tolerance(1, 1)})
    assert agreed(anew) == {"y": True, "n": True} and anew.ok and "agree on 1 sample" in anew.verdict


def test_integers_of_a_lower_precision_are_loosened_by_name_alone() -> None:
    """A share of them may differ there, and that is a tolerance like any other."""
    rows = [row("typed", "rewritten", "n", [1, 2], [1, 3], precision="fp16")]
    found = DiffReport("net", "?", False, stages=rows)
    assert rows[0].tolerance is not None and rows[0].tolerance.rtol > 0
    assert agreed(rejudge(found, Tolerance(1, 5))) == {"n": False}
    assert agreed(rejudge(found, {"n": Tolerance(0, 1)})) == {"n": True}


def test_what_is_not_finite_in_the_same_places_no_tolerance_makes_agree() -> None:
    bad = DiffReport("net", "?", False, stages=[row("exported", "torch", "y", [1.0, 2.0], [1.0, np.nan])])
    assert agreed(rejudge(bad, Tolerance(10, 10))) == {"y": False}
    other = DiffReport("net", "?", False, stages=[row("exported", "torch", "y", [1.0, 2.0], [1.0])])
    assert agreed(rejudge(other, Tolerance(10, 10))) == {"y": False}


def test_a_sample_of_another_shape_leaves_no_figures_and_no_tolerance_makes_it_agree() -> None:
    """Not even where another sample's figures are small."""
    tally = Tally(("torch", "exported"), "y", None, "fp32")
    for candidate in ([1.0, 2.0], [1.0]):
        tally.add(np.asarray([1.0, 2.0]), np.asarray(candidate), "one")
    error = tally.error()
    assert error == Error(None, None, agreed=False)
    rows = [StageError("torch", "y", "2 samples"), StageError("exported", "y", "2 samples", "torch", error, error)]
    assert "is off by another shape from torch" in verdict("net", rows, [], [], [], None, [])
    assert not rejudge(DiffReport("net", "?", False, stages=rows), Tolerance(10, 10)).ok


def test_what_no_tolerance_is_for_takes_no_share_of_one() -> None:
    """One sample agrees, the other is off where nothing is allowed."""
    tally = Tally(("torch", "exported"), "n", None, "fp32")
    for candidate in ([1, 2], [1, 3]):
        tally.add(np.asarray([1, 2]), np.asarray(candidate), "one")
    error = tally.error()
    assert error is not None and error.agreed is False and error.tolerance_used is None


def test_the_figure_of_integers_is_no_norm() -> None:
    rows = [StageError("torch", "n", "1 sample"), row("typed", "torch", "n", [1, 200], [2, 200], precision="fp16")]
    assert "'n' of the typed model is off by up to 1 from torch" in verdict("net", rows, [], [], [], None, [])


def test_that_nothing_was_finite_is_said_by_a_diff_that_is_judged_anew_too() -> None:
    nan = [float("nan")] * 2
    rows = [StageError("torch", "y", "1 sample"), row("exported", "torch", "y", nan, nan)]
    found = DiffReport("net", "?", True, stages=rows, notes=[of_idle("y")])
    assert "though nothing of 'y' is finite" in rejudge(found, Tolerance(1, 1)).verdict


def test_a_diff_of_nothing_is_no_agreement() -> None:
    anew = rejudge(DiffReport("net", "?", True, stages=[]), {"": Tolerance(1, 1)})
    assert not anew.ok and "nothing could be compared" in anew.verdict


def test_without_a_tolerance_nothing_changes() -> None:
    assert rejudge(report(), None) == report()


def test_an_output_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="'z' is no output; the outputs are y, n"):
        rejudge(report(), {"z": Tolerance(1, 1)})


def test_the_command_judges_a_folder_anew_and_leaves_it_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = report().write(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("bridge.diff.measure.diff", lambda *_, **__: pytest.fail("measured again"))
    assert cli.main(["diff", str(tmp_path), "--tolerance", "y=1,1", "--tolerance", "n=0,1"]) == 0
    assert "net: torch and exported agree" in capsys.readouterr().out
    assert cli.main(["diff", str(tmp_path), "--tolerance", "0,0.5", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["diff.json"]


def test_a_diff_that_was_written_without_frontiers_is_to_be_measured_again(tmp_path: Path) -> None:
    path = report().write(tmp_path)
    content = json.loads(path.read_text())
    for one in content["stages"]:
        for error in (one["added"], one["carried"]):
            if error is not None:
                del error["frontier"]
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="measure again"):
        rejudge(DiffReport.load(path), Tolerance(1, 1))
