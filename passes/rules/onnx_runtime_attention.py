"""ONNX Runtime's own operators of attention, as products around a Softmax: Attention, MultiHeadAttention, …

What is cached is as ONNX Runtime has it: keys and values of earlier tokens come in, and go out with the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.rules.onnx_runtime import numbers, several
from passes.rules.quantised_operators import MICROSOFT, dequantised, foreign
from passes.rules.shapes import as_tensor, iota, size


@dataclass
class Scores:
    """What is done to the scores before the Softmax."""

    scale: float
    added: list[gs.Tensor]
    """Each is broadcast to them."""
    seen: gs.Tensor | None = None
    """Which keys each query sees."""
    cap: float = 0.0


def attended(g: Builder, query: gs.Tensor, key: gs.Tensor, value: gs.Tensor, how: Scores) -> gs.Tensor:
    """Of tensors [batch, heads, length, size], or with an axis more before the length."""
    kind = g.dtype(query)
    last = len(g.shape(key)) - 1
    scores = g.op.MatMul(query, g.moveaxis(key, last, last - 1))
    scores = g.op.Mul(scores, g.constant(how.scale, kind))
    if how.cap:
        cap = g.constant(how.cap, kind)
        scores = g.op.Mul(g.op.Tanh(g.op.Div(scores, cap)), cap)
    for item in how.added:
        scores = g.op.Add(scores, item)
    if how.seen is not None:
        scores = g.op.Where(how.seen, scores, g.constant(np.finfo(kind).min, kind))
    result: gs.Tensor = g.op.MatMul(g.op.Softmax(scores, axis=-1), value)
    return result


def _heads(g: Builder, x: gs.Tensor, count: int) -> gs.Tensor:
    """[batch, length, heads * size] as [batch, heads, length, size]."""
    return g.moveaxis(_split(g, x, count), 2, 1)


def _split(g: Builder, x: gs.Tensor, count: int) -> gs.Tensor:
    result: gs.Tensor = g.op.Reshape(x, g.constant([0, 0, count, g.static_dim(x, 2) // count]))
    return result


def _joined(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """What ``_heads`` has split."""
    together = g.static_dim(x, 1) * g.static_dim(x, 3)
    result: gs.Tensor = g.op.Reshape(g.moveaxis(x, 1, 2), g.constant([0, 0, together]))
    return result


def _parts(g: Builder, x: gs.Tensor, sizes: Sequence[int]) -> list[gs.Tensor]:
    """``x`` in pieces of these sizes along its last axis."""
    ends = np.cumsum(sizes).tolist()
    axis = len(g.shape(x)) - 1
    return [g.slice(x, [end - length], [end], [axis], [1]) for end, length in zip(ends, sizes, strict=True)]


def _scale(node: gs.Node, length: int) -> float:
    return float(node.attrs.get("scale", 0) or 1 / math.sqrt(length))


def _padding(node: gs.Node, g: Builder, mask: gs.Tensor, batch: Any, keys: Any, kind: Any) -> gs.Tensor:
    """What is added to the scores: of each batch's keys, of each query's, or up to a number of keys."""
    shape = g.shape(mask)
    if len(shape) == 1:
        if shape[0] is None or shape[0] != batch:
            g.decline("its mask has one axis, and not plainly a number of keys for each item of the batch")
        kept = g.op.Less(g.cast(iota(g, keys), g.dtype(mask)), g.unsqueeze(mask, [1]))
    elif len(shape) in (2, 3):
        kept = g.op.Greater(mask, g.constant(0, g.dtype(mask)))
    else:
        g.decline(f"its mask has {len(shape)} axes")
    hidden = float(node.attrs.get("mask_filter_value", -10000))
    added = g.op.Where(kept, g.constant(0, kind), g.constant(hidden, kind))
    return g.unsqueeze(added, [1] if len(shape) == 3 else [1, 2])


def _up_to_oneself(g: Builder, query: gs.Tensor, key: gs.Tensor) -> gs.Tensor:
    """Each query sees the keys before it, of which the last is its own."""
    queries, keys = size(g, query, 2), size(g, key, 2)
    before = g.op.Sub(as_tensor(g, keys), as_tensor(g, queries))
    places = g.unsqueeze(g.op.Add(iota(g, queries), before), [1])
    seen: gs.Tensor = g.op.LessOrEqual(iota(g, keys), places)
    return seen


def _answer(
    node: gs.Node,
    g: Builder,
    given: tuple[gs.Tensor, gs.Tensor, gs.Tensor],
    mask: gs.Tensor | None,
    bias: gs.Tensor | None,
    batch: int | str | None,
) -> gs.Tensor:
    """Of queries, keys and values [batch, heads, length, size]: [batch, length, heads * size]."""
    query, key, value = given
    added = [] if mask is None else [_padding(node, g, mask, batch, size(g, key, 2), g.dtype(query))]
    added += [] if bias is None else [bias]
    seen = _up_to_oneself(g, query, key) if node.attrs.get("unidirectional", 0) else None
    how = Scores(_scale(node, g.static_dim(query, 3)), added, seen)
    return _joined(g, attended(g, query, key, value, how))


@rule("Attention", domain=MICROSOFT)
def attention_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has this Attention, which projects too; it is products around a Softmax."""
    x, weights, bias, mask, past, more, length = (g.input(node, index) for index in range(7))
    assert x is not None and weights is not None
    if length is not None or node.attrs.get("past_present_share_buffer", 0):
        g.decline("it has a buffer for coming tokens")
    return _projecting(node, g, (x, weights, bias), mask, past, more)


@rule("QAttention", domain=MICROSOFT)
def quantised_attention_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has QAttention; it is products around a Softmax, of what DequantizeLinear gives."""
    x, weights, bias, x_scale, scale, mask, x_zero, zero, past = (g.input(node, index) for index in range(9))
    assert x is not None and weights is not None and x_scale is not None and scale is not None
    floats = dequantised(g, x, x_scale, x_zero, -1), dequantised(g, weights, scale, zero, 1)
    return _projecting(node, g, (*floats, bias), mask, past, None)


def _projecting(
    node: gs.Node,
    g: Builder,
    projection: tuple[gs.Tensor, gs.Tensor, gs.Tensor | None],
    mask: gs.Tensor | None,
    past: gs.Tensor | None,
    more: gs.Tensor | None,
) -> Replacement:
    x, weights, bias = projection
    if node.attrs.get("do_rotary", 0):
        g.decline("it has rotary embeddings")
    heads = int(node.attrs["num_heads"])
    together = g.static_dim(weights, 1)
    sizes = [int(item) for item in node.attrs.get("qkv_hidden_sizes") or [together // 3] * 3]
    projected = g.op.MatMul(x, weights)
    if bias is not None:
        projected = g.op.Add(projected, bias)
    query, key, value = (_heads(g, part, heads) for part in _parts(g, projected, sizes))
    if past is not None:
        earlier = [g.op.Gather(past, g.constant(place), axis=0) for place in (0, 1)]
        key, value = (g.op.Concat(old, new, axis=2) for old, new in zip(earlier, (key, value), strict=True))
    y = _answer(node, g, (query, key, value), mask, more, g.shape(x)[0])
    if len(node.outputs) == 1:
        return y
    present = None
    if g.used(node.outputs[1]):
        present = g.op.Concat(g.unsqueeze(key, [0]), g.unsqueeze(value, [0]), axis=0)
    return [y, present]


@rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has MultiHeadAttention; it is products around a Softmax."""
    x, key, value, bias, mask, more, past_key, past_value, *others = (g.input(node, index) for index in range(10))
    assert x is not None
    if key is None or value is None or len(g.shape(key)) == 5:
        g.decline("its queries, keys and values come in one tensor")
    if any(item is not None for item in others) or any(g.used(output) for output in node.outputs[3:]):
        g.decline("it has a buffer for coming tokens, beams, or an output of its scores")
    heads, width, given = int(node.attrs["num_heads"]), g.static_dim(x, 2), [x, key, value]
    if bias is not None:  # keys and values of another attention, in four axes, have theirs
        parts = _parts(g, bias, [width, width, g.static_dim(bias, 0) - 2 * width])
        given = [
            g.op.Add(item, part) if len(g.shape(item)) == 3 else item for item, part in zip(given, parts, strict=True)
        ]
    query, key, value = (_heads(g, item, heads) if len(g.shape(item)) == 3 else item for item in given)
    if past_key is not None and past_value is not None:
        key, value = g.op.Concat(past_key, key, axis=2), g.op.Concat(past_value, value, axis=2)
    y = _answer(node, g, (query, key, value), mask, more, g.shape(x)[0])
    return [y, key, value, None][: len(node.outputs)]


@rule("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """ONNX Runtime had RotaryEmbedding before ONNX, in another form; it is a turn of pairs of numbers."""
    x, places, cosines, sines = node.inputs
    if node.attrs.get("is_packed_batching", 0) or float(node.attrs.get("scale", 1)) != 1:
        g.decline("its batches are packed, or scaled")
    turned = int(node.attrs.get("rotary_embedding_dim", 0))
    whole = len(g.shape(x)) == 3
    if whole:
        width = g.static_dim(x, 2)
        heads = int(node.attrs.get("num_heads", 0)) if turned else width // (2 * g.static_dim(cosines, 1))
        if not heads:
            g.decline("how many heads it has is not said")
    by_token = _split(g, x, heads) if whole else g.moveaxis(x, 1, 2)
    if len(g.shape(places)) == 1:
        places = g.unsqueeze(g.op.Add(g.cast(iota(g, size(g, by_token, 1)), g.dtype(places)), places), [0])
    y = turned_by(g, by_token, places, (cosines, sines), bool(node.attrs.get("interleaved", 0)))
    return g.op.Reshape(y, g.constant([0, 0, width])) if whole else g.moveaxis(y, 2, 1)


def turned_by(
    g: Builder, x: gs.Tensor, places: gs.Tensor, tables: tuple[gs.Tensor, gs.Tensor], interleaved: bool
) -> gs.Tensor:
    """Pairs of numbers of ``x`` [batch, length, heads, size], turned by their places' rows of cosines and sines."""
    half, whole = g.static_dim(tables[0], 1), g.static_dim(x, 3)
    cosine, sine = (g.unsqueeze(g.op.Gather(table, places, axis=0), [2]) for table in tables)
    first, *rest = _parts(g, x, [2 * half, whole - 2 * half]) if whole > 2 * half else [x]
    if interleaved:
        pairs = g.op.Reshape(first, g.constant([0, 0, 0, half, 2]))
        left, right = (g.op.Gather(pairs, g.constant(place), axis=4) for place in (0, 1))
    else:
        left, right = _parts(g, first, [half, half])
    new = [
        g.op.Sub(g.op.Mul(left, cosine), g.op.Mul(right, sine)),
        g.op.Add(g.op.Mul(left, sine), g.op.Mul(right, cosine)),
    ]
    if interleaved:
        stacked = g.op.Concat(*(g.unsqueeze(item, [4]) for item in new), axis=4)
        new = [g.op.Reshape(stacked, g.constant([0, 0, 0, 2 * half]))]
    result: gs.Tensor = g.op.Concat(*new, *rest, axis=3) if len(new) + len(rest) > 1 else new[0]
    return result


@rule("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has GroupQueryAttention; it is products around a Softmax, and a cache that grows."""
    x, key, value, past_key, past_value, lengths, total, cosines, sines, places, *others = (
        g.input(node, index) for index in range(16)
    )
    assert x is not None and lengths is not None and total is not None
    attrs = node.attrs
    if (
        any(item is not None for item in others)
        or any(g.used(output) for output in node.outputs[3:])
        or any(str(attrs.get(name, "NONE")) != "NONE" for name in ("k_quant_type", "v_quant_type"))
        or int(attrs.get("smooth_softmax", 0)) > 0
        or attrs.get("sliding_window_cache", 0)
        or not attrs.get("causal", 1)
    ):
        g.decline("it has more than rotary embeddings, a cap and a window: a bias, sinks, a quantised cache, …")
    heads, groups = int(attrs["num_heads"]), int(attrs["kv_num_heads"])
    if key is None or value is None:
        one = g.static_dim(x, 2) // (heads + 2 * groups)
        x, key, value = _parts(g, x, [heads * one, groups * one, groups * one])
    query, key, value = (_split(g, item, count) for item, count in ((x, heads), (key, groups), (value, groups)))
    width, tokens = g.static_dim(query, 3), size(g, query, 1)
    before = _tokens_before(g, lengths, total, tokens)
    own = g.op.Add(before, iota(g, tokens))  # [batch, tokens]: the place of each
    if attrs.get("do_rotary", 0):
        assert cosines is not None and sines is not None
        turn = own if places is None else places
        interleaved = bool(attrs.get("rotary_interleaved", 0))
        query, key = (turned_by(g, item, turn, (cosines, sines), interleaved) for item in (query, key))
    if past_key is None or past_value is None:
        key, value, seen_at = g.moveaxis(key, 2, 1), g.moveaxis(value, 2, 1), iota(g, tokens)
    else:
        held = _Cache(g, before, tokens, size(g, past_key, 2), total)
        key, value, seen_at = held.with_new(past_key, key), held.with_new(past_value, value), held.places
    rows = g.op.Reshape(query, g.constant([0, 0, groups, heads // groups, width]))
    rows = g.op.Transpose(rows, perm=[0, 2, 3, 1, 4])
    ends = g.unsqueeze(own, [2])
    seen = g.op.LessOrEqual(seen_at, ends)
    window = int(attrs.get("local_window_size", -1))
    if window >= 0:
        seen = g.op.And(seen, g.op.Greater(seen_at, g.op.Sub(ends, g.constant(window))))
    how = Scores(_scale(node, width), [], g.unsqueeze(seen, [1, 2]), float(attrs.get("softcap", 0)))
    y = attended(g, rows, g.unsqueeze(key, [2]), g.unsqueeze(value, [2]), how)
    y = g.op.Reshape(g.op.Transpose(y, perm=[0, 3, 1, 2, 4]), g.constant([0, 0, heads * width]))
    return [y, key, value, None][: len(node.outputs)]


def _tokens_before(g: Builder, lengths: gs.Tensor, total: gs.Tensor, tokens: Any) -> gs.Tensor:
    """[batch, 1]: how many tokens each has in the cache; none where all of them are new."""
    new = as_tensor(g, tokens)
    wide = g.op.Reshape(g.cast(lengths, np.int64), g.constant([-1, 1]))
    before = g.op.Sub(g.op.Add(wide, g.constant(1)), new)
    first = g.op.Equal(g.op.Reshape(g.cast(total, np.int64), g.constant([1])), new)
    result: gs.Tensor = g.op.Where(first, g.constant([[0]]), before)
    return result


class _Cache:
    """Where keys and values of earlier and new tokens go: each batch's new ones stand behind its earlier ones."""

    def __init__(self, g: Builder, before: gs.Tensor, tokens: Any, room: Any, total: gs.Tensor) -> None:
        self.g = g
        most = g.op.Max(g.op.Reshape(g.cast(total, np.int64), g.constant([1])), as_tensor(g, room))
        self.places = g.op.Range(g.constant(0), g.squeeze(most, [0]), g.constant(1))
        after = g.op.Sub(self.places, before)  # [batch, places]
        new = g.op.And(g.op.GreaterOrEqual(after, g.constant(0)), g.op.Less(after, as_tensor(g, tokens)))
        source = g.op.Where(
            new,
            g.op.Add(after, as_tensor(g, room)),
            g.op.Mod(self.places, g.op.Max(as_tensor(g, room), g.constant([1]))),
        )
        self.source = g.unsqueeze(source, [2])
        self.filled = g.op.Less(after, as_tensor(g, tokens))

    def with_new(self, past: gs.Tensor, new: gs.Tensor) -> gs.Tensor:
        """``past`` [batch, heads, room, size] with ``new`` [batch, tokens, heads, size], zeros behind them."""
        g = self.g
        both = g.op.Concat(g.moveaxis(past, 1, 2), new, axis=1)
        taken = g.op.GatherND(both, self.source, batch_dims=1)
        kept = g.op.Where(g.unsqueeze(self.filled, [2, 3]), taken, g.constant(0, g.dtype(new)))
        return g.moveaxis(kept, 2, 1)


# --- examples ----------------------------------------------------------------------------------------------------


@attention_of_the_standard.example
def attention_with_masks() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, mask: gs.Tensor) -> list[gs.Tensor]:
        given, shape = [x, numbers(8, 24) / 3, numbers(24, seed=1)], ["n", "t", 8]
        kept = g.op.Min(g.op.Max(mask, np.array(0, np.int32)), np.array(1, np.int32))
        lengths = g.op.Add(
            g.op.ReduceSum(g.op.Mul(kept, np.array(0, np.int32)), [1], keepdims=0), np.array(2, np.int32)
        )
        lengths.shape = ["n"]
        wide = [x, numbers(8, 8 + 8 + 4) / 3, numbers(20, seed=1)]
        return [
            foreign(g, "Attention", given, np.float32, shape, num_heads=2),
            foreign(g, "Attention", [*given, kept], np.float32, shape, num_heads=2, mask_filter_value=-100.0),
            foreign(g, "Attention", [*given, lengths], np.float32, shape, num_heads=2),
            foreign(g, "Attention", given, np.float32, shape, num_heads=4, unidirectional=1, scale=0.3),
            foreign(g, "Attention", wide, np.float32, ["n", "t", 4], num_heads=2, qkv_hidden_sizes=[8, 8, 4]),
        ]

    return example({"x": ("float32", ["n", "t", 8]), "mask": ("int32", ["n", "t"])}, build, 17)


@attention_of_the_standard.example
def attention_with_a_cache_and_a_bias() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, past: gs.Tensor) -> list[gs.Tensor]:
        given: list[Any] = [x, numbers(8, 24) / 3, numbers(24, seed=1), None, past]
        shapes: list[list[Any] | None] = [[2, 3, 8], [2, 2, 2, "all", 4]]
        causal = several(g, "Attention", given, shapes, num_heads=2, unidirectional=1)
        added = numbers(1, 2, 3, 3)
        return [*causal, foreign(g, "Attention", [*given[:4], None, added], np.float32, [2, 3, 8], num_heads=2)]

    return example({"x": ("float32", [2, 3, 8]), "past": ("float32", [2, 2, 2, "p", 4])}, build, 17)


@quantised_attention_of_the_standard.example
def attention_of_eight_bits() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        weights = np.random.default_rng(0).integers(-99, 99, (8, 24)).astype(np.int8)
        scales = np.array(0.02, np.float32), np.array(0.01, np.float32)
        zeros = np.array(120, np.uint8), np.array(0, np.int8)
        given = [x, weights, numbers(24), *scales, None, *zeros]
        return foreign(g, "QAttention", given, np.float32, ["n", "t", 8], num_heads=2)

    return example({"x": ("uint8", ["n", "t", 8])}, build, 17)


@multi_head_attention_of_the_standard.example
def heads_of_one_and_of_two_sequences() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        shape, bias, mask = ["n", 5, 8], numbers(24), np.array([[1, 1, 1, 0, 0, 0, 0]] * 2, np.int32)
        some = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
        apart = [g.op.Transpose(g.op.Reshape(y, [0, 0, 2, 4]), perm=[0, 2, 1, 3]) for _ in range(2)]
        op = "MultiHeadAttention"
        return [
            foreign(g, op, [x, x, x], np.float32, shape, num_heads=2),
            foreign(g, op, [x, x, x, bias], np.float32, shape, num_heads=2, unidirectional=1),
            foreign(g, op, [x, y, y, bias], np.float32, shape, num_heads=4, scale=0.2),
            foreign(
                g,
                op,
                [numbers(2, 5, 8), numbers(2, 7, 8), numbers(2, 7, 8), None, mask],
                np.float32,
                [2, 5, 8],
                num_heads=2,
            ),
            foreign(g, op, [numbers(2, 5, 8), *[numbers(2, 5, 8)] * 2, bias, some], np.float32, [2, 5, 8], num_heads=2),
            foreign(g, op, [x, *apart, numbers(24)], np.float32, shape, num_heads=2),
            foreign(g, op, [x, x, x, None, None, numbers(1, 2, 5, 5)], np.float32, shape, num_heads=2),
        ]

    return example({"x": ("float32", ["n", 5, 8]), "y": ("float32", ["n", "s", 8])}, build, 17)


@multi_head_attention_of_the_standard.example
def heads_with_a_cache() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, past: gs.Tensor) -> list[gs.Tensor]:
        more: list[Any] = ["n", 2, "all", 4]
        given = [x, x, x, None, None, None, past, past]
        return several(g, "MultiHeadAttention", given, [["n", 3, 8], more, more], num_heads=2, unidirectional=1)

    return example({"x": ("float32", ["n", 3, 8]), "past": ("float32", ["n", 2, "p", 4])}, build, 17)


def _tables(half: int) -> list[Any]:
    angles = np.arange(32)[:, None] / 10 ** np.arange(half)
    return [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]


@rotary_embedding_of_the_standard.example
def turns_of_both_layouts() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, heads: gs.Tensor) -> list[gs.Tensor]:
        op, offset, places = "RotaryEmbedding", np.array([3]), np.array([[3, 1, 2, 0, 9]] * 2)
        part = {"num_heads": 2, "rotary_embedding_dim": 4}
        return [
            foreign(g, op, [x, offset, *_tables(4)], np.float32, [2, 5, 16]),
            foreign(g, op, [x, places, *_tables(4)], np.float32, [2, 5, 16], interleaved=1),
            foreign(g, op, [x, places, *_tables(2)], np.float32, [2, 5, 16], **part),
            foreign(g, op, [heads, places, *_tables(4)], np.float32, [2, 3, 5, 8]),
        ]

    return example({"x": ("float32", [2, 5, 16]), "heads": ("float32", [2, 3, 5, 8])}, build, 17)


def _groups(tokens: int, lengths: list[int], total: int, room: int | None, **attrs: Any) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, key: gs.Tensor, value: gs.Tensor, *past: gs.Tensor) -> list[gs.Tensor]:
        ends = [np.array(lengths, np.int32), np.array(total, np.int32)]
        inputs = [x, key, value, *(past or (None, None)), *ends, *(_tables(8) if attrs.get("do_rotary") else ())]
        shapes: list[list[Any] | None] = [[2, tokens, 64], *[[2, 2, max(total, room or 0), 16]] * 2]
        return several(g, "GroupQueryAttention", inputs, shapes, num_heads=4, kv_num_heads=2, **attrs)

    given = {"x": ("float32", [2, tokens, 64])} | {name: ("float32", [2, tokens, 32]) for name in ("key", "value")}
    if room is not None:
        given |= {name: ("float32", [2, 2, room, 16]) for name in ("past_key", "past_value")}
    return example(given, build, 17)


@group_query_attention_of_the_standard.example
def a_prompt() -> gs.Graph:
    return _groups(5, [4, 4], 5, None, do_rotary=1)


@group_query_attention_of_the_standard.example
def a_token_after_others() -> gs.Graph:
    return _groups(1, [6, 6], 7, 6, do_rotary=1, rotary_interleaved=1)


@group_query_attention_of_the_standard.example
def a_token_after_more_and_less() -> gs.Graph:
    return _groups(1, [6, 3], 7, 6, softcap=2.0)


@group_query_attention_of_the_standard.example
def a_token_with_a_window() -> gs.Graph:
    return _groups(1, [6, 3], 7, 6, local_window_size=3, scale=0.2)
