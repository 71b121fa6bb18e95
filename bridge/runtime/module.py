"""``TRTModule``: an engine as an ``nn.Module``, called, moved, copied, saved and loaded as other modules are."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError, UsageError
from ..result import ConversionResult
from ..target import Flavour, likely_flavour
from .calling import Calling
from .engine import Engine
from .flattener import Flattener
from .graphs import Session
from .launch import launched
from .profiling import LayerTime, Profile
from .record import Record, record_of, sidecar_of
from .saving import Saved, listed

_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_tracing = torch._C._get_tracing_state
_NOT_ALWAYS_THERE = ("context", "layers", "weight_streaming_budget")
"""Properties that raise where there is no GPU, or that was not asked for which they have."""
_MODULE_CALL = torch.nn.Module.__call__
"""torch.fx puts another one in its place while it traces."""
_GLOBAL_HOOKS = tuple(
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
)
"""What is called around the calls of all modules; torch keeps these dicts, and fills them."""

_NOT_RECORDED = (
    "{} records torch's operators, and a TRTModule's work is TensorRT's: the recording would return this call's values "
    "for ever. Keep the TRTModule outside of what is recorded."
)


class TRTModule(Saved):
    """Runs an engine on torch's CUDA tensors, with no copy of inputs or outputs, on the current stream.

    It takes arguments as the converted module does, and returns what that does, in its types; gradients do not flow.
    The engine is loaded at the first call, on the GPU that the inputs are on (``to`` moves it), so that the object can
    be made, saved and loaded where there is no GPU; a call there raises RunError. Each thread has an execution context
    of its own.

    A call raises RunError where an argument is not what the engine takes: its place in the call, dtype, rank, device,
    or a shape that is in no profile. Of several profiles the one that fits is used.
    """

    def __init__(
        self,
        engine: Any = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        input_flattener: Flattener | None = None,
        output_flattener: Flattener | None = None,
        *,
        cuda_graphs: bool = False,
    ) -> None:
        """``engine``: plan bytes, an ``ICudaEngine``, the path of an engine file (what ``convert`` wrote beside it is
        read too), or None where a state dict is loaded later. Names and flatteners are as in torch2trt; without them
        the arguments go to the engine's inputs in its order, or by their names.

        Raises RunError where an engine file is damaged, and UsageError for what is no engine.
        """
        super().__init__()
        self.cuda_graphs = cuda_graphs
        """Whether calls become CUDA graphs by themselves, once the same shapes came a few times in a row. Inputs are
        then copied into the graph's memory, and outputs out of it."""
        self.conversion: ConversionResult | None = None
        """How the engine came to be, after ``torch2trt`` and ``from_result``."""
        self.keep_network = False
        self._engine: Engine | None = None
        self._input_names, self._output_names = listed(input_names), listed(output_names)
        self._calling: Calling | None = None
        self._begin()
        if engine is not None:
            self._take(engine)
        if input_flattener is not None or output_flattener is not None:
            self._calling = Calling((), input_flattener, output_flattener, tuple(self.input_names or ()))

    @classmethod
    def from_result(cls, result: ConversionResult, *, cuda_graphs: bool = False) -> TRTModule:
        """The engine of a conversion. Raises RunError where it has none."""
        if result.engine is None:
            why = result.error or "; ".join(result.notes) or f"it was {result.status}"
            raise RunError(f"{result.name}: the conversion made no engine: {why}.")
        module = cls(cuda_graphs=cuda_graphs)
        module._calling = result.calling  # as it is: what is saved of it has to find its classes again
        module._take(result.engine)
        module.conversion = result
        return module

    def _take(self, engine: Any) -> None:
        """Makes the given engine this module's."""
        plan: bytes | None = None
        if isinstance(engine, Engine):  # another module's
            self._engine = engine.shared().named(self._input_names, self._output_names)
            return
        if isinstance(engine, (str, os.PathLike)):
            plan, record = self._from_file(Path(engine))
            engine = None
        elif hasattr(engine, "create_execution_context"):  # an ICudaEngine, of whichever TensorRT
            flavour: Flavour = "tensorrt-rtx" if "rtx" in type(engine).__module__ else "tensorrt"
            record = Record(flavour)
        else:
            try:
                plan = bytes(memoryview(engine))  # an IHostMemory too
            except TypeError as error:
                raise UsageError(
                    f"engine: a {type(engine).__name__}; give plan bytes, an ICudaEngine, or an engine file's path. "
                    "A state dict is for load_state_dict."
                ) from error
            record, engine = Record(likely_flavour()), None
        inputs, outputs = tuple(self._input_names or record.inputs), tuple(self._output_names or record.outputs)
        self._engine = Engine(plan, replace(record, inputs=inputs, outputs=outputs), engine)
        if engine is not None:
            self._learn_names(self._engine)

    def _from_file(self, path: Path) -> tuple[bytes, Record]:
        """The plan in a file, and what ``convert`` wrote beside it."""
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; give the path of an engine file, or its bytes.") from error
        if plan.startswith(b"PK\x03\x04"):
            raise UsageError(f"{path}: was written by torch.save; use TRTModule().load_state_dict(torch.load(path)).")
        sidecar = sidecar_of(path)
        if sidecar is None:
            return plan, Record(likely_flavour())
        record = record_of(sidecar)
        record.check(plan, str(path))
        self._input_names = self._input_names or list(record.inputs)
        self._output_names = self._output_names or list(record.outputs)
        if self._calling is None and sidecar.get("calling"):
            self._calling = Calling.unpack(sidecar["calling"])
        return plan, record

    # calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's, whose way to ``forward`` takes longer than the rest where nobody hooks into it."""
        if not _is_dynamo_compiling() and self._launches is not None:
            result = launched(self._launches, args, kwargs)
            if result is not NotImplemented:
                return result
        if (
            self._forward_pre_hooks
            or self._forward_hooks
            or self._backward_pre_hooks
            or self._backward_hooks
            or self._compiled_call_impl is not None
            or any(_GLOBAL_HOOKS)
            or torch.nn.Module.__call__ is not _MODULE_CALL
        ):
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return self._uncompiled(args, kwargs)
        if _is_tracing() is not None:
            raise RunError(_NOT_RECORDED.format("torch.jit.trace"))
        session = getattr(self._local, "session", None)
        if session is None or session.engine is not self._engine:
            session = self._open(args, kwargs)
        calling = self._calling
        assert calling is not None
        tensors = None if kwargs else calling.take(args)
        if tensors is None:
            tensors = calling.flatten(args, kwargs)
        if not session.takes_all:
            tensors = session.pick(tensors)
        outputs = session.run(tensors, self.cuda_graphs and self._profile is None)
        if session.launch is not None:
            self._leave_to(session)
        return calling.unflatten(outputs)

    def _leave_to(self, session: Session) -> None:
        """Calls like the one that was just made, by this thread, are left to the session's launch, unless more is to
        be done in a call than to run the engine."""
        changed = "forward" in self.__dict__ or type(self).forward is not TRTModule.forward
        if changed or self._compiled_call_impl is not None:
            return
        assert self._calling is not None and session.launch is not None
        if self._launches is None:
            own = (self._forward_pre_hooks, self._forward_hooks, self._backward_pre_hooks, self._backward_hooks)
            engine = session.engine
            taken = None if session.takes_all else engine.taken
            self._launches = self._calling.launches((*own, *_GLOBAL_HOOKS), _is_tracing, len(engine.outputs), taken)
        self._launches.put(session.launch)

    def __setattr__(self, name: str, value: Any) -> None:
        """Whatever is set, the next call is made from the beginning."""
        self.__dict__["_launches"] = None
        super().__setattr__(name, value)

    @torch.compiler.disable(reason="an engine's work is TensorRT's")  # type: ignore[no-untyped-call, untyped-decorator]
    def _uncompiled(self, args: Any, kwargs: Any) -> Any:
        """The call as torch.compile makes it: around what it compiles."""
        if torch.compiler.is_exporting():
            raise RunError(_NOT_RECORDED.format("torch.export"))
        return self.forward(*args, **kwargs)

    def capture(self, *args: Any, **kwargs: Any) -> TRTModule:
        """Makes a CUDA graph for inputs of these shapes, and of the calling thread; calls with such inputs replay it.

        The arguments are those of a call, with shapes or tensors in the place of tensors. Returns the module, so that
        further shapes can follow (8 graphs at most). Raises RunError where the engine cannot be captured.
        """
        session = self._open(args, kwargs)
        assert self._calling is not None
        given = session.pick(self._calling.flatten(args, kwargs, shapes=True))
        tensors = [
            item
            if isinstance(item, torch.Tensor)
            else torch.zeros(tuple(item), dtype=spec.dtype, device=session.engine.device)
            for spec, item in zip(session.engine.inputs, given, strict=True)
        ]
        session.capture(tensors)
        self._launches = None
        return self

    def _open(self, args: Any, kwargs: Any) -> Session:
        """This thread's session, on the GPU that the inputs are on."""
        held = self._held()
        session: Session | None = getattr(self._local, "session", None)
        if session is None or session.engine is not held:
            engine = held.load(_device_of((args, kwargs)))
            if engine.record.stripped:
                raise RunError("the engine was built without its weights (strip_weights): call refit first.")
            self._learn_names(engine)
            session = self._local.session = Session(engine)
            if self._profile is not None:
                session.profile(self._profile)
        return session

    def _held(self) -> Engine:
        if self._engine is None:
            raise RunError("this TRTModule holds no engine: give it one, or load a state dict into it.")
        return self._engine

    def _learn_names(self, engine: Engine) -> None:
        """What was not said when this was made is asked of the engine."""
        if not self._input_names:
            self._input_names = [tensor.name for tensor in engine.inputs]
        if not self._output_names:
            self._output_names = [tensor.name for tensor in engine.outputs]
        if self._calling is None:
            self._calling = Calling((), None, None, tuple(self._input_names))

    # what can be asked of it, and set, as torch2trt's attributes are

    @property
    def engine(self) -> Engine | None:
        """The engine, which has the attributes of TensorRT's too. Whatever the constructor takes can be put here."""
        return self._engine

    @engine.setter
    def engine(self, engine: Any) -> None:
        self._local, self._engine = threading.local(), None
        if engine is not None:
            self._take(engine)

    @engine.deleter
    def engine(self) -> None:
        self.engine = None

    @property
    def input_names(self) -> list[str] | None:
        return self._input_names

    @input_names.setter
    def input_names(self, names: Sequence[str] | None) -> None:
        self._input_names = listed(names)
        self._rename()
        if self._calling is not None and self._input_names:
            self._calling = replace(self._calling, names=tuple(self._input_names))

    @property
    def output_names(self) -> list[str] | None:
        return self._output_names

    @output_names.setter
    def output_names(self, names: Sequence[str] | None) -> None:
        self._output_names = listed(names)
        self._rename()

    def _rename(self) -> None:
        if self._engine is not None:
            self._local, self._engine = threading.local(), self._engine.named(self._input_names, self._output_names)

    @property
    def input_flattener(self) -> Flattener | None:
        return self._calling.inputs if self._calling is not None else None

    @input_flattener.setter
    def input_flattener(self, flattener: Flattener | None) -> None:
        self._calling = Calling((), flattener, self.output_flattener, tuple(self._input_names or ()))

    @property
    def output_flattener(self) -> Flattener | None:
        return self._calling.outputs if self._calling is not None else None

    @output_flattener.setter
    def output_flattener(self, flattener: Flattener | None) -> None:
        calling = self._calling or Calling((), None, None, tuple(self._input_names or ()))
        self._calling = replace(calling, outputs=flattener)

    def __getattr__(self, name: str) -> Any:
        """``network``: TensorRT's, with ``keep_network``: ``conversion.onnx``, parsed when it is first asked for."""
        if name != "network":
            return super().__getattr__(name)
        if not self.keep_network or self.conversion is None:
            raise AttributeError("network: only a module that torch2trt made with keep_network=True has one.")
        from .network import parsed_network

        return parsed_network(self, self.conversion)

    def __dir__(self) -> list[str]:
        """For programs that read whatever a module has, as torch.jit does."""
        names = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in names if name not in _NOT_ALWAYS_THERE]

    @property
    def context(self) -> Any:
        """TensorRT's execution context of this thread; None in its place frees those of all threads."""
        return self._open((), {}).context.trt_context

    @context.setter
    def context(self, context: None) -> None:
        if context is not None:
            raise UsageError(
                "context: a TRTModule makes an execution context for each thread by itself; leave the line out that "
                "sets one. (None frees those that there are.)"
            )
        self._local = threading.local()

    @context.deleter
    def context(self) -> None:
        self.context = None

    @property
    def device(self) -> torch.device | None:
        """The GPU that the engine was loaded on; None before its first use."""
        return self._engine.device if self._engine is not None else None

    def serialize(self) -> bytes:
        """The plan, as an engine file holds it. Raises RunError where there is none."""
        return self._held().serialize()

    def extra_repr(self) -> str:
        if self._engine is None:
            return "no engine"
        target = f"{self._engine.record.flavour} {self._engine.record.version}".strip()
        return f"{target}, {self.device or 'not loaded'}, inputs={self.input_names}, outputs={self.output_names}"

    # weights, profiling

    def refit(self, weights: Mapping[str, Any] | str | Path) -> TRTModule:
        """Puts other weights into the engine, with no build: arrays by name, or an ONNX file with the same graph.

        Such a file is ``bridge.convert(module, inputs, build=False).onnx`` of the module with its new weights. Raises
        RunError where the engine was not built with ``BuildSettings(refittable=True)``, or weights do not fit.
        """
        self._local = threading.local()  # with the contexts that know the old weights
        self._engine = self._held().refit(Path(weights) if isinstance(weights, str) else weights)
        return self

    @property
    def weight_streaming_budget(self) -> int:
        """Bytes of the weights that stay on the GPU, of an engine that was built with ``weight_streaming``."""
        return self._held().weight_budget

    @weight_streaming_budget.setter
    def weight_streaming_budget(self, size: int) -> None:
        self._local = threading.local()  # TensorRT changes the budget only while there is no context
        self._held().weight_budget = size

    def enable_profiling(self) -> None:
        """From now on each call notes how long each layer takes (``layers``, ``layer_table``), and is slower for it."""
        self._profile = Profile()
        self._local = threading.local()

    def disable_profiling(self) -> None:
        self._profile = None
        self._local = threading.local()

    @property
    def layers(self) -> list[LayerTime]:
        """The layers with their times since ``enable_profiling``, in the engine's order."""
        if self._profile is None:
            raise RunError("profiling is off: call enable_profiling(), and the module a few times.")
        return self._profile.layers

    def layer_table(self) -> str:
        """``layers`` as a table, slowest first."""
        if self._profile is None:
            raise RunError("profiling is off: call enable_profiling(), and the module a few times.")
        return self._profile.table()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TRTModule:
        """``to``, ``cuda``, ``cpu``: another GPU gets the engine; off the GPUs it waits as a plan for its next use."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._engine is not None and self._engine.loaded:
            before = self._engine.device
            after = fn(torch.empty(0, device=before)).device
            if after != before:
                self._engine = self._engine.unloaded()
                self._local = threading.local()
                if after.type == "cuda":
                    self._engine.load(after)
        return self


def _device_of(values: Any) -> torch.device | None:
    """The GPU of the first CUDA tensor in nested arguments."""
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves(values)
    return next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda), None)
