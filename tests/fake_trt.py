"""A stand-in for the Python module ``tensorrt``, whose engines compute on the host: for what is done around a run.

An engine computes ``y = 2 * x + b`` (``b`` may be missing) elementwise, or, as ``{"op": "nonzero"}``, the flat indices
of what is not zero, whose number the run finds out. Its plan is JSON. Each context holds its engine, counts
what it is told, and writes through the addresses that it was given.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import json
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

__version__ = "10.3.0"


class DataType(enum.Enum):
    FLOAT, HALF, INT32, INT64, BOOL = range(5)


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}


class ILogger:
    class Severity(enum.Enum):
        ERROR = 1


class IOutputAllocator:
    pass


class IProfiler:
    pass


def plan(**changes: Any) -> bytes:
    """An engine with the input x of 1 to 8 rows of 3 and the output y, unless ``changes`` say otherwise."""
    made = {
        "op": "affine",
        "inputs": {"x": ["FLOAT", [-1, 3]]},
        "outputs": {"y": ["FLOAT", [-1, 3]]},
        "profiles": [{"x": [[1, 3], [4, 3], [8, 3]]}],
        "refittable": False,
        **changes,
    }
    return json.dumps(made).encode()


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        try:
            return Engine(json.loads(data))
        except json.JSONDecodeError:
            self.logger.log(ILogger.Severity.ERROR, "Magic tag does not match")
            return None


class Engine:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.tensors = {**values["inputs"], **values["outputs"]}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(values["profiles"])
        self.refittable = values["refittable"]
        self.contexts = 0
        self.alive: weakref.WeakSet[Context] = weakref.WeakSet()

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.values["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.tensors[name][0]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.tensors[name][1])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        static = self.get_tensor_shape(name)
        shapes: list[list[int]] = self.values["profiles"][index].get(name, [static] * 3)
        return shapes

    def create_execution_context(self) -> Context:
        self.contexts += 1
        return Context(self)

    def serialize(self) -> bytes:
        return json.dumps(self.values).encode()


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}
        dynamic = any(-1 in shape for _, shape in engine.tensors.values())
        taken = dynamic and bool(engine.alive) and __version__.startswith("8.5.")
        engine.alive.add(self)
        self.active_optimization_profile = -1 if taken else 0
        """As before TensorRT 8.6: no two contexts have the same one, where there are sizes to be known."""
        self.reshaped = 0
        self.profiler: Any = None
        self.refuses = False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile, self.shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        self.reshaped += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self.engine.values["op"] == "nonzero":
            return (-1,)
        return np.broadcast_shapes(*self.shapes.values())

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address != 0, "TensorRT refuses null"
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.refuses or self.active_optimization_profile < 0:
            return False
        values = [self._array(name, self.shapes[name]) for name in self.engine.values["inputs"]]
        (name,) = self.engine.values["outputs"]
        if self.engine.values["op"] == "nonzero":
            found = np.flatnonzero(values[0]).astype(_NUMPY[self.engine.tensors[name][0]])
            self.addresses[name] = self.allocators[name].reallocate_output(name, 0, found.nbytes, 256)
            self.allocators[name].notify_shape(name, found.shape)
            self._array(name, found.shape)[...] = found
        else:
            result = 2 * values[0] + (values[1] if len(values) > 1 else 0)
            self._array(name, self.get_tensor_shape(name))[...] = result
        if self.profiler is not None:
            self.profiler.report_layer_time("affine", 0.25)
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_NUMPY[self.engine.tensors[name][0]])
        size = int(np.prod(shape)) * dtype.itemsize
        buffer = (ctypes.c_char * max(size, 1)).from_address(self.addresses[name])
        return np.frombuffer(buffer, dtype, int(np.prod(shape))).reshape(shape)


class Stream:
    """A CUDA stream that does nothing, and remembers for which others it was made to wait."""

    def __init__(self, cuda_stream: int = 0) -> None:
        self.cuda_stream = cuda_stream
        self.waits: list[int] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other.cuda_stream)

    def synchronize(self) -> None:
        """Nothing is under way."""


class Gpu:
    """What a test sees of the GPU that is not there."""

    def __init__(self) -> None:
        self.stream = Stream()

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


def install(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Makes this module ``tensorrt``, and torch's CPU a GPU as far as ``bridge.runtime`` looks at it."""
    import sys

    from bridge import target
    from bridge.runtime import engine

    gpu, host = Gpu(), torch.device("cpu")
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules[__name__])
    monkeypatch.setattr("bridge.runtime.module.likely_flavour", lambda: "tensorrt")
    monkeypatch.setattr(engine, "runtime", target.runtime.__wrapped__)  # a test may change the version
    monkeypatch.setattr(engine, "current_gpu", lambda device: host)
    monkeypatch.setattr(engine, "capability", lambda device: (9, 0))
    monkeypatch.setattr(engine, "check_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: gpu.stream)
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)  # of builds for CUDA
    monkeypatch.delattr(torch._C, "_cuda_isCurrentStreamCapturing", raising=False)  # likewise
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return gpu
