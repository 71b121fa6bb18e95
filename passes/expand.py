"""Operators that the target lacks, and ONNX defines through others, become those others; so do local functions.

Only where the target needs it: an operator that its parser knows is better left whole (an inlined RMSNormalization
is slower, and in half precision less accurate).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from .framework import Log, Names
from .ir import node_metadata, scopes, set_type, tensor_proto, type_proto
from .provenance import describe
from .reading import from_proto
from .writing import node_proto, to_proto

if TYPE_CHECKING:
    from bridge.target import Target

REASON = "The target's parser lacks the operator, and ONNX (or the model) defines it through others."


def expand_functions(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Inlines operators with a function body that the target refuses, and local functions that contain such."""
    changed: list[str] = []
    names: Names | None = None
    local = {(function.domain or "", function.name): function for function in graph.functions}
    wanted = {key for key, function in local.items() if _needs_inlining(function, target, local)}
    for scope in list(scopes(graph)):
        in_function = isinstance(scope, gs.Function)
        kept: list[gs.Node] = []
        for node in scope.nodes:
            key = (node.domain or "", node.op)
            body = None
            if key in wanted or (
                key not in local and not in_function and _refused(node, target) and _has_body(node, scope.opset)
            ):
                body = _expanded(node, scope, graph)
            if body is None:
                kept.append(node)
                continue
            names = names or Names(graph)
            changed.append(describe(node))
            kept.extend(_spliced(node, body, names))
        scope.nodes = kept
    if wanted:
        graph.functions = [function for key, function in local.items() if key not in wanted]
    if changed:
        log.add("expand_functions", REASON, changed)
    return bool(changed)


def _needs_inlining(function: gs.Function, target: Target, local: dict[tuple[str, str], gs.Function]) -> bool:
    """Rules need shapes, which the body of a function does not have: it is inlined if any of it may need a rule."""
    for scope in scopes(function, functions=False):
        for node in scope.nodes:
            inner = local.get((node.domain or "", node.op))
            if inner is not None:
                if inner is not function and _needs_inlining(inner, target, local):
                    return True
            elif _refused(node, target):
                return True
    return False


def _refused(node: gs.Node, target: Target) -> bool:
    return not node.domain and onnx.defs.has(node.op) and target.refuses(node)


def _has_body(node: gs.Node, opset: int) -> bool:
    schema: Any = onnx.defs.get_schema(node.op, opset, "")
    return bool(schema.has_function or schema.has_context_dependent_function)


def _expanded(node: gs.Node, scope: gs.Graph, graph: gs.Graph) -> gs.Graph | None:
    """The body of ``node`` as a graph of its own, or None where it has none."""
    proto = node_proto(node)
    del proto.metadata_props[:]
    model = onnx.ModelProto(ir_version=max(8, graph.ir_version or 8))
    model.graph.name = "expand"
    model.graph.node.append(proto)
    seen: set[str] = set()
    for tensor in node.inputs:
        if tensor.is_empty() or tensor.name in seen:
            continue
        seen.add(tensor.name)
        info = model.graph.input.add(name=tensor.name)
        if tensor.dtype is not None:
            info.type.CopyFrom(type_proto(tensor))
        if isinstance(tensor, gs.Constant) and tensor.shape in ((), (0,), (1,)):
            model.graph.initializer.append(tensor_proto(tensor))  # bodies may depend on small constants
    for tensor in node.outputs:
        if tensor.name:
            info = model.graph.output.add(name=tensor.name)
            if tensor.dtype is not None:
                info.type.CopyFrom(type_proto(tensor))
    model.opset_import.append(onnx.helper.make_opsetid("", scope.opset))
    key = (node.domain or "", node.op)
    function = next((item for item in graph.functions if (item.domain or "", item.name) == key), None)
    if function is not None:
        model.functions.extend(to_proto(graph).functions)
        model.opset_import.append(onnx.helper.make_opsetid(node.domain, 1)) if node.domain else None
    inlined = onnx.inliner.inline_selected_functions(model, [key], inline_schema_functions=function is None)
    if [item.op_type for item in inlined.graph.node] == [node.op]:
        return None
    inferred = onnx.shape_inference.infer_shapes(inlined, data_prop=True)
    del inferred.graph.initializer[:]
    return from_proto(inferred)


def _spliced(node: gs.Node, body: gs.Graph, names: Names) -> list[gs.Node]:
    """The nodes of ``body`` between the tensors of ``node``, under new names, with its origin."""
    inside = {tensor.name: tensor for tensor in node.inputs if not tensor.is_empty()}
    outside = {tensor.name: tensor for tensor in node.outputs if tensor.name}
    renamed: set[int] = set()
    for scope in scopes(body, functions=False):
        for item in scope.nodes:
            item.name = names.new(f"{node.name or node.op}/{item.op}")
            item.metadata = {**node_metadata(node), "bridge.rule": "expand_functions"}
            for index, tensor in enumerate(list(item.inputs)):
                if tensor.name in inside and tensor.name not in outside and id(tensor) not in renamed:
                    item.inputs[index] = inside[tensor.name]
    node.inputs.clear()
    node.outputs.clear()
    for scope in scopes(body, functions=False):
        for item in scope.nodes:
            for index, tensor in enumerate(list(item.outputs)):
                if scope is body and tensor.name in outside:
                    final = outside[tensor.name]
                    if final.dtype is None and tensor.dtype is not None:
                        set_type(final, type_proto(tensor))
                    for consumer in list(tensor.outputs):
                        for place, read in enumerate(list(consumer.inputs)):
                            if read is tensor:
                                consumer.inputs[place] = final
                    item.outputs[index] = final
                elif tensor.name and id(tensor) not in renamed:
                    renamed.add(id(tensor))
                    tensor.name = names.new(f"{node.name or node.op}/{tensor.name}")
    return list(body.nodes)
