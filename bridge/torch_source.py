"""A torch module with its example call: the source of a conversion, and the reference that exports are held to."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from .errors import ExportError, RunError, UsageError
from .exporter_words import user_line
from .inputs import Array, Call, Case, Profile, check_names
from .tensors import named_leaves, to_numpy, to_torch

if TYPE_CHECKING:
    import torch

    from .assumed import Assumed
    from .runtime.calling import Calling
    from .runtime.flattener import Flattener

OF_BFLOAT16 = 22
"""The opset from which on Conv and many others take bfloat16; the exporters' own choices are older."""


@dataclass
class Source:
    """A torch module with its example call: what is exported, and the reference that exports are held to."""

    module: torch.nn.Module
    call: Call
    program: torch.export.ExportedProgram | None = None
    """The source itself, where it was one: exported as it is."""
    output_names: list[str] = field(default_factory=list)
    outputs: Flattener | None = None
    """The structure of what the module returned; constants that differed from run to run are left out."""

    gradients: bool = False
    """Whether the module takes derivatives of what it is given, for which torch has to keep track of them."""

    traced: list[str] = field(default_factory=list)
    """What should be known of the last trace by the older exporter, or of one with every place."""

    by_values: bool = False
    """Whether the module's code is known to decide by values of tensors."""

    every_place: bool = False
    """Whether an export is tried that takes for granted what nonzero() finds."""

    assumed: Assumed | None = None
    """What the last export by dynamo took for granted of dynamic sizes."""

    elsewhere: list[Case] = field(default_factory=list)
    """Further shapes that an exported model has to hold at: where an export took for granted what is not so there."""

    seen: list[Assumed] = field(default_factory=list)
    """What was taken for granted by each export by dynamo whose model was looked at."""

    general: Case | None = None
    """Where most of that is not so, and some of the last one's: shapes to export at."""

    def __post_init__(self) -> None:
        self.device = next(iter(self.call.tensors.values())).device

    @property
    def opset(self) -> int | None:
        """The opset that the module's types need, as far as these show outside of ``forward``; None leaves it to the
        exporter."""
        import torch

        tensors = (*self.module.parameters(), *self.module.buffers(), *self.call.tensors.values())
        return OF_BFLOAT16 if any(tensor.dtype == torch.bfloat16 for tensor in tensors) else None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The module's outputs by name. Raises ExportError where the module raises."""
        import torch

        tensors = [to_torch(feeds[name]).to(self.device) for name in self.call.tensors]
        args, kwargs = self.call.rebuild(tensors)
        try:
            with torch.set_grad_enabled(self.gradients), full_precision():
                result = self.module(*args, **kwargs)
        except Exception as error:  # user code may raise anything, and is named as the cause
            if not self.gradients and "does not require grad" in str(error):
                self.gradients = True
                return self.run(feeds)
            raise ExportError(
                f"the module raises in forward: {type(error).__name__}: {error}{user_line(error)}. "
                f"Its inputs were {_shapes(feeds)}."
            ) from error
        names, outputs = flatten_outputs(result)
        _check_classes(result)
        if not outputs:
            raise ExportError("the module returns no tensor: there is nothing for an engine to compute.")
        if not self.output_names:
            self.output_names = [f"output.{name}" if name in self.call.tensors else name for name in names]
        check_names("output_names", self.output_names, names)
        for name in self.output_names:
            if name in self.call.tensors:
                raise UsageError(f"output_names: {name!r} is the name of an input.")
        self._remember(result)
        # copies, since a module may return a buffer, which the next run changes
        return {name: to_numpy(item).copy() for name, item in zip(self.output_names, outputs, strict=True)}

    def _remember(self, result: Any) -> None:
        import torch

        from .runtime.flattener import Flattener

        found = Flattener.from_value(result, torch.is_tensor)
        try:
            self.outputs = found.without_varying(self.outputs or found)
        except RunError as error:
            raise ExportError(
                "the module returns another structure of tensors for other shapes of its inputs, or in another run: "
                "an engine always returns the same."
            ) from error

    def calling(self) -> tuple[Calling, list[str]]:
        """How the engine is called in the module's place, and notes on what it will not return."""
        from .runtime.calling import Calling

        forward, structure, names = self.module.forward, self.call.structure, tuple(self.call.tensors)
        lost = self.outputs.lost("output") if self.outputs is not None else []
        notes = [f"{place}: is no tensor and no constant; as a module, the engine returns None there" for place in lost]
        calling = Calling.of(forward, structure, self.outputs, names)
        try:
            calling.pack()
        except RunError as error:
            calling = Calling.of(forward, structure, None, names)
            notes = [f"as a module, the engine returns a flat tuple of tensors: {error}"]
        return calling, notes


def _check_classes(result: Any) -> None:
    """Raises ExportError where tensors are in a dataclass that torch does not take apart: they would be left out."""
    import torch

    for path, leaf in named_leaves(result):
        if is_dataclass(leaf) and any(isinstance(getattr(leaf, item.name), torch.Tensor) for item in fields(leaf)):
            place, name = ".".join(map(str, ("output", *path))), type(leaf).__name__
            raise ExportError(
                f"the module returns {name} as {place!r}, a dataclass that torch does not take apart: call "
                f"torch.export.register_dataclass({name}) first, once."
            )


def flatten_outputs(result: Any) -> tuple[list[str], list[torch.Tensor]]:
    """The tensors of a nested result and their names, after keys, fields and places; complex ones as pairs of reals."""
    import torch

    names: list[str] = []
    tensors: list[torch.Tensor] = []
    for path, leaf in named_leaves(result):
        if isinstance(leaf, torch.Tensor):
            steps = [str(step) for step in path]
            if not steps or steps[0].isdigit():
                steps.insert(0, "output")
            names.append(".".join(steps))
            tensors.append(torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf)
    return names, tensors


def make_source(
    source: Any, inputs: Any, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> Source:
    """A Source of an ``nn.Module`` or an ``ExportedProgram``. Raises UsageError where the inputs do not fit."""
    import torch

    from .inputs import take_apart

    program = source if isinstance(source, torch.export.ExportedProgram) else None
    for what, given in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(given, str):
            raise UsageError(f"{what}: is the word {given!r}; give a list of names.")
    module = program.module() if program is not None else source
    _check_module(module)
    if isinstance(module, torch.jit.ScriptModule):
        from .scripted import Scripted

        module = Scripted(module)
    positional = None
    if program is not None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        positional = len(args)
        if inputs is None:
            inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if inputs is None:
        raise UsageError("inputs: a torch module is exported by running it; give example inputs.")
    call = take_apart(module.forward, inputs, input_names, f"{class_name(source)}.forward", positional)
    made = Source(module, call, program)
    if output_names is not None:
        made.output_names = list(output_names)
    return made


def class_name(source: Any) -> str:
    """Of a ScriptModule, that of the module it was made from."""
    import torch

    return str(source.original_name if isinstance(source, torch.jit.ScriptModule) else type(source).__name__)


def _check_module(module: torch.nn.Module) -> None:
    """Raises UsageError where it cannot be exported, whatever its inputs are."""
    from .runtime.module import TRTModule

    engines = [name for name, item in module.named_modules() if isinstance(item, TRTModule)]
    if engines:
        where = f"{type(module).__name__}: {engines[0]!r}" if engines[0] else "the module"
        raise UsageError(f"{where} is a TRTModule, an engine already: convert the module that it was made from.")
    empty = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if empty:
        raise UsageError(
            f"{type(module).__name__}: {', '.join(empty[:3])}{', …' * (len(empty) > 3)} are on the meta device, and "
            "have no values. Load them first: module.to_empty(device='cpu'), then load_state_dict."
        )


def check_static_axes(source: Source, profiles: Mapping[str, Profile]) -> None:
    """Raises UsageError where a profile is dynamic along an axis that an ExportedProgram has as a constant."""
    import torch

    if source.program is None:
        return
    names = {spec.arg.name for spec in source.program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    values = [
        node.meta.get("val") for node in source.program.graph.nodes if node.op == "placeholder" and node.name in names
    ]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    for name, shape in zip(source.call.tensors, shapes, strict=True):
        for axis in profiles[name].dynamic_axes:
            if isinstance(shape[axis], int):
                raise UsageError(
                    f"profiles: {name!r}, axis {axis}: the ExportedProgram has the constant {shape[axis]} there; "
                    "export it with dynamic_shapes."
                )


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[bool]:
    """The module in eval mode, each submodule put back afterwards; yields whether that changed anything."""
    training = [item for item in module.modules() if getattr(item, "training", False)]  # none of a frozen ScriptModule
    for item in training:
        item.training = False
    try:
        yield bool(training)
    finally:
        for item in training:
            item.training = True


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 on a GPU as fp32, not TF32: the reference must not be what is in doubt."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _shapes(feeds: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())
