"""Products, extremes and determinants in forms that TensorRT's parsers refuse.

``torch.any``/``all`` and ``amax`` of bool (ReduceMax and ReduceMin of bool), ``cumprod``, ``torch.linalg.det``,
``x.argmax()`` (of all elements, as a vector), and ``torch.matmul`` of a vector with a stack of matrices.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.ir import numpy_dtype
from passes.rules.shapes import check_intermediate, iota, size

LARGEST_MATRIX = 4
"""Rows of the largest matrix whose determinant is written out: 24 products. Elimination would need pivots."""


@rule("ReduceMax", "ReduceMin")
def reduce_bool_as_int32(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's reductions take no bool; the largest and the smallest of 0 and 1 are the same in int32."""
    if g.dtype(node.inputs[0]) != np.bool_:
        return None
    reduced = g.node(node.op, [g.cast(node.inputs[0], np.int32), *node.inputs[1:]], node.attrs)
    return g.op.Greater(reduced, g.constant(0, np.int32))  # of nothing, the largest is the least int32, and false


@reduce_bool_as_int32.example
def any_and_all() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.ReduceMax(x, [1], keepdims=0), g.op.ReduceMin(x, [0, -1]), g.op.ReduceMax(x)]

    return example({"x": ("bool", ["n", 4, 3])}, build)


OF_NUMBERS = {"ReduceL1": "Abs", "ReduceL2": "Abs", "ReduceLogSum": "Log"} | dict.fromkeys(
    ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceLogSumExp"), "Identity"
)
"""What a reduction does to a tensor of one element without axes; ReduceSumSquare squares it."""


@rule(*OF_NUMBERS, "ReduceSumSquare")
def reduction_of_a_number(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT reduces no tensor without axes: it is what it was, or its size, its logarithm or its square."""
    x = node.inputs[0]
    if len(g.shape(x)) != 0:
        return None
    if node.attrs.get("noop_with_empty_axes", 0) and OF_NUMBERS.get(node.op) != "Identity":
        g.decline(f"{node.op} over no axis is not the same in every opset")
    if node.op == "ReduceSumSquare":
        return g.op.Mul(x, x)
    return g.node(OF_NUMBERS[node.op], [x], {})


@reduction_of_a_number.example
def losses_of_one_number() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [g.node(op, [x], {"keepdims": 0}) for op in (*OF_NUMBERS, "ReduceSumSquare")]

    return example({"x": ("float32", [])}, build)


@rule("CumProd", when=lacks("CumProd"))
def cumprod_as_masked_products(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no CumProd; each element is the product of those before it, the rest being 1."""
    x = node.inputs[0]
    rank = len(g.shape(x))
    axis = int(g.value(node.inputs[1]).reshape(-1)[0]) % rank
    length = g.static_dim(x, axis)
    check_intermediate(g, [*g.shape(x), length], "every element with every other of its row")
    x = g.moveaxis(x, axis, -1)
    places = np.arange(length)
    reverse, exclusive = bool(node.attrs.get("reverse", 0)), bool(node.attrs.get("exclusive", 0))
    earlier = places[None, :] > places[:, None] if reverse else places[None, :] < places[:, None]
    counted = earlier if exclusive else earlier | np.eye(length, dtype=bool)
    spread = g.op.Where(g.constant(counted), g.unsqueeze(x, [rank - 1]), g.constant(1, g.dtype(x)))
    return g.moveaxis(g.reduce("ReduceProd", spread, [rank]), -1, axis)


@cumprod_as_masked_products.example
def cumprod_forward_and_backward() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [
            g.op.CumProd(x, g.constant(1)),
            g.op.CumProd(x, g.constant(-1), exclusive=1),
            g.op.CumProd(x, g.constant(0), reverse=1),
        ]

    return example({"x": ("float32", [3, 5, 4])}, build, opset=26)


@rule("Det", when=lacks("Det"))
def det_by_cofactors(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no Det; that of a small matrix is a sum of products."""
    x = node.inputs[0]
    rank, n = len(g.shape(x)), g.static_dim(x, -1)
    if n > LARGEST_MATRIX:
        g.decline(f"the matrices are {n} by {n}; determinants are written out up to {LARGEST_MATRIX} rows")
    rows = [g.op.Gather(x, g.constant(i), axis=rank - 2) for i in range(n)]
    entries = [[g.op.Gather(row, g.constant(j), axis=rank - 2) for j in range(n)] for row in rows]
    minors: dict[tuple[int, ...], gs.Tensor] = {
        (j,): entries[n - 1][j] for j in range(n)
    }  # of the last rows, by the columns that they keep
    for i in range(n - 2, -1, -1):
        larger: dict[tuple[int, ...], gs.Tensor] = {}
        for columns in combinations(range(n), n - i):
            total: gs.Tensor | None = None
            for place, column in enumerate(columns):
                term = g.op.Mul(entries[i][column], minors[columns[:place] + columns[place + 1 :]])
                total = term if total is None else g.node("Sub" if place % 2 else "Add", [total, term], {})
            assert total is not None
            larger[columns] = total
        minors = larger
    return g.op.Identity(minors[tuple(range(n))]) if n == 1 else minors[tuple(range(n))]


def _det(shape: list[int | str], opset: int = 20) -> gs.Graph:
    return example({"x": ("float32", shape)}, lambda g, x: g.op.Det(x), opset)


@det_by_cofactors.example
def det_of_a_dynamic_batch() -> gs.Graph:
    return _det(["n", 2, 4, 4])


@det_by_cofactors.example
def det_of_one_matrix() -> gs.Graph:
    return _det([3, 3], 13)


@det_by_cofactors.example
def det_two_by_two() -> gs.Graph:
    return _det([5, 2, 2])


@rule("EyeLike")
def eye_of_a_dynamic_size(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's EyeLike wants sizes that are known; ones are where the numbers of row and column agree."""
    x = node.inputs[0]
    if x.shape is None or all(isinstance(item, int) for item in x.shape):
        return None
    dtype = numpy_dtype(node.attrs["dtype"]) if "dtype" in node.attrs else g.dtype(x)
    rows, columns = iota(g, size(g, x, 0)), iota(g, size(g, x, 1))
    diagonal = g.op.Add(g.unsqueeze(rows, [1]), np.int64(node.attrs.get("k", 0)))
    return g.cast(g.op.Equal(diagonal, g.unsqueeze(columns, [0])), dtype)


@eye_of_a_dynamic_size.example
def a_diagonal_beside_the_main_one() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.EyeLike(x), g.op.EyeLike(x, k=1, dtype=7)]

    return example({"x": ("float32", ["n", 4])}, build)


@rule("ArgMax", "ArgMin")
def place_in_a_vector(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's ArgMax and ArgMin want two axes at least; a vector is the only row of a matrix."""
    x = node.inputs[0]
    if x.shape is None or len(x.shape) != 1:
        return None
    found = g.node(node.op, [g.unsqueeze(x, [0])], {**node.attrs, "axis": 1, "keepdims": 0})
    return found if node.attrs.get("keepdims", 1) else g.squeeze(found, [0])


@place_in_a_vector.example
def argmax_and_argmin_of_all_elements() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.ArgMax(x), g.op.ArgMin(x, axis=-1, keepdims=0), g.op.ArgMax(x, keepdims=0, select_last_index=1)]

    return example({"x": ("float32", ["n"])}, build)


@rule("MatMul")
def vector_times_stack(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT multiplies no vector with a stack of matrices; a matrix of one row it does."""
    a, b = node.inputs
    if a.shape is None or b.shape is None or sorted((len(a.shape), len(b.shape)))[0] != 1:
        return None
    if len(a.shape) == 1 and len(b.shape) > 2:
        return g.squeeze(g.op.MatMul(g.unsqueeze(a, [0]), b), [len(b.shape) - 2])
    if len(b.shape) == 1 and len(a.shape) > 2:
        return g.squeeze(g.op.MatMul(a, g.unsqueeze(b, [1])), [len(a.shape) - 1])
    return None


@vector_times_stack.example
def vector_on_the_left() -> gs.Graph:
    return example({"x": ("float32", [3]), "y": ("float32", ["n", 2, 3, 4])}, lambda g, x, y: g.op.MatMul(x, y))


@vector_times_stack.example
def vector_on_the_right() -> gs.Graph:
    return example({"x": ("float32", ["n", 4, 3]), "y": ("float32", [3])}, lambda g, x, y: g.op.MatMul(x, y))
