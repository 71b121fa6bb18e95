"""Where an error comes from (``diff``), which nodes have to stay in float32 (``bisect``), what two runs changed
(``compare_runs``), and whether an engine holds on the machine where it runs (``verify``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bisection import Bisection, bisect
    from .evidence import verify
    from .measure import diff
    from .model import DiffReport
    from .runs import Limits, RunsReport, compare_runs
    from .verification import VerifyReport

_HOME = {
    "Bisection": "bisection",
    "DiffReport": "model",
    "Limits": "runs",
    "RunsReport": "runs",
    "VerifyReport": "verification",
    "bisect": "bisection",
    "compare_runs": "runs",
    "diff": "measure",
    "verify": "evidence",
}

__all__ = [
    "Bisection",
    "DiffReport",
    "Limits",
    "RunsReport",
    "VerifyReport",
    "bisect",
    "compare_runs",
    "diff",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: each needs other libraries."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
