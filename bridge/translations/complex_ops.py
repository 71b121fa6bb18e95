"""Arithmetic and functions of complex tensors, on pairs of a real and an imaginary part."""

from __future__ import annotations

import cmath
import itertools
from collections.abc import Callable
from typing import Any

from .complex_layout import alike, broadcasts, conj, paired, polar
from .complex_pairs import Pair, Real, Writer, parts
from .registry import on_pairs, overload, static

# --- arithmetic --------------------------------------------------------------------------------------------------


@on_pairs("add.Tensor", "add.Scalar")
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
    if not broadcasts(re, im):
        return Pair(re, im)
    zero = w("zeros_like", re + im)
    return Pair(re + zero, im + zero)


@on_pairs("sub.Tensor", "sub.Scalar")
def sub(w: Writer, a: Any, b: Any, *, alpha: Any = 1) -> Pair:
    return add(w, a, mul(w, b, -alpha) if isinstance(b, Pair) else -b if alpha == 1 else b * -alpha)


@on_pairs("rsub.Scalar", "rsub.Tensor")
def rsub(w: Writer, a: Any, b: Any, alpha: Any = 1) -> Pair:
    return add(w, neg(w, mul(w, a, alpha) if alpha != 1 else a), b)


@on_pairs("_neg_view")
def neg(w: Writer, x: Pair) -> Pair:
    return Pair(-x.re, -x.im)


@on_pairs("mul.Tensor", "mul.Scalar")
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


@on_pairs("div.Tensor", "div.Scalar")
def div(w: Writer, a: Any, b: Any) -> Pair:
    if isinstance(b, complex):
        return mul(w, a, 1 / b)
    if not isinstance(b, Pair):
        return Pair(a.re / b, a.im / b)
    size = b.re * b.re + b.im * b.im
    over = mul(w, a, conj(w, b))
    return Pair(over.re / size, over.im / size)


@on_pairs("reciprocal")
def reciprocal(w: Writer, x: Pair) -> Pair:
    size = x.re * x.re + x.im * x.im
    return Pair(x.re / size, -x.im / size)


@on_pairs("square")
def square(w: Writer, x: Pair) -> Pair:
    return mul(w, x, x)


@on_pairs("pow.Tensor_Scalar")
def power(w: Writer, x: Pair, exponent: Any) -> Pair:
    if exponent == 0.5:
        return sqrt(w, x)
    if isinstance(exponent, (int, float)) and exponent == int(exponent) and 0 < abs(exponent) <= 16:
        found = x
        for _ in range(int(abs(exponent)) - 1):
            found = mul(w, found, x)
        return found if exponent > 0 else reciprocal(w, found)
    return exp(w, mul(w, log(w, x), exponent))


@on_pairs("pow.Tensor_Tensor")
def power_tensor(w: Writer, x: Any, exponent: Any) -> Pair:
    return exp(w, mul(w, log(w, paired(w, x)), exponent))


@on_pairs("pow.Scalar")
def power_of_number(w: Writer, x: Any, exponent: Pair) -> Pair:
    return exp(w, mul(w, exponent, cmath.log(x)))


@on_pairs("mm", "bmm", "matmul", "dot", "mv")
def matmul(w: Writer, a: Any, b: Any) -> Pair:
    op = w.target
    return product(lambda x, y: w(op, x, y), a, b)


@on_pairs("addmm", "baddbmm", "addmv")
def addmm(w: Writer, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Pair:
    found = product(lambda x, y: w("matmul", x, y), a, b)
    found = found if alpha == 1 else mul(w, found, alpha)
    return add(w, found, c if beta == 1 else mul(w, c, beta) if isinstance(c, Pair) else c * beta)


@on_pairs("linear")
def linear(w: Writer, x: Any, weight: Any, bias: Any = None) -> Pair:
    found = product(lambda a, b: w("linear", a, b), x, weight)
    return found if bias is None else add(w, found, bias)


@on_pairs("einsum")
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


@on_pairs("convolution")
def convolution(w: Writer, x: Any, weight: Any, bias: Any, *args: Any) -> Pair:
    found = product(lambda a, b: w("convolution", a, b, None, *args), x, weight)
    if bias is None:
        return found
    shape = [-1, *[1] * (len(found.re.node.meta["val"].shape) - 2)]
    return add(w, found, alike(overload("view"))(w, bias, shape) if isinstance(bias, Pair) else w("view", bias, shape))


@on_pairs("prod.dim_int")
def prod(w: Writer, x: Pair, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Pair:
    size = static(x.re.node.meta["val"].shape[dim], "prod of complex values: the axis")
    found = Pair(*(w("select.int", part, dim, 0) for part in x))
    for index in range(1, size):
        found = mul(w, found, Pair(*(w("select.int", part, dim, index) for part in x)))
    return Pair(*(w("unsqueeze", part, dim) for part in found)) if keepdim else found


# --- functions ---------------------------------------------------------------------------------------------------


@on_pairs("abs")
def absolute(w: Writer, x: Pair) -> Real:
    return w("sqrt", x.re * x.re + x.im * x.im)


@on_pairs("angle")
def angle(w: Writer, x: Pair) -> Real:
    return w("atan2", x.im, x.re)


@on_pairs("exp")
def exp(w: Writer, x: Pair) -> Pair:
    return polar(w, w("exp", x.re), x.im)


@on_pairs("log")
def log(w: Writer, x: Pair) -> Pair:
    return Pair(w("log", absolute(w, x)), angle(w, x))


@on_pairs("sqrt")
def sqrt(w: Writer, x: Pair) -> Pair:
    """The larger part by a sum, which cancels nothing, and the other from the product of both, which is half of im."""
    large = w("sqrt", (absolute(w, x) + w("abs", x.re)) * 0.5)
    nothing = w("eq.Scalar", large, 0)
    small = x.im / (w("where.self", nothing, w("ones_like", large), large) * 2)
    left, below = w("lt.Scalar", x.re, 0), w("lt.Scalar", x.im, 0)
    return Pair(
        w("where.self", left, w("abs", small), large),
        w("where.self", left, w("where.self", below, -large, large), small),
    )


@on_pairs("sgn")
def sgn(w: Writer, x: Pair) -> Pair:
    size = absolute(w, x)
    safe = w("where.self", w("eq.Scalar", size, 0), w("ones_like", size), size)
    return Pair(x.re / safe, x.im / safe)


@on_pairs("sin")
def sin(w: Writer, x: Pair) -> Pair:
    return Pair(w("sin", x.re) * w("cosh", x.im), w("cos", x.re) * w("sinh", x.im))


@on_pairs("cos")
def cos(w: Writer, x: Pair) -> Pair:
    return Pair(w("cos", x.re) * w("cosh", x.im), -(w("sin", x.re) * w("sinh", x.im)))


@on_pairs("sinh")
def sinh(w: Writer, x: Pair) -> Pair:
    return Pair(w("sinh", x.re) * w("cos", x.im), w("cosh", x.re) * w("sin", x.im))


@on_pairs("cosh")
def cosh(w: Writer, x: Pair) -> Pair:
    return Pair(w("cosh", x.re) * w("cos", x.im), w("sinh", x.re) * w("sin", x.im))


@on_pairs("tanh")
def tanh(w: Writer, x: Pair) -> Pair:
    """Divided by cosh(2 re) throughout, which overflows where tanh(2 re) does not."""
    wide = w("tanh", x.re * 2)
    flat = w("reciprocal", w("cosh", x.re * 2))
    below = w("cos", x.im * 2) * flat + 1.0
    return Pair(wide / below, w("sin", x.im * 2) * flat / below)


@on_pairs("tan")
def tan(w: Writer, x: Pair) -> Pair:
    turned = tanh(w, Pair(-x.im, x.re))
    return Pair(turned.im, -turned.re)


@on_pairs("sigmoid")
def sigmoid(w: Writer, x: Pair) -> Pair:
    half = tanh(w, Pair(x.re * 0.5, x.im * 0.5))
    return Pair(half.re * 0.5 + 0.5, half.im * 0.5)


@on_pairs("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.Scalar")
def norm(w: Writer, x: Pair, *args: Any, **kwargs: Any) -> Real:
    return w(w.target, absolute(w, x), *args, **kwargs)


@on_pairs("isnan", "isinf")
def any_part(w: Writer, x: Pair) -> Real:
    op = w.target
    return w("logical_or", w(op, x.re), w(op, x.im))


@on_pairs("isfinite")
def isfinite(w: Writer, x: Pair) -> Real:
    return w("logical_and", w("isfinite", x.re), w("isfinite", x.im))


@on_pairs("eq.Tensor", "eq.Scalar")
def equal(w: Writer, a: Any, b: Any) -> Real:
    (are, aim), (bre, bim) = parts(a), parts(b)
    if aim is None or bim is None:
        aim, bim = (aim, 0.0) if bim is None else (bim, 0.0)
    return w(
        "logical_and",
        *(w("eq.Tensor" if isinstance(y, Real) else "eq.Scalar", x, y) for x, y in ((are, bre), (aim, bim))),
    )


@on_pairs("ne.Tensor", "ne.Scalar")
def unequal(w: Writer, a: Any, b: Any) -> Real:
    return w("logical_not", equal(w, a, b))
