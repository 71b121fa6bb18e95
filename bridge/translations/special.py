"""Special functions by polynomials, series and recurrences in float32's precision, without branches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .registry import decomposes


def _float(x: Tensor) -> Tensor:
    return x if x.dtype.is_floating_point else x.to(torch.get_default_dtype())


def _polynomial(x: Tensor, factors: Sequence[float]) -> Tensor:
    """By Horner's scheme; the factor of the highest power first."""
    found = torch.full_like(x, factors[0])
    for factor in factors[1:]:
        found = found * x + factor
    return found


def _filled(x: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=x.dtype, device=x.device)


ERFINV_CENTRE: tuple[float, ...] = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
)
ERFINV_CENTRE += (-0.00417768164, 0.246640727, 1.50140941)
ERFINV_TAIL: tuple[float, ...] = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
)
ERFINV_TAIL += (0.00943887047, 1.00167406, 2.83297682)
"""M. Giles, Approximating the erfinv function (GPU Computing Gems, Jade edition, 2011), single precision."""


@decomposes("erfinv", "special_erfinv")
def erfinv(self: Tensor) -> Tensor:
    x = _float(self)
    w = -torch.log((1 - x) * (1 + x))
    centre = _polynomial(w - 2.5, ERFINV_CENTRE)
    tail = _polynomial(torch.sqrt(w.clamp(min=5.0)) - 3.0, ERFINV_TAIL)
    found = torch.where(w < 5.0, centre, tail) * x
    return torch.where(x.abs() == 1, x * math.inf, found)


@decomposes("special_ndtri")
def ndtri(self: Tensor) -> Tensor:
    return math.sqrt(2) * erfinv(2 * _float(self) - 1)


@decomposes("lgamma")
def lgamma(self: Tensor) -> Tensor:
    """Stirling's series from 8 on, to which x is moved by a product; reflected for x < 0.5."""
    x = _float(self)
    reflected = x < 0.5
    y = torch.where(reflected, 1 - x, x)
    product = torch.ones_like(y)
    moved = y
    for _ in range(8):
        small = moved < 8
        product = torch.where(small, product * moved, product)
        moved = torch.where(small, moved + 1, moved)
    inverse = 1 / moved
    square = inverse * inverse
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    found = (moved - 0.5) * torch.log(moved) - moved + 0.5 * math.log(2 * math.pi) + series - torch.log(product)
    fraction = x - torch.floor(x)
    mirror = math.log(math.pi) - torch.log(torch.sin(math.pi * fraction).abs()) - found
    found = torch.where(reflected, mirror, found)
    pole = (x <= 0) & (fraction == 0)
    return torch.where(pole | x.isinf(), _filled(x, math.inf), found)


def _shifted(x: Tensor, power: int, least: float = 8.0) -> tuple[Tensor, Tensor]:
    """The sum of 1 / (x + k) ** power over the steps that lead above ``least``, and where they lead."""
    total = torch.zeros_like(x)
    for _ in range(int(least)):
        small = x < least
        total = torch.where(small, total + x.pow(-power), total)
        x = torch.where(small, x + 1, x)
    return total, x


@decomposes("digamma", "special_psi")
def digamma(self: Tensor) -> Tensor:
    x = _float(self)
    reflected = x < 0
    y = torch.where(reflected, 1 - x, x)
    steps, far = _shifted(y, 1)
    square = 1 / (far * far)
    series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
    found = torch.log(far) - 0.5 / far - series - steps
    angle = math.pi * (x - torch.floor(x))
    found = torch.where(reflected, found - math.pi / torch.tan(angle), found)
    pole = reflected & (x == torch.floor(x))
    found = torch.where(pole, _filled(x, math.nan), found)
    return torch.where(x == 0, -math.inf * torch.ones_like(x), found)


@decomposes("polygamma")
def polygamma(n: int, self: Tensor) -> Tensor:
    """(-1) ** (n + 1) n! times Hurwitz' zeta, by Euler's and Maclaurin's sum; torch's own holds for x > 0 alone."""
    if n == 0:
        return digamma(self)
    x = _float(self)
    if n == 1:
        reflected = x < 0.5
        found = _zeta(n + 1, torch.where(reflected, 1 - x, x))
        sine = torch.sin(math.pi * (x - torch.floor(x)))
        return torch.where(reflected, (math.pi / sine).square() - found, found)
    return (-1.0) ** (n + 1) * math.factorial(n) * _zeta(n + 1, x)


BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66)


def _zeta(s: int, x: Tensor) -> Tensor:
    steps, far = _shifted(x, s)
    found = steps + far.pow(1 - s) / (s - 1) + 0.5 * far.pow(-s)
    rising = float(s)
    for k, number in enumerate(BERNOULLI):
        found = found + number * rising / math.factorial(2 * k + 2) * far.pow(-s - 2 * k - 1)
        rising *= (s + 2 * k + 1) * (s + 2 * k + 2)
    return found


I0_SMALL = (0.0045813, 0.0360768, 0.2659732, 1.2067492, 3.0899424, 3.5156229, 1.0)
I0_LARGE: tuple[float, ...] = (0.00392377, -0.01647633, 0.02635537, -0.02057706, 0.00916281, -0.00157565, 0.00225319)
I0_LARGE += (0.01328592, 0.39894228)
I1_SMALL = (0.00032411, 0.00301532, 0.02658733, 0.15084934, 0.51498869, 0.87890594, 0.5)
I1_LARGE = (
    -0.00420059,
    0.01787654,
    -0.02895312,
    0.02282967,
    -0.01031555,
    0.00163801,
    -0.00362018,
    -0.03988024,
    0.39894228,
)
"""Abramowitz and Stegun, 9.8.1 to 9.8.4: errors below 2.2e-7."""


def _modified_bessel(x: Tensor, order: int, scaled: bool) -> Tensor:
    size = x.abs()
    near = size.clamp(max=3.75)
    far = size.clamp(min=3.75)
    small = _polynomial((near / 3.75).square(), I1_SMALL if order else I0_SMALL)
    large = _polynomial(3.75 / far, I1_LARGE if order else I0_LARGE) / torch.sqrt(far)
    small = small * x if order else small
    large = large * torch.sign(x) if order else large
    if scaled:
        return torch.where(size < 3.75, small * torch.exp(-near), large)
    return torch.where(size < 3.75, small, large * torch.exp(far))


@decomposes("i0", "special_i0", "special_modified_bessel_i0")
def i0(self: Tensor) -> Tensor:
    return _modified_bessel(_float(self), 0, False)


@decomposes("special_i0e")
def i0e(self: Tensor) -> Tensor:
    return _modified_bessel(_float(self), 0, True)


@decomposes("special_i1", "special_modified_bessel_i1")
def i1(self: Tensor) -> Tensor:
    return _modified_bessel(_float(self), 1, False)


@decomposes("special_i1e")
def i1e(self: Tensor) -> Tensor:
    return _modified_bessel(_float(self), 1, True)


@decomposes("special_spherical_bessel_j0")
def spherical_bessel_j0(x: Tensor) -> Tensor:
    x = _float(x)
    near = x.abs() < 0.5
    square = torch.where(near, x * x, torch.zeros_like(x))
    series = 1 - square / 6 * (1 - square / 20 * (1 - square / 42 * (1 - square / 72)))
    far = torch.where(near, torch.ones_like(x), x)
    return torch.where(near, series, torch.sin(far) / far)


ERFCX: tuple[float, ...] = (
    0.17087277,
    -0.82215223,
    1.48851587,
    -1.13520398,
    0.27886807,
    -0.18628806,
    0.09678418,
    0.37409196,
    1.00002368,
)
ERFCX += (-1.26551223,)
"""Numerical Recipes in C (second edition, 6.2): the exponent of erfc(x) exp(x x) / t, t = 1 / (1 + x / 2); 1.2e-7."""


@decomposes("special_erfcx")
def erfcx(self: Tensor) -> Tensor:
    x = _float(self)
    size = x.abs()
    t = 1 / (1 + 0.5 * size)
    right = t * torch.exp(_polynomial(t, ERFCX))
    return torch.where(x < 0, 2 * torch.exp(x * x) - right, right)


GAMMA_TERMS = 96
"""Of the series below x = a + 1 and of the continued fraction above: enough for a up to some hundreds."""


def _incomplete_gamma(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper regularised function, by the series or the continued fraction that converges."""
    a, x = torch.broadcast_tensors(_float(a), _float(x))  # type: ignore[no-untyped-call]
    below = x < a + 1
    near = torch.where(below, x, a)
    term = torch.ones_like(a)
    total = term
    for k in range(1, GAMMA_TERMS):
        term = term * near / (a + k)
        total = total + term
    front = torch.exp(a * torch.log(x.clamp(min=1e-38)) - x - lgamma(a))
    lower = front * total / a
    far = torch.where(below, a + 2, x)
    fraction = torch.zeros_like(a)
    for k in range(GAMMA_TERMS, 0, -1):
        fraction = k * (a - k) / (far + 2 * k + 1 - a + fraction)
    upper = front / (far + 1 - a + fraction)
    lower = torch.where(below, lower, 1 - upper)
    upper = torch.where(below, 1 - lower, upper)
    zero = x == 0
    return torch.where(zero, torch.zeros_like(lower), lower), torch.where(zero, torch.ones_like(upper), upper)


@decomposes("igamma", "special_gammainc")
def igamma(self: Tensor, other: Tensor) -> Tensor:
    return _incomplete_gamma(self, other)[0]


@decomposes("igammac", "special_gammaincc")
def igammac(self: Tensor, other: Tensor) -> Tensor:
    return _incomplete_gamma(self, other)[1]


@decomposes("special_zeta")
def zeta(self: Tensor, other: Tensor) -> Tensor:
    """Hurwitz' zeta of s > 1 and q > 0, by Euler's and Maclaurin's sum."""
    found: Tensor
    s, far = torch.broadcast_tensors(_float(self), _float(other))  # type: ignore[no-untyped-call]
    found = torch.zeros_like(s)
    for _ in range(8):
        found = found + far.pow(-s)
        far = far + 1
    found = found + far.pow(1 - s) / (s - 1) + 0.5 * far.pow(-s)
    rising = s
    for k, number in enumerate(BERNOULLI):
        found = found + number / math.factorial(2 * k + 2) * rising * far.pow(-s - (2 * k + 1))
        rising = rising * (s + (2 * k + 1)) * (s + (2 * k + 2))
    return found
