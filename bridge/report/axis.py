"""Logarithmic axes: the decades that hold some errors, and where a value lies on them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


def decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten that hold the positive values with some air, at least two decades."""
    exponents = [math.log10(value) for value in values if value > 0]
    if not exponents:
        return -8, -2
    low, high = math.floor(min(exponents) - 0.1), math.ceil(max(exponents) + 0.1)
    return low, max(high, low + 2)


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class LogAxis:
    """Maps ``10**low`` to ``start`` and ``10**high`` to ``end``; values beyond are drawn at the ends."""

    low: int
    high: int
    start: float
    end: float

    def at(self, value: float) -> float:
        return self._place(math.log10(value) if value > 0 else self.low)

    def holds(self, value: float) -> bool:
        return value > 0 and self.low < math.log10(value) <= self.high

    def ticks(self, at_most: int) -> list[Tick]:
        step = math.ceil((self.high - self.low) / at_most)
        return [Tick(self._place(power), f"1e{power:+03d}") for power in range(self.low, self.high + 1, step)]

    def _place(self, exponent: float) -> float:
        share = (min(max(exponent, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)
