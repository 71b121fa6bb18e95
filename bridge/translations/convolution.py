"""Convolutions with a group for each item of a dynamic batch: filters that a network makes, correlation in trackers.

ONNX has the number of groups as a constant. Where it is none, each group's windows are multiplied with its filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from .registry import Untranslatable, decomposes, static
from .sizes import varies

Sizes = Sequence[int]


@decomposes("conv1d", "conv2d", "conv3d")
def convolution(
    self: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = (1,),
    padding: Sizes = (0,),
    dilation: Sizes = (1,),
    groups: int = 1,
) -> Tensor:
    if not varies(groups):
        return NotImplemented  # type: ignore[no-any-return]
    return _in_planes(_by_windows, self, weight, bias, (stride, padding, dilation), groups)


@decomposes("convolution")
def transposed(
    self: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
) -> Tensor:
    """What a transposed convolution is called once torch has taken it apart."""
    if not varies(groups):
        return NotImplemented  # type: ignore[no-any-return]
    if not transposed:
        return convolution(self, weight, bias, stride, padding, dilation, groups)
    return _in_planes(_by_stuffing, self, weight, bias, (stride, padding, dilation, output_padding), groups)


def _in_planes(
    convolve: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Sequence[Sizes],
    groups: int,
) -> Tensor:
    """``convolve`` with two axes of space; a signal is a plane of height 1."""
    axes = weight.dim() - 2
    if axes == 3:
        raise Untranslatable("a convolution of volumes has a dynamic number of groups; it has to be a constant")
    neutral = (1, 0, 1, 0)[: len(options)]
    both = [list(given) * (axes // len(given)) for given in options]
    if axes == 1:
        both = [[none, *given] for none, given in zip(neutral, both, strict=True)]
        x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
    made = convolve(x if x.dim() == 4 else x.unsqueeze(0), weight, *both, groups)
    if bias is not None:
        made = made + bias.reshape(1, -1, 1, 1)
    made = made if x.dim() == 4 else made.squeeze(0)
    return made.squeeze(-2) if axes == 1 else made


def _by_windows(x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> Tensor:
    kernel = [static(size, "a kernel's size, beside a dynamic number of groups,") for size in weight.shape[2:]]
    batch, inner = x.shape[0], weight.shape[1]
    sizes = [
        (size + 2 * pad - gap * (taps - 1) - 1) // step + 1
        for size, pad, gap, taps, step in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    windows = F.unfold(
        x.reshape(batch * groups, inner, *x.shape[2:]), tuple(kernel), tuple(dilation), tuple(padding), tuple(stride)
    )
    taps = inner * kernel[0] * kernel[1]
    made = weight.reshape(1, groups, -1, taps) @ windows.reshape(batch, groups, taps, sizes[0] * sizes[1])
    return made.reshape(batch, weight.shape[0], *sizes)


def _by_stuffing(
    x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, more: Sizes, groups: int
) -> Tensor:
    """A transposed convolution is one with the filters turned round, of the input with zeros between its values."""
    batch, channels, height, width = x.shape
    x = F.pad(x.reshape(batch, channels, height, 1, width, 1), (0, stride[1] - 1, 0, 0, 0, stride[0] - 1))
    x = x.reshape(batch, channels, height * stride[0], width * stride[1])
    around: list[int] = []
    for axis in (1, 0):
        reach = dilation[axis] * (weight.shape[2 + axis] - 1) - padding[axis]
        around += [reach, reach + more[axis] - (stride[axis] - 1)]
    inner, outer = channels // groups, weight.shape[1]
    turned = weight.flip(-1, -2).reshape(groups, inner, outer, *weight.shape[2:]).transpose(1, 2)
    filters = turned.reshape(groups * outer, inner, *weight.shape[2:])
    return _by_windows(F.pad(x, around), filters, (1, 1), (0, 0), dilation, groups)
