"""``convert``: source → export → rewrite → build → run, each stage compared with the one before it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import custom_ops
from .advice import RESTRICTIONS
from .build_plan import BuildPlan, plan_build, publish_calibration
from .build_settings import BuildSettings
from .cache import open_cache
from .caching import Caching
from .calibration import Read, file_reader, torch_reader
from .clock import Clock
from .compare import Tolerances, compare_stages, disagreement, onnx_runner, run_stage
from .errors import (
    BridgeError,
    BuildError,
    BuildTimeout,
    CompareError,
    ExportError,
    RewriteError,
    RunError,
    Stage,
    UsageError,
)
from .inputs import Array, Case, Profile, hull, make_cases, read_profiles
from .onnx_source import INT_RANGE, pinned_shapes
from .plugins.loading import NeededPlugin, needed_plugins
from .result import Comparison, ConversionResult, Decline, Rewrite, TaskCheck, TensorInfo
from .settings import Run, Settings, check_kept, read_capabilities, source_path
from .target import Target, resolve
from .tensors import to_numpy
from .workspace import BUILD_LOG, CALIBRATION, ENGINE, EXPORTED, RESULT, REWRITTEN, SIDECAR, Workspace, write_text

if TYPE_CHECKING:
    from passes import Log

    from .export import Exporter

Outputs = list[dict[str, Array]]

NODES_LISTED = 50


def convert(
    source: Any,
    inputs: Any = None,
    *,
    name: str | None = None,
    workdir: str | Path | None = None,
    target: str | Target = "auto",
    precision: str = "fp32",
    profiles: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    tolerance: Tolerances = None,
    task_check: Callable[[Run], str] | None = None,
    build: bool = True,
    build_timeout: float | None = None,
    compute_capabilities: Sequence[str] | None = None,
    opset: int | None = None,
    seed: int = 0,
    int_range: tuple[int, int] = INT_RANGE,
    prove: bool = False,
    builder: BuildSettings | Mapping[str, Any] | None = None,
    calibration: Any = None,
    calibration_algorithm: str = "entropy",
    cache: bool | str | Path = True,
    check: bool = False,
    on_stage: Callable[[Stage], None] | None = None,
) -> ConversionResult:
    """Converts a model to a TensorRT engine and measures how far every step moved its outputs.

    Args:
        source: an ``nn.Module``, a ``torch.export.ExportedProgram``, or the path of an ONNX file.
        inputs: example inputs: a tuple of positional arguments or a dict of keyword arguments, nested as the module
            takes them. For an ONNX file, arrays by name; what is missing is generated.
        name: of the result; by default the module's class or the file's stem.
        workdir: where files go; by default a new folder under the system's temporary one.
        target: ``auto``, ``tensorrt``, ``tensorrt-rtx``, or one of them with a version (``tensorrt-8.5``), which is
            rewritten for and not built unless it is installed.
        profiles: ``{input: (min shape, opt shape, max shape)}``; an axis is dynamic where they differ. Inputs without
            a profile are static at the example's shape. A list of such mappings makes an engine with several
            optimization profiles, of which each has its own best kernels; the example has to lie within one of them.
        precision: what TensorRT 8 to 10 may compute in: ``fp32``, ``fp16``, ``bf16`` (from 10 on), ``int8`` or
            ``int8+fp16``. Other targets compute in the types that the model has.
        tolerance: one for all outputs, or by output name; by default according to dtype, integers and booleans exact.
        task_check: is given a function that runs the converted model, and returns what it found; raises
            AssertionError where the model does not do its job.
        build: False stops after the rewrite.
        build_timeout: seconds after which the build is stopped.
        compute_capabilities: for TensorRT-RTX, the GPUs to build for, such as ``["8.9", "12.0"]``.
        opset: asked of the exporter; by default its own choice.
        seed, int_range: of generated inputs.
        prove: run each match of the passes before and after, by itself, on the tensors that flow through it; the
            result's ``proofs`` say what was found, and an error of the rewrite names the match that caused it.
        cache: whether an engine that was built before from the same model, by the same TensorRT, for the same GPU and
            with the same settings may be taken instead of a new one; a path is the folder of another cache than the
            default one.
        check: raise the error of a failed conversion rather than return it.
        builder: what the builder is told beside the model: a ``bridge.BuildSettings``, or a mapping with its names.
        calibration: for int8, a sequence of typical inputs, each as ``inputs`` is given, all of one shape; by default
            the example alone. The ranges that TensorRT finds are kept as ``calibration.cache``.
        calibration_algorithm: ``entropy``, ``entropy_legacy``, ``minmax`` or ``legacy``.
        on_stage: called with the name of each stage as it begins.

    Returns:
        A ConversionResult, also written as ``result.json`` into ``workdir``. Without a GPU that can run the engine its
        status is ``built``, never ``verified``.

    Raises:
        UsageError: the call is wrong, and nothing was started.
        BridgeError: with ``check``, the error of a failed conversion.
    """
    settings = Settings(
        target if isinstance(target, Target) else resolve(target),
        precision,
        profiles,
        input_names,
        output_names,
        tolerance,
        task_check,
        build,
        build_timeout,
        read_capabilities(compute_capabilities),
        opset,
        seed,
        int_range,
        prove,
        open_cache(cache),
        BuildSettings.of(builder),
        calibration,
        calibration_algorithm,
    )
    path = source_path(source)
    folder = Path(workdir) if workdir is not None else Path(tempfile.mkdtemp(prefix="bridge-"))
    if path is not None:
        check_kept(path, folder)
        if input_names is not None or output_names is not None:
            raise UsageError("input_names, output_names: an ONNX file has names of its own; leave them out.")
    elif hasattr(source, "named_modules"):
        settings.builder.check_modules([name for name, _ in source.named_modules()])
    result = ConversionResult(
        name or (path.stem if path is not None else type(source).__name__),
        target=settings.target.info,
        precision=precision,
        source=str(path) if path is not None else f"{type(source).__module__}.{type(source).__qualname__}",
    )
    clock = Clock(result.seconds, on_stage or (lambda stage: None))
    conversion = Conversion(result, settings, Workspace(folder), clock)
    conversion.run(source if path is None else path, inputs)
    if check and result.exception is not None:
        raise result.exception
    return result


@dataclass
class Conversion:
    """One conversion under way; ``result`` grows with it."""

    result: ConversionResult
    settings: Settings
    workspace: Workspace
    clock: Clock
    profiles: list[dict[str, Profile]] = field(default_factory=list)
    """The engine's; everything before the engine has to hold for their hull."""
    cases: list[Case] = field(default_factory=list)
    source_types: dict[str, np.dtype[Any]] = field(default_factory=dict)
    """dtype of each input and output in the source."""
    plugins: list[NeededPlugin] = field(default_factory=list)
    """What has to be loaded where the engine is built, and where it runs."""
    plan: BuildPlan = field(default_factory=BuildPlan)
    """What the builder is told beside all this."""
    read: Read | None = None
    """Reads further inputs, for the calibration."""
    caching: Caching = field(init=False)

    def __post_init__(self) -> None:
        self.caching = Caching(self.settings, self.result)
        self.result.builder = self.settings.builder.given()
        self.result.notes.extend(self.settings.builder.notes(self.settings.target))

    def run(self, source: Any, inputs: Any) -> None:
        """Runs every stage and writes ``result.json``. Raises UsageError alone."""
        result, clock = self.result, self.clock
        try:
            with self.workspace.opened():
                try:
                    self._stages(source, inputs)
                except UsageError:
                    raise
                except RunError as error:
                    error.stage = clock.stage  # the one that made the model
                    self._fail(error, error.stage)
                except BridgeError as error:
                    self._fail(error, error.stage)
                except OSError as error:
                    self._fail(BridgeError(_disk_words(error), clock.stage), clock.stage)
                result.seconds.update({key: round(value, 4) for key, value in result.seconds.items()})
                write_text(self.workspace.path(RESULT), result.to_json(self.workspace.folder))
        except OSError as error:
            self._fail(BridgeError(_disk_words(error), clock.stage), clock.stage)

    def _fail(self, error: BridgeError, stage: Stage) -> None:
        self.result.status, self.result.stage = "failed", stage
        self.result.error, self.result.exception = str(error), error
        if isinstance(error, BuildError):
            self.result.refusals = list(error.refusals)

    def _stages(self, source: Any, inputs: Any) -> None:
        self.clock.enter("export")
        if isinstance(source, Path):
            self._from_export(self._from_file(source, inputs))
            return
        from .export import EXPORTERS

        exported = self._from_torch(source, inputs, EXPORTERS)
        try:
            self._from_export(exported)
        except (RewriteError, BuildError) as error:
            assert self.result.exporter is not None
            others = EXPORTERS[list(map(str, EXPORTERS)).index(self.result.exporter) + 1 :]
            if not others or isinstance(error, BuildTimeout):
                raise
            self._try_again(source, inputs, others, error)

    def _try_again(
        self, source: Any, inputs: Any, exporters: Sequence[Exporter], refusal: RewriteError | BuildError
    ) -> None:
        """Takes another exporter's model, where the target takes that one; else raises ``refusal``, nothing changed."""
        result, first = self.result, self.result.exporter
        fresh = ConversionResult(result.name, target=result.target, precision=result.precision, source=result.source)
        fresh.seconds = result.seconds
        other = Conversion(fresh, self.settings, Workspace(self.workspace.partial / "again"), self.clock)
        self.clock.enter("export")
        try:
            with other.workspace.opened():
                other._from_export(other._from_torch(source, inputs, exporters))
        except BridgeError:
            raise refusal from None
        self.workspace.adopt(other.workspace)
        for name in ("exported_onnx", "onnx", "engine"):
            path = getattr(fresh, name)
            setattr(fresh, name, path and self.workspace.path(path.name))
        why = " ".join(str(refusal).splitlines()[:2])
        fresh.notes.append(f"exported by torch.onnx's {fresh.exporter} exporter, since of {first}'s model {why}")
        vars(result).update(vars(fresh))

    def _from_export(self, exported: Outputs) -> None:
        self.clock.enter("rewrite")
        hints, rewritten = self._rewrite(exported)
        if not (self.settings.build and self.settings.target.installed):
            self._task_check(None)
            if not self.settings.target.installed:
                self.result.notes.append(f"{self.settings.target} is not installed here: rewritten for it, not built")
            self.result.status = "rewritten"
            return
        self.clock.enter("build")
        engine = self._build(hints, rewritten)
        reason = self.settings.target.why_not_run() or (
            "its weights are stripped; refit it first" if self.settings.builder.strip_weights else None
        )
        if reason is not None:
            self._task_check(None)
            self.result.notes.append(f"built, not run: {reason}")
            self.result.status = "built"
            return
        self.clock.enter("run")
        self._run_engine(engine, rewritten)
        self._task_check(engine)
        self.result.status = "verified"

    # export

    def _from_torch(self, source: Any, inputs: Any, exporters: Sequence[Exporter]) -> Outputs:
        """Exports the module; returns what the exported model computes."""
        from . import export

        settings, result = self.settings, self.result
        made = export.make_source(source, inputs, settings.input_names, settings.output_names)
        example = {name: to_numpy(tensor) for name, tensor in made.call.tensors.items()}
        self.profiles = read_profiles(settings.profiles, {name: array.shape for name, array in example.items()})
        allowed = hull(self.profiles)
        export.check_static_axes(made, allowed)
        self.cases, self.read = make_cases(example, self.profiles), torch_reader(made)
        with export.evaluating(made.module) as changed:
            if changed:
                result.notes.append("the module was in training mode: it was exported and compared in eval mode")
            with self.clock("run"):
                reference = [made.run(case.feeds) for case in self.cases]
            self._remember_types(self.cases[0].feeds, reference[0])
            outputs: list[Outputs] = []

            def accept(path: Path) -> str | None:
                try:
                    with self.clock("run"), self.caching.foreseeing(path):
                        outputs.append(self._run_onnx(path, "exported"))
                except RunError as error:
                    return str(error)
                comparisons = self._compare(("torch", "exported"), reference, outputs[-1])
                if all(item.agreed for item in comparisons):
                    return None
                with self.clock("run"):
                    again = made.run(self.cases[0].feeds)
                random = any(
                    not np.array_equal(again[key], reference[0][key], equal_nan=_floats(again[key])) for key in again
                )
                return disagreement(comparisons) + (
                    "; the module itself gives other outputs when it is run again: it draws random numbers or keeps "
                    "state, and cannot be compared"
                    if random
                    else ""
                )

            with self.clock("export"):
                done = export.export(
                    made,
                    allowed,
                    self.cases[0],
                    self.workspace.partial / EXPORTED,
                    exporters=exporters,
                    opset=settings.opset or made.opset,
                    accept=accept,
                )
                self.workspace.publish(*done.files)
        result.exporter = done.exporter
        result.notes.extend(done.notes)
        result.calling, notes = made.calling()
        result.notes.extend(notes)
        result.exported_onnx = self.workspace.path(EXPORTED)
        return outputs[-1]

    def _from_file(self, path: Path, inputs: Any) -> Outputs:
        """Reads an ONNX file; returns what it computes."""
        from passes import ModelError, read

        from . import onnx_source

        with self.clock("export"):
            try:
                graph = read(path)
            except ModelError as error:
                raise ExportError(str(error)) from error
            example, self.profiles, notes = onnx_source.prepare(
                graph, inputs, self.settings.profiles, seed=self.settings.seed, int_range=self.settings.int_range
            )
        self.result.notes.extend(notes)
        self.cases, self.read = make_cases(example, self.profiles), file_reader(graph)
        self.result.exported_onnx = path
        with self.clock("run"):
            try:
                outputs = self._run_onnx(path, "exported")
            except RunError as error:
                outputs = self._run_mended(graph, error)
        self._remember_types(example, outputs[0])
        return outputs

    def _run_mended(self, graph: Any, refusal: RunError) -> Outputs:
        """Outputs of a file that ONNX Runtime refuses for its version, names or order, which the passes put right.

        Operators that a registered plugin replaces are run by its reference body.
        """
        from passes import Log, ModelError, write
        from passes.clean import sanitise
        from passes.plugins import PluginMisfit, call_plugins

        partial = self.workspace.partial / EXPORTED
        replaced: list[str] = []
        try:
            sanitise(graph, self.settings.target, Log())
            replaced = call_plugins(graph)
            files = write(graph, partial, beside=self.workspace.folder)
            outputs = self._run_onnx(partial, "exported")
        except (ModelError, PluginMisfit) as error:
            raise ExportError(f"{self.result.exported_onnx}: {error}") from error
        except RunError as error:
            if replaced:
                raise error from None
            advice = custom_ops.advice(str(refusal))
            raise RunError(f"{refusal}. {advice}" if advice else str(refusal)) from None
        self.workspace.publish(*files)
        if replaced:
            self.result.notes.append(
                f"what the file has of {', '.join(replaced)} is run by its plugin's reference body"
            )
        else:
            self.result.notes.append(
                f"the file's version, names and order of nodes were put right first, since {refusal}"
            )
        self.result.exported_onnx = self.workspace.path(EXPORTED)
        return outputs

    def _remember_types(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self.source_types = {name: array.dtype for name, array in (*inputs.items(), *outputs.items())}
        for name in self.settings.tolerance if isinstance(self.settings.tolerance, Mapping) else ():
            if name and name not in outputs:
                raise UsageError(f"tolerance: {name!r} is no output; the outputs are {', '.join(outputs)}.")

    # rewrite

    def _rewrite(self, exported: Outputs) -> tuple[dict[str, str], Outputs]:
        """Writes the model for the parser; returns hints on its refusals, by node or operator, and its outputs."""
        from passes import PassError, read, rewrite, write

        result, target = self.result, self.settings.target
        assert result.exported_onnx is not None
        with self.clock("rewrite"):
            graph = read(result.exported_onnx)
            try:
                log = rewrite(graph, target, pinned_shapes(graph, self.profiles), record=self.settings.prove)
            except PassError as error:
                raise RewriteError(str(error)) from error
            files = write(graph, self.workspace.partial / REWRITTEN, beside=self.workspace.folder)
            self.workspace.publish(*files)
        result.onnx = self.workspace.path(REWRITTEN)
        result.rewrites = [
            Rewrite(name, log.reasons[name], len(nodes), nodes[:NODES_LISTED]) for name, nodes in log.nodes.items()
        ]
        result.declined = [Decline(rule, where, reason) for (rule, _), (where, reason) in log.declined.items()]
        result.notes.extend(log.notes)
        self.plugins = needed_plugins(graph, target)
        loaded = [plugin for plugin in self.plugins if plugin.loaded]
        result.notes.extend(f"the engine needs {plugin} wherever it runs: {plugin.source}" for plugin in loaded)
        result.inputs = [
            self._info(tensor, [each[tensor.name] for each in self.profiles if tensor.name in each])
            for tensor in graph.inputs
        ]
        result.outputs = [self._info(tensor, []) for tensor in graph.outputs]
        self._prove(log)
        with self.clock("rewrite"):
            self._plan(graph)
            # What an engine is made of is more than its model and settings: devices and calibration are known by now.
            known = self.caching.outputs(result.onnx, [self.profiles, self.plan.key()], self.plugins, self.cases)
        with self.clock("run"):
            try:
                outputs = self._run_onnx(result.onnx, "rewritten") if known is None else known
            except RunError as error:
                raise RunError(f"{error}\n{self._culprit()}") from error
        comparisons = self._compare(("exported", "rewritten"), exported, outputs)
        if not all(item.agreed for item in comparisons):
            raise RewriteError(
                f"the passes changed what the model computes: {disagreement(comparisons)}\n{self._culprit()}"
            )
        hints = {name: f"rule {rule} declined: {reason}" for (rule, name), (_, reason) in log.declined.items()}
        for node in graph.nodes:
            advice = target.advice(node.op, node.domain or "")
            if advice and (node.domain or not target.takes(node.op)):
                hints.setdefault(node.name, advice)
        return {**RESTRICTIONS, **hints}, outputs

    def _plan(self, graph: Any) -> None:
        assert self.read is not None
        of_torch, example = self.result.exporter is not None, self.cases[0].feeds
        self.plan = plan_build(self.settings, graph, self.read, example, hull(self.profiles), self.workspace, of_torch)
        self.result.notes.extend(self.plan.notes)

    def _prove(self, log: Log) -> None:
        """Checks each match of the passes by itself, if that is asked for."""
        from .proof import prove

        result = self.result
        if log.recorder is None or result.exported_onnx is None or result.onnx is None:
            return
        with self.clock("compare"):
            result.proofs = prove(log.recorder, result.exported_onnx, result.onnx, self.cases)

    def _culprit(self) -> str:
        """Which match it was, or how to find out."""
        from .proof import culprit

        if not self.settings.prove:
            return "prove=True (--prove) names the match that did it"
        return culprit(self.result.proofs, [rewrite.name for rewrite in self.result.rewrites])

    def _info(self, tensor: Any, profiles: Sequence[Profile]) -> TensorInfo:
        dtype = np.dtype(tensor.dtype)
        source = self.source_types.get(tensor.name, dtype)
        shape = [size if size is not None else "?" for size in tensor.shape or ()]
        spans = [[list(one.min), list(one.opt), list(one.max)] for one in profiles]
        return TensorInfo(tensor.name, dtype.name, shape, np.dtype(source).name, spans)

    # build and run

    def _build(self, hints: Mapping[str, str], rewritten: Outputs) -> Path:
        from .build import BuildOutcome, build, write_sidecar

        result, settings, partial = self.result, self.settings, self.workspace.partial
        assert result.onnx is not None
        model, engine, log = result.onnx, partial / ENGINE, self.workspace.path(BUILD_LOG)

        def make(timeout: float | None) -> BuildOutcome:
            return build(
                model,
                engine,
                log,
                target=settings.target,
                profiles=self.profiles,
                compute_capabilities=settings.compute_capabilities,
                timeout=timeout,
                hints=hints,
                plugins=self.plugins,
                timing_cache=self.caching.timing_file(),
                plan=self.plan,
            )

        with self.clock("build"):
            files = {ENGINE: engine, BUILD_LOG: log, CALIBRATION: partial / CALIBRATION}
            outcome, sha256 = self.caching.build(make, files, rewritten)
            result.notes.extend(outcome.notes)
            told = settings.builder.given()
            write_sidecar(partial / SIDECAR, outcome, result, settings.target, engine, self.plugins, sha256, told)
        publish_calibration(self.plan, self.workspace)
        self.workspace.publish(SIDECAR, ENGINE)
        result.engine = self.workspace.path(ENGINE)
        return result.engine

    def _run_engine(self, engine: Path, rewritten: Outputs) -> None:
        from .runtime.runner import engine_runner

        with self.clock("run"):
            outputs = run_stage(
                "engine",
                lambda: engine_runner(engine, self.settings.target, self.plugins),
                [case.feeds for case in self.cases],
            )
        comparisons = self._compare(("rewritten", "engine"), rewritten, outputs, self.settings.precision)
        if not all(item.agreed for item in comparisons):
            raise CompareError(f"the engine computes something else: {disagreement(comparisons)}")

    def _run_onnx(self, path: Path, name: str) -> Outputs:
        return run_stage(name, lambda: onnx_runner(path, name), [case.feeds for case in self.cases])

    def _compare(
        self, stages: tuple[str, str], reference: Outputs, candidate: Outputs, precision: str = "fp32"
    ) -> list[Comparison]:
        with self.clock("compare"):
            names = [case.name for case in self.cases]
            found = compare_stages(stages, names, reference, candidate, self.settings.tolerance, precision)
        kept = [item for item in self.result.comparisons if (item.reference, item.candidate) != stages]
        self.result.comparisons = kept + found
        return found

    def _task_check(self, engine: Path | None) -> None:
        """Runs the user's own check on the engine, or where none can run on the rewritten model."""
        if self.settings.task_check is None:
            return
        from .export import user_line
        from .runtime.runner import engine_runner

        path = self.result.onnx
        assert path is not None
        where = "engine" if engine is not None else "rewritten"
        target = self.settings.target
        runner = engine_runner(engine, target, self.plugins) if engine is not None else onnx_runner(path, where)

        def run(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
            from polygraphy.comparator.data_loader import coerce_feed_dict

            given = {name: np.asarray(array) for name, array in feeds.items()}
            metadata = active.get_input_metadata(use_numpy_dtypes=False)
            outputs = active.infer(coerce_feed_dict(given, metadata))
            return {name: np.array(value).astype(self.source_types[name]) for name, value in outputs.items()}

        with self.clock("compare"), runner as active:
            try:
                self.result.task_check = TaskCheck(True, self.settings.task_check(run), where)
            except AssertionError as error:
                self.result.task_check = TaskCheck(False, str(error), where)
                raise CompareError(f"the task check fails on the {where} model: {error}") from error
            except Exception as error:  # the user's code may raise anything, and is named as the cause
                words = f"{type(error).__name__}: {error}{user_line(error)}"
                self.result.task_check = TaskCheck(False, words, where)
                raise CompareError(f"the task check raises on the {where} model: {words}") from error


def _floats(array: Array) -> bool:
    return array.dtype.kind == "f"


def _disk_words(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}. Nothing half-written was left."
