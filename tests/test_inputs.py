"""Example inputs: their names, what may be nested in them, and the shapes that profiles allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from bridge.errors import UsageError
from bridge.inputs import (
    DTYPES,
    Case,
    Profile,
    hull,
    make_cases,
    make_profiles,
    read_profiles,
    resized,
    take_apart,
    with_one_row,
    with_other_values,
    with_padding,
)
from bridge.tensors import to_numpy, to_torch


@dataclass
class Boxes:
    corners: torch.Tensor
    scores: torch.Tensor
    label: str = "cat"


torch.export.register_dataclass(Boxes)

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


def names(forward: Any, inputs: Any) -> list[str]:
    return list(take_apart(forward, inputs).tensors)


@pytest.mark.parametrize(
    ("forward", "inputs", "expected"),
    [
        (lambda x: 0, A, ["x"]),
        (lambda x, y: 0, (A, B), ["x", "y"]),
        (lambda x, y: 0, [A, B], ["x", "y"]),
        (lambda x, y: 0, {"y": A, "x": B}, ["y", "x"]),
        (lambda x, y=None, *, z: 0, {"x": A, "z": B}, ["x", "z"]),
        (lambda *images: 0, (A, B), ["images.0", "images.1"]),
        (lambda first, *rest: 0, (A, B, C), ["first", "rest.0", "rest.1"]),
        (lambda **anything: 0, {"a": A, "b": B}, ["a", "b"]),
        (lambda x, state: 0, (A, (B, C)), ["x", "state.0", "state.1"]),
        (
            lambda batch: 0,
            ({"image": A, "more": [B, {"deep": C}]},),
            ["batch.image", "batch.more.0", "batch.more.1.deep"],
        ),
        (lambda x: 0, (Boxes(A, B),), ["x.corners", "x.scores"]),
        (lambda x, mode, n, flag, nothing: 0, (A, "fast", 3, True, None), ["x"]),
        (lambda x, mode, y: 0, (A, 2.5, B), ["x", "y"]),
    ],
)
def test_an_input_is_named_after_the_parameter_with_dots_where_it_is_nested(
    forward: Any, inputs: Any, expected: list[str]
) -> None:
    assert names(forward, inputs) == expected


def test_the_call_is_put_together_again_as_it_was_with_other_tensors_in_it() -> None:
    call = take_apart(lambda x, boxes, mode, **more: 0, (A, Boxes(B, C, "dog"), "fast"))
    args, kwargs = call.rebuild([torch.tensor(7.0), torch.tensor(8.0), torch.tensor(9.0)])
    assert kwargs == {}
    assert args[0] == 7 and args[1] == Boxes(torch.tensor(8.0), torch.tensor(9.0), "dog") and args[2] == "fast"


@pytest.mark.parametrize(
    ("forward", "inputs", "words"),
    [
        (lambda x, y: 0, (A,), ["missing a required argument: 'y'", "(x, y)", "1 positional"]),
        (lambda x: 0, (A, B), ["too many positional arguments", "(x)"]),
        (lambda x: 0, {"z": A}, ["'x'", "(x)"]),
        (lambda x: 0, (torch.zeros(1, dtype=torch.complex64),), ["input 'x'", "torch.complex64", "float32"]),
        (lambda x: 0, ([torch.zeros(1, dtype=torch.complex128)],), ["input 'x.0'", "torch.complex128", "int32"]),
        (lambda x: 0, (np.zeros(1, np.complex64),), ["input 'x'", "complex64", "int32"]),
        (lambda x: 0, (torch.ones(2).to_sparse(),), ["input 'x'", "sparse_coo", "x.to_dense()"]),
        (lambda x: 0, (torch.ones(2, device="meta"),), ["input 'x'", "meta device", "give a tensor"]),
        (lambda x, y: 0, (A, object()), ["input 'y'", "object", "register_dataclass"]),
        (lambda x: 0, (3,), ["no tensor"]),
        (lambda x: 0, 5, ["inputs", "int", "tuple"]),
        (lambda x: 0, ({"a.b": A, "a": {"b": B}},), ["'x.a.b'", "input_names"]),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_input_and_what_is_taken(
    forward: Any, inputs: Any, words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        take_apart(forward, inputs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("given", [["a"], ["a", "b", "c"], ["a", "a"], ["a", ""]])
def test_given_input_names_must_be_one_for_each_tensor(given: list[str]) -> None:
    with pytest.raises(UsageError, match=r"input_names: .*for 2 inputs \(x, y\)"):
        take_apart(lambda x, y: 0, (A, B), given)


def test_given_input_names_are_used() -> None:
    call = take_apart(lambda x, y: 0, (A, B), ["pixels", "mask"])
    assert list(call.tensors) == ["pixels", "mask"] and call.tensors["mask"] is B


# --- profiles ----------------------------------------------------------------------------------------------------


def test_an_input_without_a_profile_is_static_at_the_shape_of_its_example() -> None:
    profiles = make_profiles({"x": ((1, 3), (2, 3), (8, 3))}, {"x": (2, 3), "y": (5,)})
    assert profiles == {"x": Profile((1, 3), (2, 3), (8, 3)), "y": Profile((5,), (5,), (5,))}
    assert (profiles["x"].dynamic_axes, profiles["y"].dynamic_axes) == ((0,), ())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"imge": ((1,), (2,), (3,))}, ["'imge' is no input", "image, mask", "Did you mean 'image'?"]),
        ({"image": ((3, 4), (2, 4), (8, 4))}, ["'image', axis 0", "min 3, opt 2, max 8"]),
        ({"image": ((1, 4), (9, 4), (8, 4))}, ["'image', axis 0", "opt 9, max 8"]),
        ({"image": ((-1, 4), (2, 4), (8, 4))}, ["'image', axis 0", "min -1"]),
        ({"image": ((1,), (2,), (3,))}, ["'image': has 2 axes"]),
        ({"image": ((1, 4), (2, 4))}, ["'image'", "not three shapes"]),
        ({"image": "abc"}, ["'image'", "not three shapes"]),
        ({"image": ((1.5, 4), (2, 4), (3, 4))}, ["'image'", "not three shapes"]),
        ({"image": ((3, 4), (4, 4), (8, 4))}, ["'image', axis 0", "example input has 2", "3 to 8"]),
        ({"image": ((1, 5), (1, 5), (1, 5))}, ["'image', axis 0", "example input has 2"]),
        ([("image", "mask", "x")], ["profiles", "min shape"]),
        ([], ["an empty list", "min shape"]),
        ([{"image": ((1, 4), (2, 4), (3, 4))}, {"imge": 1}], ["'imge' is no input", "Did you mean 'image'?"]),
        (
            [{"image": ((3, 4), (4, 4), (8, 4))}, {"image": ((1, 4), (1, 4), (1, 4))}],
            ["profile 0: 'image', axis 0", "has 2, outside of 3 to 8", "profile 1: 'image', axis 0", "of 1 to 1"],
        ),
    ],
)
def test_a_profile_that_cannot_be_is_refused_with_the_input_the_axis_and_the_numbers(
    given: Any, words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        make_profiles(given, {"image": (2, 4), "mask": (2,)})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_cases_are_the_example_and_the_ends_of_the_profiles_each_shape_once() -> None:
    example = {"x": np.arange(6.0).reshape(2, 3), "n": np.array([4, 5])}
    profiles = make_profiles({"x": ((1, 3), (2, 3), (5, 3)), "n": ((2,), (2,), (3,))}, {"x": (2, 3), "n": (2,)})
    cases = make_cases(example, [profiles])
    assert [case.name for case in cases] == ["example", "min", "max"]
    assert cases[1].feeds["x"].shape == (1, 3) and cases[2].feeds["n"].tolist() == [4, 5, 4]
    assert cases[2].feeds["x"][:, 0].tolist() == [0.0, 3.0, 0.0, 3.0, 0.0], "values are repeated, so indices stay valid"
    static = make_profiles(None, {"x": (2, 3), "n": (2,)})
    assert [case.name for case in make_cases(example, [static])] == ["example"]
    at_min = make_profiles({"x": ((2, 3), (2, 3), (4, 3))}, {"x": (2, 3), "n": (2,)})
    assert [case.name for case in make_cases(example, [at_min])] == ["example", "max"]


def test_of_several_profiles_one_holds_the_example_and_all_of_them_are_tried() -> None:
    given = [{"x": ((1, 3), (1, 3), (2, 3))}, {"x": ((8, 3), (16, 3), (32, 3)), "n": ((4,), (4,), (4,))}]
    example = {"x": np.zeros((2, 3)), "n": np.zeros(2)}
    sets = read_profiles(given, {name: array.shape for name, array in example.items()})
    assert sets[0]["n"] == Profile((2,), (2,), (2,)), "what a profile leaves out is the example's there"
    assert hull(sets) == {"x": Profile((1, 3), (1, 3), (32, 3)), "n": Profile((2,), (2,), (4,))}
    cases = [(case.name, case.feeds["x"].shape[0], case.feeds["n"].size) for case in make_cases(example, sets)]
    assert cases == [
        ("example", 2, 2),
        ("profile 0 min", 1, 2),
        ("profile 1 min", 8, 4),
        ("profile 1 max", 32, 4),
    ]


def test_an_empty_example_cannot_be_made_larger() -> None:
    with pytest.raises(UsageError, match="'x', axis 0: the example input is empty there"):
        make_profiles({"x": ((0, 2), (1, 2), (4, 2))}, {"x": (0, 2)})
    assert resized(np.zeros((3, 2)), (0, 2)).shape == (0, 2)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_no_two_candidates_of_a_larger_example_are_the_same_and_what_was_given_stays(dtype: str) -> None:
    example = np.array([[[0.3, 1.0], [-0.7, 0.0]]], dtype)
    larger = resized(example, (2, 64, 2))
    assert larger.dtype == example.dtype and np.array_equal(larger[:1, :2], example)
    assert np.array_equal(larger[0], larger[1]), "items of a batch are not ranked with one another"
    measured = larger[0, :, 0]
    assert len(set(measured.tolist())) > 30, "float16 has few values here"
    assert abs(measured).max() == abs(example).max(where=example != 1.0, initial=0.0)
    assert set(larger[0, :, 1].tolist()) == {0.0, 1.0}, "a mask stays one"


# --- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_goes_to_numpy_and_back_without_a_change(dtype: str) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(getattr(torch, dtype)).reshape(2, 2).T
    array = to_numpy(tensor)
    assert array.dtype == np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    back = to_torch(array)
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)


def test_what_comes_back_is_a_copy_that_in_place_code_may_change() -> None:
    array = np.zeros(3, np.float32)
    to_torch(array).add_(1)
    assert array.tolist() == [0, 0, 0]


def test_numpy_arrays_become_tensors() -> None:
    call = take_apart(lambda x, mask: x, {"x": np.ones((2, 3), np.float32), "mask": np.zeros(2, np.bool_)})
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in call.tensors.items()} == {
        "x": (torch.float32, [2, 3]),
        "mask": (torch.bool, [2]),
    }
    args, kwargs = call.rebuild(list(call.tensors.values()))
    assert args == () and torch.equal(kwargs["x"], torch.ones(2, 3))


def test_a_scalar_stays_one() -> None:
    scalar = np.array(3, np.int64)
    assert resized(scalar, ()).shape == ()
    case = make_cases(
        {"x": np.ones((2, 2)), "i": scalar}, [{"x": Profile((1, 2), (2, 2), (3, 2)), "i": Profile((), (), ())}]
    )
    assert [each.feeds["i"].shape for each in case] == [()] * 3


def test_other_values_are_of_the_same_types_and_shapes() -> None:
    feeds = {
        "rows": np.arange(6, dtype=np.float32).reshape(2, 3) + 1,
        "nothing": np.zeros((2, 0), np.float32),
        "number": np.array(3, np.float32),
        "whole": np.arange(4),
        "half": np.ones((2, 2), ml_dtypes.bfloat16),
        "mask": np.ones((2, 3), bool),
    }
    case = Case("example", feeds)
    padded = with_padding(case)
    assert padded is not None and padded.feeds["mask"].tolist() == [[True, True, False]] * 2
    assert with_padding(Case("example", {"rows": feeds["rows"]})) is None
    alike = with_one_row(case)
    np.testing.assert_allclose(alike.feeds["rows"], [[1, 2, 3]] * 2, rtol=1e-3)
    assert alike.feeds["whole"].tolist() == [0] * 4
    for other in (alike, padded, *with_other_values(case)):
        for name, array in other.feeds.items():
            assert (array.dtype, array.shape) == (feeds[name].dtype, feeds[name].shape), name
