"""Calls that are like those before them, which compiled code makes: that it makes them, and no others."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bridge import RunError
from bridge.runtime import graphs, launch, narrowing
from bridge.runtime.calling import Calling
from bridge.runtime.context import AHEAD, Context
from bridge.runtime.engine import Engine
from bridge.runtime.flattener import Flattener
from bridge.runtime.module import TRTModule
from bridge.runtime.record import Record

from . import fake_trt

pytestmark = pytest.mark.skipif(launch.Launch is None, reason="the package was installed without a C compiler")

X = torch.arange(6.0).reshape(2, 3)
TWO_INPUTS = {
    "inputs": {"x": ["FLOAT", [-1, 3]], "b": ["FLOAT", [1, 3]]},
    "profiles": [{"x": [[1, 3], [4, 3], [8, 3]]}],
}
Slow = list[int]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_trt.Gpu:
    return fake_trt.install(monkeypatch)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """The number of rows of each call that Python made."""
    calls: Slow = []
    run = Context.run

    def counted(self: Context, inputs: Any) -> Any:
        calls.append(len(inputs[0]))
        return run(self, inputs)

    monkeypatch.setattr(Context, "run", counted)
    return calls


def module(**changes: Any) -> TRTModule:
    made = TRTModule(fake_trt.plan(**changes))
    inputs = [torch.zeros(2, 3), torch.zeros(1, 3)][: len(changes.get("inputs", "x"))]
    made(*inputs)
    return made


def test_a_call_like_the_one_before_is_not_pythons(gpu: fake_trt.Gpu, slow: Slow) -> None:
    made = module()
    kept = [(x, made(x)) for x in torch.rand(3 * AHEAD, 2, 3)]
    assert all(torch.equal(y, 2 * x) for x, y in kept)
    assert len({y.data_ptr() for _, y in kept}) == len(kept)
    assert slow == [2]


@pytest.mark.parametrize(
    "other",
    [
        torch.rand(3, 3),
        torch.rand(3, 2).T,
        torch.rand(2, 6)[:, ::2],
        torch.rand(2, 3, dtype=torch.float64),
        torch.rand(2, 3, dtype=torch.float64, requires_grad=True),
        nn.Parameter(torch.rand(2, 3)),
        torch.rand(2, 3).as_subclass(type("Own", (torch.Tensor,), {})),
    ],
    ids=["shape", "strides", "steps", "dtype", "gradient", "parameter", "subclass"],
)
def test_an_input_of_another_kind_is_pythons_and_those_like_it_follow(
    gpu: fake_trt.Gpu, slow: Slow, other: torch.Tensor
) -> None:
    made = module()
    for x in (X, other, X + 1, other, other, X):
        y = made(x)
        assert torch.equal(y, (2 * x.detach()).float()) and not y.requires_grad
    assert len(slow) > 1 and slow[1] == len(other)


def test_what_is_converted_is_converted_anew_in_each_call(gpu: fake_trt.Gpu, slow: Slow) -> None:
    made = module()
    for x in torch.rand(6, 2, 3, dtype=torch.float64):
        assert torch.equal(made(x), 2 * x.float())
    x = torch.rand(2, 3, dtype=torch.float64)
    before = made(x)
    x += 1
    assert torch.equal(made(x), 2 * x.float()) and not torch.equal(made(x), before)
    assert len(slow) == 2


def test_several_inputs_are_converted_together(gpu: fake_trt.Gpu, slow: Slow) -> None:
    made = module(**TWO_INPUTS)
    for x in torch.rand(4, 2, 3, dtype=torch.float64):
        bias = x[:1] + 1
        for given in ((x, bias), (x.float(), bias), (x, bias.float())):
            for _ in range(2):
                assert torch.equal(made(*given), 2 * x.float() + bias.float())
    assert len(slow) == 13


class Driver:
    """In the place of CUDA's: converts as the kernel does, where ``refuses`` is not set."""

    def __init__(self) -> None:
        self.launched: list[int] = []
        """The inputs of each launch."""
        self.refuses = False
        number, address = ctypes.c_uint, ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(ctypes.c_int, address, *[number] * 7, address, ctypes.POINTER(address), address)
        self.function = kind(self.launch)

    @property
    def kernel(self) -> narrowing.Kernel:
        address = ctypes.cast(self.function, ctypes.c_void_p).value
        assert address is not None
        return address, 7

    def launch(self, kernel: int, blocks: int, inputs: int, *more: Any) -> int:
        assert kernel == 7 and more[:5] == (1, narrowing.THREADS, 1, 1, 0)
        if self.refuses:
            return 1
        described = (ctypes.c_uint64 * (4 * inputs)).from_address(more[6][0])
        for place in range(inputs):
            to, given, count, floats = described[4 * place : 4 * place + 4]
            assert 0 < count <= blocks * narrowing.THREADS
            wide, narrow = (ctypes.c_double, ctypes.c_float) if floats else (ctypes.c_int64, ctypes.c_int32)
            values = np.ctypeslib.as_array((wide * count).from_address(given))
            np.ctypeslib.as_array((narrow * count).from_address(to))[:] = values.astype(np.dtype(narrow))
        self.launched.append(inputs)
        return 0


@pytest.fixture
def driver(gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(narrowing, "kernel", lambda device: made.kernel)
    return made


def test_64_bits_are_narrowed_by_one_kernel(driver: Driver, slow: Slow) -> None:
    shapes = {"x": [[1, 3], [4, 3], [400, 3]], "b": [[1, 3], [4, 3], [400, 3]]}
    inputs = {"x": ["FLOAT", [-1, 3]], "b": ["INT32", [-1, 3]]}
    made = TRTModule(fake_trt.plan(inputs=inputs, profiles=[shapes]))
    for seed in range(4):
        torch.manual_seed(seed)
        x, shift = torch.rand(400, 3, dtype=torch.float64), torch.randint(-(2**20), 2**20, (400, 3))
        assert torch.equal(made(x, shift), 2 * x.float() + shift)
    assert slow == [400] and driver.launched == [2] * 3
    for given, launched in (((x, shift.int()), [1]), ((x.float(), shift), [1]), ((x.float(), shift.int()), [])):
        driver.launched.clear()
        for _ in range(2):
            assert torch.equal(made(*given), 2 * x.float() + shift)
        assert driver.launched == launched


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_what_torch_negates_as_it_reads_it_is_negated(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr("bridge.runtime.context.ContextLaunch", None)
    made, x = module(), torch.rand(2, 3, dtype=kind)
    for given in (x, torch._neg_view(x), x, x + 1, torch._neg_view(x + 1), torch._neg_view(x), x):
        assert torch.equal(made(given), 2 * given.float())
    changed = x.clone()
    assert torch.equal(made(changed), 2 * x.float())
    changed.data = torch._neg_view(x)
    assert torch.equal(made(changed), -2 * x.float())


@pytest.mark.parametrize("other", ["strided", "of 32 bits", "refused"])
def test_torch_converts_what_the_kernel_does_not(driver: Driver, slow: Slow, other: str) -> None:
    made = module()
    driver.refuses = other == "refused"
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.rand(2, 3, dtype=torch.float64)
        if other == "strided":
            x = torch.rand(2, 6, dtype=torch.float64)[:, ::2]
        elif other == "of 32 bits":
            x = torch.rand(2, 6)[:, ::2]
        assert torch.equal(made(x), 2 * x.float())
    assert slow == [2, 2] and not driver.launched


def test_so_many_inputs_are_narrowed_together(driver: Driver) -> None:
    for count in (narrowing.MOST, narrowing.MOST + 1):
        names = [f"x{place}" for place in range(count)]
        inputs = {name: ["FLOAT", [-1, 3]] for name in names}
        profile = {name: [[1, 3], [4, 3], [8, 3]] for name in names}
        made = TRTModule(fake_trt.plan(inputs=inputs, profiles=[profile]))
        given = list(torch.rand(count, 2, 3, dtype=torch.float64))
        for _ in range(3):
            assert torch.equal(made(*given), 2 * given[0].float() + given[1].float())
    assert driver.launched == [narrowing.MOST] * 2


@pytest.mark.parametrize("wrong", [X.int(), X.to_sparse(), torch.rand(2, 3, 1), torch.rand(9, 3), "x", None])
def test_a_wrong_input_is_still_an_error(gpu: fake_trt.Gpu, wrong: Any) -> None:
    made = module()
    with pytest.raises(RunError):
        made(wrong)
    with pytest.raises(RunError):
        made(X, X)
    assert torch.equal(made(X), 2 * X)


def test_arguments_by_name_and_nested_outputs(gpu: fake_trt.Gpu, slow: Slow) -> None:
    bias = torch.ones(1, 3)
    made = TRTModule(
        fake_trt.plan(**TWO_INPUTS),
        ["x", "b"],
        ["y"],
        Flattener.from_value({"b": bias, "x": X}),
        Flattener.from_value({"features": [X]}),
    )
    made.input_names = ["b", "x"]
    for x in torch.rand(4, 2, 3):
        assert torch.equal(made(x=x, b=bias)["features"][0], 2 * x + 1)
    assert slow == [1]
    plain = module(**TWO_INPUTS)
    for x in torch.rand(4, 2, 3):
        for y in (plain(x, bias), plain(x, b=bias), plain(b=bias, x=x)):
            assert torch.equal(y, 2 * x + 1)
    assert slow == [1, 2]
    for wrong in ({"c": bias}, {"x": X}, {"b": bias, "c": bias}, {}):
        with pytest.raises(RunError):
            plain(X, **wrong)


def test_names_of_the_modules_forward_and_rests(gpu: fake_trt.Gpu, slow: Slow) -> None:
    def forward(x: torch.Tensor, /, *more: torch.Tensor) -> None:
        """Takes nothing by name."""

    def named(x: torch.Tensor, shift: torch.Tensor, scale: float = 1.0) -> None:
        """Takes all by name."""

    bias = torch.ones(1, 3)
    for function, by_name in ((forward, False), (named, True)):
        made = TRTModule(fake_trt.plan(**TWO_INPUTS))
        made._calling = Calling.of(function, Flattener.from_value((X, bias)), None, ["x", "b"])
        for x in torch.rand(3, 2, 3):
            assert torch.equal(made(x, bias), 2 * x + 1)
        before = len(slow)
        if by_name:
            assert torch.equal(made(X, shift=bias), 2 * X + 1) and torch.equal(made(shift=bias, x=X), 2 * X + 1)
            assert len(slow) == before
            assert torch.equal(made(X, bias, scale=1.0), 2 * X + 1) and len(slow) == before + 1
        for wrong in ({"b": bias}, {"x": X, "b": bias}):
            with pytest.raises(RunError):
                made(X, **wrong)


def test_an_input_that_the_engine_dropped_is_passed_over(gpu: fake_trt.Gpu, slow: Slow) -> None:
    made = TRTModule(fake_trt.plan(), ["unused", "x"], ["y"])
    for x in torch.rand(4, 2, 3):
        assert torch.equal(made(torch.rand(5), x), 2 * x)
    assert slow == [2]


def test_whatever_is_set_begins_anew(gpu: fake_trt.Gpu) -> None:
    made = module()
    made.forward = lambda x: x - 1  # as libraries that wrap modules do
    assert torch.equal(made(X), X - 1) and torch.equal(made(X), X - 1)
    del made.forward
    assert torch.equal(made(X), 2 * X) and torch.equal(made(X), 2 * X)
    made._forward_hooks = {1: lambda module, args, output: output + 1}
    assert torch.equal(made(X), 2 * X + 1)
    made.engine = fake_trt.plan(**TWO_INPUTS)
    made.input_names = ["x", "b"]
    made._forward_hooks = {}
    assert torch.equal(made(X, X[:1]), 2 * X + X[:1])


def test_a_class_with_a_forward_of_its_own_keeps_it(gpu: fake_trt.Gpu) -> None:
    class Shifted(TRTModule):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) + 1

    made = Shifted(fake_trt.plan())
    for x in torch.rand(3, 2, 3):
        assert torch.equal(made(x), 2 * x + 1)


def test_hooks_count_from_the_next_call_on(gpu: fake_trt.Gpu, slow: Slow) -> None:
    made = module()
    made(X)
    hook = made.register_forward_hook(lambda module, args, output: -output)
    assert torch.equal(made(X), -2 * X)
    hook.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: -output)
    try:
        assert torch.equal(made(X), -2 * X)
    finally:
        everywhere.remove()
    assert torch.equal(made(X), 2 * X) and slow == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # torch.jit
def test_a_trace_is_refused_after_calls_too(gpu: fake_trt.Gpu) -> None:
    made = module()
    made(X)
    with pytest.raises(RunError, match=r"torch\.jit\.trace"):
        torch.jit.trace(nn.Sequential(nn.ReLU(), made), (X,))
    assert torch.equal(made(X), 2 * X)


def test_around_it_torch_compiles(gpu: fake_trt.Gpu) -> None:
    made = module()
    net = torch.compile(nn.Sequential(nn.ReLU(), made), backend="eager")
    for x in torch.rand(4, 2, 3):
        assert torch.equal(made(x), 2 * x) and torch.equal(net(x), 2 * x)


def test_a_stream_or_a_capture_of_the_users_is_pythons(
    gpu: fake_trt.Gpu, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module()
    with gpu.use(fake_trt.Stream(7)):
        assert torch.equal(made(X), 2 * X) and torch.equal(made(X), 2 * X)
    assert torch.equal(made(X), 2 * X) and len(slow) == 3
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert torch.equal(made(X), 2 * X) and torch.equal(made(X), 2 * X)
    assert len(slow) == 5


def test_another_gpu_that_is_the_current_one_is_pythons(
    gpu: fake_trt.Gpu, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [-1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    made = module()
    assert torch.equal(made(X), 2 * X) and slow == [2]
    current[0] = 1
    assert torch.equal(made(X), 2 * X) and slow == [2, 2]


def test_the_memory_of_each_input_is_held_until_the_stream_is_done(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x, other = module(), X.clone(), X + 1
    made(x)
    recorded: list[int] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append(self.data_ptr()))
    for tensor in (x, x, other, other, x):
        made(tensor)
    assert recorded == [other.data_ptr(), x.data_ptr()]
    x.data = X + 2  # the same tensor in other memory
    assert torch.equal(made(x), 2 * (X + 2)) and recorded[-1] == x.data_ptr()


def test_a_refused_run_is_told_by_python_and_the_next_one_works(gpu: fake_trt.Gpu, slow: Slow) -> None:
    made = module()
    made(X)
    made.context.refuses = True
    with pytest.raises(RunError, match="TensorRT refuses to run"):
        made(X)
    made.context.refuses = False
    for x in torch.rand(3, 2, 3):
        assert torch.equal(made(x), 2 * x)
    assert slow == [2, 2, 2]


def test_an_exception_out_of_a_run_is_raised_and_the_next_one_works(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module()
    made(X)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "record_stream", lambda self, stream: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made(X + 1)
    for x in torch.rand(2 * AHEAD, 2, 3):
        assert torch.equal(made(x), 2 * x)


def test_threads_have_launches_of_their_own(gpu: fake_trt.Gpu, slow: Slow) -> None:
    made = module()
    wrong: list[torch.Tensor] = []

    def work(shift: int) -> None:
        for step in range(200):
            x = X + shift + step
            if not torch.equal(made(x), 2 * x):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(1000 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and slow == [2] * 5
    assert made.engine is not None and made.engine.contexts == 5


def test_a_context_that_another_thread_will_share_is_left_alone_until_a_call_is_over(
    gpu: fake_trt.Gpu, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_trt, "__version__", "8.5.3")
    inside, go_on = threading.Event(), threading.Event()
    execute, order = fake_trt.Context.execute_async_v3, []

    def waits(self: fake_trt.Context, stream: int) -> bool:
        order.append("begins")
        if len(order) == 3:  # the second call, which is not Python's
            inside.set()
            assert go_on.wait(20)
        done = execute(self, stream)
        order.append("ends")
        return done

    monkeypatch.setattr(fake_trt.Context, "execute_async_v3", waits)
    made, found = module(), {}
    other = threading.Thread(target=lambda: (inside.wait(20), found.update(other=made(X + 1))))
    other.start()
    later = threading.Timer(0.3, go_on.set)
    later.start()
    found.update(own=made(X))
    other.join()
    assert order == ["begins", "ends"] * 3 and slow == [2, 2]
    assert torch.equal(found["own"], 2 * X) and torch.equal(found["other"], 2 * (X + 1))
    assert torch.equal(made(X), 2 * X) and slow == [2, 2, 2]  # under the lock from now on
    assert made.engine is not None and made.engine.contexts == 1


def test_outputs_have_the_types_of_the_modules(gpu: fake_trt.Gpu, slow: Slow) -> None:
    plan = fake_trt.plan(outputs={"y": ["INT32", [-1, 3]]})
    made = TRTModule(Engine(plan, Record("tensorrt", source_types={"y": "int64"})))
    for x in torch.randint(0, 100, (2 * AHEAD, 2, 3)).float():
        y = made(x)
        assert y.dtype == torch.int64 and torch.equal(y, 2 * x.long())
    assert slow == [2]


def test_outputs_that_were_allocated_together_are_given_back_together(gpu: fake_trt.Gpu) -> None:
    made = module()
    for _ in range(3 * AHEAD):
        made(X)
    (slot,) = made._local.session.context._outputs
    addresses = {made(X).data_ptr() for _ in range(3 * AHEAD)}
    assert len(slot.kept) == AHEAD and len(addresses) >= AHEAD
    kept = made(X)
    for _ in range(3 * AHEAD):
        made(X + 1)
    assert torch.equal(kept, 2 * X)


def test_a_thread_that_ends_leaves_nothing_behind(gpu: fake_trt.Gpu) -> None:
    made, contexts = module(), []

    def work() -> None:
        made(X)
        made(X)
        contexts.append(weakref.ref(made._local.session.context))

    thread = threading.Thread(target=work)
    gc.disable()
    try:
        thread.start()
        thread.join()
        assert contexts[0]() is None
        contexts.append(weakref.ref(made._local.session.context))
        made.engine = None
        assert contexts[1]() is None
    finally:
        gc.enable()


class Work:
    """What is enqueued while it is captured."""

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for one in self.work:
            one()


class Recorded(Work):
    """A CUDA graph."""

    def replay(self) -> None:
        super().replay()


@pytest.fixture
def capturing(gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs of the stand-in's runs."""
    execute, current = fake_trt.Context.execute_async_v3, []

    @contextlib.contextmanager
    def capture(graph: Recorded, **options: Any) -> Iterator[None]:
        current.append(graph)
        yield
        current.pop()

    def recorded(self: fake_trt.Context, stream: int) -> bool:
        if current:
            addresses = dict(self.addresses)

            def again() -> None:
                now, self.addresses = self.addresses, addresses
                execute(self, stream)
                self.addresses = now

            current[-1].work.append(again)
            return True
        return execute(self, stream)

    monkeypatch.setattr(fake_trt.Context, "execute_async_v3", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", fake_trt.Stream)
    monkeypatch.setattr(torch.cuda, "stream", gpu.use)


def test_a_graph_is_replayed_and_what_it_is_not_for_is_not(capturing: None, slow: Slow) -> None:
    made = TRTModule(fake_trt.plan())
    made.capture((2, 3))
    (graph,) = made._local.session.graphs.values()
    kept = [(x, made(x)) for x in torch.rand(6, 2, 3)]
    assert all(torch.equal(y, 2 * x) for x, y in kept) and not slow
    assert graph.graph.replays == 6
    for x in (torch.rand(2, 3, dtype=torch.float64), torch.rand(3, 2).T, torch.rand(2, 3, requires_grad=True)):
        for _ in range(2):
            assert torch.equal(made(x), (2 * x.detach()).float())
    assert graph.graph.replays == 12 and not slow
    wide = torch.rand(4, 3)
    assert torch.equal(made(wide), 2 * wide) and slow == [4]
    assert torch.equal(made(X), 2 * X) and slow == [4]


def test_automatic_graphs_begin_and_end_when_they_are_asked_to(capturing: None, slow: Slow) -> None:
    made = TRTModule(fake_trt.plan(), cuda_graphs=True)
    for x in torch.rand(graphs.WARM_UP + 4, 2, 3):
        assert torch.equal(made(x), 2 * x)
    assert slow == [2] * graphs.WARM_UP
    (graph,) = made._local.session.graphs.values()
    assert graph.graph.replays == 4
    made.cuda_graphs = False
    assert torch.equal(made(X), 2 * X) and graph.graph.replays == 4
    made.cuda_graphs = True
    assert torch.equal(made(X), 2 * X) and graph.graph.replays == 5


def test_shapes_that_are_captured_after_calls_are_replayed(capturing: None, slow: Slow) -> None:
    made = TRTModule(fake_trt.plan())
    for x in torch.rand(3, 2, 3):
        assert torch.equal(made(x), 2 * x)
    made.capture((2, 3))
    (graph,) = made._local.session.graphs.values()
    for x in torch.rand(3, 2, 3):
        assert torch.equal(made(x), 2 * x)
    assert graph.graph.replays == 3 and slow == [2]
