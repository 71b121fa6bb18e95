"""Elementwise operators that torch.onnx leaves to primitives that it does not translate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .registry import decomposes


@decomposes("hypot")
def hypot(self: Tensor, other: Tensor) -> Tensor:
    """With the larger one taken out, so that no square overflows."""
    a, b = self.abs(), other.abs()
    large, small = torch.maximum(a, b), torch.minimum(a, b)
    safe = torch.where(large > 0, large, torch.ones_like(large))
    ratio = torch.where(large.isinf(), torch.zeros_like(large), small / safe)
    return large * torch.sqrt(1 + ratio * ratio)


def negative(x: Tensor) -> Tensor:
    """Whether the sign is minus, that of minus nought included, whose inverse alone shows it."""
    return (x < 0) | ((x == 0) & (1 / x < 0)) if x.dtype.is_floating_point else x < 0


@decomposes("_neg_view")
def neg_view(self: Tensor) -> Tensor:
    """What the imaginary part of a conjugate is."""
    return torch.neg(self)


@decomposes("signbit")
def signbit(self: Tensor) -> Tensor:
    return negative(self)


@decomposes("copysign.Tensor")
def copysign(self: Tensor, other: Tensor) -> Tensor:
    size = (self if self.dtype.is_floating_point else self.to(torch.get_default_dtype())).abs()
    return torch.where(negative(other), -size, size)


@decomposes("copysign.Scalar")
def copysign_scalar(self: Tensor, other: float) -> Tensor:
    size = (self if self.dtype.is_floating_point else self.to(torch.get_default_dtype())).abs()
    return -size if math.copysign(1.0, other) < 0 else size


@decomposes("fmax")
def fmax(self: Tensor, other: Tensor) -> Tensor:
    return _without_nan(self, other, torch.maximum)


@decomposes("fmin")
def fmin(self: Tensor, other: Tensor) -> Tensor:
    return _without_nan(self, other, torch.minimum)


def _without_nan(a: Tensor, b: Tensor, choose: object) -> Tensor:
    dtype = torch.result_type(a, b)
    a, b = torch.broadcast_tensors(a.to(dtype), b.to(dtype))  # type: ignore[no-untyped-call]
    chosen: Tensor = choose(a, b)  # type: ignore[operator]
    if not dtype.is_floating_point:
        return chosen
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, chosen))


@decomposes("frexp.Tensor")
def frexp(self: Tensor) -> tuple[Tensor, Tensor]:
    """The exponent from the logarithm, corrected by one where that was rounded over a power of two."""
    size = self.abs()
    normal = (size > 0) & ~size.isinf() & ~size.isnan()
    safe = torch.where(normal, size, torch.full((), 0.5, dtype=self.dtype, device=self.device))
    exponent = torch.floor(torch.log2(safe)) + 1
    half = torch.floor(exponent / 2)
    mantissa = safe * torch.exp2(-half) * torch.exp2(half - exponent)
    exponent = torch.where(mantissa >= 1, exponent + 1, torch.where(mantissa < 0.5, exponent - 1, exponent))
    mantissa = torch.where(mantissa >= 1, mantissa / 2, torch.where(mantissa < 0.5, mantissa * 2, mantissa))
    exponent = torch.where(normal, exponent, torch.zeros_like(exponent)).to(torch.int32)
    return torch.where(normal, torch.where(self < 0, -mantissa, mantissa), self), exponent


@decomposes("aminmax")
def aminmax(self: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    if dim is None:
        flat = self.reshape(-1)
        low, high = flat.amin(0), flat.amax(0)
        if keepdim:
            low, high = low.reshape([1] * self.dim()), high.reshape([1] * self.dim())
        return low, high
    return self.amin(dim, keepdim), self.amax(dim, keepdim)


@decomposes("amax")
def amax(self: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """torch.onnx knows it along axes alone, and not of the whole tensor."""
    return _extremum(torch.amax, self, dim, keepdim)


@decomposes("amin")
def amin(self: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    return _extremum(torch.amin, self, dim, keepdim)


def _extremum(choose: Callable[..., Tensor], x: Tensor, dim: Sequence[int], keepdim: bool) -> Tensor:
    if dim or not x.dim():
        return NotImplemented  # type: ignore[no-any-return]
    return choose(x, list(range(x.dim())), keepdim)


@decomposes("clamp")
def clamp(self: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """``clamp(1e-8, 1)``: torch.onnx knows no clamp between an integer and a float."""
    if min is None or max is None or {type(min), type(max)} != {float, int}:
        return NotImplemented  # type: ignore[no-any-return]
    return torch.clamp(self, float(min), float(max))


EUCLID = {torch.uint8: 13, torch.int8: 12, torch.int16: 23, torch.int32: 46, torch.int64: 92}
"""The most steps that Euclid's algorithm takes in a type, by Fibonacci's numbers."""


@decomposes("gcd")
def gcd(self: Tensor, other: Tensor) -> Tensor:
    dtype = torch.result_type(self, other)
    a, b = torch.broadcast_tensors(self.to(dtype).abs(), other.to(dtype).abs())  # type: ignore[no-untyped-call]
    found: Tensor = a
    for _ in range(EUCLID[dtype]):
        more = b > 0
        safe = torch.where(more, b, torch.ones_like(b))
        found, b = torch.where(more, b, found), torch.where(more, torch.remainder(found, safe), b)
    return found


@decomposes("lcm")
def lcm(self: Tensor, other: Tensor) -> Tensor:
    common = gcd(self, other)
    safe = torch.where(common > 0, common, torch.ones_like(common))
    return (torch.div(self, safe, rounding_mode="trunc") * other).abs()


@decomposes("__lshift__.Tensor")
def lshift(self: Tensor, other: Tensor) -> Tensor:
    return torch.bitwise_left_shift(self, other)


@decomposes("__rshift__.Tensor")
def rshift(self: Tensor, other: Tensor) -> Tensor:
    return torch.bitwise_right_shift(self, other)


@decomposes("rrelu_with_noise_functional")
def rrelu(
    self: Tensor,
    noise: Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: object = None,
) -> tuple[Tensor, Tensor]:
    return torch.where(self >= 0, self, self * ((lower + upper) / 2)), noise


@decomposes("_cdist_forward")
def cdist(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None) -> Tensor:
    return distances((x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs(), p)


@decomposes("_pdist_forward")
def pdist(self: Tensor, p: float = 2) -> Tensor:
    """The rows above the diagonal, of a known number of vectors."""
    n = self.shape[0]
    rows = [self[i + 1 :] - self[i] for i in range(n - 1)]
    return distances(torch.cat(rows).abs(), p) if rows else self.sum(-1)[:0]


def distances(x: Tensor, p: float) -> Tensor:
    """The p-norms of what is positive, along the last axis."""
    if p == 0:
        return (x != 0).to(x.dtype).sum(-1)
    if p == 1:
        return x.sum(-1)
    if math.isinf(p):
        return x.amax(-1)
    return (x * x).sum(-1).sqrt() if p == 2 else x.pow(p).sum(-1).pow(1 / p)
