"""Types that the target lacks are replaced by narrower ones, and the user is told.

TensorRT's parsers do some of it unsaid; said in the graph, ONNX Runtime shows what it costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto

from .framework import Log
from .ir import Names, Node, calls, function_key, scopes
from .provenance import describe

if TYPE_CHECKING:
    from bridge.target import Target

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def float64_to_float32(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Computes in float32 what the model computes in float64, where the target has no float64; says where."""
    if "float64" in target.types:
        return False
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.op == "BitCast" and any(tensor.dtype == np.float64 for tensor in (*node.inputs, *node.outputs)):
                log.notes.append(f"{target} has no float64, and {describe(node)} reads or makes the bits of one")
                return False
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for tensor in tensors:
            if tensor.dtype == np.float64:
                log.notes.append(
                    f"{kind} {tensor.name!r} is float64 in the source; {target} has no float64: it is float32"
                )
    changed: list[str] = []
    type_names = _type_attributes(graph)
    for scope in scopes(graph):
        for node in scope.nodes:
            hit = [_narrow(tensor) for tensor in (*node.inputs, *node.outputs)]
            typed = type_names.get(calls(node), () if node.domain else _TYPE_ATTRIBUTES)
            for name, value in node.attrs.items():
                if isinstance(value, gs.Constant):
                    hit.append(_narrow(value))
                elif isinstance(value, AttributeProto):
                    hit.append(_narrow_type(value.tp))
                elif isinstance(value, int) and value == _DOUBLE and name in typed:
                    node.attrs[name] = onnx.TensorProto.FLOAT
                    hit.append(True)
            if any(hit):
                changed.append(describe(node))
        for tensor in (*scope.inputs, *scope.outputs):
            _narrow(tensor)
    for function in graph.functions:
        for name in type_names[function_key(function)]:
            if function.attrs.get(name) == _DOUBLE:
                function.attrs[name] = onnx.TensorProto.FLOAT
    if changed:
        log.add(
            "float64_to_float32",
            f"{target} has no float64; its parser would turn some of it into float32 unsaid.",
            changed,
        )
    return bool(changed)


_DOUBLE = onnx.TensorProto.DOUBLE


def _type_attributes(graph: gs.Graph) -> dict[tuple[str, str, str], set[str]]:
    """Of each local function, the attributes that give an element type to a node inside, or in turn to a function."""
    found: dict[tuple[str, str, str], set[str]] = {function_key(function): set() for function in graph.functions}
    for _ in graph.functions:  # each round goes one call further out
        for function in graph.functions:
            for scope in scopes(function, functions=False):
                for node in scope.nodes:
                    for name, value in node.attrs.items():
                        typed = found.get(calls(node), () if node.domain else _TYPE_ATTRIBUTES)
                        if isinstance(value, gs.Node.AttributeRef) and name in typed:
                            found[function_key(function)].add(value.name)
    return found


def _narrow(tensor: gs.Tensor) -> bool:
    """Makes a tensor of float64, or a container of such, one of float32; True if it was one."""
    container = tensor.__dict__.get("container")
    if container is not None:
        return _narrow_type(container)
    if tensor.dtype != np.float64:
        return False
    if isinstance(tensor, gs.Constant):
        values = np.asarray(tensor.values)
        limits = np.finfo(np.float32)
        clipped = np.where(np.isfinite(values), np.clip(values, limits.min, limits.max), values)
        tensor.values = clipped.astype(np.float32)
    else:
        tensor.dtype = np.dtype(np.float32)
    return True


def _narrow_type(proto: onnx.TypeProto) -> bool:
    kind = proto.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        inner = getattr(proto, kind)
        narrow = inner.elem_type == _DOUBLE
        if narrow:
            inner.elem_type = onnx.TensorProto.FLOAT
        return bool(narrow)
    if kind in ("sequence_type", "optional_type"):
        return _narrow_type(getattr(proto, kind).elem_type)
    return kind == "map_type" and _narrow_type(proto.map_type.value_type)


def int64_boundary_to_int32(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Makes int64 inputs and outputs int32 where the target has no int64, with a Cast inside.

    Between them the target's parser narrows by itself, and so the graph stays one that ONNX Runtime runs.
    """
    if "int64" in target.types:
        return False
    names = Names(graph)
    outer: dict[int, gs.Variable] = {}
    casts: list[gs.Node] = []
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for index, tensor in enumerate(tensors):
            if tensor.dtype != np.int64:
                continue
            if id(tensor) not in outer:  # else an input that is an output too
                shape = list(tensor.shape) if tensor.shape is not None else None
                narrow = outer[id(tensor)] = gs.Variable(tensor.name, np.dtype(np.int32), shape)
                tensor.name = names.new(f"{tensor.name}_int64")
                if log.recorder is not None:
                    log.recorder.renamed[tensor.name] = narrow.name
                way = [narrow], [tensor], onnx.TensorProto.INT64
                if kind == "output":
                    way = [tensor], [narrow], onnx.TensorProto.INT32
                casts.append(Node("Cast", names.new(f"{kind}_cast"), {"to": way[2]}, *way[:2], domain=""))
            tensors[index] = outer[id(tensor)]
            log.notes.append(
                f"{kind} {tensors[index].name!r} is int64 in the source; {target} has no int64: it is int32"
            )
    if not casts:
        return False
    inner = graph.nodes
    graph.nodes = [node for node in casts if node.attrs["to"] == onnx.TensorProto.INT64]
    graph.nodes += [*inner, *(node for node in casts if node.attrs["to"] == onnx.TensorProto.INT32)]
    log.add(
        "int64_boundary_to_int32",
        f"{target} has no int64: inputs and outputs are int32.",
        [node.name for node in casts],
    )
    _check_int64_constants(graph, target, log)
    return True


def _check_int64_constants(graph: gs.Graph, target: Target, log: Log) -> None:
    limits = np.iinfo(np.int32)
    for scope in scopes(graph):
        for node in scope.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and tensor.dtype == np.int64 and node.op != "Slice":
                    values = np.asarray(tensor.values)
                    if values.size and (values.min() < limits.min or values.max() > limits.max):
                        log.notes.append(f"{describe(node)} has an int64 constant beyond int32: {target} will clamp it")
