"""From a torch module to an ONNX file, and whether that file computes what the module does.

The module is exported through a wrapper that takes and returns flat tuples of tensors, so that both exporters see the
same names, order and dynamic axes however nested the arguments are, and constants stay constants.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from . import custom_ops
from .assumed import Assumed
from .errors import ExportError
from .exporter_words import BY_SIZES, BY_VALUES, branches_taken, one_line, scripted_parts
from .inputs import Case, Profile, resized
from .scopes import write_scopes
from .tensors import to_torch
from .torch_source import OF_BFLOAT16, Source, flatten_outputs, full_precision

if TYPE_CHECKING:
    import torch

Exporter = Literal["dynamo", "torchscript"]

EXPORTERS: tuple[Exporter, ...] = ("dynamo", "torchscript")
"""The preferred one first. It writes newer opsets than some parsers read; the passes bring them down."""

_Run = Callable[[Source, tuple[Any, ...], Mapping[str, Profile], Path, "int | None"], None]

MORE_SHAPES = 3
"""At so many others dynamo exports at most, where its model does not hold at all that are allowed."""

INLINE_LIMIT = 64 << 20
"""A model with more weights than this (bytes) keeps them in a data file beside it."""


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
    accept: Callable[[Path, Exporter], str | None],
) -> Exported:
    """Writes the module to ``path`` by the first exporter whose model is accepted.

    ``accept`` is given the file and what wrote it, and returns why it will not do, or None. Raises ExportError with
    every exporter's reason where none does.
    """

    def why_not(
        run: _Run, at: Case = example, within: contextlib.AbstractContextManager[Any] | None = None
    ) -> str | None:
        _remove(path)
        source.assumed = None
        with within or contextlib.nullcontext():
            reason = _export_with(run, source, profiles, at, path, opset)
        return reason or _lost_axes(path, profiles) or accept(path, exporter)

    def another_way(reason: str) -> tuple[str | None, list[str]]:
        """Why torch.export does not do in any other way either, or what to note of the one that does."""
        if path.exists():
            if not any(profile.dynamic_axes for profile in profiles.values()):
                return reason, []
            again, notes = why_not(_by_dynamo, within=_reading_the_code()), []
            for _ in range(MORE_SHAPES):
                if again is None or BY_SIZES not in again or source.general is None:
                    break
                at = source.general
                again = why_not(_by_dynamo, at, _reading_the_code(or_running=True))
                notes = [f"exported at the {at.name} shapes, since at the example's: {reason}"]
            return (reason, []) if again else (None, notes)
        if BY_VALUES in reason:
            from .translations.places import NOTE, of_every_place

            source.by_values = source.every_place = True
            again = why_not(_by_dynamo, within=of_every_place())
            if again is None:
                return None, [NOTE, *source.traced]
            source.every_place = False
            if path.exists():
                return f"{reason}; with every place that nonzero() may find: {again}", []
        again = why_not(_by_record)
        if again is None:
            return None, [f"exported as the operators that ran in the module, since torch.export does not: {reason}"]
        if again == reason or (BY_VALUES in again and BY_VALUES in reason):
            return reason, []
        return f"{reason}; as the operators that ran in it: {again}", []

    reasons: list[str] = []
    for exporter in exporters:
        notes: list[str] = []
        reason = why_not(_by_dynamo if exporter == "dynamo" else _by_torchscript)
        if reason is not None and exporter == "dynamo" and source.program is None:
            reason, notes = another_way(reason)
        if reason is None:
            files = (path.name + ".data", path.name) if path.with_name(path.name + ".data").exists() else (path.name,)
            if exporter == "torchscript":
                notes = source.traced
            age = "older" if exporter == "torchscript" else "newer"
            notes = [f"exported by torch.onnx's {age} exporter ({exporter}), since {item}" for item in reasons] + notes
            return Exported(exporter, files, notes)
        reasons.append(f"{exporter}: {reason}")
    advice = filter(None, (custom_ops.advice("\n".join(reasons)), scripted_parts(source.module)))
    raise ExportError("\n".join(["torch.onnx does not export the module.", *reasons, *advice]))


def _reading_the_code(or_running: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Within it, torch.export reads the module's Python rather than run it, which follows ``int(size * 1.5)``.

    torch.onnx does so of itself where running it fails, and not where a size has silently become a constant.
    ``or_running``: where reading it fails.
    """
    from torch.onnx._internal.exporter import _capture_strategies

    running = (_capture_strategies.TorchExportNonStrictStrategy,) if or_running else ()
    ways = (_capture_strategies.TorchExportStrictStrategy, *running)
    return mock.patch.object(_capture_strategies, "CAPTURE_STRATEGIES", ways)


def _remove(path: Path) -> None:
    for name in (path, path.with_name(path.name + ".data")):
        name.unlink(missing_ok=True)


def _export_with(
    run: _Run,
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
    try:
        with _quiet(), full_precision(), torch.set_grad_enabled(source.gradients), _transforms_ended():
            run(source, tensors, profiles, path, opset)
            if opset is None and _lacks_bfloat16(path):
                _remove(path)
                run(source, tensors, profiles, path, OF_BFLOAT16)
    except OSError:
        raise  # the disk's failure, not the exporter's
    except Exception as error:  # noqa: BLE001 - exporters raise whatever the traced code or torch raises
        return one_line(error, list(source.call.tensors))
    return None


@contextlib.contextmanager
def _transforms_ended() -> Iterator[None]:
    """Ends what torch.func's transforms leave open where a trace fails within one, which spoils all that come after."""
    import torch
    from torch._C import _functorch
    from torch.autograd import forward_ad

    depth, level = _functorch.get_dynamic_layer_stack_depth(), forward_ad._current_level
    try:
        yield
    finally:
        if _functorch.get_dynamic_layer_stack_depth() > depth:
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
            with contextlib.suppress(RuntimeError):  # it was no jvp, and there is no such level
                torch._C._exit_dual_level(level=level + 1)


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
    from . import translations
    from .scripted import unscripted

    with translations.installed():
        if source.program is not None:
            _write_by_dynamo(source, source.program, {}, path, opset)
        else:
            given = {"args": tensors, "dynamic_shapes": (_dynamic_shapes(source, profiles),)}
            module = _wrapped(source)
            with unscripted(module, tensors):
                _write_by_dynamo(source, module, given, path, opset)


def _by_record(
    source: Source, tensors: tuple[Any, ...], profiles: Mapping[str, Profile], path: Path, opset: int | None
) -> None:
    from . import translations
    from .recorded import recorded

    with translations.installed():
        shapes = _dynamic_shapes(source, profiles)
        record = recorded(_wrapped(source), tensors, dynamic=any(shapes))
        _write_by_dynamo(source, record, {"args": tensors, "dynamic_shapes": (shapes,)}, path, opset)


def _dynamic_shapes(source: Source, profiles: Mapping[str, Profile]) -> tuple[dict[int, Any], ...]:
    import torch

    return tuple(dict.fromkeys(profiles[name].dynamic_axes, torch.export.Dim.DYNAMIC) for name in source.call.tensors)


def _write_by_dynamo(source: Source, model: Any, given: dict[str, Any], path: Path, opset: int | None) -> None:
    """``given``: the arguments, and which of their axes are dynamic; of an ExportedProgram nothing."""
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
    with _keeping_what_is_assumed(source):
        program = torch.onnx.export(model, **given, **options)
    assert program is not None
    _free_names(program.model.graph)
    initializers = program.model.graph.initializers.values()
    weights = sum(item.const_value.nbytes for item in initializers if item.const_value is not None)
    program.save(str(path), external_data=weights > INLINE_LIMIT)
    custom_ops.write_calls(path)


@contextlib.contextmanager
def _keeping_what_is_assumed(source: Source) -> Iterator[None]:
    """Within it, the source learns what torch.export takes for granted, which torch.onnx loses as it goes on."""
    import torch

    export = torch.export.export

    def observed(*args: Any, **options: Any) -> Any:
        program = export(*args, **options)
        source.assumed = Assumed.of(program, tuple(source.call.tensors))
        return program

    with mock.patch.object(torch.export, "export", observed):
        yield


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
