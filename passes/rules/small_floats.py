"""Floating-point types of 8 bits and fewer; TensorRT has two of them, and these between Q and DQ alone.

A Cast to such a type rounds to its grid; what it rounds to is computed in float32, where every such value is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder


@dataclass(frozen=True)
class Format:
    """A grid of numbers: ``digits`` binary places after the first digit, down to the exponent ``least``."""

    digits: int
    least: int
    """The exponent of the smallest normal number; below it the steps stay as wide."""
    largest: float
    infinity: bool = False
    nan: bool = True

    @property
    def greatest(self) -> int:
        """The exponent of the largest number."""
        return math.frexp(self.largest)[1] - 1


FORMATS = {
    "float8_e4m3fn": Format(3, -6, 448),
    "float8_e4m3fnuz": Format(3, -7, 240),
    "float8_e5m2": Format(2, -14, 57344, infinity=True),
    "float8_e5m2fnuz": Format(2, -15, 57344),
    "float4_e2m1fn": Format(1, 0, 6, nan=False),
    "float8_e8m0fnu": Format(0, -127, 2.0**127),
}
"""By ml_dtypes' name of the type."""


def rounded(g: Builder, x: gs.Tensor, kind: np.dtype[Any], attrs: Mapping[str, Any]) -> gs.Tensor:
    """float32 ``x`` on the grid of ``kind``, as a Cast of these attributes puts it there: half to even."""
    form = FORMATS[kind.name]
    saturates = bool(attrs.get("saturate", 1)) or not form.nan
    if kind.name == "float8_e8m0fnu":
        return _power_of_two(g, x, form, str(attrs.get("round_mode", "up")))
    size = g.op.Abs(x)
    step = g.op.Mul(leading_power(g, size, form), g.constant(2.0**-form.digits, np.float32))
    y = g.op.Mul(g.op.Round(g.op.Div(x, step)), step)
    most = g.constant(form.largest, np.float32)
    if saturates:
        y = g.op.Max(g.op.Min(y, most), g.constant(-form.largest, np.float32))
    else:
        beyond = g.op.Greater(g.op.Abs(y), most)
        over = g.constant(np.nan, np.float32)
        if form.infinity:  # by a division, since TensorRT 8.5 computes with 1e38 where a constant is infinite
            over = g.op.Div(x, g.constant(0, np.float32))
        y = g.op.Where(beyond, over, y)
    result: gs.Tensor = g.op.Where(g.op.IsNaN(x), g.constant(np.nan if form.nan else 0.0, np.float32), y)
    return result


def leading_power(g: Builder, size: gs.Tensor, form: Format) -> gs.Tensor:
    """The power of two that ``size`` begins with, between the least and the greatest of the format.

    The logarithm is a little off at times; the comparison with the powers beside it is exact.
    """
    least, most = g.constant(2.0**form.least, np.float32), g.constant(2.0**form.greatest, np.float32)
    inside = g.op.Where(g.op.IsNaN(size), least, g.op.Max(g.op.Min(size, most), least))
    exponent = g.op.Floor(g.op.Div(g.op.Log(inside), g.constant(math.log(2), np.float32)))
    place = g.op.Sub(g.cast(exponent, np.int64), g.constant(form.least - 1))
    exponents = np.minimum(np.arange(form.least - 1, form.greatest + 2), form.greatest)
    powers = np.exp2(exponents.astype(np.float64)).astype(np.float32)
    power = g.op.Gather(g.constant(powers), place)
    two = g.constant(2, np.float32)
    power = g.op.Where(g.op.Less(inside, power), g.op.Div(power, two), power)
    twice = g.op.Mul(power, two)
    result: gs.Tensor = g.op.Where(g.op.GreaterOrEqual(inside, twice), twice, power)
    return result


def _power_of_two(g: Builder, x: gs.Tensor, form: Format, mode: str) -> gs.Tensor:
    """|x| as a power of two; what has none (Inf, NaN) is NaN."""
    size = g.op.Abs(x)
    below = leading_power(g, size, form)
    most = g.constant(form.largest, np.float32)
    if mode == "down":
        y = below
    else:
        limit = below if mode == "up" else g.op.Mul(below, g.constant(1.5, np.float32))
        compare = "Greater" if mode == "up" else "GreaterOrEqual"
        above = g.op.Min(g.op.Mul(below, g.constant(2, np.float32)), most)
        y = g.op.Where(g.node(compare, [size, limit], {}), above, below)
    lost = g.op.Or(g.op.IsNaN(x), g.op.IsInf(x))
    result: gs.Tensor = g.op.Where(lost, g.constant(np.nan, np.float32), y)
    return result
