"""What moves, makes, joins and takes apart complex tensors, on pairs of a real and an imaginary part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .complex_pairs import Pair, Real, Writer, mapped, parts
from .registry import on_pairs, overload

# --- what treats both parts alike --------------------------------------------------------------------------------

LINEAR = """alias _unsafe_view view reshape permute transpose.int t unsqueeze squeeze squeeze.dim squeeze.dims expand
clone contiguous detach lift_fresh_copy slice.Tensor select.int index_select gather flip roll repeat diagonal tril triu
diagonal_copy index.Tensor sum sum.dim_IntList mean mean.dim cumsum neg unfold unfold_copy as_strided copy cat stack
index_put slice_scatter select_scatter diagonal_scatter scatter.src scatter_add index_add index_copy narrow diag_embed
flatten.using_ints pixel_shuffle pixel_unshuffle movedim.int upsample_nearest1d upsample_nearest2d zeros_like new_zeros
empty_like new_empty zeros empty empty.memory_format view_copy take unflatten.int broadcast_to tile squeeze_copy.dim
adaptive_avg_pool1d expand_copy permute_copy slice_copy.Tensor select_copy.int"""


def alike(op: Any) -> Callable[..., Pair]:
    def handler(w: Writer, *args: Any, **kwargs: Any) -> Pair:
        if getattr(kwargs.get("dtype"), "is_complex", False):
            kwargs["dtype"] = kwargs["dtype"].to_real()

        def part(which: int) -> Real:
            def choose(item: Any) -> Any:
                if isinstance(item, Pair):
                    return item[which]
                if which and isinstance(item, Real) and _value_operand(item):
                    return w("zeros_like", item)
                return item

            chosen = mapped((args, kwargs), choose)
            return w(op, *chosen[0], **chosen[1])

        return Pair(part(0), part(1))

    return handler


def _value_operand(item: Real) -> bool:
    """Whether a real operand beside complex ones is one of values, not of places or of a mask."""
    value = item.node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


for _name in LINEAR.split():
    on_pairs(_name)(alike(overload(_name)))


@on_pairs("split.Tensor", "split_with_sizes", "unbind.int", "chunk", "split_with_sizes_copy")
def several(w: Writer, x: Pair, *args: Any, **kwargs: Any) -> list[Pair]:
    op = w.target
    both = [w(op, part, *args, **kwargs) for part in x]
    return [Pair(*(w.item(many, i) for many in both)) for i in range(len(both[0].node.meta["val"]))]


@on_pairs("constant_pad_nd")
def pad(w: Writer, x: Pair, widths: Any, value: Any = 0) -> Pair:
    re, im = parts(complex(value))
    return Pair(w("constant_pad_nd", x.re, widths, re), w("constant_pad_nd", x.im, widths, im))


@on_pairs("pad")
def pad_mode(w: Writer, x: Pair, widths: Any, mode: str = "constant", value: Any = None) -> Pair:
    if mode == "constant":
        return pad(w, x, widths, value or 0)
    return Pair(*(w("pad", part, widths, mode) for part in x))


@on_pairs("where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def where_number(w: Writer, condition: Real, a: Any, b: Any) -> Pair:
    like = (
        a.re if isinstance(a, Pair) else b.re if isinstance(b, Pair) else w("_to_copy", condition, dtype=torch.float32)
    )

    def pair(item: Any) -> Any:
        if isinstance(item, (Pair, Real)):
            return item
        number = complex(item)
        return Pair(w("full_like", like, number.real), w("full_like", like, number.imag))

    return where(w, condition, pair(a), pair(b))


@on_pairs("where.self")
def where(w: Writer, condition: Real, a: Any, b: Any) -> Pair:
    a, b = paired(w, a), paired(w, b)
    return Pair(w("where.self", condition, a.re, b.re), w("where.self", condition, a.im, b.im))


@on_pairs("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(w: Writer, x: Any, mask: Real, value: Any) -> Pair:
    x = paired(w, x)
    if isinstance(value, (Pair, Real)):
        return where(w, mask, value, x)
    number = complex(value)
    return Pair(
        *(w("masked_fill.Scalar", part, mask, v) for part, v in zip(x, (number.real, number.imag), strict=True))
    )


def paired(w: Writer, x: Any) -> Pair:
    if isinstance(x, Pair):
        return x
    if x.node.meta["val"].dtype.is_floating_point:
        return Pair(x, w("zeros_like", x))
    as_float = w("_to_copy", x, dtype=torch.get_default_dtype())
    return Pair(as_float, w("zeros_like", as_float))


# --- making and taking apart -------------------------------------------------------------------------------------


@on_pairs("full", "full_like", "new_full")
def full(w: Writer, first: Any, *args: Any, **kwargs: Any) -> Pair:
    op = w.target
    if getattr(kwargs.get("dtype"), "is_complex", False):
        kwargs["dtype"] = kwargs["dtype"].to_real()
    kwargs.setdefault("dtype", torch.float32)
    *shape, value = args
    first = first.re if isinstance(first, Pair) else first
    re, im = parts(complex(value))
    return Pair(w(op, first, *shape, re, **kwargs), w(op, first, *shape, im, **kwargs))


@on_pairs("ones_like", "ones", "new_ones")
def ones(w: Writer, first: Any, *args: Any, **kwargs: Any) -> Pair:
    made = alike(w.target)(w, first, *args, **kwargs)
    return Pair(made.re, w("zeros_like", made.re))


@on_pairs("scalar_tensor")
def scalar_tensor(w: Writer, value: Any, **kwargs: Any) -> Pair:
    kwargs["dtype"] = kwargs["dtype"].to_real()
    re, im = parts(complex(value))
    return Pair(w("scalar_tensor", re, **kwargs), w("scalar_tensor", im, **kwargs))


@on_pairs("_to_copy", "to.dtype")
def to(w: Writer, x: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Pair):
        real = w("_to_copy", x, dtype=dtype.to_real())
        return Pair(real, w("zeros_like", real))
    if dtype is None:
        return x
    if not dtype.is_complex:
        return w("_to_copy", x.re, dtype=dtype)
    return Pair(*(w("_to_copy", part, dtype=dtype.to_real()) for part in x))


@on_pairs("view_as_complex")
def view_as_complex(w: Writer, x: Real) -> Pair:
    return w.unpack(x)


@on_pairs("view_as_real", "view_as_real_copy")
def view_as_real(w: Writer, x: Pair) -> Real:
    return w.pack(x)


@on_pairs("complex")
def make(w: Writer, re: Real, im: Real) -> Pair:
    zero = w("zeros_like", re + im)
    return Pair(re + zero, im + zero) if broadcasts(re, im) else Pair(re, im)


def broadcasts(a: Real, b: Real) -> bool:
    first, second = a.node.meta["val"].shape, b.node.meta["val"].shape
    return len(first) != len(second) or any(x is not y and x != y for x, y in zip(first, second, strict=True))


@on_pairs("polar")
def polar(w: Writer, size: Real, angle: Real) -> Pair:
    return Pair(size * w("cos", angle), size * w("sin", angle))


@on_pairs("real")
def real(w: Writer, x: Pair) -> Real:
    return x.re


@on_pairs("imag")
def imag(w: Writer, x: Pair) -> Real:
    return x.im


@on_pairs("_conj", "conj_physical", "_conj_physical", "_conj_copy")
def conj(w: Writer, x: Pair) -> Pair:
    return Pair(x.re, -x.im)


@on_pairs("resolve_conj", "resolve_neg")
def resolved(w: Writer, x: Pair) -> Pair:
    return x


# --- transforms, which torch.onnx and ``fourier`` translate ------------------------------------------------------


@on_pairs("_fft_c2c")
def fft_c2c(w: Writer, x: Pair, *args: Any) -> Pair:
    return w.unpack(w("view_as_real", w("_fft_c2c", w("view_as_complex", w.pack(x)), *args)))


@on_pairs("_fft_c2r")
def fft_c2r(w: Writer, x: Pair, dim: Sequence[int], normalization: int, size: Any) -> Real:
    *others, last = dim
    if others:
        x = fft_c2c(w, x, others, normalization, False)
    return w("bridge::irfft", w.pack(x), last, normalization, size)
