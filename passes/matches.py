"""What each match found and what it made of it: enough to run both again on the same tensors.

Recorded only where it is asked for. Nodes are kept as protos with the names that they had at that moment, which the
passes keep unique; weights are kept by reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_graphsurgeon as gs

from .ir import Constant, bodies, scopes, type_proto
from .provenance import describe
from .writing import Writer


@dataclass
class Part:
    """A few nodes of one scope, in order, with what they read from outside of them."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    """Tensors that other nodes make, or the caller gives."""
    constants: dict[str, gs.Constant] = field(default_factory=dict)
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    """Of what it reads and of what it makes, as far as they are known."""

    @property
    def made(self) -> set[str]:
        return {name for node in self.nodes for name in node.output if name}


@dataclass(frozen=True)
class Match:
    """One application of a rule or pass, in the order of application."""

    rule: str
    where: str
    """The node that it matched, with its origin."""
    before: Part
    after: Part
    outputs: dict[str, str]
    """By the name of a tensor before: the name, made or read by ``after``, of the one that took its place."""
    inside: str = ""
    """The control flow or the local function whose body it happened in; empty for the main graph."""


class Recorder:
    """Takes down the matches of one rewrite."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.matches: list[Match] = []
        self.renamed: dict[str, str] = {}
        """By the name that a tensor has now: the one that it had in the file."""
        self._owners: dict[int, tuple[gs.Graph, str]] = {}
        """By a body's id: the body, and whose it is."""

    def match(
        self, rule: str, where: str, scope: gs.Graph, before: Part, after: Part, outputs: Mapping[str, str]
    ) -> Match:
        """A match that is yet to be kept: the caller appends it to ``matches`` once the graph has been changed."""
        return Match(rule, where, before, after, dict(outputs), self._inside(scope))

    def folded(self, rule: str, where: str, scope: gs.Graph, constant: gs.Constant) -> None:
        """Notes that the tensor of this name is now a constant."""
        after = Part(scope.opset)
        _keep(constant, after)
        outputs = {constant.name: constant.name}
        self.matches.append(Match(rule, where, Part(scope.opset), after, outputs, self._inside(scope)))

    def _inside(self, scope: gs.Graph) -> str:
        if scope is self.graph:
            return ""
        if id(scope) not in self._owners:
            self._owners[id(scope)] = (scope, self._owner(scope))
        return self._owners[id(scope)][1]

    def _owner(self, scope: gs.Graph) -> str:
        for outer in scopes(self.graph):
            for node in outer.nodes:
                if any(body is scope for body in bodies(node)):
                    if isinstance(outer, gs.Function):
                        return f"the local function {outer.name}"
                    return describe(node)
        return f"the local function {scope.name}"


def part(nodes: Sequence[gs.Node], opset: int, results: Iterable[gs.Tensor] = ()) -> Part:
    """The nodes as they are now, with all that they and their bodies, and ``results``, take from outside."""
    writer = Writer(bare=True)
    found = Part(opset, [writer.node(node) for node in nodes])
    for node in nodes:
        for tensor in node.outputs:
            if tensor.name:
                found.types[tensor.name] = type_proto(tensor)
    for tensor in taken_tensors(nodes, results):
        if isinstance(tensor, gs.Constant):
            _keep(tensor, found)
        else:
            found.reads.append(tensor.name)
            found.types[tensor.name] = type_proto(tensor)
    return found


def taken_tensors(nodes: Iterable[gs.Node], results: Iterable[gs.Tensor] = ()) -> list[gs.Tensor]:
    """The tensors that ``nodes`` and their bodies, and ``results``, take from outside; constants among them."""
    made: set[int] = set()
    read: dict[int, gs.Tensor] = {}
    for node in nodes:
        for item, inner in _with_bodies(node):
            made.update(map(id, item.outputs))
            made.update(id(tensor) for body in inner for tensor in body.inputs)
            read.update((id(tensor), tensor) for tensor in item.inputs)
            read.update((id(tensor), tensor) for body in inner for tensor in body.outputs)
    read.update((id(tensor), tensor) for tensor in results)
    return [tensor for key, tensor in read.items() if key not in made and not tensor.is_empty()]


def _with_bodies(node: gs.Node) -> Iterator[tuple[gs.Node, list[gs.Graph]]]:
    """The node and those of its bodies at any depth, each with its own bodies."""
    inner = list(bodies(node))
    yield node, inner
    for body in inner:
        for item in body.nodes:
            yield from _with_bodies(item)


def _keep(constant: gs.Constant, found: Part) -> None:
    """Another constant of the same values: passes may give this one other values, or another name."""
    found.constants[constant.name] = Constant(constant.name, constant._values)
