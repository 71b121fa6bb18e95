"""Every figure of a comparison against one worked out by hand, and when two outputs agree."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bridge.compare import DEFAULT_TOLERANCES, compare_arrays, compare_stages, source_error, tolerance_for
from bridge.diff.figures import Norms
from bridge.diff.frontier import frontier
from bridge.diff.torch_run import Seen
from bridge.layers import Total
from bridge.result import Comparison, ConversionResult, Tolerance

NAN, INF = math.nan, math.inf


def compare(
    reference: Any, candidate: Any, tolerance: Any = None, dtype: Any = np.float32, precision: str = "fp32"
) -> Comparison:
    a, b = (x if isinstance(x, np.ndarray) else np.array(x, dtype) for x in (reference, candidate))
    stages = ("torch", "exported")
    return compare_arrays(a, b, stages=stages, inputs="example", output="y", tolerance=tolerance, precision=precision)


def test_each_figure_is_the_one_worked_out_by_hand() -> None:
    found = compare([1.0, 2.0, -4.0, 0.0], [1.5, 2.0, -3.0, 0.25], Tolerance(0.5, 0.25))
    assert found.max_abs_error == 1.0
    assert found.mean_abs_error == (0.5 + 0 + 1 + 0.25) / 4
    assert found.max_rel_error == 0.5, "of 1.0, 2.0 and -4.0: the 0.0 has no relative error"
    assert found.mean_rel_error == pytest.approx((0.5 + 0 + 0.25) / 3)
    dot, norms = 1 * 1.5 + 2 * 2 + 4 * 3, math.sqrt(1 + 4 + 16) * math.sqrt(1.5**2 + 4 + 9 + 0.25**2)
    assert found.cosine_similarity == pytest.approx(dot / norms, abs=1e-12)
    assert found.psnr == pytest.approx(10 * math.log10(6**2 / ((0.25 + 0 + 1 + 0.0625) / 4)), abs=1e-9)
    assert found.tolerance_used == max(0.5 / (0.25 + 0.5 * 1), 1 / (0.25 + 0.5 * 4), 0.25 / 0.25)
    assert found.agreed
    assert (found.reference_shape, found.candidate_shape) == ([4], [4])
    assert (found.reference_dtype, found.candidate_dtype) == ("float32", "float32")


@pytest.mark.parametrize("scale", [1e300, 1e160, 1.0, 1e-160, 1e-300])
def test_norms_are_right_where_squares_leave_float64s_range(scale: float) -> None:
    a, b = np.array([3.0, 4.0]) * scale, np.array([3.0, 4.5]) * scale
    norms, total = Norms(), Total()
    for _ in range(2):
        norms.add(a, b)
        total.add(a, b, np.inf)
    found, figures = source_error("rewritten", [{"y": a}], [{"y": b}]), total.figures()
    assert found is not None and figures is not None
    relative = [found.relative, norms.relative, figures.relative, Seen.of(a).distance(Seen.of(b))]
    assert relative == pytest.approx([0.1] * 4), relative
    used = [compare(a, b, Tolerance(rtol, 0.0, whole=True)).tolerance_used for rtol in (0.05, 0.2)]
    assert used == pytest.approx([2.0, 0.5]), "half a tenth is not enough, and two tenths are"


def test_a_difference_beyond_float64_leaves_figures_that_json_can_hold(tmp_path: Path) -> None:
    a, b = np.array([1.7e308, 1.0]), np.array([-1.7e308, 1.0])
    found, norms, total = source_error("rewritten", [{"y": a}], [{"y": b}]), Norms(), Total()
    assert found is not None and found.relative is None
    ConversionResult("m", source_error=found, comparisons=[compare(a, b)]).to_json(tmp_path)
    norms.add(a, b)
    total.add(a, b, np.inf)
    figures = total.figures()
    assert norms.relative is None and figures is not None and figures.relative is None
    largest = [norms.max_abs, figures.max_abs, found.max_abs, frontier(a, b)[-1][1]]
    assert largest == [np.finfo(np.float64).max] * 4
    assert not compare(a, b, Tolerance(0.5, 0.0, whole=True)).agreed


def test_the_histogram_counts_every_finite_element_once() -> None:
    errors = [0.0, 0.0, 1e-14, 3e-12, 2e-3, 9.9e-3, 1.5, 1e9]
    found = compare([0.0] * 9, [*errors, NAN], Tolerance(0, 1e10), np.float64).histogram
    assert found is not None
    filled = {found.edges[index]: count for index, count in enumerate(found.counts) if count}
    assert found.zeros == 2
    assert filled == {1e-12: 2, 1e-3: 2, 1.0: 1, 1e5: 1}, "beyond the ends: the first and the last"
    assert found.zeros + sum(found.counts) == len(errors)


@pytest.mark.parametrize(
    ("reference", "candidate", "agreed", "counts"),
    [
        ([NAN, 1.0], [NAN, 1.0], True, (1, 1, 0, 0)),
        ([NAN, 1.0], [1.0, NAN], False, (1, 1, 0, 0)),
        ([1.0, 1.0], [1.0, NAN], False, (0, 1, 0, 0)),
        ([INF, -INF, 2.0], [INF, -INF, 2.0], True, (0, 0, 2, 2)),
        ([INF], [-INF], False, (0, 0, 1, 1)),
        ([INF], [3e38], False, (0, 0, 1, 0)),
        ([INF], [NAN], False, (0, 1, 1, 0)),
        ([NAN, NAN], [NAN, NAN], True, (2, 2, 0, 0)),
    ],
)
def test_nan_and_infinity_agree_with_themselves_at_the_same_place_alone(
    reference: list[float], candidate: list[float], agreed: bool, counts: tuple[int, ...]
) -> None:
    found = compare(reference, candidate)
    assert (found.reference_nan, found.candidate_nan, found.reference_inf, found.candidate_inf) == counts
    assert found.agreed == agreed, found
    assert found.max_abs_error in (0.0, None), "only what is finite on both sides is measured"


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_])
def test_integers_and_booleans_agree_where_they_are_equal_whatever_the_tolerance_for_floats(dtype: Any) -> None:
    same = compare([0, 1, 1], [0, 1, 1], Tolerance(0.5, 5.0), dtype)
    assert same.agreed and same.tolerance == Tolerance(0, 0) and same.tolerance_used == 0.0
    other = compare([0, 1, 1], [0, 1, 0], Tolerance(0.5, 5.0), dtype)
    assert not other.agreed and other.max_abs_error == 1.0
    assert other.tolerance_used is None, "no number says how far beyond 'equal' it is"


def test_in_a_lower_precision_a_share_of_the_integers_may_differ_since_rounding_tips_some() -> None:
    classes = np.arange(1000, dtype=np.int64)
    for wrong, agreed in ((0, True), (10, True), (11, False)):
        found = classes.copy()
        found[:wrong] += 500
        for a, b in ((classes, found), (classes % 2 == 0, (classes % 2 == 0) ^ (classes != found))):
            seen = compare(a, b, precision="fp16")
            assert seen.agreed == agreed, seen
            assert seen.tolerance_used == pytest.approx(wrong / 10)
            assert f"{wrong} of 1000 elements differ" in seen.note
    assert not compare([3], [4], dtype=np.int64, precision="fp16").agreed, "of a few, none may"
    assert not compare(classes, found, precision="fp32").agreed


def test_what_is_no_longer_finite_is_said_where_the_rest_is_judged_as_a_whole() -> None:
    found = compare([1.0, 2.0, NAN], [INF, 2.0, NAN], precision="fp16")
    assert not found.agreed and found.note == "infinite or NaN at 1 of 3 places where one side is not"


def test_integers_that_float64_cannot_tell_apart_are_told_apart() -> None:
    assert not compare([2**53], [2**53 + 1], dtype=np.int64).agreed
    far = compare([2**63 - 1], [-(2**63)], dtype=np.int64)
    assert far.max_abs_error == 2.0**64 and not far.agreed


def test_an_integer_output_has_the_tolerance_that_is_given_for_it_by_name() -> None:
    found = compare([100, 200], [101, 200], {"y": Tolerance(0, 2)}, np.int32)
    assert found.agreed and found.tolerance_used == 0.5


def test_a_tolerance_by_name_goes_before_one_for_all_and_both_before_the_default() -> None:
    given = {"y": Tolerance(0, 7), "": Tolerance(0, 3)}
    assert tolerance_for("y", "float32", "float32", given).atol == 7
    assert tolerance_for("z", "float32", "float32", given).atol == 3
    assert tolerance_for("z", "int64", "int64", given) == Tolerance(0, 0)
    assert tolerance_for("z", "float32", "float32", {"y": Tolerance(0, 7)}) == DEFAULT_TOLERANCES["float32"]


@pytest.mark.parametrize(
    ("reference", "candidate", "coarser"),
    [("float64", "float32", "float32"), ("float32", "float16", "float16"), ("bfloat16", "float32", "bfloat16")],
)
def test_the_default_tolerance_is_that_of_the_coarser_side(reference: str, candidate: str, coarser: str) -> None:
    assert tolerance_for("y", reference, candidate, None) == DEFAULT_TOLERANCES[coarser]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", DEFAULT_TOLERANCES["float32"]),
        ("fp16", Tolerance(1e-2, 1e-6, whole=True)),
        ("bf16", Tolerance(5e-2, 1e-6, whole=True)),
        ("int8+fp16", Tolerance(0.2, 1e-6, whole=True)),
    ],
)
def test_a_lower_precision_has_a_tolerance_of_its_own(precision: str, expected: Tolerance) -> None:
    found = tolerance_for("y", "float32", "float32", None, precision)
    assert found == expected
    exact = precision == "fp32"
    whole = Tolerance(0, 0) if exact else Tolerance(min(expected.rtol, 0.05), 0, whole=True)
    assert tolerance_for("y", "int64", "int32", None, precision) == whole
    assert tolerance_for("y", "float32", "float32", Tolerance(0, 1), precision) == Tolerance(0, 1)


def test_an_int8_engine_is_judged_by_its_outputs_as_a_whole_and_may_fail() -> None:
    def judged(reference: Any, candidate: Any, tolerance: Any = None) -> Comparison:
        a, b = np.array(reference, np.float32), np.array(candidate, np.float32)
        options: dict[str, Any] = {"inputs": "example", "output": "y", "tolerance": tolerance, "precision": "int8"}
        return compare_arrays(a, b, stages=("rewritten", "engine"), **options)

    random = np.random.default_rng(0).standard_normal(1000)
    rounded = np.round(random / random.max() * 16) / 16 * random.max()
    found = judged(random, rounded)
    assert found.agreed and found.tolerance_used is not None and 0 < found.tolerance_used < 1
    assert "judged as a whole" in found.note and "cosine similarity 0.99" in found.note
    assert not compare(random, rounded).agreed, "single elements are off by more than float32 may be"
    for wrong in (random * 2, -random, random[::-1], np.zeros(1000)):
        worse = judged(random, wrong)
        assert not worse.agreed and worse.tolerance_used is not None and worse.tolerance_used > 1
    assert judged(random * 0, random * 0).agreed and not judged(random, np.where(random > 2, NAN, random)).agreed
    assert judged([], []).agreed and not judged(random, rounded, Tolerance(0, 1e-3)).agreed


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8+fp16"])
def test_probabilities_of_many_classes_are_held_to_their_own_size(precision: str) -> None:
    logits = np.random.default_rng(0).standard_normal(20000)
    shares = np.exp(logits) / np.exp(logits).sum()
    options: dict[str, Any] = {"inputs": "example", "output": "y", "tolerance": None, "precision": precision}
    for factor, agreed in ((1.005, True), (0.5, False), (0.0, False)):
        found = compare_arrays(shares, shares * factor, stages=("rewritten", "typed"), **options)
        assert found.agreed == agreed, (factor, found.note, found.tolerance_used)


def test_a_tolerance_is_kept_to_element_by_element_up_to_its_very_limit() -> None:
    at, beyond = compare([8.0], [9.0], Tolerance(0.125, 0)), compare([8.0], [9.001], Tolerance(0.125, 0))
    assert (at.agreed, at.tolerance_used) == (True, 1.0)
    assert not beyond.agreed and beyond.tolerance_used == pytest.approx(1.001, rel=1e-4)
    one_of_a_million = np.zeros(10**6, np.float32)
    one_of_a_million[123] = 1.0
    assert not compare(np.zeros(10**6, np.float32), one_of_a_million).agreed


def test_an_element_that_must_be_equal_beside_others_with_room_leaves_no_ratio() -> None:
    found = compare([0.0, 1.0], [1e-9, 1.0], Tolerance(0.1, 0.0))
    assert not found.agreed and found.tolerance_used is None


def test_other_shapes_disagree_and_say_both() -> None:
    found = compare([[1.0, 2.0]], [1.0, 2.0])
    assert not found.agreed and found.max_abs_error is None and found.histogram is None
    assert found.note == "shapes differ: [1, 2] in torch, [2] in exported"


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_empty_outputs_agree_and_have_no_figures(shape: tuple[int, ...]) -> None:
    found = compare(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    assert found.agreed and found.max_abs_error is None and found.tolerance_used is None


def test_outputs_without_axes_are_measured() -> None:
    found = compare(np.float32(2.0).reshape(()), np.float32(2.5).reshape(()))
    assert (found.max_abs_error, found.reference_shape, found.agreed) == (0.5, [], False)
    assert found.cosine_similarity == 1.0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_measured_in_their_own_values(dtype: Any) -> None:
    found = compare([1.0, 2.0], [1.0, 2.5], dtype=dtype)
    assert found.max_abs_error == 0.5 and found.reference_dtype == np.dtype(dtype).name


def test_float64_beside_float32_is_compared_by_value() -> None:
    found = compare(np.array([0.1, 0.2]), np.array([0.1, 0.2], np.float32))
    assert found.agreed and 0 < (found.max_abs_error or 0) < 1e-8
    assert (found.reference_dtype, found.candidate_dtype) == ("float64", "float32")


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        ([1e200, 2e200], [1e200, 2.5e200]),
        ([1.0, 2.0], [1e300, 2.0]),
        ([-1.7e308, 0.0], [1.7e308, 0.0]),
        ([5e-324, 1.0], [1.0, 1.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([3.0, 3.0], [4.0, 4.0]),
    ],
)
def test_extreme_values_give_figures_or_none_and_never_an_error(
    reference: list[float], candidate: list[float], recwarn: pytest.WarningsRecorder
) -> None:
    found = compare(reference, candidate, dtype=np.float64)
    figures = (found.max_abs_error, found.mean_abs_error, found.max_rel_error, found.cosine_similarity, found.psnr)
    assert all(figure is None or math.isfinite(figure) for figure in figures), found
    assert not [str(item.message) for item in recwarn]


def test_the_cosine_of_vectors_too_large_to_square_is_right() -> None:
    assert compare([1e200, 0.0], [1e200, 1e200], dtype=np.float64).cosine_similarity == pytest.approx(2**-0.5)
    assert compare([0.0, 0.0], [1.0, 0.0]).cosine_similarity == 0.0
    assert compare([0.0, 0.0], [0.0, 0.0]).cosine_similarity == 1.0


def test_the_psnr_of_equal_outputs_is_infinite_which_none_stands_for() -> None:
    found = compare([1.0, 2.0], [1.0, 2.0])
    assert found.psnr is None and found.max_abs_error == 0.0 and found.tolerance_used == 0.0


def test_every_case_and_output_is_compared_through_polygraphy() -> None:
    reference = [{"a": np.zeros(2, np.float32), "b": np.array([1, 2])}, {"a": np.ones(3, np.float32), "b": np.array(3)}]
    candidate = [{"b": np.array([1, 2]), "a": np.zeros(2, np.float32)}, {"a": np.ones(3, np.float32), "b": np.array(4)}]
    found = compare_stages(("exported", "rewritten"), ["example", "max"], reference, candidate, None)
    assert [(item.inputs, item.output, item.agreed) for item in found] == [
        ("example", "a", True),
        ("example", "b", True),
        ("max", "a", True),
        ("max", "b", False),
    ]
    assert {(item.reference, item.candidate) for item in found} == {("exported", "rewritten")}


def test_empty_outputs_are_compared_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    empty = [{"y": np.zeros((0, 2), np.int64)}]
    assert compare_stages(("torch", "exported"), ["example"], empty, empty, None)[0].agreed
    assert not [str(item.message) for item in recwarn]


def test_a_comparison_is_the_same_after_json(tmp_path: Path) -> None:
    result = ConversionResult("m", comparisons=[compare([1.0, NAN], [1.0, NAN]), compare([[1.0]], [1.0])])
    (tmp_path / "result.json").write_text(json.dumps(result.to_dict(tmp_path), allow_nan=False))
    assert ConversionResult.load(tmp_path / "result.json").comparisons == result.comparisons
