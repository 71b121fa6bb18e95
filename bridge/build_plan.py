"""What the builder is told of one model beside its profiles and plugins, once its nodes and inputs are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration import Calibration
from .errors import UsageError
from .workspace import CALIBRATION, Workspace

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from .settings import Settings

QUANTISERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class BuildPlan:
    """All of it; the default is TensorRT's own, in float32."""

    precision: str = "fp32"
    layer_precisions: Mapping[str, str] = field(default_factory=dict)
    """What each node of the ONNX model is to be computed in; empty where ``precision`` says all."""
    low_types: tuple[str, ...] = ()
    """The low precisions that the model's own tensors have: ``fp16``, ``bf16``."""
    made_by: Mapping[str, str] = field(default_factory=dict)
    """By the name of a tensor, the node that makes it."""
    builder: Mapping[str, Any] = field(default_factory=dict)
    """BuildSettings.given()."""
    devices: Mapping[str, str] = field(default_factory=dict)
    """GPU or DLA, by node of the ONNX model."""
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    weights: int = 0
    """How many float32 weights the model has: what an engine stores them in shows by its size."""
    values: Mapping[str, list[int]] = field(default_factory=dict)
    """Of inputs with a few integers, the example's: where they are sizes, the engine is built for them."""

    def key(self) -> dict[str, Any]:
        """What makes two engines different, as JSON values: what it holds, and no paths."""
        known = self.calibration
        return {
            "precision": self.precision,
            "layer_precisions": dict(self.layer_precisions),
            "builder": dict(self.builder),
            "devices": dict(self.devices),
            "calibration": [known.algorithm, known.digest] if known is not None else None,
        }


def plan_build(
    settings: Settings,
    graph: gs.Graph,
    of_torch: bool,
    layer_precisions: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
) -> BuildPlan:
    """The plan for ``graph``, the model that the parser is given.

    ``layer_precisions`` is what its nodes are assigned, by default what their own tensors say; ``calibration``, what
    TensorRT's own calibrator is shown. Raises UsageError where device_types names modules that no node comes from.
    """
    devices, notes = _devices(settings, graph, of_torch)
    precision = settings.precision
    if calibration is not None and _operators(graph) & set(QUANTISERS):
        notes.append("the model quantises by itself: it is not calibrated")
        calibration = None
    own = own_precisions(graph)
    low_types = tuple(sorted(set(own.values()) - {"fp32"}))
    if not layer_precisions and low_types:
        layer_precisions = own
    return BuildPlan(
        precision.name,
        layer_precisions or {},
        low_types,
        _made_by(graph) if layer_precisions or not precision.plain else {},
        settings.builder.given(),
        devices,
        calibration,
        tuple(notes),
        _weights(graph) if not precision.plain else 0,
    )


FEW = 64
"""As many integers as TensorRT's tensors of sizes may have."""


def few_integers(feeds: Mapping[str, Any]) -> dict[str, list[int]]:
    """The values of those inputs that may be sizes."""
    return {
        name: array.ravel().tolist() for name, array in feeds.items() if array.dtype.kind in "iu" and array.size <= FEW
    }


def _weights(graph: gs.Graph) -> int:
    """Elements of the constants in float32, of which each counts once."""
    import onnx_graphsurgeon as gs

    from .asking import everywhere

    constants = {
        id(item): item
        for node, _, _ in everywhere(graph)
        for item in node.inputs
        if isinstance(item, gs.Constant) and item.dtype == "float32"
    }
    return sum(math.prod(item.shape) for item in constants.values())


def own_precisions(graph: gs.Graph) -> dict[str, str]:
    """By node, the lowest precision of its floating-point tensors."""
    from .asking import everywhere
    from .assignment import own_precision

    found = {node.name: own_precision(node) for node, _, _ in everywhere(graph)}
    return {name: precision for name, precision in found.items() if precision}


def _made_by(graph: gs.Graph) -> dict[str, str]:
    from .asking import everywhere

    return {item.name: node.name for node, _, _ in everywhere(graph) for item in node.outputs if item.name}


def quantises(graph: gs.Graph) -> bool:
    """Whether the model rounds what it computes to steps of integers, be it in operators of ONNX Runtime's."""
    return any(name.startswith(("QuantizeLinear", "DynamicQuantize", "QLinear", "QGemm")) for name in _operators(graph))


def _operators(graph: gs.Graph) -> set[str]:
    from .asking import everywhere

    return {node.op for node, _, _ in everywhere(graph)}


def _devices(settings: Settings, graph: gs.Graph, of_torch: bool) -> tuple[dict[str, str], list[str]]:
    """Where nodes are to run, and what the user should know. A module's paths were checked at the door."""
    from passes.provenance import origin

    from .asking import everywhere

    types = settings.builder.device_types
    if not types:
        return {}, []
    devices: dict[str, str] = {}
    modules = {node.name: origin(node).module for node, _, _ in everywhere(graph)}
    for node, module in modules.items():
        device = settings.builder.device_of(module)
        if device is not None:
            devices[node] = device
    empty = [path for path in types if path and not any(f"{name}.".startswith(f"{path}.") for name in modules.values())]
    if empty and not of_torch:
        raise UsageError(
            f"builder: device_types: no node comes from {', '.join(map(repr, empty))}; nodes come from "
            f"{', '.join(sorted(set(filter(None, modules.values())))[:50]) or 'modules that are not known'}."
        )
    return devices, [f"device_types: no node is left of {', '.join(empty)}"] if empty else []


def publish_calibration(plan: BuildPlan, workspace: Workspace) -> Path | None:
    """Moves the ranges that were found into place; None where none were."""
    if plan.calibration is None or not plan.calibration.cache.exists():
        return None
    workspace.publish(CALIBRATION)
    return workspace.path(CALIBRATION)
