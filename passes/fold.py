"""Constants are computed once, here, and the branches of an If whose condition is known are taken.

Random operators are never folded, nor are quantisation pairs (they hold the precision of the weights), nor anything
whose result would be much larger than what it is made of. ONNX Runtime does the arithmetic, so that a folded model
computes what the model computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .engine import redirect
from .framework import Log, infer, merge_type
from .ir import Array, Constant, Node, detach, onnx_dtype, scopes, tensor_proto, type_proto
from .matches import part
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

SHAPED_BY_VALUES = frozenset(("NonZero", "Unique", "Compress", "NonMaxSuppression"))
"""Operators whose result is not much larger than what it is made of, and of no shape that can be inferred."""

FOLD_REASON = "What depends on constants alone is computed once, before the build."
BRANCH_REASON = "An If whose condition is a constant is replaced by the branch that is taken."


def fold_constants(graph: gs.Graph, log: Log) -> bool:
    """Computes what depends on constants alone, in every body; True if that taught it types which allow more."""
    taught = False
    for scope in list(scopes(graph)):
        _lift_constant_nodes(scope)
        _fold_shapes(scope, log)
        while _fold_scope(scope, log):
            taught = True
    return taught


def _lift_constant_nodes(scope: gs.Graph) -> None:
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
    scope.nodes = kept


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


@dataclass(frozen=True)
class Sizes:
    """What is known of an integer tensor: its elements, and whether it is a scalar, or else a vector."""

    dims: list[int | str | None]
    scalar: bool = False


Known = dict[int, Sizes]
"""By the tensor's id."""


def _fold_shapes(scope: gs.Graph, log: Log) -> None:
    """Follows what is known of shapes (``x.shape[1]`` of a model whose first axis is dynamic) to constants."""
    known: Known = {}
    outputs = {id(tensor) for tensor in scope.outputs}
    folded: list[gs.Node] = []
    constants: list[gs.Tensor] = []
    for node in scope.nodes:
        if node.op not in _SHAPE_RULES or node.domain or len(node.outputs) != 1 or _referring(node):
            continue
        sizes = _SHAPE_RULES[node.op](node, known)
        if sizes is None:
            continue
        output = node.outputs[0]
        known[id(output)] = sizes
        if all(isinstance(size, int) for size in sizes.dims) and id(output) not in outputs and output.outputs:
            folded.append(node)
            constants.append(output)
            values = np.array(sizes.dims[0] if sizes.scalar else sizes.dims, np.int64)
            node.outputs.clear()
            _make_constant(output, values.astype(output.dtype or np.int64))
    if not folded:
        return
    origins = list(map(describe, folded))
    log.add("fold_constants", FOLD_REASON, origins)
    _record(log, scope, constants, origins)
    _drop(scope, folded)


def _sizes(tensor: gs.Tensor, known: Known) -> Sizes | None:
    if id(tensor) in known:
        return known[id(tensor)]
    integers = isinstance(tensor, gs.Constant) and tensor.dtype in (np.int64, np.int32)
    if not integers or len(tensor.shape) > 1 or math.prod(tensor.shape) > 64:
        return None
    return Sizes([int(value) for value in np.asarray(tensor.values).reshape(-1)], not tensor.shape)


def _shape_of(node: gs.Node, known: Known) -> Sizes | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    start, end = node.attrs.get("start", 0), node.attrs.get("end", len(shape))
    return Sizes([size if not isinstance(size, int) or size >= 0 else None for size in shape][start:end])


def _size_of(node: gs.Node, known: Known) -> Sizes | None:
    shape = node.inputs[0].shape
    if shape is None or not all(isinstance(size, int) and size >= 0 for size in shape):
        return None
    return Sizes([math.prod(shape)], scalar=True)


def _gather(node: gs.Node, known: Known) -> Sizes | None:
    data, index = known.get(id(node.inputs[0])), node.inputs[1]
    if data is None or data.scalar or not isinstance(index, gs.Constant) or len(index.shape) > 1:
        return None
    places = [int(i) for i in np.asarray(index.values).reshape(-1)]
    if not all(-len(data.dims) <= i < len(data.dims) for i in places):
        return None
    return Sizes([data.dims[i] for i in places], scalar=not index.shape)


def _slice(node: gs.Node, known: Known) -> Sizes | None:
    data = known.get(id(node.inputs[0]))
    if data is None or not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        return None
    if len(node.inputs) < 3:  # before opset 10, as attributes
        return None
    start, end = (int(np.asarray(tensor.values).reshape(-1)[0]) for tensor in node.inputs[1:3])
    step = int(np.asarray(node.inputs[4].values).reshape(-1)[0]) if len(node.inputs) > 4 else 1
    return Sizes(data.dims[start:end:step]) if step > 0 else None


def _concat(node: gs.Node, known: Known) -> Sizes | None:
    parts = [_sizes(tensor, known) for tensor in node.inputs]
    joined: list[int | str | None] = []
    for sizes in parts:
        if sizes is None:
            return None
        joined.extend(sizes.dims)
    return Sizes(joined)


def _same(node: gs.Node, known: Known) -> Sizes | None:
    return known.get(id(node.inputs[0]))


def _unsqueeze(node: gs.Node, known: Known) -> Sizes | None:
    sizes = known.get(id(node.inputs[0]))
    return Sizes(sizes.dims) if sizes is not None and sizes.scalar and _axes(node) in ([0], [-1]) else None


def _squeeze(node: gs.Node, known: Known) -> Sizes | None:
    sizes = known.get(id(node.inputs[0]))
    return Sizes(sizes.dims, scalar=True) if sizes is not None and len(sizes.dims) == 1 else None


def _axes(node: gs.Node) -> list[int] | None:
    if len(node.inputs) < 2:
        return list(node.attrs.get("axes", ()))
    axes = node.inputs[1]
    return [int(axis) for axis in np.asarray(axes.values).reshape(-1)] if isinstance(axes, gs.Constant) else None


def _integer_cast(node: gs.Node, known: Known) -> Sizes | None:
    return _same(node, known) if node.attrs.get("to") in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) else None


_SHAPE_RULES: dict[str, Callable[[gs.Node, Known], Sizes | None]] = {
    "Shape": _shape_of,
    "Size": _size_of,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
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
    consumers = {id(node): node for tensor in folded for node in tensor.outputs}.values()
    taught = [infer(consumer, scope.opset) for consumer in consumers]  # its shape may depend on these values
    dead = _dead(list(foldable.values()))
    _drop(scope, dead)
    if folded:
        log.add("fold_constants", FOLD_REASON, origins)
        _record(log, scope, folded, origins)
    return any(taught)


def _record(log: Log, scope: gs.Graph, folded: Sequence[gs.Tensor], origins: Sequence[str]) -> None:
    if log.recorder is not None:
        for tensor, where in zip(folded, origins, strict=True):
            log.recorder.folded("fold_constants", where, scope, tensor)


def _foldable(node: gs.Node, made: set[int]) -> bool:
    if any(tensor.name and id(tensor) not in made and not isinstance(tensor, gs.Constant) for tensor in node.inputs):
        return False
    if node.domain or node.op in NEVER or node.op.startswith(("Sequence", "Optional")) or not node.outputs:
        return False
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in constants)
    if size > LARGEST or not onnx.defs.has(node.op) or _referring(node):
        return False
    if node.op in SHAPED_BY_VALUES:
        return True
    for tensor in node.outputs:
        if tensor.name == "":
            continue
        if tensor.dtype is None or tensor.shape is None or not all(isinstance(d, int) for d in tensor.shape):
            return False  # it may be huge; once its inputs are constants, its shape can be inferred
        if math.prod(tensor.shape) * tensor.dtype.itemsize > min(LARGEST, size + GROWTH):
            return False
    return True


def _referring(node: gs.Node) -> bool:
    """Whether an attribute is that of the function around the node."""
    return any(isinstance(value, gs.Node.AttributeRef) for value in node.attrs.values())


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
    for tensor in wanted:
        graph.output.append(onnx.ValueInfoProto(name=_readable(tensor, graph)))
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
        id(tensor): array if tensor.dtype is None else array.astype(tensor.dtype, copy=False)
        for tensor, array in zip(wanted, arrays, strict=True)
        if isinstance(array, np.ndarray) and array.nbytes <= LARGEST
    }


def _readable(tensor: gs.Tensor, graph: onnx.GraphProto) -> str:
    """The name of the tensor, or of its copy in a type that ONNX Runtime gives to NumPy: of bfloat16, float32."""
    if tensor.dtype is None or tensor.dtype.isbuiltin == 1:
        return str(tensor.name)
    wide = np.int32 if np.dtype(tensor.dtype).name.lstrip("u").startswith("int") else np.float32
    name = f"{tensor.name}/wide"
    graph.node.add(op_type="Cast", input=[tensor.name], output=[name]).attribute.append(
        onnx.helper.make_attribute("to", onnx_dtype(wide))
    )
    return name


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
    inner_first = list(scopes(graph))[::-1]
    for scope in inner_first:
        kept: list[gs.Node] = []
        for node in scope.nodes:
            if node.op == "If" and not node.domain and isinstance(node.inputs[0], gs.Constant):
                taken.append(describe(node))
                kept.extend(_branch(node, scope, log))
            else:
                kept.append(node)
        scope.nodes = kept
    if taken:
        log.add("take_branches", BRANCH_REASON, taken)
    return bool(taken)


def _branch(node: gs.Node, scope: gs.Graph, log: Log) -> list[gs.Node]:
    """The nodes of the branch taken, moved out in place of ``node``; names are the model's own (see ``sanitise``)."""
    condition = bool(np.asarray(node.inputs[0].values).reshape(-1)[0])
    body: gs.Graph = node.attrs["then_branch" if condition else "else_branch"]
    if log.recorder is not None:
        before, after = part([node], scope.opset), part(body.nodes, scope.opset, body.outputs)
        names = {old.name: new.name for old, new in zip(node.outputs, body.outputs, strict=True) if old.name}
        match = log.recorder.match("take_branches", describe(node), scope, before, after, names)
        log.matches.append(match)
    detach(node.attrs["else_branch" if condition else "then_branch"])
    nodes = list(body.nodes)
    outputs = {id(tensor) for tensor in scope.outputs}
    pairs = list(zip(node.outputs, body.outputs, strict=True))
    node.inputs.clear()
    node.outputs.clear()
    for old, new in pairs:
        if isinstance(new, gs.Variable):
            merge_type(new, type_proto(old))
        if id(old) in outputs:
            nodes.append(Node("Identity", f"{node.name}/{old.name}", inputs=[new], outputs=[old], domain=""))
        else:
            redirect(old, new)
    return nodes
