"""Adaptive pooling of sizes that do not divide the input: windows of unequal length, gathered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .registry import decomposes, static


def _windows(size: Any, out: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [out, longest] of each window of an axis, the last one repeated, and whether each counts."""
    place = torch.arange(out, device=like.device)
    start = torch.div(place * size, out, rounding_mode="floor")
    end = torch.div((place + 1) * size + (out - 1), out, rounding_mode="floor")
    if isinstance(size, int) and isinstance(out, int):
        longest = max(-((-(i + 1) * size) // out) - i * size // out for i in range(out)) if out else 1
    else:
        longest = (size + out - 1) // out + 1
    index = start.unsqueeze(-1) + torch.arange(longest, device=like.device)
    return torch.minimum(index, (end - 1).unsqueeze(-1)), index < end.unsqueeze(-1)


def _gathered(x: Tensor, axes: Sequence[int], windows: Sequence[Tensor]) -> Tensor:
    """``x`` with each of ``axes``, its last ones, replaced by the outputs; the windows' elements flat in a last one."""
    for axis, window in zip(axes, windows, strict=True):
        x = x.index_select(axis, window.reshape(-1))
    lead = x.shape[: x.dim() - len(axes)]
    split = [size for window in windows for size in window.shape]
    x = x.reshape(*lead, *split)
    first = len(lead)
    outs = [first + 2 * i for i in range(len(axes))]
    inner = [first + 2 * i + 1 for i in range(len(axes))]
    return x.permute(*range(first), *outs, *inner).flatten(first + len(axes))


@decomposes("adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(self: Tensor, output_size: Sequence[Any]) -> tuple[Tensor, Tensor]:
    count = len(output_size)
    sizes = self.shape[-count:]
    axes = list(range(self.dim() - count, self.dim()))
    both = list(zip(sizes, output_size, strict=True))
    if all(isinstance(n, int) and isinstance(out, int) and n % out == 0 for n, out in both):
        kernel = [n // out for n, out in both]
        pool = torch.nn.functional.max_pool2d if count == 2 else torch.nn.functional.max_pool3d
        values, where = pool(self, kernel, kernel, return_indices=True)
        return values, where
    windows = [_windows(n, out, self)[0] for n, out in both]
    elements = _gathered(self, axes, windows)
    area: Any = 1
    for size in sizes:
        area = area * size
    numbers = torch.arange(area, device=self.device).reshape(sizes)
    places = _gathered(numbers, list(range(count)), windows)
    best = elements.argmax(-1, keepdim=True)
    where = torch.gather(places.expand(elements.shape), -1, best).squeeze(-1)
    return elements.amax(-1), where


@decomposes("_adaptive_avg_pool3d", "adaptive_avg_pool3d")
def adaptive_avg_pool(self: Tensor, output_size: Sequence[Any]) -> Tensor:
    """One mean, or product with a matrix of means, for each axis: the mean over a box is the mean of means."""
    for axis, out in zip(range(-len(output_size), 0), output_size, strict=True):
        size = self.shape[axis]
        if isinstance(out, int) and out == 1:
            self = self.mean(axis, keepdim=True)
            continue
        index, counts = _windows(size, out, self)
        hits = (index.unsqueeze(-1) == torch.arange(size, device=self.device)) & counts.unsqueeze(-1)
        weights = hits.to(self.dtype).sum(1) / counts.to(self.dtype).sum(1, keepdim=True)
        self = torch.matmul(self.movedim(axis, -1), weights.mT).movedim(-1, axis)
    return self


_OF_KNOWN_SIZES = torch._decomp.decomposition_table[torch.ops.aten._adaptive_avg_pool2d.default]


@decomposes("_adaptive_avg_pool2d")
def adaptive_avg_pool2d(self: Tensor, output_size: Sequence[Any]) -> Tensor:
    """torch's own writes windows of the lengths that the example has."""
    if all(isinstance(size, int) for size in (*self.shape[-2:], *output_size)):
        found: Tensor = _OF_KNOWN_SIZES(self, output_size)
        return found
    return adaptive_avg_pool(self, output_size)


@decomposes("avg_pool2d", "avg_pool3d")
def average_by_a_divisor(
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """torch.onnx forgets the divisor: here the padding is made first, and the mean of a whole window is rescaled."""
    if divisor_override is None:
        return NotImplemented  # type: ignore[no-any-return]
    rank = 3 if self.dim() == 5 or (self.dim() == 4 and len(kernel_size) == 3) else 2
    kernel, step, pad = (list(given) * (rank // len(given)) for given in (kernel_size, stride or kernel_size, padding))
    around: list[int] = []
    for axis in range(rank):
        more = 0
        if ceil_mode:
            length = static(self.shape[axis - rank], "avg_pool with ceil_mode and divisor_override: the size")
            count = -((kernel[axis] - length - 2 * pad[axis]) // step[axis]) + 1
            count -= (count - 1) * step[axis] >= length + pad[axis]  # no window begins in the padding on the right
            more = max(0, (count - 1) * step[axis] + kernel[axis] - length - 2 * pad[axis])
        around = [pad[axis], pad[axis] + more, *around]
    pool = torch.nn.functional.avg_pool2d if rank == 2 else torch.nn.functional.avg_pool3d
    means = pool(torch.nn.functional.pad(self, around), kernel, step)
    return means * (math.prod(kernel) / divisor_override)
