"""What the builder is told of one model beside its profiles and plugins, once its nodes and inputs are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration import Calibration, Read, write_calibration
from .errors import UsageError
from .inputs import Array, Profiles
from .precision import calibrates
from .workspace import CALIBRATION, Workspace

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from .settings import Settings

QUANTISERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class BuildPlan:
    """All of it; the default is TensorRT's own, in float32."""

    precision: str = "fp32"
    builder: Mapping[str, Any] = field(default_factory=dict)
    """BuildSettings.given()."""
    devices: Mapping[str, str] = field(default_factory=dict)
    """GPU or DLA, by node of the ONNX model."""
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()

    def key(self) -> dict[str, Any]:
        """What makes two engines different, as JSON values: what it holds, and no paths."""
        known = self.calibration
        return {
            "precision": self.precision,
            "builder": dict(self.builder),
            "devices": dict(self.devices),
            "calibration": [known.algorithm, known.digest] if known is not None else None,
        }


def plan_build(
    settings: Settings,
    graph: gs.Graph,
    read: Read,
    example: Mapping[str, Array],
    allowed: Profiles,
    workspace: Workspace,
    of_torch: bool,
) -> BuildPlan:
    """The plan for the rewritten ``graph``. ``read``, ``example`` and ``allowed`` (the profiles' hull) are for the
    calibration.

    Raises UsageError where device_types names modules that no node comes from, or calibration inputs do not fit.
    """
    devices, notes = _devices(settings, graph, of_torch)
    calibration = None
    if calibrates(settings.precision) and settings.build and settings.target.installed:
        if _operators(graph) & set(QUANTISERS):
            notes.append("the model quantises by itself: it is not calibrated")
        else:
            folder, cache = workspace.partial / "calibration", workspace.partial / CALIBRATION
            items, algorithm = settings.calibration, settings.calibration_algorithm
            calibration = write_calibration(items, read, example, allowed, folder, algorithm, cache)
            if items is None:
                notes.append("calibrated with the example inputs alone: give calibration= typical ones")
    return BuildPlan(settings.precision, settings.builder.given(), devices, calibration, tuple(notes))


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
