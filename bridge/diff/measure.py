"""``diff``: where a conversion's error comes from, by stage, layer, shape and sample."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..compare import Feeds, Tolerances
from ..errors import BridgeError, RunError, UsageError, disk_words
from ..gpu import gpu_here
from ..precision import Precision
from ..target import Target
from .by_stage import OverSamples, Stages, depends_on_shape, over_shapes, shape_cases
from .conversion import Conversion, converted, finished
from .data import percentiles, plotted, read_metric, read_samples, worst_first, write_worst
from .layerwise import onnx_layers, ranking, torch_layers
from .model import DiffReport, LayerDiff, OutputData, Samples, ShapeError, StageName
from .verdict import agrees, first_diverging, of_idle, verdict

PLOTTED = 8
"""Outputs that data for plots is kept of, the worst ones."""


def diff(
    source: Any,
    inputs: Any = None,
    *,
    workdir: str | Path | None = None,
    target: str | Target = "auto",
    precision: str | Path | Mapping[str, Any] | Precision = "fp32",
    samples: Any = None,
    metric: str | Callable[..., Any] | None = None,
    profiles: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    tolerance: Tolerances = None,
    stages: Sequence[str] | None = None,
    module: Any = None,
    layers: bool = True,
    seed: int = 0,
    **convert_options: Any,
) -> DiffReport:
    """Measures how far the stages of a conversion are apart, and which layers are to blame.

    Args:
        source: what ``convert`` takes, which is then converted into ``workdir``; or the folder of a finished
            conversion, failed ones too, whose files are compared as they are.
        inputs: as ``convert`` takes them. Of a folder, by default, generated ones.
        workdir: where ``diff.json`` and the worst sample go; by default the conversion's folder.
        target, precision: of the conversion; a folder has its own.
        samples: real inputs, as ``convert(calibration=…)`` takes them: a sequence, a Dataset, a DataLoader, a function,
            a folder of .npz files or one such file; by default the example alone.
        metric: a function, or ``package.module:function``, that is called for each stage with the list of its outputs
            and the list of inputs (dicts of arrays by name, one for each sample), and returns a number or a dict of
            them.
        profiles: of the conversion; of a folder, by default, its own. The shapes at their ends and some between are
            compared too.
        tolerance: as for ``convert``.
        stages: which to compare, two at least, of torch, exported, rewritten, typed and engine; by default all.
        module: for a folder, the torch module that was converted; without it the diff begins with the exported model.
        layers: False leaves out the diff by layer, that of the conversion too.
        seed: of generated inputs and sampled shapes.
        convert_options: all else goes to ``convert``.

    Returns:
        A DiffReport, also written as ``diff.json``.

    Raises:
        UsageError: the call is wrong.
        BridgeError: the conversion came to nothing that could be compared, or its first stage does not run.
    """
    function = read_metric(metric)
    clock = _Clock()
    options = {**convert_options, "seed": seed, "profiles": profiles}
    if not layers:
        options["layers"] = False
    with clock("conversion"):
        conversion = _conversion(source, inputs, workdir, target, precision, tolerance, module, options)
    folder = Path(workdir) if workdir is not None else conversion.folder
    compared = Stages(conversion, conversion.stages(stages), tolerance)
    with _writing():
        folder.mkdir(parents=True, exist_ok=True)
    over = OverSamples(compared, function)
    with clock("samples"):
        over.measure(read_samples(conversion, samples))
    with clock("shapes"):
        shapes, notes = over_shapes(compared, shape_cases(conversion, seed))
    if "engine" in compared.running:
        notes.append(f"the engine ran on {gpu_here() or 'a GPU'}")
    where, feeds = _telling(over, shapes, conversion, seed)
    found: list[LayerDiff] = []
    if layers:
        with clock("layers"):
            found, more = _layers(compared, feeds)
            notes += [*more, f"layers are measured on {where}"]
    with _writing():
        report = _report(compared, over, shapes, found, notes, folder)
        report.seconds.update(clock.seconds)
        report.write(folder)
    return report


@contextmanager
def _writing() -> Iterator[None]:
    """Raises BridgeError where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise BridgeError(disk_words(error)) from error


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - start, 4)


def _conversion(
    source: Any,
    inputs: Any,
    workdir: str | Path | None,
    target: str | Target,
    precision: Any,
    tolerance: Tolerances,
    module: Any,
    options: dict[str, Any],
) -> Conversion:
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        for name, given, default in (("target", target, "auto"), ("precision", precision, "fp32")):
            if given != default:
                raise UsageError(f"{name}: {source} is a finished conversion, and has its own; leave it out.")
        known = ("seed", "profiles", "input_names", "output_names", "int_range", "layers")
        wrong = [name for name in options if name not in known]
        if wrong:
            raise UsageError(f"{wrong[0]}: {source} is a finished conversion, which nothing is changed of.")
        return finished(Path(source), module, inputs, options)
    if module is not None:
        raise UsageError("module: is for the folder of a finished conversion; give the module as the source.")
    folder = Path(workdir) if workdir is not None else Path(tempfile.mkdtemp(prefix="bridge-diff-"))
    options = {**options, "target": target, "precision": precision, "tolerance": tolerance}
    return converted(source, inputs, folder, options)


def _telling(over: OverSamples, shapes: Sequence[ShapeError], conversion: Conversion, seed: int) -> tuple[str, Feeds]:
    """The inputs that say most about layers: the worst sample or, where all agree, shapes at which one does not."""
    assert over.worst is not None  # there is one sample at least
    name, feeds = over.worst
    if all(error.agreed for error in over.errors):
        wrong = [row for row in shapes if row.added is not None and row.added.agreed is False]
        if wrong:
            case = max(wrong, key=lambda row: (row.added.relative or 0.0) if row.added else 0.0).case
            return f"the {case} shapes", dict(shape_cases(conversion, seed))[case]
    return name, feeds


def _layers(stages: Stages, feeds: Feeds) -> tuple[list[LayerDiff], list[str]]:
    """Of each pair of neighbouring stages; a note for each pair that cannot be looked into."""
    conversion, tolerance = stages.conversion, stages.tolerance
    models = conversion.models
    found: list[LayerDiff] = []
    notes: list[str] = []
    running = stages.running
    for reference, candidate in itertools.pairwise(running):
        more: list[str] = []
        try:
            if candidate == "engine":
                from .engine_layers import engine_layers

                layers, more = engine_layers(conversion, feeds, tolerance)
            elif reference == "torch":
                assert conversion.source is not None
                path = models[candidate]
                layers, more = torch_layers(conversion.source, path, feeds, tolerance, candidate)
            else:
                layers = onnx_layers((reference, candidate), (models[reference], models[candidate]), [feeds], tolerance)
        except RunError as error:
            layers, more = [], [f"{reference} → {candidate}: layers are not compared: {error}"]
        found += layers
        notes += more
    if "engine" in stages.why:
        notes.append(f"layers of the engine are not compared: {stages.why['engine']}")
    return found, notes


def _report(
    stages: Stages,
    over: OverSamples,
    shapes: list[ShapeError],
    layers: list[LayerDiff],
    notes: list[str],
    folder: Path,
) -> DiffReport:
    conversion, result = stages.conversion, stages.conversion.result
    rows, ranked, first = over.rows(), ranking(layers), first_diverging(layers)
    said = depends_on_shape(shapes)
    notes = [*notes, *map(of_idle, over.idle)]
    return DiffReport(
        result.name,
        verdict(result.name, rows, shapes, said, layers, first, ranked, over.errors, over.idle),
        agrees(rows, shapes),
        result.target,
        result.precision,
        rows,
        layers,
        first,
        ranked,
        shapes,
        _samples(over, folder),
        over.metrics,
        _plots(stages, over),
        [*conversion.notes, *_failure(result.error), *said, *notes],
    )


def _failure(error: str | None) -> list[str]:
    """Of the conversion's error the line that says what is wrong: what may come after it is in its own report."""
    return [f"the conversion failed: {error.splitlines()[0]}"] if error else []


def _samples(over: OverSamples, folder: Path) -> Samples:
    assert over.worst is not None
    name, feeds = over.worst
    return Samples(over.count, percentiles(over.errors), worst_first(over.errors), name, write_worst(folder, feeds))


def _plots(stages: Stages, over: OverSamples) -> list[OutputData]:
    """Of the last stage that ran against the first, on the worst sample."""
    assert over.worst is not None
    name, feeds = over.worst
    order: list[StageName] = stages.running
    if len(order) < 2:
        return []
    pair = order[0], order[-1]
    first, last = (stages.conversion.run(stage, [feeds])[0] for stage in pair)
    errors = {output: over.carried[pair[1], output].error() for output in over.outputs}
    outputs = sorted(over.outputs, key=lambda output: -((found.relative or 0.0) if (found := errors[output]) else 0.0))
    made = [plotted(pair, name, output, first[output], last[output]) for output in outputs[:PLOTTED]]
    return [item for item in made if item is not None]
