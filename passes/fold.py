"""Constants are computed once, here, and the branches of an If whose condition is known are taken.

Random operators are never folded, nor are quantisation pairs (they hold the precision of the weights), nor anything
whose result would be much larger than what it is made of. ONNX Runtime does the arithmetic, so that a folded model
computes what the model computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .framework import Log, Names, merge_type, redirect
from .ir import Array, Constant, Node, scopes, tensor_proto, type_proto
from .provenance import describe
from .writing import Writer

NEVER = frozenset(
    {
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        *("Bernoulli", "Multinomial", "Dropout"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
        *("If", "Loop", "Scan", "SequenceMap"),
    }
)
LARGEST = 64 << 20
"""Bytes of the largest constant that folding makes."""
GROWTH = 1 << 20
"""Bytes that a folded constant may have more than what it is made of."""

FOLD_REASON = "What depends on constants alone is computed once, before the build."
BRANCH_REASON = "An If whose condition is a constant is replaced by the branch that is taken."


def fold_constants(graph: gs.Graph, log: Log) -> bool:
    """Computes what depends on constants alone, in every body; True if anything changed."""
    changed = False
    for scope in list(scopes(graph)):
        changed |= _lift_constant_nodes(scope)
        changed |= _fold_shapes(scope, log)
        changed |= _fold_scope(scope, log)
    return changed


def _lift_constant_nodes(scope: gs.Graph) -> bool:
    """Constant nodes become constants; their readers then see a value."""
    outputs = {id(tensor) for tensor in scope.outputs}
    kept = []
    for node in scope.nodes:
        values = _constant_node_values(node) if node.op == "Constant" and not node.domain else None
        if values is None or id(node.outputs[0]) in outputs:
            kept.append(node)
            continue
        output = node.outputs[0]
        node.outputs.clear()
        _make_constant(output, values)
    changed = len(kept) != len(scope.nodes)
    scope.nodes = kept
    return changed


def _constant_node_values(node: gs.Node) -> Any:
    for name, value in node.attrs.items():
        if name == "value" and isinstance(value, gs.Constant):
            return value._values
        if name in ("value_float", "value_floats") and not isinstance(value, gs.Node.AttributeRef):
            return np.array(value, np.float32)
        if name in ("value_int", "value_ints") and not isinstance(value, gs.Node.AttributeRef):
            return np.array(value, np.int64)
    return None


def _make_constant(tensor: gs.Variable, values: Any) -> None:
    tensor.inputs.clear()
    tensor.to_constant(values)
    tensor.__class__ = Constant


# --- shapes ------------------------------------------------------------------------------------------------------

Dims = list["int | str | None"]


def _fold_shapes(scope: gs.Graph, log: Log) -> bool:
    """Follows what is known of shapes (``x.shape[1]`` of a model whose first axis is dynamic) to constants."""
    known: dict[int, Dims] = {}
    outputs = {id(tensor) for tensor in scope.outputs}
    folded: list[gs.Node] = []
    for node in scope.nodes:
        if node.domain or len(node.outputs) != 1 or node.op not in _SHAPE_RULES:
            continue
        dims = _SHAPE_RULES[node.op](node, known)
        if dims is None:
            continue
        output = node.outputs[0]
        known[id(output)] = dims
        if all(isinstance(size, int) for size in dims) and id(output) not in outputs and output.outputs:
            scalar = output.shape is not None and len(output.shape) == 0
            folded.append(node)
            values = np.array(dims[0] if scalar else dims, np.int64)
            node.outputs.clear()
            _make_constant(output, values.astype(output.dtype or np.int64))
    if not folded:
        return False
    log.add("fold_constants", FOLD_REASON, map(describe, folded))
    _drop(scope, folded)
    return True


def _dims(tensor: gs.Tensor, known: dict[int, Dims]) -> Dims | None:
    if id(tensor) in known:
        return known[id(tensor)]
    if isinstance(tensor, gs.Constant) and tensor.dtype in (np.int64, np.int32) and math.prod(tensor.shape) <= 64:
        return [int(value) for value in np.asarray(tensor.values).reshape(-1)]
    return None


def _shape_of(node: gs.Node, known: dict[int, Dims]) -> Dims | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    start, end = node.attrs.get("start", 0), node.attrs.get("end", len(shape))
    return list(shape)[start:end]


def _size_of(node: gs.Node, known: dict[int, Dims]) -> Dims | None:
    if id(node.inputs[0]) in known:
        return [len(known[id(node.inputs[0])])]
    shape = node.inputs[0].shape
    return None if shape is None or not all(isinstance(size, int) for size in shape) else [math.prod(shape)]


def _gather(node: gs.Node, known: dict[int, Dims]) -> Dims | None:
    data, index = known.get(id(node.inputs[0])), node.inputs[1]
    if data is None or not isinstance(index, gs.Constant):
        return None
    places = [int(i) for i in np.asarray(index.values).reshape(-1)]
    return [data[i] for i in places] if all(-len(data) <= i < len(data) for i in places) else None


def _slice(node: gs.Node, known: dict[int, Dims]) -> Dims | None:
    data = known.get(id(node.inputs[0]))
    if data is None or not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        return None
    if len(node.inputs) < 3:  # before opset 10, as attributes
        return None
    start, end = (int(np.asarray(tensor.values).reshape(-1)[0]) for tensor in node.inputs[1:3])
    step = int(np.asarray(node.inputs[4].values).reshape(-1)[0]) if len(node.inputs) > 4 else 1
    return data[start:end:step] if step > 0 else None


def _concat(node: gs.Node, known: dict[int, Dims]) -> Dims | None:
    parts = [_dims(tensor, known) for tensor in node.inputs]
    return None if any(part is None for part in parts) else [size for part in parts if part for size in part]


def _same(node: gs.Node, known: dict[int, Dims]) -> Dims | None:
    return known.get(id(node.inputs[0]))


def _integer_cast(node: gs.Node, known: dict[int, Dims]) -> Dims | None:
    return _same(node, known) if node.attrs.get("to") in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) else None


_SHAPE_RULES: dict[str, Callable[[gs.Node, dict[int, Dims]], Dims | None]] = {
    "Shape": _shape_of,
    "Size": _size_of,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _same,
    "Squeeze": _same,
    "Identity": _same,
    "Cast": _integer_cast,
}


# --- arithmetic --------------------------------------------------------------------------------------------------


def _fold_scope(scope: gs.Graph, log: Log) -> bool:
    outputs = {id(tensor) for tensor in scope.outputs}
    foldable: dict[int, gs.Node] = {}
    made: set[int] = set()
    for node in scope.nodes:
        if _foldable(node, made) and not any(id(tensor) in outputs for tensor in node.outputs):
            foldable[id(node)] = node
            made.update(id(tensor) for tensor in node.outputs)
    if not foldable:
        return False
    wanted = [
        tensor
        for node in foldable.values()
        for tensor in node.outputs
        if any(id(consumer) not in foldable for consumer in tensor.outputs)
    ]
    values = _evaluate(list(foldable.values()), wanted, scope)
    folded = [tensor for tensor in wanted if id(tensor) in values]
    origins = [describe(tensor.inputs[0]) for tensor in folded]
    for tensor in folded:
        _make_constant(tensor, values[id(tensor)])
    dead = _dead(list(foldable.values()))
    _drop(scope, dead)
    if folded:
        log.add("fold_constants", FOLD_REASON, origins)
    return bool(folded or dead)


def _foldable(node: gs.Node, made: set[int]) -> bool:
    if node.domain or node.op in NEVER or node.op.startswith(("Sequence", "Optional")) or not node.outputs:
        return False
    if not onnx.defs.has(node.op) or any(
        isinstance(value, (gs.Graph, gs.Node.AttributeRef)) for value in node.attrs.values()
    ):
        return False
    size = 0
    for tensor in node.inputs:
        if tensor.is_empty():
            continue
        if isinstance(tensor, gs.Constant):
            size += math.prod(tensor.shape) * tensor.dtype.itemsize
        elif id(tensor) not in made:
            return False
    for tensor in node.outputs:
        if tensor.dtype is not None and tensor.shape is not None and all(isinstance(d, int) for d in tensor.shape):
            bytes_made = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
            if bytes_made > LARGEST or bytes_made > size + GROWTH:
                return False
    return size <= LARGEST


def _evaluate(nodes: list[gs.Node], wanted: list[gs.Tensor], scope: gs.Graph) -> dict[int, Array]:
    """The values of ``wanted``, all at once, or node by node where ONNX Runtime lacks one of the operators."""
    values = _run(nodes, wanted, scope, {})
    if values is not None:
        return values
    found: dict[int, Array] = {}
    for node in nodes:
        found.update(_run([node], [tensor for tensor in node.outputs if tensor.name], scope, found) or {})
    return {id(tensor): found[id(tensor)] for tensor in wanted if id(tensor) in found}


def _run(
    nodes: list[gs.Node], wanted: list[gs.Tensor], scope: gs.Graph, given: dict[int, Array]
) -> dict[int, Array] | None:
    """Runs ``nodes`` in ONNX Runtime; None where it refuses them."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if not wanted:
        return {}
    writer = Writer()
    made = {id(tensor) for node in nodes for tensor in node.outputs}
    graph = onnx.GraphProto(name="fold", node=[writer.node(node) for node in nodes])
    for constant in writer.constants.values():
        graph.initializer.append(tensor_proto(constant))
    for node in nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Variable) and not tensor.is_empty() and id(tensor) not in made:
                if id(tensor) not in given:
                    return None
                graph.initializer.append(onnx.numpy_helper.from_array(given[id(tensor)], tensor.name))
    graph.output.extend(onnx.ValueInfoProto(name=tensor.name) for tensor in wanted)
    opset = onnx.helper.make_opsetid("", scope.opset)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_ir_version(scope.opset))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        arrays = session.run(None, {})
    except (state.NotImplemented, state.InvalidGraph, state.Fail, state.RuntimeException, state.InvalidArgument):
        return None
    return {
        id(tensor): array
        for tensor, array in zip(wanted, arrays, strict=True)
        if isinstance(array, np.ndarray) and array.nbytes <= LARGEST
    }


def _ir_version(opset: int) -> int:
    return max(8, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)], ignore_unknown=True))


def _dead(nodes: list[gs.Node]) -> list[gs.Node]:
    """Those of ``nodes`` (in order) that nothing reads any more, detached."""
    dead = []
    for node in reversed(nodes):
        if not any(tensor.outputs for tensor in node.outputs):
            node.inputs.clear()
            node.outputs.clear()
            dead.append(node)
    return dead


def _drop(scope: gs.Graph, nodes: list[gs.Node]) -> None:
    gone = {id(node) for node in nodes}
    for node in nodes:
        node.inputs.clear()
    scope.nodes = [node for node in scope.nodes if id(node) not in gone]


# --- branches ----------------------------------------------------------------------------------------------------


def take_branches(graph: gs.Graph, log: Log) -> bool:
    """Replaces each If whose condition is a constant by the branch that it takes; True if there was one."""
    taken: list[str] = []
    names: Names | None = None
    for scope in list(scopes(graph)):
        kept: list[gs.Node] = []
        for node in scope.nodes:
            if node.op != "If" or node.domain or not isinstance(node.inputs[0], gs.Constant):
                kept.append(node)
                continue
            names = names or Names(graph)
            taken.append(describe(node))
            kept.extend(_branch(node, names, scope))
        scope.nodes = kept
    if taken:
        log.add("take_branches", BRANCH_REASON, taken)
    return bool(taken)


def _branch(node: gs.Node, names: Names, scope: gs.Graph) -> list[gs.Node]:
    """The nodes of the branch taken, moved out under names of their own, in place of ``node``."""
    condition = bool(np.asarray(node.inputs[0].values).reshape(-1)[0])
    body: gs.Graph = node.attrs["then_branch" if condition else "else_branch"]
    for inner in scopes(body, functions=False):
        for item in inner.nodes:
            item.name = names.new(item.name or item.op)
            for tensor in item.outputs:
                if tensor.name:
                    tensor.name = names.new(tensor.name)
        if inner is not body:  # the parameters of a Loop's or Scan's body
            for tensor in inner.inputs:
                tensor.name = names.new(tensor.name)
    nodes = list(body.nodes)
    outputs = {id(tensor) for tensor in scope.outputs}
    pairs = list(zip(node.outputs, body.outputs, strict=True))
    node.inputs.clear()
    node.outputs.clear()
    for old, new in pairs:
        if isinstance(new, gs.Variable):
            merge_type(new, type_proto(old)) if old.dtype is not None else None
        if id(old) in outputs:
            nodes.append(Node("Identity", names.new("branch"), inputs=[new], outputs=[old], domain=""))
        else:
            redirect(old, new)
    return nodes
