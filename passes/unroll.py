"""Loops of a few known rounds are written out: TensorRT fuses what lies before its eyes, and refuses some loop bodies.

A loop is written out where its number of rounds is a constant, no round can end it early, and the result stays small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from .engine import redirect
from .framework import Log, infer
from .ir import Names, Node, bodies, detach, node_metadata, scopes
from .loops import nothing_ends
from .matches import part
from .provenance import describe

NAME = "unroll_loops"
REASON = "A Loop of a few known rounds that nothing ends early is written out."

MOST_ROUNDS = 64
MOST_NODES = 400
"""Nodes that one loop may become."""


def unroll_loops(graph: gs.Graph, log: Log) -> bool:
    """Writes out every Loop of a few known rounds, which nothing ends early; True if there was one."""
    unrolled: list[str] = []
    names: Names | None = None
    inner_first = list(scopes(graph))[::-1]
    for scope in inner_first:
        if not any(node.op == "Loop" for node in scope.nodes):
            continue
        kept: list[gs.Node] = []
        for node in scope.nodes:
            rounds = _rounds(node) if node.op == "Loop" and not node.domain else None
            if rounds is None:
                kept.append(node)
                continue
            names = names or Names(graph)
            unrolled.append(describe(node))
            kept.extend(_written_out(node, rounds, scope, names, log))
        scope.nodes = kept
    if unrolled:
        log.add(NAME, REASON, unrolled)
    return bool(unrolled)


def _rounds(node: gs.Node) -> int | None:
    """How often the loop runs, or None where it is to stay."""
    body = node.attrs.get("body")
    count = node.inputs[0]
    if not isinstance(body, gs.Graph) or not isinstance(count, gs.Constant):
        return None
    rounds = int(np.asarray(count.values).reshape(-1)[0])
    if not 0 < rounds <= MOST_ROUNDS or rounds * len(body.nodes) > MOST_NODES:
        return None
    return None if any(True for item in body.nodes for _ in bodies(item)) or not nothing_ends(node) else rounds


def _written_out(node: gs.Node, rounds: int, scope: gs.Graph, names: Names, log: Log) -> list[gs.Node]:
    """The nodes of all rounds, in place of ``node``."""
    body: gs.Graph = node.attrs["body"]
    state: list[gs.Tensor] = list(node.inputs[2:])
    carried = len(state)
    scanned: list[list[gs.Tensor]] = [[] for _ in body.outputs[1 + carried :]]
    true = gs.Constant(names.new(f"{node.name}/goes_on"), np.array(True))
    made: list[gs.Node] = []
    for index in range(rounds):
        number = gs.Constant(names.new(f"{node.name}/round"), np.array(index, np.int64))
        given = dict(zip(map(id, body.inputs), [number, true, *state], strict=True))
        stem = f"{node.name}/{index}"
        results = _copied(body, given, stem, scope, names, made)
        state = results[1 : 1 + carried]
        for places, result in zip(scanned, results[1 + carried :], strict=True):
            places.append(_unsqueezed(result, stem, scope, names, made))
    for item in made:
        item.metadata = {**node_metadata(node), **item.metadata}
    results = [*state, *(_joined(places, node.name, scope, names, made) for places in scanned)]
    if log.recorder is not None:
        pairs = [(old, new) for old, new in zip(node.outputs, results, strict=True) if old.name]
        before, after = part([node], scope.opset), part(made, scope.opset, [new for _, new in pairs])
        outputs = {old.name: new.name for old, new in pairs}
        log.recorder.matches.append(log.recorder.match(NAME, describe(node), scope, before, after, outputs))
    detach(body)
    _take_place(node, results, scope, names, made)
    return made


def _copied(
    body: gs.Graph, given: dict[int, gs.Tensor], stem: str, scope: gs.Graph, names: Names, made: list[gs.Node]
) -> list[gs.Tensor]:
    """One round: copies of the body's nodes join ``made``; returns the body's outputs."""
    for item in body.nodes:
        inputs = [given.get(id(tensor), tensor) for tensor in item.inputs]
        outputs = []
        for tensor in item.outputs:
            copy = gs.Variable(names.new(f"{stem}/{tensor.name}") if tensor.name else "", tensor.dtype)
            given[id(tensor)] = copy
            outputs.append(copy)
        copied = Node(item.op, names.new(f"{stem}/{item.name}"), dict(item.attrs), inputs, outputs, domain=item.domain)
        copied.metadata = {**node_metadata(item), "bridge.rule": NAME}
        infer(copied, scope.opset)
        made.append(copied)
    return [given.get(id(tensor), tensor) for tensor in body.outputs]


def _node(
    op: str,
    inputs: Sequence[gs.Tensor],
    attrs: dict[str, object],
    stem: str,
    scope: gs.Graph,
    names: Names,
    made: list[gs.Node],
) -> gs.Tensor:
    result = gs.Variable(names.new(f"{stem}/{op}"))
    node = Node(op, names.new(f"{stem}/{op}"), attrs, list(inputs), [result], domain="")
    node.metadata = {"bridge.rule": NAME}
    infer(node, scope.opset)
    made.append(node)
    return result


def _unsqueezed(x: gs.Tensor, stem: str, scope: gs.Graph, names: Names, made: list[gs.Node]) -> gs.Tensor:
    if scope.opset < 13:
        return _node("Unsqueeze", [x], {"axes": [0]}, stem, scope, names, made)
    axes = gs.Constant(names.new(f"{stem}/axes"), np.array([0], np.int64))
    return _node("Unsqueeze", [x, axes], {}, stem, scope, names, made)


def _joined(parts: list[gs.Tensor], stem: str, scope: gs.Graph, names: Names, made: list[gs.Node]) -> gs.Tensor:
    return _node("Concat", parts, {"axis": 0}, stem, scope, names, made)


def _take_place(
    node: gs.Node, results: Sequence[gs.Tensor], scope: gs.Graph, names: Names, made: list[gs.Node]
) -> None:
    outer = {id(tensor) for tensor in scope.outputs}
    pairs = list(zip(node.outputs, results, strict=True))
    node.inputs.clear()
    node.outputs.clear()
    for old, new in pairs:
        if id(old) in outer:
            identity = Node("Identity", names.new(f"{node.name}/output"), {}, [new], [old], domain="")
            identity.metadata = {"bridge.rule": NAME}
            made.append(identity)
        elif old.name:
            redirect(old, new)
