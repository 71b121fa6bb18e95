"""A conversion as a diff needs it: its stages, each of which can be run, its inputs, and what is known of them."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration import Read, file_reader, torch_reader
from ..compare import Array, Feeds, onnx_runner, run_stage
from ..errors import UsageError
from ..inputs import Profiles, hull, read_profiles
from ..onnx_source import INT_RANGE, prepare
from ..result import ConversionResult
from ..settings import source_path
from ..target import Target, resolve
from ..workspace import RESULT, TYPED
from .model import NOT_BUILT, STAGES, StageName

if TYPE_CHECKING:
    from ..torch_source import Source

Outputs = list[dict[str, Array]]


@dataclass
class Conversion:
    """A finished conversion, failed ones too, as far as they went."""

    result: ConversionResult
    folder: Path
    target: Target
    example: dict[str, Array]
    profiles: list[Profiles]
    read: Read
    source: Source | None = None
    """The torch module; None where only files are there."""
    notes: list[str] = field(default_factory=list)
    cache: bool | str | Path = True
    """As ``convert`` takes it; engines that are built for a diff use its timings of kernels alone."""

    @property
    def allowed(self) -> Profiles:
        return hull(self.profiles)

    @property
    def models(self) -> dict[StageName, Path]:
        """The ONNX models that there are."""
        found: dict[StageName, Path] = {}
        if self.result.exported_onnx is not None:
            found["exported"] = self.result.exported_onnx
        if self.result.rewritten_onnx is not None:
            found["rewritten"] = self.result.rewritten_onnx
        if (self.folder / TYPED).exists():
            found["typed"] = self.folder / TYPED
        return {name: path for name, path in found.items() if path.exists()}

    @property
    def why_no_engine(self) -> str:
        """Why the engine is not run here; empty where it is."""
        if self.result.engine is None or not self.result.engine.exists():
            why = " ".join((self.result.error or "").splitlines()[:1])
            since = f", since the conversion failed: {textwrap.shorten(why, 100, placeholder=' …')}" if why else ""
            return f"{NOT_BUILT}{since}"
        reason = self.target.why_not_run()
        if reason is not None:
            return reason
        return "its weights are stripped; refit it first" if self.result.builder.get("strip_weights") else ""

    def stages(self, wanted: Sequence[str] | None) -> list[StageName]:
        """Those that are compared, in their order. Raises UsageError for one that there is not."""
        unknown = [name for name in wanted or () if name not in STAGES]
        if unknown:
            raise UsageError(f"stages: {unknown[0]!r} is none; they are {', '.join(STAGES)}.")
        there = [name for name in STAGES if name in self.models or name == "engine"]
        if self.source is not None:
            there.insert(0, "torch")
        missing = [name for name in wanted or () if name not in there]
        if missing:
            hint = (
                "give the module that was converted (module=, --module)"
                if missing[0] == "torch"
                else f"there are {', '.join(there)}"
            )
            raise UsageError(f"stages: this conversion has no stage {missing[0]!r}; {hint}.")
        chosen = [name for name in there if not wanted or name in wanted]
        if len(chosen) < 2:
            raise UsageError("stages: a diff is between two at least.")
        return chosen

    def run(self, stage: StageName, feeds: Sequence[Feeds]) -> Outputs:
        """What a stage computes. Raises RunError or ExportError where it does not run."""
        if stage == "torch":
            from ..torch_source import evaluating

            assert self.source is not None
            with evaluating(self.source.module):
                return [self.source.run(item) for item in feeds]
        if stage == "engine":
            from passes import read

            from ..plugins.loading import needed_plugins
            from ..runtime.runner import engine_runner

            assert self.result.engine is not None and self.result.onnx is not None
            engine, plugins = self.result.engine, needed_plugins(read(self.result.onnx), self.target)
            return run_stage("engine", lambda: engine_runner(engine, self.target, plugins), feeds)
        path = self.models[stage]
        if stage == "typed":
            from ..evaluator import evaluate

            return evaluate(path, feeds)
        return run_stage(stage, lambda: onnx_runner(path, stage), feeds)


def converted(source: Any, inputs: Any, folder: Path, options: Mapping[str, Any]) -> Conversion:
    """Converts ``source``, and goes on with whatever came out of it.

    Raises the conversion's error where not even the first model was made.
    """
    from ..pipeline import convert

    result = convert(source, inputs, workdir=folder, **options)
    if result.exported_onnx is None or not result.exported_onnx.exists():
        assert result.exception is not None
        raise result.exception
    target = options.get("target", "auto")
    ready = target if isinstance(target, Target) else resolve(target)
    if source_path(source) is not None:
        conversion = _of_files(result, folder, ready, inputs, options)
    else:
        conversion = _of_module(result, folder, ready, source, inputs, options)
    conversion.cache = options.get("cache", True)
    return conversion


def finished(folder: Path, source: Any, inputs: Any, options: Mapping[str, Any]) -> Conversion:
    """The conversion whose files are in ``folder``; ``source`` is the module that it was made of, where it is known."""
    path = folder / RESULT
    inner = next(iter(sorted(folder.glob(f"*/{RESULT}"))), None)
    if not path.is_file() and inner is not None:
        raise UsageError(f"{folder}: is a run; give one of its models, such as {inner.parent}, or a second run.")
    if not path.is_file():
        raise UsageError(f"{folder}: holds no {RESULT}; give the folder that convert wrote, or a model.")
    from pydantic import ValidationError

    from passes import ModelError

    try:
        result = ConversionResult.load(path)
    except (ValueError, ValidationError) as error:
        raise UsageError(f"{path}: is not what convert writes: {str(error).splitlines()[0]}") from error
    if result.exported_onnx is None or result.target is None:
        raise UsageError(f"{folder}: its conversion failed before there was a model: {result.error}")
    for model in (result.exported_onnx, result.rewritten_onnx):
        if model is not None and not model.exists():
            raise UsageError(f"{model}: no such file; a conversion's folder is moved as a whole.")
    target = resolve(_name(result))
    try:
        if source is None:
            return _of_files(result, folder, target, inputs, options)
        return _of_module(result, folder, target, source, inputs, options)
    except ModelError as error:
        raise UsageError(f"{result.exported_onnx}: is not what convert wrote there: {error}") from error


def _name(result: ConversionResult) -> str:
    """Of its target: the one that is installed, where it is the same."""
    assert result.target is not None
    flavour, version = result.target.flavour, result.target.version
    try:
        here = resolve(flavour)
    except UsageError:
        return f"{flavour}-{'.'.join(version.split('.')[:2])}"
    same = here.info.version.split(".")[:2] == version.split(".")[:2]
    return flavour if same else f"{flavour}-{'.'.join(version.split('.')[:2])}"


def _known_profiles(result: ConversionResult, options: Mapping[str, Any]) -> Any:
    """The profiles that were given, else those of the conversion."""
    if options.get("profiles") is not None or not result.inputs:
        return options.get("profiles")
    count = max((len(item.profiles) for item in result.inputs), default=0)
    return [
        {item.name: item.profiles[index] for item in result.inputs if item.profiles} for index in range(count)
    ] or None


def _of_files(
    result: ConversionResult, folder: Path, target: Target, inputs: Any, options: Mapping[str, Any]
) -> Conversion:
    from passes import read

    assert result.exported_onnx is not None
    graph = read(result.exported_onnx)
    seed, span = options.get("seed", 0), options.get("int_range", INT_RANGE)
    profiles = _known_profiles(result, options)
    example, sets, notes = prepare(graph, inputs, profiles, seed=seed, int_range=span)
    return Conversion(result, folder, target, example, list(sets), file_reader(graph), None, notes)


def _of_module(
    result: ConversionResult, folder: Path, target: Target, source: Any, inputs: Any, options: Mapping[str, Any]
) -> Conversion:
    from .. import torch_source
    from ..tensors import to_numpy

    notes: list[str] = []
    if inputs is None:
        inputs, notes = _generated(result, source, options)
    names = [item.name for item in result.inputs] or None
    made = torch_source.make_source(source, inputs, options.get("input_names") or names, options.get("output_names"))
    if options.get("output_names") is None and result.outputs:
        made.output_names = [item.name for item in result.outputs]
    example = {name: to_numpy(tensor) for name, tensor in made.call.tensors.items()}
    sets = read_profiles(_known_profiles(result, options), {name: array.shape for name, array in example.items()})
    return Conversion(result, folder, target, example, list(sets), torch_reader(made), made, notes)


def _generated(
    result: ConversionResult, source: Any, options: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Inputs for the module that ``result`` was made of, as for its exported model, and notes on them; None where its
    arguments are not the model's inputs by name."""
    from passes import read

    from ..tensors import to_torch

    forward = getattr(source, "forward", None)
    parameters = inspect.signature(forward).parameters if forward is not None else {}
    if any(item.name not in parameters for item in result.inputs):
        return None, []
    assert result.exported_onnx is not None
    seed, span = options.get("seed", 0), options.get("int_range", INT_RANGE)
    profiles = _known_profiles(result, options)
    example, _, notes = prepare(read(result.exported_onnx), None, profiles, seed=seed, int_range=span)
    return {name: to_torch(array) for name, array in example.items()}, notes


Make = Callable[[], Conversion]
