"""DeformConv as ONNX defines it (opset 19): groups, offset groups, an optional mask and bias; two spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from passes.plugins import DEFORM_CONV

from .python import AnySize, Shape, Sizes, TorchPlugin

if TYPE_CHECKING:
    import torch

LARGEST_COLUMNS = 1 << 28
"""Bytes of the sampled input that exist at a time; more batches are then done one after the other."""


def sample(x: torch.Tensor, y_at: torch.Tensor, x_at: torch.Tensor) -> torch.Tensor:
    """``x`` [n, c, height, width] at the points [n, ...], bilinearly, with zeros around it; [n, c, ...] in float32."""
    import torch

    batches, channels, height, width = x.shape
    flat = x.reshape(batches, channels, height * width)
    top, left = torch.floor(y_at), torch.floor(x_at)
    result = torch.zeros((batches, channels, y_at[0].numel()), dtype=torch.float32, device=x.device)
    for down in (0, 1):
        for right in (0, 1):
            row, column = top + down, left + right
            weight = (1 - (y_at - row).abs()) * (1 - (x_at - column).abs())
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = torch.where(inside, row, 0).long() * width + torch.where(inside, column, 0).long()
            index = place.reshape(batches, 1, -1).expand(-1, channels, -1)
            result += flat.gather(2, index).float() * torch.where(inside, weight, 0).reshape(batches, 1, -1)
    return result.reshape(batches, channels, *y_at.shape[1:])


def deform_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
    offset_group: int = 1,
) -> torch.Tensor:
    """ONNX's DeformConv.

    ``x`` is [n, c, h, w], ``weight`` [c_out, c / group, kh, kw], ``offset`` [n, offset_group * kh * kw * 2, oh, ow] (of
    each point of the kernel the row's, then the column's), ``mask`` [n, offset_group * kh * kw, oh, ow], ``bias``
    [c_out]; ``pads`` are top, left, bottom, right.
    """
    import torch

    batches, channels = x.shape[:2]
    rows, columns = weight.shape[2:]
    height, width = offset.shape[2:]
    points = rows * columns
    device = x.device
    shifts = offset.reshape(batches, offset_group, points, 2, height, width).float()
    grid_y = torch.arange(height, device=device) * strides[0] - pads[0]
    grid_x = torch.arange(width, device=device) * strides[1] - pads[1]
    kernel_y = (torch.arange(rows, device=device) * dilations[0]).repeat_interleave(columns)
    kernel_x = (torch.arange(columns, device=device) * dilations[1]).repeat(rows)
    y_at = shifts[:, :, :, 0] + grid_y[None, None, None, :, None] + kernel_y[None, None, :, None, None]
    x_at = shifts[:, :, :, 1] + grid_x[None, None, None, None, :] + kernel_x[None, None, :, None, None]
    outer = batches * offset_group
    sampled = sample(
        x.reshape(outer, channels // offset_group, *x.shape[2:]), y_at.flatten(0, 1), x_at.flatten(0, 1)
    )  # [n * offset groups, channels of one, points, height, width]
    if mask is not None:
        sampled = sampled * mask.reshape(outer, 1, points, height, width).float()
    patches = sampled.to(x.dtype).reshape(batches, group, channels // group * points, height * width)
    kernels = weight.reshape(group, weight.shape[0] // group, -1)
    result = torch.matmul(kernels, patches).reshape(batches, weight.shape[0], height, width)
    return result if bias is None else result + bias.reshape(1, -1, 1, 1)


class DeformConv(TorchPlugin):
    name, namespace, attributes = DEFORM_CONV.name, DEFORM_CONV.namespace, DEFORM_CONV.attributes

    def output_types(self, inputs: Sequence[str]) -> list[str]:
        return [inputs[0]]

    def output_shapes(self, inputs: Sequence[Shape], sizes: Sizes) -> list[Shape]:
        out: list[AnySize] = [inputs[0][0], inputs[1][0], *inputs[2][2:]]
        return [out]

    def takes(self, inputs: Sequence[str]) -> bool:
        return inputs[0] in ("float32", "float16", "bfloat16") and all(kind == inputs[0] for kind in inputs)

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        x, weight, offset, *rest = inputs
        bias = rest.pop(0) if self.values["bias"] else None
        mask = rest.pop(0) if self.values["mask"] else None
        options = {key: self.values[key] for key in ("strides", "pads", "dilations", "group", "offset_group")}
        piece = 4 * x.shape[1] * weight.shape[2] * weight.shape[3] * offset.shape[2] * offset.shape[3]
        step = max(1, LARGEST_COLUMNS // max(1, piece))
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step)
            outputs[0][part] = deform_conv(
                x[part], weight, offset[part], bias, None if mask is None else mask[part], **options
            )
