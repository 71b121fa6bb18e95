"""The ways of running one engine, or the torch module that it was made from, that are timed beside each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .models import Case, Inputs

Call = Callable[[], Any]

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
}
"""By the name of TensorRT's DataType."""


DEVICE = "cuda"


def exact() -> None:
    """fp32 is fp32 in torch: no TF32. cuDNN tries its algorithms out, which is the best that eager torch has."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


def dtype_of(engine: Any, name: str) -> torch.dtype:
    return DTYPES[str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1]]


def tensor_names(engine: Any) -> tuple[list[str], list[str]]:
    """The engine's inputs and its outputs."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if str(engine.get_tensor_mode(name)).endswith("INPUT")]
    return inputs, [name for name in names if name not in inputs]


def by_name(engine: Any, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs in the engine's order and types."""
    return {name: given[name].to(dtype_of(engine, name)).contiguous() for name in tensor_names(engine)[0]}


def enqueued(context: Any, stream: int) -> Call:
    """The enqueue of a context that was told all addresses: nothing is looked up for each call."""
    enqueue = context.execute_async_v3

    def run() -> None:
        if not enqueue(stream):
            raise RuntimeError("execute_async_v3 failed")

    return run


ASLEEP = 40_000_000
"""Cycles of the GPU's clock: more than 10 ms, whatever its frequency."""


def waits(enqueue: Call) -> bool:
    """Whether an enqueue returns only after its work on the GPU is done. Then nothing that the host does in a call
    happens while the GPU is at work. Told by an enqueue behind a GPU that is asleep."""
    stream = torch.cuda.current_stream()
    stream.synchronize()
    torch.cuda._sleep(ASLEEP)  # type: ignore[no-untyped-call]
    enqueue()
    done: bool = stream.query()
    stream.synchronize()
    return done


class Raw:
    """TensorRT's own enqueue, with a context, input and output buffers that were prepared before."""

    def __init__(self, engine: Any, feeds: Mapping[str, torch.Tensor]) -> None:
        self.context = engine.create_execution_context()
        if self.context is None:
            raise RuntimeError("TensorRT makes no execution context")
        self.inputs = {name: tensor.clone() for name, tensor in feeds.items()}
        for name, tensor in self.inputs.items():
            if -1 in tuple(engine.get_tensor_shape(name)) and not self.context.set_input_shape(
                name, tuple(tensor.shape)
            ):
                raise RuntimeError(f"TensorRT refuses the shape {tuple(tensor.shape)} of {name}")
        self.outputs = {
            name: torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=dtype_of(engine, name), device=DEVICE)
            for name in tensor_names(engine)[1]
        }
        for name, tensor in (*self.inputs.items(), *self.outputs.items()):
            if not self.context.set_tensor_address(name, tensor.data_ptr()):
                raise RuntimeError(f"TensorRT refuses the address of {name}")

    def call(self, stream: int) -> Call:
        """Enqueues on ``stream``, whatever the current one is."""
        return enqueued(self.context, stream)


class RawGraph(Raw):
    """The same enqueue captured once: each call copies the inputs into the graph's own, and replays it."""

    def __init__(self, engine: Any, feeds: Mapping[str, torch.Tensor]) -> None:
        super().__init__(engine, feeds)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.call(side.cuda_stream)()
        side.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
            self.call(torch.cuda.current_stream().cuda_stream)()
        torch.cuda.synchronize()

    def replay(self, inputs: Mapping[str, torch.Tensor]) -> Call:
        """``inputs`` as the caller has them: the copy converts where the engine has another type."""
        pairs = [(own, inputs[name]) for name, own in self.inputs.items()]
        graph = self.graph

        def run() -> None:
            for own, given in pairs:
                own.copy_(given, non_blocking=True)
            graph.replay()

        return run


class AllocatingCall(nn.Module):
    """What torch2trt's TRTModule does in each call: it looks up every tensor by name, tells the context the shape of
    each input, allocates each output anew, and enqueues on torch's current stream. With the engine's bindings where
    TensorRT has them still (before 10), as it does."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine, self.context = engine, engine.create_execution_context()
        self.input_names, self.output_names = tensor_names(engine)
        self.bindings = hasattr(engine, "get_binding_index")

    def forward(self, *inputs: torch.Tensor) -> Any:
        outputs = self._by_binding(inputs) if self.bindings else self._by_name(inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _by_binding(self, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        engine, context = self.engine, self.context
        addresses = [0] * engine.num_bindings
        kept = []
        for name, given in zip(self.input_names, inputs, strict=True):
            index = engine.get_binding_index(name)
            context.set_binding_shape(index, tuple(given.shape))
            kept.append(given.contiguous())
            addresses[index] = kept[-1].data_ptr()
        outputs = []
        for name in self.output_names:
            index = engine.get_binding_index(name)
            kind = DTYPES[str(engine.get_binding_dtype(index)).rsplit(".", 1)[-1]]
            shape = tuple(context.get_binding_shape(index))
            outputs.append(torch.empty(size=shape, dtype=kind, device=DEVICE))
            addresses[index] = outputs[-1].data_ptr()
        if not context.execute_async_v2(addresses, torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("execute_async_v2 failed")
        return outputs

    def _by_name(self, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        engine, context = self.engine, self.context
        kept = []
        for name, given in zip(self.input_names, inputs, strict=True):
            context.set_input_shape(name, tuple(given.shape))
            kept.append(given.contiguous())
            context.set_tensor_address(name, kept[-1].data_ptr())
        outputs = []
        for name in self.output_names:
            shape = tuple(context.get_tensor_shape(name))
            outputs.append(torch.empty(size=shape, dtype=dtype_of(engine, name), device=DEVICE))
            context.set_tensor_address(name, outputs[-1].data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("execute_async_v3 failed")
        return outputs


def on_device(inputs: Inputs, device: str, half: bool, channels_last: bool) -> Inputs:
    """The inputs there; floats in half precision, or images with channels last, where that is asked for."""
    moved = []
    for tensor in inputs:
        tensor = tensor.to(device)
        if half and tensor.is_floating_point():
            tensor = tensor.half()
        if channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        moved.append(tensor)
    return tuple(moved)


def prepared(module: nn.Module, case: Case, device: str, channels_last: bool) -> nn.Module:
    """A copy of the module on the device, in the case's precision."""
    made = copy.deepcopy(module).to(device)
    if case.half:
        made = made.half()
    if channels_last:
        made = made.to(memory_format=torch.channels_last)
    return made


def errors(expected: Any, found: Any) -> dict[str, float]:
    """The largest absolute error over all elements, and its ratio to the largest value expected; infinite where
    something found is not finite."""
    from torch.utils import _pytree as pytree

    worst = largest = 0.0
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    for one, other in pairs:
        a, b = one.double(), other.double()
        if a.shape != b.shape:
            raise RuntimeError(f"an output is of shape {tuple(b.shape)}, and torch's of {tuple(a.shape)}")
        if not bool(torch.isfinite(b).all()):
            return {"max_abs": math.inf, "of_largest": math.inf}
        worst = max(worst, float((a - b).abs().max()))
        largest = max(largest, float(a.abs().max()))
    return {"max_abs": worst, "of_largest": worst / largest if largest else 0.0}
