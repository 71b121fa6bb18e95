"""Errors of tensors, added up over samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..compare import Array, Tolerances, compare_arrays, tolerance_for
from ..layers import TensorError, Total
from ..result import Comparison, Tolerance
from .model import Error, StageName

_Pair = tuple[StageName, StageName]


class Tally:
    """The error of one output between two stages."""

    def __init__(self, stages: _Pair, output: str, tolerance: Tolerances, precision: str) -> None:
        self.stages, self.output, self.given, self.precision = stages, output, tolerance, precision
        self.found: list[Comparison] = []
        self.total = Total()
        self.lost = 0
        self.tolerance: Tolerance | None = None

    def add(self, reference: Array, candidate: Array, sample: str) -> Error:
        """Adds one sample; returns its own error."""
        kinds = str(reference.dtype), str(candidate.dtype)
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
        own = Total()
        for total in (own, self.total):
            total.add(_float(reference), _float(candidate))
        lost = _lost(_float(reference), _float(candidate))
        self.lost += lost
        return _error([compared], own, lost)

    def error(self) -> Error | None:
        return _error(self.found, self.total, self.lost) if self.found else None


def _error(found: list[Comparison], total: Total, lost: int) -> Error:
    """The worst of the samples; the norm and the mean are over all of them."""
    norm = total.figures()
    means = [(item.mean_abs_error, np.prod(item.reference_shape)) for item in found]
    known = [(mean, size) for mean, size in means if mean is not None]
    weight = float(sum(size for _, size in known))
    if norm is not None and norm.relative is None and not norm.max_abs and not norm.non_finite:
        relative: float | None = 0.0
    else:
        relative = norm.relative if norm is not None else None
    return Error(
        relative,
        _largest([item.max_abs_error for item in found]),
        sum(mean * float(size) for mean, size in known) / weight if weight else None,
        _largest([item.max_rel_error for item in found]),
        _smallest([item.cosine_similarity for item in found]),
        _smallest([item.psnr for item in found]),
        lost,
        _largest([item.tolerance_used for item in found]),
        all(item.agreed for item in found),
    )


def of_layer(found: TensorError | None) -> Error | None:
    """A layer's error, as reports have it."""
    return Error(found.relative, found.max_abs, non_finite=found.non_finite) if found is not None else None


def apart(reference: Array, candidate: Array) -> Error | None:
    """How far two tensors are apart, held to no tolerance; None where their shapes differ."""
    total = Total()
    total.add(_float(reference), _float(candidate))
    return of_layer(total.figures())


def by_output(stages: _Pair, outputs: Mapping[str, Array], given: Tolerances, precision: str) -> dict[str, Tally]:
    return {name: Tally(stages, name, given, precision) for name in outputs}


def _float(array: Array) -> Array:
    if array.dtype.kind == "f" or "float" in array.dtype.name:
        return array
    return array.astype(np.float64)


def _lost(reference: Array, candidate: Array) -> int:
    """Elements that are not finite on one side at least, and not the same."""
    if reference.shape != candidate.shape:
        return 0
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    wrong = ~(np.isfinite(a) & np.isfinite(b)) & ~((a == b) | (np.isnan(a) & np.isnan(b)))
    return int(wrong.sum())


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _smallest(values: list[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
