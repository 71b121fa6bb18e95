"""What a conversion under way knows, and what every stage does: run an ONNX model, compare its outputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..build_plan import BuildPlan
from ..caching import Caching
from ..calibration import CALIBRATORS, Read
from ..clock import Clock
from ..compare import compare_stages, onnx_runner, run_stage, source_error
from ..errors import UsageError
from ..inputs import Array, Case, Profile
from ..plugins.loading import NeededPlugin
from ..result import Comparison, ConversionResult, TensorInfo
from ..settings import Settings
from ..workspace import Workspace

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Outputs = list[dict[str, Array]]
"""Of each case."""


@dataclass
class State:
    """One conversion under way; ``result`` grows with it."""

    result: ConversionResult
    settings: Settings
    workspace: Workspace
    clock: Clock
    profiles: list[dict[str, Profile]] = field(default_factory=list)
    """The engine's; everything before the engine has to hold for their hull."""
    cases: list[Case] = field(default_factory=list)
    source_types: dict[str, np.dtype[Any]] = field(default_factory=dict)
    """dtype of each input and output in the source."""
    plugins: list[NeededPlugin] = field(default_factory=list)
    """What has to be loaded where the engine is built, and where it runs."""
    plan: BuildPlan = field(default_factory=BuildPlan)
    """What the builder is told beside all this."""
    read: Read | None = None
    """Reads further inputs, for the calibration."""
    hints: dict[str, str] = field(default_factory=dict)
    """By node or operator, what could help where the parser refuses it."""
    source: Outputs = field(default_factory=list)
    """What the source computes: the torch module or, where that is a file, the exported model."""
    rewritten: Outputs = field(default_factory=list)
    """What the rewritten model computes, in float32."""
    caching: Caching = field(init=False)

    def __post_init__(self) -> None:
        self.caching = Caching(self.settings, self.result)

    def remember_source(self, outputs: Outputs) -> None:
        """Keeps what the source computes of the cases, and its types; a note says of what that can prove nothing.

        Raises UsageError where a tolerance is for what is no output.
        """
        self.source, first = outputs, outputs[0]
        self.source_types = {name: array.dtype for name, array in (*self.cases[0].feeds.items(), *first.items())}
        for name in self.settings.tolerance if isinstance(self.settings.tolerance, Mapping) else ():
            if name and name not in first:
                raise UsageError(f"tolerance: {name!r} is no output; the outputs are {', '.join(first)}.")
        for name, array in first.items():
            if not any(found[name].size for found in outputs):
                self.result.notes.append(f"output {name!r} has no elements, which proves nothing: give other inputs")
            if array.dtype.kind == "f" and array.size and all(np.isnan(found[name]).all() for found in outputs):
                self.result.notes.append(f"output {name!r} is NaN throughout, which proves nothing: give other inputs")

    @functools.cached_property
    def tensorrt_calibrates(self) -> bool:
        """Whether a calibrator of TensorRT's finds the ranges for int8, and none are in the model; asked once that is
        rewritten.

        It does on weakly typed targets, where it is asked for by its name, for a DLA, which takes no QuantizeLinear,
        and for models in 16 bits, of which the opsets of these targets have none.
        """
        from passes import read
        from passes.casts import computes_in_half

        settings = self.settings
        if settings.precision.scheme != "int8" or settings.target.strongly_typed:
            return False
        assert self.result.rewritten_onnx is not None
        asked = settings.calibration_algorithm in CALIBRATORS or settings.builder.uses_dla
        return asked or computes_in_half(read(self.result.rewritten_onnx))

    def run_onnx(self, path: Path, name: str, feeds: Sequence[Mapping[str, Array]] | None = None) -> Outputs:
        return run_stage(name, lambda: onnx_runner(path, name), self.feeds if feeds is None else feeds)

    @property
    def feeds(self) -> list[Mapping[str, Array]]:
        return [case.feeds for case in self.cases]

    @property
    def feeds_as_taken(self) -> list[Mapping[str, Array]]:
        """The feeds with what the engine takes of them: of int64 what int32 holds, where the target has no int64."""
        if "int64" in self.settings.target.types:
            return self.feeds
        return [
            {
                name: array.astype(np.int32).astype(np.int64) if array.dtype == np.int64 else array
                for name, array in feeds.items()
            }
            for feeds in self.feeds
        ]

    def compare(
        self,
        stages: tuple[str, str],
        reference: Outputs,
        candidate: Outputs,
        precision: str = "fp32",
        names: Sequence[str] = (),
    ) -> list[Comparison]:
        """Compares two stages case by case (called as in ``names``), and keeps what was found."""
        with self.clock("compare"):
            cases = names or [case.name for case in self.cases]
            found = compare_stages(stages, cases, reference, candidate, self.settings.tolerance, precision)
        kept = [item for item in self.result.comparisons if (item.reference, item.candidate) != stages]
        self.result.comparisons = kept + found
        return found

    def hold_to_source(self, candidate: str, outputs: Outputs) -> None:
        """Keeps how far ``outputs``, computed in the asked precision, are from the source's."""
        with self.clock("compare"):
            self.result.source_error = source_error(candidate, self.source, outputs)

    def describe(self, graph: gs.Graph) -> None:
        """Tells the result what the model takes and returns."""
        self.result.inputs = [
            self._info(tensor, [each[tensor.name] for each in self.profiles if tensor.name in each])
            for tensor in graph.inputs
        ]
        self.result.outputs = [self._info(tensor, []) for tensor in graph.outputs]

    def _info(self, tensor: gs.Tensor, profiles: Sequence[Profile]) -> TensorInfo:
        from passes.ir import type_name

        name = type_name(tensor.dtype)
        if name == "int64" and name not in self.settings.target.types:
            name = "int32"  # the parser makes it so
        source = self.source_types.get(tensor.name)
        shape = [size if size is not None else "?" for size in tensor.shape or ()]
        spans = [[list(one.min), list(one.opt), list(one.max)] for one in profiles]
        return TensorInfo(tensor.name, name, shape, source.name if source is not None else name, spans)

    def look_for_engine(self) -> Outputs | None:
        """Looks into the cache, once all is known that an engine is made of: devices and calibration too. Returns what
        the rewritten model is known to compute, if it is."""
        assert self.result.onnx is not None
        with self.clock("rewrite"):
            made_of = [self.profiles, self.plan.key()]
            return self.caching.outputs(self.result.onnx, made_of, self.plugins, self.cases)
