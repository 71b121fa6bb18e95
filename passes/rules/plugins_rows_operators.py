"""What the operators do to tensors of a number of rows that is known only at run time (see ``plugins_rows``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Declined
from passes.rules.plugins_rows import (
    Count,
    Evaluation,
    Numbers,
    Plain,
    Rows,
    Value,
    as_shape,
    axis_of,
    capacity_of,
    handles,
    product,
    rank_of,
)
from passes.rules.shapes import as_tensor, iota, size

ELEMENTWISE = [
    "Abs",
    "Acos",
    "Add",
    "And",
    "Asin",
    "Atan",
    "BitShift",
    "Cast",
    "CastLike",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Div",
    "Elu",
    "Equal",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "Greater",
    "GreaterOrEqual",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Less",
    "LessOrEqual",
    "Log",
    "Max",
    "Mean",
    "Min",
    "Mish",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "PRelu",
    "Pow",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Sub",
    "Sum",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Where",
    "Xor",
]
NEUTRAL = {"ReduceSum": 0, "ReduceL1": 0, "ReduceL2": 0, "ReduceSumSquare": 0, "ReduceProd": 1}
EXITS = (
    *("TopK", "Slice", "Gather", "GatherND", "GatherElements", "ScatterElements", "ScatterND", "Pad", "ArgMax"),
    *("ArgMin", "ReduceMax", "ReduceMin", "ReduceMean", "Shape", "Cast", "Squeeze", "Reshape", *NEUTRAL),
)
"""Operators that can give a tensor of a known size where they are given rows."""


def _same(work: Evaluation, node: gs.Node, inputs: Sequence[gs.Tensor], output: int = 0) -> gs.Tensor:
    """The node's operator on other inputs."""
    made = work.g.node(node.op, inputs, node.attrs, len(node.outputs))
    result: gs.Tensor = made[output] if isinstance(made, list) else made
    return result


def _tensors(values: Sequence[Value]) -> list[gs.Tensor]:
    if any(isinstance(item, Numbers) for item in values):
        raise Declined("rows and shapes meet in one operator")
    return [item.tensor for item in values]  # type: ignore[union-attr]


def _rows(value: Value) -> Rows:
    if not isinstance(value, Rows):
        raise Declined("its first input has a known size, and another one has not")
    return value


def _plain(values: Sequence[Value]) -> list[gs.Tensor]:
    if not all(isinstance(item, Plain) for item in values):
        raise Declined("an input other than the first depends on the number of rows")
    return [item.tensor for item in values]  # type: ignore[union-attr]


def _axes(work: Evaluation, node: gs.Node, given: Sequence[Value]) -> list[int] | None:
    """The axes that an attribute or the second input gives."""
    if "axes" in node.attrs:
        return [int(item) for item in node.attrs["axes"]]
    if len(given) < 2 or (isinstance(given[1], Plain) and given[1].tensor.is_empty()):
        return None
    return [int(item) for item in np.ravel(work.numbers(given[1]))]


# --- elementwise -------------------------------------------------------------------------------------------------


@handles(*ELEMENTWISE)
def elementwise(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    if not any(isinstance(item, Rows) for item in given):
        return _of_numbers(work, node, given)
    ranks = [0 if _left_out(item) else rank_of(work.g, item) for item in given]
    rank = max(ranks)
    rows = [(item, item.axis - own) for item, own in zip(given, ranks, strict=True) if isinstance(item, Rows)]
    first, from_end = rows[0]
    for item, place in rows[1:]:
        if place != from_end or item.count != first.count:
            raise Declined(f"{node.op} of rows of different numbers")
    for item, own in zip(given, ranks, strict=True):
        if isinstance(item, Plain) and own >= -from_end and work.g.shape(item.tensor)[from_end] != 1:
            raise Declined(f"{node.op} of rows and of a tensor that is not broadcast along them")
    return Rows(_same(work, node, _tensors(given)), rank + from_end, first.count)


def _left_out(value: Value) -> bool:
    return isinstance(value, Plain) and value.tensor.is_empty()


def _of_numbers(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    if node.op == "Cast":
        kind = np.dtype(node.outputs[0].dtype)
        if kind.kind != "i":  # no shape any more
            return Plain(work.g.cast(work.number_tensor(given[0]), kind))  # type: ignore[arg-type]
        return given[0]
    if node.op == "Identity":
        return given[0]
    function = _ON_NUMBERS.get(node.op)
    if function is None:
        raise Declined(f"{node.op} of a shape is not followed")
    arrays = [work.numbers(item) for item in given]
    return Numbers(np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object))


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, Count) and isinstance(b, Count):
        if a == b.negative():
            return 0
        raise Declined("it adds two numbers of rows")
    return a.plus(b) if isinstance(a, Count) else b.plus(a) if isinstance(b, Count) else a + b


def _minus(a: Any) -> Any:
    return a.negative() if isinstance(a, Count) else -a


def _times(a: Any, b: Any) -> Any:
    for one, other in ((a, b), (b, a)):
        if isinstance(one, int) and one in (0, 1):
            return other if one else 0
    if isinstance(a, Count) or isinstance(b, Count):
        raise Declined("it multiplies the number of rows")
    return a * b


def _least(a: Any, b: Any) -> Any:
    return a.limited(b) if isinstance(a, Count) else b.limited(a) if isinstance(b, Count) else min(a, b)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Count) == isinstance(b, Count):
        if isinstance(a, Count) and a != b:
            raise Declined("it compares two numbers of rows")
        return bool(a == b)
    count, number = (a, b) if isinstance(a, Count) else (b, a)
    if number >= count.least:
        raise Declined("it compares the number of rows with one that it can be")
    return False


_ON_NUMBERS: dict[str, Any] = {
    "Add": _add,
    "Sub": lambda a, b: _add(a, _minus(b)),
    "Mul": _times,
    "Neg": _minus,
    "Min": _least,
    "Equal": _equal,
    "Not": lambda a: not a,
    "Where": lambda condition, a, b: a if condition else b,
}


# --- shapes ------------------------------------------------------------------------------------------------------


@handles("Shape")
def shape_of(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    value = given[0]
    if isinstance(value, Numbers):
        entries: list[Any] = list(value.values.shape)
    else:
        rows = _rows(value)
        entries = list(work.g.shape(rows.tensor))
        entries[rows.axis] = rows.count
    entries = entries[int(node.attrs.get("start", 0)) : node.attrs.get("end")]
    if not all(isinstance(item, (int, Count)) for item in entries):
        raise Declined("the shape has a dynamic size beside the number of rows")
    return Numbers(_array(entries))


def _array(entries: Sequence[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(entries), dtype=object)
    array[:] = entries
    return array


@handles("ConstantOfShape")
def filled_by_constant(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    entries = list(work.numbers(given[0]))
    value = node.attrs.get("value")
    fill = np.zeros(1, np.float32) if value is None else np.asarray(value.values).reshape(1)
    if not any(isinstance(item, Count) for item in entries):
        if np.prod(entries, dtype=np.int64) > 64 or fill.dtype.kind not in "ib":
            return Plain(
                work.g.op.ConstantOfShape(
                    work.g.constant([int(item) for item in entries]), value=node.attrs.get("value")
                )
            )
        return Numbers(np.full([int(item) for item in entries], int(fill[0]), dtype=object))
    return _expanded(work, Plain(work.g.constant(fill.reshape(()))), entries)


@handles("Expand")
def expand(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    entries = [int(item) if not isinstance(item, Count) else item for item in work.numbers(given[1])]
    return _expanded(work, given[0], entries)


def _expanded(work: Evaluation, value: Value, entries: list[Any]) -> Value:
    """``value`` broadcast to these sizes."""
    if isinstance(value, Numbers):
        value = Plain(work.number_tensor(value))
    rank = max(len(entries), rank_of(work.g, value))
    entries = [1] * (rank - len(entries)) + entries
    counts = [(index, item) for index, item in enumerate(entries) if isinstance(item, Count)]
    if isinstance(value, Rows):
        axis = value.axis + rank - rank_of(work.g, value)
        if any(index != axis or item.plain() != value.count for index, item in counts) or (
            not counts and entries[axis] != 1
        ):
            raise Declined("rows are expanded to another number of them")
        entries[axis] = 1
        return Rows(work.g.op.Expand(value.tensor, np.array(entries, np.int64)), axis, value.count)
    if len(counts) != 1 or counts[0][1].sign < 0:
        raise Declined("it makes a tensor with several axes of the number of rows")
    axis, count = counts[0]
    from_end = axis - rank
    own = work.g.shape(value.tensor)
    if len(own) >= -from_end and own[from_end] != 1:
        raise Declined("a tensor of a known size is expanded to the number of rows")
    shape = as_shape(work, entries, capacity_of(work, count))
    return Rows(work.g.op.Expand(value.tensor, shape), axis, count.plain())


@handles("Tile")
def tile(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = _rows(given[0])
    repeats = [int(item) for item in work.numbers(given[1])]
    if repeats[rows.axis] != 1:
        raise Declined("rows are repeated")
    return Rows(_same(work, node, [rows.tensor, work.g.constant(repeats)]), rows.axis, rows.count)


@handles("Range")
def numbered(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    start, end, step = (np.ravel(work.numbers(item))[0] for item in given)
    if start != 0 or step != 1 or not isinstance(end, Count):
        raise Declined("a Range that does not count the rows")
    numbers = iota(work.g, _as_size(work, capacity_of(work, end)))
    return Rows(work.g.cast(numbers, node.outputs[0].dtype or np.int64), 0, end.plain())


def _as_size(work: Evaluation, capacity: gs.Tensor | int) -> Any:
    return capacity if isinstance(capacity, int) else as_tensor(work.g, capacity)


@handles("Reshape")
def reshape(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    entries = list(np.ravel(work.numbers(given[1])))
    if isinstance(given[0], Numbers):
        if any(isinstance(item, Count) for item in entries):
            raise Declined("a shape is reshaped to the number of rows")
        return Numbers(given[0].values.reshape([int(item) for item in entries]))
    rows = _rows(given[0])
    own: list[Any] = list(work.g.shape(rows.tensor))
    if not node.attrs.get("allowzero", 0):
        kept = [rows.count if index == rows.axis else item for index, item in enumerate(own)]
        entries = [kept[index] if isinstance(item, int) and item == 0 else item for index, item in enumerate(entries)]
    before, after = product(own[: rows.axis]), product(own[rows.axis + 1 :])
    axis = next((index for index, item in enumerate(entries) if isinstance(item, Count)), None)
    if axis is None:
        axis = entries.index(-1) if -1 in entries else None
    if axis is None:
        raise Declined("rows are given a known size by Reshape")
    start, rest = list(entries[:axis]), list(entries[axis + 1 :])
    if -1 in start:
        start[start.index(-1)] = before // -product(start)
    if -1 in rest:
        rest[rest.index(-1)] = after // -product(rest)
    stays = not isinstance(entries[axis], Count) or entries[axis].plain() == rows.count
    if not stays or product(start) != before or product(rest) != after:
        raise Declined("Reshape makes one axis of the rows and of another axis")
    shape = work.g.constant([int(item) for item in [*start, -1, *rest]])
    return Rows(work.g.op.Reshape(rows.tensor, shape), axis, rows.count)


@handles("Flatten")
def flatten(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = _rows(given[0])
    if rows.axis != 0 or axis_of(node, rank_of(work.g, rows) + 1, 1) != 1:
        raise Declined("Flatten makes one axis of the rows and of another axis")
    return Rows(_same(work, node, [rows.tensor]), 0, rows.count)


@handles("Unsqueeze")
def unsqueeze(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    axes = _axes(work, node, given) or []
    if isinstance(given[0], Numbers):
        return Numbers(np.expand_dims(given[0].values, tuple(axes)))
    rows = _rows(given[0])
    rank = rank_of(work.g, rows) + len(axes)
    new = sorted(axis % rank for axis in axes)
    axis = [index for index in range(rank) if index not in new][rows.axis]
    return Rows(work.g.unsqueeze(rows.tensor, new), axis, rows.count)


@handles("Squeeze")
def squeeze(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    axes = _axes(work, node, given)
    if isinstance(given[0], Numbers):
        return Numbers(np.squeeze(given[0].values, None if axes is None else tuple(axes)))
    rows = _rows(given[0])
    rank = rank_of(work.g, rows)
    if axes is None:
        raise Declined("Squeeze without axes may take away the rows' axis")
    gone = sorted(axis % rank for axis in axes)
    if rows.axis in gone:
        raise Declined("Squeeze takes away the rows' axis")
    return Rows(work.g.squeeze(rows.tensor, gone), rows.axis - sum(axis < rows.axis for axis in gone), rows.count)


@handles("Transpose")
def transpose(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = _rows(given[0])
    order = node.attrs.get("perm") or list(range(rank_of(work.g, rows)))[::-1]
    return Rows(_same(work, node, [rows.tensor]), list(order).index(rows.axis), rows.count)


# --- parts of rows -----------------------------------------------------------------------------------------------


@handles("Slice")
def slice_rows(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    if isinstance(given[0], Numbers):
        first = [int(np.ravel(work.numbers(item))[0]) for item in given[1:] if not _left_out(item)]
        return Numbers(given[0].values[first[0] : first[1] : first[3] if len(first) > 3 else 1])
    rows = _rows(given[0])
    rank = rank_of(work.g, rows)
    parts = [None if _left_out(item) else list(np.ravel(work.numbers(item))) for item in given[1:]]
    starts, ends = parts[0] or [], parts[1] or []
    axes = [int(item) % rank for item in (parts[2] if len(parts) > 2 and parts[2] else range(len(starts)))]
    steps = parts[3] if len(parts) > 3 and parts[3] else [1] * len(starts)
    if rows.axis not in axes:
        return Rows(_same(work, node, _tensors(given)), rows.axis, rows.count)
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
        result = _same(work, node, [data.tensor, _from_front(work, data, index.tensor)])
        return Rows(result, axis + index.axis, index.count) if isinstance(index, Rows) else Plain(result)
    result = _same(work, node, _tensors([data, index]))
    if isinstance(index, Rows):
        if isinstance(data, Rows):
            raise Declined("rows are gathered by rows along another axis")
        return Rows(result, axis + index.axis, index.count)
    rows = _rows(data)
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
    tensors = _tensors(given)
    if node.attrs.get("batch_dims", 0):
        raise Declined("GatherND with batch axes")
    depth, rank = work.g.static_dim(tensors[1], -1), rank_of(work.g, index)
    if isinstance(data, Plain):
        if not isinstance(index, Rows) or index.axis == rank - 1:
            raise Declined("the rows are coordinates")
        return Rows(_same(work, node, tensors), index.axis, index.count)
    if isinstance(index, Rows):
        raise Declined("rows are gathered by rows")
    rows = _rows(data)
    if rows.axis >= depth:
        return Rows(_same(work, node, tensors), rows.axis - depth + rank - 1, rows.count)
    lengths = [work.count(rows.count) if at == rows.axis else work.g.constant([0]) for at in range(depth)]
    wrapped = work.g.op.Add(tensors[1], work.g.op.Concat(*lengths, axis=0))
    own = work.g.op.Equal(work.g.constant([int(at == rows.axis) for at in range(depth)]), np.int64(1))
    below = work.g.op.And(work.g.op.Less(tensors[1], np.int64(0)), own)
    return Plain(_same(work, node, [tensors[0], work.g.op.Where(below, wrapped, tensors[1])]))


@handles("GatherElements")
def gather_elements(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    data, index = given
    tensors = _tensors(given)
    axis = axis_of(node, rank_of(work.g, data), 0)
    if isinstance(data, Rows) and isinstance(index, Plain) and axis == data.axis:
        return Plain(_same(work, node, [data.tensor, _from_front(work, data, index.tensor)]))
    if isinstance(data, Plain) and isinstance(index, Rows) and axis == index.axis:
        return Rows(_same(work, node, tensors), index.axis, index.count)
    if (
        isinstance(data, Rows)
        and isinstance(index, Rows)
        and axis != data.axis == index.axis
        and data.count == index.count
    ):
        return Rows(_same(work, node, tensors), data.axis, data.count)
    raise Declined("GatherElements along another axis than the rows'")


@handles("Split")
def split(work: Evaluation, node: gs.Node, given: list[Value]) -> list[Value]:
    rows = _rows(given[0])
    if axis_of(node, rank_of(work.g, rows), 0) == rows.axis:
        raise Declined("rows are split")
    made = work.g.node(node.op, _tensors(given), node.attrs, len(node.outputs))
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
        return Rows(_same(work, node, _tensors(given)), first.axis, first.count)
    if len(rows) > 1:
        raise Declined("Concat of two selections of rows")
    at = given.index(first)
    tensors = _tensors(given)
    more = product([work.g.shape(item)[axis] for item in tensors[:at] + tensors[at + 1 :]][:0])
    sizes = [work.g.shape(item)[axis] for item in tensors[:at] + tensors[at + 1 :]]
    more = product([sum(sizes) if all(isinstance(item, int) for item in sizes) else "?"])  # type: ignore[arg-type]
    joined = work.g.op.Concat(*tensors[: at + 1], axis=axis) if at else first.tensor
    front = sum(size_ for size_ in sizes[:at] if isinstance(size_, int))
    count = first.count.plus(front)
    if at + 1 < len(tensors):
        joined = _appended(work, Rows(joined, axis, count), tensors[at + 1 :])
    return Rows(joined, axis, first.count.plus(more))


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
    rows = _rows(given[0])
    rank = rank_of(work.g, rows)
    if node.attrs.get("mode", "constant") != "constant" or (len(given) > 3 and not _left_out(given[3])):
        raise Declined("rows are padded by what is no constant, or along given axes")
    pads = [item for item in np.ravel(work.numbers(given[1]))]
    fill = _plain(given[2:3])
    begin, end = pads[rows.axis], pads[rank + rows.axis]
    pads[rows.axis] = pads[rank + rows.axis] = 0
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
    rank = len(g.shape(rows.tensor))
    pads = [0] * (2 * rank)
    pads[rank + rows.axis] = more
    other = fill[0] if fill and not fill[0].is_empty() else g.constant(np.zeros((), g.dtype(rows.tensor)))
    whole = g.op.Pad(g.op.Where(work.filled(rows), rows.tensor, other), g.constant(pads), other)
    return whole  # type: ignore[no-any-return]


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
    rows = _rows(given[0])
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
    rows = _rows(given[0])
    rank = rank_of(work.g, rows)
    axis = axis_of(node, rank, 0)
    if axis == rows.axis:
        if node.attrs.get("select_last_index", 0):
            raise Declined("the last of equal rows is looked for")
        return Plain(_same(work, node, [work.only_filled(rows, _lowest(work, rows.tensor, node.op == "ArgMax"))]))
    gone = int(not node.attrs.get("keepdims", 1) and axis < rows.axis)
    return Rows(_same(work, node, [rows.tensor]), rows.axis - gone, rows.count)


@handles("ReduceMax", "ReduceMin", "ReduceMean", *NEUTRAL)
def reduce_rows(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = _rows(given[0])
    rank = rank_of(work.g, rows)
    named = _axes(work, node, given)
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
    rows = _rows(given[0])
    if axis_of(node, rank_of(work.g, rows), -1) == rows.axis:
        raise Declined(f"{node.op} along the rows")
    return Rows(_same(work, node, [rows.tensor]), rows.axis, rows.count)


@handles("MatMul")
def matmul(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    rows = _rows(given[0])
    (other,) = _plain(given[1:])
    if rank_of(work.g, rows) < 2 or rows.axis == rank_of(work.g, rows) - 1 or len(work.g.shape(other)) != 2:
        raise Declined("a product that sums over the rows")
    return Rows(_same(work, node, [rows.tensor, other]), rows.axis, rows.count)


# --- scattering --------------------------------------------------------------------------------------------------


@handles("ScatterElements", "ScatterND")
def scatter(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    """Places that are not filled write what the last filled one does."""
    data, index, updates = given
    if not isinstance(data, Plain) or not isinstance(index, Rows) or not isinstance(updates, Rows):
        raise Declined("rows are written to, or written by other than rows")
    if node.attrs.get("reduction", "none") != "none":
        raise Declined("rows are combined with what is there")
    if index.count != updates.count or index.axis != updates.axis:
        raise Declined("indices and updates are of different numbers")
    rank = rank_of(work.g, index)
    if node.op == "ScatterND" and index.axis == rank - 1:
        raise Declined("the rows are coordinates")
    if node.op == "ScatterElements" and axis_of(node, rank, 0) != index.axis:
        raise Declined("ScatterElements along another axis than the rows'")
    written = _same(work, node, [data.tensor, work.repeated(index), work.repeated(updates)])
    if index.count.least:
        return Plain(written)
    some = work.g.op.Greater(work.count(index.count), np.array([0]))
    return Plain(work.g.op.Where(some, written, data.tensor))
