"""Bags of embeddings: torch.onnx makes a Loop over the bags, with a sequence of their sums.

A bag that is a row of a matrix is the reduction of an axis. Other bags are told by where they begin: a mask of the
places that are in each is multiplied with what these were looked up to.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import decomposes

SUM, MEAN, MAX = 0, 1, 2
_MODES = {"sum": SUM, "mean": MEAN, "max": MAX}


Bags = tuple[Tensor, Tensor, Tensor, Tensor]


@decomposes("embedding_bag", "embedding_bag.padding_idx")
def any_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Bags:
    """As a composite operator has it: what is negative counts from the end, and None is no padding."""
    place = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return embedding_bag(
        weight, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, place
    )


@decomposes("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Bags:
    places = torch.arange(indices.shape[0], device=indices.device)
    if include_last_offset:
        begins, ends = offsets[:-1], offsets[1:]
    else:
        begins, ends = offsets, torch.cat([offsets[1:], torch.full_like(offsets[:1], indices.shape[0])])
    inside = (places >= begins.unsqueeze(1)) & (places < ends.unsqueeze(1))
    if padding_idx >= 0:
        inside = inside & (indices != padding_idx)
    rows = F.embedding(indices, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    count = inside.to(torch.int64).sum(1)
    found = _largest(rows.unsqueeze(0), inside) if mode == MAX else inside.to(rows.dtype) @ rows
    if mode == MEAN:
        found = found / count.clamp(min=1).unsqueeze(1).to(rows.dtype)
    return found, torch.zeros_like(indices), count, torch.zeros_like(count)


def of_rows() -> Any:
    """Within it, ``F.embedding_bag`` of a matrix reduces its rows, of which there may be any number."""
    original = F.embedding_bag
    signature = inspect.signature(original)

    @functools.wraps(original)
    def embedding_bag(*args: Any, **kwargs: Any) -> Tensor:
        given = {key: value for key, value in signature.bind(*args, **kwargs).arguments.items() if value is not None}
        rows = given["input"].dim() == 2 and not given["input"].is_floating_point()  # else the old order of arguments
        if not rows or "max_norm" in given:
            return original(*args, **kwargs)
        return _reduced(given["input"], given["weight"], **{key: given[key] for key in _READ if key in given})

    return mock.patch.object(F, "embedding_bag", embedding_bag)


_READ = ("mode", "per_sample_weights", "padding_idx")


def _reduced(
    indices: Tensor,
    weight: Tensor,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    rows = F.embedding(indices, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(2)
    inside = torch.ones_like(indices, dtype=torch.bool)
    if padding_idx is not None:
        inside = indices != padding_idx % weight.shape[0]
    if _MODES[mode] == MAX:
        return _largest(rows, inside)
    found = (rows * inside.unsqueeze(2)).sum(1) if padding_idx is not None else rows.sum(1)
    if _MODES[mode] == SUM:
        return found
    return found / inside.to(rows.dtype).sum(1, keepdim=True).clamp(min=1)


def _largest(rows: Tensor, inside: Tensor) -> Tensor:
    """Of each bag; 0 of one that is empty."""
    lowest = torch.full((), -torch.inf, dtype=rows.dtype, device=rows.device)
    found = torch.where(inside.unsqueeze(2), rows, lowest).amax(1)
    return torch.where(inside.any(1, keepdim=True), found, torch.zeros_like(found))
