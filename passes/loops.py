"""Loops in the forms that TensorRT takes: of a number of rounds, or of a condition that the loop computes.

Its parser knows the number of a round only where a number of rounds is given, and the condition in the body only where
there is one outside; of both together, with a number that is computed, its builder makes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from .engine import redirect
from .framework import Log, infer
from .ir import Names, Node, node_metadata, scopes
from .matches import part
from .provenance import describe

NAME = "settle_loops"
REASON = "TensorRT's loops have a number of rounds or a condition, which its parser hands to no body that needs both."

ENDLESS = 2**31 - 1
"""Rounds from which on the number is no bound: exporters write it for ``while``, and the parser reads it so."""
SINCE = 9
"""The opset from which on integers are compared."""


def settle_loops(graph: gs.Graph, log: Log) -> bool:
    """Gives every Loop a number of rounds or a condition, which TensorRT takes one of; True if that changed one."""
    settled: list[str] = []
    names: Names | None = None
    for scope in list(scopes(graph)):
        for node in [item for item in scope.nodes if item.op == "Loop" and not item.domain]:
            change = _change(node) if scope.opset >= SINCE else None
            if change is None:
                continue
            names = names or Names(graph)
            before = part([node], scope.opset)
            outputs = {tensor.name: tensor.name for tensor in node.outputs if tensor.name}
            editor = _Editor(node, scope, names)
            change(editor)
            settled.append(describe(node))
            if log.recorder is not None:
                after = part([*editor.outside, node], scope.opset)
                log.recorder.matches.append(log.recorder.match(NAME, describe(node), scope, before, after, outputs))
    if settled:
        log.add(NAME, REASON, settled)
    return bool(settled)


def always_true(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and bool(np.asarray(tensor.values).all())


def nothing_ends(node: gs.Node) -> bool:
    """Whether the Loop begins, and each round says that there is to be another."""
    body: gs.Graph = node.attrs["body"]
    given = _given(node, 1)
    if given is not None and not always_true(given):
        return False
    condition, handed = body.outputs[0], body.inputs[1]
    while condition.inputs and condition.inputs[0].op in ("Identity", "Cast") and not condition.inputs[0].domain:
        condition = condition.inputs[0].inputs[0]
    if condition.inputs and condition.inputs[0].op == "Constant":
        values = condition.inputs[0].attrs.get("value")
        return values is not None and always_true(values)
    return condition is handed or always_true(condition)


def _given(node: gs.Node, index: int) -> gs.Tensor | None:
    return node.inputs[index] if len(node.inputs) > index and not node.inputs[index].is_empty() else None


def _change(node: gs.Node) -> Callable[[_Editor], None] | None:
    """What is to be done to the Loop; None where it has one of the forms."""
    body = node.attrs.get("body")
    if not isinstance(body, gs.Graph):
        return None
    count = _given(node, 0)
    known = isinstance(count, gs.Constant)
    endless = count is None or (known and int(np.asarray(count.values).reshape(-1)[0]) >= ENDLESS)
    if nothing_ends(node):
        handed = _given(node, 1) is not None or _is_read(body, body.inputs[1])
        return _Editor.by_number if handed and not endless else None
    if _given(node, 1) is None or not (known or endless) or (endless and _is_read(body, body.inputs[0])):
        return _Editor.by_condition if endless else _Editor.by_both
    return None


def _is_read(body: gs.Graph, tensor: gs.Tensor) -> bool:
    return bool(tensor.outputs) or any(item is tensor for scope in scopes(body) for item in scope.outputs)


class _Editor:
    """Changes one Loop in place."""

    def __init__(self, node: gs.Node, scope: gs.Graph, names: Names) -> None:
        self.node, self.scope, self.names = node, scope, names
        self.body: gs.Graph = node.attrs["body"]
        self.outside: list[gs.Node] = []
        """What it makes before the Loop."""
        while len(node.inputs) < 2:
            node.inputs.append(gs.Variable.empty())

    def by_number(self) -> None:
        """Nothing ends it: each round is told so by a constant."""
        true = self._made("Identity", [self._constant(True, np.bool_)], {}, self.body)
        self._replace(self.body.inputs[1], true)
        self.node.inputs[1] = gs.Variable.empty()

    def by_condition(self) -> None:
        """The condition ends it, and it counts its rounds itself."""
        self._counted()
        if self.node.inputs[1].is_empty():
            self.node.inputs[1] = self._constant(True, np.bool_)
        self.node.inputs[0] = gs.Variable.empty()

    def by_both(self) -> None:
        """The condition is that there be rounds left, too."""
        rounds = self._made("Reshape", [self.node.inputs[0], self._constant([], np.int64)], {}, self.scope)
        following = self._counted()
        left = self._made("Less", [following, rounds], {}, self.body)
        self.body.outputs[0] = self._made("And", [self.body.outputs[0], left], {}, self.body)
        begins = self._made("Greater", [rounds, self._constant(0, np.int64)], {}, self.scope)
        given = self.node.inputs[1]
        if not given.is_empty() and not always_true(given):
            begins = self._made("And", [given, begins], {}, self.scope)
        self.node.inputs[1] = begins
        self.node.inputs[0] = gs.Variable.empty()

    def _counted(self) -> gs.Tensor:
        """Carries the number of the round from one to the next; returns the next one's."""
        node, body, carried = self.node, self.body, len(self.node.inputs) - 2
        counter = gs.Variable(self.names.new(f"{node.name}/round"), np.dtype(np.int64), [])
        following = self._made("Add", [counter, self._constant(1, np.int64)], {}, body)
        shown: gs.Tensor = counter
        if body.inputs[0].shape:  # exporters write [1] too
            shown = self._made("Reshape", [counter, self._constant([1], np.int64)], {}, body)
        self._replace(body.inputs[0], shown)
        body.inputs.append(counter)
        body.outputs.insert(1 + carried, following)
        node.inputs.append(self._constant(0, np.int64))
        node.outputs.insert(carried, gs.Variable(self.names.new(f"{node.name}/rounds"), np.dtype(np.int64), []))
        return following

    def _replace(self, old: gs.Tensor, new: gs.Tensor) -> None:
        redirect(old, new)
        for scope in scopes(self.body):
            scope.outputs[:] = [new if tensor is old else tensor for tensor in scope.outputs]

    def _constant(self, value: object, dtype: type) -> gs.Constant:
        return gs.Constant(self.names.new(f"{self.node.name}/constant"), np.array(value, dtype))

    def _made(self, op: str, inputs: Sequence[gs.Tensor], attrs: dict[str, object], scope: gs.Graph) -> gs.Variable:
        """The result of a new node: the body's first or last, as ``inputs`` allow, or right before the Loop."""
        result = gs.Variable(self.names.new(f"{self.node.name}/{op}"))
        node = Node(op, self.names.new(f"{self.node.name}/{op}"), attrs, list(inputs), [result], domain="")
        node.metadata = {**node_metadata(self.node), "bridge.rule": NAME}
        infer(node, self.scope.opset)
        if scope is self.scope:
            place = next(index for index, item in enumerate(scope.nodes) if item is self.node)
            scope.nodes.insert(place, node)
            self.outside.append(node)
        elif op in ("And", "Less"):
            scope.nodes.append(node)
        else:
            scope.nodes.insert(0, node)
        return result
