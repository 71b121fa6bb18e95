"""Operators that the target lacks, and ONNX defines through others, become those others; so do local functions.

Only where the target needs it: an operator that its parser knows is better left whole (an inlined RMSNormalization
is slower, and in half precision less accurate).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto

from .engine import redirect, take_over
from .framework import Log, schema_of
from .ir import (
    CONTROL_FLOW,
    Names,
    Node,
    bodies,
    calls,
    function_key,
    is_plugin_call,
    is_reference,
    node_metadata,
    scopes,
    set_type,
    type_known,
    type_proto,
)
from .matches import part
from .plugins import drop_uncalled
from .provenance import describe, inherited
from .reading import from_proto
from .writing import Writer, function_proto, node_proto

if TYPE_CHECKING:
    from bridge.target import Target

NAME = "expand_functions"
REASON = "The target's parser lacks the operator, and ONNX (or the model) defines it through others."


def expand_functions(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Inlines operators with a function body that the target refuses, and local functions that contain such."""
    changed: list[str] = []
    names: Names | None = None
    wanted = _Wanted(graph, target, log)
    inner_first = list(scopes(graph, references=True))[::-1]
    for scope in inner_first:
        kept: list[gs.Node] = []
        for node in scope.nodes:
            meaning = _meaning(node, scope, wanted)
            if meaning is None:
                kept.append(node)
                continue
            names = names or Names(graph)
            changed.append(describe(node))
            before = part([node], scope.opset) if log.recorder else None
            inlined = _spliced(node, meaning, names)
            kept.extend(inlined)
            if log.recorder and before is not None:
                after, outputs = part(inlined, scope.opset), {tensor.name: tensor.name for tensor in meaning.outputs}
                log.matches.append(log.recorder.match(NAME, changed[-1], scope, before, after, outputs))
        scope.nodes = kept
    if not changed:
        return False
    called = {calls(node) for scope in scopes(graph) for node in scope.nodes}
    graph.functions = [function for function in graph.functions if function_key(function) in called]
    log.add(NAME, REASON, changed)
    return True


def inline_functions(graph: gs.Graph) -> bool:
    """Puts the nodes of local functions where they are called, but for what plugins compute; True if there were any.

    A function whose operators mean something else in the graph's opset stays.
    """
    wanted = _Local(graph)
    changed, progress = False, bool(wanted.functions)
    while progress:
        progress = False
        names = Names(graph)
        for scope in list(scopes(graph, functions=False))[::-1]:
            kept: list[gs.Node] = []
            for node in scope.nodes:
                meaning = _meaning(node, scope, wanted) if wanted.function(node) is not None else None
                progress |= meaning is not None
                kept.extend([node] if meaning is None else _spliced(node, meaning, names))
            scope.nodes = kept
        changed |= progress
    if changed:
        drop_uncalled(graph)
    return changed


class _Wanted:
    """Which local functions are to be inlined, and which operators."""

    def __init__(self, graph: gs.Graph, target: Target, log: Log) -> None:
        self.target = target
        self.ir_version = graph.ir_version or onnx.IR_VERSION
        self.functions = {function_key(function): function for function in graph.functions}
        self.declined = {name for _, name in log.declined}
        self.known: dict[tuple[str, str, str], bool] = {}

    def function(self, node: gs.Node) -> gs.Function | None:
        """The function that ``node`` calls, if it is to be inlined: if one of its nodes may need a rule.

        Rules need shapes, and the body of a function has none.
        """
        key = calls(node)
        function = self.functions.get(key)
        if function is None:
            return None
        if is_plugin_call(node):  # of a model that was rewritten for another target, perhaps
            return None if self.target.has_plugin(node.op, node.attrs.get("plugin_version")) else function
        if not self.target.reads_functions:
            return function
        if key not in self.known:
            self.known[key] = False  # ends the search in functions that call themselves
            inner = [item for scope in scopes(function, functions=False) for item in scope.nodes]
            self.known[key] = any(
                item.name in self.declined or self.function(item) is not None or self.operator(item) for item in inner
            )
        return function if self.known[key] else None

    def operator(self, node: gs.Node) -> bool:
        """Whether the target refuses an operator of the standard."""
        if calls(node) in self.functions or node.domain or not onnx.defs.has(node.op):
            return False
        return self.target.refuses(node) or not self._known_to_parser(node.op)

    def _known_to_parser(self, operator: str) -> bool:
        limit = self.target.opset
        return limit is None or onnx.defs.has(operator, limit, "")

    def too_new(self, node: gs.Node) -> bool:
        """Whether the opset that the target reads has no such operator. What a plugin computes is of that opset too."""
        if self.target.opset is None or node.domain or not onnx.defs.has(node.op):
            return False
        first: int = min(schema.since_version for schema in _versions(node.op))
        return first > self.target.opset


class _Local(_Wanted):
    """All local functions but those that say what a plugin computes."""

    def __init__(self, graph: gs.Graph) -> None:
        self.ir_version = graph.ir_version or onnx.IR_VERSION
        self.functions = {function_key(item): item for item in graph.functions if not is_reference(item)}

    def function(self, node: gs.Node) -> gs.Function | None:
        return self.functions.get(calls(node))


@functools.cache
def _versions(op: str) -> list[Any]:
    return [schema for schema in onnx.defs.get_all_schemas_with_history() if schema.name == op and not schema.domain]


@dataclass(frozen=True)
class Meaning:
    """What a node stands for: a graph, and what the node puts in place of that graph's inputs and outputs."""

    graph: gs.Graph
    inputs: list[gs.Tensor | None]
    outputs: list[gs.Tensor]


def _meaning(node: gs.Node, scope: gs.Graph, wanted: _Wanted) -> Meaning | None:
    """What to write for ``node``, or None where it stays."""
    if (node.op in CONTROL_FLOW or node.domain) and any(bodies(node)) and _captured(node):
        return None
    function = wanted.function(node)
    if function is not None:
        proto = function_proto(function, wanted.ir_version)
        return _called(node, proto, {item.name: item for item in proto.attribute_proto}, scope.opset)
    if isinstance(scope, gs.Function):
        if not (is_reference(scope) and wanted.too_new(node)):
            return None
    elif not wanted.operator(node):
        return None
    schema = schema_of(node.op, scope.opset)
    definition = _definition(node, schema, scope.opset)
    defaults = {name: item.default_value for name, item in schema.attributes.items() if item.default_value.name}
    return None if definition is None else _called(node, definition, defaults, scope.opset)


def _captured(node: gs.Node) -> bool:
    """Whether the node's bodies read from outside of them."""
    inner = [scope for body in bodies(node) for scope in scopes(body, functions=False)]
    local = {id(tensor) for scope in inner for tensor in scope.inputs}
    local |= {id(tensor) for scope in inner for item in scope.nodes for tensor in item.outputs}
    return any(id(tensor) not in local for scope in inner for item in scope.nodes for tensor in item.inputs)


def _definition(node: gs.Node, schema: Any, opset: int) -> onnx.FunctionProto | None:
    """ONNX's definition of the operator through others, of the newest version up to ``opset``."""
    fixed = [version for version in schema.function_opset_versions if version <= opset]
    fitting = [version for version in schema.context_dependent_function_opset_versions if version <= opset]
    found = b""
    if fixed:
        found = schema.get_function_with_opset_version(max(fixed))
    elif fitting and all(tensor.is_empty() or type_known(tensor) for tensor in node.inputs):
        call, types = node_proto(node), [type_proto(tensor).SerializeToString() for tensor in node.inputs]
        found = schema.get_context_dependent_function_with_opset_version(max(fitting), call.SerializeToString(), types)
    function = onnx.FunctionProto()
    function.ParseFromString(found)
    return function if function.node else None


def _called(
    node: gs.Node, function: onnx.FunctionProto, defaults: dict[str, AttributeProto], opset: int
) -> Meaning | None:
    """The body of ``function`` with the attributes and the input types of ``node``."""
    if not _same_operators(function, opset):
        return None
    values = {**defaults, **{name: Writer().attribute(node, name, value) for name, value in node.attrs.items()}}
    for item in function.node:
        _fill_attributes(item, values)
    model = onnx.ModelProto(ir_version=onnx.IR_VERSION, opset_import=[onnx.helper.make_opsetid("", opset)])
    model.opset_import.extend(item for item in function.opset_import if item.domain)
    model.graph.name = function.name
    model.graph.node.extend(function.node)
    given = [None if tensor.is_empty() else tensor for tensor in node.inputs]
    given += [None] * (len(function.input) - len(given))
    for name, tensor in zip(function.input, given, strict=True):
        kind = onnx.TypeProto() if tensor is None else type_proto(tensor)
        model.graph.input.append(onnx.ValueInfoProto(name=name, type=kind))
    results = {name: tensor for name, tensor in zip(function.output, node.outputs) if tensor.name}  # noqa: B905
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
    if all(tensor is None or type_known(tensor) for tensor in given):
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return Meaning(from_proto(model), given, list(results.values()))


def _same_operators(function: onnx.FunctionProto, opset: int) -> bool:
    """Whether the function's operators mean the same under ``opset``."""
    own = next((item.version for item in function.opset_import if item.domain in ("", "ai.onnx")), opset)
    nodes = list(_standard_nodes(function.node))
    if own == opset or all(_since(node, own) == _since(node, opset) for node in nodes):
        return True
    context = type(onnx.checker.DEFAULT_CONTEXT)()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {"": opset}
    try:
        for node in nodes:
            onnx.checker.check_node(node, context)
    except onnx.checker.ValidationError:
        return False
    return min(own, opset) >= LIKE_TODAYS


LIKE_TODAYS = 13
"""From this opset on, an operator whose form is still allowed means what it meant; Softmax was the last to change."""


def _since(node: onnx.NodeProto, opset: int) -> int:
    return int(onnx.defs.get_schema(node.op_type, opset, "").since_version)


def _standard_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes of the standard domain among ``nodes`` and in their bodies."""
    for node in nodes:
        if node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type):
            yield node
        for attribute in node.attribute:
            yield from _standard_nodes(attribute.g.node)


def _fill_attributes(node: onnx.NodeProto, values: dict[str, AttributeProto]) -> None:
    """Puts the call's ``values`` where the function's nodes refer to its attributes; what has none is left out."""
    filled = []
    for attribute in node.attribute:
        ref = attribute.ref_attr_name
        if ref and ref not in values:
            continue
        item = AttributeProto()
        item.CopyFrom(values[ref] if ref else attribute)
        item.name = attribute.name
        for inner in item.g.node:
            _fill_attributes(inner, values)
        filled.append(item)
    del node.attribute[:]
    node.attribute.extend(filled)


def _spliced(node: gs.Node, meaning: Meaning, names: Names) -> list[gs.Node]:
    """The nodes that ``node`` stands for between its tensors, under new names, with its origin."""
    body, stem = meaning.graph, node.name or node.op
    for scope in scopes(body, functions=False):
        for tensor in scope.inputs:
            tensor.name = names.new(f"{stem}/{tensor.name}")
        for item in scope.nodes:
            item.name = names.new(f"{stem}/{item.name or item.op}")
            item.metadata = {**inherited(node, NAME), **node_metadata(item), "bridge.rule": NAME}
            for tensor in item.outputs:
                if tensor.name:
                    tensor.name = names.new(f"{stem}/{tensor.name}")
    node.inputs.clear()
    node.outputs.clear()
    nodes = list(body.nodes)
    taken: dict[int, gs.Tensor] = {}
    for old, result in zip(meaning.outputs, body.outputs, strict=True):
        new = taken.get(id(result), result)
        if not type_known(old):
            set_type(old, type_proto(new))
        if new is result and result.inputs:
            take_over(old, new)
            taken[id(result)] = old
        else:  # an input, a constant, or another output too
            nodes.append(Node("Identity", names.new(f"{stem}/output"), {}, [new], [old], domain=""))
    for formal, actual in zip(body.inputs, meaning.inputs, strict=True):
        redirect(formal, gs.Variable("") if actual is None else actual)
    return nodes
