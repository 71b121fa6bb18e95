"""Scatter with a reduction: ``scatter_add``, ``scatter_reduce``, ``index_add``, ``index_put`` that adds, ``bincount``.

TensorRT's scatter overwrites. Where the indices are constants of which none occurs twice, gathering what is there,
combining and scattering back is the same; else each place compares its own number with every index.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.model import Array
from passes.rules.shapes import Size, as_tensor, check_intermediate, iota, product, reshape, shape_tensor, size, times

COMBINE = {"add": "Add", "mul": "Mul", "max": "Max", "min": "Min"}
REDUCE = {"add": "ReduceSum", "mul": "ReduceProd", "max": "ReduceMax", "min": "ReduceMin"}

EXACT_LIMIT = 1 << 20
"""Elements up to which rows are added by Where and ReduceSum; above it a product with a 0/1 matrix adds them."""


@rule("ScatterElements")
def scatter_elements_with_reduction(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's ScatterElements overwrites and cannot reduce; comparing each place with each index can."""
    reduction = node.attrs.get("reduction", "none")
    if reduction == "none":
        return None
    data, indices, updates = node.inputs
    indices = _int64(g, indices)
    rank = len(g.shape(data))
    axis = int(node.attrs.get("axis", 0)) % rank
    if isinstance(indices, gs.Constant) and isinstance(g.shape(data)[axis], int) and _distinct(g, indices, data, axis):
        old = _widened(g, g.op.GatherElements(data, indices, axis=axis))
        combined = g.cast(_combine(g, reduction, old, _widened(g, updates)), g.dtype(data))
        return g.op.ScatterElements(data, indices, combined, axis=axis)

    kept = g.dtype(data)
    here, data, updates = _compared(g, _widened(g, data), indices, _widened(g, updates), axis)
    reduced = _reduce_where(g, reduction, here, g.unsqueeze(updates, [rank - 1]), data)
    return g.cast(g.moveaxis(reduced, -1, axis), kept)


@rule("ScatterElements")
def scatter_elements_of_more_indices_than_places(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's ScatterElements takes no more indices than there are places; each place takes the last of its own."""
    data, indices, updates = node.inputs
    rank = len(g.shape(data))
    axis = int(node.attrs.get("axis", 0)) % rank
    places, count = g.shape(data)[axis], g.shape(indices)[axis]
    if node.attrs.get("reduction", "none") != "none" or not isinstance(places, int):
        return None
    if not isinstance(count, int) or count <= places:
        return None
    kept = g.dtype(data)
    here, data, updates = _compared(g, _widened(g, data), _int64(g, indices), _widened(g, updates), axis)
    last = g.reduce("ReduceMax", g.op.Where(here, iota(g, count), g.constant(-1)), [rank])
    new = g.op.GatherElements(updates, g.op.Max(last, g.constant(0)), axis=rank - 1)
    result = g.op.Where(g.op.Less(last, g.constant(0)), data, new)
    return g.cast(g.moveaxis(result, -1, axis), kept)


@rule("ScatterND")
def scatter_nd_with_reduction(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's ScatterND overwrites and cannot reduce; comparing each row with each index can."""
    reduction = node.attrs.get("reduction", "none")
    if reduction == "none":
        return None
    data, indices, updates = node.inputs
    indices = _int64(g, indices)
    rank = len(g.shape(data))
    if 0 in g.shape(indices)[:-1]:
        return g.op.Identity(data)
    depth = g.static_dim(indices, -1)
    if isinstance(indices, gs.Constant) and _distinct_rows(g, indices, data, depth):
        old = _widened(g, g.op.GatherND(data, indices))
        combined = g.cast(_combine(g, reduction, old, _widened(g, updates)), g.dtype(data))
        return g.op.ScatterND(data, indices, combined)

    kept = g.dtype(data)
    data, updates = _widened(g, data), _widened(g, updates)
    places, row = product(g, data, 0, depth), product(g, data, depth, rank)
    count = product(g, indices, 0, len(g.shape(indices)) - 1)
    rows = reshape(g, data, [places, row])
    new = reshape(g, updates, [count, row])
    here = g.op.Equal(g.unsqueeze(_flat_indices(g, indices, data, depth), [0]), g.unsqueeze(iota(g, places), [1]))
    compared = [item if isinstance(item, int) else None for item in (places, count)]
    whole = [*compared, row if isinstance(row, int) else None]
    known = np.prod([item for item in whole if item is not None], dtype=np.float64)
    if (
        reduction == "add"
        and g.dtype(data).kind not in "iu"
        and not (isinstance(row, int) and row == 1)
        and (known > EXACT_LIMIT or None in whole)
    ):
        check_intermediate(g, compared, "the comparison of every row with every index")
        result = g.op.Add(rows, g.op.MatMul(g.cast(here, g.dtype(data)), new))  # an Inf or NaN there reaches every row
    else:
        check_intermediate(g, whole, "the comparison of every row with every index")
        across = g.unsqueeze(g.op.Transpose(new, perm=[1, 0]), [0])  # [1, row, count]
        result = _reduce_where(g, reduction, g.unsqueeze(here, [1]), across, rows)
    return g.cast(reshape(g, result, _sizes(g, data)), kept)


# --- parts -------------------------------------------------------------------------------------------------------


def _compared(
    g: Builder, data: gs.Tensor, indices: gs.Tensor, updates: gs.Tensor, axis: int
) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """Which index is which place's, […, places, indices], and ``data`` and ``updates`` with ``axis`` as the last."""
    rank = len(g.shape(data))
    places = size(g, data, axis)
    compared = [*g.shape(indices), places if isinstance(places, int) else None]
    check_intermediate(g, compared, "the comparison of every place with every index")
    indices = _not_negative(g, indices, as_tensor(g, places))
    pads = _missing(g, data, indices, axis)
    if pads is not None:
        indices = g.op.Pad(indices, pads, g.constant(-1))  # a place that no number equals
        updates = g.op.Pad(updates, pads)
    data, indices, updates = (g.moveaxis(item, axis, -1) for item in (data, indices, updates))
    here = g.op.Equal(g.unsqueeze(indices, [rank - 1]), g.unsqueeze(iota(g, places), [1]))
    return here, data, updates


def _combine(g: Builder, reduction: str, old: gs.Tensor, new: gs.Tensor) -> gs.Tensor:
    result: gs.Tensor = g.node(COMBINE[reduction], [old, new], {})
    return result


def _reduce_where(g: Builder, reduction: str, here: gs.Tensor, new: gs.Tensor, old: gs.Tensor) -> gs.Tensor:
    """``old`` […, places] combined with those of ``new`` […, 1, indices] for which ``here`` […, places, indices]."""
    rank = len(g.shape(old))
    neutral: gs.Tensor
    if reduction in ("add", "mul"):
        neutral = g.constant(0 if reduction == "add" else 1, g.dtype(old))
    else:
        neutral = g.unsqueeze(old, [rank])
    return _combine(g, reduction, old, g.reduce(REDUCE[reduction], g.op.Where(here, new, neutral), [rank]))


def _missing(g: Builder, data: gs.Tensor, indices: gs.Tensor, axis: int) -> gs.Tensor | None:
    """The pads that give ``indices`` the sizes of ``data`` on all other axes; None where it has them."""
    sizes: list[Size] = []
    for other, (wide, narrow) in enumerate(zip(g.shape(data), g.shape(indices), strict=True)):
        if other == axis or (wide == narrow and wide is not None):
            sizes.append(0)
        elif isinstance(wide, int) and isinstance(narrow, int):
            sizes.append(wide - narrow)
        else:
            sizes.append(g.op.Sub(as_tensor(g, size(g, data, other)), as_tensor(g, size(g, indices, other))))
    if all(item == 0 for item in sizes if isinstance(item, int)) and all(isinstance(item, int) for item in sizes):
        return None
    return shape_tensor(g, [0] * len(sizes) + sizes)


def _widened(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """Small integers as int32: the reductions have no smaller ones."""
    kind = g.dtype(x)
    return g.cast(x, np.int32) if kind.kind == "b" or (kind.kind in "iu" and kind.itemsize < 4) else x


def _int64(g: Builder, indices: gs.Tensor) -> gs.Tensor:
    """Exporters write int32 too, which ScatterND and GatherND do not define."""
    if isinstance(indices, gs.Constant) and g.dtype(indices) != np.int64:
        return g.constant(np.asarray(indices.values).astype(np.int64))
    return g.cast(indices, np.int64)


def _not_negative(g: Builder, indices: gs.Tensor, sizes: gs.Tensor) -> gs.Tensor:
    if isinstance(indices, gs.Constant) and (np.asarray(indices.values) >= 0).all():
        return indices
    result: gs.Tensor = g.op.Where(g.op.Less(indices, g.constant(0)), g.op.Add(indices, sizes), indices)
    return result


def _flat_indices(g: Builder, indices: gs.Tensor, data: gs.Tensor, depth: int) -> gs.Tensor:
    """[count]: the number of the row that each index means."""
    indices = _not_negative(g, indices, shape_tensor(g, _sizes(g, data)[:depth]))
    if depth > 1:
        strides: list[Size] = [1]
        for axis in range(depth - 1, 0, -1):
            strides.insert(0, times(g, strides[0], size(g, data, axis)))
        indices = g.reduce("ReduceSum", g.op.Mul(indices, shape_tensor(g, strides)), [-1])
    flat: gs.Tensor = g.op.Reshape(indices, [-1])
    return flat


def _sizes(g: Builder, x: gs.Tensor) -> list[Size]:
    return [size(g, x, axis) for axis in range(len(g.shape(x)))]


def _distinct(g: Builder, indices: gs.Constant, data: gs.Tensor, axis: int) -> bool:
    values = np.sort(np.asarray(indices.values) % g.static_dim(data, axis), axis)
    return bool((np.diff(values, axis=axis) != 0).all())


def _distinct_rows(g: Builder, indices: gs.Constant, data: gs.Tensor, depth: int) -> bool:
    sizes = g.shape(data)[:depth]
    rows = np.asarray(indices.values).reshape(-1, depth)
    if not all(isinstance(item, int) for item in sizes):
        if (rows < 0).any():
            return False
        return len(np.unique(rows, axis=0)) == len(rows)
    return len(np.unique(rows % np.array(sizes), axis=0)) == len(rows)


# --- examples ----------------------------------------------------------------------------------------------------


def _elements(
    reduction: str,
    shapes: tuple[list[int | str], list[int | str]],
    axis: int,
    dtype: str = "float32",
    opset: int = 18,
) -> gs.Graph:
    data, indices = shapes
    return example(
        {"x": (dtype, data), "i": ("int64", indices), "u": (dtype, indices)},
        lambda g, x, i, u: g.op.ScatterElements(x, i, u, axis=axis, reduction=reduction),
        opset,
    )


@scatter_elements_with_reduction.example
def scatter_add_over_the_first_axis() -> gs.Graph:
    return _elements("add", ([6, 4], [3, 4]), 0, opset=16)


@scatter_elements_with_reduction.example
def scatter_amax_over_the_last_axis_of_a_dynamic_batch() -> gs.Graph:
    return _elements("max", (["n", 2, 5], ["n", 2, 7]), -1)


@scatter_elements_with_reduction.example
def scatter_amin_of_int64() -> gs.Graph:
    return _elements("min", ([2, 5, 3], [2, 4, 3]), 1, "int64")


@scatter_elements_with_reduction.example
def scatter_prod_with_fewer_indices_than_places() -> gs.Graph:
    return _elements("mul", ([4, 5, 3], [2, 4, 2]), 1)


@scatter_elements_with_reduction.example
def scatter_add_of_int32_over_a_dynamic_axis() -> gs.Graph:
    return _elements("add", ([2, "t"], [2, 6]), 1, "int32")


@scatter_elements_with_reduction.example
def scatter_add_with_negative_indices() -> gs.Graph:
    return example(
        {"x": ("float32", [3, 6]), "i": ("int64", [3, 4]), "u": ("float32", [3, 4])},
        lambda g, x, i, u: g.op.ScatterElements(x, g.op.Sub(i, g.constant(3)), u, axis=1, reduction="add"),
    )


@scatter_elements_with_reduction.example
def scatter_add_at_distinct_constants() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 6]), "u": ("float32", [1, 3])},
        lambda g, x, u: g.op.ScatterElements(x, g.constant([[4, 0, -1]]), u, axis=1, reduction="add"),
    )


def _any_in_first_row(feeds: Mapping[str, Array]) -> list[Array]:
    whole = feeds["x"].copy()
    whole[:1, [4, 0, 5]] |= feeds["u"]
    return [whole]


@scatter_elements_with_reduction.example_against(_any_in_first_row)
def scatter_any_at_distinct_constants() -> gs.Graph:
    """For which ONNX Runtime has no kernel."""
    return example(
        {"x": ("bool", ["n", 6]), "u": ("bool", [1, 3])},
        lambda g, x, u: g.op.ScatterElements(x, g.constant([[4, 0, -1]]), u, axis=1, reduction="max"),
        opset=18,
    )


@scatter_elements_of_more_indices_than_places.example
def marks_where_more_numbers_point_than_there_are() -> gs.Graph:
    return _elements("none", ([6, 4], [14, 4]), 0, opset=16)


@scatter_elements_of_more_indices_than_places.example
def more_indices_of_fewer_rows_and_a_dynamic_batch() -> gs.Graph:
    return _elements("none", (["n", 5, 3], ["n", 9, 2]), 1, "int64")


def _nd(
    reduction: str, data: list[int | str], indices: list[int | str], dtype: str = "float32", opset: int = 18
) -> gs.Graph:
    depth = indices[-1]
    assert isinstance(depth, int)
    return example(
        {"x": (dtype, data), "i": ("int64", indices), "u": (dtype, [*indices[:-1], *data[depth:]])},
        lambda g, x, i, u: g.op.ScatterND(x, i, u, reduction=reduction),
        opset,
    )


@scatter_nd_with_reduction.example
def index_add_of_rows() -> gs.Graph:
    return _nd("add", [6, 4], [3, 1], opset=16)


@scatter_nd_with_reduction.example
def index_add_of_many_rows() -> gs.Graph:
    return _nd("add", [300, 32], [120, 1])


@scatter_nd_with_reduction.example
def elements_at_any_depth() -> gs.Graph:
    return _nd("max", [3, 4, 5], [2, 7, 3])


@scatter_nd_with_reduction.example
def rows_of_a_dynamic_table() -> gs.Graph:
    return _nd("mul", ["n", 4, 3], [5, 2])


@scatter_nd_with_reduction.example
def a_dynamic_number_of_int64_rows() -> gs.Graph:
    return _nd("add", [5, 3], ["k", 1], "int64")


@scatter_nd_with_reduction.example
def frames_at_constant_places() -> gs.Graph:
    places = np.arange(2, 7, dtype=np.int64)[:, None]
    return example(
        {"x": ("float32", [9, 2]), "u": ("float32", [5, 2])},
        lambda g, x, u: g.op.ScatterND(x, g.constant(places), u, reduction="add"),
    )
