"""The layers of an engine, by engines that are built for it: TensorRT fuses what it likes, and shows its outputs alone.

What a layer carries: an engine of the same model with the tensors marked as outputs, which keeps TensorRT from fusing
across them, and changes nothing else. What it introduces: an engine of the layers apart, each of which reads what ONNX
Runtime computed before it. Both are built with the conversion's own settings; a fusion that is wrong shows where the
engine's own outputs are off and neither of these is.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from passes.provenance import origin_of

from ..build_plan import BuildPlan
from ..build_settings import BuildSettings
from ..compare import Array, Feeds, Tolerances, run_stage
from ..errors import BuildError, RunError
from ..evaluator import Evaluator, chunks, load
from ..inputs import Profile, Profiles
from ..pairs import APART, FLOATS, Side
from ..precision import Precision
from ..settings import Settings
from .alignment import Pieces
from .conversion import Conversion
from .figures import apart
from .layerwise import diverges, limit
from .model import LayerDiff, StageName

if TYPE_CHECKING:
    from ..plugins.loading import NeededPlugin

MARKED = 400
"""Outputs of one engine."""
BESIDE = 1 << 27
"""Elements of all weights up to which two engines are built at the same time: each build holds them several times."""
FP16_MAX = float(np.finfo(np.float16).max)
"""What any layer of a weakly typed engine in fp16 may be limited to, though all its outputs are float32."""


def engine_layers(conversion: Conversion, feeds: Feeds, tolerance: Tolerances) -> tuple[list[LayerDiff], list[str]]:
    """The layers of the engine against the model that it was built of, and notes on what could not be measured."""
    path = conversion.result.onnx
    assert path is not None
    stage: StageName = "typed" if path == conversion.models.get("typed") else "rewritten"
    precision = Precision.of(conversion.result.precision)
    if precision.scheme and not conversion.target.strongly_typed:
        return [], [f"{stage} → engine: layers are not compared: TensorRT's calibration was for the whole model"]
    engines = _Engines(conversion, path)
    found: list[LayerDiff] = []
    notes = [_HOW]
    for names in engines.chunks(feeds):
        known = engines.reference.open([*names, *engines.pieces(names).read])(feeds)
        with ThreadPoolExecutor(2 if engines.small else 1) as pool:  # each is built by a process of its own
            whole = pool.submit(engines.marked, names, feeds)
            parts = pool.submit(engines.apart, names, {**feeds, **known})
        (carried, why), (alone, why_not) = whole.result(), parts.result()
        notes += [words for words in (*why, *why_not) if words not in notes]
        for name in names:
            found.append(_row(engines, stage, name, known[name], carried.get(name), alone.get(name), tolerance))
    return found, notes


_HOW = (
    "layers of the engine are those of engines built for this: with their tensors as outputs, which keeps TensorRT "
    "from fusing across them, and with each layer by itself"
)


class _Engines:
    """The model of an engine, and engines of it that show what is inside."""

    def __init__(self, conversion: Conversion, path: Path) -> None:
        from passes import read

        from ..build_plan import own_precisions, plan_build
        from ..cache import open_cache
        from ..caching import timing_file
        from ..plugins.loading import needed_plugins

        self.conversion, self.path = conversion, path
        result, target = conversion.result, conversion.target
        self.side = Side(load(path))
        self.reference = Evaluator(self.side.model, path.parent, path.name)
        graph = read(path)
        self.plugins: list[NeededPlugin] = needed_plugins(graph, target)
        settings = Settings(target, Precision.of(result.precision), builder=BuildSettings.of(result.builder))
        typed = conversion.models.get("typed")
        nodes = own_precisions(read(typed)) if typed is not None and typed != path else None
        self.plan: BuildPlan = plan_build(settings, graph, result.exporter is not None, nodes)
        """As the conversion's: what a weakly typed engine was told of its nodes, the typed model says."""
        self.small = sum(math.prod(item.dims) for item in self.side.initializers.values()) <= BESIDE
        self.running = threading.Lock()
        """While one engine runs, another may be built, and none run."""
        self.timings = timing_file(open_cache(conversion.cache), target)
        """What the conversion's build, or one before, has measured of kernels is not measured again."""
        shown = FLOATS - {TensorProto.DOUBLE}
        self.tensors = [
            name
            for name, place in self.side.place.items()
            if self.side.types.get(name) in shown and self._computed(self.side.graph.node[place])
        ]
        self.given = {*self.tensors, *self.side.inputs}

    def _computed(self, node: NodeProto) -> bool:
        """Whether the node depends on the model's inputs: TensorRT folds what does not."""
        return node.op_type != "Constant" and bool(self.side.needs(node, self.side.inputs.__contains__)[0])

    def pieces(self, names: Sequence[str]) -> Pieces:
        return Pieces(self.side, names, self.given)

    def chunks(self, feeds: Feeds) -> Iterator[list[str]]:
        shapes = self.reference.open(self.tensors, shapes=True)(feeds)
        return chunks(self.tensors, lambda name: 16 * math.prod(int(size) for size in shapes[name]), MARKED)

    def marked(self, names: Sequence[str], feeds: Feeds) -> tuple[dict[str, Array], list[str]]:
        """The tensors of an engine that has them as outputs, and notes; why there is none, if so."""
        model = ModelProto()
        model.CopyFrom(self.side.model)
        there = {item.name for item in model.graph.output}
        infos = {item.name: item for item in model.graph.value_info}
        model.graph.output.extend(infos[name] for name in names if name not in there)
        return self._run(model, feeds, self.conversion.profiles, self.plan, "with its tensors as outputs")

    def apart(self, names: Sequence[str], values: Mapping[str, Array]) -> tuple[dict[str, Array], list[str]]:
        """The tensors, each made by itself of the values given, and notes; why there are none, if so."""
        pieces = self.pieces(names)
        model = pieces.model
        given = {item.name: values[item.name] for item in model.graph.input}
        for item in model.graph.input:
            shape = item.type.tensor_type.shape
            shape.ClearField("dim")
            for size in given[item.name].shape:
                shape.dim.add().dim_value = size
        static = {name: Profile(array.shape, array.shape, array.shape) for name, array in given.items()}
        made, why = self._run(model, given, [static], self._plan_apart(), "of the layers apart")
        return {name.removesuffix(APART): array for name, array in made.items()}, why

    def _plan_apart(self) -> BuildPlan:
        """The plan, of nodes and tensors by their names in a model of the layers apart too."""
        nodes, made_by, devices = self.plan.layer_precisions, self.plan.made_by, self.plan.devices
        return replace(
            self.plan,
            layer_precisions={**nodes, **{name + APART: kind for name, kind in nodes.items()}},
            made_by={**made_by, **{tensor + APART: name + APART for tensor, name in made_by.items()}},
            devices={**devices, **{name + APART: device for name, device in devices.items()}},
        )

    def _run(
        self, model: ModelProto, feeds: Feeds, profiles: Sequence[Profiles], plan: BuildPlan, what: str
    ) -> tuple[dict[str, Array], list[str]]:
        from ..build import build
        from ..runtime.runner import engine_runner

        target = self.conversion.target
        wanted = {item.name for item in model.graph.input}
        own = [{name: one for name, one in each.items() if name in wanted} for each in profiles]
        with _files(self.path.parent) as folder:
            onnx_file = self.path.parent / f"{folder.name}.onnx"  # external weights are found beside the model
            try:
                onnx_file.write_bytes(model.SerializeToString())
                engine = folder / "model.engine"
                outcome = build(
                    onnx_file,
                    engine,
                    folder / "build.log",
                    target=target,
                    profiles=own,
                    plugins=self.plugins,
                    timing_cache=self.timings,
                    plan=plan,
                )
                given = {name: array for name, array in feeds.items() if name in wanted}
                with self.running:
                    found = run_stage("engine", lambda: engine_runner(engine, target, self.plugins), [given])[0]
                return found, [f"the engine {what}: {note}" for note in outcome.notes]
            except (BuildError, RunError) as error:
                return {}, [f"an engine {what} cannot be had: {' '.join(str(error).splitlines()[:2])}"]
            finally:
                onnx_file.unlink(missing_ok=True)


@contextlib.contextmanager
def _files(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".diff-", dir=folder) as name:
        yield Path(name)


def _row(
    engines: _Engines,
    stage: StageName,
    name: str,
    reference: Array,
    carried: Array | None,
    alone: Array | None,
    tolerance: Tolerances,
) -> LayerDiff:
    node = engines.side.maker(name)
    assert node is not None
    where = origin_of(node.name, {item.key: item.value for item in node.metadata_props})
    weak, asked = not engines.conversion.target.strongly_typed, engines.conversion.result.precision
    largest = FP16_MAX if weak and "fp16" in asked.split("+") else math.inf
    introduced = apart(reference, alone, largest) if alone is not None else None
    precision = engines.plan.layer_precisions.get(node.name, "") or (asked if weak else str(reference.dtype))
    precision = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(precision, precision)
    finite = np.abs(reference[np.isfinite(reference)].astype(np.float64))
    return LayerDiff(
        stage,
        "engine",
        name,
        node.name,
        node.op_type,
        where.module,
        where.source,
        precision,
        list(reference.shape),
        float(finite.max(initial=0.0)),
        introduced,
        apart(reference, carried, largest) if carried is not None else None,
        diverges(introduced, limit(precision, tolerance)),
        "" if alone is not None else "cannot be run by itself in an engine",
    )
