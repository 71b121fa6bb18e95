"""Support vector machines of ai.onnx.ml, as scikit-learn's SVC, NuSVC, SVR and OneClassSVM are written.

Scores and labels are those that ONNX Runtime gives, which follows libsvm: every two classes have a score of their own.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, rule
from passes.model import Array
from passes.rules.machine_learning import (
    ML,
    class_names,
    label,
    ml_example,
    of_one_score,
    rows,
    transform_of,
    transformed,
)
from passes.rules.shapes import check_intermediate

MOST_DIFFERENCES = 1 << 18
"""Features of all support vectors together up to which each row is subtracted from each vector."""
MOST_CLASSES = 12
"""With probabilities, which are sought in steps, each of them for one class after another."""
MOST_STEPS = 6
"""ONNX Runtime allows 100; of random models, up to 20 classes and all but certain scores too, the slowest needs 4."""
LEAST_PROBABILITY = 1e-7


@rule("SVMRegressor", domain=ML)
def svm_regressor_as_kernels(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no SVMRegressor; it is a product with the kernel of every support vector."""
    attrs = node.attrs
    x = rows(g, node.inputs[0])
    count = int(attrs.get("n_supports", 0))
    if count:
        weights = np.asarray(attrs["coefficients"], np.float32)[:count]
        y = g.op.MatMul(_kernels(node, g, x, count), g.constant(weights[:, None]))
    else:
        y = _products(g, x, attrs["coefficients"], 1)
    y = g.op.Add(y, g.constant(np.asarray(attrs["rho"][:1], np.float32)))
    if not attrs.get("one_class"):
        return y
    inside = g.op.Greater(y, g.constant(0, np.float32))
    return g.op.Where(inside, g.constant(1, np.float32), g.constant(-1, np.float32))


@rule("SVMClassifier", domain=ML)
def svm_classifier_as_kernels(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no SVMClassifier; every two classes have a product of kernels, and its sign is a vote for one."""
    attrs = node.attrs
    names, how = class_names(node), transform_of(node)
    if len(names) < 2:
        g.decline(f"it has {len(names)} classes")
    x = rows(g, node.inputs[0])
    if not sum(attrs.get("vectors_per_class") or []):
        return _linear(node, g, x, names)
    pairs = _scores_of_pairs(node, g, x, len(names))
    place = g.op.ArgMax(_votes(g, pairs, len(names)), axis=1, keepdims=0)
    if attrs.get("prob_a"):
        scores = transformed(g, _probabilities(node, g, pairs, len(names)), how, len(names))
    elif len(names) > 2:
        scores = transformed(g, pairs, how, len(_pairs(len(names))))
    else:
        scores = of_one_score(g, pairs, how, opposite=how == "NONE")
    return [label(node, g, place, names), scores]


def _linear(node: gs.Node, g: Builder, x: gs.Tensor, names: list[Any]) -> list[gs.Tensor | None]:
    """Without support vectors, there are coefficients for each class."""
    weights = np.asarray(node.attrs["coefficients"], np.float32)
    scores = g.op.Add(_products(g, x, weights, len(names)), g.constant(np.asarray(node.attrs["rho"][:1], np.float32)))
    place = g.op.ArgMax(scores, axis=1, keepdims=0)
    if len(names) == 2 and not node.attrs.get("prob_a"):
        largest = g.reduce("ReduceMax", scores, [1])
        if (weights >= 0).all():
            second = g.op.Not(g.op.Less(largest, g.constant(0.5, np.float32)))
        else:
            second = g.op.Greater(largest, g.constant(0, np.float32))
        place = g.op.Where(second, g.constant(1), place)
    return [label(node, g, place, names), transformed(g, scores, transform_of(node), len(names))]


def _products(g: Builder, x: gs.Tensor, weights: Any, count: int) -> gs.Tensor:
    """[rows, count]: those of each row with each of the vectors."""
    turned = np.asarray(weights, np.float32).reshape(count, -1).T
    result: gs.Tensor = g.op.MatMul(x, g.constant(np.ascontiguousarray(turned)))
    return result


def _kernels(node: gs.Node, g: Builder, x: gs.Tensor, count: int) -> gs.Tensor:
    """[rows, count]: the kernel of each row with each support vector."""
    gamma, offset, degree = node.attrs.get("kernel_params") or (0.0, 0.0, 0.0)
    vectors = np.asarray(node.attrs["support_vectors"], np.float32).reshape(count, -1)
    kind = str(node.attrs.get("kernel_type", "LINEAR"))
    result: gs.Tensor
    if kind == "RBF":
        distances = _squared_distances(g, x, vectors)
        result = g.op.Exp(g.op.Mul(distances, g.constant(-gamma, np.float32)))
        return result
    result = _products(g, x, vectors, count)
    if kind == "LINEAR":
        return result
    result = g.op.Add(g.op.Mul(result, g.constant(gamma, np.float32)), g.constant(offset, np.float32))
    if kind == "SIGMOID":
        result = g.op.Tanh(result)
    elif degree in (1, 2, 3, 4):
        base = result
        for _ in range(int(degree) - 1):
            result = g.op.Mul(result, base)
    else:
        result = g.op.Pow(result, g.constant(degree, np.float32))
    return result


def _squared_distances(g: Builder, x: gs.Tensor, vectors: Array) -> gs.Tensor:
    """[rows, vectors]. Of many vectors as a product, about their mean, where the least is lost to cancellation."""
    result: gs.Tensor
    if vectors.size <= MOST_DIFFERENCES:
        check_intermediate(g, [*g.shape(x)[:1], *vectors.shape], "every row beside every support vector")
        apart = g.op.Sub(g.unsqueeze(x, [1]), g.constant(vectors))
        result = g.reduce("ReduceSum", g.op.Mul(apart, apart), [2])
        return result
    mean = vectors.mean(0, dtype=np.float64).astype(np.float32)
    centred = vectors.astype(np.float64) - mean
    moved = g.op.Sub(x, g.constant(mean))
    mine = g.reduce("ReduceSum", g.op.Mul(moved, moved), [1], keepdims=True)
    both = g.op.Mul(_products(g, moved, centred, len(vectors)), g.constant(-2, np.float32))
    squares = g.op.Add(g.op.Add(mine, g.constant((centred**2).sum(1).astype(np.float32))), both)
    result = g.op.Max(squares, g.constant(0, np.float32))
    return result


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))


def _scores_of_pairs(node: gs.Node, g: Builder, x: gs.Tensor, count: int) -> gs.Tensor:
    """[rows, pairs]: what speaks for the first of two classes, and where negative for the second."""
    attrs = node.attrs
    starts = np.cumsum([0, *attrs["vectors_per_class"]])
    total = int(starts[-1])
    given = np.asarray(attrs["coefficients"], np.float32)[: (count - 1) * total].reshape(count - 1, total)
    pairs = _pairs(count)
    weights = np.zeros([total, len(pairs)], np.float32)
    for place, (first, second) in enumerate(pairs):
        for mine, other in ((first, second - 1), (second, first)):
            part = slice(starts[mine], starts[mine + 1])
            weights[part, place] = given[other, part]
    found = g.op.MatMul(_kernels(node, g, x, total), g.constant(weights))
    result: gs.Tensor = g.op.Add(found, g.constant(np.asarray(attrs["rho"], np.float32)[: len(pairs)]))
    return result


def _votes(g: Builder, pairs: gs.Tensor, count: int) -> gs.Tensor:
    """[rows, classes]: for how many classes each is the better one."""
    gains = np.zeros([len(_pairs(count)), count], np.float32)
    for place, (first, second) in enumerate(_pairs(count)):
        gains[place, first], gains[place, second] = 1, -1
    won = g.op.MatMul(g.cast(g.op.Greater(pairs, g.constant(0, np.float32)), np.float32), g.constant(gains))
    return g.op.Add(won, g.constant(np.arange(count, dtype=np.float32)))  # each loses to those before it, if all lose


def _probabilities(node: gs.Node, g: Builder, pairs: gs.Tensor, count: int) -> gs.Tensor:
    """[rows, classes]: those that fit the probabilities of all pairs, by the second method of Wu, Lin and Weng (2004).

    As libsvm and ONNX Runtime seek them, who stop as soon as they are near: a row that is stays as it is.
    """
    if count > MOST_CLASSES:
        g.decline(f"it has probabilities of {count} classes, more than {MOST_CLASSES}")
    of_pair, of_row = _of_each_other(node, g, pairs, count)
    one = g.constant(1, np.float32)
    terms = g.op.Mul(of_pair, of_row)
    squares = g.op.Mul(of_row, of_row)
    apart = g.constant(1 - np.eye(count, dtype=np.float32))
    diagonal = g.unsqueeze(g.reduce("ReduceSum", g.op.Mul(squares, apart), [2]), [2])
    q = g.op.Sub(g.op.Mul(diagonal, g.constant(np.eye(count, dtype=np.float32))), g.op.Mul(terms, apart))
    of_class = [g.squeeze(g.slice(q, [place], [place + 1], [1], [1]), [1]) for place in range(count)]
    corner = [g.slice(row, [place], [place + 1], [1], [1]) for place, row in enumerate(of_class)]
    p: gs.Tensor = g.constant(np.full([1, count], 1 / count, np.float32))
    for _ in range(MOST_STEPS):
        slope = g.squeeze(g.op.MatMul(q, g.unsqueeze(p, [2])), [2])
        value = g.reduce("ReduceSum", g.op.Mul(p, slope), [1], keepdims=True)
        error = g.reduce("ReduceMax", g.op.Abs(g.op.Sub(slope, value)), [1], keepdims=True)
        better = p
        for place in range(count):
            here = g.slice(slope, [place], [place + 1], [1], [1])
            step = g.op.Div(g.op.Sub(value, here), corner[place])
            grown = g.op.Add(one, step)
            unit = g.constant(np.eye(count, dtype=np.float32)[place])
            better = g.op.Div(g.op.Add(better, g.op.Mul(step, unit)), grown)
            gain = g.op.Mul(step, g.op.Add(g.op.Mul(step, corner[place]), g.op.Mul(here, g.constant(2, np.float32))))
            value = g.op.Div(g.op.Div(g.op.Add(value, gain), grown), grown)
            slope = g.op.Div(g.op.Add(slope, g.op.Mul(step, of_class[place])), grown)
        p = g.op.Where(g.op.Less(error, g.constant(0.005 / count, np.float32)), p, better)
    return p


def _of_each_other(node: gs.Node, g: Builder, pairs: gs.Tensor, count: int) -> tuple[gs.Tensor, gs.Tensor]:
    """Twice [rows, classes, classes]: how probable the one is of the two, and the other; on the diagonal anything."""
    size = len(_pairs(count))
    a, b = (np.asarray(node.attrs[name][:size], np.float32) for name in ("prob_a", "prob_b"))
    against = g.op.Sigmoid(g.op.Add(g.op.Mul(pairs, g.constant(a)), g.constant(b)))
    likely = g.op.Sub(g.constant(1, np.float32), against)
    low, high = g.constant(LEAST_PROBABILITY, np.float32), g.constant(1 - np.float32(LEAST_PROBABILITY), np.float32)
    likely = g.op.Min(g.op.Max(likely, low), high)
    both = g.op.Concat(likely, g.op.Sub(g.constant(1, np.float32), likely), axis=1)
    places = np.zeros([count, count], np.int64)
    for place, (first, second) in enumerate(_pairs(count)):
        places[first, second], places[second, first] = place, place + size
    first_of_two, second_of_two = (g.op.Gather(both, g.constant(table), axis=1) for table in (places, places.T))
    return first_of_two, second_of_two


_TWO_CLASSES: dict[str, Any] = {
    "coefficients": [0.5, 1.0, -0.75, -0.75],
    "kernel_params": [0.5, 0.25, 3.0],
    "rho": [0.125],
    "support_vectors": [0.1, 0.2, -0.3, 1.0, 0.5, -1.0, 1.5, 0.25],
    "vectors_per_class": [2, 2],
    "classlabels_ints": [3, 8],
}
_THREE_CLASSES: dict[str, Any] = {
    "coefficients": [0.5, 1.0, -0.75, -0.75, 0.25, -0.5, 1.0, -0.25],
    "kernel_params": [0.5, 0.25, 3.0],
    "rho": [0.125, -0.25, 0.5],
    "support_vectors": [0.1, 0.2, -0.3, 1.0, 0.5, -1.0, 1.5, 0.25],
    "vectors_per_class": [2, 1, 1],
    "classlabels_ints": [3, 8, 2],
}


@svm_regressor_as_kernels.example
def outliers_by_polynomials() -> gs.Graph:
    kernel: dict[str, Any] = {
        name: _TWO_CLASSES[name] for name in ("coefficients", "kernel_params", "rho", "support_vectors")
    }
    return ml_example("SVMRegressor", ["n", 2], ["n", 1], n_supports=4, one_class=1, kernel_type="POLY", **kernel)


@svm_regressor_as_kernels.example
def a_plane() -> gs.Graph:
    plane: dict[str, Any] = {"coefficients": [0.5, -1.0], "kernel_params": [0.0, 0.0, 0.0], "rho": [0.25]}
    return ml_example("SVMRegressor", ["n", 2], ["n", 1], n_supports=0, **plane)


@svm_classifier_as_kernels.example
def two_classes_by_distance() -> gs.Graph:
    return ml_example("SVMClassifier", ["n", 2], ["n", 2], labels=True, kernel_type="RBF", **_TWO_CLASSES)


@svm_classifier_as_kernels.example
def scores_of_every_two_of_three_classes() -> gs.Graph:
    return ml_example("SVMClassifier", ["n", 2], ["n", 3], labels=True, kernel_type="SIGMOID", **_THREE_CLASSES)


@svm_classifier_as_kernels.example
def probabilities_of_three_classes() -> gs.Graph:
    fitted: dict[str, Any] = {"prob_a": [-2.0, -3.0, -1.5], "prob_b": [0.1, -0.2, 0.0]}
    return ml_example("SVMClassifier", ["n", 2], ["n", 3], labels=True, kernel_type="RBF", **_THREE_CLASSES, **fitted)


@svm_classifier_as_kernels.example
def a_plane_for_each_class() -> gs.Graph:
    planes: dict[str, Any] = {
        "coefficients": [0.5, -1.0, 0.25, 2.0, -0.5, 1.0],
        "kernel_params": [0.0, 0.0, 0.0],
        "rho": [0.25],
    }
    return ml_example("SVMClassifier", ["n", 2], ["n", 3], labels=True, classlabels_ints=[3, 8, 2], **planes)
