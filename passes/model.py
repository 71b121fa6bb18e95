"""ONNX files to onnx-graphsurgeon graphs and back, losing nothing on the way.

Metadata, doc strings, types and attributes of every kind survive, bodies read outer weights where they are, and
weights in external files are mapped, not read: a model of many gigabytes is edited in megabytes.
"""

from __future__ import annotations

from .ir import (
    Array,
    ModelError,
    Node,
    bodies,
    node_metadata,
    numpy_dtype,
    onnx_dtype,
    scopes,
    set_type,
    tensor_proto,
    type_known,
    type_name,
    type_proto,
)
from .reading import from_proto, read, read_proto
from .writing import node_proto, to_proto, write

__all__ = [
    "Array",
    "ModelError",
    "Node",
    "bodies",
    "from_proto",
    "node_metadata",
    "node_proto",
    "numpy_dtype",
    "onnx_dtype",
    "read",
    "read_proto",
    "scopes",
    "set_type",
    "tensor_proto",
    "to_proto",
    "type_known",
    "type_name",
    "type_proto",
    "write",
]
