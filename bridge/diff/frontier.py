"""What has to be kept of an error so that any tolerance can be judged later, without the tensors.

An element violates ``error <= atol + rtol * |reference|`` for some tolerance only if one on the upper convex hull of
all points ``(|reference|, error)`` does, on its rising left side: both sides are linear there. A few dozen points say
exactly what millions of elements would.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np

from ..inputs import Array
from ..result import Tolerance

Frontier = list[tuple[float, float]]
"""``(|reference|, error)``, both rising."""
PIECE = 1 << 20
"""Elements that are looked at together."""


def frontier(reference: Array, candidate: Array) -> Frontier:
    """Of two tensors of the same shape, over the elements that are finite on both sides."""
    a, b = reference.reshape(-1), candidate.reshape(-1)
    starts = range(0, a.size, PIECE)
    return merged([_piece(*(side[at : at + PIECE].astype(np.float64) for side in (a, b))) for at in starts])


@np.errstate(over="ignore", invalid="ignore")
def _piece(a: Array, b: Array) -> Frontier:
    finite = np.isfinite(a) & np.isfinite(b)
    size, error = np.abs(a[finite]), np.minimum(np.abs(b[finite] - a[finite]), sys.float_info.max)
    if not error.size:
        return []
    peak, smallest = float(error.max()), float(size.min())
    first = smallest, float(error[size == smallest].max())
    last = float(size[error == peak].min()), peak
    return list(dict.fromkeys([first, *_above(first, last, size, error), last]))


def _above(p: tuple[float, float], q: tuple[float, float], size: Array, error: Array) -> Frontier:
    """The corners of the hull between two of its corners: the point farthest above their line is one, and so on."""
    found: Frontier = []
    waiting = [(p, q, size, error)]
    while waiting:
        p, q, size, error = waiting.pop()
        height = (error - p[1]) * (q[0] - p[0]) - (q[1] - p[1]) * (size - p[0])
        over = (height > 0) & (size > p[0]) & (size < q[0])
        if not over.any():
            continue
        size, error, height = size[over], error[over], height[over]
        top = int(height.argmax())
        corner = float(size[top]), float(error[top])
        found.append(corner)
        waiting += [(p, corner, size, error), (corner, q, size, error)]
    return found


def merged(parts: Sequence[Frontier]) -> Frontier:
    """Of all of them together."""
    points = sorted({point for part in parts for point in part}, key=lambda point: (point[0], -point[1]))
    rising: Frontier = []
    for point in points:
        if not rising or point[1] > rising[-1][1]:
            rising.append(point)
    return _hull(rising)


def _hull(rising: Frontier) -> Frontier:
    """The upper hull of points that rise from left to right."""
    kept: Frontier = []
    for x, y in rising:
        while len(kept) > 1:
            (x0, y0), (x1, y1) = kept[-2], kept[-1]
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            kept.pop()
        kept.append((x, y))
    return kept


def tolerance_used(points: Sequence[tuple[float, float]], tolerance: Tolerance) -> float | None:
    """The largest error as a share of what is allowed there: over 1 disagrees. None where one is off that may not be at
    all."""
    shares = [0.0]
    for size, error in points:
        if error:
            allowed = tolerance.atol + tolerance.rtol * size
            if not allowed:
                return None
            shares.append(error / allowed)
    return max(shares) if math.isfinite(max(shares)) else None
