"""ONNX files to graphs, losing nothing on the way.

GraphSurgeon's own import drops metadata, doc strings and several kinds of attributes and types, takes a body's tensor
for the outer one of the same name, and reads external data from the current directory.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, TensorProto
from onnx_graphsurgeon.util import misc

from .ir import Constant, ModelError, Node, StoredValues, collector_paused, numpy_dtype, set_type, tensor_bytes

Tensors = MutableMapping[str, gs.Tensor]


def read(path: Path) -> gs.Graph:
    """The model at ``path`` as a graph whose nodes carry their metadata (``node_metadata``).

    Initializers that nothing reads are left out. Raises ModelError for a file that is no ONNX model, for one whose
    nodes read what nothing makes, and for external data that is missing, too short, or outside of the model's folder.
    """
    return from_proto(read_proto(path), path.parent)


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


@collector_paused()
def from_proto(model: onnx.ModelProto, folder: Path | None = None) -> gs.Graph:
    """The graph of ``model``; ``folder`` is where its external data lies. The graph keeps parts of ``model``."""
    functions = [_function(function, model, folder) for function in model.functions]
    graph = _Reader(folder, *_opsets(model.opset_import)).graph(model.graph, {}, functions)
    graph.ir_version = model.ir_version
    graph.producer_name, graph.producer_version = model.producer_name, model.producer_version
    graph.model_notes = _rest(
        model, "graph", "functions", "opset_import", "ir_version", "producer_name", "producer_version"
    )
    return graph


def _rest(proto: Any, *known: str) -> Any:
    """What ``proto`` has in other fields than the ``known``."""
    return type(proto)(**{field.name: value for field, value in proto.ListFields() if field.name not in known})


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> tuple[list[onnx.OperatorSetIdProto], int | None]:
    """The imports, the standard domain under its short name, and that domain's version."""
    versions = {"" if item.domain == "ai.onnx" else item.domain: item.version for item in imports}
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()], versions.get("")


def _function(proto: onnx.FunctionProto, model: onnx.ModelProto, folder: Path | None) -> gs.Function:
    reader = _Reader(folder, *_opsets(proto.opset_import or model.opset_import))
    tensors: Tensors = {}
    for name in proto.input:
        tensors[name] = gs.Variable(name)
    reader.declare(proto.node, tensors, proto.name)
    reader.describe(proto.value_info, tensors)
    attributes = dict.fromkeys(proto.attribute)
    function = gs.Function(
        proto.name,
        proto.domain,
        nodes=[reader.node(node, tensors) for node in proto.node],
        inputs=[tensors[name] for name in proto.input],
        outputs=[reader.find(name, tensors, f"function {proto.name!r}") for name in proto.output],
        opset=reader.opset,
        import_domains=reader.imports,
        attrs={**attributes, **{item.name: reader.attribute(item, tensors) for item in proto.attribute_proto}},
    )
    known = ("name", "domain", "input", "output", "attribute", "attribute_proto", "node", "opset_import", "value_info")
    function.notes = _rest(proto, *known)
    return function


@dataclass(frozen=True)
class _Reader:
    """Reads graphs of one opset; tensors are known by name, those of a body in a map before those around it."""

    folder: Path | None
    imports: list[onnx.OperatorSetIdProto]
    opset: int | None
    files: dict[str, tuple[Path, int]] = field(default_factory=dict)
    """Where external data lies, by what the tensors say, and how large the files are: many tensors share one."""

    def graph(
        self, proto: onnx.GraphProto, outer: Mapping[str, gs.Tensor], functions: Sequence[gs.Function] = ()
    ) -> gs.Graph:
        local: dict[str, gs.Tensor] = {}
        for initializer in proto.initializer:
            local[initializer.name] = Constant(initializer.name, self.stored(initializer))
        for sparse in proto.sparse_initializer:
            local[sparse.values.name] = Constant(sparse.values.name, _dense(sparse))
        for info in proto.input:
            local.setdefault(info.name, gs.Variable(info.name))
        where = f"graph {proto.name!r}"
        self.declare(proto.node, local, where)
        self.describe((*proto.input, *proto.output, *proto.value_info), local)
        tensors: Tensors = ChainMap(local, outer) if outer else local  # type: ignore[arg-type]
        inputs = [local[info.name] for info in proto.input]
        graph = gs.Graph(
            nodes=[self.node(node, tensors) for node in proto.node],
            inputs=[tensor for tensor in inputs if isinstance(tensor, gs.Variable)],
            outputs=[self.find(info.name, tensors, where) for info in proto.output],
            name=proto.name,
            opset=self.opset,
            import_domains=self.imports,
            functions=functions,
        )
        graph.defaults = [(place, tensor) for place, tensor in enumerate(inputs) if isinstance(tensor, gs.Constant)]
        known = ("name", "node", "input", "output", "value_info", "initializer", "sparse_initializer")
        graph.notes = _rest(proto, *known)
        return graph

    def declare(self, nodes: Iterable[onnx.NodeProto], local: Tensors, where: str) -> None:
        """Makes the tensors that ``nodes`` make."""
        for node in nodes:
            for name in node.output:
                if name in local:
                    raise ModelError(f"{where} makes the tensor {name!r} twice, once by {_called(node)}")
                if name:
                    local[name] = gs.Variable(name)

    @staticmethod
    def describe(infos: Iterable[onnx.ValueInfoProto], local: Tensors) -> None:
        """Gives tensors the types that the file states, those of inputs and outputs first."""
        for info in infos:
            tensor = local.get(info.name)
            if not isinstance(tensor, gs.Variable):
                continue
            if tensor.dtype is None or tensor.shape is None:
                set_type(tensor, info.type)
            if info.doc_string or info.metadata_props:
                tensor.notes = _rest(info, "name", "type")

    @staticmethod
    def find(name: str, tensors: Mapping[str, gs.Tensor], reader: str) -> gs.Tensor:
        try:
            return tensors[name]
        except KeyError:
            raise ModelError(f"{reader} reads the tensor {name!r}, which nothing makes") from None

    def node(self, proto: onnx.NodeProto, tensors: Tensors) -> Node:
        node = Node(
            proto.op_type,
            proto.name,
            {item.name: self.attribute(item, tensors) for item in proto.attribute},
            [self.find(name, tensors, _called(proto)) if name else gs.Variable("") for name in proto.input],
            [tensors[name] if name else gs.Variable("") for name in proto.output],
            domain="" if proto.domain == "ai.onnx" else proto.domain,
        )
        sparse = next((item.sparse_tensor for item in proto.attribute if item.name == "sparse_value"), None)
        if sparse is not None and proto.op_type == "Constant" and not node.domain:
            node.attrs = {"value": Constant("", _dense(sparse))}
        node.metadata = {item.key: item.value for item in proto.metadata_props}
        notes = _rest(proto, "op_type", "name", "domain", "input", "output", "attribute", "metadata_props")
        if notes.ListFields():
            node.notes = notes
        lists = {name for name, value in node.attrs.items() if isinstance(value, list) and not value}
        empty = {item.name: item.type for item in proto.attribute if item.name in lists}
        if empty:
            node.empty_lists = empty
        return node

    def attribute(self, proto: AttributeProto, tensors: Tensors) -> Any:
        """The attribute's value; of the kinds that GraphSurgeon has no form for, the proto itself."""
        if proto.ref_attr_name:
            return gs.Node.AttributeRef(proto.ref_attr_name, misc.convert_from_onnx_attr_type(proto.type))
        kind = proto.type
        if kind == AttributeProto.INT:
            return proto.i
        if kind == AttributeProto.INTS:
            return list(proto.ints)
        if kind == AttributeProto.FLOAT:
            return proto.f
        if kind == AttributeProto.FLOATS:
            return list(proto.floats)
        if kind == AttributeProto.STRING:
            return _text(proto.s)
        if kind == AttributeProto.STRINGS:
            return [_text(item) for item in proto.strings]
        if kind == AttributeProto.TENSOR:
            return Constant(proto.t.name, self.stored(proto.t))
        if kind == AttributeProto.GRAPH:
            return self.graph(proto.g, tensors)
        return proto

    def stored(self, proto: TensorProto) -> StoredValues:
        """The tensor's values, left where they are. Raises ModelError where they are not there."""
        if proto.data_location != TensorProto.EXTERNAL:
            return StoredValues(proto)
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        if self.folder is None:
            raise ModelError(f"tensor {proto.name!r}: has external data ({location!r}), and the model has no folder")
        if location not in self.files:
            self.files[location] = _data_file(location, proto.name, self.folder)
        file, there = self.files[location]
        size = tensor_bytes(proto.data_type, tuple(proto.dims))
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
        except ValueError as error:
            raise ModelError(f"tensor {proto.name!r}: its place in {location!r} is no number: {error}") from error
        if offset < 0 or length != size or offset + size > there:
            raise ModelError(
                f"tensor {proto.name!r}: needs {size} bytes, said to be {length} at offset {offset} of {location!r}, "
                f"which has {there}: the file is cut short or belongs to another model."
            )
        return StoredValues(proto, file, offset)


def _data_file(location: str, reader: str, folder: Path) -> tuple[Path, int]:
    """A file of external data, which the tensor ``reader`` has its values in, and its size. Raises ModelError."""
    file = (folder / location).resolve()
    if not location or not file.is_relative_to(folder.resolve()):
        raise ModelError(
            f"tensor {reader!r}: its external data {location!r} lies outside of the model's folder "
            f"{folder}. Put the data file beside the model and save the model again."
        )
    if not file.is_file():
        raise ModelError(
            f"tensor {reader!r}: its external data file {location!r} is missing in {folder}. "
            "Copy it there, beside the .onnx file."
        )
    return file, file.stat().st_size


def _called(node: onnx.NodeProto) -> str:
    return f"node {node.name!r} ({node.op_type})"


def _text(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _dense(sparse: onnx.SparseTensorProto) -> np.ndarray[Any, Any]:
    """A sparse initializer or constant in full: TensorRT's parsers know no other."""
    dense = np.zeros(tuple(sparse.dims), numpy_dtype(sparse.values.data_type))
    values, places = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    if places.ndim == 1:
        dense.reshape(-1)[places] = values
    else:
        dense[tuple(places.T)] = values
    return dense
