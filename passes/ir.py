"""What a graph is to the passes: GraphSurgeon's, with what GraphSurgeon forgets.

Nodes keep their metadata (where in the user's code they came from) and are compared by identity; constants leave their
values where they are, in the parsed file or mapped from an external one, until somebody asks.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

Array = npt.NDArray[Any]

G_LOGGER.severity = G_LOGGER.ERROR


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps Python from looking for garbage among a graph's million objects, a quarter of the time of each stage."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


class ModelError(ValueError):
    """A file that is no ONNX model, a model that is none, or external data that cannot be used."""


# --- nodes and graphs --------------------------------------------------------------------------------------------


class Node(gs.Node):  # type: ignore[misc]
    """A node that is equal to itself alone; GraphSurgeon compares names and attributes to find one in a list."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    metadata: dict[str, str]
    """Its ``metadata_props``."""
    notes: onnx.NodeProto
    """What the file says of it that is no part of a GraphSurgeon node (doc string, overload)."""
    empty_lists: dict[str, int]
    """The attribute types of those attributes that are empty lists, of which a list in Python does not tell."""


def node_metadata(node: gs.Node) -> dict[str, str]:
    """The node's ``metadata_props``; where it came from, among them."""
    metadata: dict[str, str] = node.__dict__.setdefault("metadata", {})
    return metadata


CONTROL_FLOW = frozenset(("If", "Loop", "Scan", "SequenceMap"))
"""The operators of the standard that have bodies."""


def bodies(node: gs.Node) -> Iterator[gs.Graph]:
    """The graphs that an If, Loop or Scan runs."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield value


PLUGIN_DOMAIN = "bridge.plugins"
"""Of nodes that call a plugin, and of the functions that say what it computes; a number may follow."""


def is_plugin_call(node: gs.Node) -> bool:
    return _of_plugins(node.domain)


def is_reference(function: gs.Function) -> bool:
    """Whether the local function says what a plugin computes: it is for ONNX Runtime alone, and no pass changes it."""
    return _of_plugins(function.domain)


def _of_plugins(domain: str | None) -> bool:
    return bool(domain) and (domain == PLUGIN_DOMAIN or str(domain).startswith(f"{PLUGIN_DOMAIN}."))


def scopes(graph: gs.Graph, *, functions: bool = True, references: bool = False) -> Iterator[gs.Graph]:
    """The graph, the bodies of its control flow at any depth, and its local functions with theirs.

    What a plugin computes (``is_reference``) is left out unless ``references``.
    """
    yield graph
    holders = [node for node in graph.nodes if node.op in CONTROL_FLOW or node.domain]
    for body in [value for node in holders for value in node.attrs.values() if isinstance(value, gs.Graph)]:
        yield from scopes(body, functions=False)
    if functions:
        for function in getattr(graph, "functions", ()):
            if is_reference(function) and not references:
                continue
            yield from scopes(function, functions=False)


def detach(graph: gs.Graph) -> None:
    """Takes the nodes of a graph that goes, and of its bodies, off the tensors that they read."""
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            node.inputs.clear()


def calls(node: gs.Node) -> tuple[str, str, str]:
    """The key of the local function that the node calls, if there is one of this key (see ``function_key``)."""
    notes = node.__dict__.get("notes")
    return (node.domain or "", node.op, notes.overload if notes is not None else "")


def function_key(function: gs.Function) -> tuple[str, str, str]:
    notes = function.__dict__.get("notes")
    return (function.domain or "", function.name, notes.overload if notes is not None else "")


class Names:
    """Names that are used nowhere in a model, its bodies and functions included."""

    def __init__(self, graph: gs.Graph | None = None) -> None:
        self.graph = graph
        self.counters: dict[str, int] = {}

    @functools.cached_property
    def taken(self) -> set[str]:
        """Looked for when the first name is asked for, which may be never."""
        taken = {""}
        for scope in scopes(self.graph) if self.graph is not None else ():
            for node in scope.nodes:
                taken.add(node.name)
                taken.update([tensor.name for tensor in node.inputs])
                taken.update([tensor.name for tensor in node.outputs])
            taken.update([tensor.name for tensor in (*scope.inputs, *scope.outputs)])
        return taken

    def new(self, stem: str) -> str:
        """``stem``, with the first number that makes it new where it is taken."""
        name = stem
        while name in self.taken:
            self.counters[stem] = self.counters.get(stem, 0) + 1
            name = f"{stem}_{self.counters[stem]}"
        self.taken.add(name)
        return name


def name_tensors(graph: gs.Graph, *, constants_only: bool = False) -> Names:
    """Gives the tensors of the graph and its bodies names of their own; the boundary of the graph keeps its names."""
    names = Names()
    boundary = (*graph.inputs, *graph.outputs)
    seen = {id(tensor) for tensor in boundary}
    names.taken.update([tensor.name for tensor in boundary])
    rest: list[gs.Tensor] = []
    for scope in scopes(graph, functions=False):
        for tensors in (scope.inputs, *((*node.outputs, *node.inputs) for node in scope.nodes), scope.outputs):
            for tensor in tensors:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    rest.append(tensor)
    if constants_only:
        names.taken.update([tensor.name for tensor in rest if isinstance(tensor, gs.Variable)])
        rest = [tensor for tensor in rest if isinstance(tensor, gs.Constant)]
    for tensor in rest:
        if tensor.name or isinstance(tensor, gs.Constant):
            tensor.name = names.new(tensor.name)
    return names


# --- types -------------------------------------------------------------------------------------------------------


def numpy_dtype(elem_type: int) -> np.dtype[Any]:
    """The NumPy (or ml_dtypes) type of an ONNX element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


@functools.cache
def type_name(dtype: npt.DTypeLike) -> str:
    """The name of a type, which NumPy puts together anew each time that it is asked."""
    return str(np.dtype(dtype).name)


def onnx_dtype(dtype: npt.DTypeLike) -> int:
    """The ONNX element type of a NumPy (or ml_dtypes) type."""
    elem_type: int = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return elem_type


def type_proto(tensor: gs.Tensor) -> onnx.TypeProto:
    """The tensor's type, empty where nothing is known; dimensions that are unknown have no name and no value."""
    proto = onnx.TypeProto()
    if tensor.__dict__.get("container") is not None:
        proto.CopyFrom(tensor.container)
        return proto
    if tensor.dtype is None:
        return proto
    proto.tensor_type.elem_type = elem_type(tensor) if isinstance(tensor, gs.Constant) else onnx_dtype(tensor.dtype)
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
    """Gives ``tensor`` the type of ``proto``.

    What is no dense tensor (a sequence, an optional, a map) has no dtype and no shape, and its type as ``container``.
    """
    kind = proto.WhichOneof("value")
    if kind != "tensor_type":
        if kind is not None:
            tensor.type = kind
            tensor.container = onnx.TypeProto()
            tensor.container.CopyFrom(proto)
        return
    dense = proto.tensor_type
    if dense.elem_type:
        tensor.dtype = numpy_dtype(dense.elem_type)
    if dense.HasField("shape"):
        tensor.shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dense.shape.dim]


def type_known(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None or tensor.__dict__.get("container") is not None


# --- values ------------------------------------------------------------------------------------------------------

_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
_PACKED = {value: _BITS[name] for name, value in TensorProto.DataType.items() if name in _BITS}
"""Bits of the element types that are stored several to a byte."""


def tensor_bytes(elem_type: int, shape: tuple[int, ...]) -> int:
    """The bytes that such a tensor takes in a file."""
    count = math.prod(shape)
    bits = _PACKED.get(elem_type)
    return (count * bits + 7) // 8 if bits else count * numpy_dtype(elem_type).itemsize


class StoredValues(LazyValues):  # type: ignore[misc]
    """A constant's values, left where they are (in the parsed file, or mapped from an external one) until asked for."""

    def __init__(self, tensor: TensorProto, file: Path | None = None, offset: int = 0) -> None:
        self.tensor = tensor
        self.file = file
        self.offset = offset
        self.shape = tuple(tensor.dims)
        self.dtype = numpy_dtype(tensor.data_type)
        self.nbytes = tensor_bytes(tensor.data_type, self.shape)
        self._loaded: Array | None = None

    def load(self) -> Array:
        """The values, read-only; of an external file, only the pages that are looked at are read."""
        if self._loaded is None:
            self._loaded = self._load()
            self._loaded.flags.writeable = False
        return self._loaded

    def _load(self) -> Array:
        if self.file is None:
            return onnx.numpy_helper.to_array(self.tensor)
        raw = self.raw()
        if self.tensor.data_type not in _PACKED:
            return raw.view(self.dtype).reshape(self.shape)
        packed = TensorProto(dims=self.shape, data_type=self.tensor.data_type, raw_data=raw.tobytes())
        return onnx.numpy_helper.to_array(packed)

    def raw(self) -> Array:
        """The bytes in the external file."""
        if self.file is None or self.nbytes == 0:
            return np.empty(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))


class Constant(gs.Constant):  # type: ignore[misc]
    """A constant whose values, once looked at, are still known to lie in their file."""

    @property
    def values(self) -> Array:
        values: Array = self._values.load() if isinstance(self._values, LazyValues) else self._values
        return values

    @values.setter
    def values(self, values: Array | LazyValues) -> None:
        self._values = values


def elem_type(constant: gs.Constant) -> int:
    """The ONNX element type of a constant."""
    values = constant._values
    return int(values.tensor.data_type) if isinstance(values, StoredValues) else onnx_dtype(values.dtype)


def constant_bytes(constant: gs.Constant) -> int:
    """The bytes that the constant takes in a file."""
    values = constant._values
    return values.nbytes if isinstance(values, StoredValues) else tensor_bytes(elem_type(constant), values.shape)


def tensor_proto(constant: gs.Constant) -> TensorProto:
    """The constant with its values inside."""
    values = constant._values
    if isinstance(values, StoredValues) and values.file is None:
        if values.tensor.name != constant.name:
            values.tensor.name = constant.name
        return values.tensor
    proto = onnx.numpy_helper.from_array(np.asarray(constant.values, order="C"), constant.name)
    if isinstance(values, StoredValues):
        keep_notes(values.tensor, proto)
    return proto


def keep_notes(source: TensorProto, proto: TensorProto) -> None:
    """Copies what ``source`` says beside its values."""
    if source.doc_string:
        proto.doc_string = source.doc_string
    proto.metadata_props.extend(source.metadata_props)
