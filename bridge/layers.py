"""How far the layers of a low-precision model are off: what is known of each, and the worst of them as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .norms import greatest, norm, share

Array = npt.NDArray[Any]

PIECE = 1 << 16
"""Elements that are measured at a time: so many stay in a core's cache."""
TINY = 1e-12
"""Squares of smaller numbers lose digits in float32."""


@dataclass(frozen=True)
class TensorError:
    """How far a tensor is from the reference's, over all samples and the elements that are within both types' range.

    ``None`` stands for a figure that does not exist: there is no relative error to a reference of zeros.
    """

    relative: float | None
    """The norm of the error, as a share of the reference's norm."""
    max_abs: float | None
    non_finite: int
    """Elements that are infinite or NaN, and finite in the reference."""
    saturated: int = 0
    """Elements that are finite, and in the reference beyond the range of the type: a mask's "minus infinity", which
    became the lowest value that there is, for instance."""


@dataclass(frozen=True)
class LayerError:
    """One output of a node of the reference's main graph, and what the low-precision model makes of it."""

    tensor: str
    """Its name in the reference."""
    node: str
    operator: str
    module: str
    """Path of the torch module; empty where it is not known."""
    source: str
    """File and line of the user's code."""
    precision: str
    """What the low model computes the node in: ``float32``, ``float16``, ``int8``, …"""
    largest: float
    """The reference's largest finite absolute value."""
    carried: TensorError | None
    """The error when the low model runs from end to end; None where the shapes differ."""
    introduced: TensorError | None
    """What the node adds by itself: it is given the reference's inputs, rounded as the low model keeps them, and held
    to what the reference's node makes of the same. Casts and quantisation on the way to a node count with it. None
    where the node cannot be run by itself, or what it is given is not finite."""

    @property
    def badness(self) -> tuple[int, float]:
        """The order of blame: what is no longer finite comes first, then the largest relative error introduced."""
        found = self.introduced
        return (found.non_finite, found.relative or 0.0) if found is not None else (0, 0.0)

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.module, self.source)))
        return f"{self.operator} {self.node or self.tensor}" + (f" ({where})" if where else "")


def worst(errors: Iterable[LayerError], count: int = 10) -> list[LayerError]:
    """The layers that introduce most, worst first; those that introduce nothing are left out."""
    guilty = [item for item in errors if item.badness > (0, 0.0)]
    return sorted(guilty, key=lambda item: item.badness, reverse=True)[:count]


def table(errors: Iterable[LayerError], count: int = 10) -> str:
    """The worst layers for people, a line each."""
    rows: list[tuple[str, ...]] = [
        ("layer", "in", "introduced", "carried", "largest", "not finite", "saturated", "from")
    ]
    for item in worst(errors, count):
        figures = [_figure(found) for found in (item.introduced, item.carried)]
        lost = (item.introduced.non_finite, item.introduced.saturated) if item.introduced is not None else (0, 0)
        where = ", ".join(filter(None, (item.module, item.source)))
        name = f"{item.operator} {item.node or item.tensor}"
        rows.append((name, item.precision, *figures, f"{item.largest:.3g}", *map(str, lost), where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _figure(found: TensorError | None) -> str:
    if found is None or found.relative is None:
        return "not finite" if found is not None and found.non_finite else "-"
    return f"{found.relative:.1e}"


@dataclass
class Total:
    """The error of one tensor, added up over samples."""

    off: float = 0.0
    """The error's norm."""
    size: float = 0.0
    """The reference's norm."""
    max_abs: float = 0.0
    largest: float = 0.0
    non_finite: int = 0
    saturated: int = 0
    counted: int = 0
    misshapen: bool = False

    def add(self, reference: Array, found: Array, limit: float) -> None:
        """``limit``: the largest finite value of the type that ``found`` has in its model."""
        if reference.shape != found.shape:
            self.misshapen = True
            return
        a, b = reference.reshape(-1), found.reshape(-1)
        for start in range(0, a.size, PIECE):
            end = start + PIECE
            if a.dtype != np.float32 or not self._usual(
                a[start:end], b[start:end].astype(np.float32, copy=False), limit
            ):
                self._piece(a[start:end].astype(np.float64), b[start:end].astype(np.float64), limit)

    @np.errstate(over="ignore", invalid="ignore")
    def _usual(self, a: Array, b: Array, limit: float) -> bool:
        """Adds a piece in float32, whose products BLAS adds up; False, and nothing added, where that would not do: an
        element is not finite or beyond the limit, or squares leave float32's range."""
        error = b - a
        squares, reference_squares = float(np.dot(error, error)), float(np.dot(a, a))
        if not (math.isfinite(squares) and math.isfinite(reference_squares)):
            return False
        largest = max(float(a.max(initial=0.0)), -float(a.min(initial=0.0)))
        max_abs = max(float(error.max(initial=0.0)), -float(error.min(initial=0.0)))
        if largest > limit or 0 < max_abs < TINY or 0 < largest < TINY:
            return False
        self.largest, self.max_abs = max(self.largest, largest), max(self.max_abs, max_abs)
        self.counted += a.size
        self.off = math.hypot(self.off, math.sqrt(squares))
        self.size = math.hypot(self.size, math.sqrt(reference_squares))
        return True

    @np.errstate(over="ignore")
    def _piece(self, a: Array, b: Array, limit: float) -> None:
        finite = np.isfinite(a)
        self.largest = max(self.largest, float(np.abs(a[finite]).max(initial=0.0)))
        both = finite & np.isfinite(b)
        self.non_finite += int(finite.sum() - both.sum())
        beyond = both & (np.abs(a) > limit)
        self.saturated += int(beyond.sum())
        both &= ~beyond
        a, error = a[both], (b[both] - a[both])
        self.counted += a.size
        self.off = math.hypot(self.off, norm(error))
        self.size = math.hypot(self.size, norm(a))
        self.max_abs = max(self.max_abs, greatest(error))

    def figures(self) -> TensorError | None:
        """None where nothing was added."""
        if self.misshapen or not (self.counted or self.non_finite or self.saturated):
            return None
        relative = share(self.off, self.size) if self.counted else None
        return TensorError(relative, self.max_abs if self.counted else None, self.non_finite, self.saturated)
