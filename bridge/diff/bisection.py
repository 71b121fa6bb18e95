"""``bisect``: which few nodes of a model that fails in a low precision have to be raised for its tolerance to hold.

The answer is a precision file. Nodes are ranked by measured sensitivity (``sensitivity``), sets of them are tried
(``search``), and each trial is judged by the engine where a GPU can run it, else by the evaluator (``judges``).
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..assignment import rules_for
from ..build_settings import BuildSettings
from ..calibration_sources import Samples, check_source
from ..clock import Clock
from ..compare import Tolerances
from ..errors import RewriteError, UsageError
from ..inputs import hull
from ..pipeline import convert
from ..precision import FLOATS, Precision, Rule
from ..result import ConversionResult
from ..settings import Settings, check_constants, check_kept, read_capabilities, source_path
from ..stages.export import from_file, from_torch
from ..stages.precision import COMPARED, calibration_of, measured_model, ranges_of, scales_of
from ..stages.rewrite import check_rewritten, rewrite
from ..stages.state import State
from ..target import Target, resolve
from ..workspace import Workspace, write_text
from .judges import EngineJudge, EvaluatorJudge, Judge, Judgement, reference_outputs
from .search import HIGHEST, Raised, Search, Step
from .sensitivity import Suspects, measured_steps

SCHEMA = 1
FILE, REPORT, FOLDER = "precision.yaml", "bisection.json", "bisection"
ENTRIES = ("name", "input_names", "output_names", "constants", "profiles", "opset", "seed", "int_range", "builder")
"""Options of ``convert`` that decide what the model is, or how it is built."""
OTHERS = ("build_timeout", "compute_capabilities", "calibration", "calibration_algorithm", "cache")

Status = Literal["held", "found", "nothing suffices", "no build left"]


@dataclass(frozen=True)
class Kept:
    """A node that the precision file raises."""

    node: str
    operator: str
    module: str
    """Path of the torch module; empty where it is not known."""
    source: str
    """File and line of the user's code."""
    precision: str
    """``fp32``, or the 16-bit type of what was to be quantised."""
    reason: str
    """What was measured of it."""

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.module, self.source) if part)
        return (
            f"{self.operator} {self.node}" + (f" ({where})" if where else "") + f" in {self.precision}: {self.reason}"
        )


@dataclass(frozen=True)
class Trial:
    """One build, or one evaluation in its place."""

    raised: int
    """How many nodes were raised."""
    judgement: Judgement


@dataclass(frozen=True)
class Bisection:
    """What a bisection found."""

    name: str
    target: str
    status: Status
    precision: Precision
    """What holds the tolerance; where nothing was found that does, what was asked for."""
    kept: list[Kept]
    """Culprits first."""
    trials: list[Trial]
    before: Judgement
    after: Judgement
    """Of ``precision``."""
    nodes: int
    """Nodes of the model that compute with floating-point numbers."""
    fp32_before: int
    """Of these, in float32 whatever was asked for, since float16 would be unsound or a rule says so."""
    fp32_after: int
    judged_by: Literal["engine", "evaluator", "caller"]
    minimal: bool
    """Whether it was tried that none of the nodes can be left out."""
    latency: str
    """What the precision costs in time, in words."""
    file: Path | None = None
    """The precision file, where one was found that holds."""
    notes: list[str] = field(default_factory=list)

    @property
    def builds(self) -> int:
        return len(self.trials)

    @property
    def share(self) -> float:
        """Of the nodes, how many are in float32 beside those that were before."""
        return (self.fp32_after - self.fp32_before) / self.nodes if self.nodes else 0.0

    @property
    def verdict(self) -> str:
        """In one sentence."""
        asked = f"{self.name} in {self.precision.name} for {self.target}"
        if self.status == "held":
            return f"{asked} is within its tolerance as it is ({_figure(self.before)}): nothing has to be raised."
        if self.status == "found":
            first = self.kept[0]
            others = f" and {len(self.kept) - 1} more" if len(self.kept) > 1 else ""
            return (
                f"{asked} is within its tolerance ({_figure(self.after)}, before {_figure(self.before)}) with "
                f"{first}{others}: {self.share:.1%} of {self.nodes} nodes more in float32, after {self.builds} builds."
            )
        if self.status == "no build left":
            return f"{asked}: after {self.builds} builds no set of nodes was found that suffices; allow more builds."
        if self.builds == 1:
            return f"{asked} is beyond its tolerance ({_figure(self.before)}), and there is no node that may be raised."
        return (
            f"{asked} is beyond its tolerance ({_figure(self.before)}), and all nodes in float32 that may be do not "
            f"help ({_figure(self.after)}): what is wrong is not the rounding of these nodes."
        )

    def to_json(self) -> str:
        """All facts; infinite errors are null."""
        values = {"schema": SCHEMA, "verdict": self.verdict, **dataclasses.asdict(self), "builds": self.builds}
        values["precision"] = self.precision.file_text()
        values["file"] = str(self.file) if self.file is not None else None
        return json.dumps(_finite(values), indent=1, allow_nan=False)


def _figure(found: Judgement) -> str:
    return f"{found.error:.2g} of it is used" if math.isfinite(found.error) else "outputs are not finite, or misshapen"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bisect(
    source: Any,
    inputs: Any = None,
    *,
    precision: str | Path | Mapping[str, Any] | Precision,
    workdir: str | Path | None = None,
    target: str | Target = "auto",
    tolerance: Tolerances = None,
    samples: Any = None,
    builds: int = 15,
    fixed_rules: bool = True,
    judge: Judge | None = None,
    **options: Any,
) -> Bisection:
    """A smallest set of nodes that have to stay in float32 for ``tolerance`` to hold, and a precision file of it.

    Args:
        source, inputs, target, tolerance: as of ``convert``, which takes the file as ``precision=``.
        precision: the one that fails. Nodes that its rules name keep what they say, unless ``fixed_rules`` is False.
        workdir: where ``precision.yaml``, ``bisection.json`` and the folder ``bisection`` go; by default a new folder.
        samples: further inputs for which the tolerance has to hold, in any form that ``calibration`` may have. They are
            not calibrated with: give ``calibration=`` for that, of which the first eight are held to it as well.
        builds: how many engines may be built or, where no GPU runs them, models be evaluated.
        judge: says of a precision whether it holds, in place of the engine or the evaluator.
        options: others of ``convert`` (profiles, calibration, opset, builder, …).

    Raises UsageError for what ``convert`` does not take or a ``precision`` in which nothing is low, RewriteError and
    others of ``convert`` where the model fails before it has a low precision.
    """
    asked = Precision.of(precision)
    if asked.plain:
        raise UsageError("bisect: precision fp32 has nothing that could be raised; give the one that fails.")
    if builds < 2:
        raise UsageError(f"bisect: builds={builds}: the first tells whether the tolerance holds; allow at least 2.")
    settings = _settings(asked, target, tolerance, options)
    path = source_path(source)
    check_constants(path, options.get("constants"))
    folder = Path(workdir) if workdir is not None else Path(tempfile.mkdtemp(prefix="bridge-"))
    workspace = Workspace(folder / FOLDER)
    if path is not None:
        check_kept(path, workspace.folder)
    if samples is not None:
        _as_samples(lambda: check_source(samples))
    name = options.get("name") or (path.stem if path is not None else type(source).__name__)
    result = ConversionResult(name, target=settings.target.info, precision=asked.name)
    state = State(result, settings, workspace, Clock(result.seconds, lambda stage: None))
    with workspace.opened():
        _rewritten(state, source if path is None else path, inputs)

        def built(wanted: Precision, where: Path) -> ConversionResult:
            kept = {key: value for key, value in options.items() if value is not None}
            wants = {"target": target, "tolerance": tolerance, "precision": wanted, "layers": False, "workdir": where}
            done: ConversionResult = convert(source, inputs, **{**kept, **wants})
            return done

        found = _Bisecting(state, asked, builds, fixed_rules).run(samples, judge, built)
    return _written(found, folder)


def _settings(asked: Precision, target: str | Target, tolerance: Tolerances, options: Mapping[str, Any]) -> Settings:
    known = (*ENTRIES, *OTHERS)
    unknown = [key for key in options if key not in known]
    if unknown:
        raise UsageError(f"bisect: {unknown[0]!r} is no option of it; others of convert are {', '.join(known)}.")
    defaults = {key: item.default for key, item in inspect.signature(convert).parameters.items() if key in known}
    values = {**defaults, **options}
    values["builder"] = BuildSettings.of(values["builder"])
    values["compute_capabilities"] = read_capabilities(values["compute_capabilities"])
    for key in ("name", "cache"):
        del values[key]
    where = target if isinstance(target, Target) else resolve(target)
    return Settings(where, asked, tolerance=tolerance, build=False, layers=False, **values)


def _rewritten(state: State, source: Any, inputs: Any) -> None:
    """Takes the model to where precisions are put into it."""
    from ..export import EXPORTERS

    if isinstance(source, Path):
        exported = from_file(state, source, inputs)
        rewrite(state)
        check_rewritten(state, exported, None)
        return
    left = list(EXPORTERS)
    while True:
        exported = from_torch(state, source, inputs, left)
        try:
            rewrite(state)
            check_rewritten(state, exported, None)
            return
        except RewriteError:
            left = left[[str(item) for item in left].index(str(state.result.exporter)) + 1 :]
            if not left:
                raise


def _as_samples(call: Any) -> Any:
    """What a reader of calibration inputs says, of samples."""
    try:
        return call()
    except UsageError as error:
        raise UsageError(str(error).replace("calibration", "samples", 1)) from error


class _Bisecting:
    """One bisection, of a model that is rewritten."""

    def __init__(self, state: State, asked: Precision, builds: int, fixed: bool) -> None:
        self.state, self.asked, self.builds, self.fixed = state, asked, builds, fixed
        self.trials: list[Trial] = []
        self.notes: list[str] = []

    def run(self, samples: Any, given: Judge | None, built: Any) -> Bisection:
        evaluator = self._evaluator(samples)
        judge, by = self._judge(evaluator, given, built)
        graph, first = evaluator.assigned(self.asked)
        self.places = _places(graph)
        self.ruled = set(rules_for(graph, self.asked))
        self.half = self.asked.half if self.asked.scheme else ""
        self.free = self._free(first.nodes)
        self.low = {name for name, kind in first.nodes.items() if kind != HIGHEST}
        self.quantised = {name for name, kind in first.nodes.items() if kind not in FLOATS}

        def trial(raised: Raised) -> Judgement:
            self.trials.append(Trial(len(raised), judge(self._with(raised))))
            return self.trials[-1].judgement

        search = Search([], trial, self.builds)
        held = search.suffices({})
        before = self.trials[0].judgement
        steps: list[Step] = []
        if not held:
            feeds = dict(zip(evaluator.names, evaluator.feeds, strict=True)).get(before.inputs, evaluator.feeds[0])
            suspects = Suspects(graph, first, self.free, self.half, self._low(), evaluator.observed())
            path = self.state.result.rewritten_onnx
            assert path is not None
            steps = measured_steps(suspects, path, evaluator.make(self.asked), feeds)
            search.steps = steps
            search.run()
        return self._summary(search, steps, evaluator, before, by)

    def _low(self) -> Any:
        from passes.low_types import low_type

        return low_type(self.asked.half_dtype) if self.asked.half else None

    def _evaluator(self, samples: Any) -> EvaluatorJudge:
        state = self.state
        calibration = calibration_of(state)
        calibrating = (lambda: state.feeds) if calibration is None else calibration.samples
        measured = measured_model(state)
        ranges, scales = ranges_of(state, calibrating(), measured), scales_of(state, calibrating(), measured)
        named = [(case.name, case.feeds) for case in state.cases]
        if calibration is not None:
            some = itertools.islice(calibration.samples(), COMPARED)
            named += [(f"calibration {index}", feeds) for index, feeds in enumerate(some)]
        if samples is not None:
            assert state.read is not None
            reader = Samples(samples, state.read, state.cases[0].feeds, hull(state.profiles))
            named += [
                (f"sample {index}", dict(feeds)) for index, (_, feeds) in enumerate(_as_samples(lambda: [*reader]))
            ]
        names, feeds = [name for name, _ in named], [feeds for _, feeds in named]
        assert state.result.rewritten_onnx is not None
        outputs = reference_outputs(state.result.rewritten_onnx, feeds)
        return EvaluatorJudge(state, ranges, scales, feeds, names, outputs)

    def _judge(self, evaluator: EvaluatorJudge, given: Judge | None, built: Any) -> tuple[Judge, Any]:
        state, target = self.state, self.state.settings.target
        if given is not None:
            return given, "caller"
        reason = target.why_not_run()
        if reason is None:
            folder = state.workspace.folder / "engine"
            found = EngineJudge(
                built, folder, target, evaluator.feeds, evaluator.names, evaluator.reference, state.settings.tolerance
            )
            return found, "engine"
        if state.tensorrt_calibrates:
            raise UsageError(
                f"bisect: {target} quantises by itself while it builds, and no engine can run here ({reason}): what it "
                "computes can be judged on a machine with its GPU, or for a target that is strongly typed."
            )
        self.notes.append(f"judged by the evaluator, each value rounded to its type: {reason}")
        return evaluator, "evaluator"

    # what may be raised

    def _free(self, nodes: Mapping[str, str]) -> dict[str, str]:
        """By node that is low and may be raised: its precision."""
        low = {name: kind for name, kind in nodes.items() if kind != HIGHEST}
        if not self.fixed:
            return low
        stuck = sorted(self.ruled & low.keys())
        if stuck:
            self.notes.append(
                f"rules of the given precision keep {len(stuck)} nodes low ({', '.join(stuck[:3])}"
                f"{', …' * (len(stuck) > 3)}), which were not raised; fixed_rules=False allows it"
            )
        return {name: kind for name, kind in low.items() if name not in self.ruled}

    def _with(self, raised: Raised) -> Precision:
        """What was asked for, with rules for the nodes that are raised."""
        if self.low and self.low <= {name for name, kind in raised.items() if kind == HIGHEST}:
            return Precision.of(HIGHEST)  # nothing is left of what was asked for, which convert refuses
        rules = tuple(Rule(kind, name, "node") for name, kind in raised.items())
        wanted = replace(self.asked, rules=(*self.asked.rules, *rules))
        whole = self.quantised and self.quantised <= raised.keys()
        if whole and not any(rule.precision not in FLOATS for rule in self.asked.rules):
            wanted = replace(wanted, quantised="")  # nothing is left to be quantised, which convert refuses
        return wanted

    # what came of it

    def _summary(
        self, search: Search, steps: list[Step], evaluator: EvaluatorJudge, before: Judgement, by: Any
    ) -> Bisection:
        best = search.best
        precision = self._with(best) if best is not None else self.asked
        after = search.known[frozenset((best or {}).items())]
        status: Status = "held" if best == {} else "found" if best is not None else "no build left"
        everything = frozenset((name, HIGHEST) for name in self.free)
        if best is None and (not self.free or everything in search.known):
            status, after = "nothing suffices", search.known.get(everything, after)
        assert isinstance(after, Judgement)
        counts = [self._in_float32(evaluator, item) for item in (self.asked, precision)]
        return Bisection(
            self.state.result.name,
            str(self.state.settings.target),
            status,
            precision,
            self._kept(best or {}, steps),
            self.trials,
            before,
            after,
            nodes=len(self.places),
            fp32_before=counts[0],
            fp32_after=counts[1],
            judged_by=by,
            minimal=status == "found" and search.minimal,
            latency=_latency(before, after, by),
            notes=self.notes,
        )

    def _in_float32(self, evaluator: EvaluatorJudge, precision: Precision) -> int:
        _, assignment = evaluator.assigned(precision)
        return sum(assignment.nodes.get(name, HIGHEST) == HIGHEST for name in self.places)

    def _kept(self, raised: Raised, steps: list[Step]) -> list[Kept]:
        """In the order of the steps that name them first."""
        reasons: dict[str, str] = {}
        for step in steps:
            for index, name in enumerate(step.nodes):
                words = step.reason if index == 0 or math.isinf(step.sensitivity) else f"{step.nodes[0]}: {step.reason}"
                reasons.setdefault(name, words)
        order = [name for name in reasons if name in raised]
        return [Kept(name, *self.places[name][1:], raised[name], reasons[name]) for name in order]


def _places(graph: Any) -> dict[str, tuple[str, str, str, str]]:
    """By node that computes with float32: its name, operator, torch module and source line."""
    from passes.provenance import origin
    from passes.sound_nodes import touched

    found = {}
    for node in touched(graph):
        where = origin(node)
        found[node.name] = (node.name, node.op, where.module, where.source)
    return found


def _latency(before: Judgement, after: Judgement, by: str) -> str:
    if before.milliseconds is None or after.milliseconds is None:
        measured = "the judge measured none" if by == "caller" else "no engine ran"
        return f"not known: {measured}"
    change = after.milliseconds / before.milliseconds - 1
    return f"{before.milliseconds:.3f} ms before, {after.milliseconds:.3f} ms after ({change:+.1%}), copies included"


def _written(found: Bisection, folder: Path) -> Bisection:
    if found.status == "found":
        found = replace(found, file=folder / FILE)
        write_text(folder / FILE, f"# {found.verdict}\n" + found.precision.file_text())
    write_text(folder / REPORT, found.to_json())
    return found
