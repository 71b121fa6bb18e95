"""From a torch module to an ONNX file, and whether that file computes what the module does.

The module is exported through a wrapper that takes and returns flat tuples of tensors, so that both exporters see the
same names, order and dynamic axes however nested the arguments are, and constants stay constants.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from . import custom_ops
from .errors import ExportError, RunError, UsageError
from .exporter_words import branches_taken, one_line, scripted_parts, user_line
from .inputs import Array, Call, Case, Profile, check_names, resized
from .scopes import write_scopes
from .tensors import named_leaves, to_numpy, to_torch

if TYPE_CHECKING:
    import torch

    from .runtime.calling import Calling
    from .runtime.flattener import Flattener

Exporter = Literal["dynamo", "torchscript"]

EXPORTERS: tuple[Exporter, ...] = ("dynamo", "torchscript")
"""The preferred one first. It writes newer opsets than some parsers read; the passes bring them down."""

OF_BFLOAT16 = 22
"""The opset from which on Conv and many others take bfloat16; the exporters' own choices are older."""
INLINE_LIMIT = 64 << 20
"""A model with more weights than this (bytes) keeps them in a data file beside it."""


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

    traced: list[str] = field(default_factory=list)
    """What should be known of the last trace by the older exporter."""

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
            with torch.no_grad(), _full_precision():
                result = self.module(*args, **kwargs)
        except Exception as error:  # user code may raise anything, and is named as the cause
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
            tensors.append(torch.view_as_real(leaf) if leaf.is_complex() else leaf)
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
    positional = None
    if program is not None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        positional = len(args)
        if inputs is None:
            inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if inputs is None:
        raise UsageError("inputs: a torch module is exported by running it; give example inputs.")
    call = take_apart(module.forward, inputs, input_names, f"{type(module).__name__}.forward", positional)
    made = Source(module, call, program)
    if output_names is not None:
        made.output_names = list(output_names)
    return made


def _check_module(module: torch.nn.Module) -> None:
    """Raises UsageError where it cannot be exported, whatever its inputs are."""
    import torch

    from .runtime.module import TRTModule

    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(
            f"{type(module).__name__} {getattr(module, 'original_name', '')!r}: torch.onnx exports no ScriptModule. "
            "Give the nn.Module that it was scripted or traced from, or an ONNX file."
        )
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
    training = [item for item in module.modules() if item.training]
    for item in training:
        item.training = False
    try:
        yield bool(training)
    finally:
        for item in training:
            item.training = True


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 on a GPU as fp32, not TF32: the reference must not be what is in doubt."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@dataclass(frozen=True)
class Exported:
    """An exported model that computes what the module does."""

    exporter: Exporter
    files: tuple[str, ...]
    notes: list[str]


def export(
    source: Source,
    profiles: Mapping[str, Profile],
    example: Case,
    path: Path,
    *,
    exporters: Sequence[Exporter],
    opset: int | None,
    accept: Callable[[Path], str | None],
) -> Exported:
    """Writes the module to ``path`` by the first exporter whose model is accepted.

    ``accept`` is given the file and returns why it will not do, or None. Raises ExportError with every exporter's
    reason where none does.
    """

    def why_not(exporter: Exporter) -> str | None:
        _remove(path)
        reason = _export_with(exporter, source, profiles, example, path, opset)
        return reason or _lost_axes(path, profiles) or accept(path)

    reasons: list[str] = []
    for exporter in exporters:
        reason = why_not(exporter)
        if reason is not None and exporter == "dynamo" and path.exists() and _may_depend_on_sizes(source, profiles):
            with _reading_the_code():
                reason = why_not(exporter) and reason
        if reason is None:
            files = (path.name + ".data", path.name) if path.with_name(path.name + ".data").exists() else (path.name,)
            age = "older" if exporter == "torchscript" else "newer"
            notes = [f"exported by torch.onnx's {age} exporter ({exporter}), since {item}" for item in reasons]
            notes += source.traced if exporter == "torchscript" else []
            return Exported(exporter, files, notes)
        reasons.append(f"{exporter}: {reason}")
    advice = filter(None, (custom_ops.advice("\n".join(reasons)), scripted_parts(source.module)))
    raise ExportError("\n".join(["torch.onnx does not export the module.", *reasons, *advice]))


def _may_depend_on_sizes(source: Source, profiles: Mapping[str, Profile]) -> bool:
    return source.program is None and any(profile.dynamic_axes for profile in profiles.values())


def _reading_the_code() -> contextlib.AbstractContextManager[Any]:
    """Within it, torch.export reads the module's Python rather than run it, which follows ``int(size * 1.5)``.

    torch.onnx does so of itself where running it fails, and not where a size has silently become a constant.
    """
    from torch.onnx._internal.exporter import _capture_strategies

    strict = (_capture_strategies.TorchExportStrictStrategy,)
    return mock.patch.object(_capture_strategies, "CAPTURE_STRATEGIES", strict)


def _remove(path: Path) -> None:
    for name in (path, path.with_name(path.name + ".data")):
        name.unlink(missing_ok=True)


def _export_with(
    exporter: Exporter,
    source: Source,
    profiles: Mapping[str, Profile],
    example: Case,
    path: Path,
    opset: int | None,
) -> str | None:
    """Exports to ``path``; returns the exporter's reason, in a line, where it fails."""
    import torch

    tensors = tuple(
        to_torch(resized(example.feeds[name], _trace_shape(example.feeds[name].shape, profiles[name]))).to(
            source.device
        )
        for name in source.call.tensors
    )
    run = _by_dynamo if exporter == "dynamo" else _by_torchscript
    try:
        with _quiet(), _full_precision(), torch.no_grad():
            run(source, tensors, profiles, path, opset)
            if opset is None and _lacks_bfloat16(path):
                _remove(path)
                run(source, tensors, profiles, path, OF_BFLOAT16)
    except OSError:
        raise  # the disk's failure, not the exporter's
    except Exception as error:  # noqa: BLE001 - exporters raise whatever the traced code or torch raises
        return one_line(error, list(source.call.tensors))
    return None


def _lacks_bfloat16(path: Path) -> bool:
    """Whether the model has bfloat16, as under torch.autocast, in an opset that is too old for it."""
    import onnx

    from .rounded import has_bfloat16

    model = onnx.load(str(path), load_external_data=False)
    opset = max(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    return opset < OF_BFLOAT16 and has_bfloat16(model.graph)


def _trace_shape(shape: Sequence[int], profile: Profile) -> list[int]:
    """The example's shape, with more than 1 along dynamic axes: torch.export takes a size of 1 for a constant."""
    sizes = list(shape)
    for axis in profile.dynamic_axes:
        if sizes[axis] == 1:
            sizes[axis] = max(profile.opt[axis], min(2, profile.max[axis]))
    return sizes


def _wrapped(source: Source) -> torch.nn.Module:
    import torch

    class Flat(torch.nn.Module):
        """Takes and returns flat tensors; the user's module is called inside."""

        def __init__(self) -> None:
            super().__init__()
            self.bridge_module = source.module

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = source.call.rebuild(tensors)
            return tuple(flatten_outputs(self.bridge_module(*args, **kwargs))[1])

    flat = Flat()
    flat.training = False  # not .eval(): that would reach the user's module, which the caller sees to
    return flat


def _by_dynamo(
    source: Source, tensors: tuple[Any, ...], profiles: Mapping[str, Profile], path: Path, opset: int | None
) -> None:
    import torch

    from . import translations

    options: dict[str, Any] = {
        "custom_translation_table": {**translations.table(), **custom_ops.translations()},
        "input_names": list(source.call.tensors),
        "output_names": source.output_names,
        "opset_version": opset,
        "dynamo": True,
        "verbose": False,
    }
    with translations.installed():
        if source.program is not None:
            program = torch.onnx.export(source.program, **options)
        else:
            dynamic = torch.export.Dim.DYNAMIC
            shapes = tuple(dict.fromkeys(profiles[name].dynamic_axes, dynamic) for name in source.call.tensors)
            program = torch.onnx.export(_wrapped(source), tensors, dynamic_shapes=(shapes,), **options)
    assert program is not None
    _free_names(program.model.graph)
    initializers = program.model.graph.initializers.values()
    weights = sum(item.const_value.nbytes for item in initializers if item.const_value is not None)
    program.save(str(path), external_data=weights > INLINE_LIMIT)
    custom_ops.write_calls(path)


def _free_names(graph: Any) -> None:
    """Gives what is inside other names than the inputs and outputs have: the exporter calls values after operators."""
    ends = [*graph.inputs, *graph.outputs]
    taken, own, number = {value.name for value in ends}, set(map(id, ends)), itertools.count()
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in taken and id(value) not in own:
                value.name = f"{value.name}/inner_{next(number)}"


def _by_torchscript(
    source: Source, tensors: tuple[Any, ...], profiles: Mapping[str, Profile], path: Path, opset: int | None
) -> None:
    if source.program is not None:
        raise TypeError("an ExportedProgram is exported by dynamo alone")
    import torch

    axes = {
        name: {axis: f"{name}_{axis}" for axis in profiles[name].dynamic_axes}
        for name in source.call.tensors
        if profiles[name].dynamic_axes
    }
    module = _wrapped(source)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.onnx.export(
            module,
            tensors,
            str(path),
            dynamo=False,
            input_names=list(source.call.tensors),
            output_names=source.output_names,
            dynamic_axes=axes,
            opset_version=opset or 17,
        )
    source.traced = branches_taken(warned)
    write_scopes(path, [name for name, _ in module.named_modules() if name])


def _lost_axes(path: Path, profiles: Mapping[str, Profile]) -> str | None:
    """Which axes that the user declared dynamic have become constant, in a line."""
    import onnx

    lost = []
    for info in onnx.load(str(path), load_external_data=False).graph.input:
        dims = info.type.tensor_type.shape.dim
        for axis in profiles[info.name].dynamic_axes if info.name in profiles else ():
            if dims[axis].HasField("dim_value"):
                lost.append(f"axis {axis} of {info.name!r} has become the constant {dims[axis].dim_value}")
    return f"{', '.join(lost)}, though its profile is dynamic" if lost else None


def _shapes(feeds: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' advice to their developers off the user's screen; errors are raised all the same."""
    import torch

    names = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    graphs = mock.patch.object(torch._C, "_jit_onnx_log", lambda *words: None)  # of a failure; others go to stderr
    with graphs, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
