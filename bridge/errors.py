"""The errors of a conversion: each names what was asked, what refused it, and the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["export", "rewrite", "precision", "build", "run", "compare"]


class BridgeError(Exception):
    """A conversion that could not go on. ``stage`` is the one that failed; the message is written for the user."""

    stage: Stage = "export"

    def __init__(self, message: str, stage: Stage | None = None) -> None:
        super().__init__(message)
        if stage is not None:
            self.stage = stage


class UsageError(BridgeError):
    """The call itself is wrong (an unknown input, min > max, a file that is not there): nothing was started."""


class ExportError(BridgeError):
    """torch.onnx could not export the module, or what it exported computes something else."""


class RewriteError(BridgeError):
    """A pass broke on the model."""

    stage: Stage = "rewrite"


@dataclass(frozen=True)
class Refusal:
    """One node that the target's parser refused, and where in the user's code it came from."""

    operator: str
    node: str
    words: str
    """The parser's own words."""
    module: str = ""
    """Path of the torch module, such as ``encoder.layers.3.attn``."""
    source: str = ""
    """File and line of the user's code."""
    hint: str = ""
    """What could help, if anything is known."""

    def __str__(self) -> str:
        origin = ", ".join(part for part in (self.module, self.source) if part)
        what = f"{self.operator} ({self.node})" if self.operator or self.node else "the model as a whole"
        text = what + (f", from {origin}" if origin else "") + f": {self.words}"
        return text + (f"\n  {self.hint}" if self.hint else "")


class PrecisionError(BridgeError):
    """What was asked for cannot be computed in the precision that was asked for."""

    stage: Stage = "precision"


class BuildError(BridgeError):
    """The parser or the builder refused the model, crashed, or ran out of time."""

    stage: Stage = "build"

    def __init__(self, message: str, refusals: tuple[Refusal, ...] = ()) -> None:
        super().__init__(message)
        self.refusals = refusals


class BuildTimeout(BuildError):
    """The build was stopped, since it took longer than it was given."""


class RunError(BridgeError):
    """A model on the way does not run."""

    stage: Stage = "run"


class CompareError(BridgeError):
    """Two neighbouring stages compute different outputs."""

    stage: Stage = "compare"


def disk_words(error: OSError) -> str:
    """What is said of files that could not be written."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}. Nothing half-written was left."
