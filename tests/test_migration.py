"""What code that was written for torch2trt does with a TRTModule beside calling it. Here a stand-in computes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bridge import RunError, TRTModule, UsageError
from bridge.runtime.flattener import Flattener

from . import fake_trt

X = torch.arange(6.0).reshape(2, 3)
B = torch.ones(1, 3)
TWO_INPUTS = {"inputs": {"x": ["FLOAT", [2, 3]], "b": ["FLOAT", [1, 3]]}, "profiles": [{}]}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_trt.Gpu:
    return fake_trt.install(monkeypatch)


def two_inputs(*names: Any) -> TRTModule:
    return TRTModule(fake_trt.plan(**TWO_INPUTS), *names)


def icuda_engine() -> fake_trt.Engine:
    return fake_trt.Engine(json.loads(fake_trt.plan(**TWO_INPUTS)))


def test_a_state_dicts_engine_is_bytes_that_can_be_written_to_a_file(tmp_path: Path) -> None:
    made = two_inputs()
    path = tmp_path / "net.engine"
    path.write_bytes(made.state_dict()["engine"])
    assert path.read_bytes() == made.serialize() == bytes(made.engine.serialize())
    assert torch.equal(TRTModule(path)(X, B), 2 * X + 1)


def test_a_saved_engine_is_no_larger_than_its_bytes_and_weights_only_loads_it() -> None:
    made = two_inputs()
    object.__setattr__(made.engine, "_plan", bytes(range(256)) * 4096)  # as plans are, where text is short
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    assert len(file.getvalue()) < 1.05 * (1 << 20)
    file.seek(0)
    assert bytes(torch.load(file, weights_only=True)["engine"].numpy()) == made.serialize()


def test_a_copied_state_dict_has_bytes_too() -> None:
    state = copy.deepcopy(two_inputs().state_dict())
    assert bytes(state["engine"]) == two_inputs().serialize()


def test_a_state_dict_in_the_place_of_an_engine_is_told_where_it_belongs(tmp_path: Path) -> None:
    state = two_inputs().state_dict()
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(UsageError, match=r"net\.pth: was written by torch\.save; use TRTModule\(\)\.load_state_dict"):
        TRTModule(tmp_path / "net.pth")
    with pytest.raises(UsageError, match=r"engine: a OrderedDict; .* A state dict is for load_state_dict"):
        TRTModule(state)


class OfAnother(TRTModule):
    """A subclass made of another module's pieces."""

    def __init__(self, other: TRTModule) -> None:
        names = other.input_names, other.output_names
        super().__init__(other.engine, *names, other.input_flattener, other.output_flattener)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, *args: Any, double: bool = True) -> Any:
        return super().forward(*args) * (self.scale if double else 1)


@pytest.mark.parametrize("used", [False, True])
def test_a_module_is_made_of_anothers_pieces(used: bool) -> None:
    other = two_inputs(["b", "x"])
    if used:
        other(B, X)
    made = OfAnother(other)
    assert made.engine is other.engine
    assert torch.equal(made(B, X), 3 * (2 * X + 1))
    assert torch.equal(made(B, X, double=False), 2 * X + 1)
    loaded = OfAnother(TRTModule())
    loaded.load_state_dict(made.state_dict())
    assert torch.equal(loaded(B, X), 3 * (2 * X + 1))


def test_a_subclass_saves_and_loads_its_own_weights_too() -> None:
    saved = OfAnother(two_inputs())
    saved.register_buffer("mean", torch.ones(3))
    loaded = OfAnother(TRTModule())
    loaded.register_buffer("mean", torch.zeros(3))
    with torch.no_grad():
        saved.scale.fill_(5)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.scale == 5 and torch.equal(loaded.mean, torch.ones(3))
    assert torch.equal(loaded(X, B), 5 * (2 * X + 1))
    state = saved.state_dict()
    del state["scale"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"scale"'):
        loaded.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"mean"'):
        OfAnother(TRTModule()).load_state_dict(saved.state_dict())


def test_an_engine_is_put_into_a_module_and_named_afterwards() -> None:
    made = TRTModule()
    made.engine = icuda_engine()
    assert made.input_names == ["x", "b"] and made.output_names == ["y"]
    assert torch.equal(made(X, B), 2 * X + 1)
    made.input_names, made.output_names = ["b", "x"], ["y"]
    assert torch.equal(made(B, X), 2 * X + 1)


def test_another_modules_engine_may_have_its_names_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    other = TRTModule()
    other.load_state_dict(two_inputs().state_dict())  # with a checksum
    assert torch.equal(other(X, B), 2 * X + 1)
    monkeypatch.setattr(fake_trt.Engine, "serialize", lambda engine: fake_trt.plan(**TWO_INPUTS) + b" ")
    made = TRTModule(other.engine, ["b", "x"], ["y"])
    assert torch.equal(made(B, X), 2 * X + 1)
    assert torch.equal(other(X, B), 2 * X + 1)


def test_another_modules_engine_is_not_shared_where_its_weights_can_be_changed() -> None:
    other = TRTModule(fake_trt.plan(**TWO_INPUTS, refittable=True))
    assert torch.equal(other(X, B), 2 * X + 1)
    made = TRTModule(other.engine)
    assert made.engine is not other.engine and torch.equal(made(X, B), 2 * X + 1)


def test_a_copy_that_was_made_before_the_engine_was_loaded_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[Any] = []
    monkeypatch.setattr("bridge.runtime.refit.refit", lambda engine, target, weights: changed.append(engine))
    made = TRTModule(fake_trt.plan(**TWO_INPUTS, refittable=True))
    other = copy.deepcopy(made)
    assert torch.equal(made(X, B), other(X, B))
    made.refit({})
    assert changed == [made.engine.trt_engine] and other.engine.trt_engine is not made.engine.trt_engine
    assert torch.equal(made(X, B), other(X, B))


def test_flatteners_can_be_set() -> None:
    made = two_inputs()
    made.input_flattener = Flattener.from_value(({"x": X, "b": B},))
    made.output_flattener = Flattener.from_value([X])
    (y,) = made({"x": X, "b": B})
    assert torch.equal(y, 2 * X + 1)
    made.input_flattener = None
    assert torch.equal(made(X, B)[0], 2 * X + 1)
    made.output_flattener = None
    assert torch.equal(made(X, B), 2 * X + 1)


def test_context_and_engine_can_be_let_go_of() -> None:
    made = two_inputs()
    made(X, B)
    before = made.context
    made.context = None
    assert made.context is not before and torch.equal(made(X, B), 2 * X + 1)
    del made.context
    del made.engine
    assert made.engine is None
    with pytest.raises(RunError, match="holds no engine"):
        made(X, B)


def test_a_context_of_ones_own_is_refused_with_what_to_do() -> None:
    made = two_inputs()
    with pytest.raises(UsageError, match="makes an execution context for each thread by itself; leave the line out"):
        made.context = made.engine.create_execution_context()


def test_an_engine_lists_its_tensors_as_before_tensorrt_10() -> None:
    engine = two_inputs().engine
    assert engine and not engine.loaded  # which nobody had to ask of a GPU
    assert list(engine) == ["x", "b", "y"] and len(engine) == 3 and engine[1] == "b"


def test_what_tensorrt_10_took_away_is_an_attribute_error_that_says_what_it_has_instead() -> None:
    engine = two_inputs().engine
    assert engine.num_io_tensors == 3 and not hasattr(engine, "num_bindings")
    with pytest.raises(AttributeError, match=r"get_binding_shape: .* since version 10: use get_tensor_shape\(name\)"):
        engine.get_binding_shape(0)


def test_outputs_that_are_not_named_are_told_of() -> None:
    made = TRTModule(fake_trt.plan(outputs={"y": ["FLOAT", [-1, 3]], "z": ["FLOAT", [-1, 3]]}), ["x"], ["y"])
    with pytest.raises(RunError, match="the engine's outputs are not the module's: z is not of y"):
        made(X)


def test_a_network_that_was_not_kept_is_an_attribute_error_that_says_so() -> None:
    made = two_inputs()
    assert not hasattr(made, "network")
    with pytest.raises(AttributeError, match="made with keep_network=True has one"):
        made.network  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'netwerk'"):
        made.netwerk  # noqa: B018


def test_a_network_that_was_built_elsewhere_can_be_kept_with_the_module() -> None:
    made, network = two_inputs(), threading.Lock()  # neither is to be copied
    made.network = network
    assert made.network is network
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert not hasattr(other, "network") and torch.equal(other(X, B), 2 * X + 1)
