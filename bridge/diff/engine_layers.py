"""The layers of an engine, by one that is built for it: TensorRT fuses what it likes, and shows its outputs alone.

It is an engine of the same model, with the conversion's own settings, that has the tensors as outputs, which keeps
TensorRT from fusing across them, and changes nothing else. Where precisions are mixed they are one output for
TensorRT 8, one behind the other: its compiler gives many outputs in 16 bits alone, and computes in these then.

What a layer carries is how far its tensor is from the model's in ONNX Runtime; what it introduces, how far it is from
what ONNX Runtime makes of the tensors that this engine had before it. A fusion that is wrong shows where the engine's
own outputs are off and none of these is.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from passes.provenance import origin_of

from ..build_plan import BuildPlan
from ..build_settings import BuildSettings
from ..compare import Array, Feeds, Tolerances, run_stage
from ..errors import BuildError, RunError
from ..evaluator import Evaluator, chunks, load
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
FP16_MAX = float(np.finfo(np.float16).max)
"""What any layer of a weakly typed engine in fp16 may be limited to, though all its outputs are float32."""


def engine_layers(conversion: Conversion, feeds: Feeds, tolerance: Tolerances) -> tuple[list[LayerDiff], list[str]]:
    """The layers of the engine against the model that it was built of, and notes on what could not be measured."""
    path = conversion.result.onnx
    assert path is not None
    stage: StageName = "rewritten" if path == conversion.result.rewritten_onnx else "typed"
    quantised = Precision.of(conversion.result.precision).scheme and not conversion.target.strongly_typed
    if quantised and stage == "rewritten":
        return [], [f"{stage} → engine: layers are not compared: TensorRT's calibration was for the whole model"]
    shown = _Shown(conversion, path)
    found: list[LayerDiff] = []
    notes = [_HOW]
    for names in shown.chunks(feeds):
        pieces = Pieces(shown.side, names, shown.given)
        read = sorted(pieces.read - shown.side.inputs)
        known = shown.reference.open([*names, *read])(feeds)
        carried, why = shown.values([*names, *(name for name in read if name not in names)], feeds)
        notes += [words for words in why if words not in notes]
        alone: dict[str, Array] = {}
        if carried and pieces.names:
            before = {name: carried[name].astype(known[name].dtype) for name in read}
            try:
                alone = Evaluator(pieces.model, path.parent, path.name).open()({**feeds, **before})
            except RunError as error:  # a place in a tensor, say, computed of what is not a number any more
                notes.append(f"what layers of the engine introduce is not known: of its tensors {error}")
        for name in names:
            found.append(_row(shown, stage, name, known[name], carried.get(name), alone.get(name + APART), tolerance))
    return found, [*notes, *_not_as_asked(shown, found)]


def _not_as_asked(shown: _Shown, layers: Sequence[LayerDiff]) -> list[str]:
    """That the engine computes layers in 16 bits that were to be in float32."""
    asked = [layer for layer in layers if shown.asked(layer.node) == "float32"]
    others = [layer for layer in asked if layer.precision != "float32"]
    if not others:
        return []
    named = ", ".join(f"{layer.operator} {layer.node}" for layer in others[:3])
    return [
        f"{len(others)} of the {len(asked)} layers that were asked for in float32 come out in {others[0].precision}: "
        f"{named}{', …' * (len(others) > 3)}. What TensorRT's compiler takes as a whole it computes in one type"
    ]


def _rounded_to(carried: Array, alone: Array) -> str:
    """The type of 16 bits that all values of an engine's tensor are in and most of what ONNX Runtime makes of the same
    is not; empty for none."""
    for name, low in (("float16", np.dtype(np.float16)), ("bfloat16", np.dtype(ml_dtypes.bfloat16))):
        if _share_in(carried, low) == 1.0 and _share_in(alone, low) < 0.5:
            return name
    return ""


def _share_in(values: Array, low: np.dtype[Any]) -> float:
    """How many of the finite values, at least two, the type holds as they are."""
    finite = np.asarray(values, np.float32)[np.isfinite(values)]
    with np.errstate(over="ignore"):
        same = finite.astype(low).astype(np.float32) == finite
    return float(same.mean()) if finite.size > 1 else 0.0


_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_HOW = (
    "layers of the engine are those of one that was built for this, with their tensors as outputs, which keeps "
    "TensorRT from fusing across them"
)


class _Shown:
    """The model of an engine, and engines of it that show its tensors."""

    def __init__(self, conversion: Conversion, path: Path) -> None:
        from passes import read

        from ..build_plan import few_integers, own_precisions, plan_build
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
        plan = plan_build(settings, graph, result.exporter is not None, nodes)
        self.plan: BuildPlan = replace(plan, values=few_integers(conversion.example))
        """As the conversion's: what a weakly typed engine was told of its nodes, the typed model says."""
        self.timings = timing_file(open_cache(conversion.cache), target)
        """What the conversion's build, or one before, has measured of kernels is not measured again."""
        shown = FLOATS - {TensorProto.DOUBLE}
        self.tensors = [
            name
            for name, place in self.side.place.items()
            if self.side.types.get(name) in shown and self._computed(self.side.graph.node[place])
        ]
        self.given = {*self.tensors, *self.side.inputs}
        self.mixed = target.of_tensorrt_8 and len(set(self.plan.layer_precisions.values())) > 1
        """Whether the builder of TensorRT 8 is told to compute some layers in a lower precision, and others not."""

    def asked(self, node: str) -> str:
        """What the node was to be computed in; of strongly typed targets nothing, since the model says it."""
        if self.conversion.target.strongly_typed:
            return ""
        precision = self.plan.layer_precisions.get(node, "") or self.conversion.result.precision
        return _NAMES.get(precision, precision)

    def _computed(self, node: NodeProto) -> bool:
        """Whether the node depends on the model's inputs: TensorRT folds what does not."""
        return node.op_type != "Constant" and bool(self.side.needs(node, self.side.inputs.__contains__)[0])

    def chunks(self, feeds: Feeds) -> Iterator[list[str]]:
        shapes = self._shapes(self.tensors, feeds)
        return chunks(self.tensors, lambda name: 16 * math.prod(shapes[name]), MARKED)

    def _shapes(self, names: Sequence[str], feeds: Feeds) -> dict[str, list[int]]:
        shapes = self.reference.open(names, shapes=True)(feeds)
        return {name: [int(size) for size in shapes[name]] for name in names}

    def values(self, names: Sequence[str], feeds: Feeds) -> tuple[dict[str, Array], list[str]]:
        """The tensors of an engine that has them as outputs, and notes; why there is none, if so."""
        from ..build import build
        from ..runtime.runner import engine_runner

        target = self.conversion.target
        with _files(self.path.parent) as folder:
            onnx_file = self.path.parent / f"{folder.name}.onnx"  # external weights are found beside the model
            try:
                model = joined(self.side, names) if self.mixed else self._marked(names)
                onnx_file.write_bytes(model.SerializeToString())
                engine = folder / "model.engine"
                outcome = build(
                    onnx_file,
                    engine,
                    folder / "build.log",
                    target=target,
                    profiles=self.conversion.profiles,
                    plugins=self.plugins,
                    timing_cache=self.timings,
                    plan=self.plan,
                )
                found = run_stage("engine", lambda: engine_runner(engine, target, self.plugins), [feeds])[0]
                if self.mixed:
                    found = taken_apart(found[JOINED], self._shapes(names, feeds))
                return found, [f"the engine with its tensors as outputs: {note}" for note in outcome.notes]
            except (BuildError, RunError) as error:
                why = " ".join(str(error).splitlines()[:2])
                return {}, [f"an engine with its tensors as outputs cannot be had: {why}"]
            finally:
                onnx_file.unlink(missing_ok=True)

    def _marked(self, names: Sequence[str]) -> ModelProto:
        model = ModelProto()
        model.CopyFrom(self.side.model)
        there = {item.name for item in model.graph.output}
        infos = {item.name: item for item in model.graph.value_info}
        model.graph.output.extend(infos[name] for name in names if name not in there)
        return model


JOINED = "bridge/tensors"


def joined(side: Side, names: Sequence[str]) -> ModelProto:
    """The model with the tensors ``names``, in float32 and one behind the other, as its one output more."""
    made = ModelProto()
    made.CopyFrom(side.model)
    made.graph.initializer.append(numpy_helper.from_array(np.array([-1]), f"{JOINED}/shape"))
    flat = []
    for index, name in enumerate(names):
        one = f"{JOINED}/{index}"
        if side.types[name] != TensorProto.FLOAT:
            made.graph.node.append(
                helper.make_node("Cast", [name], [f"{one}/wide"], f"{one}/Cast", to=TensorProto.FLOAT)
            )
            name = f"{one}/wide"
        made.graph.node.append(helper.make_node("Reshape", [name, f"{JOINED}/shape"], [one], f"{one}/Reshape"))
        flat.append(one)
    made.graph.node.append(helper.make_node("Concat", flat, [JOINED], f"{JOINED}/Concat", axis=0))
    made.graph.output.append(helper.make_tensor_value_info(JOINED, TensorProto.FLOAT, [None]))
    return made


def taken_apart(values: Array, shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    """The tensors that are one behind the other in ``values``, by the names and in the order of ``shapes``."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    if ends[-1] != values.size:
        raise RunError(f"the engine's tensors have {values.size} values, and {ends[-1]} are expected.")
    parts = np.split(values, ends[:-1])
    return {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}


@contextlib.contextmanager
def _files(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".diff-", dir=folder) as name:
        yield Path(name)


def _row(
    shown: _Shown,
    stage: StageName,
    name: str,
    reference: Array,
    carried: Array | None,
    alone: Array | None,
    tolerance: Tolerances,
) -> LayerDiff:
    """``alone``: what ONNX Runtime makes of what the engine had before the layer."""
    node = shown.side.maker(name)
    assert node is not None
    where = origin_of(node.name, {item.key: item.value for item in node.metadata_props})
    weak, asked = not shown.conversion.target.strongly_typed, shown.conversion.result.precision
    largest = FP16_MAX if weak and "fp16" in asked.split("+") else math.inf
    introduced = apart(alone, carried, largest) if alone is not None and carried is not None else None
    precision = shown.asked(node.name) or str(reference.dtype)
    if precision == "float32" and weak and carried is not None and alone is not None:
        precision = _rounded_to(carried, alone) or precision
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
        "" if introduced is not None else "cannot be run by itself, or is given nothing that is finite",
    )
