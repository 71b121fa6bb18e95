"""From a torch module or an ONNX file to a model that computes the same in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import custom_ops
from ..assumed import most_general, shapes_of
from ..calibration import file_reader, torch_reader
from ..compare import compare_stages, disagreement
from ..errors import ExportError, RunError
from ..exporter_words import BY_SIZES
from ..inputs import (
    Array,
    Case,
    hull,
    make_cases,
    read_profiles,
    with_numbers_that_fit,
    with_one_row,
    with_other_values,
    with_padding,
)
from ..tensors import to_numpy
from ..workspace import EXPORTED
from .state import Outputs, State

if TYPE_CHECKING:
    from ..export import Exporter
    from ..torch_source import Source


def from_torch(state: State, source: Any, inputs: Any, exporters: Sequence[Exporter]) -> Outputs:
    """Exports the module; returns what the exported model computes."""
    from .. import export, torch_source

    settings, result = state.settings, state.result
    made = torch_source.make_source(source, inputs, settings.input_names, settings.output_names)
    example = {name: to_numpy(tensor) for name, tensor in made.call.tensors.items()}
    state.profiles = read_profiles(settings.profiles, {name: array.shape for name, array in example.items()})
    allowed = hull(state.profiles)
    torch_source.check_static_axes(made, allowed)
    state.cases, state.read = make_cases(example, state.profiles), torch_reader(made)
    with torch_source.evaluating(made.module) as changed:
        if changed:
            result.notes.append("the module was in training mode: it was exported and compared in eval mode")
        with state.clock("run"):
            reference = _references(state, made)
        state.remember_source(reference)
        outputs: list[Outputs] = []

        def accept(path: Path, exporter: Exporter) -> str | None:
            _look_elsewhere(state, made)
            try:
                with state.clock("run"), state.caching.foreseeing(path):
                    outputs.append(state.run_onnx(path, "exported"))
            except RunError as error:
                return f"{error}{_of_sizes(made, state.cases)}"
            result.half = _half(path)
            comparisons = state.compare(("torch", "exported"), reference, outputs[-1], result.own_precision)
            if all(item.agreed for item in comparisons):
                decided = exporter == "torchscript" or made.every_place
                differs = _at_other_values(state, made, path) if decided else None
                return differs or _wrong_elsewhere(state, made, path)
            with state.clock("run"):
                again = made.run(state.cases[0].feeds)
            random = any(
                not np.array_equal(again[key], reference[0][key], equal_nan=_floats(again[key])) for key in again
            )
            if random:
                why = (
                    "; the module itself gives other outputs when it is run again: it draws random numbers or keeps "
                    "state, and cannot be compared"
                )
            else:
                wrong = {item.inputs for item in comparisons if not item.agreed}
                why = _of_sizes(made, [case for case in state.cases if case.name in wrong])
            return f"{disagreement(comparisons)}{why}"

        with state.clock("export"):
            done = export.export(
                made,
                allowed,
                state.cases[0],
                state.workspace.partial / EXPORTED,
                exporters=exporters,
                opset=settings.opset or made.opset,
                accept=accept,
            )
            state.workspace.publish(*done.files)
    if settings.opset is not None and (written := _opset(state.workspace.path(EXPORTED))) != settings.opset:
        result.notes.append(f"opset {settings.opset} was asked of the exporter, which wrote {written}")
    result.exporter = done.exporter
    result.notes.extend(done.notes)
    result.calling, notes = made.calling()
    result.notes.extend(notes)
    result.exported_onnx = state.workspace.path(EXPORTED)
    return outputs[-1]


_CONSTANT = (
    "what Python reads from a tensor (by float(), tolist(), numpy() or a branch) has become a constant; compute with "
    "tensors"
)
_FEWER = "something is done where nonzero() finds nothing, or of how many places it finds; compute with a mask"


def _at_other_values(state: State, made: Source, path: Path) -> str | None:
    """What is wrong where an exporter has made constants of what the module's Python reads from the example."""
    example, compared = state.cases[0], False
    for other in with_other_values(example):
        compared, wrong = _at(state, made, path, other)
        if wrong is not None:
            return wrong
        if compared:
            break
    for more in (with_one_row(example), with_padding(example)) if made.by_values else ():
        taken, wrong = _at(state, made, path, more) if more is not None else (False, None)
        if wrong is not None:
            return wrong
        compared = compared or taken
    if not compared:
        made.traced.append("was compared at the example's values alone: the module takes no others that were tried")
    return None


def _at(state: State, made: Source, path: Path, other: Case) -> tuple[bool, str | None]:
    """Whether the module takes other values of the example's inputs, and what is wrong there."""
    with state.clock("run"):
        try:
            expected = made.run(other.feeds)
        except ExportError:
            return False, None
        try:
            found = state.run_onnx(path, "exported", [other.feeds])
        except RunError as error:
            return True, f"at other values of the inputs, {error}"
    stages, precision = ("torch", "exported"), state.result.own_precision
    comparisons = compare_stages(stages, [other.name], [expected], found, state.settings.tolerance, precision)
    if all(item.agreed for item in comparisons):
        return True, None
    why = _FEWER if made.every_place else _CONSTANT
    return True, f"at other values of the inputs, {disagreement(comparisons)}: {why}"


def _look_elsewhere(state: State, made: Source) -> None:
    """Adds the shapes where what the last export took for granted of sizes is not so; finds some to export at."""
    if made.assumed is None:
        return
    found = made.assumed.elsewhere(state.cases, state.profiles)
    known = {case.name for case in made.elsewhere}
    made.elsewhere.extend(case for case in found if case.name not in known)
    made.seen.append(made.assumed)
    made.general = most_general(made.seen, state.cases[0], state.profiles)


def _wrong_elsewhere(state: State, made: Source, path: Path) -> str | None:
    """What is wrong at allowed shapes where an export took for granted what is not so; None of those that the module
    does not take."""
    precision = state.result.own_precision
    for case in made.elsewhere:
        with state.clock("run"):
            try:
                expected = made.run(case.feeds)
            except ExportError:
                continue
            try:
                found = state.run_onnx(path, "exported", [case.feeds])
            except RunError as error:
                return f"at {case.name}, {error}{_assumption(made, case)}"
        comparisons = compare_stages(
            ("torch", "exported"), [case.name], [expected], found, state.settings.tolerance, precision
        )
        if not all(item.agreed for item in comparisons):
            return f"{disagreement(comparisons)}{_assumption(made, case)}"
    return None


def _of_sizes(made: Source, cases: Sequence[Case]) -> str:
    """What the export took for granted that is not so in one of the cases; empty where there is nothing."""
    assumed = made.assumed
    wrong = [case for case in cases if assumed is not None and assumed.broken(shapes_of(case))]
    return _assumption(made, wrong[0]) if wrong else ""


def _assumption(made: Source, case: Case) -> str:
    """The plainest; that a size is not 1, torch takes for granted of most."""
    broken = made.assumed.broken(shapes_of(case)) if made.assumed is not None else set()
    plain = min(broken, key=lambda guard: (guard.endswith("!= 1"), len(guard)), default=None)
    return (f": torch.export took for granted that {plain}" if plain else "") + f"; {BY_SIZES}"


def _half(path: Path) -> str:
    import onnx

    from ..rounded import half_type

    return half_type(onnx.load(str(path), load_external_data=False).graph)


def _opset(path: Path) -> int:
    import onnx

    imports = onnx.load(str(path), load_external_data=False).opset_import
    return int(max(item.version for item in imports if item.domain in ("", "ai.onnx")))


def _references(state: State, made: Source) -> list[dict[str, Array]]:
    """What the module computes of each case; one that it does not take as it is may get smaller whole numbers."""
    found = []
    for place, case in enumerate(state.cases):
        try:
            found.append(made.run(case.feeds))
        except ExportError as error:
            if place == 0:
                raise
            state.cases[place], outputs = _made_to_fit(state, made, case, error)
            found.append(outputs)
    return found


def _made_to_fit(state: State, made: Source, case: Case, refusal: ExportError) -> tuple[Case, dict[str, Array]]:
    """Raises ExportError where the module takes the case in no form."""
    for most, other in with_numbers_that_fit(case, state.cases[0]):
        try:
            outputs = made.run(other.feeds)
        except ExportError:
            continue
        state.result.notes.append(
            f"at the {case.name} shapes, which are too small for the example's whole numbers, these are {most} at most"
        )
        return other, outputs
    raise ExportError(
        f"{refusal} These are the example's values at the {case.name} shapes of the profiles: allow only shapes that "
        "the module takes, or give an example whose values fit all of them."
    ) from refusal


def from_file(state: State, path: Path, inputs: Any) -> Outputs:
    """Reads an ONNX file; returns what it computes."""
    from passes import ModelError, read

    from .. import onnx_source

    with state.clock("export"):
        try:
            graph = read(path)
            if constants := state.settings.constants:
                onnx_source.make_constant(graph, constants)
                path = _written(state, graph)
                state.result.notes.append(f"constants, as asked, and no inputs any more: {', '.join(constants)}")
        except ModelError as error:
            raise ExportError(str(error)) from error
        example, state.profiles, notes = onnx_source.prepare(
            graph, inputs, state.settings.profiles, seed=state.settings.seed, int_range=state.settings.int_range
        )
    state.result.notes.extend(notes)
    for name in onnx_source.deciding(graph):
        told = f"the input {name!r} decides which branch of an If runs; where it is always the same, constants="
        state.result.notes.append(f"{told}{{{name!r}: …}} (--constant {name}=…) leaves the other branch out")
    state.cases, state.read = make_cases(example, state.profiles), file_reader(graph)
    state.result.exported_onnx = path
    shapeless = onnx_source.give_axes(graph, state.profiles)
    with state.clock("run"):
        try:
            if shapeless:
                raise RunError(f"it does not say how many axes the input {shapeless[0]!r} has")
            outputs = state.run_onnx(path, "exported")
        except RunError as error:
            outputs = _run_mended(state, graph, error)
    state.remember_source(outputs)
    state.result.half = _half(state.result.exported_onnx)
    return outputs


def _written(state: State, graph: Any) -> Path:
    from passes import write

    state.workspace.publish(*write(graph, state.workspace.partial / EXPORTED, beside=state.workspace.folder))
    return state.workspace.path(EXPORTED)


def _run_mended(state: State, graph: Any, refusal: RunError) -> Outputs:
    """Outputs of a file that ONNX Runtime refuses for its version, names or order, which the passes put right.

    Operators that a registered plugin replaces are run by its reference body, and so are TensorRT's own plugins.
    """
    from passes import Log, ModelError, all_rules, write
    from passes.clean import infer_types, sanitise
    from passes.plugins import PluginMisfit, call_plugins

    partial = state.workspace.partial / EXPORTED
    replaced: list[str] = []
    try:
        sanitise(graph, state.settings.target, Log())
        all_rules()  # with their modules come the plugins that TensorRT brings along
        infer_types(graph)
        replaced = call_plugins(graph)
        files = write(graph, partial, beside=state.workspace.folder)
        outputs = state.run_onnx(partial, "exported")
    except (ModelError, PluginMisfit) as error:
        raise ExportError(f"{state.result.exported_onnx}: {error}") from error
    except RunError as error:
        if replaced:
            raise error from None
        advice = _too_old(graph) or custom_ops.advice(str(refusal))
        raise RunError(f"{str(refusal).rstrip('.')}. {advice}" if advice else str(refusal)) from None
    state.workspace.publish(*files)
    if replaced:
        state.result.notes.append(f"what the file has of {', '.join(replaced)} is run by its plugin's reference body")
    else:
        state.result.notes.append(f"the file's version, names and order of nodes were put right first, since {refusal}")
    state.result.exported_onnx = state.workspace.path(EXPORTED)
    return outputs


def _too_old(graph: Any) -> str:
    """What to do where the model is of an opset from before ONNX Runtime's time; empty where it is not."""
    if graph.opset is None or graph.opset >= 7:
        return ""
    return (
        f"It is of opset {graph.opset}, and ONNX Runtime has operators from opset 7 on: "
        "onnx.version_converter.convert_version(model, 13) makes a newer model of it."
    )


def _floats(array: Array) -> bool:
    return array.dtype.kind == "f"
