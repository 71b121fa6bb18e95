"""Antialiased resizing by a factor that is not the ratio of the sizes: torch.onnx takes the sizes, torch the factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .registry import decomposes

KEYS = -0.5
"""The coefficient of Keys' cubic (1981) that torch and Pillow antialias with."""


def _filter(x: Tensor, cubic: bool) -> Tensor:
    x = x.abs()
    if not cubic:
        return (1 - x).clamp(min=0)
    near = ((KEYS + 2) * x - (KEYS + 3)) * x * x + 1
    far = KEYS * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _weights(length: Any, out: Any, factor: float, cubic: bool) -> Tensor:
    """[out, length]: what each element counts for each output."""
    step = 1 / factor
    centres = (torch.arange(out) + 0.5) * step
    weights = _filter((torch.arange(length) + 0.5 - centres.unsqueeze(-1)) / max(step, 1.0), cubic)
    return weights / weights.sum(-1, keepdim=True)


def _resized(self: Tensor, size: Sequence[Any], align: bool, factors: Sequence[float | None], cubic: bool) -> Tensor:
    lengths = self.shape[-2:]
    if align or all(f is None or length * f == out for f, length, out in zip(factors, lengths, size, strict=True)):
        return NotImplemented  # type: ignore[no-any-return]
    rows, columns = (
        _weights(length, out, factor or out / length, cubic).to(self.device, self.dtype)
        for length, out, factor in zip(lengths, size, factors, strict=True)
    )
    return rows @ self @ columns.mT


@decomposes("_upsample_bilinear2d_aa")
def bilinear(
    self: Tensor, output_size: Sequence[Any], align_corners: bool, scales_h: Any = None, scales_w: Any = None
) -> Tensor:
    return _resized(self, output_size, align_corners, (scales_h, scales_w), False)


@decomposes("_upsample_bicubic2d_aa")
def bicubic(
    self: Tensor, output_size: Sequence[Any], align_corners: bool, scales_h: Any = None, scales_w: Any = None
) -> Tensor:
    return _resized(self, output_size, align_corners, (scales_h, scales_w), True)
