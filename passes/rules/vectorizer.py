"""TfIdfVectorizer: how often each of the given sequences of numbers occurs; TensorRT has no operator for it."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.model import Array
from passes.rules.shapes import check_intermediate

TO_THE_END = np.iinfo(np.int64).max


@rule("TfIdfVectorizer", when=lacks("TfIdfVectorizer"))
def tfidf_as_comparisons(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no TfIdfVectorizer; every window of the input is compared with every sequence of the pool."""
    x, attrs = node.inputs[0], node.attrs
    if attrs.get("pool_strings"):
        g.decline("its pool is of strings")
    rank = len(g.shape(x))
    x = g.unsqueeze(g.cast(x, np.int64), [rank])
    columns = np.asarray(attrs["ngram_indexes"], np.int64)
    counts: list[gs.Tensor] = []
    for length, pool in _pools(node):
        total: gs.Tensor | None = None
        skips = attrs["max_skip_count"] if length > 1 else 0
        if attrs["min_gram_length"] <= length <= attrs["max_gram_length"]:
            for distance in range(1, skips + 2):
                found = _occurrences(g, x, pool, distance)
                if found is not None:
                    total = found if total is None else g.op.Add(total, found)
        if total is None:
            total = g.op.Mul(_none_found(g, x), g.constant(np.zeros([len(pool)], np.float32)))
        counts.append(total)
    joined = counts[0] if len(counts) == 1 else g.op.Concat(*counts, axis=rank - 1)
    places = np.zeros([len(columns), int(columns.max()) + 1], np.float32)
    places[np.arange(len(columns)), columns] = 1
    result = g.op.MatMul(joined, g.constant(places))
    if attrs["mode"] == "TF":
        return result
    given = attrs.get("weights") or np.ones(len(columns))
    weights = g.constant((places * np.asarray(given, np.float32)[:, None]).max(0))
    if attrs["mode"] == "IDF":
        result = g.cast(g.op.Greater(result, g.constant(0, np.float32)), np.float32)
    return g.op.Mul(result, weights)


def _pools(node: gs.Node) -> list[tuple[int, Array]]:
    """By length: the sequences of the pool, [count, length], in the order of their columns."""
    pool = np.asarray(node.attrs["pool_int64s"], np.int64)
    starts = [*node.attrs["ngram_counts"], len(pool)]
    found = []
    for length, (start, end) in enumerate(itertools.pairwise(starts), 1):
        if end > start:
            found.append((length, pool[start:end].reshape(-1, length)))
    return found


def _occurrences(g: Builder, x: gs.Tensor, pool: Array, distance: int) -> gs.Tensor | None:
    """[…, count]: how often each sequence of the pool is found in ``x`` […, n, 1], with steps of ``distance``."""
    rank, length = len(g.shape(x)) - 1, pool.shape[1]
    span, size = (length - 1) * distance, g.shape(x)[rank - 1]
    if isinstance(size, int) and size <= span:
        return None
    check_intermediate(g, [*g.shape(x)[:-1], len(pool)], "every window beside every sequence")
    here: gs.Tensor | None = None
    for place in range(length):
        end = place * distance - span
        part = _sliced(g, x, place * distance, end if end else TO_THE_END, rank - 1)
        equal = g.op.Equal(part, g.constant(np.ascontiguousarray(pool[:, place])))
        here = equal if here is None else g.op.And(here, equal)
    assert here is not None
    return g.reduce("ReduceSum", g.cast(here, np.float32), [rank - 1])


def _sliced(g: Builder, x: gs.Tensor, start: int, end: int, axis: int) -> gs.Tensor:
    """Before opset 10, in attributes."""
    if g.opset >= 10:
        return g.slice(x, [start], [end], [axis], [1])
    result: gs.Tensor = g.op.Slice(x, starts=[start], ends=[end], axes=[axis])
    return result


def _none_found(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """A zero for every row: […, 1]."""
    rank = len(g.shape(x)) - 1
    rows = g.reduce("ReduceMax", g.cast(x, np.float32), [rank - 1])
    zeros: gs.Tensor = g.op.Mul(rows, g.constant(0, np.float32))
    return zeros


def _vectorizer(shape: list[int | str], mode: str, least: int, most: int, skips: int) -> gs.Graph:
    return example(
        {"x": ("int32", shape)},
        lambda g, x: g.op.TfIdfVectorizer(
            x,
            mode=mode,
            min_gram_length=least,
            max_gram_length=most,
            max_skip_count=skips,
            ngram_counts=[0, 3],
            ngram_indexes=[1, 0, 4, 3, 2],
            pool_int64s=[2, 0, 1, 0, 1, 1, 2],
            weights=[0.5, 1.5, 2.0, 3.0, 0.25],
        ),
    )


@tfidf_as_comparisons.example
def pairs_with_skips_in_a_dynamic_batch() -> gs.Graph:
    return _vectorizer(["n", 8], "TF", 2, 2, 3)


@tfidf_as_comparisons.example
def numbers_and_pairs_with_weights() -> gs.Graph:
    return _vectorizer([9], "TFIDF", 1, 2, 0)
