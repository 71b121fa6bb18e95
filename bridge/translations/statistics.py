"""Losses, norms, covariances and quantiles that torch.onnx writes wrongly, or not at all with a dynamic batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .registry import decomposes, replaces
from .solving import eye, linalg_inv, order

REDUCTIONS = ("none", "mean", "sum")


def _reduced(x: Tensor, reduction: int) -> Tensor:
    flat = x.reshape(-1)
    return x if reduction == 0 else flat.mean(0) if reduction == 1 else flat.sum(0)


@decomposes("cross_entropy_loss")
def cross_entropy(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.onnx leaves out label_smoothing, and takes probabilities for classes."""
    axis = 0 if self.dim() == 1 else 1
    log = torch.nn.functional.log_softmax(self, axis)
    shape = [1] * self.dim()
    shape[axis] = -1
    weights = None if weight is None else weight.reshape(shape)
    if target.dtype.is_floating_point:
        wanted = target * (1 - label_smoothing) + label_smoothing / self.shape[axis]
        lost = -(wanted * (log if weights is None else log * weights)).sum(axis)
        if reduction != 1:
            return _reduced(lost, reduction)
        return lost.reshape(-1).sum(0) / (lost.reshape(-1).shape[0])
    found = torch.nn.functional.nll_loss(
        log, target, weight, ignore_index=ignore_index, reduction=REDUCTIONS[reduction]
    )
    if not label_smoothing:
        return found
    counted = target != ignore_index
    smooth = -(log if weights is None else log * weights).sum(axis)
    smooth = torch.where(counted, smooth, torch.zeros_like(smooth))
    if reduction == 1:
        share = counted.to(log.dtype)
        if weight is not None:
            share = share * weight[torch.where(counted, target, torch.zeros_like(target))]
        smooth = smooth.reshape(-1).sum(0) / share.reshape(-1).sum(0)
    else:
        smooth = _reduced(smooth, reduction)
    return (1 - label_smoothing) * found + label_smoothing / self.shape[axis] * smooth


@decomposes("multilabel_margin_loss_forward")
def multilabel_margin(self: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Targets count up to the first that is negative; every pair of a target and another class is a term."""
    classes = self.shape[-1]
    valid = (target < 0).to(torch.int64).cumsum(-1) == 0
    places = torch.where(valid, target, torch.zeros_like(target))
    numbers = torch.arange(classes, device=self.device)
    is_target = ((places.unsqueeze(-1) == numbers) & valid.unsqueeze(-1)).any(-2)
    chosen = torch.gather(self, -1, places)
    terms = (1 - (chosen.unsqueeze(-1) - self.unsqueeze(-2))).clamp(min=0)
    counted = valid.unsqueeze(-1) & ~is_target.unsqueeze(-2)
    lost = torch.where(counted, terms, torch.zeros_like(terms)).sum((-2, -1)) / classes
    return _reduced(lost, reduction), is_target.to(self.dtype)


@replaces("linalg_matrix_norm")
def matrix_norm(
    self: Tensor, ord: Any, dim: Sequence[int] = (-2, -1), keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """torch's own makes the batch a constant."""
    x = self if dtype is None else self.to(dtype)
    first, second = (axis % x.dim() for axis in dim)
    found: Tensor
    if abs(ord) == 2:
        values = torch.linalg.svdvals(x.movedim((first, second), (-2, -1)))
        found = values.amax(-1) if ord > 0 else values.amin(-1)
    else:
        rows = abs(ord) == 1
        kept, summed = (second, first) if rows else (first, second)
        total = x.abs().sum(summed, keepdim=True)
        found = total.amax(kept, keepdim=True) if ord > 0 else total.amin(kept, keepdim=True)
        found = found.squeeze(max(first, second)).squeeze(min(first, second))
    if keepdim:
        for axis in sorted((first, second)):
            found = found.unsqueeze(axis)
    return found


@replaces("linalg_matrix_power", "matrix_power")
def matrix_power(self: Tensor, n: int) -> Tensor:
    """By repeated squaring; torch.onnx gives the power of nought no batch."""
    if n == 0:
        return eye(order(self, "matrix_power"), self).expand(self.shape).clone()
    square = linalg_inv(self) if n < 0 else self
    found: Tensor | None = None
    left = abs(n)
    while left:
        if left % 2:
            found = square if found is None else torch.matmul(found, square)
        left //= 2
        square = torch.matmul(square, square) if left else square
    assert found is not None
    return found


@replaces("cov")
def cov(self: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Tensor:
    """Of variables in rows; with weights where torch checks their signs by their values."""
    x = self if self.dim() == 2 else self.reshape(1, -1)
    weights = None if fweights is None else fweights.to(x.dtype)
    if aweights is not None:
        weights = aweights.to(x.dtype) if weights is None else weights * aweights
    if weights is None:
        centred = x - x.mean(1, keepdim=True)
        found = torch.matmul(centred, centred.mT) / (x.shape[1] - correction)
    else:
        total = weights.sum(0)
        centred = x - (x * weights).sum(1, keepdim=True) / total
        left = total
        if correction:
            spread = total if aweights is None else (weights * aweights).sum(0) / total
            left = total - correction * (torch.ones_like(total) if aweights is None else spread)
        found = torch.matmul(centred * weights, centred.mT) / left
    return found if self.dim() == 2 else found.reshape(())


@replaces("corrcoef")
def corrcoef(self: Tensor) -> Tensor:
    found = cov(self)
    if self.dim() < 2:
        return found / found
    spread = found.diagonal().sqrt()
    return (found / spread.unsqueeze(-1) / spread.unsqueeze(-2)).clamp(-1, 1)


@replaces("nanquantile")
def nanquantile(
    self: Tensor, q: Tensor, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Tensor:
    """NaN sorted behind all, as infinity: where ONNX's TopK puts it is not defined."""
    x = self.reshape(-1) if dim is None else self.movedim(dim, -1)
    nan = x.isnan()
    counted = (~nan).to(torch.int64).sum(-1, keepdim=True)
    filled = torch.where(nan, torch.full((), math.inf, dtype=x.dtype, device=x.device), x)
    ordered = torch.topk(filled, x.shape[-1], -1, False)[0]
    rank = q.reshape(-1) * (counted - 1).clamp(min=0).to(x.dtype)
    low = torch.floor(rank)
    share = rank - low
    if interpolation == "nearest":
        low, share = torch.round(rank), torch.zeros_like(rank)
    elif interpolation == "higher":
        low, share = torch.ceil(rank), torch.zeros_like(rank)
    elif interpolation == "lower":
        share = torch.zeros_like(rank)
    elif interpolation == "midpoint":
        share = torch.where(share > 0, torch.full_like(share, 0.5), share)
    below = torch.gather(ordered, -1, low.to(torch.int64))
    above = torch.gather(ordered, -1, torch.minimum(low + 1, (counted - 1).clamp(min=0).to(x.dtype)).to(torch.int64))
    found = torch.where(share == 0, below, below + share * (above - below))
    found = torch.where(counted > 0, found, torch.full((), math.nan, dtype=x.dtype, device=x.device))
    if keepdim:
        kept = self.dim() if dim is None else 1
        found = found.movedim(-1, 0)
        found = found.reshape(-1, *[1] * kept) if dim is None else found.unsqueeze(-1).movedim(-1, dim % self.dim() + 1)
    else:
        found = found.movedim(-1, 0)
    return found.squeeze(0) if q.dim() == 0 else found


@replaces("nanquantile.scalar")
def nanquantile_scalar(
    self: Tensor, q: float, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Tensor:
    value = torch.full((), q, dtype=self.dtype, device=self.device)
    return nanquantile(self, value, dim, keepdim, interpolation=interpolation)
