"""Arguments find their way to the engine as they would to the module's forward."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import RunError
from bridge.inputs import take_apart
from bridge.runtime.calling import Calling

from . import support
from .support import RTX_INSTALLED

X, Y, Z = torch.arange(2.0), torch.arange(3.0), torch.arange(4.0)


def made(forward: Callable[..., Any], inputs: Any) -> Calling:
    """A Calling that has been saved and loaded."""
    call = take_apart(forward, inputs)
    calling = Calling.of(forward, call.structure, None, list(call.tensors))
    loaded = Calling.unpack(json.loads(json.dumps(calling.pack())))
    assert loaded == calling
    return loaded


def simple(x: Any, state: Any = None, *, scale: float = 1.0) -> None: ...


def everything(x: Any, /, y: Any, mode: str = "mean", *rest: Any, mask: Any = None, **more: Any) -> None: ...


def keywords(**tensors: Any) -> None: ...


ACCEPTED: list[tuple[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any], list[Any]]] = [
    (simple, (X, {"h": Y}), (X, {"h": Y}), {}, [X, Y]),
    (simple, (X, {"h": Y}), (X,), {"state": {"h": Y}}, [X, Y]),
    (simple, (X, {"h": Y}), (), {"state": {"h": Y}, "x": X}, [X, Y]),
    (simple, (X, {"h": Y}), (X, {"h": Y}), {"scale": 1.0}, [X, Y]),
    (simple, (X,), (X, None), {}, [X]),
    (simple, {"state": Y, "x": X}, (X, Y), {}, [Y, X]),
    (simple, {"state": Y, "x": X}, (), {"x": X, "state": Y}, [Y, X]),
    (simple, {"x": X, "scale": 2.0}, (X,), {}, [X]),
    (simple, {"x": X, "scale": 2.0}, (X,), {"scale": 2.0}, [X]),
    (everything, (X, Y, "sum", Z, X), (X, Y, "sum", Z, X), {}, [X, Y, Z, X]),
    (everything, (X, Y), (X,), {"y": Y, "mode": "mean", "mask": None}, [X, Y]),
    (keywords, {"b": X, "a": (Y,)}, (), {"a": (Y,), "b": X}, [X, Y]),
]


@pytest.mark.parametrize(("forward", "inputs", "args", "kwargs", "expected"), ACCEPTED)
def test_arguments_may_be_given_as_forward_takes_them(
    forward: Any, inputs: Any, args: Any, kwargs: Any, expected: list[Any]
) -> None:
    assert [id(item) for item in made(forward, inputs).flatten(args, kwargs)] == [id(item) for item in expected]


REFUSED: list[tuple[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any], str]] = [
    (simple, (X, Y), (X,), {}, r"forward\(\) missing a required argument: 'state'"),
    (simple, (X, Y), (X, Y, Z), {}, r"forward\(\) takes 2 positional arguments but 3 were given"),
    (simple, (X, Y), (X, Y), {"x": X}, r"forward\(\) got multiple values for argument 'x'"),
    (simple, (X, Y), (X,), {"stat": Y}, r"unexpected keyword argument 'stat'.* Did you mean 'state'\?"),
    (simple, (X, {"h": Y}), (X, {"h": None}), {}, r"state\['h'\]: is None, where a tensor belongs"),
    (simple, (X,), (X,), {"scale": 2.0}, r"scale: is 2.0; the engine has scale=1.0 built in"),
    (simple, (X,), (X, Y), {}, r"state: is a Tensor; the engine has state=None built in"),
    (simple, {"x": X, "scale": 2.0}, (X,), {"scale": 1.0}, r"scale: is 1.0; the engine has scale=2.0 built in"),
    (everything, (X, Y), (), {"x": X, "y": Y}, r"missing a required argument: 'x'"),
    (everything, (X, Y, "sum", Z), (X, Y, "sum", Z, Z), {}, r"\*rest of length 2, and at conversion of 1"),
    (everything, (X, Y), (X, Y), {"extra": Z}, r"extra: was left out at conversion"),
    (keywords, {"b": X}, (X,), {}, r"takes 0 positional arguments but 1 was given"),
]


@pytest.mark.parametrize(("forward", "inputs", "args", "kwargs", "words"), REFUSED)
def test_what_forward_would_not_take_is_refused_in_pythons_words(
    forward: Any, inputs: Any, args: Any, kwargs: Any, words: str
) -> None:
    with pytest.raises(RunError, match=words):
        made(forward, inputs).flatten(args, kwargs)


def test_a_positional_only_parameter_is_not_taken_by_keyword() -> None:
    def forward(x: Any, /, y: Any) -> None: ...

    with pytest.raises(RunError, match="positional-only argument passed as keyword argument: 'x'"):
        made(forward, (X, Y)).flatten((), {"x": X, "y": Y})


def test_shapes_stand_for_tensors_only_where_they_are_asked_for() -> None:
    calling = made(simple, (X, {"h": Y}))
    assert calling.flatten(((2,), {"h": [3]}), {}, shapes=True) == [(2,), [3]]
    with pytest.raises(RunError, match="x: is a list, where a tensor belongs"):
        calling.flatten(([2], {"h": Y}), {})


def test_an_onnx_files_inputs_are_given_in_order_or_by_name() -> None:
    calling = Calling.unpack(Calling((), None, None, ("x.1", "y")).pack())
    for args, kwargs in (((X, Y), {}), ((X,), {"y": Y}), ((), {"y": Y, "x.1": X})):
        assert calling.flatten(args, kwargs) == [X, Y]
    assert calling.unflatten([X]) is X and calling.unflatten([X, Y]) == (X, Y)
    with pytest.raises(RunError, match=r"missing a required argument: 'y'; its parameters are x\.1, y"):
        calling.flatten((X,), {})
    with pytest.raises(RunError, match="y: is 3, where a tensor belongs"):
        calling.flatten((X, 3), {})


def test_torch2trts_flatteners_take_positional_arguments() -> None:
    flattener = bridge.Flattener.from_dict({"schema": [0, [1, 2]], "size": 3})
    calling = Calling((), flattener, None, ("input_0", "input_1", "input_2"))
    assert calling.flatten((X, (Y, Z)), {}) == [X, Y, Z]


def test_it_can_be_copied_and_pickled() -> None:
    calling = made(simple, (X, {"h": Y}))
    for other in (copy.deepcopy(calling), pickle.loads(pickle.dumps(calling))):
        assert other == calling and other.flatten((X,), {"state": {"h": Y}}) == [X, Y]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor], scale: float = 2.0) -> dict[str, Any]:
        hidden = self.linear(x) * scale + state["h"]
        wave = torch.complex(hidden, hidden + 1)
        return {"hidden": hidden, "again": (state["h"] * 2, "mean"), "wave": wave, "rows": x.shape[0], "thing": object}


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_a_conversion_knows_how_its_engine_is_called(tmp_path: Path) -> None:
    x, h = torch.randn(2, 4), torch.randn(2, 4)
    profiles = dict.fromkeys(("x", "state.h"), ((1, 4), (2, 4), (3, 4)))
    result = support.convert(Nested().eval(), (x, {"h": h}), workdir=tmp_path, profiles=profiles)
    assert result.status == "built", result.error
    assert any("output['rows']" in note for note in result.notes), result.notes
    calling = result.calling
    assert calling is not None
    sidecar = json.loads((tmp_path / "model.engine.json").read_text())
    for one in (calling, Calling.unpack(sidecar["calling"])):
        assert one.names == ("x", "state.h") == tuple(item.name for item in result.inputs)
        assert one.flatten((x,), {"state": {"h": h}, "scale": 2.0}) == [x, h]
        hidden = torch.ones(2, 4)
        outputs = one.unflatten([hidden, h, torch.view_as_real(torch.complex(hidden, hidden))])
        assert outputs["again"][1] == "mean" and outputs["again"][0] is h and outputs["wave"].is_complex()
        assert outputs["rows"] is None, "it changes with the shapes"


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_an_onnx_files_conversion_takes_its_inputs(tmp_path: Path) -> None:
    first = support.convert(nn.Linear(3, 2).eval(), (torch.ones(1, 3),), workdir=tmp_path / "a", build=False)
    assert first.exported_onnx is not None
    result = support.convert(first.exported_onnx, workdir=tmp_path / "b", build=False)
    assert result.calling is not None and result.calling.names == ("input",)
    assert result.calling.flatten((X,), {}) == result.calling.flatten((), {"input": X}) == [X]


class OtherStructure(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"rows{x.shape[0]}": x * 2}


def test_a_structure_that_changes_with_the_shapes_is_an_error(tmp_path: Path) -> None:
    profiles = {"x": ((1, 4), (2, 4), (3, 4))}
    result = support.convert(OtherStructure(), (torch.ones(2, 4),), workdir=tmp_path, profiles=profiles)
    assert result.error is not None and "another structure of tensors" in result.error
