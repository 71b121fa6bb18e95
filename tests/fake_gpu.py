"""Stands in for CUDA and for a TensorRT engine on the CPU, so that the timing programs can be run without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


class Stream:
    cuda_stream = 7
    asleep = False
    """Whether the GPU is: nothing else is ever under way."""

    def synchronize(self) -> None:
        Stream.asleep = False

    def query(self) -> bool:
        return not Stream.asleep

    def wait_stream(self, other: Any) -> None:
        """As above."""


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """It has happened."""

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


class Graph:
    """Remembers what is enqueued while it is captured."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        assert self.work, "an empty graph"
        for one in self.work:
            one()


@contextlib.contextmanager
def capture(graph: Graph, stream: Any, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    yield


class Engine:
    """Doubles its one input ``input_0``, as float32, through both of TensorRT's ways of binding."""

    def __init__(self, module: Callable[..., torch.Tensor], inputs: list[torch.Tensor], types: list[str]) -> None:
        self.module, self.types = module, types
        self.shapes = {f"input_{index}": tuple(tensor.shape) for index, tensor in enumerate(inputs)}
        self.shapes["output_0"] = tuple(module(*inputs).shape)
        self.names = list(self.shapes)
        self.num_io_tensors = self.num_bindings = len(self.names)
        self.num_layers, self.device_memory_size = 1, 0
        self.waits = False
        """Whether its enqueue returns only when the GPU has done its work."""

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "TensorIOMode.INPUT" if name.startswith("input") else "TensorIOMode.OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        return "DataType." + dict(zip(self.names, [*self.types, "FLOAT"], strict=True))[name]

    def get_binding_dtype(self, index: int) -> str:
        return self.get_tensor_dtype(self.names[index])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_binding_index(self, name: str) -> int:
        return self.names.index(name)

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.shapes[name]

    def get_binding_shape(self, index: int) -> tuple[int, ...]:
        return self.engine.shapes[self.engine.names[index]]

    def set_binding_shape(self, index: int, shape: tuple[int, ...]) -> bool:
        assert shape == self.get_binding_shape(index)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v2(self, addresses: list[int], stream: int) -> bool:
        for name, address in zip(self.engine.names, addresses, strict=True):
            self.set_tensor_address(name, address)
        return self.execute_async_v3(stream)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == Stream.cuda_stream
        addresses = dict(self.addresses)

        def run() -> None:
            engine = self.engine
            inputs = [
                _at(addresses[name], engine.shapes[name], torch.int32 if kind == "INT32" else torch.float32)
                for name, kind in zip(engine.names, engine.types, strict=False)
            ]
            with torch.no_grad():
                _at(addresses["output_0"], engine.shapes["output_0"], torch.float32).copy_(engine.module(*inputs))

        if Graph.capturing is not None:
            Graph.capturing.work.append(run)
        else:
            run()
            if self.engine.waits:
                Stream().synchronize()
        return True


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = (ctypes.c_uint8 * size).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import ways

    monkeypatch.setattr(ways, "DEVICE", "cpu")
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": on_stream,
        "current_stream": Stream,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: monkeypatch.setattr(Stream, "asleep", True),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
