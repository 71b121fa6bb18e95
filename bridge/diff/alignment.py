"""Which tensor of an exported model is which tensor that a torch module takes or returns.

Provenance says which nodes a module became, and the values say which of their tensors is which: an exporter folds a
BatchNorm into the convolution before it, calls one module several times under one name, and leaves out what does
nothing. Where the exported model is wrong no value agrees; there the last tensor of the module's nodes is taken, and
what comes after it is looked at again, given torch's values, so that one fault does not hide the rest.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import NodeProto, TensorProto

from passes.provenance import origin_of

from ..compare import Array, Feeds
from ..evaluator import Evaluator, chunks, load
from ..pairs import APART, FLOATS, MOST, Side
from ..rounded import captured
from . import torch_run
from .torch_run import Point, Seen

if TYPE_CHECKING:
    from ..torch_source import Source

NEAR = {TensorProto.FLOAT16: 2e-2, TensorProto.BFLOAT16: 0.1}
"""Two tensors whose distance is below this are the same one, by the exported type; for all others, 2e-3."""
PROOF = 0.02
"""What is nearer than this share of that distance has no fault before it: an error may shrink on its way."""
CHOOSING = frozenset(
    (
        *("ArgMax", "ArgMin", "Compress", "Gather", "GatherElements", "GatherND", "GlobalMaxPool", "MaxPool"),
        *("NonZero", "ReduceMax", "ReduceMin", "Slice", "Split", "TopK"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    )
)
"""Operators whose result may be right though part of what they read is wrong."""
FAULTS = 10
"""Faults of an exported model that are gone beyond."""


class Alignment:
    """The points of a torch model in an exported one; ``points`` is by the name of the ONNX tensor."""

    def __init__(self, source: Source, path: Path, feeds: Feeds) -> None:
        self.source, self.path, self.feeds = source, path, feeds
        self.side = Side(load(path))
        self.seen, outputs = torch_run.look(source, feeds)
        names = {point.module for point in self.seen}
        self.owner = {name: _module(node, names) for node in self.side.graph.node for name in node.output if name}
        self.nodes = self._by_module()
        self.readers = _readers(self.side)
        self.shapes = self._shapes()
        self.forced: frozenset[str] = frozenset()
        """What had torch's values when the model was last looked at."""
        named = torch_run.output_points(outputs)
        self.points: dict[str, Point] = {name: named[name] for name in named if name in self.side.place}
        self.candidates = {point: self._candidates(point) for point in self.seen}
        self.outputs = {name for name in self.points if name in self.shapes}
        """Those in floating point: that indices are right says little of what chose them."""
        self.recognised: set[Point] = set(self.points.values())
        """Those whose values the exported model has; several may be one tensor."""
        self.right: set[str] = set()
        self.sound: set[str] = set()
        """What something was made of that was recognised so well that nothing can be wrong before it."""
        self._match(outputs)

    def owner_of(self, node: NodeProto) -> str:
        """The module that it was made of; a first output may be left out."""
        return self.owner.get(next(filter(None, node.output), ""), "")

    def inside(self, node: NodeProto, module: str) -> bool:
        """Whether the node is part of what the module became."""
        owner = self.owner_of(node)
        return not module or owner == module or owner.startswith(f"{module}.")

    def _by_module(self) -> dict[str, list[NodeProto]]:
        """The nodes of each module, those of the modules in it among them."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.side.graph.node:
            owner = self.owner_of(node)
            steps = owner.split(".") if owner else []
            for end in range(len(steps) + 1):
                found.setdefault(".".join(steps[:end]), []).append(node)
        return found

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the floating-point tensors of the exported model."""
        names = [name for name in self.side.place if self.side.types.get(name) in FLOATS]
        whole = Evaluator(self.side.model, self.path.parent, self.path.name)
        found: dict[str, tuple[int, ...]] = {}
        for start in range(0, len(names), MOST):
            shapes = whole.open(names[start : start + MOST], shapes=True)(self.feeds)
            found.update({name: tuple(int(size) for size in shape) for name, shape in shapes.items()})
        return found

    def _candidates(self, point: Point) -> list[str]:
        """The tensors that may be this one, the likeliest first: what the module's nodes made last, or read first.

        Of a module that no node is left of, what its parent's nodes make.
        """
        nodes = self.nodes.get(point.module) or self.nodes.get(point.module.rpartition(".")[0], [])
        made = [name for node in nodes for name in node.output if name]
        if point.returned:
            leaving = [name for name in made if self._leaves(name, point.module)]
            names = [*reversed(leaving), *(name for name in reversed(made) if name not in set(leaving))]
        else:
            inner = set(made)
            read = dict.fromkeys(name for node in nodes for name in captured([node]) if name not in inner)
            names = [name for name in read if self.side.maker(name) is not None]
        return [name for name in names if self.shapes.get(name) == self.seen[point].shape]

    def _leaves(self, name: str, module: str) -> bool:
        """Whether the tensor is read outside of the module."""
        readers = self.readers.get(name, [])
        return not readers or any(not self.inside(node, module) for node in readers)

    # recognising

    def _match(self, outputs: Mapping[str, Array]) -> None:
        known = self._look(self._all_candidates(), {})
        self._take(known)
        final = self._look([name for name in self.points if self.points[name].module == ""], {})
        self.right = {name for name, seen in final.items() if self._near(name, Seen.of(outputs[name]), seen, PROOF)}
        for name in self.right & self.outputs:
            self._prove(name)
        for _ in range(FAULTS):
            if self.outputs and len(self.right) == len(final):
                return  # what was not recognised has no tensor of its own
            guess = self._guess()
            if guess is None:
                return
            self.points[guess[0]] = guess[1]
            self._take(self._look(self._all_candidates(), self._given()))

    def _all_candidates(self) -> list[str]:
        """Those of the points that are not aligned yet."""
        found = set(self.points.values())
        names = {name for point, listed in self.candidates.items() if point not in found for name in listed}
        return sorted(names - (self.points.keys() - self.outputs), key=lambda name: self.side.place[name])

    def _near(self, name: str, torchs: Seen, exported: Seen, share: float = 1.0) -> bool:
        return torchs.distance(exported) < share * NEAR.get(self.side.types[name], 2e-3)

    def _take(self, known: Mapping[str, Seen]) -> None:
        """Aligns what agrees in value: of a module's own, and of several the one whose place among its calls fits."""
        taken = set(self.points.values())
        claims: dict[str, list[Point]] = {}
        for point, seen in self.seen.items():
            if point in taken:
                continue
            near = [
                name
                for name in self.candidates[point]
                if name in known
                and (name not in self.points or name in self.outputs)
                and self._near(name, seen, known[name])
            ]
            if near:
                self.recognised.add(point)
                claims.setdefault(self._in_order(point, near), []).append(point)
        for name, points in claims.items():
            if any(self._near(name, self.seen[point], known[name], PROOF) for point in points):
                self._prove(name)
            if name not in self.points:
                self.points[name] = max(points, key=functools.partial(self._fit, name))

    def _in_order(self, point: Point, near: list[str]) -> str:
        """Of equal tensors, the one of the same number as the call."""
        if not point.call or len(near) == 1:
            return near[0]
        ordered = sorted(near, key=lambda name: self.side.place[name])
        return ordered[min(point.call, len(ordered) - 1)]

    def _fit(self, name: str, point: Point) -> tuple[bool, bool, int]:
        """How well the point names the tensor: the module that made it, as what it returns, and the innermost one."""
        return self.owner.get(name) == point.module, point.returned, point.module.count(".") + bool(point.module)

    def _guess(self) -> tuple[str, Point] | None:
        """The first point that is nowhere, and what it should be by provenance alone.

        A tensor from which what is right can be reached is right itself, and another one than the point's.
        """
        found = self.recognised | set(self.points.values())
        for point in self.seen:
            if point in found or not point.module:
                continue
            name = self._likeliest(point)
            if name is not None and name not in self.points and name not in self.sound:
                return name, point
        return None

    def _likeliest(self, point: Point) -> str | None:
        """Of what a module returns, what its nodes made last (as many calls as it had, so many parts they are); of what
        it takes, the one tensor that they read, or that of the same number as the call."""
        listed = self.candidates[point]
        if not point.returned:
            return self._taken(point)
        own = [name for name in listed if self.inside_of(name, point.module)]
        leaving = [name for name in own if self._leaves(name, point.module)] or own
        ordered = sorted(leaving, key=self.side.place.__getitem__)
        calls = self._calls(point.module)
        if len(ordered) < calls:
            return ordered[-1] if ordered else None
        return ordered[(point.call + 1) * len(ordered) // calls - 1]

    def _taken(self, point: Point) -> str | None:
        calls = self._calls(point.module)
        listed = sorted(self.candidates[point], key=self.side.place.__getitem__)
        taken = sum(not item.returned and item.module == point.module for item in self.seen)
        return listed[point.call] if len(listed) == calls and (calls == 1 or taken == calls) else None

    def _calls(self, module: str) -> int:
        return 1 + max(item.call for item in self.seen if item.module == module)

    def inside_of(self, name: str, module: str) -> bool:
        """Whether what makes the tensor is part of what the module became."""
        owner = self.owner.get(name, "")
        return owner == module or owner.startswith(f"{module}.")

    def _prove(self, name: str) -> None:
        """Marks what the tensor was made of, back to what had torch's values then: it is right as it is."""
        waiting = [name]
        while waiting:
            one = waiting.pop()
            maker = self.side.maker(one)
            if one in self.sound or maker is None or (one in self.forced and one != name):
                continue
            self.sound.add(one)
            if maker.op_type not in CHOOSING:
                waiting.extend(captured([maker]))

    # running

    def _given(self) -> dict[str, Array]:
        """Torch's values of what is aligned."""
        wanted = torch_run.values(self.source, self.feeds, set(self.points.values()))
        return {name: wanted[point] for name, point in self.points.items()}

    def _look(self, names: Iterable[str], given: Mapping[str, Array]) -> dict[str, Seen]:
        """What the exported model makes of these tensors, where those ``given`` have torch's values."""
        self.forced = frozenset(given)
        found: dict[str, Seen] = {}
        for some in chunks(names, self._bytes):
            found.update({name: Seen.of(array) for name, array in self.run(some, given).items()})
        return found

    def _bytes(self, name: str) -> int:
        return 4 * math.prod(self.shapes[name] if name in self.shapes else self.seen[self.points[name]].shape)

    def run(self, names: list[str], given: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors, each made by itself of those ``given`` and of the model's inputs."""
        if not given:
            return Evaluator(self.side.model, self.path.parent, self.path.name).open(names)(self.feeds)
        pieces = Pieces(self.side, names, given.keys())
        part = Evaluator(pieces.model, self.path.parent, self.path.name)
        made = part.open()({**self.feeds, **given})
        return {name: made[name + APART] for name in pieces.names}


class Pieces:
    """A model in which each of some tensors is made by itself, of tensors that are given."""

    def __init__(self, side: Side, names: Iterable[str], given: Iterable[str]) -> None:
        known = {*given, *side.inputs}
        read: set[str] = set()
        between: set[int] = set()
        self.names: list[str] = []
        """Those that can be: nobody can hand over a sequence."""
        self.inner: dict[str, set[int]] = {}
        """By name, the places of the nodes that its piece has beside the one that makes it."""
        for name in names:
            node = side.maker(name)
            assert node is not None
            needs, inserted = side.needs(node, known.__contains__)
            if needs <= side.types.keys():
                self.names.append(name)
                self.inner[name] = inserted
                read |= needs
                between |= inserted
        self.read = read
        self.model = side.apart(self.names, read, between)


def _module(node: NodeProto, names: set[str]) -> str:
    """The module that the node is of; the older exporter numbers the calls of one (``fc_1``)."""
    path = origin_of(node.name, {item.key: item.value for item in node.metadata_props}).module
    if path in names:
        return path
    steps: list[str] = []
    for step in path.split("."):
        plain = re.sub(r"(_\d+|@\d+)$", "", step)
        known = ".".join([*steps, step])
        steps.append(step if any(name == known or name.startswith(f"{known}.") for name in names) else plain)
    return ".".join(steps)


def _readers(side: Side) -> dict[str, list[NodeProto]]:
    found: dict[str, list[NodeProto]] = {}
    for node in side.graph.node:
        for name in captured([node]):
            found.setdefault(name, []).append(node)
    return found
