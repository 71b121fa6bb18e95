"""Parts, unions, reductions and scattering of rows whose number is known only at run time (see ``plugins_rows``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Declined
from passes.plugins import FIELDS
from passes.rules.plugins_roi import ROI_ALIGN
from passes.rules.plugins_rows import (
    Count,
    Evaluation,
    Numbers,
    Plain,
    Rows,
    Value,
    axis_of,
    capacity_of,
    handles,
    rank_of,
)
from passes.rules.plugins_rows_operators import axes_of, left_out, plain_of, rows_of, same_operator, tensors_of
from passes.rules.shapes import as_tensor, iota, size

NEUTRAL = {"ReduceSum": 0, "ReduceL1": 0, "ReduceL2": 0, "ReduceSumSquare": 0, "ReduceProd": 1}
EXITS = (
    *("TopK", "Slice", "Gather", "GatherND", "GatherElements", "ScatterElements", "ScatterND", "Pad", "ArgMax"),
    *("ArgMin", "ReduceMax", "ReduceMin", "ReduceMean", "Shape", "Cast", "Squeeze", "Reshape", *NEUTRAL),
)
"""Operators that can give a tensor of a known size where they are given rows."""


# --- parts of rows -----------------------------------------------------------------------------------------------


@handles("Slice")
def slice_rows(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    if isinstance(given[0], Numbers):
        return _part_of_numbers(work, given[0], given[1:])
    if isinstance(given[0], Plain):
        return _first_of_plain(work, given[0].tensor, given[1:])
    rows = rows_of(given[0])
    rank = rank_of(work.g, rows)
    parts = [None if left_out(item) else list(np.ravel(work.numbers(item))) for item in given[1:]]
    starts, ends = parts[0] or [], parts[1] or []
    axes = [int(item) % rank for item in (parts[2] if len(parts) > 2 and parts[2] else range(len(starts)))]
    steps = parts[3] if len(parts) > 3 and parts[3] else [1] * len(starts)
    if rows.axis not in axes:
        return Rows(same_operator(work, node, tensors_of(given)), rows.axis, rows.count)
    index = axes.index(rows.axis)
    start, end, step = starts[index], ends[index], steps[index]
    if step != 1 or isinstance(start, Count) or start < 0:
        raise Declined("a Slice of rows that does not count from the first")
    if start:
        raise Declined("a Slice of rows that leaves out the first ones")
    whole = work.places(rows)
    if isinstance(end, Count):
        limit, count = None, end.plain()
        if count.steps[: len(rows.count.steps)] != rows.count.steps or any(
            op != "min" for op, _ in count.steps[len(rows.count.steps) :]
        ):
            raise Declined("a Slice of rows up to a number that is not followed")
        limit = min((value for op, value in count.steps[len(rows.count.steps) :]), default=None)
        end = (1 << 62) if limit is None else limit
    else:
        count = rows.count
    if end < 0:
        raise Declined("a Slice of rows that leaves out the last ones")
    ends[index] = min(int(end), (1 << 31) - 1)
    cut = work.g.slice(rows.tensor, [int(v) for v in starts], [int(v) for v in ends], axes, [int(v) for v in steps])
    if end <= rows.count.least:
        return Plain(cut)
    if whole is not None and end >= whole:
        return Rows(cut, rows.axis, rows.count)
    return Rows(cut, rows.axis, count if count != rows.count else rows.count.limited(int(end)))


def _part_of_numbers(work: Evaluation, numbers: Numbers, given: Sequence[Value]) -> Value:
    starts, ends, *rest = ([int(item) for item in np.ravel(work.numbers(value))] for value in given)
    axes, steps = [*rest, list(range(len(starts)))][0], rest[1] if len(rest) > 1 else [1] * len(starts)
    cut = [slice(None)] * numbers.values.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut[axis] = slice(start, None if step < 0 and end < -numbers.values.shape[axis] else end, step)
    return Numbers(numbers.values[tuple(cut)])


def _first_of_plain(work: Evaluation, x: gs.Tensor, given: Sequence[Value]) -> Value:
    """As many of the first elements as there are rows."""
    starts, ends, *rest = (list(np.ravel(work.numbers(value))) for value in given)
    if len(ends) != 1 or starts != [0] or (len(rest) > 1 and rest[1] != [1]) or not isinstance(ends[0], Count):
        raise Declined("a Slice up to the number of rows that does not count from the first")
    axis = int(rest[0][0]) % len(work.g.shape(x)) if rest else 0
    length, count = work.g.static_dim(x, axis), ends[0].plain()
    places = capacity_of(work, count)
    if not isinstance(places, int):
        raise Declined("a Slice up to the number of rows of a dynamic number of images")
    cut = work.g.slice(x, [0], [min(places, length)], [axis], [1])
    return Rows(cut, axis, count if places <= length else count.limited(length))


@handles("Gather")
def gather(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    data, index = given
    if isinstance(data, Numbers):
        return Numbers(
            np.asarray(np.take(data.values, np.asarray(work.numbers(index), dtype=np.int64), axis=0), dtype=object)
        )
    if isinstance(index, Numbers):
        index = Plain(work.number_tensor(index))
    rank = rank_of(work.g, data)
    axis = axis_of(node, rank, 0)
    if isinstance(data, Rows) and data.axis == axis:
        result = same_operator(work, node, [data.tensor, _from_front(work, data, index.tensor)])
        return Rows(result, axis + index.axis, index.count) if isinstance(index, Rows) else Plain(result)
    result = same_operator(work, node, tensors_of([data, index]))
    if isinstance(index, Rows):
        if isinstance(data, Rows):
            raise Declined("rows are gathered by rows along another axis")
        return Rows(result, axis + index.axis, index.count)
    rows = rows_of(data)
    return Rows(result, rows.axis if rows.axis < axis else rows.axis - 1 + rank_of(work.g, index), rows.count)


def _from_front(work: Evaluation, rows: Rows, index: gs.Tensor) -> gs.Tensor:
    """Indices of rows, those that count from the last row made to count from the first."""
    g = work.g
    if isinstance(index, gs.Constant) and (g.value(index) >= 0).all():
        return index
    if index.inputs and index.inputs[0].op in ("TopK", "ArgMax", "ArgMin"):
        return index
    index = g.cast(index, np.int64)
    last = work.count(rows.count)
    result: gs.Tensor = g.op.Where(g.op.Less(index, np.int64(0)), g.op.Add(index, last), index)
    return g.op.Reshape(result, np.array([], np.int64)) if not g.shape(index) else result


@handles("GatherND")
def gather_nd(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    data, index = given
    tensors = tensors_of(given)
    if node.attrs.get("batch_dims", 0):
        raise Declined("GatherND with batch axes")
    depth, rank = work.g.static_dim(tensors[1], -1), rank_of(work.g, index)
    if isinstance(index, Rows) and index.axis == rank - 1:
        raise Declined("the rows are coordinates")
    if isinstance(data, Rows) and data.axis >= depth:
        if isinstance(index, Rows):
            raise Declined("rows are gathered by rows along another axis")
        return Rows(same_operator(work, node, tensors), data.axis - depth + rank - 1, data.count)
    if isinstance(data, Rows):
        lengths = [work.count(data.count) if at == data.axis else work.g.constant([0]) for at in range(depth)]
        below = work.g.op.Cast(work.g.op.Less(tensors[1], np.int64(0)), to=7)
        wrapped = work.g.op.Add(tensors[1], work.g.op.Mul(below, work.g.op.Concat(*lengths, axis=0)))
        tensors = [tensors[0], wrapped]
    result = same_operator(work, node, tensors)
    return Rows(result, index.axis, index.count) if isinstance(index, Rows) else Plain(result)


@handles("GatherElements")
def gather_elements(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    data, index = given
    tensors = tensors_of(given)
    axis = axis_of(node, rank_of(work.g, data), 0)
    if isinstance(data, Rows) and isinstance(index, Plain) and axis == data.axis:
        return Plain(same_operator(work, node, [data.tensor, _from_front(work, data, index.tensor)]))
    if isinstance(data, Plain) and isinstance(index, Rows) and axis == index.axis:
        return Rows(same_operator(work, node, tensors), index.axis, index.count)
    if (
        isinstance(data, Rows)
        and isinstance(index, Rows)
        and axis != data.axis == index.axis
        and data.count == index.count
    ):
        return Rows(same_operator(work, node, tensors), data.axis, data.count)
    raise Declined("GatherElements along another axis than the rows'")


@handles("Split")
def split(work: Evaluation, node: gs.Node, given: list[Value]) -> list[Value]:
    rows = rows_of(given[0])
    if axis_of(node, rank_of(work.g, rows), 0) == rows.axis:
        raise Declined("rows are split")
    made = work.g.node(node.op, tensors_of(given), node.attrs, len(node.outputs))
    return [Rows(item, rows.axis, rows.count) for item in (made if isinstance(made, list) else [made])]


@handles("Concat")
def concat(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    if any(isinstance(item, Numbers) for item in given):
        return Numbers(np.concatenate([np.ravel(work.numbers(item)) for item in given]))
    rank = rank_of(work.g, given[0])
    axis = axis_of(node, rank, 0)
    rows = [item for item in given if isinstance(item, Rows)]
    first = rows[0]
    if axis != first.axis:
        if len(rows) != len(given) or any(item.axis != first.axis or item.count != first.count for item in rows):
            raise Declined("Concat beside rows of what has another number of them")
        return Rows(same_operator(work, node, tensors_of(given)), first.axis, first.count)
    if len(rows) > 1:
        raise Declined("Concat of two selections of rows")
    at = given.index(first)
    tensors = tensors_of(given)
    sizes = [work.g.static_dim(item, axis) for item in tensors[:at] + tensors[at + 1 :]]
    joined = work.g.op.Concat(*tensors[: at + 1], axis=axis) if at else first.tensor
    count = first.count.plus(sum(sizes[:at]))
    if at + 1 < len(tensors):
        joined = _appended(work, Rows(joined, axis, count), tensors[at + 1 :])
    return Rows(joined, axis, first.count.plus(sum(sizes)))


def _appended(work: Evaluation, rows: Rows, others: Sequence[gs.Tensor]) -> gs.Tensor:
    """The rows and after the last filled one the others."""
    g = work.g
    whole = g.op.Concat(rows.tensor, *others, axis=rows.axis)
    count, places = work.count(rows.count), as_tensor(g, size(g, rows.tensor, rows.axis))
    number = iota(g, size(g, whole, rows.axis))
    later = g.op.Add(number, g.op.Sub(places, count))
    last = g.op.Sub(as_tensor(g, size(g, whole, rows.axis)), np.array([1]))
    index = g.op.Where(g.op.Less(number, count), number, g.op.Min(later, last))
    result: gs.Tensor = g.op.Gather(whole, index, axis=rows.axis)
    return result


@handles("Pad")
def pad(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = rows_of(given[0])
    rank = rank_of(work.g, rows)
    if node.attrs.get("mode", "constant") != "constant" or (len(given) > 3 and not left_out(given[3])):
        raise Declined("rows are padded by what is no constant, or along given axes")
    pads = list(np.ravel(work.numbers(given[1])))
    fill = plain_of(given[2:3])
    begin, end = pads[rows.axis], pads[rank + rows.axis]
    pads[rows.axis] = pads[rank + rows.axis] = 0
    padded = rows.tensor
    if any(item != 0 for item in pads):
        padded = work.g.op.Pad(rows.tensor, work.g.constant([int(item) for item in pads]), *fill)
    if begin != 0:
        raise Declined("rows are padded at the front")
    if not isinstance(end, Count):
        if end < 0:
            raise Declined("Pad takes rows away")
        return (
            Rows(
                _with_fill(work, Rows(padded, rows.axis, rows.count), int(end), fill),
                rows.axis,
                rows.count.plus(int(end)),
            )
            if end
            else Rows(padded, rows.axis, rows.count)
        )
    if end.negative().plus(end.offset).plain() != rows.count:
        raise Declined("rows are padded to a size that is not followed")
    wanted = end.offset
    whole = _with_fill(work, Rows(padded, rows.axis, rows.count), wanted, fill)
    return Plain(work.g.slice(whole, [0], [wanted], [rows.axis], [1]))


def _with_fill(work: Evaluation, rows: Rows, more: int, fill: list[gs.Tensor]) -> gs.Tensor:
    """The rows, and so many more that are filled with a constant."""
    g = work.g
    other = fill[0] if fill and not fill[0].is_empty() else g.constant(np.zeros((), g.dtype(rows.tensor)))
    filled = g.op.Where(work.filled(rows), rows.tensor, other)
    sizes = [more if axis == rows.axis else item for axis, item in enumerate(g.shape(rows.tensor))]
    whole: gs.Tensor
    if isinstance(other, gs.Constant) and all(isinstance(item, int) for item in sizes):
        value = g.value(other).reshape(-1)[0]
        whole = g.op.Concat(filled, np.full([int(item) for item in sizes], value), axis=rows.axis)  # type: ignore[arg-type]
    else:
        pads = [0] * (2 * len(sizes))
        pads[len(sizes) + rows.axis] = more
        whole = g.op.Pad(filled, g.constant(pads), other)
    return whole


# --- reductions --------------------------------------------------------------------------------------------------


def _lowest(work: Evaluation, tensor: gs.Tensor, largest: bool) -> Any:
    """What no element is above (or, not ``largest``, below)."""
    dtype = work.g.dtype(tensor)
    if dtype.kind == "b":
        return not largest
    limits: Any = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    return limits.min if largest else limits.max


@handles("TopK")
def top_k(work: Evaluation, node: gs.Node, given: list[Value]) -> list[Value]:
    rows = rows_of(given[0])
    axis = axis_of(node, rank_of(work.g, rows), -1)
    wanted = np.ravel(work.numbers(given[1]))[0]
    if axis != rows.axis:
        made = work.g.node("TopK", [rows.tensor, work.g.constant([int(wanted)])], node.attrs, 2)
        return [Rows(item, rows.axis, rows.count) for item in made]
    largest = bool(node.attrs.get("largest", 1))
    count = None
    if isinstance(wanted, Count):
        count = wanted.plain()
        limits = [value for op, value in count.steps if op == "min"]
        if count.steps[: len(rows.count.steps)] != rows.count.steps or not limits:
            raise Declined("TopK of a number that is not followed")
        wanted = min(limits)
    places = work.places(rows)
    masked = work.only_filled(rows, _lowest(work, rows.tensor, largest))
    if places is not None and places < wanted:
        if count is None:
            raise Declined(f"TopK of {wanted} of at most {places} rows")
        wanted = places
    made = work.g.node("TopK", [masked, work.g.constant([int(wanted)])], node.attrs, 2)
    return [Plain(item) if count is None else Rows(item, axis, count) for item in made]


@handles("ArgMax", "ArgMin")
def arg_max(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = rows_of(given[0])
    rank = rank_of(work.g, rows)
    axis = axis_of(node, rank, 0)
    if axis == rows.axis:
        if node.attrs.get("select_last_index", 0):
            raise Declined("the last of equal rows is looked for")
        return Plain(
            same_operator(work, node, [work.only_filled(rows, _lowest(work, rows.tensor, node.op == "ArgMax"))])
        )
    gone = int(not node.attrs.get("keepdims", 1) and axis < rows.axis)
    return Rows(same_operator(work, node, [rows.tensor]), rows.axis - gone, rows.count)


@handles("ReduceMax", "ReduceMin", "ReduceMean", *NEUTRAL)
def reduce_rows(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = rows_of(given[0])
    rank = rank_of(work.g, rows)
    named = axes_of(work, node, given)
    if not named and node.attrs.get("noop_with_empty_axes", 0):
        return rows
    axes = sorted({axis % rank for axis in named}) if named else list(range(rank))
    keep = bool(node.attrs.get("keepdims", 1))
    if rows.axis not in axes:
        gone = 0 if keep else sum(axis < rows.axis for axis in axes)
        return Rows(work.g.reduce(node.op, rows.tensor, axes, keep), rows.axis - gone, rows.count)
    if node.op == "ReduceMean":
        others = [axis for axis in axes if axis != rows.axis]
        mean = work.g.reduce("ReduceMean", rows.tensor, others, True) if others else rows.tensor
        total = work.g.reduce("ReduceSum", work.only_filled(Rows(mean, rows.axis, rows.count), 0), [rows.axis], True)
        result = work.g.op.Div(total, work.g.cast(work.count(rows.count), work.g.dtype(total)))
        return Plain(result if keep else work.g.squeeze(result, axes))
    other = NEUTRAL.get(node.op)
    if other is None:
        other = _lowest(work, rows.tensor, node.op == "ReduceMax")
    return Plain(work.g.reduce(node.op, work.only_filled(rows, other), axes, keep))


@handles("Softmax", "LogSoftmax", "LpNormalization")
def softmax(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = rows_of(given[0])
    if axis_of(node, rank_of(work.g, rows), -1) == rows.axis:
        raise Declined(f"{node.op} along the rows")
    return Rows(same_operator(work, node, [rows.tensor]), rows.axis, rows.count)


@handles("MatMul")
def matmul(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = rows_of(given[0])
    (other,) = plain_of(given[1:])
    if rank_of(work.g, rows) < 2 or rows.axis == rank_of(work.g, rows) - 1 or len(work.g.shape(other)) != 2:
        raise Declined("a product that sums over the rows")
    return Rows(same_operator(work, node, [rows.tensor, other]), rows.axis, rows.count)


@handles(
    *("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Gemm"),
    *("BatchNormalization", "InstanceNormalization"),
)
def of_each_row(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    """Operators that treat each element of the first axis by itself."""
    rows, others = rows_of(given[0]), plain_of(given[1:])
    addend = others[1] if node.op == "Gemm" and len(others) > 1 else None
    if addend is not None and len(work.g.shape(addend)) > 1 and work.g.shape(addend)[0] != 1:
        raise Declined("Gemm adds a matrix of a known size to rows")
    if rows.axis != 0 or node.attrs.get("transA", 0) or len(node.outputs) > 1:
        raise Declined(f"{node.op} takes the rows together")
    return Rows(same_operator(work, node, [rows.tensor, *others]), 0, rows.count)


@handles("RoiAlign", "ROIAlign_TRT")
def regions(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    """Boxes that are rows, each with its image."""
    maps, boxes, images = given
    if not isinstance(maps, Plain) or not isinstance(boxes, Rows) or not isinstance(images, Rows):
        raise Declined("boxes and their images are not of one number")
    if boxes.axis != 0 or images.axis != 0 or boxes.count != images.count:
        raise Declined("boxes and their images are not of one number")
    inputs = [maps.tensor, boxes.tensor, images.tensor]
    if node.op == "RoiAlign":
        return Rows(same_operator(work, node, inputs), 0, boxes.count)
    values = {name: value for name, value in node.attrs.items() if name not in FIELDS}
    return Rows(work.g.plugin(ROI_ALIGN, inputs, values), 0, boxes.count)


# --- scattering --------------------------------------------------------------------------------------------------


UNCHANGING = {"add": 0, "mul": 1}
"""What changes nothing where it is combined; a maximum or minimum may see a row twice."""


@handles("ScatterElements", "ScatterND")
def scatter(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    """Places that are not filled write what the last filled one does, or add nothing to it."""
    data, index, updates = given
    if not isinstance(data, Plain) or not isinstance(index, Rows) or not isinstance(updates, Rows):
        raise Declined("rows are written to, or written by other than rows")
    reduction = node.attrs.get("reduction", "none")
    if index.count != updates.count or index.axis != updates.axis:
        raise Declined("indices and updates are of different numbers")
    rank = rank_of(work.g, index)
    if node.op == "ScatterND" and index.axis == rank - 1:
        raise Declined("the rows are coordinates")
    if node.op == "ScatterElements" and axis_of(node, rank, 0) != index.axis:
        raise Declined("ScatterElements along another axis than the rows'")
    new = work.repeated(updates)
    if reduction in UNCHANGING:
        new = work.only_filled(updates, UNCHANGING[reduction])
    written = same_operator(work, node, [data.tensor, work.repeated(index), new])
    if index.count.least:
        return Plain(written)
    some = work.g.op.Greater(work.count(index.count), np.array([0]))
    return Plain(work.g.op.Where(some, written, data.tensor))
