"""A Flattener takes nested values apart and puts them together, says where one does not fit, and is saved as JSON."""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
import timeit
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput

from bridge.errors import RunError
from bridge.runtime.flattener import Flattener
from bridge.tensors import named_leaves

X, Y = torch.arange(2.0), torch.arange(3)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Boxes:
    corners: Any
    scores: Any
    name: str = "dog"


torch.export.register_dataclass(Boxes, serialized_type_name="tests.Boxes")

VALUES: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "dict": {"b": X, "a": Y},
    "int keys": {1: X, 0: Y},
    "nested": (X, {"h": Y, "c": [X, (Y,)]}, []),
    "constants": (X, 2, 2.5, True, None, "mean", 1 + 2j, float("inf"), float("nan"), b"\x00", torch.float16),
    "namedtuple": Pair(X, Pair(Y, 1)),
    "OrderedDict": OrderedDict(b=X, a=Y),
    "defaultdict": defaultdict(list, {"b": X, "a": Y}),
    "deque": deque([X, Y], 4),
    "torch's own": torch.topk(torch.arange(4.0), 2),
    "dataclass": Boxes(X, Y),
    "transformers": BaseModelOutput(last_hidden_state=X, hidden_states=(Y, X)),
    "empty": ((), X, {}),
}
every_value = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and repr(one) == repr(other)


@every_value
def test_unflatten_gives_back_what_flatten_took_apart(value: Any) -> None:
    flattener = Flattener.from_value(value)
    flat = flattener.flatten(value)
    assert len(flat) == len(flattener) == flattener.size and all(isinstance(item, torch.Tensor) for item in flat)
    assert same(flattener.unflatten(flat), value)


@every_value
def test_the_order_is_that_of_the_engines_names(value: Any) -> None:
    expected = [leaf for _, leaf in named_leaves(value) if isinstance(leaf, torch.Tensor)]
    flat = Flattener.from_value(value).flatten(value)
    assert [id(item) for item in flat] == [id(item) for item in expected]


@every_value
def test_it_survives_json_torch_load_pickle_and_deepcopy(value: Any) -> None:
    flattener = Flattener.from_value(value)
    flat = flattener.flatten(value)
    file = io.BytesIO()
    torch.save(flattener.pack(), file)
    file.seek(0)
    copies = [
        Flattener.unpack(json.loads(json.dumps(flattener.pack(), allow_nan=False))),
        Flattener.unpack(torch.load(file, weights_only=True)),
        pickle.loads(pickle.dumps(flattener)),
        copy.deepcopy(flattener),
    ]
    for other in copies:
        assert same(other.unflatten(flat), value)
        assert [id(item) for item in other.flatten(value)] == [id(item) for item in flat]


def test_the_schema_is_torch2trts() -> None:
    flattener = Flattener.from_value((X, {"h": Y, "scale": 2.0}, [X]))
    assert flattener.dict() == {"schema": (0, {"h": 1, "scale": None}, [2]), "size": 3}
    again = Flattener.from_dict(flattener.dict())
    assert again.flatten((X, {"h": Y, "scale": 3.0}, [X])) == [X, Y, X]
    assert same(again.unflatten([X, Y, X]), (X, {"h": Y, "scale": None}, [X]))


def test_a_saved_schema_of_torch2trt_keeps_its_order_and_takes_a_tuple_for_a_list() -> None:
    saved = {"schema": [{"b": 1, "a": 0}, 2], "size": 3}  # torch2trt sorts the keys of dicts
    for flattener in (
        Flattener.from_dict(saved),
        Flattener.unpack(saved),
        Flattener.unpack(Flattener.from_dict(saved).pack()),
    ):
        assert flattener.flatten(({"b": X, "a": Y}, X)) == [Y, X, X]


def test_a_condition_says_what_a_leaf_is() -> None:
    flattener = Flattener.from_value((X, Y, 3), condition=lambda item: isinstance(item, int))
    assert flattener.schema == (None, None, 0)
    assert flattener.flatten((X, Y, 7)) == [7]


def test_a_numpy_array_of_the_example_is_a_tensor_of_the_call() -> None:
    flattener = Flattener.from_value((np.ones(2),))
    assert flattener.flatten((X,)) == [X]
    with pytest.raises(RunError, match=r"value\[0\]: is a ndarray, where a tensor belongs; make a tensor of it"):
        flattener.flatten((np.ones(2),))


WRONG: dict[str, tuple[Any, str]] = {
    "too short": ((X,), "the value: has 1 elements, and the example has 2"),
    "a missing key": ((X, {"h": Y}), r"value\[1\]: 'scale' missing; the example has 'h', 'scale'"),
    "an unknown key": ((X, {"h": Y, "scale": 2.0, "c": X}), r"value\[1\]: 'c' not expected"),
    "another container": ([X, {"h": Y, "scale": 2.0}], "the value: is a list, where the example has a tuple"),
    "a tensor for a container": ((X, X), r"value\[1\]: is a Tensor, where the example has a dict"),
    "no tensor": ((X, {"h": 1.5, "scale": 2.0}), r"value\[1\]\['h'\]: is 1.5, where a tensor belongs"),
    "another constant": (
        (X, {"h": Y, "scale": 3.0}),
        r"\['scale'\]: is 3.0; the engine has .*\['scale'\]=2.0 built in",
    ),
    "a tensor for a constant": ((X, {"h": Y, "scale": X}), r"\['scale'\]: is a Tensor; the engine has"),
}


@pytest.mark.parametrize(("value", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named_with_its_place(value: Any, words: str) -> None:
    with pytest.raises(RunError, match=words):
        Flattener.from_value((X, {"h": Y, "scale": 2.0})).flatten(value)


def test_fields_are_named_as_fields() -> None:
    with pytest.raises(RunError, match=r"value\.right\.left: is None, where a tensor belongs"):
        Flattener.from_value(Pair(X, Pair(Y, 1))).flatten(Pair(X, Pair(None, 1)))
    with pytest.raises(RunError, match=r"boxes\.name: is 'cat'; the engine has boxes\.name='dog' built in"):
        Flattener.from_value((Boxes(X, Y),)).flatten((Boxes(X, Y, "cat"),), ["boxes"])


def test_a_model_output_with_other_fields_does_not_fit() -> None:
    flattener = Flattener.from_value(BaseModelOutput(last_hidden_state=X))
    with pytest.raises(RunError, match="'attentions' not expected"):
        flattener.flatten(BaseModelOutput(last_hidden_state=X, attentions=(Y,)))


def test_numbers_are_compared_by_value_and_truth_is_not_a_number() -> None:
    flattener = Flattener.from_value((X, 2.0, True, float("nan")))
    assert flattener.flatten((X, 2, True, float("nan"))) == [X]
    with pytest.raises(RunError, match=r"value\[2\]: is 1; the engine has value\[2\]=True built in"):
        flattener.flatten((X, 2.0, 1, float("nan")))


def test_shapes_stand_for_tensors_in_lists_and_tuples_alike() -> None:
    flattener = Flattener.from_value((X, {"h": Y, "scale": 2.0}))
    assert flattener.flatten([(1, 2), {"h": [3], "scale": None}]) == [(1, 2), [3]]
    assert flattener.flatten((torch.Size([4]), {"h": torch.Size([]), "scale": 2.0})) == [(4,), ()]


def test_where_there_is_neither_tensor_nor_shape_constants_count() -> None:
    with pytest.raises(RunError, match="the value: is a Tensor; the engine has"):
        Flattener.from_value(1).flatten(X)


def test_complex_tensors_come_back_from_pairs_of_reals() -> None:
    wave = torch.view_as_complex(torch.randn(3, 2))
    for flattener in (Flattener.from_value({"wave": wave, "x": X}),):
        for each in (flattener, Flattener.unpack(flattener.pack())):
            made = each.unflatten([torch.view_as_real(wave), X])
            assert made["wave"].is_complex() and torch.equal(made["wave"], wave)


def test_unflatten_wants_as_many_tensors_as_there_were() -> None:
    with pytest.raises(RunError, match="3 tensors for a structure of 2"):
        Flattener.from_value((X, Y)).unflatten([X, Y, X])


def test_a_class_that_is_not_there_is_asked_for_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Flattener.from_value(Boxes(X, Y)).pack()
    pair = Flattener.from_value(Pair(X, Y)).pack()
    monkeypatch.delitem(pytree.SUPPORTED_NODES, Boxes)
    with pytest.raises(RunError, match=rf"import {Boxes.__module__} before you load it"):
        Flattener.unpack(packed)
    monkeypatch.delitem(sys.modules, Pair.__module__)
    with pytest.raises(RunError, match=rf"namedtuple .*Pair: import {Pair.__module__} before"):
        Flattener.unpack(pair)


def test_nothing_is_imported_for_a_saved_structure() -> None:
    packed = Flattener.from_value(Pair(X, Y)).pack()
    packed["structure"]["container"] = "this:zen"
    with pytest.raises(RunError, match="import this before"):
        Flattener.unpack(packed)
    assert "this" not in sys.modules


@pytest.mark.parametrize("damage", [{"structure": {"tensor": 3, "complex": False}}, {"structure": 5}, {"size": "x"}])
def test_a_damaged_structure_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"Flattener\.unpack"):
        Flattener.unpack({**Flattener.from_value(X).pack(), **damage})


@pytest.mark.parametrize(("value", "limit"), [((X, Y), 2e-6), ({"x": X, "y": Y}, 4e-6)], ids=["tuple", "dict"])
def test_plain_calls_are_taken_apart_in_microseconds(value: Any, limit: float) -> None:
    flatten = Flattener.from_value(value).flatten
    taken = min(timeit.repeat(lambda: flatten(value), number=5000, repeat=5)) / 5000
    assert taken < limit, f"{taken * 1e6:.2f} microseconds"


leaves = st.sampled_from([X, Y, 1, 2.5, None, "word", True])
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", 1, None]), inner, max_size=3)
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
        | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=12,
)


def outline(value: Any) -> Any:
    """Equal for values of one structure: the order of keys does not matter, and tensors are all alike."""
    if isinstance(value, dict):
        return type(value), sorted((repr(key), outline(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), [outline(item) for item in value]
    return "a tensor" if isinstance(value, torch.Tensor) else repr(value)


@given(trees, trees)
def test_any_nesting_fits_itself_and_no_other(value: Any, other: Any) -> None:
    flattener = Flattener.unpack(json.loads(json.dumps(Flattener.from_value(value).pack())))
    assert same(flattener.unflatten(flattener.flatten(value, shapes=False)), value)
    if outline(value) == outline(other):
        assert len(flattener.flatten(other, shapes=False)) == len(flattener)
    else:
        with pytest.raises(RunError):
            flattener.flatten(other, shapes=False)
