"""``convert``: source → export → rewrite → precision → build → run, each stage compared with the one before it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .asking import known_refusals
from .build_settings import BuildSettings
from .cache import open_cache
from .clock import Clock
from .compare import Tolerances
from .errors import BridgeError, BuildError, BuildTimeout, RewriteError, RunError, Stage, UsageError, disk_words
from .onnx_source import INT_RANGE
from .precision import Precision
from .result import ConversionResult
from .settings import Run, Settings, check_constants, check_kept, read_capabilities, source_path
from .stages.engine import build_engine, run_engine, task_check, time_engine
from .stages.export import from_file, from_torch
from .stages.golden import keep_golden
from .stages.precision import lower
from .stages.rewrite import check_rewritten, rewrite
from .stages.state import Outputs, State
from .target import Target, resolve
from .torch_source import class_name
from .trade_off import one_or_several
from .workspace import RESULT, Workspace, write_text

if TYPE_CHECKING:
    from .export import Exporter


@one_or_several
def convert(
    source: Any,
    inputs: Any = None,
    *,
    name: str | None = None,
    workdir: str | Path | None = None,
    target: str | Target = "auto",
    precision: str | Path | Mapping[str, Any] | Precision = "fp32",
    profiles: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    constants: Mapping[str, Any] | None = None,
    tolerance: Tolerances = None,
    task_check: Callable[[Run], str] | None = None,
    build: bool = True,
    build_timeout: float | None = None,
    compute_capabilities: Sequence[str] | None = None,
    opset: int | None = None,
    seed: int = 0,
    int_range: tuple[int, int] = INT_RANGE,
    prove: bool = False,
    layers: bool = True,
    latency: bool = False,
    golden: bool = False,
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
        constants: ``{input: value}`` of an ONNX file: the engine has no such inputs, and of an ``If`` that they decide
            the one branch, as with ``{"use_cache_branch": True}``. A number that is given to a module is one already.
        precision: what is computed in what, the same on every target: ``fp32``, ``fp16``, ``bf16``, ``int8``, ``fp8``,
            ``int4``, two of them (``int8+fp16``), a ``bridge.Precision``, or the path of a precision file, which says
            it by node, operator and torch module. A list of them converts to each, in ``workdir/<precision>``, and
            gives a ``bridge.TradeOff`` of their errors, sizes and latencies, also written as ``trade_off.json``.
        tolerance: one for all outputs, or by output name; by default according to dtype and precision, integers and
            booleans exact, of which in a lower precision a share may differ. Of a list of precisions it is for those
            that keep the model's own types; the lower ones are held to their defaults.
        task_check: is given a function that runs the converted model, and returns what it found; raises
            AssertionError where the model does not do its job.
        build: False stops after the rewrite.
        build_timeout: seconds after which the build is stopped.
        compute_capabilities: for TensorRT-RTX, the GPUs to build for, such as ``["8.9", "12.0"]``.
        opset: asked of the exporter; by default its own choice.
        seed, int_range: of generated inputs.
        prove: run each match of the passes before and after, by itself, on the tensors that flow through it; the
            result's ``proofs`` say what was found, and an error of the rewrite names the match that caused it.
        layers: of a lower precision, measure in ONNX Runtime how far each layer is off, which takes long for large
            models; without it, an error of the comparison names no layers.
        latency: where a GPU runs the engine, measure how long a call takes at the example's shapes.
        golden: write the inputs, and what the source and the rewritten model compute of them, as ``golden.npz`` with
            ``golden.json``: ``bridge verify`` holds the engine to them on the machine where it runs.
        cache: whether an engine that was built before from the same model, by the same TensorRT, for the same GPU and
            with the same settings may be taken instead of a new one; a path is the folder of another cache than the
            default one.
        check: raise the error of a failed conversion rather than return it.
        builder: what the builder is told beside the model: a ``bridge.BuildSettings``, or a mapping with its names.
        calibration: typical inputs, whose values decide what is quantised how, and what stays in float32 since it would
            leave float16's range: a sequence (each as ``inputs`` is given), a Dataset, a DataLoader, a function, or the
            path of a folder or .npz file; by default the example alone.
        calibration_algorithm: ``entropy``, ``entropy_legacy``, ``minmax`` or ``legacy``; or TensorRT's name of a
            calibrator of its own (8 to 10), such as ``ENTROPY_CALIBRATION_2``, which takes inputs of one shape; the
            ranges that it finds are kept as ``calibration.cache``.
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
        Precision.of(precision),
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
        layers,
        latency,
        golden,
        constants,
    )
    path = source_path(source)
    check_constants(path, constants)
    folder = Path(workdir) if workdir is not None else Path(tempfile.mkdtemp(prefix="bridge-"))
    if path is not None:
        check_kept(path, folder)
        if input_names is not None or output_names is not None:
            raise UsageError("input_names, output_names: an ONNX file has names of its own; leave them out.")
    elif hasattr(source, "named_modules"):
        settings.builder.check_modules([name for name, _ in source.named_modules()])
    result = ConversionResult(
        name or (path.stem if path is not None else class_name(source)),
        target=settings.target.info,
        precision=settings.precision.name,
        source=str(path) if path is not None else f"{type(source).__module__}.{type(source).__qualname__}",
    )
    clock = Clock(result.seconds, on_stage or (lambda stage: None))
    conversion = Conversion(result, settings, Workspace(folder), clock)
    conversion.run(source if path is None else path, inputs)
    if check and result.exception is not None:
        raise result.exception
    return result


class Conversion:
    """One conversion: the stages in their order, and what becomes of an error."""

    def __init__(self, result: ConversionResult, settings: Settings, workspace: Workspace, clock: Clock) -> None:
        self.result, self.settings, self.workspace, self.clock = result, settings, workspace, clock
        self.state = State(result, settings, workspace, clock)
        result.builder = settings.builder.given()
        result.notes.extend(settings.builder.notes(settings.target))

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
                    self._fail(BridgeError(disk_words(error), clock.stage), clock.stage)
                result.seconds.update({key: round(value, 4) for key, value in result.seconds.items()})
                write_text(self.workspace.path(RESULT), result.to_json(self.workspace.folder))
        except OSError as error:
            self._fail(BridgeError(disk_words(error), clock.stage), clock.stage)

    def _fail(self, error: BridgeError, stage: Stage) -> None:
        self.result.status, self.result.stage = "failed", stage
        self.result.error, self.result.exception = str(error), error
        if isinstance(error, BuildError):
            self.result.refusals = list(error.refusals)

    def _stages(self, source: Any, inputs: Any) -> None:
        self.clock.enter("export")
        if isinstance(source, Path):
            self._from_export(from_file(self.state, source, inputs))
            return
        from .export import EXPORTERS

        exported = from_torch(self.state, source, inputs, EXPORTERS)
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
                other._from_export(from_torch(other.state, source, inputs, exporters))
        except BridgeError:
            raise refusal from None
        self.workspace.adopt(other.workspace)
        for name in ("exported_onnx", "rewritten_onnx", "onnx", "engine"):
            path = getattr(fresh, name)
            setattr(fresh, name, path and self.workspace.path(path.name))
        why = " ".join(str(refusal).splitlines()[:2])
        fresh.notes.append(f"exported by torch.onnx's {fresh.exporter} exporter, since of {first}'s model {why}")
        vars(result).update(vars(fresh))

    def _from_export(self, exported: Outputs) -> None:
        state, target = self.state, self.settings.target
        self.clock.enter("rewrite")
        graph = rewrite(state)
        if self.settings.precision.plain:
            lower(state, graph)
            check_rewritten(state, exported, state.look_for_engine())
        else:
            check_rewritten(state, exported, None)
            self.clock.enter("precision")
            lower(state, graph)
            state.look_for_engine()
        if not (self.settings.build and target.installed):
            task_check(state, None)
            if not target.installed:
                self.result.notes.append(f"{target} is not installed here: rewritten for it, not built")
                refused = known_refusals(graph, target)
                if refused:
                    told = f"its parser is known to refuse {', '.join(refused)}; bridge explain says where and why"
                    self.result.notes.append(told)
            self.result.status = "rewritten"
            keep_golden(state)
            return
        self.clock.enter("build")
        engine = build_engine(state)
        keep_golden(state)
        reason = target.why_not_run() or (
            "its weights are stripped; refit it first" if self.settings.builder.strip_weights else None
        )
        if reason is not None:
            task_check(state, None)
            self.result.notes.append(f"built, not run: {reason}")
            self.result.status = "built"
            return
        self.clock.enter("run")
        run_engine(state, engine)
        time_engine(state)
        task_check(state, engine)
        self.result.status = "verified"
