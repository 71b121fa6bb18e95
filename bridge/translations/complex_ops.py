"""What each operator does to pairs of a real and an imaginary part."""

from __future__ import annotations

import cmath
import itertools
from collections.abc import Callable
from typing import Any

import torch

from .complex_pairs import Pair, Real, Writer, mapped
from .registry import Function, overload, static

OPERATORS: dict[Any, Callable[..., Any]] = {}
"""By operator, a function of a Writer and the operator's arguments with a Pair for each complex one."""


def of(*names: str) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for name in names:
            found = overload(name)
            if found is not None:
                OPERATORS[found] = function
        return function

    return register


def parts(value: Any) -> tuple[Any, Any]:
    """Both parts of an operand; None for the imaginary one of what is real."""
    if isinstance(value, Pair):
        return value.re, value.im
    if isinstance(value, complex):
        return value.real, value.imag
    return value, None


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
    if (_found := overload(_name)) is not None:
        OPERATORS[_found] = alike(_found)


@of("split.Tensor", "split_with_sizes", "unbind.int", "chunk", "split_with_sizes_copy")
def several(w: Writer, x: Pair, *args: Any, **kwargs: Any) -> list[Pair]:
    op = w.target
    both = [w(op, part, *args, **kwargs) for part in x]
    return [Pair(*(w.item(many, i) for many in both)) for i in range(len(both[0].node.meta["val"]))]


@of("constant_pad_nd")
def pad(w: Writer, x: Pair, widths: Any, value: Any = 0) -> Pair:
    re, im = parts(complex(value))
    return Pair(w("constant_pad_nd", x.re, widths, re), w("constant_pad_nd", x.im, widths, im))


@of("pad")
def pad_mode(w: Writer, x: Pair, widths: Any, mode: str = "constant", value: Any = None) -> Pair:
    if mode == "constant":
        return pad(w, x, widths, value or 0)
    return Pair(*(w("pad", part, widths, mode) for part in x))


@of("where.ScalarSelf", "where.ScalarOther", "where.Scalar")
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


@of("where.self")
def where(w: Writer, condition: Real, a: Any, b: Any) -> Pair:
    a, b = _paired(w, a), _paired(w, b)
    return Pair(w("where.self", condition, a.re, b.re), w("where.self", condition, a.im, b.im))


@of("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(w: Writer, x: Any, mask: Real, value: Any) -> Pair:
    x = _paired(w, x)
    if isinstance(value, (Pair, Real)):
        return where(w, mask, value, x)
    number = complex(value)
    return Pair(
        *(w("masked_fill.Scalar", part, mask, v) for part, v in zip(x, (number.real, number.imag), strict=True))
    )


def _paired(w: Writer, x: Any) -> Pair:
    if isinstance(x, Pair):
        return x
    if x.node.meta["val"].dtype.is_floating_point:
        return Pair(x, w("zeros_like", x))
    as_float = w("_to_copy", x, dtype=torch.get_default_dtype())
    return Pair(as_float, w("zeros_like", as_float))


# --- making and taking apart -------------------------------------------------------------------------------------


@of("full", "full_like", "new_full")
def full(w: Writer, first: Any, *args: Any, **kwargs: Any) -> Pair:
    op = w.target
    if getattr(kwargs.get("dtype"), "is_complex", False):
        kwargs["dtype"] = kwargs["dtype"].to_real()
    kwargs.setdefault("dtype", torch.float32)
    *shape, value = args
    first = first.re if isinstance(first, Pair) else first
    re, im = parts(complex(value))
    return Pair(w(op, first, *shape, re, **kwargs), w(op, first, *shape, im, **kwargs))


@of("ones_like", "ones", "new_ones")
def ones(w: Writer, first: Any, *args: Any, **kwargs: Any) -> Pair:
    made = alike(w.target)(w, first, *args, **kwargs)
    return Pair(made.re, w("zeros_like", made.re))


@of("scalar_tensor")
def scalar_tensor(w: Writer, value: Any, **kwargs: Any) -> Pair:
    kwargs["dtype"] = kwargs["dtype"].to_real()
    re, im = parts(complex(value))
    return Pair(w("scalar_tensor", re, **kwargs), w("scalar_tensor", im, **kwargs))


@of("_to_copy", "to.dtype")
def to(w: Writer, x: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Pair):
        real = w("_to_copy", x, dtype=dtype.to_real())
        return Pair(real, w("zeros_like", real))
    if dtype is None:
        return x
    if not dtype.is_complex:
        return w("_to_copy", x.re, dtype=dtype)
    return Pair(*(w("_to_copy", part, dtype=dtype.to_real()) for part in x))


@of("view_as_complex")
def view_as_complex(w: Writer, x: Real) -> Pair:
    return w.unpack(x)


@of("view_as_real", "view_as_real_copy")
def view_as_real(w: Writer, x: Pair) -> Real:
    return w.pack(x)


@of("complex")
def make(w: Writer, re: Real, im: Real) -> Pair:
    zero = w("zeros_like", re + im)
    return Pair(re + zero, im + zero) if _broadcasts(re, im) else Pair(re, im)


def _broadcasts(a: Real, b: Real) -> bool:
    first, second = a.node.meta["val"].shape, b.node.meta["val"].shape
    return len(first) != len(second) or any(x is not y and x != y for x, y in zip(first, second, strict=True))


@of("polar")
def polar(w: Writer, size: Real, angle: Real) -> Pair:
    return Pair(size * w("cos", angle), size * w("sin", angle))


@of("real")
def real(w: Writer, x: Pair) -> Real:
    return x.re


@of("imag")
def imag(w: Writer, x: Pair) -> Real:
    return x.im


@of("_conj", "conj_physical", "_conj_physical", "_conj_copy")
def conj(w: Writer, x: Pair) -> Pair:
    return Pair(x.re, -x.im)


@of("resolve_conj", "resolve_neg")
def resolved(w: Writer, x: Pair) -> Pair:
    return x


# --- transforms, which torch.onnx translates ---------------------------------------------------------------------


@of("_fft_c2c")
def fft_c2c(w: Writer, x: Pair, *args: Any) -> Pair:
    return w.unpack(w("view_as_real", w("_fft_c2c", w("view_as_complex", w.pack(x)), *args)))


@of("_fft_c2r")
def fft_c2r(w: Writer, x: Pair, *args: Any) -> Real:
    return w("_fft_c2r", w("view_as_complex", w.pack(x)), *args)


# --- arithmetic --------------------------------------------------------------------------------------------------


@of("add.Tensor", "add.Scalar")
def add(w: Writer, a: Any, b: Any, *, alpha: Any = 1) -> Pair:
    if alpha != 1:
        b = mul(w, b, alpha) if isinstance(b, Pair) else b * alpha
    (are, aim), (bre, bim) = parts(a), parts(b)
    re = are + bre if isinstance(are, Real) else bre + are
    if aim is not None:
        im = aim if bim is None else aim + bim
    else:
        im = bim if isinstance(bim, Real) else w("full_like", are, bim)
    # An operand that is broadcast has to be so in both parts.
    return _same_shape(w, re, im)


def _same_shape(w: Writer, re: Real, im: Real) -> Pair:
    if not _broadcasts(re, im):
        return Pair(re, im)
    zero = w("zeros_like", re + im)
    return Pair(re + zero, im + zero)


@of("sub.Tensor", "sub.Scalar")
def sub(w: Writer, a: Any, b: Any, *, alpha: Any = 1) -> Pair:
    return add(w, a, mul(w, b, -alpha) if isinstance(b, Pair) else -b if alpha == 1 else b * -alpha)


@of("rsub.Scalar", "rsub.Tensor")
def rsub(w: Writer, a: Any, b: Any, alpha: Any = 1) -> Pair:
    return add(w, neg(w, mul(w, a, alpha) if alpha != 1 else a), b)


@of("_neg_view")
def neg(w: Writer, x: Pair) -> Pair:
    return Pair(-x.re, -x.im)


@of("mul.Tensor", "mul.Scalar")
def mul(w: Writer, a: Any, b: Any) -> Pair:
    return product(lambda x, y: x * y if isinstance(x, Real) else y * x, a, b)


def product(times: Callable[[Any, Any], Real], a: Any, b: Any) -> Pair:
    """Of any product that is linear in both factors; of a real factor half as many."""
    (are, aim), (bre, bim) = parts(a), parts(b)
    if aim is None:
        return Pair(times(are, bre), times(are, bim))
    if bim is None:
        return Pair(times(are, bre), times(aim, bre))
    return Pair(times(are, bre) - times(aim, bim), times(are, bim) + times(aim, bre))


@of("div.Tensor", "div.Scalar")
def div(w: Writer, a: Any, b: Any) -> Pair:
    if isinstance(b, complex):
        return mul(w, a, 1 / b)
    if not isinstance(b, Pair):
        return Pair(a.re / b, a.im / b)
    size = b.re * b.re + b.im * b.im
    over = mul(w, a, conj(w, b))
    return Pair(over.re / size, over.im / size)


@of("reciprocal")
def reciprocal(w: Writer, x: Pair) -> Pair:
    size = x.re * x.re + x.im * x.im
    return Pair(x.re / size, -x.im / size)


@of("square")
def square(w: Writer, x: Pair) -> Pair:
    return mul(w, x, x)


@of("pow.Tensor_Scalar")
def power(w: Writer, x: Pair, exponent: Any) -> Pair:
    if exponent == 0.5:
        return sqrt(w, x)
    if isinstance(exponent, (int, float)) and exponent == int(exponent) and 0 < abs(exponent) <= 16:
        found = x
        for _ in range(int(abs(exponent)) - 1):
            found = mul(w, found, x)
        return found if exponent > 0 else reciprocal(w, found)
    return exp(w, mul(w, log(w, x), exponent))


@of("pow.Tensor_Tensor")
def power_tensor(w: Writer, x: Any, exponent: Any) -> Pair:
    return exp(w, mul(w, log(w, _paired(w, x)), exponent))


@of("pow.Scalar")
def power_of_number(w: Writer, x: Any, exponent: Pair) -> Pair:
    return exp(w, mul(w, exponent, cmath.log(x)))


@of("mm", "bmm", "matmul", "dot", "mv")
def matmul(w: Writer, a: Any, b: Any) -> Pair:
    op = w.target
    return product(lambda x, y: w(op, x, y), a, b)


@of("addmm", "baddbmm", "addmv")
def addmm(w: Writer, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Pair:
    found = product(lambda x, y: w("matmul", x, y), a, b)
    found = found if alpha == 1 else mul(w, found, alpha)
    return add(w, found, c if beta == 1 else mul(w, c, beta) if isinstance(c, Pair) else c * beta)


@of("linear")
def linear(w: Writer, x: Any, weight: Any, bias: Any = None) -> Pair:
    found = product(lambda a, b: w("linear", a, b), x, weight)
    return found if bias is None else add(w, found, bias)


@of("einsum")
def einsum(w: Writer, equation: str, operands: list[Any], **kwargs: Any) -> Pair:
    """A sum over the parts of each complex operand: i to the number of imaginary ones."""
    terms: list[list[Real]] = [[], []]
    for choice in itertools.product(*(range(2 if isinstance(item, Pair) else 1) for item in operands)):
        chosen = [item[k] if isinstance(item, Pair) else item for item, k in zip(operands, choice, strict=True)]
        term = w("einsum", equation, chosen)
        turns = sum(choice)
        terms[turns % 2].append(-term if turns % 4 > 1 else term)
    re, im = (first for first, *_ in terms)
    for term in terms[0][1:]:
        re = re + term
    for term in terms[1][1:]:
        im = im + term
    return Pair(re, im)


@of("convolution")
def convolution(w: Writer, x: Any, weight: Any, bias: Any, *args: Any) -> Pair:
    found = product(lambda a, b: w("convolution", a, b, None, *args), x, weight)
    if bias is None:
        return found
    shape = [-1, *[1] * (len(found.re.node.meta["val"].shape) - 2)]
    return add(w, found, alike(overload("view"))(w, bias, shape) if isinstance(bias, Pair) else w("view", bias, shape))


@of("prod.dim_int")
def prod(w: Writer, x: Pair, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Pair:
    size = static(x.re.node.meta["val"].shape[dim], "prod of complex values: the axis")
    found = Pair(*(w("select.int", part, dim, 0) for part in x))
    for index in range(1, size):
        found = mul(w, found, Pair(*(w("select.int", part, dim, index) for part in x)))
    return Pair(*(w("unsqueeze", part, dim) for part in found)) if keepdim else found


# --- functions ---------------------------------------------------------------------------------------------------


@of("abs")
def absolute(w: Writer, x: Pair) -> Real:
    return w("sqrt", x.re * x.re + x.im * x.im)


@of("angle")
def angle(w: Writer, x: Pair) -> Real:
    return w("atan2", x.im, x.re)


@of("exp")
def exp(w: Writer, x: Pair) -> Pair:
    return polar(w, w("exp", x.re), x.im)


@of("log")
def log(w: Writer, x: Pair) -> Pair:
    return Pair(w("log", absolute(w, x)), angle(w, x))


@of("sqrt")
def sqrt(w: Writer, x: Pair) -> Pair:
    size = absolute(w, x)
    re = w("sqrt", w("clamp", (size + x.re) * 0.5, 0.0))
    im = w("sqrt", w("clamp", (size - x.re) * 0.5, 0.0))
    return Pair(re, w("where.self", w("lt.Scalar", x.im, 0), -im, im))


@of("sgn")
def sgn(w: Writer, x: Pair) -> Pair:
    size = absolute(w, x)
    safe = w("where.self", w("eq.Scalar", size, 0), w("ones_like", size), size)
    return Pair(x.re / safe, x.im / safe)


@of("sin")
def sin(w: Writer, x: Pair) -> Pair:
    return Pair(w("sin", x.re) * w("cosh", x.im), w("cos", x.re) * w("sinh", x.im))


@of("cos")
def cos(w: Writer, x: Pair) -> Pair:
    return Pair(w("cos", x.re) * w("cosh", x.im), -(w("sin", x.re) * w("sinh", x.im)))


@of("sinh")
def sinh(w: Writer, x: Pair) -> Pair:
    return Pair(w("sinh", x.re) * w("cos", x.im), w("cosh", x.re) * w("sin", x.im))


@of("cosh")
def cosh(w: Writer, x: Pair) -> Pair:
    return Pair(w("cosh", x.re) * w("cos", x.im), w("sinh", x.re) * w("sin", x.im))


@of("tanh")
def tanh(w: Writer, x: Pair) -> Pair:
    """Divided by cosh(2 re) throughout, which overflows where tanh(2 re) does not."""
    wide = w("tanh", x.re * 2)
    flat = w("reciprocal", w("cosh", x.re * 2))
    below = w("cos", x.im * 2) * flat + 1.0
    return Pair(wide / below, w("sin", x.im * 2) * flat / below)


@of("tan")
def tan(w: Writer, x: Pair) -> Pair:
    turned = tanh(w, Pair(-x.im, x.re))
    return Pair(turned.im, -turned.re)


@of("sigmoid")
def sigmoid(w: Writer, x: Pair) -> Pair:
    half = tanh(w, Pair(x.re * 0.5, x.im * 0.5))
    return Pair(half.re * 0.5 + 0.5, half.im * 0.5)


@of("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.Scalar")
def norm(w: Writer, x: Pair, *args: Any, **kwargs: Any) -> Real:
    return w(w.target, absolute(w, x), *args, **kwargs)


@of("isnan", "isinf")
def any_part(w: Writer, x: Pair) -> Real:
    op = w.target
    return w("logical_or", w(op, x.re), w(op, x.im))


@of("isfinite")
def isfinite(w: Writer, x: Pair) -> Real:
    return w("logical_and", w("isfinite", x.re), w("isfinite", x.im))


@of("eq.Tensor", "eq.Scalar")
def equal(w: Writer, a: Any, b: Any) -> Real:
    (are, aim), (bre, bim) = parts(a), parts(b)
    if aim is None or bim is None:
        aim, bim = (aim, 0.0) if bim is None else (bim, 0.0)
    return w(
        "logical_and",
        *(w("eq.Tensor" if isinstance(y, Real) else "eq.Scalar", x, y) for x, y in ((are, bre), (aim, bim))),
    )


@of("ne.Tensor", "ne.Scalar")
def unequal(w: Writer, a: Any, b: Any) -> Real:
    return w("logical_not", equal(w, a, b))
