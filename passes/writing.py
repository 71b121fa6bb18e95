"""Graphs to ONNX files.

Every constant of a graph and its bodies becomes an initializer of the main graph (GraphSurgeon copies the weights that
a body reads into it); weights in files stay there or are copied one by one, so that a model of many gigabytes is
edited in megabytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, TensorProto
from onnx_graphsurgeon.util import misc

from .ir import (
    Node,
    StoredValues,
    collector_paused,
    constant_bytes,
    elem_type,
    keep_notes,
    name_tensors,
    node_metadata,
    scopes,
    set_type,
    tensor_proto,
    type_proto,
)
from .low_types import RoundedValues

INLINE_LIMIT = 64 << 20
"""A model with more new weights than this (bytes) keeps them in a ``.data`` file beside it."""
EXTERNAL_MIN = 4 << 10
"""Smaller tensors (bytes) stay in the ``.onnx`` file: shape inference and parsers need to see them."""
LONGEST_VECTOR = 1 << 16
"""ONNX's data propagation makes an object for each element of a vector of known length, gigabytes for a weight."""
COPY_CHUNK = 16 << 20
"""Bytes of a weight that are in memory at a time while it is copied."""
ALIGNMENT = 4096
"""Of tensors in a data file (bytes), so that readers can map them."""


@collector_paused()
def write(graph: gs.Graph, path: Path, *, beside: Path | None = None) -> tuple[str, ...]:
    """Writes ``graph`` to ``path`` and returns the names of the files written, data first.

    Weights that lie in a file of the folder ``beside`` (the one where the model will end up; by default that of
    ``path``) are referred to there. Of the others, those above EXTERNAL_MIN go to ``<path>.data`` if together they
    exceed INLINE_LIMIT; they are copied tensor by tensor. Raises OSError, as for a full disk.
    """
    home = (beside or path.parent).resolve()
    model, constants = _model(graph)
    places = {id(constant): _place(constant, home) for constant in constants}
    external = sum(constant_bytes(constant) for constant in constants if places[id(constant)] is None) > INLINE_LIMIT
    data = path.with_name(path.name + ".data")
    in_use = {place[0] for place in places.values() if place is not None}
    while data.name in in_use:  # the model was read from there
        data = data.with_name(data.name + ".data")
    with data.open("wb") if external else contextlib.nullcontext() as file:
        for constant in constants:
            place = places[id(constant)]
            if place is None and file is not None and constant_bytes(constant) > EXTERNAL_MIN:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                place = (data.name, file.tell())
                _copy(constant, file)
            model.graph.initializer.append(tensor_proto(constant) if place is None else _external(constant, *place))
    path.write_bytes(model.SerializeToString())
    return (data.name, path.name) if external else (path.name,)


def _place(constant: gs.Constant, home: Path) -> tuple[str, int] | None:
    """Where in the folder ``home`` the constant lies, as file and offset."""
    values = constant._values
    if isinstance(values, StoredValues) and values.file is not None and values.file.is_relative_to(home):
        return values.file.relative_to(home).as_posix(), values.offset
    return None


def _copy(constant: gs.Constant, file: BinaryIO) -> None:
    """Writes the constant's bytes to ``file``, those of another file piece by piece."""
    values = constant._values
    if isinstance(values, RoundedValues):
        for part in values.pieces():
            file.write(part.tobytes())
        return
    if not isinstance(values, StoredValues) or values.file is None:
        file.write(onnx.numpy_helper.from_array(np.asarray(constant.values, order="C")).raw_data)
        return
    with values.file.open("rb") as source:
        source.seek(values.offset)
        left = values.nbytes
        while left:
            piece = source.read(min(left, COPY_CHUNK))
            if not piece:
                raise OSError(f"{values.file} has become shorter while it was copied")
            left -= file.write(piece)


def _external(constant: gs.Constant, location: str, offset: int) -> TensorProto:
    proto = TensorProto(name=constant.name, data_type=elem_type(constant), dims=constant.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", constant_bytes(constant))):
        proto.external_data.add(key=key, value=str(value))
    if isinstance(constant._values, StoredValues):
        keep_notes(constant._values.tensor, proto)
    return proto


def to_proto(graph: gs.Graph, *, skeleton: bool = False) -> onnx.ModelProto:
    """``graph`` as a ModelProto in memory; a ``skeleton`` has inputs for the weights above EXTERNAL_MIN."""
    model, constants = _model(graph, bare=skeleton)
    for constant in constants:
        if skeleton and constant_bytes(constant) > EXTERNAL_MIN:
            info = value_info(constant)
            if len(constant.shape) == 1 and constant.shape[0] > LONGEST_VECTOR:
                info.type.tensor_type.shape.dim[0].dim_param = f"{constant.name}_0"
            model.graph.input.append(info)
        else:
            model.graph.initializer.append(tensor_proto(constant))
    return model


def _model(graph: gs.Graph, *, bare: bool = False) -> tuple[onnx.ModelProto, list[gs.Constant]]:
    """The proto without initializers, and the constants that it needs, under names of their own."""
    model = onnx.ModelProto(producer_name=graph.producer_name or None, producer_version=graph.producer_version or None)
    if "model_notes" in graph.__dict__:
        model.MergeFrom(graph.model_notes)
    model.ir_version = graph.ir_version or onnx.IR_VERSION
    _settle(graph)
    writer = Writer(bare=bare)
    writer.graph(graph, model.graph)
    model.functions.extend(function_proto(function, model.ir_version) for function in graph.functions)
    model.opset_import.extend(_opsets(graph, graph.functions))
    return model, list(writer.constants.values())


def _settle(graph: gs.Graph) -> None:
    """Prepares for all constants of the graph and its bodies to become initializers of the main graph.

    Each gets a name of its own; and since a body cannot return what is outside of it, an Identity does.
    """
    names = name_tensors(graph, constants_only=True)
    for scope in scopes(graph, functions=False):
        if scope is graph:
            continue
        local = {id(tensor) for tensor in scope.inputs}
        local.update(id(tensor) for node in scope.nodes for tensor in node.outputs)
        for index, tensor in enumerate(scope.outputs):
            if id(tensor) not in local:
                copy = gs.Variable(names.new(f"{tensor.name}_copy"))
                set_type(copy, type_proto(tensor))
                scope.nodes.append(Node("Identity", copy.name, {}, [tensor], [copy], domain=""))
                scope.outputs[index] = copy


def _opsets(graph: gs.Graph, functions: Iterable[gs.Function] = ()) -> list[onnx.OperatorSetIdProto]:
    """The imports that the nodes need, bodies included."""
    versions = {item.domain: item.version for item in graph.import_domains or ()}
    used = {node.domain or "" for scope in scopes(graph, functions=False) for node in scope.nodes}
    used.update(function.domain or "" for function in functions)
    for domain in sorted(used):
        versions.setdefault(domain, 1)
    if graph.opset is not None:  # even where every node is of another domain: what passes add is of this version
        versions[""] = graph.opset
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]


def function_proto(function: gs.Function, ir_version: int) -> onnx.FunctionProto:
    proto = onnx.FunctionProto(name=function.name, domain=function.domain or "")
    _merge_notes(function, proto)
    _settle(function)
    writer = Writer()
    proto.input.extend(tensor.name for tensor in function.inputs)
    proto.output.extend(tensor.name for tensor in function.outputs)
    nodes = [writer.node(node) for node in function.nodes]
    for tensor in function.outputs:
        if isinstance(tensor, gs.Constant):
            writer.constants.setdefault(id(tensor), tensor)
    for constant in writer.constants.values():  # a function has no initializers
        proto.node.add(op_type="Constant", output=[constant.name]).attribute.append(
            onnx.helper.make_attribute("value", tensor_proto(constant))
        )
    proto.node.extend(nodes)
    for name, default in function.attrs.items():
        if default is None:
            proto.attribute.append(name)
        else:
            proto.attribute_proto.append(writer.attribute(None, name, default))
    proto.opset_import.extend(_opsets(function))
    if ir_version >= 10:  # which brought the field
        tensors = (*function.inputs, *(tensor for node in function.nodes for tensor in node.outputs))
        proto.value_info.extend(value_info(tensor) for tensor in tensors if described(tensor))
    return proto


def _merge_notes(item: gs.Graph | gs.Node | gs.Tensor, proto: Any) -> None:
    """Adds what the file said of ``item`` in fields that the passes do not know."""
    notes = item.__dict__.get("notes")
    if notes is not None:
        proto.MergeFrom(notes)


@dataclass
class Writer:
    """Turns graphs and nodes into protos, and collects the constants that they read."""

    constants: dict[int, gs.Constant] = field(default_factory=dict)
    bare: bool = False
    """Nodes without their metadata, for what reads the proto and throws it away."""

    def graph(self, graph: gs.Graph, proto: onnx.GraphProto) -> None:
        _merge_notes(graph, proto)
        proto.name = graph.name or "graph"
        boundary = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
        for node in graph.nodes:
            proto.node.append(self.node(node))
            for tensor in node.outputs:
                if described(tensor) and id(tensor) not in boundary:
                    proto.value_info.append(value_info(tensor))
        for tensor in graph.outputs:
            if isinstance(tensor, gs.Constant):
                self.constants.setdefault(id(tensor), tensor)
        inputs = list(graph.inputs)
        for place, constant in graph.__dict__.get("defaults", ()):
            if id(constant) in self.constants:
                inputs.insert(place, constant)
        proto.input.extend(map(value_info, inputs))
        proto.output.extend(map(value_info, graph.outputs))

    def node(self, node: gs.Node) -> onnx.NodeProto:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                self.constants.setdefault(id(tensor), tensor)
        proto = onnx.NodeProto(
            op_type=node.op,
            name=node.name or None,
            domain=node.domain or None,
            input=[tensor.name for tensor in node.inputs],
            output=[tensor.name for tensor in node.outputs],
        )
        for name, value in node.attrs.items():
            proto.attribute.append(self.attribute(node, name, value))
        if not self.bare:
            for key, text in node_metadata(node).items():
                proto.metadata_props.add(key=key, value=text)
            _merge_notes(node, proto)
        return proto

    def attribute(self, node: gs.Node | None, name: str, value: Any) -> AttributeProto:
        """The attribute of ``node`` (None: of a function); a body's constants are collected too."""
        if isinstance(value, AttributeProto):
            return value
        if isinstance(value, gs.Graph):
            proto = AttributeProto(name=name, type=AttributeProto.GRAPH)
            self.graph(value, proto.g)
            return proto
        if isinstance(value, gs.Constant):
            return onnx.helper.make_attribute(name, tensor_proto(value))
        if isinstance(value, gs.Node.AttributeRef):
            kind = misc.convert_to_onnx_attr_type(value.type)
            return AttributeProto(name=name, type=kind, ref_attr_name=value.name)
        if isinstance(value, (list, tuple, np.ndarray)) and len(value) == 0:
            return AttributeProto(name=name, type=_empty_list(node, name))
        return onnx.helper.make_attribute(name, value)


def _empty_list(node: gs.Node | None, name: str) -> Any:
    """The attribute type of an empty list, of which the list itself does not tell."""
    read = node.__dict__.get("empty_lists", {}) if node is not None else {}
    if name in read:
        return read[name]
    if node is not None and onnx.defs.has(node.op, node.domain or ""):
        attributes = onnx.defs.get_schema(node.op, node.domain or "").attributes
        if name in attributes:
            declared: Any = attributes[name].type
            return declared.value
    return AttributeProto.INTS


def node_proto(node: gs.Node) -> onnx.NodeProto:
    """The node alone, without its constant inputs and its metadata."""
    return Writer(bare=True).node(node)


def described(tensor: gs.Tensor) -> bool:
    """Whether there is something to say of the tensor."""
    return bool(tensor.name) and (tensor.dtype is not None or not tensor.__dict__.keys().isdisjoint(_NOTED))


_NOTED = ("container", "notes")


def value_info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    proto = onnx.ValueInfoProto(name=tensor.name)
    _merge_notes(tensor, proto)
    kind = type_proto(tensor)
    if kind.WhichOneof("value") is not None:
        proto.type.CopyFrom(kind)
    return proto
