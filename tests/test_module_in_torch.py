"""torch's tools around a TRTModule: what records a call says why it cannot, what wraps it works."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from bridge import RunError, TRTModule

from . import fake_trt

X = torch.arange(6.0).reshape(2, 3)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_trt.Gpu:
    return fake_trt.install(monkeypatch)


def module() -> TRTModule:
    return TRTModule(fake_trt.plan())


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.engine = nn.Linear(3, 3), module()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.engine(self.stem(x)) + 1


def test_torch_compile_leaves_the_engine_out_of_what_it_compiles() -> None:
    made = Around().eval()
    compiled = torch.compile(made, backend="eager")
    for factor in range(12):
        assert torch.allclose(compiled(factor * X), made(factor * X))


@pytest.mark.parametrize("record", [torch.jit.trace, lambda made, x: torch.export.export(made, (x,))])
def test_a_recording_would_repeat_one_calls_values_and_is_refused(record: Any) -> None:
    made = Around().eval()
    expected = made(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        with pytest.raises(RunError, match=r"torch\.(jit\.trace|export) records torch's operators"):
            record(made, X)
    assert torch.equal(made(X), expected)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_tensor_without_memory_is_refused_and_leaves_nothing_behind() -> None:
    from torch._subclasses import FakeTensorMode

    made = module()
    made(X)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(RunError, match="FakeTensor has no memory"):
        made(mode.from_tensor(X))
    for _ in range(3):
        assert torch.equal(made(X), 2 * X)


def test_a_tracer_that_takes_the_engine_for_a_leaf_gets_a_call_of_it() -> None:
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, TRTModule) or super().is_leaf_module(m, module_qualified_name)

    made = Around().eval()
    graph = Leaves().trace(made)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["stem", "engine"]
    assert torch.equal(torch.fx.GraphModule(made, graph)(X), made(X))


def test_a_copy_of_a_compiled_module_is_not_the_module_that_was_compiled() -> None:
    made = module()
    made.compile(backend="eager")
    assert torch.equal(made(X), 2 * X)
    for other in (copy.deepcopy(made), copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert other._compiled_call_impl is None
        assert torch.equal(other(X), 2 * X)


def test_what_reads_all_attributes_of_a_module_meets_no_error() -> None:
    names = dict(inspect.getmembers(TRTModule()))
    assert "forward" in names and "context" not in names


def test_a_replica_of_data_parallel_runs_in_a_thread() -> None:
    replica, found = module()._replicate_for_data_parallel(), []
    thread = threading.Thread(target=lambda: found.append(replica(X)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], 2 * X)
