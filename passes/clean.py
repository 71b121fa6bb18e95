"""What nothing reads goes; what the model leaves unsaid, or says twice, is said once."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx
import onnx_graphsurgeon as gs

from .framework import Log, infer, merge_type, schema_of
from .ir import ModelError, Names, bodies, detach, function_key, name_tensors, scopes
from .provenance import describe
from .writing import to_proto

if TYPE_CHECKING:
    from bridge.target import Target

UNNAMED_DIMS = frozenset(("", "?", "-1", "None", "unk", "unknown"))
"""Names that exporters give to axes they know nothing of. TensorRT holds two axes of one name to be equal."""


def remove_unused(graph: gs.Graph, log: Log) -> bool:
    """Removes nodes whose results nothing reads, in bodies too, and optional outputs that nothing reads."""
    removed: list[str] = []
    trimmed: list[str] = []
    inner_first = list(scopes(graph))[::-1]
    for scope in inner_first:
        outputs = {id(tensor) for tensor in scope.outputs}
        kept: list[gs.Node] = []
        for node in reversed(scope.nodes):
            used = [bool(tensor.outputs) or id(tensor) in outputs for tensor in node.outputs]
            if any(used):
                kept.append(node)
                if not all(used) and _drop_outputs(node, used, scope.opset):
                    trimmed.append(describe(node))
                continue
            removed.append(describe(node))
            for body in bodies(node):
                detach(body)
            node.inputs.clear()
        scope.nodes = kept[::-1]
    if removed:
        log.add("remove_unused", "Nodes whose results nothing reads cost time and may not even parse.", removed)
    if trimmed:
        log.add("drop_unused_outputs", "Parsers refuse some outputs that nothing reads.", trimmed)
    return bool(removed or trimmed)


def _drop_outputs(node: gs.Node, used: list[bool], opset: int) -> bool:
    """Leaves out unused outputs that the standard calls optional; True if there was one.

    A BatchNormalization in training mode has to have all of its outputs: what inference does not accept is put back.
    """
    if node.domain or not onnx.defs.has(node.op):
        return False
    before = list(node.outputs)
    formal = schema_of(node.op, opset).outputs
    changed = False
    for index, tensor in enumerate(list(node.outputs)):
        optional = index < len(formal) and formal[index].option == onnx.defs.OpSchema.FormalParameterOption.Optional
        if optional and not used[index] and tensor.name:
            node.outputs[index] = gs.Variable("")
            changed = True
    while node.outputs and not node.outputs[-1].name:
        node.outputs.pop()
        changed = True
    if changed:
        try:
            infer(node, opset, strict=True)
        except (onnx.defs.SchemaError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            node.outputs = before
            return False
    return changed


def pin_inputs(graph: gs.Graph, shapes: Mapping[str, Sequence[int | str]]) -> bool:
    """Gives inputs the shapes that they will have; True if that says more than the file did."""
    changed = False
    for tensor in graph.inputs:
        if tensor.name in shapes and list(shapes[tensor.name]) != list(tensor.shape or ()):
            tensor.shape = list(shapes[tensor.name])
            changed = True
    return changed


def infer_types(graph: gs.Graph, *, afresh: bool = False) -> bool:
    """Fills in the types and shapes that the file does not state, as far as ONNX's shape inference finds them; True if
    it found any.

    ``afresh``: the shapes of the inputs have changed, and what the file states of the rest may now be known better.
    """
    tensors: dict[str, gs.Variable] = {}
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            for tensor in node.outputs:
                if tensor.name and isinstance(tensor, gs.Variable):
                    tensors[tensor.name] = tensor
    if not afresh and all(tensor.dtype is not None and tensor.shape is not None for tensor in tensors.values()):
        return False
    model = to_proto(graph, skeleton=True)
    if afresh:
        del model.graph.value_info[:]
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return _merge(inferred.graph, tensors)


def _merge(graph: onnx.GraphProto, tensors: dict[str, gs.Variable]) -> bool:
    learnt = False
    for info in (*graph.value_info, *graph.output):
        if info.name in tensors:
            learnt |= merge_type(tensors[info.name], info.type)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                learnt |= _merge(attribute.g, tensors)
    return learnt


# --- sanitising --------------------------------------------------------------------------------------------------


def sanitise(graph: gs.Graph, target: Target, log: Log) -> None:
    """Makes the model one that every tool further on reads the same way."""
    graph.defaults = []  # inputs with a default are constants: no TensorRT lets its caller change them
    _sort(graph)
    for top in (graph, *graph.functions):
        name_tensors(top)
    _name_nodes(graph, log)
    _split_dimension_names(graph, log)
    graph.ir_version = oldest_ir_version(graph)


def put_in_order(graph: gs.Graph) -> None:
    """Sorts the nodes, and gives them names of their own, where a file has them otherwise."""
    _sort(graph)
    _name_nodes(graph, Log())


def oldest_ir_version(graph: gs.Graph) -> int:
    """The oldest that the model needs, since some readers refuse newer ones; 8 brought functions."""
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", graph.opset)], ignore_unknown=True)
    overloads = any(function_key(function)[2] for function in graph.functions)
    kinds = {
        tensor.dtype.name
        for scope in scopes(graph)
        for node in scope.nodes
        for tensor in (*node.inputs, *node.outputs)
        if tensor.dtype is not None and tensor.dtype.isbuiltin != 1
    }
    by_type = max((version for kind, version in _IR_OF_TYPES.items() if any(kind in name for name in kinds)), default=8)
    return max(8, needed, by_type, 10 if overloads else 8)


_IR_OF_TYPES = {"float8_e": 9, "int4": 10, "float4": 11, "float8_e8m0": 12, "int2": 13}
"""The IR version that brought each of the newer types."""


def _sort(graph: gs.Graph) -> None:
    """Puts nodes after those that they read from, where a file has them otherwise; their order is kept if it can be.

    Raises ModelError where nodes depend on each other in a circle.
    """
    for scope in scopes(graph):
        makers = {id(tensor): index for index, node in enumerate(scope.nodes) for tensor in node.outputs if tensor.name}
        needs = [{makers[key] for key in _reads(node) if key in makers} for node in scope.nodes]
        if all(max(before, default=-1) < index for index, before in enumerate(needs)):
            continue
        readers: dict[int, list[int]] = {}
        for index, before in enumerate(needs):
            for maker in before:
                readers.setdefault(maker, []).append(index)
        ready = [index for index, before in enumerate(needs) if not before]
        ordered: list[gs.Node] = []
        while ready:
            index = heapq.heappop(ready)
            ordered.append(scope.nodes[index])
            for reader in readers.get(index, ()):
                needs[reader].discard(index)
                if not needs[reader]:
                    heapq.heappush(ready, reader)
        if len(ordered) < len(scope.nodes):
            circle = [scope.nodes[index] for index, before in enumerate(needs) if before]
            named = ", ".join(describe(node) for node in circle[:5])
            raise ModelError(f"{len(circle)} nodes depend on each other in a circle, or on one that does: {named}")
        scope.nodes = ordered


def _reads(node: gs.Node) -> Iterator[int]:
    """The ids of the tensors that the node or its bodies read."""
    yield from map(id, node.inputs)
    for body in bodies(node):
        for scope in scopes(body, functions=False):
            for inner in scope.nodes:
                yield from map(id, inner.inputs)
            yield from map(id, scope.outputs)


def _name_nodes(graph: gs.Graph, log: Log) -> None:
    """Gives unnamed and equally named nodes a name of their own."""
    names = Names()
    nodes = [node for scope in scopes(graph) for node in scope.nodes]
    names.taken.update(node.name for node in nodes)
    renamed: list[str] = []
    seen: set[str] = {""}
    for node in nodes:
        if node.name in seen:
            node.name = names.new(node.name or node.op)
            renamed.append(describe(node))
        seen.add(node.name)
    if renamed:
        log.add("name_nodes", "A node without a name of its own cannot be found again.", renamed)


def _split_dimension_names(graph: gs.Graph, log: Log) -> None:
    """Gives axes that share a meaningless name names of their own."""
    taken = {size for tensor in (*graph.inputs, *graph.outputs) for size in tensor.shape or () if isinstance(size, str)}
    changed: list[str] = []
    for tensor in (*graph.inputs, *graph.outputs):
        if not isinstance(tensor, gs.Variable) or tensor.shape is None:
            continue
        for axis, size in enumerate(tensor.shape):
            if size is None and not any(tensor is item for item in graph.inputs):
                continue  # an output's: it has no name to share, and more may be learnt of it
            unnamed = size is None or (isinstance(size, str) and size.strip() in UNNAMED_DIMS)
            if not unnamed and not (isinstance(size, int) and size < 0):
                continue
            name = f"{tensor.name}_dim_{axis}"
            while name in taken:
                name += "_"
            taken.add(name)
            tensor.shape[axis] = name
            changed.append(f"{tensor.name}, axis {axis}: {size!r} -> {name!r}")
    if changed:
        log.add("name_dimensions", "TensorRT holds two axes of one name to be equal, '?' included.", changed)


def refine_types(graph: gs.Graph) -> bool:
    """Lets what the passes have learnt about tensors reach those computed from them; True if that was anything.

    A node is looked at again when the types of its inputs are not those of the last time; of one that is seen for the
    first time, what the file states is believed where it is complete.
    """
    learnt = False
    for scope in scopes(graph):
        for node in scope.nodes:
            seen = [_seen(tensor) for tensor in node.inputs]
            before = node.__dict__.get("inferred_from")
            node.inferred_from = seen
            if before != seen and not (before is None and _complete(node)):
                learnt |= infer(node, scope.opset)
            learnt |= _type_carried(node)
    return learnt


def _type_carried(node: gs.Node) -> bool:
    """Gives what a Loop or Scan hands to its body the type (not the shape) that it has outside; True if that is new."""
    if node.op not in ("Loop", "Scan") or node.domain:
        return False
    skipped = 2 if node.op == "Loop" else 0  # the number of the round, and the condition
    learnt = False
    for body in bodies(node):
        for outer, inner in zip(node.inputs[skipped:], body.inputs[skipped:]):  # noqa: B905
            if inner.dtype is None and outer.dtype is not None:
                inner.dtype = outer.dtype
                learnt = True
    return learnt


def _complete(node: gs.Node) -> bool:
    return all(not tensor.name or (tensor.dtype is not None and tensor.shape is not None) for tensor in node.outputs)


def _seen(tensor: gs.Tensor) -> object:
    """What inference knows of a tensor; a constant's values do not change while it is one."""
    if isinstance(tensor, gs.Constant):
        return id(tensor)
    shape = tensor.shape
    return (tensor.dtype, None if shape is None else tuple(shape))
