"""Runs the rules over a model, and puts what they make in the place of what was there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from .framework import Builder, Declined, Log, PassError, Rule
from .ir import Names, Node, bodies, scopes
from .matches import Match, Part, Recorder, part
from .provenance import describe, inherited

if TYPE_CHECKING:
    from bridge.target import Target


def run_rules(graph: gs.Graph, rules: Iterable[Rule], target: Target, log: Log) -> bool:
    """One sweep over the model, its bodies and functions; True if anything changed."""
    by_op: dict[tuple[str, str], list[Rule]] = {}
    for item in rules:
        if item.since is None and item.when(target):
            for op in item.ops:
                by_op.setdefault((item.domain, op), []).append(item)
    names: Names | None = None
    changed = False
    inner_first = list(scopes(graph))[::-1]
    for scope in inner_first:
        if not any((node.domain or "", node.op) in by_op for node in scope.nodes):
            continue
        names = names or Names(graph)
        kept: list[gs.Node] = []
        for node in scope.nodes:
            fitting = by_op.get((node.domain or "", node.op), ())
            made = _apply(node, fitting, scope, graph, names, target, log) if fitting else None
            changed |= made is not None
            kept.extend([node] if made is None else made)
        scope.nodes = kept
    return changed


def _apply(
    node: gs.Node, rules: Iterable[Rule], scope: gs.Graph, graph: gs.Graph, names: Names, target: Target, log: Log
) -> list[gs.Node] | None:
    """The nodes that replace ``node``, or None where no rule applied."""
    builder: Builder | None = None
    for item in rules:
        if builder is None or builder.made:
            builder = Builder(names, scope.opset, "", target, scope, graph.functions)
        builder.stem = f"{node.name or node.op}/{item.name}"
        before = part([node], scope.opset) if log.recorder and any(bodies(node)) else None  # a rule may move its bodies
        try:
            if graph.functions and any(isinstance(value, gs.Node.AttributeRef) for value in node.attrs.values()):
                builder.decline("its attributes are those of the function that it is in")
            result = item.function(node, builder)
            if result is None and not builder.made:  # as of most nodes
                continue
            tensors = [result] if isinstance(result, gs.Tensor) else list(result or ())
            if tensors:
                _check_complete(node, tensors, builder)
        except Declined as reason:
            log.declined[item.name, node.name] = (describe(node), str(reason))
            tensors = []
        except Exception as error:  # a defect of one rule, reported as one
            where = describe(node)
            raise PassError(f"rule {item.name} broke on {where}: {type(error).__name__}: {error}") from error
        where = describe(node) if tensors else ""
        match: Match | None = None
        if tensors and log.recorder:
            match = match_of(log.recorder, item.name, node, tensors, builder, scope, before)
        if not tensors or not replace(node, tensors, builder.made, scope):
            for unused in builder.made:
                unused.inputs.clear()
            continue
        log.declined.pop((item.name, node.name), None)
        for made in builder.made:
            made.metadata = inherited(node, item.name)
        graph.functions.extend(builder.functions[len(graph.functions) :])
        log.add(item.name, item.reason, [where])
        log.note(builder.notes)
        if match is not None:
            log.matches.append(match)
        return builder.made
    return None


def match_of(
    recorder: Recorder,
    rule: str,
    node: gs.Node,
    results: Sequence[gs.Tensor | None],
    builder: Builder,
    scope: gs.Graph,
    before: Part | None = None,
) -> Match:
    """The match as it is before the graph is changed, when every tensor still has a name of its own.

    ``before`` is the node as it was, where the rule has changed it.
    """
    pairs = [(old, new) for old, new in zip(node.outputs, results) if new is not None and old.name]  # noqa: B905
    after = part(builder.made, builder.opset, [new for _, new in pairs])
    outputs = {old.name: new.name for old, new in pairs if builder.used(old)}
    return recorder.match(rule, describe(node), scope, before or part([node], scope.opset), after, outputs)


def _check_complete(node: gs.Node, results: Sequence[gs.Tensor | None], builder: Builder) -> None:
    """Raises ValueError where an output that is read has no replacement."""
    if len(results) > len(node.outputs):
        raise ValueError(f"it gives {len(results)} tensors for {len(node.outputs)} outputs")
    for index, old in enumerate(node.outputs):
        if (index >= len(results) or results[index] is None) and builder.used(old):
            raise ValueError(f"it gives nothing for the output {old.name!r}, which is read")


def replace(node: gs.Node, results: Sequence[gs.Tensor | None], made: list[gs.Node], scope: gs.Graph) -> bool:
    """Puts ``results`` where ``node``'s outputs were and detaches it; the caller drops it from the scope.

    Where an output of the graph cannot be made by another node, an Identity joins ``made``; of an Identity there is
    then nothing to replace, and the answer is False.
    """
    fresh = {id(tensor) for item in made for tensor in item.outputs}
    outputs = {id(tensor) for tensor in scope.outputs}
    pairs = [(old, new) for old, new in zip(node.outputs, results) if new is not None and old.name]  # noqa: B905
    pairs = [(old, new) for old, new in pairs if old is not new]
    stuck = {id(old) for old, new in pairs if id(old) in outputs and id(new) not in fresh and _fixed(new, scope)}
    if stuck and node.op == "Identity":
        return False
    node.inputs.clear()
    node.outputs.clear()
    taken: dict[int, gs.Tensor] = {}
    for old, result in pairs:
        new = taken.get(id(result), result)
        if id(old) in stuck or (id(old) in outputs and new is not result):
            made.append(Node("Identity", f"{node.name}/output", {}, [new], [old], domain=""))
        elif (id(result) in fresh or id(old) in outputs) and new is result:
            take_over(old, new)
            taken[id(result)] = old
        else:
            redirect(old, new)
    return True


def _fixed(tensor: gs.Tensor, scope: gs.Graph) -> bool:
    """Whether no other tensor can take ``tensor``'s place at the node that makes it, in this very scope."""
    local = bool(tensor.inputs) and any(tensor.inputs[0] is node for node in scope.nodes)
    boundary = any(tensor is item for item in (*scope.inputs, *scope.outputs))
    return not isinstance(tensor, gs.Variable) or not local or boundary


def take_over(old: gs.Variable, new: gs.Variable) -> None:
    """``old`` keeps its name and its consumers, and is made by the node that made ``new``."""
    producer = new.inputs[0]
    index = next(i for i, tensor in enumerate(producer.outputs) if tensor is new)
    redirect(new, old)
    producer.outputs[index] = old
    if old.dtype is None:
        old.dtype = new.dtype
    if old.shape is None:
        old.shape = new.shape


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Lets every consumer of ``old``, in bodies too, read ``new``."""
    for consumer in list(old.outputs):
        for index, tensor in enumerate(list(consumer.inputs)):
            if tensor is old:
                consumer.inputs[index] = new
