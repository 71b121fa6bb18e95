"""NonZero for TensorRT-RTX, whose parser has the operator and no implementation of it: it asks for this plugin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .python import TYPES, Shape, Sizes, TorchPlugin

if TYPE_CHECKING:
    import torch


def nonzero_into(x: torch.Tensor, indices: torch.Tensor, count: torch.Tensor) -> None:
    """Writes the indices of the elements of ``x`` that are not zero, and how many there are.

    ``x`` has any shape and type; ``indices`` is int64 with room for rank(x) * size(x) elements, and gets a matrix of
    [rank, count] at its front; ``count`` is a scalar. The host waits for nothing: every element is sent to its place,
    those of zeros behind all others.
    """
    import torch

    size = x.numel()
    if size == 0 or x.dim() == 0:
        count.copy_((x.reshape(-1) != 0).sum())
        return
    nonzero = x.reshape(-1) != 0
    before = torch.cumsum(nonzero, 0)  # up to and with each element
    total = before[-1]
    flat = torch.arange(size, device=x.device)
    places, room = indices.view(-1), x.dim() * size
    for axis in range(x.dim()):
        stride = math.prod(x.shape[axis + 1 :])
        behind = x.dim() * total + axis * (size - total) + (flat - before)
        place = torch.where(nonzero, axis * total + before - 1, behind)
        places[:room].scatter_(0, place, flat // stride % x.shape[axis])
    count.copy_(total)


class NonZero(TorchPlugin):
    name = "NonZero"
    outputs = 2

    def output_types(self, inputs: Sequence[str]) -> list[str]:
        return ["int64", "int32"]

    def output_shapes(self, inputs: Sequence[Shape], sizes: Sizes) -> list[Shape]:
        return [[len(inputs[0]), sizes.computed(1, sizes.product(inputs[0]))], []]

    def takes(self, inputs: Sequence[str]) -> bool:
        return inputs[0] in TYPES

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        nonzero_into(inputs[0], *outputs)
