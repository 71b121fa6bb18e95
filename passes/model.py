"""ONNX files to onnx-graphsurgeon graphs and back, losing nothing on the way.

GraphSurgeon's own import and export drop each node's ``metadata_props`` (which say where in the user's code the node
came from), copy weights that live in outer graphs into every If and Loop body, and read external data from the
current directory. Here metadata stays on the node, every constant of a graph and its bodies is an initializer of the
main graph, and weights in external files are mapped, not read: a model of many gigabytes is edited in megabytes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

Array = npt.NDArray[Any]

INLINE_LIMIT = 64 << 20
"""A model with more new weights than this (bytes) keeps them in a ``.data`` file beside it."""
EXTERNAL_MIN = 4 << 10
"""Smaller tensors (bytes) stay in the ``.onnx`` file: shape inference and parsers need to see them."""

G_LOGGER.severity = G_LOGGER.ERROR


class ModelError(ValueError):
    """A file that is no ONNX model, or whose external data cannot be used."""


class StoredValues(LazyValues):  # type: ignore[misc]
    """A constant's values, left where they are (in the parsed file, or mapped from an external one) until asked for."""

    def __init__(self, tensor: TensorProto, file: Path | None = None, offset: int = 0) -> None:
        self.tensor = tensor
        self.file = file
        self.offset = offset
        self.shape = tuple(tensor.dims)
        self.dtype = numpy_dtype(tensor.data_type)
        self.nbytes = tensor_bytes(tensor)

    def load(self) -> Array:
        if self.file is None:
            return onnx.numpy_helper.to_array(self.tensor)
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))
        if self.nbytes == math.prod(self.shape) * self.dtype.itemsize:
            return raw.view(self.dtype).reshape(self.shape)
        packed = TensorProto(dims=self.shape, data_type=self.tensor.data_type, raw_data=raw.tobytes())
        return onnx.numpy_helper.to_array(packed)  # types of four bits, two to a byte


def numpy_dtype(elem_type: int) -> np.dtype[Any]:
    """The NumPy (or ml_dtypes) type of an ONNX element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def onnx_dtype(dtype: npt.DTypeLike) -> int:
    """The ONNX element type of a NumPy (or ml_dtypes) type."""
    elem_type: int = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return elem_type


def tensor_bytes(tensor: TensorProto) -> int:
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4, getattr(TensorProto, "FLOAT4E2M1", -1): 4}.get(tensor.data_type)
    count = math.prod(tensor.dims)
    return (count * bits + 7) // 8 if bits else count * numpy_dtype(tensor.data_type).itemsize


# --- reading -----------------------------------------------------------------------------------------------------


def read_proto(path: Path) -> onnx.ModelProto:
    """The parsed file, its external data left on the disk. Raises ModelError where it is no ONNX model."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(
            f"{path}: is not an ONNX file, or is cut short: its {len(data)} bytes are no ONNX protobuf. "
            "Export or download it again."
        ) from error
    if not model.opset_import or not model.graph.output:
        raise ModelError(f"{path}: holds no ONNX model (no opset or no graph outputs). Export or download it again.")
    return model


def read(path: Path) -> gs.Graph:
    """The model at ``path`` as a graph whose nodes carry their metadata (``node_metadata``).

    Raises ModelError for a file that is no ONNX model, and for external data that is missing, too short, or outside
    of the model's folder.
    """
    return from_proto(read_proto(path), path.parent)


def from_proto(model: onnx.ModelProto, folder: Path | None = None) -> gs.Graph:
    """The graph of ``model``; ``folder`` is where its external data lies."""
    for opset in model.opset_import:
        if opset.domain == "ai.onnx":
            opset.domain = ""
    graph = gs.import_onnx(model)
    graph.model_metadata = {item.key: item.value for item in model.metadata_props}
    _attach(graph, model.graph, folder)
    for function, proto in zip(graph.functions, model.functions, strict=True):
        _attach(function, proto, folder)
    return graph


def _attach(graph: gs.Graph, proto: onnx.GraphProto | onnx.FunctionProto, folder: Path | None) -> None:
    """Gives nodes their metadata and constants their stored values, bodies of control flow included."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            _store(tensor, folder)
        elif isinstance(tensor.dtype, int):
            tensor.dtype = numpy_dtype(tensor.dtype) if tensor.dtype else None
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        if node.domain in (None, "ai.onnx"):
            node.domain = ""
        node.metadata = {item.key: item.value for item in node_proto.metadata_props}
        attributes = {item.name: item for item in node_proto.attribute}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                _attach(value, attributes[name].g, folder)
            elif isinstance(value, gs.Constant):
                _store(value, folder)


def _store(tensor: gs.Constant, folder: Path | None) -> None:
    values = tensor._values
    if isinstance(values, StoredValues) or not isinstance(values, LazyValues):
        return
    if isinstance(values, SparseValues):
        tensor._values = values.load()
        return
    proto = values.tensor
    if proto.data_location != TensorProto.EXTERNAL:
        tensor._values = StoredValues(proto)
        return
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ModelError(f"tensor {proto.name!r}: has external data ({location!r}), and the model has no folder")
    file = (folder / location).resolve()
    if not location or not file.is_relative_to(folder.resolve()):
        raise ModelError(
            f"tensor {proto.name!r}: its external data {location!r} lies outside of the model's folder {folder}. "
            "Put the data file beside the model and save the model again."
        )
    if not file.is_file():
        raise ModelError(
            f"tensor {proto.name!r}: its external data file {location!r} is missing in {folder}. "
            "Copy it there, beside the .onnx file."
        )
    offset, size = int(entries.get("offset", 0)), tensor_bytes(proto)
    if int(entries.get("length", size)) != size or offset + size > file.stat().st_size:
        raise ModelError(
            f"tensor {proto.name!r}: needs {size} bytes at offset {offset} of {location!r}, which has "
            f"{file.stat().st_size}: the file is cut short or belongs to another model."
        )
    tensor._values = StoredValues(proto, file, offset)


# --- writing -----------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Turns a graph into a ModelProto; ``weights`` decides what becomes of each constant's bytes."""

    names: set[str] = field(default_factory=set)
    constants: dict[int, gs.Constant] = field(default_factory=dict)

    def graph(self, graph: gs.Graph, proto: onnx.GraphProto) -> None:
        proto.name = graph.name or "graph"
        proto.doc_string = graph.doc_string or ""
        proto.input.extend(self.value_info(tensor) for tensor in graph.inputs)
        proto.output.extend(self.value_info(tensor) for tensor in graph.outputs)
        boundary = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        for tensor in graph.outputs:
            if isinstance(tensor, gs.Constant):
                self.constants.setdefault(id(tensor), tensor)
        for node in graph.nodes:
            proto.node.append(self.node(node))
            for tensor in node.outputs:
                if tensor.name and tensor.name not in boundary and tensor.dtype is not None:
                    proto.value_info.append(self.value_info(tensor))

    def node(self, node: gs.Node) -> onnx.NodeProto:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                self.constants.setdefault(id(tensor), tensor)
        proto = onnx.NodeProto(op_type=node.op, name=node.name or "", domain=node.domain or "")
        proto.attribute.extend(self.attribute(node, name, value) for name, value in node.attrs.items())
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        for key, value in node_metadata(node).items():
            proto.metadata_props.add(key=key, value=value)
        return proto

    def attribute(self, node: gs.Node, name: str, value: Any) -> AttributeProto:
        if isinstance(value, gs.Graph):
            proto = AttributeProto(name=name, type=AttributeProto.GRAPH)
            self.graph(value, proto.g)
            return proto
        if isinstance(value, gs.Constant):
            return onnx.helper.make_attribute(name, tensor_proto(value))
        if isinstance(value, gs.Node.AttributeRef):
            kind = gs.util.misc.convert_to_onnx_attr_type(value.type)
            return AttributeProto(name=name, type=kind, ref_attr_name=value.name)
        if isinstance(value, (list, tuple, np.ndarray)) and len(value) == 0:
            declared: Any = onnx.defs.get_schema(node.op, node.domain or "").attributes[name].type
            return AttributeProto(name=name, type=declared.value)
        return onnx.helper.make_attribute(name, value)

    @staticmethod
    def value_info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
        proto = onnx.ValueInfoProto(name=tensor.name)
        if tensor.dtype is None:
            return proto
        kind = tensor.type if isinstance(tensor, gs.Variable) else "tensor_type"
        if kind == "sequence_type":
            proto.type.sequence_type.elem_type.tensor_type.elem_type = onnx_dtype(tensor.dtype)
        elif kind == "tensor_type":
            proto.type.CopyFrom(type_proto(tensor))
        return proto

    def function(self, function: gs.Function) -> onnx.FunctionProto:
        proto = onnx.FunctionProto(
            name=function.name, domain=function.domain or "", doc_string=function.doc_string or ""
        )
        proto.input.extend(tensor.name for tensor in function.inputs)
        proto.output.extend(tensor.name for tensor in function.outputs)
        inner = _Writer()
        nodes = [inner.node(node) for node in function.nodes]
        for constant in inner.constants.values():  # a function has no initializers
            proto.node.add(op_type="Constant", output=[constant.name]).attribute.append(
                onnx.helper.make_attribute("value", tensor_proto(constant))
            )
        proto.node.extend(nodes)
        for name, default in function.attrs.items():
            if default is None:
                proto.attribute.append(name)
            else:
                proto.attribute_proto.append(onnx.helper.make_attribute(name, default))
        proto.opset_import.extend(_opsets(function))
        return proto


def node_proto(node: gs.Node) -> onnx.NodeProto:
    """The node alone; its constant inputs are left out."""
    return _Writer().node(node)


def to_proto(graph: gs.Graph, *, skeleton: bool = False) -> onnx.ModelProto:
    """``graph`` as a ModelProto in memory; a ``skeleton`` has no weights above EXTERNAL_MIN, only their shapes."""
    model, constants = _model(graph)
    for constant in constants:
        if skeleton and _nbytes(constant) > EXTERNAL_MIN:
            stub = TensorProto(name=constant.name, data_type=onnx_dtype(constant.dtype), dims=constant.shape)
            stub.data_location = TensorProto.EXTERNAL
            stub.external_data.add(key="location", value="not-here")
            model.graph.initializer.append(stub)
        else:
            model.graph.initializer.append(tensor_proto(constant))
    return model


def write(graph: gs.Graph, path: Path, *, beside: Path | None = None) -> tuple[str, ...]:
    """Writes ``graph`` to ``path`` and returns the names of the files written, data first.

    Weights that lie in a file of the folder ``beside`` (the one where the model will end up; by default that of
    ``path``) are referred to there. Of the others, those above EXTERNAL_MIN go to ``<path>.data`` if together they
    exceed INLINE_LIMIT; they are copied tensor by tensor. Raises OSError, as for a full disk.
    """
    home = (beside or path.parent).resolve()
    model, constants = _model(graph)
    own = [constant for constant in constants if _home(constant) != home]
    external = sum(map(_nbytes, own)) > INLINE_LIMIT
    data = path.with_name(path.name + ".data")
    written: tuple[str, ...] = (path.name,)
    with data.open("wb") if external else contextlib.nullcontext() as file:
        for constant in constants:
            values = constant._values
            if _home(constant) == home:
                name, offset = values.file.name, values.offset
            elif file is not None and _nbytes(constant) > EXTERNAL_MIN:
                file.write(b"\0" * (-file.tell() % 4096))  # aligned, so that readers can map it
                name, offset = data.name, file.tell()
                file.write(_raw(constant))
            else:
                model.graph.initializer.append(tensor_proto(constant))
                continue
            proto = TensorProto(name=constant.name, data_type=_elem_type(constant), dims=constant.shape)
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (("location", name), ("offset", offset), ("length", _nbytes(constant))):
                proto.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(proto)
    path.write_bytes(model.SerializeToString())
    return (data.name, *written) if external else written


def _model(graph: gs.Graph) -> tuple[onnx.ModelProto, list[gs.Constant]]:
    """The proto without initializers, and the constants that it needs, under names of their own."""
    writer = _Writer()
    model = onnx.ModelProto(producer_name=graph.producer_name or "", producer_version=graph.producer_version or "")
    _unique_constants(graph)
    writer.graph(graph, model.graph)
    model.functions.extend(writer.function(function) for function in graph.functions)
    model.opset_import.extend(_opsets(graph))
    model.ir_version = graph.ir_version or onnx.IR_VERSION
    for key, value in getattr(graph, "model_metadata", {}).items():
        model.metadata_props.add(key=key, value=value)
    return model, list(writer.constants.values())


def _unique_constants(graph: gs.Graph) -> None:
    """Renames constants of different bodies that share a name, since all become initializers of the main graph."""
    seen: dict[str, gs.Tensor] = {}
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            for tensor in (*node.inputs, *node.outputs):
                if not tensor.name or seen.setdefault(tensor.name, tensor) is tensor:
                    continue
                if isinstance(tensor, gs.Constant) or isinstance(seen[tensor.name], gs.Constant):
                    loser = tensor if isinstance(tensor, gs.Constant) else seen[tensor.name]
                    seen[tensor.name] = tensor if loser is not tensor else seen[tensor.name]
                    loser.name = unused_name(loser.name, seen)
                    seen[loser.name] = loser


def unused_name(stem: str, taken: Container[str]) -> str:
    """``stem``, with the first number that makes it new."""
    number = 1
    while f"{stem}_{number}" in taken:
        number += 1
    return f"{stem}_{number}"


def _opsets(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """The imports that the nodes need, bodies included."""
    versions = {item.domain: item.version for item in graph.import_domains or ()}
    if graph.opset is not None:
        versions[""] = graph.opset
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            versions.setdefault(node.domain or "", 1)
    for function in getattr(graph, "functions", ()):
        versions.setdefault(function.domain or "", 1)
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _home(constant: gs.Constant) -> Path | None:
    values = constant._values
    return values.file.parent if isinstance(values, StoredValues) and values.file is not None else None


def _nbytes(constant: gs.Constant) -> int:
    values = constant._values
    if isinstance(values, StoredValues):
        return values.nbytes
    return tensor_bytes(TensorProto(data_type=onnx_dtype(values.dtype), dims=values.shape))


def _elem_type(constant: gs.Constant) -> int:
    values = constant._values
    return int(values.tensor.data_type) if isinstance(values, StoredValues) else onnx_dtype(values.dtype)


def _raw(constant: gs.Constant) -> Any:
    """The constant's bytes, as an object that a file can write."""
    values = constant._values
    if isinstance(values, StoredValues) and values.file is not None:
        return np.memmap(values.file, np.uint8, "r", values.offset, (values.nbytes,))
    return tensor_proto(constant).raw_data


def tensor_proto(constant: gs.Constant) -> TensorProto:
    """The constant with its values inside, as ``raw_data`` (strings excepted)."""
    values = constant._values
    if isinstance(values, StoredValues) and values.file is None and values.tensor.HasField("raw_data"):
        proto = values.tensor
        proto.name = constant.name
        return proto
    array = values.load() if isinstance(values, StoredValues) else values
    return onnx.numpy_helper.from_array(np.asarray(array, order="C"), constant.name)


# --- looking around ----------------------------------------------------------------------------------------------


def node_metadata(node: gs.Node) -> dict[str, str]:
    """The node's ``metadata_props``; where it came from, among them."""
    metadata: dict[str, str] = node.__dict__.setdefault("metadata", {})
    return metadata


def scopes(graph: gs.Graph, *, functions: bool = True) -> Iterator[gs.Graph]:
    """The graph, the bodies of its control flow at any depth, and its local functions with theirs."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from scopes(value, functions=False)
    if functions:
        for function in getattr(graph, "functions", ()):
            yield from scopes(function, functions=False)


def type_proto(tensor: gs.Tensor) -> onnx.TypeProto:
    """The tensor's element type and shape; dimensions that are unknown have no name and no value."""
    proto = onnx.TypeProto()
    proto.tensor_type.elem_type = _elem_type(tensor) if isinstance(tensor, gs.Constant) else onnx_dtype(tensor.dtype)
    if tensor.shape is not None:
        proto.tensor_type.shape.SetInParent()
        for size in tensor.shape:
            dim = proto.tensor_type.shape.dim.add()
            if isinstance(size, str):
                dim.dim_param = size
            elif size is not None and size >= 0:
                dim.dim_value = int(size)
    return proto


def set_type(tensor: gs.Variable, proto: onnx.TypeProto) -> None:
    """Gives ``tensor`` the type of ``proto``, where that is a tensor's."""
    if not proto.HasField("tensor_type") or not proto.tensor_type.elem_type:
        return
    tensor.dtype = numpy_dtype(proto.tensor_type.elem_type)
    if proto.tensor_type.HasField("shape"):
        dims = proto.tensor_type.shape.dim
        tensor.shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims]
