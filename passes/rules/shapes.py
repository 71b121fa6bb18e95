"""Sizes that are numbers where the model's axes are static, and computed from Shape where they are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import onnx_graphsurgeon as gs

from passes.framework import Builder

Size: TypeAlias = "int | gs.Tensor"
"""A number, or a tensor of shape [1] and type int64."""

LARGEST_INTERMEDIATE = 64 << 20
"""Elements of the largest tensor that a rewrite may create (256 MiB of float32)."""


def size(g: Builder, x: gs.Tensor, axis: int) -> Size:
    """The size of one axis."""
    return product(g, x, axis, axis + 1)


def product(g: Builder, x: gs.Tensor, start: int, end: int) -> Size:
    """The product of the sizes of the axes ``start`` to ``end`` (exclusive, both non-negative)."""
    dims = g.shape(x)[start:end]
    static = [dim for dim in dims if isinstance(dim, int)]
    if len(static) == len(dims):
        return math.prod(static)
    part = g.slice(g.op.Shape(x), [start], [end], [0], [1])
    return part if len(dims) == 1 else g.reduce("ReduceProd", part, [0], keepdims=True)


def times(g: Builder, a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    product_: gs.Tensor = g.op.Mul(as_tensor(g, a), as_tensor(g, b))
    return product_


def as_tensor(g: Builder, value: Size) -> gs.Tensor:
    return g.constant([value]) if isinstance(value, int) else value


def shape_tensor(g: Builder, sizes: Sequence[Size]) -> gs.Tensor:
    """The sizes as one int64 tensor: a constant where all are known."""
    if all(isinstance(item, int) for item in sizes):
        return g.constant(list(sizes))
    joined: gs.Tensor = g.op.Concat(*(as_tensor(g, item) for item in sizes), axis=0)
    return joined


def reshape(g: Builder, x: gs.Tensor, sizes: Sequence[Size]) -> gs.Tensor:
    """``x`` with the given sizes; a single one that is not a number is left to Reshape to find out."""
    unknown = [index for index, item in enumerate(sizes) if not isinstance(item, int)]
    if len(unknown) == 1 and not any(item in (0, -1) for item in sizes if isinstance(item, int)):
        sizes = [-1 if index == unknown[0] else item for index, item in enumerate(sizes)]
    result: gs.Tensor = g.op.Reshape(x, shape_tensor(g, sizes))
    return result


def iota(g: Builder, length: Size) -> gs.Tensor:
    """0, 1, … ``length`` - 1 as int64."""
    if isinstance(length, int):
        return g.constant(list(range(length)))
    numbers: gs.Tensor = g.op.Range(g.constant(0), g.squeeze(length, [0]), g.constant(1))
    return numbers


def check_intermediate(g: Builder, sizes: Sequence[int | str | None], what: str) -> None:
    """Declines where the known sizes alone make a tensor that is too large."""
    count = math.prod(item for item in sizes if isinstance(item, int))
    if count > LARGEST_INTERMEDIATE:
        g.decline(f"{what} would have {count:,} elements, more than {LARGEST_INTERMEDIATE:,}")
