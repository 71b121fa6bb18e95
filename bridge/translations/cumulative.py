"""Running products, maxima and minima: a triangle of the axis, reduced. Their memory grows with the axis's square."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import decomposes


def _triangle(x: Tensor, dim: int, fill: float | int | bool) -> Tensor:
    """``x`` with ``dim`` last and once more before it: row i holds the elements up to i, and ``fill`` behind them."""
    rows = x.movedim(dim, -1).unsqueeze(-2)
    places = torch.arange(x.shape[dim], device=x.device)
    seen = places <= places.unsqueeze(-1)
    return torch.where(seen, rows, torch.full((), fill, dtype=x.dtype, device=x.device))


@decomposes("cumprod")
def cumprod(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    if dtype is None:
        dtype = self.dtype if self.dtype.is_floating_point or self.dtype.is_complex else torch.int64
    x = self.to(dtype)
    if x.dim() == 0:
        return x.clone()
    return _triangle(x, dim, 1).prod(-1).movedim(-1, dim)


@decomposes("cummax")
def cummax(self: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _running(self, dim, largest=True)


@decomposes("cummin")
def cummin(self: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _running(self, dim, largest=False)


def _running(x: Tensor, dim: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The best so far and where it stands: of equal ones the last, as torch has it."""
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    working = x.to(torch.int32) if x.dtype == torch.bool else x
    if x.dtype.is_floating_point:
        worst = -torch.inf if largest else torch.inf
    else:
        limits = torch.iinfo(working.dtype)
        worst = limits.min if largest else limits.max
    rows = _triangle(working, dim, worst)
    values = rows.amax(-1) if largest else rows.amin(-1)
    places = torch.arange(x.shape[dim], device=x.device)
    hit = (rows == values.unsqueeze(-1)) & (places <= places.unsqueeze(-1))
    where = torch.where(hit, places, torch.zeros((), dtype=torch.int64, device=x.device)).amax(-1)
    return values.to(x.dtype).movedim(-1, dim), where.movedim(-1, dim)
