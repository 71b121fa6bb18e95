"""What a conversion is asked to do, checked at the door, before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .build_settings import BuildSettings
from .cache import EngineCache
from .calibration import CALIBRATORS, check_calibration
from .compare import Tolerances
from .errors import UsageError
from .inputs import Array
from .onnx_source import INT_RANGE, external_files
from .precision import Precision, check_precision
from .result import Tolerance
from .target import Target
from .workspace import OUTPUT_FILES

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Runs the converted model: arrays by input name to arrays by output name."""


@dataclass(frozen=True)
class Settings:
    """How to convert, checked once at the door."""

    target: Target
    precision: Precision = field(default_factory=Precision)
    profiles: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    tolerance: Tolerances = None
    task_check: Callable[[Run], str] | None = None
    build: bool = True
    build_timeout: float | None = None
    compute_capabilities: tuple[tuple[int, int], ...] | None = None
    opset: int | None = None
    seed: int = 0
    int_range: tuple[int, int] = INT_RANGE
    prove: bool = False
    cache: EngineCache | None = None
    builder: BuildSettings = field(default_factory=BuildSettings)
    calibration: Any = None
    """A sequence of inputs, each as the example is given."""
    calibration_algorithm: str = "entropy"
    layers: bool = True
    """Whether the error of each layer of a lower precision is measured."""
    latency: bool = False
    golden: bool = False
    """Whether inputs and outputs are kept as evidence."""
    constants: Mapping[str, Any] | None = None
    """Values of an ONNX file's inputs that the engine is not to have."""

    @property
    def algorithm(self) -> str:
        """That of the calibration, under the bridge's name."""
        return CALIBRATORS.get(self.calibration_algorithm, self.calibration_algorithm)

    def __post_init__(self) -> None:
        check_precision(self.precision, self.target, self.compute_capabilities)
        check_calibration(self.calibration, self.calibration_algorithm, not self.precision.plain)
        self.builder.check(self.target, self.precision.name, self.profiles)
        if self.compute_capabilities is not None and self.target.flavour != "tensorrt-rtx":
            raise UsageError(f"compute_capabilities: {self.target} builds for the GPU that it runs on; leave them out.")
        for one in self.tolerance.values() if isinstance(self.tolerance, Mapping) else (self.tolerance,):
            if one is not None and not isinstance(one, Tolerance):
                raise UsageError(f"tolerance: {one!r} is not a bridge.Tolerance(rtol, atol).")
        if self.opset is not None and (type(self.opset) is not int or self.opset < 1):
            raise UsageError(f"opset: {self.opset!r} is no whole number of at least 1.")
        if self.int_range[0] > self.int_range[1]:
            raise UsageError(f"int_range: {self.int_range[0]} is above {self.int_range[1]}.")


def read_capabilities(given: Sequence[str] | None) -> tuple[tuple[int, int], ...] | None:
    if given is None:
        return None
    pairs = []
    for text in given:
        parts = str(text).split(".")
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise UsageError(f"compute_capabilities: {text!r} is not of the form '8.9'.")
        pairs.append((int(parts[0]), int(parts[1])))
    return tuple(pairs)


def source_path(source: Any) -> Path | None:
    """The absolute path of an ONNX file; None for a torch source. Raises UsageError for anything else."""
    if isinstance(source, (str, Path)):
        path = Path(source).absolute()
        if not path.is_file():
            raise UsageError(f"{path}: no such file.")
        return path
    import torch

    if isinstance(source, (torch.nn.Module, torch.export.ExportedProgram)):
        return None
    raise UsageError(
        f"source: a {type(source).__name__}; give an nn.Module, a torch.export.ExportedProgram, or an ONNX file's path."
    )


def check_constants(path: Path | None, constants: Mapping[str, Any] | None) -> None:
    """Raises UsageError where there are constants for a source that is no ONNX file."""
    if constants and path is None:
        raise UsageError("constants: are of an ONNX file's inputs; give a module its numbers as numbers, in inputs.")


def check_kept(path: Path, folder: Path) -> None:
    """Raises UsageError where a conversion into ``folder`` would overwrite the ONNX file or its data."""
    overwritten = [folder.resolve() / name for name in OUTPUT_FILES]
    files = [path.parent.resolve() / path.name, path.resolve()]
    if path.parent.resolve() == folder.resolve():
        files += [folder.resolve() / name for name in external_files(path)]
    for file in files:
        if file in overwritten:
            raise UsageError(f"{file}: would be overwritten by a conversion into {folder}; choose another workdir.")
