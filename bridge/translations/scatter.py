"""Scattering with a reduction: torch.onnx leaves out that of ``mean``, and has no index_reduce, put or take of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import decomposes


@decomposes("scatter_reduce.two")
def scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Only what torch.onnx errs in: ``mean``, and a source that is larger than its index."""
    if self.dim() == 0:
        self1, index1, src1 = (item.reshape(1) for item in (self, index, src))
        return scatter_reduce(self1, 0, index1, src1, reduce, include_self=include_self).reshape(())
    trimmed = _trim(src, index)
    if reduce != "mean":
        if trimmed is src:
            return NotImplemented  # type: ignore[no-any-return]
        return self.scatter_reduce(dim, index, trimmed, reduce, include_self=include_self)
    ones = torch.ones_like(self)
    hits = torch.zeros_like(self).scatter_add(dim, index, torch.ones_like(trimmed))
    start = self
    if include_self:
        hits = hits + ones
    else:
        start = torch.where(hits > 0, torch.zeros_like(self), self)
        hits = torch.maximum(hits, ones)
    total = start.scatter_add(dim, index, trimmed)
    return total / hits if self.dtype.is_floating_point else torch.div(total, hits, rounding_mode="floor")


def _trim(src: Tensor, index: Tensor) -> Tensor:
    """The part of ``src`` that ``index`` has an entry for."""
    for axis in range(src.dim()):
        if src.shape[axis] is not index.shape[axis] and src.shape[axis] != index.shape[axis]:
            src = src.narrow(axis, 0, index.shape[axis])
    return src


REDUCTIONS = {"add": "sum", "multiply": "prod"}


@decomposes("scatter.reduce")
def scatter_src(self: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    return self.scatter_reduce(dim, index, _trim(src, index), REDUCTIONS[reduce])


@decomposes("scatter.value_reduce")
def scatter_value(self: Tensor, dim: int, index: Tensor, value: float, *, reduce: str) -> Tensor:
    src = torch.full(index.shape, value, dtype=self.dtype, device=self.device)
    return self.scatter_reduce(dim, index, src, REDUCTIONS[reduce])


@decomposes("index_reduce")
def index_reduce(
    self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    shape = [1] * max(1, self.dim())
    shape[dim] = -1
    full = index.reshape(shape).expand(source.shape if source.dim() else [1])
    flat = self if self.dim() else self.reshape(1)
    values = source if source.dim() else source.reshape(1)
    return flat.scatter_reduce(dim, full, values, reduce, include_self=include_self).reshape(self.shape)


@decomposes("put")
def put(self: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    flat = self.reshape(-1)
    places = index.reshape(-1)
    places = torch.where(places < 0, places + flat.shape[0], places)
    return flat.index_put((places,), source.reshape(-1), accumulate).reshape(self.shape)


@decomposes("masked_scatter")
def masked_scatter(self: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The n-th element that the mask takes is the n-th of the source: a cumulative sum says which."""
    self, mask = torch.broadcast_tensors(self, mask)  # type: ignore[no-untyped-call]
    taken = mask.reshape(-1)
    order = (taken.to(torch.int64).cumsum(0) - 1).clamp(min=0)
    values = source.reshape(-1).index_select(0, order)
    return torch.where(taken, values, self.reshape(-1)).reshape(self.shape)
