"""What a conversion did, as an object and as ``result.json``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import BridgeError, Refusal, Stage
from .layers import LayerError

if TYPE_CHECKING:
    from .runtime.calling import Calling

Status = Literal["verified", "built", "rewritten", "failed"]

STATUS_MEANING: Mapping[str, str] = {
    "verified": "the engine ran, and its outputs agree",
    "built": "built, not run: no GPU here can run this engine; every model on the way to it agrees in ONNX Runtime",
    "rewritten": "rewritten for the target's parser, and not built",
    "failed": "failed",
}


@dataclass(frozen=True)
class Tolerance:
    """``|candidate - reference| <= atol + rtol * |reference|``, elementwise; both 0 means exactly equal."""

    rtol: float
    atol: float
    whole: bool = False
    """Of the norms of error and reference instead, ``atol`` for each element: for values that are rounded coarsely. Of
    integers and booleans, ``rtol`` is the share that may differ."""


@dataclass(frozen=True)
class TargetInfo:
    """The TensorRT that a model was converted for."""

    flavour: str
    """``tensorrt`` or ``tensorrt-rtx``."""
    version: str
    installed: bool
    strongly_typed: bool


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the model handed to the parser. A dynamic axis is a string in ``shape``."""

    name: str
    dtype: str
    shape: list[int | str]
    source_dtype: str
    """The dtype that the source has there; it differs from ``dtype`` where the target has no such type."""
    profiles: list[list[list[int]]] = field(default_factory=list)
    """For inputs: the min, opt and max shape in each of the engine's optimization profiles."""


@dataclass(frozen=True)
class Rewrite:
    """What one pass changed."""

    name: str
    reason: str
    """Why the pass exists, in a sentence."""
    count: int
    nodes: list[str]
    """The changed nodes, with their origin; at most 50 of them."""


@dataclass(frozen=True)
class Decline:
    """A rule that looked at a node which the target may refuse, and could not help."""

    rule: str
    node: str
    reason: str


ProofStatus = Literal["proved", "moved", "not checked"]


@dataclass(frozen=True)
class Proof:
    """One match of a rule or pass, run before and after on the tensors that flow through it (``prove=True``)."""

    rule: str
    node: str
    """What it matched, with its origin."""
    status: ProofStatus
    """``moved``: what took its place computes something else, by the default tolerances."""
    reason: str = ""
    """How far it moved, or why it was not checked."""
    max_abs_error: float | None = None
    output: str = ""
    """The tensor with the worst error, and the shapes at which it was found."""
    inputs: str = ""

    def __str__(self) -> str:
        return f"{self.rule} at {self.node}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Histogram:
    """The elements of an output by absolute error: ``counts[i]`` lie in ``[edges[i], edges[i+1])``.

    Errors of exactly zero are counted in ``zeros`` alone, those beyond the ends in the first and last count; elements
    that are not finite are left out.
    """

    edges: list[float]
    counts: list[int]
    zeros: int


@dataclass(frozen=True)
class Comparison:
    """One output, between two neighbouring stages, on one set of inputs.

    Errors are over the elements that are finite on both sides. ``None`` stands for a figure that does not exist
    (another shape, no finite element); a PSNR of ``None`` with ``max_abs_error == 0`` is infinite.
    """

    reference: str
    """``torch``, ``exported`` or ``rewritten``."""
    candidate: str
    """``exported``, ``rewritten``, ``typed`` (the precision in the graph) or ``engine``."""
    inputs: str
    """``example``, ``min`` or ``max``: the shapes of the inputs; with several profiles ``profile 0 min``, …"""
    output: str
    reference_shape: list[int]
    candidate_shape: list[int]
    reference_dtype: str
    candidate_dtype: str
    max_abs_error: float | None
    mean_abs_error: float | None
    max_rel_error: float | None
    mean_rel_error: float | None
    cosine_similarity: float | None
    psnr: float | None
    tolerance_used: float | None
    """The largest ``|candidate - reference| / (atol + rtol * |reference|)``: over 1 disagrees, and 0 is exactly equal.
    ``None`` also where something is off that must be equal."""
    reference_nan: int
    candidate_nan: int
    reference_inf: int
    candidate_inf: int
    histogram: Histogram | None
    agreed: bool
    tolerance: Tolerance
    note: str = ""


@dataclass(frozen=True)
class SourceError:
    """How far the last model that ran is from the source itself, over all inputs: its worst output."""

    candidate: str
    """``engine`` or, where none ran, ``typed`` or ``rewritten``."""
    output: str
    relative: float | None
    """The norm of the error as a share of the reference's norm; of integers and booleans, the share that differs.
    ``None`` where no such figure exists: nothing finite to compare, or a reference of zeros that is missed."""
    max_abs: float | None
    non_finite: int
    """Elements that are infinite or NaN, and finite in the source."""


@dataclass(frozen=True)
class Latency:
    """Of the engine as a module (``bridge.TRTModule``) on inputs that are on the GPU already, in milliseconds."""

    host: float
    """Median from a call to the end of its work."""
    gpu: float
    """Of each of the calls when they are made one after the other without waiting, by the GPU's clock."""
    calls: int


@dataclass(frozen=True)
class TaskCheck:
    """Whether the converted model still does its job, beside the differences of tensors."""

    passed: bool
    message: str
    ran_on: str
    """``engine``, or ``rewritten`` (in ONNX Runtime) where no GPU here can run the engine."""


@dataclass
class ConversionResult:
    """The outcome of ``bridge.convert``; ``result.json`` has the same names. Paths there are relative to its folder."""

    name: str
    status: Status = "failed"
    stage: Stage | None = None
    """The stage that failed, if one did."""
    error: str | None = None
    target: TargetInfo | None = None
    precision: str = "fp32"
    quantises: bool = False
    """Whether the source quantises what it computes by itself."""
    half: str = ""
    """``fp16`` or ``bf16`` where the source computes in it by itself, be its outputs float32; else empty."""
    builder: dict[str, Any] = field(default_factory=dict)
    """What the builder was told, by the names of ``bridge.BuildSettings``; what it was not told is left out."""
    source: str = ""
    exporter: str | None = None
    """``dynamo`` or ``torchscript``; None where the source was an ONNX file."""
    exported_onnx: Path | None = None
    rewritten_onnx: Path | None = None
    """What the passes made of it, in the types of the source."""
    onnx: Path | None = None
    """The model handed to the parser: the rewritten one or, where the precision is in the graph, ``typed.onnx``."""
    engine: Path | None = None
    from_cache: bool = False
    """Whether the engine was built by an earlier conversion (``convert(cache=…)``)."""
    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    declined: list[Decline] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    """Of each match in order of application, with ``prove=True``; else empty."""
    refusals: list[Refusal] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    layers: list[LayerError] = field(default_factory=list)
    """Of a lower precision, the layers that introduce most error, worst first; on the example inputs."""
    precisions: dict[str, float] = field(default_factory=dict)
    """What the engine computes in: the share of its compute by precision, ``unknown`` where TensorRT does not tell."""
    not_as_asked: list[dict[str, Any]] = field(default_factory=list)
    """The largest layers of the engine that are not in the precision that was asked for."""
    engine_bytes: int | None = None
    """The engine's size."""
    kept: dict[str, list[str]] = field(default_factory=dict)
    """Nodes that are not in the lower precision that was asked for, by the reason."""
    source_error: SourceError | None = None
    """Of what was computed in the asked precision; None where nothing of it ran."""
    latency: Latency | None = None
    """At the example's shapes, with ``latency=True``; None where no GPU here runs the engine."""
    gpu: str = ""
    """Name and compute capability of the GPU that ran the engine, ``NVIDIA H200 9.0``; empty where none did."""
    task_check: TaskCheck | None = None
    notes: list[str] = field(default_factory=list)
    """What the user should know: an exporter that was fallen back on, a type that was changed, …"""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage."""

    def __post_init__(self) -> None:
        self.exception: BridgeError | None = None
        """The exception behind ``error``; not in ``result.json``."""
        self._calling: Calling | None = None

    @property
    def calling(self) -> Calling | None:
        """How the engine takes a module's arguments and returns its outputs; not in ``result.json``.

        None where the conversion failed before it was known. An ONNX file's arguments are its inputs, in their order.
        """
        if self._calling is None and self.inputs and self.exporter is None:
            from .runtime.calling import Calling

            self._calling = Calling((), None, None, tuple(item.name for item in self.inputs))
        return self._calling

    @calling.setter
    def calling(self, calling: Calling) -> None:
        self._calling = calling

    @property
    def computed_in(self) -> str:
        """What decides how far off outputs may be: the precision asked for, and the int8 of a model that quantises by
        itself, where a value on the border of two steps is a whole step off after the least rounding."""
        return self.also_quantised(self.precision)

    @property
    def own_precision(self) -> str:
        """What the source computes in: where that is 16 bits, another order of sums is rounded to other values."""
        return self.half or "fp32"

    def also_quantised(self, precision: str) -> str:
        """``precision``, with the int8 and the 16 bits of the source."""
        return "+".join(filter(None, ("int8" if self.quantises else "", precision, self.half)))

    @property
    def ok(self) -> bool:
        return self.status != "failed"

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Plain JSON values; paths are written relative to ``folder``."""
        plain: dict[str, Any] = _plain(self, folder)
        return plain

    def to_json(self, folder: Path) -> str:
        return json.dumps(self.to_dict(folder), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path) -> ConversionResult:
        """The result that ``to_dict(folder)`` wrote. Raises pydantic.ValidationError where it is not one."""
        from pydantic import TypeAdapter

        values = dict(values)
        for key in ("exported_onnx", "rewritten_onnx", "onnx", "engine"):
            if values.get(key) is not None:
                values[key] = Path(os.path.normpath(folder / values[key]))
        return TypeAdapter(cls).validate_python(values)

    @classmethod
    def load(cls, path: Path) -> ConversionResult:
        """Reads a ``result.json``."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), path.parent)


def _plain(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return os.path.relpath(value, folder)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name), folder) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, folder) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, folder) for item in value]
    return value
