"""The precisions of single layers in weakly typed networks, whose builders else choose by speed alone.

A layer of a node that is kept in fp32 computes in it and makes it. A product in fp16 or bf16 computes in that: a
builder that is merely allowed to would leave small ones in fp32, and one setting would mean different things. The rest
of the low precision is the builder's choice, and what is to be quantised its calibration's or the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .build import BuildJob
from .network_layers import FLOATS, PRECISIONS, WEIGHTED, dequantised_from, makers_of, node_names, tensors

LEFT_ALONE = frozenset(
    (
        "ASSERTION",
        "CAST",
        "CONDITION",
        "CONDITIONAL_INPUT",
        "CONDITIONAL_OUTPUT",
        "CONSTANT",
        "DEQUANTIZE",
        "DYNAMIC_QUANTIZE",
        "IDENTITY",  # in TensorRT 8 it is what a cast becomes
        "ITERATOR",
        "LOOP_OUTPUT",
        "NMS",
        "NON_ZERO",
        "PLUGIN",
        "PLUGIN_V2",
        "PLUGIN_V3",
        "QUANTIZE",
        "RECURRENCE",
        "SHAPE",
        "TRIP_LIMIT",
    )
)
"""Types of layers whose precision is not to be set: it is fixed, or their own affair."""

_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""TensorRT's names of types."""


@dataclass(frozen=True)
class Demands:
    """How strictly a builder is held to the precisions that layers are given."""

    constraints: Literal["obey", "prefer", "ignore"] = "obey"
    """Whether they are obeyed at all costs, preferred to others, or of no account."""
    insist: bool = False
    """Whether what is to be in int8 by calibration is no choice of the builder's."""
    freed: frozenset[str] = frozenset()
    """Layers without one: they are fused into others, of another precision."""
    untimed: bool = False
    """Whether nothing is to be taken for known: TensorRT is to ask about each choice."""


def lowered(job: BuildJob) -> bool:
    """Whether a weakly typed builder may compute in anything but fp32."""
    return job.precision != "fp32" or bool(job.low_types)


def constrain(job: BuildJob, trt: Any, network: Any, demands: Demands = Demands()) -> bool:
    """Gives layers the precisions that the job has for their nodes; True if there are such layers.

    Where it has none, every product is to be in the low precision, unless it may be quantised. Beside int8 alone, what
    is no product may be in fp32 or not: it is fused with what is quantised.
    """
    if job.strongly_typed or not lowered(job):
        return False
    parts = job.precision.split("+")
    usual = parts[0] if not job.layer_precisions and len(parts) == 1 and parts[0] != "fp32" else ""
    products_alone = not {*parts, *job.low_types} & {"fp16", "bf16"}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = makers_of(layers)
    types = {**_TYPES, "int8": "int8"} if demands.insist else _TYPES
    changed = False
    for layer, node in zip(layers, node_names(layers, job.made_by), strict=True):
        asked = job.layer_precisions.get(node, usual)
        if layer.name in demands.freed:
            _free(layer)
        if asked not in types or not _settable(layer) or layer.name in demands.freed:
            continue
        dtype, product = getattr(trt, types[asked]), layer.type.name in WEIGHTED
        if asked == "fp32" and (product or not products_alone):
            layer.precision = dtype
            for index, item in enumerate(tensors(layer)[1]):
                if item.dtype == dtype:
                    layer.set_output_type(index, dtype)
            changed = True
        elif asked != "fp32" and product and not any(dequantised_from(item, makers) for item in tensors(layer)[0]):
            layer.precision = dtype
            changed = True
    return changed


def _free(layer: Any) -> None:
    layer.reset_precision()
    for index in range(layer.num_outputs):
        layer.reset_output_type(index)


def fused_with_others(network: Any, refusal: str) -> set[str]:
    """The layers to free where a refusal names what is fused ("conv + relu"), and of that there is no kernel of two
    precisions: those of it that are no products, and all others of their kind behind a product of another precision.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    given = [layer for layer in layers if layer.precision_is_set]
    named = [layer for layer in given if _names(refusal, layer.name)]
    if len({layer.precision for layer in named}) < 2:
        return set()
    fused = [layer for layer in named if layer.type.name not in WEIGHTED]
    kinds = {layer.type.name for layer in fused}
    makers = makers_of([layer for layer in given if layer.type.name in WEIGHTED])
    alike = [
        layer
        for layer in given
        if layer.type.name in kinds
        and any(makers[item.name].precision != layer.precision for item in tensors(layer)[0] if item.name in makers)
    ]
    return {layer.name for layer in (*fused, *alike)}


def _names(words: str, name: str) -> bool:
    return re.search(rf"(?<![\w/.]){re.escape(name)}(?![\w/]|\.\w)", words) is not None


def _settable(layer: Any) -> bool:
    """Whether the layer computes with floating-point values that are no shapes."""
    if layer.type.name in LEFT_ALONE:
        return False
    outputs = tensors(layer)[1]
    return any(item.dtype.name in FLOATS for item in outputs) and not any(item.is_shape_tensor for item in outputs)


def given_precisions(network: Any) -> Mapping[str, str]:
    """By the name of a layer, the precision that it was given."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {layer.name: PRECISIONS.get(layer.precision.name, "") for layer in layers if layer.precision_is_set}
