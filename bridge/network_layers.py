"""What the layers of a parsed network compute, how much of it, and in which types; in the builder's process."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .guard import QUANTISED, UNKNOWN, Layer

PRECISIONS = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT8": "int8",
    "FP8": "fp8",
    "INT4": "int4",
    "FP4": "fp4",
}
"""By the names of TensorRT's types."""
LOW_FLOATS = frozenset(("HALF", "BF16"))
FLOATS = LOW_FLOATS | {"FLOAT"}
OF_WEIGHTS = frozenset(("int4", "fp4"))
"""Of a product in any other quantised type, both factors have to be in it: else it is computed in floats."""

MOVES = frozenset(
    (
        "ASSERTION",
        "CAST",
        "CONCATENATION",
        "CONDITION",
        "CONDITIONAL_INPUT",
        "CONDITIONAL_OUTPUT",
        "CONSTANT",
        "DEQUANTIZE",
        "DYNAMIC_QUANTIZE",
        "FILL",
        "GATHER",
        "IDENTITY",
        "ITERATOR",
        "KV_CACHE_UPDATE",
        "LOOP_OUTPUT",
        "NON_ZERO",
        "ONE_HOT",
        "PADDING",
        "QUANTIZE",
        "RECURRENCE",
        "REVERSE_SEQUENCE",
        "SCATTER",
        "SHAPE",
        "SHUFFLE",
        "SLICE",
        "SQUEEZE",
        "TRIP_LIMIT",
        "UNSQUEEZE",
    )
)
"""Types of layers that make, move or convert values, and compute none."""

PASSED = frozenset(("CAST", "IDENTITY", "SHUFFLE", "SQUEEZE", "UNSQUEEZE"))
"""What may stand between a dequantisation and the layer that is computed in the quantised type."""


def network_layers(
    trt: Any, network: Any, shapes: Mapping[str, Sequence[int]], made_by: Mapping[str, str]
) -> list[Layer]:
    """The layers that compute, with the types of the network's tensors.

    ``shapes`` are given to the inputs first, so the network is not to be built afterwards. ``made_by``: by the name of
    a tensor, the ONNX node that makes it, for parsers whose layers do not say.
    """
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name in shapes and -1 in dims(tensor):
            tensor.shape = tuple(shapes[tensor.name])
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    nodes = node_names(layers, made_by)
    makers = makers_of(layers)
    found = []
    for layer, node in zip(layers, nodes, strict=True):
        kind = layer.type.name
        if kind in MOVES or not floating(layer):
            continue
        work, weighted = _work(trt, layer)
        found.append(Layer(layer.name, node, kind, work, weighted, _precision(layer, makers, weighted)))
    return found


def tensors(layer: Any) -> tuple[list[Any], list[Any]]:
    """The inputs and outputs that are there."""
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    return [item for item in inputs if item is not None], [item for item in outputs if item is not None]


def makers_of(layers: Sequence[Any]) -> dict[str, Any]:
    """By the name of a tensor, the layer that makes it."""
    return {item.name: layer for layer in layers for item in tensors(layer)[1]}


def quantised_types(network: Any) -> set[str]:
    """The types in which the model itself quantises."""
    found = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name in ("QUANTIZE", "DEQUANTIZE"):
            inputs, outputs = tensors(layer)
            kinds = {_quantised(item) for item in (*inputs[:1], *outputs[:1])}
            found |= kinds - {""} or {"int8"}  # as below
    return found


def floating(layer: Any) -> bool:
    """Whether the layer makes floating-point values."""
    return any(item.dtype.name in FLOATS for item in tensors(layer)[1])


def dims(tensor: Any) -> tuple[int, ...]:
    """The tensor's shape; empty where TensorRT does not know even its rank."""
    try:
        return tuple(tensor.shape)
    except ValueError:  # its length is said to be -1
        return ()


# --- where a layer comes from ------------------------------------------------------------------------------------


def node_names(layers: Sequence[Any], made_by: Mapping[str, str]) -> list[str]:
    """The ONNX node of each layer: by its metadata or, in TensorRT 8, by its name or what it makes; else that of the
    layer that reads it, since parsers put helpers without a name in front. Empty where nothing tells."""
    known = set(made_by.values())
    names: list[str] = []
    for layer in layers:
        told = re.findall(r"\[ONNX Layer: (.*?)\]", getattr(layer, "metadata", ""))
        made = [made_by[item.name] for item in tensors(layer)[1] if item.name in made_by]
        stems = (*told, *made, layer.name, re.sub(r"_\d+$", "", layer.name))
        names.append(next((name for name in stems if name in known), told[0] if told and not known else ""))
    readers: dict[str, str] = {}
    for index in range(len(layers) - 1, -1, -1):  # a network's layers are in order, so readers come later
        inputs, outputs = tensors(layers[index])
        if not names[index] and layers[index].type.name != "CONSTANT":
            names[index] = next((readers[item.name] for item in outputs if item.name in readers), "")
        for item in inputs:
            readers[item.name] = names[index]
    return names


# --- how much it computes ----------------------------------------------------------------------------------------


def _work(trt: Any, layer: Any) -> tuple[float, bool]:
    """Multiply-adds, or else elements; and whether it is the former."""
    inputs, outputs = tensors(layer)
    read, made = [dims(item) for item in inputs], [dims(item) for item in outputs]
    kind = layer.type.name
    products = _PRODUCTS.get(kind)
    if products is not None and read and made:
        work = products(trt, layer, read, made)
        if work:
            return work, True
    return float(max(map(_count, (*read, *made)), default=0)), False


def _count(shape: Sequence[int]) -> int:
    """Elements; an axis that is not known counts as one."""
    return math.prod(max(1, size) for size in shape)


Shapes = Sequence[Sequence[int]]


def _convolution(trt: Any, layer: Any, read: Shapes, made: Shapes) -> float:
    layer.__class__ = trt.IConvolutionLayer
    kernel = _count(tuple(layer.kernel_size_nd))
    return float(_count(made[0]) * kernel * max(1, read[0][1]) / layer.num_groups)


def _deconvolution(trt: Any, layer: Any, read: Shapes, made: Shapes) -> float:
    layer.__class__ = trt.IDeconvolutionLayer
    kernel = _count(tuple(layer.kernel_size_nd))
    return float(_count(read[0]) * kernel * max(1, made[0][1]) / layer.num_groups)


def _matrices(trt: Any, layer: Any, read: Shapes, made: Shapes) -> float:
    layer.__class__ = trt.IMatrixMultiplyLayer
    transposed = layer.op0 == trt.MatrixOperation.TRANSPOSE
    axis = -2 if transposed and len(read[0]) > 1 else -1
    return float(_count(made[0]) * max(1, read[0][axis] if read[0] else 1))


def _fully_connected(trt: Any, layer: Any, read: Shapes, made: Shapes) -> float:
    layer.__class__ = trt.IFullyConnectedLayer
    return float(_count(read[0]) * layer.num_output_channels)


def _einsum(trt: Any, layer: Any, read: Shapes, made: Shapes) -> float:
    layer.__class__ = trt.IEinsumLayer
    sizes: dict[str, int] = {}
    terms = layer.equation.replace(" ", "").split("->")[0].split(",")
    for term, shape in zip(terms, read, strict=False):
        letters = term.replace("...", "")
        sizes.update(zip(letters, (max(1, size) for size in shape[-len(letters) :]), strict=False))
    return float(math.prod(sizes.values()))


def _attention(trt: Any, layer: Any, read: Shapes, made: Shapes) -> float:
    """Queries by keys, and what comes of it by values; each (batch, heads, length, size)."""
    if len(read) < 2 or len(read[0]) != 4 or len(read[1]) != 4:
        return 0.0
    return 2.0 * _count(read[0]) * max(1, read[1][2])


_PRODUCTS = {
    "ATTENTION_INPUT": _attention,
    "CONVOLUTION": _convolution,
    "DECONVOLUTION": _deconvolution,
    "EINSUM": _einsum,
    "FULLY_CONNECTED": _fully_connected,
    "MATRIX_MULTIPLY": _matrices,
}
WEIGHTED = frozenset(_PRODUCTS)
"""Types of layers with multiply-adds."""


# --- in which types ----------------------------------------------------------------------------------------------


def _precision(layer: Any, makers: Mapping[str, Any], weighted: bool) -> str:
    """The quantised type of both factors of a product (or of its weights, if that is a type for weights alone), or the
    type of the first floating-point tensor."""
    inputs, outputs = tensors(layer)
    if weighted:
        kinds = [dequantised_from(item, makers) for item in inputs[:2]]
        quantised = [kind for kind in kinds if kind in OF_WEIGHTS or kinds == [kind, kind]]
        if any(quantised):
            return quantised[0]
    floats = [item.dtype.name for item in (*inputs, *outputs) if item.dtype.name in FLOATS]
    return PRECISIONS[floats[0]] if floats else UNKNOWN


def dequantised_from(tensor: Any, makers: Mapping[str, Any]) -> str:
    """The type that the tensor was dequantised from; empty where it was not."""
    maker = makers.get(tensor.name)
    seen = {tensor.name}
    while maker is not None and maker.type.name in PASSED:
        source = maker.get_input(0)
        if source is None or source.name in seen:
            return ""
        seen.add(source.name)
        maker = makers.get(source.name)
    if maker is None or maker.type.name != "DEQUANTIZE":
        return ""
    return _quantised(maker.get_input(0)) or "int8"  # TensorRT 8 may not say, and has no other


def _quantised(tensor: Any) -> str:
    """The quantised type that the tensor is in; empty for another."""
    kind = PRECISIONS.get(tensor.dtype.name, "")
    return kind if kind in QUANTISED else ""
