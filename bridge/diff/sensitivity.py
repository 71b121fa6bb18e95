"""Which nodes of a low-precision model its error should come from: best guess first, by measurement.

A tensor stays exact only where both what makes it and what reads it are in float32, so that steps are of a node and,
where they count, its readers. What a layer introduces says nothing of what becomes of it: a difference of two large
numbers magnifies it. So ``gains`` measures by how much each node magnifies what is wrong with each of its inputs, and
what a layer introduces is followed through them to the outputs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..assignment import Assignment
from ..evaluator import CHUNK_BYTES, Evaluator, layer_errors, load, sizes_of
from ..layers import LayerError, Total
from ..pairs import FLOATS, MOST, Side
from ..walk import Walk
from .search import HIGHEST, Step

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from passes.low_types import LowType

    from ..ranges import Range

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Gains = Mapping[str, Mapping[str, float]]
"""By a tensor, then by one that its reader makes: how many times its relative error the other's is."""

MOVED = 2.0**-9
"""By how much, relative to each value, an input is moved: enough to stand out of float32's own rounding."""
ILL = 8.0
"""A reader that magnifies so much is to read exact values."""
MASKS = 1e30
"""A magnitude that nobody computes: it stands for infinity."""
EPSILONS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Of rounding to nearest; the root of its mean square is about 0.4 times that."""


def gains(model: Path, feeds: Feeds) -> dict[str, dict[str, float]]:
    """By how much each node of the model's main graph magnifies a small relative error of each of its inputs.

    Each is run by itself on what the model computes of ``feeds``, once for each input, with this input moved at random.
    Constants are no inputs, and what runs bodies, or reads sequences, is left out.
    """
    side = Side(load(model))
    whole = Evaluator(side.model, model.parent, model.name)
    chunks = list(_chunks(_probes(side), whole, feeds))
    walk = Walk(whole, [sorted({name for probe in chunk for name in probe.tensors}) for chunk in chunks], [feeds])
    found: dict[str, dict[str, float]] = {}
    for chunk in chunks:
        values = walk.next()(0)
        moved = {_moved(name): _shaken(values[name], name) for name in sorted({probe.moved for probe in chunk})}
        part = _model_of(side, chunk)
        made = Evaluator(part, model.parent, model.name).open()({**values, **moved})
        for number, probe in enumerate(chunk):
            for output in probe.outputs:
                gain = _gain(values[output], made[_result(output, number)])
                into = found.setdefault(probe.moved, {})
                into[output] = max(gain, into.get(output, 0.0))
    return found


@dataclass(frozen=True)
class _Probe:
    """One input of one node, to be moved."""

    place: int
    """The node's."""
    moved: str
    outputs: tuple[str, ...]
    read: frozenset[str]
    between: frozenset[int]
    """Places of nodes that make constants."""

    @property
    def tensors(self) -> frozenset[str]:
        return self.read.union(self.outputs)


def _probes(side: Side) -> list[_Probe]:
    found = []
    for place, node in enumerate(side.graph.node):
        outputs = tuple(name for name in node.output if name and side.types.get(name) in FLOATS)
        if not outputs or any(item.HasField("g") or item.graphs for item in node.attribute):
            continue
        read, between = side.needs(node, lambda name: name in side.place or name in side.inputs)
        if not read <= side.types.keys():
            continue
        for name in dict.fromkeys(node.input):
            if name in read and side.types[name] in FLOATS:
                found.append(_Probe(place, name, outputs, frozenset(read), frozenset(between)))
    return found


def _chunks(probes: Sequence[_Probe], whole: Evaluator, feeds: Feeds) -> Iterable[list[_Probe]]:
    sizes = sizes_of(whole, sorted({name for probe in probes for name in probe.tensors}), [feeds])
    chunk: list[_Probe] = []
    held: set[str] = set()
    total = 0
    for probe in probes:
        more = sum(sizes[name] for name in probe.tensors - held) + sum(
            sizes[name] for name in (probe.moved, *probe.outputs)
        )
        if chunk and (total + more > CHUNK_BYTES or len(chunk) == MOST):
            yield chunk
            chunk, held, total = [], set(), 0
        chunk.append(probe)
        held |= probe.tensors
        total += more
    if chunk:
        yield chunk


def _model_of(side: Side, chunk: Sequence[_Probe]) -> Any:
    """Each node of ``chunk`` by itself, the input in question under another name."""
    import onnx

    model = onnx.ModelProto(ir_version=side.model.ir_version)
    graph = model.graph
    graph.name = "gains"
    graph.node.extend(side.graph.node[place] for place in sorted({item for probe in chunk for item in probe.between}))
    for number, probe in enumerate(chunk):
        node = graph.node.add()
        node.CopyFrom(side.graph.node[probe.place])
        node.name = f"{number}"
        node.input[:] = [_moved(name) if name == probe.moved else name for name in node.input]
        node.output[:] = [name and _result(name, number) for name in node.output]
        graph.output.extend(
            onnx.helper.make_tensor_value_info(_result(name, number), side.types[name], None) for name in probe.outputs
        )
    for name in sorted({name for probe in chunk for name in probe.read}):
        graph.input.append(onnx.helper.make_tensor_value_info(name, side.types[name], None))
    for name in sorted({probe.moved for probe in chunk}):
        graph.input.append(onnx.helper.make_tensor_value_info(_moved(name), side.types[name], None))
    read = {name for node in graph.node for name in node.input}
    graph.initializer.extend(item for name, item in side.initializers.items() if name in read)
    model.opset_import.extend(side.model.opset_import)
    model.functions.extend(side.model.functions)
    return model


def _moved(name: str) -> str:
    return f"{name}/moved"


def _result(name: str, number: int) -> str:
    return f"{name}/of {number}"


def _shaken(values: Array, name: str) -> Array:
    """Moved by MOVED of each value, up or down, the same way each time."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    signs = random.integers(0, 2, values.shape, np.int8).astype(np.float32) * 2 - 1
    moved: Array = (values * (1 + MOVED * signs)).astype(values.dtype)
    return moved


def _gain(exact: Array, moved: Array) -> float:
    """Relative error of the output for that of the input; 1 where there is none to be told."""
    total = Total()
    total.add(exact, moved, MASKS)
    found = total.figures()
    return found.relative / MOVED if found is not None and found.relative is not None else 1.0


# --- steps -------------------------------------------------------------------------------------------------------


@dataclass
class Suspects:
    """Makes the ranked steps for one model. ``graph`` is the one that was assigned."""

    graph: gs.Graph
    assignment: Assignment
    free: Collection[str]
    """Names of the nodes that may be raised."""
    half: str
    """``fp16`` or ``bf16``, where a quantised node may be raised to it first; else empty."""
    low: LowType | None
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """What the reference's tensors hold, those of bodies included."""

    def steps(self, errors: Sequence[LayerError], magnified: Gains) -> list[Step]:
        """All that could be raised, best first; what was measured to do nothing comes last, in the graph's order."""
        influence = self._influence(magnified)
        found = [*self._beyond_range(), *self._by_layer(errors, magnified, influence)]
        named = {name for step in found for name in step.nodes if step.precision == HIGHEST}
        found += [Step((name,), reason="nothing was measured of it") for name in self._names() if name not in named]
        return sorted(found, key=lambda step: -step.sensitivity)

    def _scopes(self) -> list[gs.Graph]:
        from passes.ir import scopes

        return list(scopes(self.graph, functions=False))

    def _names(self) -> list[str]:
        return [node.name for scope in self._scopes() for node in scope.nodes if node.name in self.free]

    def _beyond_range(self) -> list[Step]:
        """What makes and reads values beyond the low type's range, joined where it is one after the other."""
        if self.low is None:
            return []
        groups: list[tuple[set[str], float]] = []
        for scope in self._scopes():
            for node in scope.nodes:
                for tensor in node.outputs:
                    seen = self.ranges.get(tensor.name)
                    if seen is None or not self.low.largest < seen.largest < MASKS:
                        continue
                    if tensor.name in self.assignment.saturated:
                        continue
                    names = {item.name for item in (node, *tensor.outputs)} & set(self.free)
                    joined = [item for item in groups if item[0] & names]
                    groups = [item for item in groups if not item[0] & names]
                    if names:
                        largest = max([seen.largest, *(item[1] for item in joined)])
                        groups.append((names.union(*(item[0] for item in joined)), largest))
        order = {name: place for place, name in enumerate(self._names())}
        return [
            Step(
                tuple(sorted(names, key=order.__getitem__)),
                HIGHEST,
                math.inf,
                f"values of up to {largest:.3g} are beyond {self.low.name}'s range ({self.low.largest:.3g})",
            )
            for names, largest in sorted(groups, key=lambda item: min(order[name] for name in item[0]))
        ]

    def _influence(self, magnified: Gains) -> dict[str, float]:
        """Of each tensor of the main graph: the outputs' relative error for its own, errors adding up as squares do."""
        found = {tensor.name: 1.0 for tensor in self.graph.outputs}
        for node in reversed(self.graph.nodes):
            made = {tensor.name: found.get(tensor.name, 0.0) for tensor in node.outputs}
            for name in dict.fromkeys(tensor.name for tensor in _read_by(node)):
                through = magnified.get(name, {})
                squares = sum((through.get(output, 1.0) * value) ** 2 for output, value in made.items())
                found[name] = min(math.hypot(found.get(name, 0.0), math.sqrt(squares)), MASKS)
        return found

    def _by_layer(self, errors: Sequence[LayerError], magnified: Gains, influence: Mapping[str, float]) -> list[Step]:
        """A step for each node of the main graph, and for the inputs, which are rounded where they are read."""
        by_tensor = {item.tensor: item for item in errors}
        found = []
        for tensor in self.graph.inputs:
            readers = self._exact_readers(tensor, magnified, influence)
            if readers and tensor.name in magnified and self.low is not None:
                share = EPSILONS[self.low.name] * influence.get(tensor.name, 0.0)
                found.append(Step(readers, HIGHEST, share, f"the input {tensor.name!r} would be rounded"))
        for node in self.graph.nodes:
            inside = _inside(node) & set(self.free)
            if node.name not in self.free and not inside:
                continue
            measured = [(tensor, by_tensor.get(tensor.name)) for tensor in node.outputs]
            share = math.hypot(*(self._share(item) * influence.get(tensor.name, 0.0) for tensor, item in measured))
            lost = any(item and item.introduced and item.introduced.non_finite for _, item in measured)
            reason = _words([item for _, item in measured if item is not None], lost)
            found += self._steps_of(node, inside, math.inf if lost else share, reason, magnified, influence)
        return found

    def _steps_of(
        self,
        node: gs.Node,
        inside: set[str],
        share: float,
        reason: str,
        magnified: Gains,
        influence: Mapping[str, float],
    ) -> list[Step]:
        if inside:
            return [Step(tuple(name for name in self._names() if name in inside), HIGHEST, share, reason)]
        readers = [name for tensor in node.outputs for name in self._exact_readers(tensor, magnified, influence)]
        weighted = any(not tensor.inputs and tensor not in self.graph.inputs for tensor in node.inputs)
        if not readers and not weighted:
            readers = [item.name for tensor in node.outputs for item in tensor.outputs if item.name in self.free]
        reason += _magnified(node, readers, magnified)
        whole = Step(tuple(dict.fromkeys((node.name, *readers))), HIGHEST, share, reason)
        if self.half and self.low is not None and self.assignment.nodes.get(node.name) not in (self.half, HIGHEST):
            most = max((influence.get(item.name, 0.0) for item in node.outputs), default=0.0)
            finer = min(share, EPSILONS[self.low.name] * most)
            return [Step((node.name,), self.half, share, reason), replace(whole, sensitivity=finer)]
        return [whole]

    def _share(self, item: LayerError | None) -> float:
        """The relative error that a layer introduces: what could not be measured counts as rounding alone."""
        usual = EPSILONS[self.low.name] if self.low is not None else 0.0
        if item is None or item.introduced is None:
            return usual
        return item.introduced.relative or 0.0

    def _exact_readers(self, tensor: gs.Tensor, magnified: Gains, influence: Mapping[str, float]) -> tuple[str, ...]:
        """Those readers that magnify what is wrong with the tensor, and whose results count."""
        through = magnified.get(tensor.name, {})
        parts = {
            reader.name: max((through.get(item.name, 1.0) for item in reader.outputs), default=0.0)
            for reader in tensor.outputs
            if reader.name in self.free and any(influence.get(item.name) for item in reader.outputs)
        }
        return tuple(name for name, gain in parts.items() if gain >= ILL)


def _read_by(node: gs.Node) -> list[gs.Tensor]:
    """What the node and its bodies read of the graph around them."""
    from passes.ir import bodies

    found = [tensor for tensor in node.inputs if tensor.name]
    for body in bodies(node):
        made = {tensor.name for inner in body.nodes for tensor in inner.outputs} | {item.name for item in body.inputs}
        found += [item for inner in body.nodes for item in _read_by(inner) if item.name not in made]
        found += [item for item in body.outputs if item.name not in made]
    return found


def _inside(node: gs.Node) -> set[str]:
    """The names of the nodes in its bodies."""
    from passes.ir import bodies

    return {name for body in bodies(node) for inner in body.nodes for name in (inner.name, *_inside(inner))}


def _magnified(node: gs.Node, readers: Sequence[str], magnified: Gains) -> str:
    """What a reader makes of what is wrong with the node's result, where that is much."""
    found = [
        (max((magnified.get(tensor.name, {}).get(item.name, 0.0) for item in reader.outputs), default=0.0), reader)
        for tensor in node.outputs
        for reader in tensor.outputs
        if reader.name in readers
    ]
    gain, reader = max(found, key=lambda item: item[0], default=(0.0, node))
    return f", which {reader.op} {reader.name} magnifies {gain:.0f} times" if gain >= ILL else ""


def _words(items: Sequence[LayerError], lost: bool) -> str:
    worst = max((item.introduced.relative or 0.0 for item in items if item.introduced), default=0.0)
    if lost:
        count = sum(item.introduced.non_finite for item in items if item.introduced)
        return f"{count} of its values are no longer finite"
    return f"it introduces a relative error of {worst:.1e}" if worst else "what it reads is rounded"


def measured_steps(suspects: Suspects, reference: Path, low: Path, feeds: Feeds) -> list[Step]:
    """The steps, ranked by what is measured on ``feeds``."""
    return suspects.steps(layer_errors(reference, low, [feeds]), gains(reference, feeds))
