"""Sequences of tensors whose members are known: ``torch.tensor_split``, ``chunk`` and ``unbind``, and lists of tensors.

TensorRT has tensors alone. What reads a sequence reads the members instead, and the sequence is then made for nobody.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.rules.shapes import Size, size

MOST_MEMBERS = 1024
"""Members of the longest sequence that is written out."""


@rule("SequenceAt", when=lacks("SequenceAt"))
def member_of_a_sequence(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no sequences; the member at a known place is a tensor."""
    sequence, position = node.inputs
    maker = _maker(g, sequence)
    if not isinstance(position, gs.Constant):
        return _member_at_run_time(g, maker, position)
    place = int(g.value(position).reshape(-1)[0])
    if maker.op == "SplitToSequence" and place >= 0 and not _is_list(g, maker):
        return _part(g, maker, place)  # however many there are
    members = _members(g, sequence)
    if not -len(members) <= place < len(members):
        g.decline(f"it asks for the member {place} of {len(members)}")
    return g.op.Identity(members[place])


@rule("SequenceLength", when=lacks("SequenceLength"))
def length_of_a_sequence(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no sequences; how many members one has is a number."""
    maker = _maker(g, node.inputs[0])
    if maker.op == "SplitToSequence" and not _is_list(g, maker):
        count = _count(g, maker)
        return g.op.Identity(g.constant(count)) if isinstance(count, int) else g.squeeze(count, [0])
    return g.op.Identity(g.constant(len(_members(g, node.inputs[0]))))


@rule("ConcatFromSequence", when=lacks("ConcatFromSequence"))
def members_joined(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no sequences; known members are joined by Concat."""
    axis, stacked = int(node.attrs["axis"]), bool(node.attrs.get("new_axis", 0))
    members = _members(g, node.inputs[0])
    if not members:
        g.decline("the sequence is empty")
    rank = len(g.shape(members[0])) + stacked
    if stacked:
        members = [g.unsqueeze(item, [axis % rank]) for item in members]
    return g.op.Concat(*members, axis=axis % rank)


# --- members ---------------------------------------------------------------------------------------------------------


def _maker(g: Builder, sequence: gs.Tensor) -> gs.Node:
    """The node that makes the sequence, behind copies of it."""
    while sequence.inputs and sequence.inputs[0].op == "Identity":
        sequence = sequence.inputs[0].inputs[0]
    if not sequence.inputs:
        g.decline("the sequence is given by the caller, or goes round in a loop")
    maker: gs.Node = sequence.inputs[0]
    return maker


def _members(g: Builder, sequence: gs.Tensor) -> list[gs.Tensor]:
    """Every member; declines where it is not known how many there are."""
    maker = _maker(g, sequence)
    if maker.op == "SequenceEmpty":
        return []
    if maker.op == "SequenceConstruct":
        return list(maker.inputs)
    if maker.op == "SequenceInsert":
        members = _members(g, maker.inputs[0])
        members.insert(_place(g, maker, 2, len(members)), maker.inputs[1])
        return members
    if maker.op == "SequenceErase":
        members = _members(g, maker.inputs[0])
        del members[_place(g, maker, 1, len(members) - 1)]
        return members
    if maker.op == "SplitToSequence":
        count = _count(g, maker)
        if not isinstance(count, int):
            g.decline(f"how many members the sequence has depends on the size of {maker.inputs[0].name!r}")
        if count > MOST_MEMBERS:
            g.decline(f"the sequence has {count} members, more than {MOST_MEMBERS}")
        return [_part(g, maker, index) for index in range(count)]
    return g.decline(f"the sequence is made by {maker.op}")


def _place(g: Builder, maker: gs.Node, index: int, default: int) -> int:
    position = g.input(maker, index)
    return default if position is None else int(g.value(position).reshape(-1)[0])


def _is_list(g: Builder, split: gs.Node) -> bool:
    """Whether the SplitToSequence is told the size of each part."""
    sizes = g.input(split, 1)
    return sizes is not None and len(g.shape(sizes)) == 1


def _axis(g: Builder, split: gs.Node) -> int:
    return int(split.attrs.get("axis", 0)) % len(g.shape(split.inputs[0]))


def _each(g: Builder, split: gs.Node) -> int:
    """The size of each part but the last."""
    sizes = g.input(split, 1)
    return 1 if sizes is None else int(g.value(sizes).reshape(-1)[0])


def _count(g: Builder, split: gs.Node) -> Size:
    sizes = g.input(split, 1)
    if sizes is not None and len(g.shape(sizes)) == 1:
        return g.static_dim(sizes, 0)
    length, each = size(g, split.inputs[0], _axis(g, split)), _each(g, split)
    if isinstance(length, int):
        return -(-length // each)
    rounded: gs.Tensor = g.op.Div(g.op.Add(length, [each - 1]), [each])
    return rounded


def _part(g: Builder, split: gs.Node, index: int) -> gs.Tensor:
    x, axis = split.inputs[0], _axis(g, split)
    if _is_list(g, split):
        sizes = g.input(split, 1)
        assert sizes is not None
        if isinstance(sizes, gs.Constant):
            values = g.value(sizes).tolist()
            return g.slice(x, [sum(values[:index])], [sum(values[: index + 1])], [axis], [1])
        start: gs.Tensor = g.constant([0])
        for before in range(index):
            start = g.op.Add(start, g.slice(sizes, [before], [before + 1], [0], [1]))
        end = g.op.Add(start, g.slice(sizes, [index], [index + 1], [0], [1]))
        made: gs.Tensor = g.op.Slice(x, start, end, [axis])
        return made
    each = _each(g, split)
    part = g.slice(x, [index * each], [(index + 1) * each], [axis], [1])
    keeps = g.input(split, 1) is not None or bool(split.attrs.get("keepdims", 1))
    return part if keeps else g.squeeze(part, [axis])


def _member_at_run_time(g: Builder, maker: gs.Node, position: gs.Tensor) -> gs.Tensor:
    if maker.op == "SplitToSequence" and g.input(maker, 1) is None:
        x, axis = maker.inputs[0], _axis(g, maker)
        place = position if not maker.attrs.get("keepdims", 1) else g.unsqueeze(position, [0])
        taken: gs.Tensor = g.op.Gather(x, place, axis=axis)
        return taken
    members = _members(g, maker.outputs[0])
    shapes = {tuple(g.shape(item)) for item in members}
    if len(shapes) != 1 or None in next(iter(shapes)):
        g.decline("which member is read is known at run time alone, and they differ in shape")
    stacked = g.op.Concat(*(g.unsqueeze(item, [0]) for item in members), axis=0)
    chosen: gs.Tensor = g.op.Gather(stacked, position, axis=0)
    return chosen


# --- examples --------------------------------------------------------------------------------------------------------


@member_of_a_sequence.example
def rows_of_a_dynamic_batch() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        rows = g.op.SplitToSequence(x, axis=1, keepdims=0)
        return [g.op.SequenceAt(rows, g.constant(place)) for place in (0, 2, -1)]

    return example({"x": ("float32", ["n", 4, 3])}, build)


@member_of_a_sequence.example
def chunks_of_a_dynamic_axis() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        parts = g.op.SplitToSequence(x, g.constant(2), axis=0)
        return [g.op.SequenceAt(parts, g.constant(place)) for place in (0, 1)]

    return example({"x": ("float32", ["t", 4])}, build)


@member_of_a_sequence.example
def parts_of_given_sizes() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        fixed = g.op.SplitToSequence(x, g.constant([1, 3, 2]), axis=-1)
        first = g.op.Shape(y, end=1)
        free = g.op.SplitToSequence(x, g.op.Concat(first, g.op.Sub([6], first), axis=0), axis=-1)
        return [g.op.SequenceAt(fixed, g.constant(-2)), g.op.SequenceAt(free, g.constant(1)), g.op.Neg(y)]

    return example({"x": ("float32", ["n", 6]), "y": ("float32", ["k", 2])}, build)


@member_of_a_sequence.example
def of_a_list_that_grows_and_shrinks() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        items = g.op.SequenceInsert(g.op.SequenceConstruct(x, y), g.op.Neg(x), g.constant(1))
        items = g.op.SequenceErase(items, g.constant(0))
        return [g.op.SequenceAt(items, g.constant(place)) for place in (0, 1)]

    return example({"x": ("float32", ["n", 2]), "y": ("float32", [4, 2])}, build)


@member_of_a_sequence.example
def at_a_place_known_at_run_time() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, i: gs.Tensor) -> list[gs.Tensor]:
        rows = g.op.SplitToSequence(x, axis=0, keepdims=0)
        pair = g.op.SequenceConstruct(x, g.op.Neg(x))
        first = g.op.Squeeze(g.op.Mul(i, [0]))
        return [g.op.SequenceAt(rows, first), g.op.SequenceAt(pair, first)]

    return example({"x": ("float32", [4, 3]), "i": ("int64", [1])}, build)


@length_of_a_sequence.example
def how_many_chunks() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        parts = g.op.SplitToSequence(x, g.constant(2), axis=0)
        return [g.op.SequenceLength(parts), g.op.Neg(g.op.SequenceLength(g.op.SequenceConstruct(x, y)))]

    return example({"x": ("float32", ["t", 4]), "y": ("float32", [3])}, build)


@members_joined.example
def stacked_and_joined() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        pair = g.op.SequenceConstruct(x, y)
        swapped = g.op.SequenceConstruct(g.op.SequenceAt(pair, g.constant(1)), x)
        return [
            g.op.ConcatFromSequence(pair, axis=-1, new_axis=1),
            g.op.ConcatFromSequence(swapped, axis=1),
        ]

    return example({"x": ("float32", ["n", 3]), "y": ("float32", ["n", 3])}, build)


@members_joined.example
def chunks_in_another_order() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        halves = g.op.SplitToSequence(x, g.constant(np.array(3)), axis=1)
        made: gs.Tensor = g.op.ConcatFromSequence(halves, axis=0)
        return made

    return example({"x": ("float32", [2, 6])}, build)
