"""An execution context: inputs in, outputs out, on torch's current stream and from torch's memory.

The work of a call is kept small, since it is added to each one: addresses are set, outputs are allocated, and the run
is enqueued. What depends on the shapes is worked out when they change.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import RunError
from .engine import Engine, IOTensor, Shape
from .logger import trt_logger

Key = tuple[torch.Size, ...]
"""The shapes of all inputs."""


class Context:
    """TensorRT's execution context, and what it was last told. Used by one thread at a time, under ``lock``."""

    def __init__(self, engine: Engine) -> None:
        """Raises RunError where the GPU's memory does not suffice."""
        assert engine.device is not None
        self.engine, self.device = engine, engine.device
        self.lock = threading.RLock()
        self.key: Key | None = None
        self.epoch = 0
        """Counts the changes of shapes."""
        self._trt = engine.target.module()
        self._logger = trt_logger(self._trt)
        self._stream: torch.cuda.Stream | None = None
        self._profile: int = 0
        self._shapes: list[Shape | None] = []
        self._allocators: dict[str, Any] = {}
        self._index = engine.device.index
        self._reads_values = any(tensor.on_host for tensor in engine.inputs)
        """Whether shapes of outputs depend on values of inputs."""
        mark = self._logger.mark
        with torch.cuda.device(self.device):
            self.trt_context = engine.trt_engine.create_execution_context()
            if self.trt_context is None:
                raise RunError(
                    f"TensorRT makes no execution context, for want of memory on {self.device} perhaps. "
                    f"TensorRT: {self._logger.since(mark) or 'it does not say why'}"
                )
            self._scratch = torch.empty(1, dtype=torch.uint8, device=self.device)
        self._address_of_nothing = self._scratch.data_ptr()

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Enqueues a run on the current stream; the outputs are ready when it has done its work.

        Raises RunError where an input is not what the engine takes, or TensorRT refuses.
        """
        with self.lock:
            if torch.cuda.current_device() != self._index:
                with torch.cuda.device(self.device):
                    return self._run(inputs)
            return self._run(inputs)

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        stream = torch.cuda.current_stream(self.device)
        self.follow(stream)
        return self.enqueue(inputs, stream)

    def follow(self, stream: torch.cuda.Stream) -> None:
        """Lets work on ``stream`` wait for this context's last run, if that was on another: they share its memory."""
        last = self._stream
        if last is not None and last.cuda_stream != stream.cuda_stream and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(last)
        self._stream = stream

    def enqueue(self, inputs: Sequence[torch.Tensor], stream: torch.cuda.Stream) -> list[torch.Tensor]:
        """``run``, but for the order of streams."""
        context, handle = self.trt_context, stream.cuda_stream
        key = tuple([tensor.shape for tensor in inputs])
        fitted = self.fit(inputs)
        if key != self.key or self._reads_values:
            self._reshape(fitted, key, handle)
        for spec, given, tensor in zip(self.engine.inputs, inputs, fitted, strict=True):
            context.set_tensor_address(spec.name, tensor.data_ptr() or self._address_of_nothing)
            if handle and tensor is given and not spec.on_host:  # the caller may free it, made on another stream
                tensor.record_stream(stream)
        outputs = []
        for spec, shape in zip(self.engine.outputs, self._shapes, strict=True):
            if shape is None:
                outputs.append(self._scratch)
                continue
            place = torch.device("cpu") if spec.on_host else self.device
            output = torch.empty(shape, dtype=spec.dtype, device=place)
            context.set_tensor_address(spec.name, output.data_ptr() or self._address_of_nothing)
            outputs.append(output)
        mark = self._logger.mark
        if not context.execute_async_v3(handle):
            self.key = None
            raise RunError(f"TensorRT refuses to run: {self._logger.since(mark) or 'it does not say why'}")
        return self._finished(outputs, stream)

    def fit(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs as TensorRT reads them: contiguous, on its GPU, of its type where torch has one that it lacks."""
        index = self._index
        return [
            tensor
            if tensor.dtype is spec.dtype
            and tensor.get_device() == index
            and tensor.is_contiguous()
            and not spec.on_host
            else self._fit(spec, tensor)
            for spec, tensor in zip(self.engine.inputs, inputs, strict=True)
        ]

    def _fit(self, spec: IOTensor, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is not spec.dtype and tensor.dtype is not spec.source_dtype:
            takes = " or ".join(dict.fromkeys(map(_name, (spec.source_dtype, spec.dtype))))
            raise RunError(f"input {spec.name!r}: is {_name(tensor.dtype)}, and the engine takes {takes}.")
        if spec.on_host:
            return tensor.to("cpu", spec.dtype).contiguous()
        if tensor.device != self.device:
            where = "the CPU" if tensor.device.type == "cpu" else str(tensor.device)
            raise RunError(
                f"input {spec.name!r}: is on {where}, and the engine on {self.device}. Move the one or the other: "
                f"x.to({str(self.device)!r}), or module.to(…) for another GPU."
            )
        return tensor.to(spec.dtype).contiguous()

    # shapes

    def _reshape(self, inputs: Sequence[torch.Tensor], key: Key, handle: int) -> None:
        """Tells TensorRT the shapes of the inputs, and takes those of the outputs from it."""
        context = self.trt_context
        profile = self._choose_profile(key)
        self.key, self.epoch = None, self.epoch + 1
        mark = self._logger.mark
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, handle):
                raise RunError(f"TensorRT refuses optimization profile {profile}: {self._logger.since(mark)}")
            self._profile = profile
        for spec, tensor in zip(self.engine.inputs, inputs, strict=True):
            if not context.set_input_shape(spec.name, tuple(tensor.shape)):
                raise RunError(
                    f"input {spec.name!r}: TensorRT refuses the shape {list(tensor.shape)}: {self._logger.since(mark)}"
                )
            if spec.on_host:
                context.set_tensor_address(spec.name, tensor.data_ptr())
        self._shapes = []
        for spec in self.engine.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            known = all(size >= 0 for size in shape)
            self._shapes.append(shape if known else None)
            if not known and spec.name not in self._allocators:
                self._allocators[spec.name] = _allocator(self._trt, self.device)
                context.set_output_allocator(spec.name, self._allocators[spec.name])
        self.key = key

    def _choose_profile(self, key: Key) -> int:
        """The first profile that the shapes are within, the one in use before others."""
        count = len(self.engine.inputs[0].profiles) if self.engine.inputs else 1
        profiles: list[int] = [self._profile, *range(count)]
        for profile in profiles:
            if all(_within(spec, shape, profile) for spec, shape in zip(self.engine.inputs, key, strict=True)):
                return profile
        raise RunError(_beyond(self.engine.inputs, key))

    # outputs

    def _finished(self, outputs: list[torch.Tensor], stream: torch.cuda.Stream) -> list[torch.Tensor]:
        """The outputs in the types that the torch module has, and those whose size the run itself has found out."""
        if self._allocators or any(spec.on_host for spec in self.engine.outputs):
            if any(spec.on_host for spec in self.engine.outputs):
                stream.synchronize()
            for index, (spec, shape) in enumerate(zip(self.engine.outputs, self._shapes, strict=True)):
                if shape is None:
                    outputs[index] = self._allocators[spec.name].take(spec.dtype)
                elif spec.on_host:
                    outputs[index] = outputs[index].to(self.device)
        return outputs

    def restore(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs in the types that the torch module has."""
        return [
            output if output.dtype is spec.source_dtype else output.to(spec.source_dtype)
            for spec, output in zip(self.engine.outputs, outputs, strict=True)
        ]

    @property
    def sizes_known(self) -> bool:
        """Whether all outputs' shapes follow from those of the inputs, and nothing is read or written by the host."""
        tensors = (*self.engine.inputs, *self.engine.outputs)
        return not self._allocators and not any(tensor.on_host for tensor in tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _within(spec: IOTensor, shape: torch.Size, profile: int) -> bool:
    if len(shape) != len(spec.shape):
        return False
    if -1 not in spec.shape:
        return tuple(shape) == spec.shape
    low, _, high = spec.profiles[profile]
    return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def _beyond(specs: Sequence[IOTensor], key: Key) -> str:
    """Why shapes are in no profile."""
    for spec, shape in zip(specs, key, strict=True):
        if len(shape) != len(spec.shape):
            return (
                f"input {spec.name!r}: has {len(shape)} axes ({list(shape)}), and the engine takes {len(spec.shape)}."
            )
        ranges = [(spec.shape, spec.shape)] if -1 not in spec.shape else [(low, high) for low, _, high in spec.profiles]
        if not any(all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)) for low, high in ranges):
            allowed = " or ".join(
                f"{list(low)}" if low == high else f"{list(low)} to {list(high)}" for low, high in dict.fromkeys(ranges)
            )
            return (
                f"input {spec.name!r}: has the shape {list(shape)}, and the engine takes {allowed}. Convert with a "
                "profile that holds it (profiles=, or min_shapes and max_shapes)."
            )
    shapes = ", ".join(f"{spec.name!r} {list(shape)}" for spec, shape in zip(specs, key, strict=True))
    return f"the inputs' shapes are allowed by themselves, and together are in no one profile: {shapes}."


def _allocator(trt: Any, device: torch.device) -> Any:
    """TensorRT's ``IOutputAllocator`` over torch's memory, for one output whose size the run finds out."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffer: torch.Tensor | None = None
            self.shape: Shape = ()

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            self.buffer = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
            return int(self.buffer.data_ptr())

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def take(self, dtype: torch.dtype) -> torch.Tensor:
            """The output of the last run; the next one gets memory of its own."""
            buffer, self.buffer = self.buffer, None
            size = torch.Size(self.shape).numel() * dtype.itemsize
            if buffer is None or buffer.numel() < size:
                raise RunError(f"TensorRT asked for no memory for an output of shape {list(self.shape)}.")
            return buffer[:size].view(dtype).view(self.shape)

    return Allocator()


def new_context(engine: Engine) -> Context:
    """A context for a thread; the engine's one and only, where TensorRT does not let two of them use a profile."""
    if not engine.one_context:
        return Context(engine)
    with engine.context_lock:
        if engine.shared_context is None:
            engine.shared_context = Context(engine)
        context: Context = engine.shared_context
        return context
