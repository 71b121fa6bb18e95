"""Einstein summation for parsers that take it in its simplest forms: ``torch.einsum`` of any equation.

TensorRT before 9 documents no ellipsis, no repeated index and no broadcasting; TensorRT 8.5 found no implementation of
a batch of matrix products either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.rules.shapes import Size, as_tensor, check_intermediate, iota, reshape, size, times

if TYPE_CHECKING:
    from bridge.target import Target


def _takes_few_equations(target: Target) -> bool:
    return target.of_tensorrt_8


@dataclass
class _Operand:
    """A tensor with one letter for each of its axes."""

    tensor: gs.Tensor
    axes: list[str]


@rule("Einsum", when=_takes_few_equations)
def einsum_as_products(node: gs.Node, g: Builder) -> Replacement:
    """Before TensorRT 9, Einsum has no ellipsis, repeated index or broadcasting; products and sums do it all."""
    operands, wanted = _read(node, g)
    sizes = _sizes(g, operands)
    operands = [_without_ones(g, _diagonals(g, item), sizes) for item in operands]
    result = operands[0]
    for index, item in enumerate(operands[1:], 1):
        needed = set(wanted).union(*(other.axes for other in operands[index + 1 :]))
        result = _contracted(g, result, item, needed, sizes)
    result = _summed(g, result, set(wanted))
    missing = [axis for axis, letter in enumerate(wanted) if letter not in result.axes]
    tensor = _ordered(g, result, [letter for letter in wanted if letter in result.axes])
    if missing:  # every operand has a single element there
        tensor = g.unsqueeze(tensor, missing)
    return g.op.Identity(tensor) if tensor in node.inputs else tensor


# --- reading the equation --------------------------------------------------------------------------------------------


def _read(node: gs.Node, g: Builder) -> tuple[list[_Operand], list[str]]:
    """The operands and the letters of the result; the axes of an ellipsis get capital Greek letters."""
    left, arrow, right = node.attrs["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    ranks = [len(g.shape(tensor)) for tensor in node.inputs]
    hidden = max((rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)), default=0)
    ellipsis = [chr(ord("\u0391") + index) for index in range(hidden)]
    operands = []
    for term, rank, tensor in zip(terms, ranks, node.inputs, strict=True):
        own = ellipsis[hidden - (rank - len(term.replace("...", ""))) :] if "..." in term else []
        operands.append(_Operand(tensor, _letters(term, own)))
    if arrow:
        return operands, _letters(right, ellipsis)
    counts = Counter(letter for term in terms for letter in term.replace(".", ""))
    implied = ellipsis if "..." in left else []
    return operands, [*implied, *sorted(letter for letter, count in counts.items() if count == 1)]


def _letters(term: str, ellipsis: list[str]) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *(ellipsis if dots else ()), *after]


def _sizes(g: Builder, operands: Iterable[_Operand]) -> dict[str, Size]:
    """The size that each letter stands for: that of the operands which do not repeat a single element."""
    sizes: dict[str, Size] = {}
    for item in operands:
        for axis, letter in enumerate(item.axes):
            known = g.shape(item.tensor)[axis]
            old = sizes.get(letter, 1)
            if isinstance(known, int) and (known != 1 or letter not in sizes):
                sizes[letter] = known
            elif not isinstance(known, int) and isinstance(old, int) and old == 1:
                sizes[letter] = size(g, item.tensor, axis)
    return sizes


# --- one operand -----------------------------------------------------------------------------------------------------


def _diagonals(g: Builder, item: _Operand) -> _Operand:
    """The operand with each letter once: of two axes with one letter, the diagonal."""
    while repeated := next((letter for letter, count in Counter(item.axes).items() if count > 1), None):
        first = item.axes.index(repeated)
        second = item.axes.index(repeated, first + 1)
        rest = [axis for axis in range(len(item.axes)) if axis not in (first, second)]
        turned = g.op.Transpose(item.tensor, perm=[*rest, first, second])
        length = size(g, turned, len(rest))
        kept = [size(g, turned, axis) for axis in range(len(rest))]
        flat = reshape(g, turned, [*kept, times(g, length, length)])
        if isinstance(length, int):
            places: gs.Tensor = g.constant(np.arange(length) * (length + 1))
        else:
            places = g.op.Mul(iota(g, length), g.op.Add(length, [1]))
        diagonal = g.op.Gather(flat, places, axis=len(rest))
        item = _Operand(diagonal, [*(item.axes[axis] for axis in rest), repeated])
    return item


def _without_ones(g: Builder, item: _Operand, sizes: dict[str, Size]) -> _Operand:
    """The operand without the axes along which its single element is repeated for the others."""
    ones = [
        axis
        for axis, letter in enumerate(item.axes)
        if g.shape(item.tensor)[axis] == 1 and not (isinstance(sizes[letter], int) and sizes[letter] == 1)
    ]
    if not ones:
        return item
    return _Operand(g.squeeze(item.tensor, ones), [x for axis, x in enumerate(item.axes) if axis not in ones])


def _summed(g: Builder, item: _Operand, needed: set[str]) -> _Operand:
    """The operand summed over the letters that nobody needs any more."""
    axes = [axis for axis, letter in enumerate(item.axes) if letter not in needed]
    if not axes:
        return item
    return _Operand(g.reduce("ReduceSum", item.tensor, axes), [letter for letter in item.axes if letter in needed])


def _ordered(g: Builder, item: _Operand, letters: list[str]) -> gs.Tensor:
    perm = [item.axes.index(letter) for letter in letters]
    if perm == list(range(len(perm))):
        return item.tensor
    turned: gs.Tensor = g.op.Transpose(item.tensor, perm=perm)
    return turned


# --- two operands ----------------------------------------------------------------------------------------------------


def _contracted(g: Builder, a: _Operand, b: _Operand, needed: set[str], sizes: dict[str, Size]) -> _Operand:
    """The product of two operands, summed over the letters that only they have."""
    a, b = _summed(g, a, needed | set(b.axes)), _summed(g, b, needed | set(a.axes))
    both = [letter for letter in a.axes if letter in b.axes]
    batch = [letter for letter in both if letter in needed]
    inner = [letter for letter in both if letter not in needed]
    own_a = [letter for letter in a.axes if letter not in both]
    own_b = [letter for letter in b.axes if letter not in both]
    if not inner or g.dtype(a.tensor).kind in "iu":
        return _product(g, a, b, [*batch, *own_a, *own_b, *inner], len(inner))
    left = _grouped(g, a, [batch, own_a, inner], sizes)
    right = _grouped(g, b, [batch, inner, own_b], sizes)
    axes = [*batch, *own_a, *own_b]
    product = g.op.MatMul(left, right)
    if len(own_a) == len(own_b) == 1:
        return _Operand(product, axes)
    return _Operand(
        reshape(g, product, [sizes[letter] for letter in axes]) if axes else g.squeeze(product, [0, 1]), axes
    )


def _product(g: Builder, a: _Operand, b: _Operand, letters: list[str], inner: int) -> _Operand:
    """By broadcasting, the ``inner`` last letters summed: for what MatMul does not do."""
    spread = []
    for item in (a, b):
        tensor = _ordered(g, item, [letter for letter in letters if letter in item.axes])
        absent = [axis for axis, letter in enumerate(letters) if letter not in item.axes]
        spread.append(g.unsqueeze(tensor, absent) if absent else tensor)
    product = g.op.Mul(*spread)
    if inner:
        check_intermediate(g, g.shape(product), "the products before they are summed")
    return _summed(g, _Operand(product, letters), set(letters[: len(letters) - inner]))


def _grouped(g: Builder, item: _Operand, groups: list[list[str]], sizes: dict[str, Size]) -> gs.Tensor:
    """The operand with the letters of the first group as axes of their own, and one axis for each other group."""
    tensor = _ordered(g, item, [letter for group in groups for letter in group])
    batch, *others = groups
    if all(len(group) == 1 for group in others):
        return tensor
    shape: list[Size] = [sizes[letter] for letter in batch]
    for group in others:
        joined: Size = 1
        for letter in group:
            joined = times(g, joined, sizes[letter])
        shape.append(joined)
    return reshape(g, tensor, [item if isinstance(item, int) else as_tensor(g, item) for item in shape])


# --- examples --------------------------------------------------------------------------------------------------------


def _einsum(equation: str, *shapes: list[int | str], dtype: str = "float32") -> gs.Graph:
    inputs = {f"x{index}": (dtype, shape) for index, shape in enumerate(shapes)}
    return example(inputs, lambda g, *tensors: g.op.Einsum(*tensors, equation=equation), 18)


@einsum_as_products.example
def batch_of_matrix_products() -> gs.Graph:
    return _einsum("bij, bjk -> bik", ["n", 3, 4], ["n", 4, 5])


@einsum_as_products.example
def attention_scores() -> gs.Graph:
    return _einsum("bhqd,bhkd->bhqk", ["n", 2, "q", 4], ["n", 2, "k", 4])


@einsum_as_products.example
def heads_joined_by_a_matrix() -> gs.Graph:
    return _einsum("bqhd,hde->bqe", ["n", "q", 2, 4], [2, 4, 5])


@einsum_as_products.example
def ellipsis_with_broadcasting() -> gs.Graph:
    return _einsum("...ij,...jk", [2, 1, 3, 4], [1, 5, 4, 6])


@einsum_as_products.example
def three_operands() -> gs.Graph:
    return _einsum("bn,anm,bm->ba", ["b", 3], [5, 3, 4], ["b", 4])


@einsum_as_products.example
def diagonals_of_a_dynamic_batch() -> gs.Graph:
    return _einsum("bii->bi", ["n", "m", "m"])


@einsum_as_products.example
def trace() -> gs.Graph:
    return _einsum("ii", [4, 4])


@einsum_as_products.example
def outer_product_in_another_order() -> gs.Graph:
    return _einsum(
        "i,j->ji",
        [
            "n",
        ],
        [4],
    )


@einsum_as_products.example
def everything_summed_of_two() -> gs.Graph:
    return _einsum("ij,ij->", ["n", 3], ["n", 3])


@einsum_as_products.example
def of_integers() -> gs.Graph:
    return _einsum("ij,kj->ik", ["n", 3], [4, 3], dtype="int32")


@einsum_as_products.example
def sum_and_transpose() -> gs.Graph:
    return _einsum("ijk->ki", [2, "n", 3])


@einsum_as_products.example
def a_size_of_one_repeated() -> gs.Graph:
    return _einsum("ij,ij->ij", [3, 1], [3, "n"])
