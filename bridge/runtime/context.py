"""An execution context: inputs in, outputs out, on torch's current stream and from torch's memory.

The work of a call is kept small, since it is added to each one: addresses are set, outputs are allocated, and the run
is enqueued. What depends on the shapes is worked out when they change.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import RunError
from . import narrowing
from .engine import Engine, IOTensor, Shape
from .launch import ContextLaunch, Launch, capturing, capturing_now, current_handle
from .logger import trt_logger
from .profiles import Key, fitting_profile

if TYPE_CHECKING:
    from ._launch import Surroundings

PREPARED = 16 << 20
"""Bytes of outputs that are allocated before the calls that return them."""

AHEAD = 8
"""Calls whose outputs are allocated at once, at most: each one more takes a tenth of the time of the first."""

_T = TypeVar("_T")
_empty_like, _CONTIGUOUS = torch.empty_like, torch.contiguous_format


class _Slot:
    """What one input or output was in the last run: what is still so need not be told to TensorRT again."""

    __slots__ = ("address", "batch", "buffer", "dtype", "dtypes", "held", "kept", "like", "name", "ready", "shape")

    def __init__(self, spec: IOTensor) -> None:
        self.name, self.dtype = spec.name, spec.dtype
        self.dtypes = (spec.dtype, spec.source_dtype)
        """What may be given for it."""
        self.address = 0
        self.shape: Shape | None = None
        """None until it is known; of an output whose size the run finds out, always."""
        self.like: torch.Tensor | None = None
        """An output's shape and type, in one element of memory."""
        self.ready: list[tuple[torch.Tensor, int]] = []
        """The outputs of coming calls and their addresses, of the stream that is followed; the last is the next one,
        of which TensorRT has been told."""
        self.kept: list[torch.Tensor] = []
        """Those that were allocated together, which are given back together too, so that a caller who drops an output
        does not wait for that."""
        self.batch = 1
        """How many are allocated next: more from time to time, as long as shapes and stream are the same."""
        self.held: Callable[[], torch.Tensor | None] = _nothing
        """A weak reference to the input whose memory waits for the stream before it is used again."""
        self.buffer: torch.Tensor | None = None
        """Where an input is copied to that is not as TensorRT reads it; of the stream that is followed."""


def _nothing() -> None:
    return None


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
        self.stream: torch.cuda.Stream | None = None
        """The one that is followed. The memory of inputs, which may be another stream's, is kept until it is done."""
        self._handle: int | None = None
        """The stream's, as CUDA has it."""
        self._profile: int = 0
        self._inputs = [_Slot(spec) for spec in engine.inputs]
        self._outputs = [_Slot(spec) for spec in engine.outputs]
        self._ahead = 0
        """The calls whose outputs are allocated at once, at most; none where outputs are large, or of unknown size."""
        self._allocators: dict[str, Any] = {}
        self.index = engine.device.index if engine.device.index is not None else -1
        self._handle_now = current_handle()
        self._special_inputs = any(tensor.on_host for tensor in engine.inputs)
        """Whether shapes of outputs depend on values of inputs, which TensorRT reads in the host's memory."""
        self._host_outputs = any(tensor.on_host for tensor in engine.outputs)
        types = [None if tensor.dtype is tensor.source_dtype else tensor.source_dtype for tensor in engine.outputs]
        self._restore = functools.partial(_restored, types) if any(types) else None
        """To the types that the torch module's outputs have; None where these are the engine's."""
        errors = self._logger.errors
        with torch.cuda.device(self.device):
            self.trt_context = engine.trt_engine.create_execution_context()
            if self.trt_context is None:
                raise RunError(
                    f"TensorRT makes no execution context, for want of memory on {self.device} perhaps. "
                    f"TensorRT: {self._logger.since(errors) or 'it does not say why'}"
                )
            self._scratch = torch.empty(1, dtype=torch.uint8, device=self.device)
            converted = any(tensor.dtype is not tensor.source_dtype for tensor in engine.inputs)
            self._kernel = narrowing.kernel(self.index) if converted and ContextLaunch is not None else None
        self._address_of_nothing = self._scratch.data_ptr()
        self._set_address = self.trt_context.set_tensor_address
        self._execute = self.trt_context.execute_async_v3
        self._several_gpus = torch.cuda.device_count() > 1
        self._guard = not engine.target.shares_profiles or self._several_gpus
        """Whether threads may share this, or another GPU be the current one."""
        self.thread = threading.get_ident()
        self.shared = False
        """Whether threads do share it."""
        self.launch: ContextLaunch | None = None
        """Makes calls like the last one, if they can be; None where they never can."""
        self._graphs: list[weakref.ref[Launch]] = []
        """The launches of CUDA graphs."""
        if ContextLaunch is not None and not (self._special_inputs or self._host_outputs):
            refill = weakref.WeakMethod(self._refill)
            self.launch = ContextLaunch(self.surroundings, self._execute, self._set_address, refill, self._restore)

    @property
    def surroundings(self) -> Surroundings:
        """What a launch asks and needs before it begins."""
        device_now = torch.cuda.current_device if self._several_gpus else None
        return self.index, self._handle_now, device_now, capturing_now(), self._kernel

    def add(self, launch: Launch) -> None:
        """A CUDA graph's, to be disarmed when this is used in another way."""
        self._graphs = [other for other in self._graphs if other() is not None] + [weakref.ref(launch)]

    def share(self) -> None:
        """Another thread will use this: each call takes the lock from now on, which launches do not."""
        launches, self.shared, self.launch = self._all_launches(), True, None
        for launch in launches:
            launch.retire()

    def _all_launches(self) -> list[Launch]:
        own: list[Launch] = [self.launch] if self.launch is not None else []
        return own + [launch for reference in self._graphs if (launch := reference()) is not None]

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Enqueues a run on the current stream; the outputs, in the module's types, are ready when it has done its
        work. Raises RunError where an input is not what the engine takes, or TensorRT refuses."""
        return self.guarded(self._run, inputs) if self._guard else self._run(inputs)

    def guarded(self, work: Callable[[Sequence[torch.Tensor]], _T], inputs: Sequence[torch.Tensor]) -> _T:
        """``work(inputs)``, one thread at a time and with the engine's GPU as the current one."""
        if not self._guard:
            return work(inputs)
        with self.lock:
            if self._several_gpus and torch.cuda.current_device() != self.index:
                with torch.cuda.device(self.device):
                    return work(inputs)
            return work(inputs)

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.follow_current()
        captured = capturing()
        outputs = self.enqueue(inputs, ahead=not captured)
        if self.launch is not None and self._ahead and not captured:
            self._arm(self.launch, inputs)
        return self._restore(outputs) if self._restore is not None else outputs

    def _arm(self, launch: ContextLaunch, inputs: Sequence[torch.Tensor]) -> None:
        """Leaves calls like this one to ``launch``."""
        assert self._handle is not None and self.stream is not None
        buffers = [
            None if tensor.dtype is slot.dtype and _is_plain(tensor) else slot.buffer
            for slot, tensor in zip(self._inputs, inputs, strict=True)
        ]
        outputs = [(slot.name, slot.ready) for slot in self._outputs]
        launch.arm(inputs, buffers, self._handle, self.stream, [slot.name for slot in self._inputs], outputs)

    def _disarm(self) -> None:
        for launch in self._all_launches():
            if launch.disarm():
                for slot in (*self._inputs, *self._outputs):
                    slot.address, slot.held = 0, _nothing

    def _refill(self, place: int) -> list[tuple[torch.Tensor, int]] | None:
        slot = self._outputs[place]
        return slot.ready if self._prepare(slot) else None

    def follow(self, stream: torch.cuda.Stream) -> None:
        """Runs on ``stream`` from now on, which waits for the last run on another: they share the context's memory."""
        self._disarm()
        last = self.stream
        if last is not None and last.cuda_stream != stream.cuda_stream and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(last)
        self.stream, self._handle = stream, stream.cuda_stream
        for slot in self._inputs:
            slot.held, slot.buffer = _nothing, None
        for slot in self._outputs:
            slot.ready, slot.kept, slot.batch = [], [], 1

    def follow_current(self) -> None:
        if self._handle_now(self.index) != self._handle:
            self.follow(torch.cuda.current_stream(self.device))

    def enqueue(self, inputs: Sequence[torch.Tensor], ahead: bool = False) -> list[torch.Tensor]:
        """A run on the stream that is followed, with outputs in the engine's types. What has not changed since the
        last one is not told to TensorRT again: all that is done before the launch is added to the time of every call.

        ``ahead``: small outputs are allocated before their calls, while the GPU is at work; not for a CUDA graph, whose
        memory is its own.
        """
        self._disarm()
        if not self._told(inputs):
            fitted = self._fit_all(inputs)  # alive until the run is enqueued
            self._tell(inputs, fitted)
        ahead = ahead and self._ahead > 0
        outputs = []
        for slot in self._outputs:
            if ahead and slot.ready:
                output, address = slot.ready.pop()
                if address != slot.address:
                    self._tell_output(slot, address)
                outputs.append(output)
            else:
                outputs.append(self._allocate(slot))
        errors = self._logger.errors
        if not self._execute(self._handle):
            self.key = None
            raise RunError(f"TensorRT refuses to run: {self._logger.since(errors) or 'it does not say why'}")
        if ahead:
            for slot in self._outputs:
                if slot.ready or self._prepare(slot):
                    self._tell_output(slot, slot.ready[-1][1])
        if self._allocators or self._host_outputs:
            self._finish(outputs)
        return outputs

    def _allocate(self, slot: _Slot) -> torch.Tensor:
        """Memory for an output, which TensorRT is told."""
        if slot.like is None:
            return self._scratch
        output = _empty_like(slot.like, memory_format=_CONTIGUOUS)
        address = output.data_ptr() or self._no_address(output)
        if address != slot.address:
            self._tell_output(slot, address)
        return output

    def _no_address(self, tensor: torch.Tensor) -> int:
        """What TensorRT is told of a tensor without elements. Raises RunError where there are some, and no memory."""
        if tensor.numel():
            raise RunError(
                f"a {type(tensor).__name__} has no memory, which an engine works on: a TRTModule cannot be run in "
                "torch's fake mode, nor recorded."
            )
        return self._address_of_nothing

    def _tell_output(self, slot: _Slot, address: int) -> None:
        self._set_address(slot.name, address)
        slot.address = address

    def _prepare(self, slot: _Slot) -> bool:
        """Allocates an output of the next calls. Where memory does not suffice, those calls have to say so."""
        if torch.is_inference_mode_enabled():  # those calls may be made outside of it
            with torch.inference_mode(False):
                return self._prepare(slot)
        assert slot.like is not None
        slot.kept = []
        try:
            made = [_empty_like(slot.like, memory_format=_CONTIGUOUS) for _ in range(slot.batch)]
        except torch.cuda.OutOfMemoryError:
            return False
        slot.ready = [(output, output.data_ptr() or self._no_address(output)) for output in made]
        slot.kept = made
        slot.batch = min(2 * slot.batch, self._ahead)
        return True

    def _told(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether the inputs are as TensorRT reads them, and of the shapes that it knows: it is told where they are."""
        if self.key is None or self._special_inputs:
            return False
        index, stream = self.index, self.stream
        for slot, tensor in zip(self._inputs, inputs):  # noqa: B905 - of the same length
            if tensor.shape != slot.shape:
                return False
            if tensor.dtype is slot.dtype and _is_plain(tensor):
                address = tensor.data_ptr() or self._no_address(tensor)
                if address != slot.address and tensor.get_device() != index:  # an address is of one GPU
                    return False
            elif slot.buffer is not None and tensor.dtype in slot.dtypes and _is_dense(tensor) and not capturing():
                if tensor.get_device() != index:
                    return False
                slot.buffer.copy_(tensor.detach(), non_blocking=True)
                address = slot.buffer.data_ptr() or self._no_address(slot.buffer)
            else:
                return False
            if address != slot.address:
                self._set_address(slot.name, address)
                slot.address, slot.held = address, _nothing
            if slot.held() is not tensor:
                tensor.record_stream(stream)  # type: ignore[arg-type]  # one has been followed
                slot.held = weakref.ref(tensor)
        return True

    def _tell(self, inputs: Sequence[torch.Tensor], fitted: Sequence[torch.Tensor]) -> None:
        """Tells TensorRT where the inputs are, as they were ``fitted``."""
        for slot, given, tensor in zip(self._inputs, inputs, fitted, strict=True):
            slot.address, slot.held = tensor.data_ptr() or self._no_address(tensor), _nothing
            self._set_address(slot.name, slot.address)
            if self.stream is not None and given.is_cuda:
                given.record_stream(self.stream)
            if tensor is not given and not self._special_inputs and not capturing():
                slot.buffer = tensor

    def _fit_all(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs as TensorRT reads them, after it was told their shapes."""
        key = tuple([tensor.shape for tensor in inputs])
        fitted = self.fit(inputs)
        if key != self.key or self._special_inputs:
            assert self._handle is not None
            self._reshape(fitted, key, self._handle)
        return fitted

    def fit(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs as TensorRT reads them: contiguous, on its GPU, of its type where torch has one that it lacks."""
        return [
            tensor
            if tensor.dtype is spec.dtype and tensor.device == self.device and _is_plain(tensor) and not spec.on_host
            else self._fit(spec, tensor)
            for spec, tensor in zip(self.engine.inputs, inputs, strict=True)
        ]

    def _fit(self, spec: IOTensor, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is not spec.dtype and tensor.dtype is not spec.source_dtype:
            takes = " or ".join(dict.fromkeys(map(_name, (spec.source_dtype, spec.dtype))))
            raise RunError(f"input {spec.name!r}: is {_name(tensor.dtype)}, and the engine takes {takes}.")
        if not _is_dense(tensor):
            kind = str(tensor.layout).removeprefix("torch.")
            raise RunError(
                f"input {spec.name!r}: is of layout {kind}, and the engine takes dense tensors: x.to_dense()."
            )
        if spec.on_host:
            return tensor.to("cpu", spec.dtype).contiguous().resolve_neg()
        if tensor.device != self.device:
            where = "the CPU" if tensor.device.type == "cpu" else str(tensor.device)
            raise RunError(
                f"input {spec.name!r}: is on {where}, and the engine on {self.device}. Move the one or the other: "
                f"x.to({str(self.device)!r}), or module.to(…) for another GPU."
            )
        with torch.inference_mode(False):  # a buffer of later calls, which may be made outside of that mode
            return tensor.detach().to(spec.dtype).contiguous().resolve_neg()

    # shapes

    def _reshape(self, inputs: Sequence[torch.Tensor], key: Key, handle: int) -> None:
        """Tells TensorRT the shapes of the inputs, and takes those of the outputs from it."""
        context = self.trt_context
        profile = fitting_profile(self.engine.inputs, key, self._profile)
        self.key, self.epoch = None, self.epoch + 1
        errors = self._logger.errors
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, handle):
                raise RunError(f"TensorRT refuses optimization profile {profile}: {self._logger.since(errors)}")
            self._profile = profile
        for spec, tensor in zip(self.engine.inputs, inputs, strict=True):
            if not context.set_input_shape(spec.name, tuple(tensor.shape)):
                words = self._logger.since(errors)
                raise RunError(f"input {spec.name!r}: TensorRT refuses the shape {list(tensor.shape)}: {words}")
            if spec.on_host:
                context.set_tensor_address(spec.name, tensor.data_ptr())
        for slot, tensor in zip(self._inputs, inputs, strict=True):
            slot.shape, slot.address, slot.buffer = tensor.shape, 0, None
        for slot, spec in zip(self._outputs, self.engine.outputs, strict=True):
            shape = tuple(context.get_tensor_shape(spec.name))
            known = all(size >= 0 for size in shape)
            slot.shape, slot.address, slot.like = (shape if known else None), 0, None
            slot.ready, slot.kept, slot.batch = [], [], 1
            if known:
                place = torch.device("cpu") if spec.on_host else self.device
                slot.like = torch.empty((), dtype=spec.dtype, device=place).expand(shape)
            elif spec.name not in self._allocators:
                self._allocators[spec.name] = _allocator(self._trt, self.device)
                context.set_output_allocator(spec.name, self._allocators[spec.name])
        likes = [slot.like for slot in self._outputs]
        size = sum(like.numel() * like.itemsize for like in likes if like is not None)
        can = not self._host_outputs and all(like is not None for like in likes)
        self._ahead = min(AHEAD, PREPARED // max(size, 1)) if can else 0
        self.key = key

    # outputs

    def _finish(self, outputs: list[torch.Tensor]) -> None:
        """Puts in the outputs whose size the run itself has found out, and those that the host has."""
        if self._host_outputs:
            assert self.stream is not None
            self.stream.synchronize()
        for index, (spec, slot) in enumerate(zip(self.engine.outputs, self._outputs, strict=True)):
            if slot.like is None:
                outputs[index] = self._allocators[spec.name].take(spec.dtype)
            elif spec.on_host:
                outputs[index] = outputs[index].to(self.device)

    @property
    def sizes_known(self) -> bool:
        """Whether all outputs' shapes follow from those of the inputs, and nothing is read or written by the host."""
        tensors = (*self.engine.inputs, *self.engine.outputs)
        return not self._allocators and not any(tensor.on_host for tensor in tensors)


def _restored(types: Sequence[torch.dtype | None], outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs in other types, where one is given."""
    return [output if kind is None else output.to(kind) for kind, output in zip(types, outputs, strict=True)]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its elements are in memory as they are, one after the other: torch negates some as it reads them."""
    return tensor.is_contiguous() and not tensor.is_neg()


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    """A context of its own for a thread; or the one for all of them, where TensorRT lets no two use a profile at the
    same time: then it gives the second one none."""
    if engine.target.shares_profiles:
        return Context(engine)
    with engine.context_lock:
        first: Context | None = engine.first_context() if engine.first_context is not None else None
        made = Context(engine) if first is None or not engine.dynamic else None
        if first is None:
            assert made is not None
            engine.first_context = weakref.ref(made)
            return made
        if made is not None and made.trt_context.active_optimization_profile >= 0:
            return made
        if first.thread != threading.get_ident():
            first.share()
        return first
