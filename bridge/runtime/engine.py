"""A plan and, from its first use on, the engine that TensorRT makes of it on one GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch

from ..errors import RunError, UsageError
from ..plugins.loading import PluginError, load_plugins, read_plugins
from ..target import Target, runtime
from .logger import trt_logger
from .record import Record

Shape = tuple[int, ...]

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "FP8": torch.float8_e4m3fn,
}
"""By the name of TensorRT's DataType."""

_NARROWED = {torch.int32: torch.int64, torch.float32: torch.float64}
"""What the engine has, and what it may be given where nothing is known of the module that it was made from."""

_BINDINGS = {
    "binding_is_input": "get_tensor_mode(name)",
    "get_binding_dtype": "get_tensor_dtype(name)",
    "get_binding_index": "the name itself",
    "get_binding_name": "get_tensor_name(index)",
    "get_binding_shape": "get_tensor_shape(name)",
    "get_location": "get_tensor_location(name)",
    "get_profile_shape": "get_tensor_profile_shape(name, profile)",
    "max_batch_size": "get_tensor_profile_shape(name, 0)[2][0]",
    "num_bindings": "num_io_tensors",
}
"""What TensorRT's engine had until version 10, and what it has in its place."""


@dataclass(frozen=True)
class IOTensor:
    """An input or output of an engine."""

    name: str
    dtype: torch.dtype
    shape: Shape
    """-1 where it is dynamic."""
    source_dtype: torch.dtype
    """What the torch module has there."""
    on_host: bool
    """Whether TensorRT reads or writes it in the host's memory, as it does with shapes."""
    profiles: tuple[tuple[Shape, Shape, Shape], ...] = ()
    """Of an input: the min, opt and max shape in each optimization profile."""


class PlanBytes(bytearray):
    """A plan in a state dict: bytes, as torch2trt has them there, that are saved as a tensor.

    pickle would write bytes out as text, half as large again and of 4 GiB at most.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanBytes:
        return PlanBytes(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return torch.frombuffer(self, dtype=torch.uint8).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class Engine:
    """A plan, and what TensorRT makes of it on the first GPU that it is used on.

    It has the attributes of TensorRT's ``ICudaEngine`` too. It is safe to use from several threads.
    """

    inputs: list[IOTensor]
    outputs: list[IOTensor]
    taken: list[int]
    """Which of the module's inputs the engine takes: TensorRT may drop what nothing reads."""
    dynamic: bool

    def __init__(self, plan: bytes | None, record: Record, trt_engine: Any = None, keep: Any = None) -> None:
        """``trt_engine``: an ``ICudaEngine`` of the current GPU, in place of a plan; ``keep``: what it needs alive."""
        self.record = record
        self.device: torch.device | None = None
        """The GPU that it was loaded on."""
        self._plan = plan
        self._lock = threading.RLock()
        self._keep = keep
        self._has_others = False
        """Whether more than one module may use it."""
        self._trt_engine: Any = None
        self.context_lock = threading.Lock()
        self.first_context: Any = None
        """A weak reference to it, where TensorRT may let no two contexts use a profile (``new_context``)."""
        if trt_engine is not None:
            self._adopt(trt_engine, current_gpu(None))

    # loading

    @property
    def trt_engine(self) -> Any:
        """TensorRT's ``ICudaEngine``, made on the current GPU if it has not been yet. Raises RunError."""
        return self._trt_engine if self._trt_engine is not None else self.load(None)._trt_engine

    @property
    def loaded(self) -> bool:
        return self._trt_engine is not None

    @property
    def target(self) -> Target:
        """The TensorRT that runs it. Raises RunError where it is not installed."""
        try:
            return runtime(self.record.flavour)
        except UsageError as error:
            raise RunError(f"the engine cannot run here: {error}") from error

    def load(self, device: torch.device | None) -> Engine:
        """Deserialises the plan on ``device``, or the current GPU, unless that was done; returns itself.

        Raises RunError where this machine cannot run it, with the reason, and what to do.
        """
        with self._lock:
            if self._trt_engine is None:
                check_gpu()
                device = current_gpu(device)
                with torch.cuda.device(device):
                    self._adopt(self._deserialise(device), device)
        return self

    def check_here(self, device: torch.device) -> None:
        """Raises RunError where it was built by a TensorRT or for a GPU that is not the one here."""
        record = self.record
        if record.version:
            reason = self.target.why_not_load(
                record.version,
                record.compute_capabilities,
                capability(device),
                newer=record.newer_versions,
                ampere_plus=record.ampere_plus,
            )
            if reason:
                raise RunError(
                    f"the engine cannot run here: {reason}. Convert the model again on this machine, or install what "
                    "it was built with."
                )

    def _deserialise(self, device: torch.device) -> Any:
        self.check_here(device)
        record, plan = self.record, self._plan
        assert plan is not None
        trt, target = self.target.module(), self.target
        record.check(plan, "the engine")
        logger = trt_logger(trt)
        try:
            if hasattr(trt, "init_libnvinfer_plugins"):
                trt.init_libnvinfer_plugins(logger, "")
            load_plugins(read_plugins(record.plugins), trt)
        except PluginError as error:
            raise RunError(f"the engine cannot run here: {error}") from error
        errors = logger.errors
        loader = trt.Runtime(logger)
        if record.newer_versions:
            loader.engine_host_code_allowed = True  # such a plan holds code for the host
        with logger.silent():
            engine = loader.deserialize_cuda_engine(plan)
        if engine is None:
            words = logger.since(errors) or "it does not say why"
            raise RunError(
                f"{target} does not load the engine of {len(plan)} bytes: it was cut short, or built by another "
                f"version of TensorRT or for another GPU. Convert the model again on this machine. TensorRT: {words}"
            )
        self._keep = loader
        return engine

    def _adopt(self, engine: Any, device: torch.device) -> None:
        trt = self.target.module()
        inputs: dict[str, IOTensor] = {}
        outputs: dict[str, IOTensor] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (inputs if is_input else outputs)[name] = self._describe(engine, name, is_input, trt)
        names = self.record.inputs or tuple(inputs)
        _check_names("inputs", [name for name in inputs if name not in names], names)
        named = self.record.outputs or tuple(outputs)
        _check_names("outputs", [name for name in named if name not in outputs], list(outputs))
        _check_names("outputs", [name for name in outputs if name not in named], named)  # each needs memory
        self.taken = [place for place, name in enumerate(names) if name in inputs]
        self.inputs = [inputs[names[place]] for place in self.taken]
        self.outputs = [outputs[name] for name in self.record.outputs or outputs]
        self.dynamic = any(-1 in tensor.shape for tensor in self.inputs)
        self.device, self._trt_engine = device, engine
        if not (self.record.newer_versions or self.record.stripped):  # what TensorRT serialises again holds less
            self._plan = None

    def _describe(self, engine: Any, name: str, is_input: bool, trt: Any) -> IOTensor:
        kind = str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1]
        if kind not in _DTYPES:
            raise RunError(f"the engine's tensor {name!r} is of type {kind}, which torch has not.")
        dtype = _DTYPES[kind]
        on_host = engine.get_tensor_location(name) == trt.TensorLocation.HOST
        stated = self.record.source_types.get(name)
        if stated is not None:
            source: torch.dtype = getattr(torch, stated)
        else:
            source = dtype if self.record.version or not is_input else _NARROWED.get(dtype, dtype)
        profiles = []
        for index in range(engine.num_optimization_profiles if is_input else 0):
            low, best, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            profiles.append((low, best, high))
        return IOTensor(name, dtype, tuple(engine.get_tensor_shape(name)), source, on_host, tuple(profiles))

    # use

    def serialize(self) -> bytes:
        """The plan, with the weights that it has now."""
        plan = self._plan  # which another thread that loads it lets go of
        if plan is not None:
            return plan
        engine = self.trt_engine
        if engine.refittable and hasattr(engine, "create_serialization_config"):
            flags, config = self.target.module().SerializationFlag, engine.create_serialization_config()
            config.set_flag(flags.INCLUDE_REFIT)
            if not self.record.stripped:
                config.clear_flag(flags.EXCLUDE_WEIGHTS)
            return bytes(engine.serialize_with_config(config))
        return bytes(engine.serialize())

    @property
    def weight_budget(self) -> int:
        """Bytes of weights that stay on the GPU; the others are fetched from the host's memory as they are needed."""
        return int(self._streaming().weight_streaming_budget_v2)

    @weight_budget.setter
    def weight_budget(self, size: int) -> None:
        self._streaming().weight_streaming_budget_v2 = size

    def _streaming(self) -> Any:
        engine = self.trt_engine
        if not getattr(engine, "streamable_weights_size", 0):
            raise RunError(
                "the engine was not built to stream weights; convert with builder={'weight_streaming': True} for a "
                "TensorRT that has it."
            )
        return engine

    def unloaded(self) -> Engine:
        """The same engine before its first use; this one's GPU memory is freed once nobody holds it."""
        if not self.loaded:
            return self
        plan = self.serialize()
        return Engine(plan, self.record.of(plan))

    def shared(self) -> Engine:
        """For another module: this one, or, where its weights can be changed, another of the same plan."""
        if self.loaded and self.trt_engine.refittable:
            return self.unloaded()
        self._has_others = True
        return self

    def named(self, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Engine:
        """The same engine, with its inputs and outputs in the order of these names; without them, as they are."""
        record, known = self.record, (self.record.inputs, self.record.outputs)
        if self.loaded:
            known = tuple(tensor.name for tensor in self.inputs), tuple(tensor.name for tensor in self.outputs)
        asked = tuple(inputs or record.inputs), tuple(outputs or record.outputs)
        if asked in ((record.inputs, record.outputs), known):
            return self
        plan = self.serialize()
        return Engine(plan, replace(record.of(plan), inputs=asked[0], outputs=asked[1]))

    def refit(self, weights: Mapping[str, Any] | Path) -> Engine:
        """Puts other weights into the engine: arrays by the name of the weights, or those of an ONNX file.

        Returns the engine with them; contexts of this one must not be used any more. Raises RunError where the engine
        was not built for it, where a name or size is not the engine's, and where weights are missing.
        """
        from .refit import refit

        engine = self.load(None)
        if self._has_others and engine.trt_engine.refittable:
            engine = self.unloaded().load(self.device)
        assert engine.device is not None
        torch.cuda.synchronize(engine.device)  # TensorRT leaves open what a call under way would read
        with torch.cuda.device(engine.device):
            refit(engine.trt_engine, self.target, weights)
            return Engine(None, replace(self.record, sha256="", stripped=False), engine._trt_engine, engine._keep)

    def __len__(self) -> int:
        """How many inputs and outputs there are; with ``iter`` and ``engine[0]``, as TensorRT had it before 10."""
        return int(self.trt_engine.num_io_tensors)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"tensor {index} of {len(self)}")
        return str(self.trt_engine.get_tensor_name(index))

    def __bool__(self) -> bool:
        return True  # whatever its length, which would have to be asked of a GPU

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in type(self).__annotations__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        engine = self.trt_engine
        if name in _BINDINGS and not hasattr(engine, name):
            raise AttributeError(f"{name}: TensorRT has no bindings since version 10: use {_BINDINGS[name]}.")
        return getattr(engine, name)


def _check_names(what: str, wrong: Sequence[str], known: Sequence[str]) -> None:
    if wrong:
        raise RunError(f"the engine's {what} are not the module's: {', '.join(wrong)} is not of {', '.join(known)}.")


def current_gpu(device: torch.device | None) -> torch.device:
    """``device`` with its number; without one the current GPU."""
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    return torch.device("cuda", index)


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def check_gpu() -> None:
    """Raises RunError where no engine can run, with what is missing."""
    if not torch.cuda.is_available():
        what = (
            f"this torch ({torch.__version__}) is without CUDA"
            if torch.version.cuda is None
            else "there is no NVIDIA GPU here, or no driver for it"
        )
        raise RunError(
            f"the engine cannot run here: {what}. It was built, and not run; save it (state_dict, or the engine file), "
            "and load it on the machine with the GPU that it was built for."
        )
