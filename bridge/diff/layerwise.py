"""The diff by layer: what each layer adds to the error by itself, and what it carries of what came before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from passes.provenance import origin_of

from ..compare import Array, Feeds, Tolerances
from ..evaluator import Evaluator, chunks, layer_errors
from ..layers import LayerError
from ..pairs import APART, COUNTS, FLOATS, HELD, type_name
from ..result import Tolerance
from . import torch_run
from .alignment import Alignment, Pieces
from .figures import apart, of_layer
from .model import Error, LayerDiff, StageName

if TYPE_CHECKING:
    from onnx import NodeProto

    from ..torch_source import Source

LIMITS = {"float32": 1e-3, "float64": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""What a layer may introduce, relative to its output's norm, by what it computes in; a tolerance goes before."""
QUANTISED_LIMIT = 0.2
EXACT = frozenset(("bool", "int16", "int32", "int64", "uint16", "uint32", "uint64"))
"""Types of indices, counts and masks, of which a layer may change none."""
RANKED = 100
LISTED = 8
"""Kinds of operators between two tensors that are named."""


def limit(precision: str, tolerance: Tolerances) -> float:
    """What a layer may introduce, relative to its output's norm."""
    if precision in EXACT:
        return 0.0
    given = tolerance if isinstance(tolerance, Tolerance) else (tolerance or {}).get("")
    if given is not None and given.rtol > 0:
        return given.rtol
    return LIMITS.get(precision, QUANTISED_LIMIT)


def diverges(introduced: Error | None, allowed: float) -> bool:
    """Whether a layer does by itself what it may not; ``allowed`` is its ``limit``."""
    if introduced is None:
        return False
    relative = introduced.relative
    lost = relative is None and bool(introduced.max_abs)  # of a reference of zeros
    return introduced.non_finite > 0 or lost or (relative is not None and relative > allowed)


def ranking(layers: Sequence[LayerDiff]) -> list[int]:
    """The indices of the layers that introduce most error, worst first; what introduces nothing is left out."""
    guilty = [index for index, layer in enumerate(layers) if layer.badness > (0, 0.0)]
    return sorted(guilty, key=lambda index: layers[index].badness, reverse=True)[:RANKED]


def onnx_layers(
    stages: tuple[StageName, StageName], paths: tuple[Path, Path], feeds: Sequence[Feeds], tolerance: Tolerances
) -> list[LayerDiff]:
    """The layers of two ONNX models. Raises RunError where one of them does not run."""
    errors = layer_errors(*paths, feeds, FLOATS | COUNTS)
    if not errors:
        return []
    exact = Evaluator.of(paths[0])
    shapes = exact.open([item.tensor for item in errors], shapes=True)(feeds[0])
    found = []
    for item in errors:
        # A model in 16 bits may be made one in 32: then the reference is the one that rounds.
        coarser = max(limit(kind, tolerance) for kind in (item.precision, type_name(exact.copy.types[item.tensor])))
        found.append(_of_error(stages, item, shapes[item.tensor], coarser))
    return found


def _of_error(stages: tuple[StageName, StageName], found: LayerError, shape: Array, allowed: float) -> LayerDiff:
    introduced = of_layer(found.introduced)
    return LayerDiff(
        *stages,
        found.tensor,
        found.node,
        found.operator,
        found.module,
        found.source,
        found.precision,
        [int(size) for size in shape],
        found.largest if math.isfinite(found.largest) else None,
        introduced,
        of_layer(found.carried),
        diverges(introduced, allowed),
        _why_not(found.introduced is None, found.carried is None, not math.prod(map(int, shape))),
    )


def _why_not(alone: bool, shapes: bool, empty: bool) -> str:
    if empty:
        return "it has no elements"
    if shapes:
        return "the shapes differ, or nothing is finite"
    return "cannot be run by itself, or is given nothing that is finite" if alone else ""


def torch_layers(
    source: Source, path: Path, feeds: Feeds, tolerance: Tolerances, stage: StageName = "exported"
) -> tuple[list[LayerDiff], list[str]]:
    """The modules of a torch model and what they became in the exported one; notes on those that are not found there.

    Each tensor that a module takes or returns is made by the exported model of torch's own values of the tensors before
    it, and held to torch's. Raises RunError where the exported model does not run.
    """
    alignment = Alignment(source, path, feeds)
    side, points = alignment.side, alignment.points
    whole = Evaluator(side.model, path.parent, path.name)
    found: list[LayerDiff] = []
    for names in _chunks(alignment):
        pieces = Pieces(side, names, points)
        wanted = {points[name] for name in (*names, *(pieces.read & points.keys()))}
        torchs = torch_run.values(source, feeds, wanted)
        given = {name: torchs[points[name]] for name in pieces.read & points.keys()}
        end_to_end = whole.open(names)(feeds)
        alone = Evaluator(pieces.model, path.parent, path.name).open()({**feeds, **given}) if pieces.names else {}
        for name in names:
            made = alone.get(name + APART)
            arrays = torchs[points[name]], made, end_to_end[name]
            found.append(_of_point(alignment, pieces, name, stage, arrays, tolerance))
    return found, _missing(alignment, stage)


def _chunks(alignment: Alignment) -> Iterator[list[str]]:
    """The aligned tensors in the graph's order, so many at a time that they take no more memory than they may."""
    names = sorted(alignment.points, key=alignment.side.place.__getitem__)
    return chunks(names, lambda name: 4 * HELD * math.prod(alignment.seen[alignment.points[name]].shape))


def _of_point(
    alignment: Alignment,
    pieces: Pieces,
    name: str,
    stage: StageName,
    arrays: tuple[Array, Array | None, Array],
    tolerance: Tolerances,
) -> LayerDiff:
    reference, alone, end_to_end = arrays
    node = alignment.side.maker(name)
    assert node is not None
    point, module = alignment.points[name], alignment.owner.get(name, "")
    introduced = apart(reference, alone) if alone is not None else None
    precision = str(reference.dtype)
    finite = reference[np.isfinite(reference)]
    own = point.returned and point.module == module and bool(point.kind)
    line = _source(node)
    notes = _between(alignment, pieces.inner.get(name, ()), module if own else None, line)
    if not reference.size:
        notes.append("it has no elements")
    elif alone is None:
        notes.append("cannot be run by itself")
    elif alone.shape != reference.shape:
        notes.append(f"the shapes differ: {list(reference.shape)} in torch, {list(alone.shape)} in the {stage} model")
    return LayerDiff(
        "torch",
        stage,
        name,
        node.name,
        point.kind if own else node.op_type,
        module,
        line,
        precision,
        list(reference.shape),
        float(np.abs(finite.astype(np.float64)).max(initial=0.0)),
        introduced,
        apart(reference, end_to_end),
        diverges(introduced, limit(precision, tolerance)),
        "; ".join(notes),
    )


def _between(alignment: Alignment, places: Iterable[int], module: str | None, line: str) -> list[str]:
    """The operators that torch shows no tensor of: those before a layer, with their lines, and those in its module."""
    before: list[NodeProto] = []
    inner: list[NodeProto] = []
    for node in (alignment.side.graph.node[place] for place in sorted(places)):
        if node.op_type != "Constant":
            (inner if module is not None and alignment.inside(node, module) else before).append(node)
    notes = []
    if before:
        lines = _lines(source for source in map(_source, before) if source != line)
        notes.append(f"with {_few(before)} before it{lines and f' ({lines})'}")
    if inner:
        notes.append(f"with {_few(inner)} in it")
    return notes


def _few(nodes: Sequence[NodeProto]) -> str:
    """Their operators; of many kinds, the first ones."""
    names = sorted({node.op_type for node in nodes})
    return ", ".join(names) if len(names) <= LISTED else f"{', '.join(names[:LISTED])} and {len(names) - LISTED} more"


def _source(node: NodeProto) -> str:
    return origin_of(node.name, {item.key: item.value for item in node.metadata_props}).source


def _lines(sources: Iterable[str]) -> str:
    """The lines of each file in turn: ``net.py:3, 5, layers.py:8``."""
    found: dict[str, list[str]] = {}
    for file, _, line in (source.rpartition(":") for source in dict.fromkeys(sources) if source):
        found.setdefault(file, []).append(line)
    listed = [f"{file}:{', '.join(sorted(lines, key=int))}" for file, lines in found.items()]
    return ", ".join(listed)


def _missing(alignment: Alignment, stage: StageName) -> list[str]:
    """Modules that return floating-point tensors of which none is found in the exported model."""
    names = list(dict.fromkeys(point.module for point in alignment.seen if point.returned and point.module))
    there = {point.module for point in {*alignment.recognised, *alignment.points.values()} if point.returned}
    lost = [name for name in names if name not in there]
    if not lost:
        return []
    listed = ", ".join(lost[:8]) + (", …" if len(lost) > 8 else "")
    return [
        f"torch → {stage}: {len(lost)} of {len(names)} modules have no tensor of their own in the {stage} model, "
        f"which folds them into others or leaves them out: {listed}"
    ]
