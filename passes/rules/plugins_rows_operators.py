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
from passes.rules.shapes import as_tensor, iota

ELEMENTWISE = (
    *("Abs", "Acos", "Add", "And", "Asin", "Atan", "BitShift", "Cast", "CastLike", "Ceil", "Celu"),
    *("Clip", "Cos", "Cosh", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater"),
    *("GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu"),
    *("Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or"),
    *("PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh"),
    *("Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor"),
)


def same_operator(work: Evaluation, node: gs.Node, inputs: Sequence[gs.Tensor], output: int = 0) -> gs.Tensor:
    """The node's operator on other inputs."""
    made = work.g.node(node.op, inputs, node.attrs, len(node.outputs))
    result: gs.Tensor = made[output] if isinstance(made, list) else made
    return result


def tensors_of(values: Sequence[Value]) -> list[gs.Tensor]:
    if any(isinstance(item, Numbers) for item in values):
        raise Declined("rows and shapes meet in one operator")
    return [item.tensor for item in values]  # type: ignore[union-attr]


def rows_of(value: Value) -> Rows:
    if not isinstance(value, Rows):
        raise Declined("its first input has a known size, and another one has not")
    return value


def plain_of(values: Sequence[Value]) -> list[gs.Tensor]:
    if not all(isinstance(item, Plain) for item in values):
        raise Declined("an input other than the first depends on the number of rows")
    return [item.tensor for item in values]  # type: ignore[union-attr]


def axes_of(work: Evaluation, node: gs.Node, given: Sequence[Value]) -> list[int] | None:
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
    ranks = [0 if left_out(item) else rank_of(work.g, item) for item in given]
    rank = max(ranks)
    rows = [(item, item.axis - own) for item, own in zip(given, ranks, strict=True) if isinstance(item, Rows)]
    first, from_end = rows[0]
    for item, place in rows[1:]:
        if place != from_end or item.count != first.count:
            raise Declined(f"{node.op} of rows of different numbers")
    for value, own in zip(given, ranks, strict=True):
        if isinstance(value, Plain) and own >= -from_end and work.g.shape(value.tensor)[from_end] != 1:
            raise Declined(f"{node.op} of rows and of a tensor that is not broadcast along them")
    return Rows(same_operator(work, node, tensors_of(given)), rank + from_end, first.count)


def left_out(value: Value) -> bool:
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
    if isinstance(given[0], Numbers):
        entries: list[Any] = list(given[0].values.shape)
    else:
        rows = rows_of(given[0])
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
    rows = rows_of(given[0])
    repeats = [int(item) for item in work.numbers(given[1])]
    if repeats[rows.axis] != 1:
        raise Declined("rows are repeated")
    return Rows(same_operator(work, node, [rows.tensor, work.g.constant(repeats)]), rows.axis, rows.count)


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
    rows = rows_of(given[0])
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
    rows = rows_of(given[0])
    if rows.axis != 0 or axis_of(node, rank_of(work.g, rows) + 1, 1) != 1:
        raise Declined("Flatten makes one axis of the rows and of another axis")
    return Rows(same_operator(work, node, [rows.tensor]), 0, rows.count)


@handles("Unsqueeze")
def unsqueeze(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    axes = axes_of(work, node, given) or []
    if isinstance(given[0], Numbers):
        return Numbers(np.expand_dims(given[0].values, tuple(axes)))
    rows = rows_of(given[0])
    rank = rank_of(work.g, rows) + len(axes)
    new = sorted(axis % rank for axis in axes)
    axis = [index for index in range(rank) if index not in new][rows.axis]
    return Rows(work.g.unsqueeze(rows.tensor, new), axis, rows.count)


@handles("Squeeze")
def squeeze(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    axes = axes_of(work, node, given)
    if isinstance(given[0], Numbers):
        return Numbers(np.squeeze(given[0].values, None if axes is None else tuple(axes)))
    rows = rows_of(given[0])
    rank = rank_of(work.g, rows)
    if axes is None:
        raise Declined("Squeeze without axes may take away the rows' axis")
    gone = sorted(axis % rank for axis in axes)
    if rows.axis in gone:
        raise Declined("Squeeze takes away the rows' axis")
    return Rows(work.g.squeeze(rows.tensor, gone), rows.axis - sum(axis < rows.axis for axis in gone), rows.count)


@handles("Transpose")
def transpose(work: Evaluation, node: gs.Node, given: list[Value]) -> Value:
    if isinstance(given[0], Numbers):
        return Numbers(given[0].values.transpose(node.attrs.get("perm")))
    rows = rows_of(given[0])
    order = node.attrs.get("perm") or list(range(rank_of(work.g, rows)))[::-1]
    return Rows(same_operator(work, node, [rows.tensor]), list(order).index(rows.axis), rows.count)
