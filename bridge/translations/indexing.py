"""Masks and places whose result has the operand's own size: written without a count of what they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .registry import decomposes, replaces, static, translates


@decomposes("index_put")
def index_put(self: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """``x[mask] = value`` of the same value for every place that the mask takes: a choice, and no NonZero."""
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype != torch.bool:
        return NotImplemented  # type: ignore[no-any-return]
    place, mask = given[0]
    rest = self.dim() - place - mask.dim()
    if values.dim() > rest:
        along = values.shape[-rest - 1]
        if not isinstance(along, int) or along != 1:
            return NotImplemented  # type: ignore[no-any-return]
        shape = list(values.shape)
        cut = values.dim() - rest - 1
        values = values.reshape(*shape[:cut], *[1] * mask.dim(), *shape[cut + 1 :])
    mask = mask.reshape(*mask.shape, *[1] * rest)
    values = values.to(self.dtype)
    return torch.where(mask, self + values if accumulate else values, self)


@decomposes("nonzero_static")
def nonzero_static(self: Tensor, *, size: int, fill_value: int = -1) -> Tensor:
    """The n-th place is the count of those that the running number of hits has not come to n at."""
    running = (self != 0).reshape(-1).to(torch.int64).cumsum(0)
    wanted = torch.arange(size, device=self.device)
    flat = (running <= wanted.unsqueeze(-1)).to(torch.int64).sum(-1)
    columns = []
    for length in reversed(self.shape):
        size_of = torch.full((), length, dtype=torch.int64, device=self.device)  # a number in the graph, if dynamic
        columns.append(torch.remainder(flat, size_of))
        flat = torch.div(flat, size_of, rounding_mode="floor")
    places = torch.stack(columns[::-1], -1) if columns else flat.new_zeros(size, 0)
    return torch.where((wanted < running[-1:]).unsqueeze(-1), places, torch.full_like(places, fill_value))


@decomposes("repeat_interleave.Tensor")
def repeat_interleave(repeats: Tensor, *, output_size: Any = None) -> Tensor:
    """Which one each of ``output_size`` places repeats."""
    if output_size is None:
        return NotImplemented  # type: ignore[no-any-return]
    ends = repeats.to(torch.int64).cumsum(0)
    return (ends <= torch.arange(output_size, device=repeats.device).unsqueeze(-1)).to(torch.int64).sum(-1)


@replaces("take_along_dim")
def take_along_dim(self: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """torch's own compares the sizes to be broadcast, which makes them constants."""
    if dim is None:
        return torch.gather(self.reshape(-1), 0, indices.reshape(-1))
    dim = dim % max(1, self.dim())
    lengths = [(a, b) for axis, (a, b) in enumerate(zip(self.shape, indices.shape, strict=True)) if axis != dim]
    if any(_is_one(a) != _is_one(b) for a, b in lengths):
        shape = [b if _is_one(a) else a for a, b in zip(self.shape, indices.shape, strict=True)]
        self = self.expand([self.shape[dim] if axis == dim else size for axis, size in enumerate(shape)])
        indices = indices.expand([indices.shape[dim] if axis == dim else size for axis, size in enumerate(shape)])
    return torch.gather(self, dim, indices)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


@decomposes("diagonal_scatter")
def diagonal_scatter(self: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    x = self.movedim((dim1, dim2), (-2, -1))
    rows = torch.arange(x.shape[-2], device=self.device)
    columns = torch.arange(x.shape[-1], device=self.device)
    places = (rows + min(offset, 0)).clamp(min=0).clamp(max=src.shape[-1] - 1)
    spread = src.index_select(-1, places).unsqueeze(-1)
    found = torch.where(columns - rows.unsqueeze(-1) == offset, spread, x)
    return found.movedim((-2, -1), (dim1, dim2))


@replaces("combinations")
def combinations(self: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """Of a known number of elements: each with the combinations of what follows it."""
    count = static(self.shape[0], "combinations: the number of elements")
    if r == 0:
        return self.new_empty(0)
    if r == 1:
        return self.unsqueeze(-1)
    blocks = []
    for first in range(count):
        others = self[first if with_replacement else first + 1 :]
        if static(others.shape[0], "combinations") >= (1 if with_replacement else r - 1):
            tail = combinations(others, r - 1, with_replacement)
            blocks.append(torch.cat([self[first].reshape(1, 1).expand(tail.shape[0], 1), tail], 1))
    return torch.cat(blocks) if blocks else self.new_empty(0, r)


@replaces("kron")
def kron(self: Tensor, other: Tensor) -> Tensor:
    rank = max(self.dim(), other.dim())
    a = self.reshape(*[1] * (rank - self.dim()), *self.shape)
    b = other.reshape(*[1] * (rank - other.dim()), *other.shape)
    product = a.reshape([size for item in a.shape for size in (item, 1)]) * b.reshape(
        [size for item in b.shape for size in (1, item)]
    )
    return product.reshape([x * y for x, y in zip(a.shape, b.shape, strict=True)])


@decomposes("copy")
def copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """``x[:, 1:].copy_(y)`` broadcasts, which torch.onnx forgets."""
    return src.to(self.dtype).expand(self.shape)


@decomposes("roll")
def roll(self: Tensor, shifts: Sequence[Any], dims: Sequence[int] = ()) -> Tensor:
    """By a number that depends on the sizes, as ``fftshift`` of a dynamic axis does."""
    if all(isinstance(shift, int) for shift in shifts):
        return NotImplemented  # type: ignore[no-any-return]
    if not dims:
        return roll(self.reshape(-1), shifts, (0,)).reshape(self.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        length = self.shape[dim]
        places = torch.remainder(torch.arange(length, device=self.device) - shift, torch.full((), length))
        self = self.index_select(dim, places)
    return self


@replaces("chunk", "unsafe_chunk")
def chunk(self: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """Of an axis of any size, as guided diffusion halves its batch: as many as were asked for, though torch gives fewer
    where there are fewer rows."""
    size = self.shape[dim]
    if not isinstance(size, torch.SymInt):
        step = max(1, -(-size // chunks))
        return torch.split(self, step, dim) if size else (self,) * chunks
    step = (size + chunks - 1) // chunks
    ends = [torch.sym_min(step * index, size) for index in range(1, chunks)]
    return tuple(self.narrow(dim, begin, end - begin) for begin, end in zip([0, *ends], [*ends, size], strict=True))


@decomposes("atleast_1d.Sequence")
def at_least_1d(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.ops.aten.atleast_1d(item) for item in tensors]


@decomposes("atleast_2d.Sequence")
def at_least_2d(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.ops.aten.atleast_2d(item) for item in tensors]


@decomposes("atleast_3d.Sequence")
def at_least_3d(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.ops.aten.atleast_3d(item) for item in tensors]


@decomposes("squeeze.dim")
def squeeze(self: Tensor, dim: int) -> Tensor:
    """torch.onnx writes a Squeeze of an axis that is longer than 1 too."""
    if self.dim() == 0 or self.shape[dim] == 1:
        return NotImplemented  # type: ignore[no-any-return]
    return torch.ops.prims.view_of(self)  # type: ignore[no-any-return]


@translates("prims::view_of")
def view_of(a):  # type: ignore[no-untyped-def]
    """What ``squeeze`` of axes that are longer than 1 leaves."""
    from onnxscript import opset18 as op

    return op.Identity(a)
