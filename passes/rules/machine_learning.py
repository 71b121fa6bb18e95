"""Operators of ai.onnx.ml on numbers: linear models, scalers, encoders. scikit-learn and LightGBM export to them.

``trees`` has those of trees, ``support_vectors`` those of support vectors. Where ONNX says little of scores and labels,
they are what ONNX Runtime computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.ir import Node
from passes.model import Array
from passes.rules.shapes import check_intermediate

ML = "ai.onnx.ml"


@rule("ArrayFeatureExtractor", domain=ML)
def feature_extractor_as_gather(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no ArrayFeatureExtractor; it is a Gather of the last axis."""
    x, places = node.inputs
    rank = len(g.shape(x))
    taken = g.op.Gather(x, g.op.Reshape(places, [-1]), axis=rank - 1)
    return g.unsqueeze(taken, [0]) if rank == 1 else taken


@rule("Binarizer", domain=ML)
def binarizer_as_comparison(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no Binarizer; it is a comparison."""
    x = node.inputs[0]
    limit = g.constant(np.asarray(float(node.attrs.get("threshold", 0.0)), g.dtype(x)))
    return g.cast(g.op.Greater(x, limit), g.dtype(x))


@rule("Scaler", domain=ML)
def scaler_as_arithmetic(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no Scaler; it is a difference and a product."""
    x = g.cast(node.inputs[0], np.float32)
    offset, scale = (np.asarray(node.attrs[name], np.float32) for name in ("offset", "scale"))
    return g.op.Mul(g.op.Sub(x, g.constant(offset)), g.constant(scale))


@rule("Normalizer", domain=ML)
def normalizer_as_quotient(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no Normalizer; it divides each row by its largest, its sum or its length."""
    x = g.cast(node.inputs[0], np.float32)
    axis = [len(g.shape(x)) - 1]
    norm = node.attrs.get("norm", "MAX")
    size = {"MAX": "ReduceMax", "L1": "ReduceL1", "L2": "ReduceL2"}[norm]
    length = g.reduce(size, x, axis, keepdims=True)
    zero, one = g.constant(0, np.float32), g.constant(1, np.float32)
    return g.op.Div(x, g.op.Where(g.op.Equal(length, zero), one, length))


@rule("Imputer", domain=ML)
def imputer_as_choice(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no Imputer; it is a Where."""
    x = node.inputs[0]
    floats = g.dtype(x).kind == "f"
    kind = "floats" if floats else "int64s"
    values = np.asarray(node.attrs[f"imputed_value_{kind}"], g.dtype(x))
    replaced = node.attrs.get(f"replaced_value_{kind[:-1]}", 0)
    if floats and np.isnan(replaced):
        return g.op.Where(g.op.IsNaN(x), g.constant(values), x)
    return g.op.Where(g.op.Equal(x, g.constant(np.asarray(replaced, g.dtype(x)))), g.constant(values), x)


@rule("LabelEncoder", domain=ML)
def label_encoder_as_comparisons(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no LabelEncoder; of numbers, each key is compared, and the value of the one that fits is taken."""
    x = node.inputs[0]
    keys, values, default = _mapping(node, g)
    if not len(keys):
        g.decline("it has no keys")
    check_intermediate(g, [*g.shape(x), len(keys)], "every number beside every key")
    keys, first = np.unique(keys, return_index=True)
    spread = g.unsqueeze(x, [len(g.shape(x))])
    here = g.op.Equal(spread, g.constant(keys.astype(g.dtype(x))))
    if keys.dtype.kind == "f" and np.isnan(keys).any():
        here = g.op.Or(here, g.op.And(g.op.IsNaN(spread), g.constant(np.isnan(keys))))
    numbered = g.op.Mul(g.cast(here, np.int64), g.constant(np.arange(1, len(keys) + 1)))
    place = g.reduce("ReduceMax", numbered, [len(g.shape(x))])  # 0 where none fits
    return g.op.Gather(g.constant(np.concatenate([[default], values[first]]).astype(values.dtype)), place)


def _mapping(node: gs.Node, g: Builder) -> tuple[Array, Array, Any]:
    attrs = node.attrs
    types = {"int64s": np.int64, "floats": np.float32}
    found: dict[str, Array] = {}
    for role in ("keys", "values"):
        for name, kind in types.items():
            if f"{role}_{name}" in attrs:
                found[role] = np.asarray(attrs[f"{role}_{name}"], kind)
        tensor = attrs.get(f"{role}_tensor")
        if isinstance(tensor, gs.Constant) and np.asarray(tensor.values).dtype.kind in "if":
            found[role] = np.asarray(tensor.values)
    if len(found) < 2:
        g.decline("its keys or values are strings")
    values = found["values"]
    default: Any = attrs.get("default_tensor")
    if isinstance(default, gs.Constant):
        default = np.asarray(default.values).reshape(-1)[0]
    elif values.dtype.kind == "i":
        default = attrs.get("default_int64", -1)
    else:
        default = attrs.get("default_float", -0.0)
    return found["keys"], values, default


@rule("OneHotEncoder", domain=ML)
def one_hot_encoder_as_comparisons(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no OneHotEncoder; of numbers, each category is compared."""
    x, categories = node.inputs[0], node.attrs.get("cats_int64s")
    if not categories:
        g.decline("its categories are strings")
    check_intermediate(g, [*g.shape(x), len(categories)], "every number beside every category")
    whole = g.cast(x, np.int64)  # towards 0, as ONNX Runtime has it
    return g.cast(g.op.Equal(g.unsqueeze(whole, [len(g.shape(x))]), g.constant(np.asarray(categories))), np.float32)


@rule("LinearRegressor", domain=ML)
def linear_regressor_as_gemm(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no LinearRegressor; it is a product with the coefficients."""
    x = g.cast(node.inputs[0], np.float32)
    targets = int(node.attrs.get("targets", 1))
    weights = np.asarray(node.attrs["coefficients"], np.float32).reshape(targets, -1).T
    y = g.op.MatMul(x, g.constant(np.ascontiguousarray(weights)))
    if node.attrs.get("intercepts"):
        y = g.op.Add(y, g.constant(np.asarray(node.attrs["intercepts"], np.float32)))
    return transformed(g, y, transform_of(node), targets)


@rule("LinearClassifier", domain=ML)
def linear_classifier_as_gemm(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no LinearClassifier; it is a product with the coefficients, and the label of the largest score."""
    attrs = node.attrs
    names, how = class_names(node), transform_of(node)
    bias = np.asarray(attrs.get("intercepts") or [], np.float32)
    if len(names) < 2 or len(bias) not in ({1, 2} if len(names) == 2 else {len(names)}):
        g.decline(f"it has {len(names)} classes and {len(bias)} intercepts, by which ONNX Runtime counts the scores")
    weights = np.asarray(attrs["coefficients"], np.float32).reshape(len(bias), -1).T
    product = g.op.MatMul(rows(g, node.inputs[0]), g.constant(np.ascontiguousarray(weights)))
    scores = g.op.Add(product, g.constant(bias))
    if len(bias) == 1:
        place = g.squeeze(g.cast(g.op.Greater(scores, g.constant(0, np.float32)), np.int64), [1])
        return [label(node, g, place, names), of_one_score(g, scores, how, opposite=False)]
    place = g.op.ArgMax(scores, axis=1, keepdims=0)
    return [label(node, g, place, names), transformed(g, scores, how, len(bias))]


# --- scores and labels -------------------------------------------------------------------------------------------


def rows(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """The input as float32 [rows, features]; that of one axis is one row."""
    x = g.cast(x, np.float32)
    rank = len(g.shape(x))
    if rank not in (1, 2):
        g.decline(f"its input has the shape {g.shape(x)}, and not rows of features")
    return g.unsqueeze(x, [0]) if rank == 1 else x


def class_names(node: gs.Node) -> list[int] | list[str]:
    for name in ("classlabels_strings", "classlabels_ints", "classlabels_int64s"):
        if node.attrs.get(name):
            return list(node.attrs[name])
    return []


def label(node: gs.Node, g: Builder, place: gs.Tensor, names: list[int] | list[str]) -> gs.Tensor | None:
    """The names of the classes at the places [rows]; None where nothing reads them."""
    first = node.outputs[0]
    if not g.used(first):
        return None
    if any(isinstance(name, str) for name in names):
        g.decline(
            f"its labels, {first.name!r}, are strings, of which TensorRT has no tensors: train it with integers as "
            "labels, or drop that output, and look up the name of the largest score after the engine"
        )
    named: gs.Tensor = g.op.Gather(g.constant(np.asarray(names, np.int64)), place)
    return named


def transform_of(node: gs.Node) -> str:
    return str(node.attrs.get("post_transform", "NONE"))


def transformed(g: Builder, y: gs.Tensor, how: str, count: int) -> gs.Tensor:
    """``y`` [rows, count] after the post_transform; of a single score, ONNX Runtime knows no other than PROBIT."""
    if how == "NONE" or (count == 1 and how != "PROBIT"):
        return y
    result: gs.Tensor
    if how == "LOGISTIC":
        result = g.op.Sigmoid(y)
    elif how == "SOFTMAX":
        result = g.op.Softmax(y, axis=len(g.shape(y)) - 1)
    elif how == "SOFTMAX_ZERO":
        result = _softmax_of_all_but_zeros(g, y)
    else:
        result = _probit(g, y)
    return result


def of_one_score(g: Builder, score: gs.Tensor, how: str, opposite: bool) -> gs.Tensor:
    """Two classes of the score [rows, 1] of the second: the first has its opposite, or what is left to 1.

    ONNX Runtime knows no other post_transform of them than LOGISTIC; before 1.31, not that everywhere.
    """
    if how == "PROBIT":
        g.decline("of two classes that share one score, ONNX Runtime computes the PROBIT of one alone")
    mirrored = opposite or how == "LOGISTIC"
    one = g.constant(np.asarray(1, g.dtype(score)))
    both: gs.Tensor = g.op.Concat(g.op.Neg(score) if mirrored else g.op.Sub(one, score), score, axis=1)
    return transformed(g, both, how, 2) if how == "LOGISTIC" else both


def _softmax_of_all_but_zeros(g: Builder, y: gs.Tensor) -> gs.Tensor:
    axis, kind = [len(g.shape(y)) - 1], g.dtype(y)
    largest = g.reduce("ReduceMax", y, axis, keepdims=True)
    grown = g.op.Exp(g.op.Sub(y, largest))
    counts = g.op.Greater(g.op.Abs(y), g.constant(np.asarray(1e-7, kind)))
    total = g.reduce("ReduceSum", g.op.Where(counts, grown, g.constant(np.asarray(0, kind))), axis, keepdims=True)
    quotient: gs.Tensor = g.op.Div(g.op.Where(counts, grown, g.op.Mul(y, g.op.Exp(g.op.Neg(largest)))), total)
    return quotient


def _probit(g: Builder, y: gs.Tensor) -> gs.Tensor:
    """The inverse of the normal distribution by Winitzki's inverse of erf, with the constants of ONNX Runtime."""
    kind = g.dtype(y)

    def number(value: float) -> gs.Tensor:
        return g.constant(np.asarray(value, kind))

    x = g.op.Sub(g.op.Mul(y, number(2)), number(1))
    log = g.op.Log(g.op.Mul(g.op.Sub(number(1), x), g.op.Add(number(1), x)))
    half = g.op.Add(number(2 / (3.14159 * 0.147)), g.op.Mul(log, number(0.5)))
    root = g.op.Sqrt(g.op.Sub(g.op.Mul(half, half), g.op.Mul(log, number(1 / 0.147))))
    size = g.op.Mul(number(2**0.5), g.op.Sqrt(g.op.Sub(root, half)))
    result: gs.Tensor = g.op.Where(g.op.Less(x, number(0)), g.op.Neg(size), size)
    return result


# --- examples ----------------------------------------------------------------------------------------------------


def ml_example(
    op: str, shape: list[Any], out: list[Any], kind: str = "float32", labels: bool = False, **attrs: Any
) -> gs.Graph:
    """A model of one operator; with ``labels``, one that gives them before its scores of the shape ``out``."""

    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        results = [gs.Variable("y", np.dtype(np.float32), out)]
        if labels:
            results.insert(0, gs.Variable("label", np.dtype(np.int64), [*out[:1]]))
        g.made.append(Node(op, op, attrs, [x], results, domain=ML))
        return results

    graph = example({"x": (kind, shape)}, build, opset=18)
    graph.import_domains = [onnx_ml(5 if op == "TreeEnsemble" else 3)]
    return graph


def onnx_ml(version: int) -> Any:
    import onnx

    return onnx.helper.make_opsetid(ML, version)


@binarizer_as_comparison.example
def above_a_threshold() -> gs.Graph:
    return ml_example("Binarizer", ["n", 4], ["n", 4], threshold=0.5)


@scaler_as_arithmetic.example
def centred_and_scaled() -> gs.Graph:
    return ml_example("Scaler", ["n", 3], ["n", 3], offset=[1.0, 2.0, 3.0], scale=[0.5, 2.0, 1.0])


@normalizer_as_quotient.example
def rows_of_length_one() -> gs.Graph:
    return ml_example("Normalizer", ["n", 3], ["n", 3], norm="L2")


@imputer_as_choice.example
def missing_numbers() -> gs.Graph:
    return ml_example("Imputer", ["n", 2], ["n", 2], imputed_value_floats=[0.5, 7.0], replaced_value_float=float("nan"))


@label_encoder_as_comparisons.example
def classes_as_numbers() -> gs.Graph:
    return ml_example(
        "LabelEncoder", ["n"], ["n"], "int64", keys_int64s=[2, 0, 7], values_floats=[0.5, 1.5, 9.0], default_float=-1.0
    )


@one_hot_encoder_as_comparisons.example
def categories_side_by_side() -> gs.Graph:
    return ml_example("OneHotEncoder", ["n", 2], ["n", 2, 3], "int64", cats_int64s=[0, 4, -1], zeros=1)


@linear_regressor_as_gemm.example
def two_targets() -> gs.Graph:
    weights = [0.5, 1.0, -2.0, 1.5, 0.25, 3.0]
    return ml_example("LinearRegressor", ["n", 3], ["n", 2], coefficients=weights, intercepts=[1.0, -1.0], targets=2)


@feature_extractor_as_gather.example
def chosen_columns() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        y = gs.Variable("y", np.dtype(np.float32), ["n", 2])
        g.made.append(Node("ArrayFeatureExtractor", "a", {}, [x, g.constant([3, 0])], [y], domain=ML))
        return y

    return example({"x": ("float32", ["n", 4])}, build, opset=18)


@linear_classifier_as_gemm.example
def three_classes() -> gs.Graph:
    weights = [0.5, 1.0, -2.0, 1.5, 0.25, 3.0]
    return ml_example(
        "LinearClassifier",
        ["n", 2],
        ["n", 3],
        labels=True,
        coefficients=weights,
        intercepts=[1.0, -1.0, 0.5],
        classlabels_ints=[4, 7, 1],
        post_transform="SOFTMAX",
    )


@linear_classifier_as_gemm.example
def two_classes_of_one_score() -> gs.Graph:
    return ml_example(
        "LinearClassifier",
        ["n", 2],
        ["n", 2],
        labels=True,
        coefficients=[0.5, -2.0],
        intercepts=[0.25],
        classlabels_ints=[-1, 1],
    )


@linear_classifier_as_gemm.example
def scores_alone_of_classes_with_names() -> gs.Graph:
    graph = ml_example(
        "LinearClassifier",
        ["n", 2],
        ["n", 2],
        labels=True,
        coefficients=[0.5, -2.0, 1.0, 0.0],
        intercepts=[0.25, -0.25],
        classlabels_strings=["cat", "dog"],
        post_transform="SOFTMAX_ZERO",
    )
    del graph.outputs[0]
    return graph
