"""Attention over queries, keys and values of other ranks than 4, the only one that torch.onnx knows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .registry import decomposes


@decomposes("scaled_dot_product_attention")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A query that may look at nothing finds 0, as torch has it."""
    if query.dim() == key.dim() == value.dim() == 4:
        return NotImplemented  # type: ignore[no-any-return]
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        rows, columns = (torch.arange(size, device=query.device) for size in scores.shape[-2:])
        attn_mask = columns <= rows.unsqueeze(1)
    if attn_mask is None:
        return scores.softmax(-1) @ value
    if attn_mask.dtype == torch.bool:
        nothing = torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device)
        scores = torch.where(attn_mask, scores, nothing)
    else:
        scores = scores + attn_mask
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ value
