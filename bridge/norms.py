"""The size of errors of any size: squares leave float64's range long before the values do."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

_LEAST, _MOST = 1e-140, 1e140
"""Between these, no square that counts has left float64's range."""


@np.errstate(over="ignore", under="ignore")
def norm(values: npt.NDArray[Any]) -> float:
    """The Euclidean norm of float64 ``values``; infinite only where it is itself beyond float64, or a value is."""
    found = float(np.linalg.norm(values))
    if _LEAST < found < _MOST or not values.size:
        return found
    largest = float(np.abs(values).max())
    if not largest or not np.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(values / largest))


def greatest(errors: npt.NDArray[Any]) -> float:
    """The largest absolute value, 0 of none; of a difference beyond float64, the most that float64 has."""
    return min(float(np.abs(errors).max(initial=0.0)), sys.float_info.max)


def share(error: float, reference: float) -> float | None:
    """One norm as a share of another; None where there is no such number, as of zeros that are missed."""
    if not (np.isfinite(error) and np.isfinite(reference)):
        return None
    if not reference:
        return None if error else 0.0
    found = error / reference
    return found if np.isfinite(found) else None
