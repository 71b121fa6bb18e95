"""What a weakly typed engine's layers were built in, as TensorRT's engine inspector tells; in the builder's process.

The inspector's JSON differs between versions: TensorRT 8 describes the formats of tensors in words ("Row major linear
FP16 format") and joins the names of fused layers (``conv + relu``, ``PWN(a, b)``), later ones name types (``Half``) and
list nodes in ``Metadata``. Subgraphs that its compiler takes as a whole say nothing of their inside in TensorRT 8:
their inputs and outputs tell (see ``subgraphs``), and the size of the engine may.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .build import BuildJob
from .guard import QUANTISED, UNKNOWN, Layer, Verdict, judge
from .layer_precisions import given_precisions, lowered
from .network_layers import dims, network_layers, quantised_types
from .subgraphs import ends, is_inside

_TYPES: tuple[tuple[str, str], ...] = (
    (r"bf16|bfloat", "bf16"),
    (r"fp16|half|float16", "fp16"),
    (r"fp8|e4m3", "fp8"),
    (r"int8", "int8"),
    (r"int4(?!\d)", "int4"),
    (r"fp4|e2m1", "fp4"),
    (r"fp32|tf32|float", "fp32"),
)
"""By what a description holds; the first that fits."""

_COPIES = frozenset(("Reformat", "Constant", "NoOp", "ShapeHostToDevice", "DeviceToShapeHost", "Signal", "Wait"))
"""Types of the engine's layers that compute nothing; their names may hold those of layers that do."""
_NAMES = re.compile(r"\s\+\s|\s?\|\|\s?|,\s|\bPWN\(|\)(?=[),\s+]|$)")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of the engine."""

    names: tuple[str, ...]
    """Of the network's layers, or of ONNX nodes, that it was made of; other words may be among them."""
    precision: str
    """Empty where nothing tells it; of a subgraph, that of all its inputs and outputs."""
    span: tuple[str, str] | None = None
    """The first and the last of what a subgraph was made of, where it names no others."""


def engine_layers(text: str) -> list[EngineLayer]:
    """Those of the inspector's JSON that compute, for the first optimization profile.

    Where an engine was built without detailed profiling verbosity its layers are names alone, and no types are told.
    """
    try:
        listed = json.loads(text).get("Layers", [])
    except (json.JSONDecodeError, AttributeError):  # no JSON, or no object: nothing is told
        return []
    found = []
    for item in listed if isinstance(listed, list) else []:
        layer = {"Name": item} if isinstance(item, str) else item
        if not isinstance(layer, dict):
            continue
        name = str(layer.get("Name", ""))
        later = re.search(r"\[profile (\d+)\]\s*$", name)
        copies = layer.get("LayerType") in _COPIES or name.startswith("Reformatting CopyNode")
        if copies or (later is not None and later[1] != "0"):
            continue
        name = re.sub(r"\s*\[profile 0\]\s*$", "", name)
        nodes = re.findall(r"\[ONNX Layer: (.*?)\]", str(layer.get("Metadata", "")))
        names = tuple(filter(None, (part.strip() for part in _NAMES.split(name))))
        span = ends(name) if not nodes else None
        found.append(EngineLayer((*nodes, name, *names), _precision(layer, opaque=span is not None), span))
    return found


def _precision(layer: Mapping[str, Any], *, opaque: bool) -> str:
    """What the layer computes in: by its first input, or else its weights or outputs; of an ``opaque`` subgraph, what
    all of its inputs and outputs are in."""
    told = _type(layer.get("Precision"))
    if told:
        return told
    inputs, outputs = (_formats(layer.get(key)) for key in ("Inputs", "Outputs"))
    if opaque:
        kinds = {*inputs, *outputs}
        return kinds.pop() if len(kinds) == 1 else ""
    weights = layer.get("Weights")
    of_weights = _type(weights.get("Type")) if isinstance(weights, dict) else ""
    return next(filter(None, (*inputs[:1], of_weights, *outputs[:1])), "")


def _formats(tensors: Any) -> list[str]:
    """The types of those tensors that are of numbers with a precision."""
    described = [item.get("Format/Datatype", item.get("Format")) for item in tensors or () if isinstance(item, dict)]
    return [kind for kind in map(_type, described) if kind]


def _type(words: Any) -> str:
    text = str(words or "").lower()
    return next((kind for pattern, kind in _TYPES if re.search(pattern, text)), "")


def as_built(layers: Sequence[Layer], engine: Sequence[EngineLayer], constrained: Mapping[str, str]) -> list[Layer]:
    """The network's ``layers`` with the precisions of the engine's.

    ``constrained``: by name, what layers were made to compute in by constraints that the builder has to obey; it holds
    where the engine does not tell, and inside of subgraphs with inputs and outputs in float32. Products that the engine
    does not name are unknown; other layers are gone, folded into a constant or into others.
    """
    precisions: dict[str, str] = {}
    claimed: set[str] = set()
    for item in engine:
        for name in item.names:
            claimed.add(name)
            if item.precision:
                precisions.setdefault(name, item.precision)
    spans = [item for item in engine if item.span is not None]
    order: dict[str, int] = {}
    for index, layer in enumerate(layers):
        order.setdefault(layer.name, index)
        order.setdefault(layer.node, index)
    found = []
    for index, layer in enumerate(layers):
        names = [name for name in (layer.name, layer.node) if name in claimed]
        told = next((precisions[name] for name in names if name in precisions), "")
        subgraph = _subgraph(index, spans, order) if not names else None
        if subgraph is not None:
            precision = _inside(subgraph.precision, layer, constrained)
        elif not names and engine and not layer.weighted:
            continue
        else:
            precision = told or constrained.get(layer.name, "") or UNKNOWN
        found.append(dataclasses.replace(layer, precision=precision))
    return found


def _subgraph(index: int, spans: Sequence[EngineLayer], order: Mapping[str, int]) -> EngineLayer | None:
    """The subgraph that a layer is inside of: the one whose ends are around it, or one whose ends are not known."""
    for item in spans:
        assert item.span is not None
        if is_inside(index, item.span, order):
            return item
    return spans[0] if len(spans) == 1 else None


def _inside(boundary: str, layer: Layer, constrained: Mapping[str, str]) -> str:
    """What a layer in a subgraph is computed in, whose inputs and outputs are all in ``boundary``."""
    if layer.precision in QUANTISED:  # by the model: whether there are kernels for it, nothing tells
        return UNKNOWN
    if boundary == "fp32":
        return constrained.get(layer.name, "fp32") if constrained else UNKNOWN
    return boundary or UNKNOWN


def examine(job: BuildJob, trt: Any, logger: Any, network: Any, engine: Any, *, obeyed: bool) -> Verdict:
    """What the ``engine`` that was built of ``network`` computes in, against what the job asks for.

    ``obeyed``: the builder had to keep to the precisions that its layers were given. The network is of no use
    afterwards.
    """
    chosen = not job.strongly_typed and (lowered(job) or bool(quantised_types(network)))  # by the builder
    built = built_layers(job, trt, logger, network, engine) if chosen else []
    layers = network_layers(trt, network, _typical(job), job.made_by)
    if chosen:
        layers = as_built(layers, built, given_precisions(network) if obeyed else {})
        layers = told_by_size(job, layers, memoryview(engine).nbytes)
    return judge(job.precision, job.layer_precisions, layers)


def built_layers(job: BuildJob, trt: Any, logger: Any, network: Any, engine: Any) -> list[EngineLayer]:
    """The layers of the ``engine`` that was built of ``network``."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [item.name for item in inputs if -1 in dims(item)]
    typical = _typical(job)
    return engine_layers(inspect(trt, logger, engine, {name: typical[name] for name in dynamic if name in typical}))


def _typical(job: BuildJob) -> dict[str, list[int]]:
    return {name: shape["opt"] for name, shape in job.profiles[0].items()} if job.profiles else {}


def low_subgraphs(layers: Sequence[EngineLayer]) -> list[tuple[str, str]]:
    """The subgraphs whose inputs and outputs are all in one type of 16 bits."""
    return [item.span for item in layers if item.span is not None and item.precision in ("fp16", "bf16")]


def told_by_size(job: BuildJob, layers: Sequence[Layer], size: int) -> list[Layer]:
    """The layers, those of unknown types in the lowest precision that was asked for where the engine, of ``size``
    bytes, could not hold the model's weights otherwise."""
    low = job.precision.split("+")[0]
    weights_left_out = {"strip_weights", "sparsity", "weight_streaming"} & job.builder.keys()
    if low not in _BYTES or weights_left_out or stored_in(_BYTES[low], job.weights, size) < MOST_WEIGHTS:
        return list(layers)
    asked = job.layer_precisions or dict.fromkeys((layer.node for layer in layers), low)
    return [
        dataclasses.replace(layer, precision=low)
        if layer.precision == UNKNOWN and asked.get(layer.node) == low
        else layer
        for layer in layers
    ]


_BYTES = {"fp16": 2, "bf16": 2, "int8": 1}
MOST_WEIGHTS = 0.85
"""The share of the weights in a low precision from which on an engine's products are taken to be in it."""


def stored_in(width: int, weights: int, size: int) -> float:
    """At least what share of so many float32 weights an engine of ``size`` bytes stores in ``width`` bytes each, the
    others taking at least twice as much."""
    return min(1.0, max(0.0, 2 - size / (width * weights))) if weights else 0.0


def inspect(trt: Any, logger: Any, engine: Any, shapes: Mapping[str, Sequence[int]]) -> str:
    """The inspector's JSON of a serialised engine; empty where it cannot be loaded here.

    ``shapes`` are given to the inputs: of dynamic engines, TensorRT 8 tells formats for known shapes alone.
    """
    runtime = trt.Runtime(logger)
    if hasattr(runtime, "engine_host_code_allowed"):  # a version-compatible engine brings its runtime along
        runtime.engine_host_code_allowed = True
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        return ""
    inspector = loaded.create_engine_inspector()
    context = loaded.create_execution_context() if shapes else None
    if context is not None:
        for name, shape in shapes.items():
            context.set_input_shape(name, tuple(shape))
        inspector.execution_context = context
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    del inspector, context  # TensorRT 8 does not define what happens when the engine is destroyed before them
    return text
