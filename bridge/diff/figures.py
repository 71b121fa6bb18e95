"""Errors of tensors, added up over samples."""

from __future__ import annotations

import math

import numpy as np

from ..compare import Array, Tolerances, compare_arrays, nothing_finite, tolerance_for
from ..layers import TensorError
from ..norms import greatest, norm, share
from ..result import Comparison, Tolerance
from .frontier import Frontier, frontier, merged
from .model import Error, StageName

_Pair = tuple[StageName, StageName]

PIECE = 1 << 20
"""Elements that are widened at a time."""


class Norms:
    """The norms of an error and of its reference, over what is finite on both sides."""

    def __init__(self) -> None:
        self.off = self.size = self.max_abs = 0.0
        self.lost = self.counted = 0
        """``lost``: elements that are not finite on one side at least, and not the same."""
        self.misshapen = False

    @np.errstate(over="ignore", invalid="ignore")
    def add(self, reference: Array, candidate: Array, largest: float = math.inf) -> None:
        """``largest``: what the candidate can hold, where that is less than its array's type says."""
        if reference.shape != candidate.shape:
            self.misshapen = True
            return
        limit = min(_range(candidate), largest)
        flat = reference.reshape(-1), candidate.reshape(-1)
        for start in range(0, reference.size, PIECE):
            a, b = (side[start : start + PIECE].astype(np.float64) for side in flat)
            both = np.isfinite(a) & np.isfinite(b)
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            self.lost += int((~both & ~same).sum())
            both &= np.abs(a) <= limit  # a mask's "minus infinity" became the lowest value that there is
            a, error = a[both], b[both] - a[both]
            self.counted += a.size
            self.off = math.hypot(self.off, norm(error))
            self.size = math.hypot(self.size, norm(a))
            self.max_abs = max(self.max_abs, greatest(error))

    @property
    def relative(self) -> float | None:
        return None if self.misshapen or not self.counted else share(self.off, self.size)


def _range(array: Array) -> float:
    """The largest finite value of an array's type."""
    if "float" not in array.dtype.name:
        return math.inf
    from ml_dtypes import finfo

    return float(finfo(array.dtype).max)  # type: ignore[no-untyped-call]


class Tally:
    """The error of one output between two stages."""

    def __init__(self, stages: _Pair, output: str, tolerance: Tolerances, precision: str) -> None:
        self.stages, self.output, self.given, self.precision = stages, output, tolerance, precision
        self.found: list[Comparison] = []
        self.total = Norms()
        self.tolerance: Tolerance | None = None
        self.integers = False
        self.points: Frontier | None = []

    def add(self, reference: Array, candidate: Array, sample: str) -> Error:
        """Adds one sample; returns its own error."""
        kinds = str(reference.dtype), str(candidate.dtype)
        self.integers = reference.dtype.kind in "biu"
        self.tolerance = tolerance_for(self.output, *kinds, self.given, self.precision)
        compared = compare_arrays(
            reference,
            candidate,
            stages=self.stages,
            inputs=sample,
            output=self.output,
            tolerance=self.given,
            precision=self.precision,
        )
        self.found.append(compared)
        same = reference.shape == candidate.shape
        part = frontier(reference, candidate) if same else None
        self.points = merged([self.points, part]) if self.points is not None and part is not None else None
        own = Norms()
        for norms in (own, self.total):
            norms.add(reference, candidate)
        return _error([compared], own, part)

    @property
    def idle(self) -> bool:
        """Whether nothing of it is finite in any sample, so that nothing was compared."""
        return nothing_finite(self.found)

    def error(self) -> Error | None:
        return _error(self.found, self.total, self.points) if self.found else None


def _error(found: list[Comparison], norms: Norms, points: Frontier | None) -> Error:
    """The worst of the samples; the norm and the mean are over all of them. No figures where shapes differ in one."""
    if norms.misshapen:
        return Error(None, None, agreed=False)
    means = [(item.mean_abs_error, np.prod(item.reference_shape)) for item in found]
    known = [(mean, size) for mean, size in means if mean is not None]
    weight = float(sum(size for _, size in known))
    wrong = [item for item in found if not item.agreed]
    told = all(item.tolerance_used is not None for item in wrong)
    return Error(
        norms.relative,
        _largest([item.max_abs_error for item in found]),
        sum(mean * float(size) for mean, size in known) / weight if weight else None,
        _largest([item.max_rel_error for item in found]),
        _smallest([item.cosine_similarity for item in found]),
        _smallest([item.psnr for item in found]),
        norms.lost,
        _largest([item.tolerance_used for item in found]) if told else None,
        not wrong,
        points,
    )


def of_layer(found: TensorError | None) -> Error | None:
    """A layer's error, as reports have it."""
    return Error(found.relative, found.max_abs, non_finite=found.non_finite) if found is not None else None


def apart(reference: Array, candidate: Array, largest: float = math.inf) -> Error | None:
    """How far two tensors are apart, held to no tolerance; None where their shapes differ. ``largest`` as of Norms."""
    norms = Norms()
    norms.add(reference, candidate, largest)
    if norms.misshapen:
        return None
    return Error(norms.relative, norms.max_abs if norms.counted else None, non_finite=norms.lost)


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _smallest(values: list[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
