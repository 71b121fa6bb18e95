"""Order statistics by sorting or TopK, whose ties ONNX gives to the lower index: stable as it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .registry import decomposes


@decomposes("sort.stable", "sort")
def sort(self: Tensor, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> tuple[Tensor, Tensor]:
    if self.dim() == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    if self.dtype == torch.bool:
        values, where = torch.topk(self.to(torch.int32), self.shape[dim], dim, descending)
        return values.to(torch.bool), where
    values, where = torch.topk(self, self.shape[dim], dim, descending)
    return values, where


@decomposes("kthvalue")
def kthvalue(self: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The last of the k smallest or of the n - k + 1 largest, whichever are fewer."""
    if self.dim() == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    size = self.shape[dim]
    few, largest = k, False
    if isinstance(size, int) and size - k + 1 < k:
        few, largest = size - k + 1, True
    values, where = torch.topk(self, few, dim, largest)
    values, where = values.narrow(dim, few - 1, 1), where.narrow(dim, few - 1, 1)
    return (values, where) if keepdim else (values.squeeze(dim), where.squeeze(dim))


@decomposes("median")
def median(self: Tensor) -> Tensor:
    return _median(self.reshape(-1), 0, False)[0]


@decomposes("median.dim")
def median_dim(self: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _median(self, dim, keepdim)


def _median(x: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The lower of the middle ones; NaN, and where it is, where there is one."""
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    size = x.shape[dim]
    if isinstance(size, int):
        values, where = kthvalue(x, (size + 1) // 2, dim, True)
    else:
        ordered, order = torch.topk(x, size, dim, False)
        middle = (size - 1) // 2
        values, where = ordered.narrow(dim, middle, 1), order.narrow(dim, middle, 1)
    if x.dtype.is_floating_point:
        nan = x.isnan()
        first = nan.to(torch.int32).argmax(dim, keepdim=True)
        some = nan.any(dim, keepdim=True)
        values = torch.where(some, torch.full((), math.nan, dtype=x.dtype, device=x.device), values)
        where = torch.where(some, first, where)
    return (values, where) if keepdim else (values.squeeze(dim), where.squeeze(dim))


@decomposes("nanmedian")
def nanmedian(self: Tensor) -> Tensor:
    return nanmedian_dim(self.reshape(-1), 0)[0]


@decomposes("nanmedian.dim")
def nanmedian_dim(self: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    if self.dim() == 0 or not self.dtype.is_floating_point:
        return _median(self, dim, keepdim)
    nan = self.isnan()
    counted = self.shape[dim] - nan.to(torch.int64).sum(dim, keepdim=True)
    filled = torch.where(nan, torch.full((), math.inf, dtype=self.dtype, device=self.device), self)
    ordered, order = torch.topk(filled, self.shape[dim], dim, False)
    middle = torch.div((counted - 1).clamp(min=0), 2, rounding_mode="floor")
    values, where = torch.gather(ordered, dim, middle), torch.gather(order, dim, middle)
    values = torch.where(counted > 0, values, torch.full((), math.nan, dtype=self.dtype, device=self.device))
    return (values, where) if keepdim else (values.squeeze(dim), where.squeeze(dim))


@decomposes("mode")
def mode(self: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest of the most frequent values, by comparing all pairs, and the last place that it stands at."""
    if self.dim() == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    x = self.movedim(dim, -1)
    counts = (x.unsqueeze(-1) == x.unsqueeze(-2)).to(torch.int32).sum(-1)
    frequent = counts == counts.amax(-1, keepdim=True)
    if x.dtype.is_floating_point:
        most: float = math.inf
    else:
        most = torch.iinfo(x.dtype).max
    values = torch.where(frequent, x, torch.full((), most, dtype=x.dtype, device=x.device)).amin(-1, keepdim=True)
    places = torch.arange(x.shape[-1], device=x.device)
    where = torch.where(x == values, places, torch.zeros_like(places)).amax(-1, keepdim=True)
    values, where = values.movedim(-1, dim), where.movedim(-1, dim)
    return (values, where) if keepdim else (values.squeeze(dim), where.squeeze(dim))


@decomposes("searchsorted.Tensor")
def searchsorted(
    sorted_sequence: Tensor,
    self: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """How many elements are smaller, or with ``right`` not larger: all of them are compared."""
    if sorter is not None:
        sorted_sequence = torch.gather(sorted_sequence, -1, sorter)
    upper = right or side == "right"
    rows = sorted_sequence if sorted_sequence.dim() == 1 else sorted_sequence.unsqueeze(-2)
    values = self.unsqueeze(-1)
    before = rows <= values if upper else rows < values
    return before.to(torch.int32).sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


@decomposes("searchsorted.Scalar")
def searchsorted_scalar(
    sorted_sequence: Tensor,
    self: float,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    value = torch.full((), self, dtype=sorted_sequence.dtype, device=sorted_sequence.device)
    return searchsorted(sorted_sequence, value, out_int32=out_int32, right=right, side=side, sorter=sorter)


@decomposes("bucketize.Tensor")
def bucketize(self: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    return searchsorted(boundaries, self, out_int32=out_int32, right=right)


@decomposes("bucketize.Scalar")
def bucketize_scalar(self: float, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    return searchsorted_scalar(boundaries, self, out_int32=out_int32, right=right)


@decomposes("histc")
def histc(self: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Each element's bin against all bins; with min = max the range is the data's own."""
    x = self.reshape(-1)
    if min == max == 0:
        low, high = x.amin(0), x.amax(0)
    else:
        low, high = (torch.full((), float(end), dtype=x.dtype, device=x.device) for end in (min, max))
    same = low == high
    low, high = torch.where(same, low - 1, low), torch.where(same, high + 1, high)
    place = torch.floor((x - low) * bins / (high - low)).clamp(max=bins - 1)
    inside = (x >= low) & (x <= high)
    numbers = torch.arange(bins, dtype=x.dtype, device=x.device)
    hits = (place == numbers.unsqueeze(-1)) & inside
    return hits.to(x.dtype).sum(-1)
