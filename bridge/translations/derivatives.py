"""What autograd runs backward, where a module takes derivatives (a force is an energy's), by forward operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table

from .registry import DECOMPOSITIONS, Untranslatable, decomposes

for _op, _function in decomposition_table.items():
    if isinstance(_op, torch._ops.OpOverload) and _op.namespace == "aten" and "_backward" in str(_op):
        DECOMPOSITIONS.setdefault(_op, _function)


@decomposes("convolution_backward")
def convolution(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_input = of_weight = of_bias = None
    rank = input.dim() - 2
    stride, padding, dilation = _spread(stride, rank), _spread(padding, rank), _spread(dilation, rank)
    if output_mask[0]:
        most = [0] * rank if transposed else [step - 1 for step in stride]  # more than there was is cut off again
        of_input = torch.ops.aten.convolution(
            grad_output, weight, None, stride, padding, dilation, not transposed, most, groups
        )
        of_input = _cut(of_input, input.shape[2:])
    if output_mask[1]:
        if groups != 1:
            raise Untranslatable("the derivative by the weights of a convolution in groups cannot be written in ONNX")
        image, kernel = (grad_output, input) if transposed else (input, grad_output)
        of_weight = torch.ops.aten.convolution(
            image.transpose(0, 1), kernel.transpose(0, 1), None, dilation, padding, stride, False, [0] * rank, 1
        )
        of_weight = _cut(of_weight, weight.shape[2:]).transpose(0, 1)
    if output_mask[2]:
        of_bias = grad_output.sum([0, *range(2, rank + 2)])
    return of_input, of_weight, of_bias


def _spread(numbers: Sequence[int], rank: int) -> list[int]:
    return list(numbers) * (rank if len(numbers) == 1 else 1)


def _cut(x: Tensor, sizes: Sequence[int]) -> Tensor:
    for axis, size in enumerate(sizes, 2):
        x = x.narrow(axis, 0, size)
    return x


# --- what is done along each axis by itself: a product with the transpose of its matrix ------------------------------


def _each_axis(grad: Tensor, sizes: Sequence[int], along: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``along``: the operator on [n, 1, n] along one axis (the number of which it is given), whose input has ``sizes``
    on its last axes."""
    first = grad.dim() - len(sizes)
    for place, size in enumerate(sizes):
        unit = torch.eye(size, dtype=grad.dtype, device=grad.device).unsqueeze(1)
        matrix = along(unit, place).squeeze(1)
        grad = torch.matmul(grad.movedim(first + place, -1), matrix.mT).movedim(-1, first + place)
    return grad


@decomposes("avg_pool2d_backward", "avg_pool3d_backward")
def avg_pool(
    grad_output: Tensor,
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    rank = max(len(kernel_size), 2)
    kernel, pads, steps = _spread(kernel_size, rank), _spread(padding, rank), _spread(stride or kernel_size, rank)
    if divisor_override is not None:
        grad_output, count_include_pad = grad_output * (math.prod(kernel) / divisor_override), True

    def along(unit: Tensor, axis: int) -> Tensor:
        return F.avg_pool1d(unit, kernel[axis], steps[axis], pads[axis], ceil_mode, count_include_pad)

    return _each_axis(grad_output, self.shape[-rank:], along)


@decomposes("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward")
def max_pool(
    grad_output: Tensor,
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Each window's goes to where its largest element was."""
    rank = max(len(kernel_size), 2)
    found = torch.zeros_like(self).flatten(-rank)
    return found.scatter_add(-1, indices.flatten(-rank), grad_output.flatten(-rank)).reshape(self.shape)


@decomposes("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward")
def adaptive_avg_pool(grad_output: Tensor, self: Tensor) -> Tensor:
    rank = 3 if grad_output.dim() == 5 else 2
    found = list(grad_output.shape[-rank:])
    return _each_axis(grad_output, self.shape[-rank:], lambda unit, axis: F.adaptive_avg_pool1d(unit, found[axis]))


@decomposes("replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward")
def replication_pad(grad_output: Tensor, self: Tensor, padding: Sequence[int]) -> Tensor:
    rank = len(padding) // 2

    def along(unit: Tensor, axis: int) -> Tensor:
        last = 2 * (rank - 1 - axis)
        return F.pad(unit, list(padding[last : last + 2]), mode="replicate")

    return _each_axis(grad_output, self.shape[-rank:], along)


Along = Callable[[Tensor, int, bool, float | None], Tensor]
"""Resizes [n, 1, n] along the last axis: to this size, by corners or not, by this scale where it was given."""


def _resize(names: Sequence[str], along: Along, corners: bool) -> None:
    """Registers the backward of ``along`` in one axis or several. ``corners``: it has that option."""

    @decomposes(*names)
    def backward(grad_output: Tensor, output_size: Sequence[int], input_size: Sequence[int], *options: Any) -> Tensor:
        align, scales = (bool(options[0]), options[1:]) if corners else (False, options)

        def one(unit: Tensor, axis: int) -> Tensor:
            return along(unit, output_size[axis], align, scales[axis] if scales else None)

        return _each_axis(grad_output, input_size[2:], one)


def _in_two(op: Callable[..., Tensor]) -> Along:
    return lambda unit, size, align, scale: op(unit.unsqueeze(-1), [size, 1], align, scale, None).squeeze(-1)


_aten = torch.ops.aten
_resize(
    [f"upsample_nearest{rank}d_backward" for rank in (1, 2, 3)],
    lambda unit, size, _, scale: _aten.upsample_nearest1d(unit, [size], scale),
    corners=False,
)
_resize(
    [f"_upsample_nearest_exact{rank}d_backward" for rank in (1, 2, 3)],
    lambda unit, size, _, scale: _aten._upsample_nearest_exact1d(unit, [size], scale),
    corners=False,
)
_resize(
    ["upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_trilinear3d_backward"],
    lambda unit, size, align, scale: _aten.upsample_linear1d(unit, [size], align, scale),
    corners=True,
)
_resize(["upsample_bicubic2d_backward"], _in_two(_aten.upsample_bicubic2d), corners=True)
_resize(["_upsample_bilinear2d_aa_backward"], _in_two(_aten._upsample_bilinear2d_aa), corners=True)
_resize(["_upsample_bicubic2d_aa_backward"], _in_two(_aten._upsample_bicubic2d_aa), corners=True)


# --- others ----------------------------------------------------------------------------------------------------------


@decomposes("silu_backward")
def silu(grad_output: Tensor, self: Tensor) -> Tensor:
    gate = self.sigmoid()
    return grad_output * gate * (1 + self * (1 - gate))


@decomposes("mish_backward")
def mish(grad_output: Tensor, self: Tensor) -> Tensor:
    gate = F.softplus(self).tanh()
    return grad_output * (gate + self * self.sigmoid() * (1 - gate * gate))


@decomposes("softshrink_backward", "hardshrink_backward")
def shrink(grad_output: Tensor, self: Tensor, lambd: float) -> Tensor:
    return torch.where(self.abs() > lambd, grad_output, 0)


@decomposes("_cdist_backward")
def cdist(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    if math.isinf(p):
        raise Untranslatable("the derivative of torch.cdist with p=inf cannot be written in ONNX")
    apart = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    by = apart if p == 2 else apart.sign() * apart.abs().pow(p - 1)
    share = torch.where(cdist == 0, 0, grad / cdist.pow(p - 1))
    return (share.unsqueeze(-1) * by).sum(-2)
