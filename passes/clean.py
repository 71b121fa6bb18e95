"""What nothing reads goes; what the model leaves unsaid, or says twice, is said once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .framework import Log, Names, infer, merge_type
from .ir import ModelError, Node, scopes
from .provenance import describe
from .writing import to_proto

if TYPE_CHECKING:
    from bridge.target import Target

UNNAMED_DIMS = frozenset(("", "?", "-1", "None", "unk", "unknown"))
"""Names that exporters give to axes they know nothing of. TensorRT holds two axes of one name to be equal."""


def remove_unused(graph: gs.Graph, log: Log) -> bool:
    """Removes nodes whose results nothing reads, in bodies too."""
    removed: list[str] = []
    inner_first = list(scopes(graph))[::-1]
    for scope in inner_first:
        outputs = {id(tensor) for tensor in scope.outputs}
        kept: list[gs.Node] = []
        for node in reversed(scope.nodes):
            if any(tensor.outputs or id(tensor) in outputs for tensor in node.outputs):
                kept.append(node)
                continue
            removed.append(describe(node))
            _detach(node)
        scope.nodes = kept[::-1]
    if removed:
        log.add("remove_unused", "Nodes whose results nothing reads cost time and may not even parse.", removed)
    return bool(removed)


def _detach(node: gs.Node) -> None:
    """Takes the node, and those of its bodies, off the tensors that they read."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                _detach(inner)
    node.inputs.clear()


def pin_inputs(graph: gs.Graph, shapes: Mapping[str, Sequence[int | str]]) -> bool:
    """Gives inputs the shapes that they will have; True if that says more than the file did."""
    changed = False
    for tensor in graph.inputs:
        if tensor.name in shapes and list(shapes[tensor.name]) != list(tensor.shape or ()):
            tensor.shape = list(shapes[tensor.name])
            changed = True
    return changed


def infer_types(graph: gs.Graph, *, afresh: bool = False) -> None:
    """Fills in the types and shapes that the file does not state, as far as ONNX's shape inference finds them.

    ``afresh``: the shapes of the inputs have changed, and what the file states of the rest may now be known better.
    """
    tensors: dict[str, gs.Variable] = {}
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            for tensor in node.outputs:
                if tensor.name and isinstance(tensor, gs.Variable):
                    tensors[tensor.name] = tensor
    if not afresh and all(tensor.dtype is not None and tensor.shape is not None for tensor in tensors.values()):
        return
    model = to_proto(graph, skeleton=True)
    if afresh:
        del model.graph.value_info[:]
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    _merge(inferred.graph, tensors)


def _merge(graph: onnx.GraphProto, tensors: dict[str, gs.Variable]) -> None:
    for info in (*graph.value_info, *graph.output):
        if info.name in tensors:
            merge_type(tensors[info.name], info.type)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _merge(attribute.g, tensors)


# --- sanitising --------------------------------------------------------------------------------------------------


def sanitise(graph: gs.Graph, target: Target, log: Log) -> None:
    """Makes the model one that every tool further on reads the same way."""
    _sort(graph)
    _name_everything(graph, log)
    _split_dimension_names(graph, log)
    opsets = [onnx.helper.make_opsetid("", graph.opset)]
    needed = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    graph.ir_version = max(8, needed)  # 8 brought functions; newer than needed, some readers refuse


def _sort(graph: gs.Graph) -> None:
    """Puts nodes after those that they read from, where a file has them otherwise; their order is kept if it can be."""
    for scope in scopes(graph):
        ready: set[int] = set()
        local = {id(tensor) for node in scope.nodes for tensor in node.outputs}
        if all(_settled(node, ready, local) for node in scope.nodes):
            continue
        ready.clear()
        waiting: list[gs.Node] = list(scope.nodes)
        ordered: list[gs.Node] = []
        while waiting:
            later: list[gs.Node] = []
            for node in waiting:
                (ordered if _settled(node, ready, local) else later).append(node)
            if len(later) == len(waiting):
                raise ModelError(f"the nodes {[node.name for node in later[:5]]} depend on each other in a circle")
            waiting = later
        scope.nodes = ordered


def _settled(node: gs.Node, ready: set[int], local: set[int]) -> bool:
    needs = list(node.inputs)
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            needs.extend(tensor for body in scopes(value) for inner in body.nodes for tensor in inner.inputs)
    if any(id(tensor) in local and id(tensor) not in ready for tensor in needs):
        return False
    ready.update(id(tensor) for tensor in node.outputs)
    return True


def _name_everything(graph: gs.Graph, log: Log) -> None:
    """Gives unnamed and equally named nodes a name of their own."""
    names = Names(graph)
    counts = Counter(node.name for scope in scopes(graph) for node in scope.nodes)
    renamed: list[str] = []
    seen: set[str] = set()
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.name and (counts[node.name] == 1 or node.name not in seen):
                seen.add(node.name)
                continue
            node.name = names.new(node.name or node.op)
            renamed.append(describe(node))
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


# --- types that the target lacks ---------------------------------------------------------------------------------

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def float64_to_float32(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Computes in float32 what the model computes in float64, where the target has no float64; says where."""
    if "float64" in target.types:
        return False
    double, single = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT
    changed: list[str] = []
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.dtype == np.float64:
            kind = "input" if any(tensor is item for item in graph.inputs) else "output"
            log.notes.append(f"{kind} {tensor.name!r} is float64 in the source; {target} has no float64: it is float32")
    done: set[int] = set()
    for scope in scopes(graph):
        for node in scope.nodes:
            hit = False
            for name in _TYPE_ATTRIBUTES:
                if node.attrs.get(name) == double and not node.domain:
                    node.attrs[name] = single
                    hit = True
            for name, value in node.attrs.items():
                if isinstance(value, gs.Constant) and value.dtype == np.float64:
                    node.attrs[name] = gs.Constant(value.name, np.asarray(value.values).astype(np.float32))
                    hit = True
            for tensor in (*node.inputs, *node.outputs):
                if id(tensor) not in done and tensor.dtype == np.float64:
                    done.add(id(tensor))
                    hit = True
                    _make_single(tensor)
            if hit:
                changed.append(describe(node))
        for tensor in (*scope.inputs, *scope.outputs):
            if tensor.dtype == np.float64:
                _make_single(tensor)
    if changed:
        log.add(
            "float64_to_float32",
            f"{target} has no float64; its parser would turn some of it into float32 unsaid.",
            changed,
        )
    return bool(changed)


def _make_single(tensor: gs.Tensor) -> None:
    if isinstance(tensor, gs.Constant):
        limits = np.finfo(np.float32)
        values = np.asarray(tensor.values)
        finite = np.isfinite(values)
        tensor.values = np.where(finite, np.clip(values, limits.min, limits.max), values).astype(np.float32)
    else:
        tensor.dtype = np.dtype(np.float32)


def int64_boundary_to_int32(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Makes int64 inputs and outputs int32 where the target has no int64, with a Cast inside.

    Between them the target's parser narrows by itself, and so the graph stays one that ONNX Runtime runs.
    """
    if "int64" in target.types:
        return False
    changed: list[str] = []
    names = Names(graph)
    for index, tensor in enumerate(graph.inputs):
        if tensor.dtype != np.int64:
            continue
        outer = gs.Variable(tensor.name, np.dtype(np.int32), list(tensor.shape) if tensor.shape is not None else None)
        tensor.name = names.new(f"{tensor.name}_int64")
        cast = Node("Cast", names.new("input_cast"), {"to": onnx.TensorProto.INT64}, [outer], [tensor], domain="")
        graph.nodes.insert(0, cast)
        graph.inputs[index] = outer
        changed.append(f"input {outer.name}")
    for index, tensor in enumerate(graph.outputs):
        if tensor.dtype != np.int64:
            continue
        outer = gs.Variable(tensor.name, np.dtype(np.int32), list(tensor.shape) if tensor.shape is not None else None)
        tensor.name = names.new(f"{tensor.name}_int64")
        cast = Node("Cast", names.new("output_cast"), {"to": onnx.TensorProto.INT32}, [tensor], [outer], domain="")
        graph.nodes.append(cast)
        graph.outputs[index] = outer
        changed.append(f"output {outer.name}")
    if changed:
        log.add("int64_boundary_to_int32", f"{target} has no int64: inputs and outputs are int32.", changed)
        log.notes.extend(f"{item} is int64 in the source; {target} has no int64: it is int32" for item in changed)
        _check_int64_constants(graph, target, log)
    return bool(changed)


def _check_int64_constants(graph: gs.Graph, target: Target, log: Log) -> None:
    limits = np.iinfo(np.int32)
    for scope in scopes(graph):
        for node in scope.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and tensor.dtype == np.int64 and node.op != "Slice":
                    values = np.asarray(tensor.values)
                    if values.size and (values.min() < limits.min or values.max() > limits.max):
                        log.notes.append(f"{describe(node)} has an int64 constant beyond int32: {target} will clamp it")


def refine_types(graph: gs.Graph) -> bool:
    """Lets what the passes have learnt about tensors reach those computed from them; True if that was anything.

    A node is looked at again when the types of its inputs are not those of the last time; of one that is seen for the
    first time, what the file states is believed where it is complete.
    """
    learnt = False
    for scope in scopes(graph):
        for node in scope.nodes:
            seen = tuple(_seen(tensor) for tensor in node.inputs)
            before = node.__dict__.get("inferred_from")
            node.inferred_from = seen
            complete = all(
                not tensor.name or (tensor.dtype is not None and tensor.shape is not None) for tensor in node.outputs
            )
            if before != seen and not (before is None and complete):
                learnt |= infer(node, scope.opset)
    return learnt


def _seen(tensor: gs.Tensor) -> tuple[object, ...]:
    """What inference knows of a tensor; a constant's values do not change while it is one."""
    shape = tensor.shape
    return (id(tensor), isinstance(tensor, gs.Constant), tensor.dtype, None if shape is None else tuple(shape))
