"""What an engine may compute in. Weakly typed builders are allowed types; strongly typed networks have them already."""

from __future__ import annotations

from .errors import UsageError
from .result import Tolerance
from .target import Target

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8+fp16")

ROUNDED_TO = {"fp16": "float16", "bf16": "bfloat16"}
"""The dtype whose tolerance holds for what an engine of this precision computes."""

AS_A_WHOLE = Tolerance(0.2, 1e-3)
"""For int8, where single elements are rounded coarsely: of the norms of error and output, ``atol`` of each element."""


def check_precision(precision: str, target: Target) -> None:
    """Raises UsageError where ``target`` cannot be asked for it."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: not one of {', '.join(map(repr, PRECISIONS))}.")
    for name in precision.split("+"):
        reason = target.lacks_precision(name)
        if reason and target.strongly_typed:
            raise UsageError(
                f"precision {precision!r}: {target} {reason}. "
                + (
                    "For int8, give a model with QuantizeLinear and DequantizeLinear nodes."
                    if name == "int8"
                    else "For half precision, convert module.half() or module.bfloat16()."
                )
            )
        if reason:
            raise UsageError(f"precision {precision!r}: {target} {reason}; take another precision or target.")


def calibrates(precision: str) -> bool:
    """Whether the builder has to be shown typical inputs."""
    return "int8" in precision.split("+")
