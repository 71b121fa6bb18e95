"""Models for the rules of passes/rules/machine_learning.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.ir import Node
from passes.rules.machine_learning import ML

from . import Case, Sketch, Tensors, strategy


def ml_case(s: Sketch, op: str, out: list[int], result: Any = np.float32, version: int = 3, **attrs: Any) -> Case:
    """A model of one operator."""

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        y = gs.Variable("y", np.dtype(result), list(out))
        g.made.append(Node(op, op, attrs, list(t.values()), [y], domain=ML))
        return y

    case = s.model(build, opset=s.pick(15, 18))
    case.graph.import_domains = [onnx.helper.make_opsetid(ML, version)]
    return case


def ml_classifier(s: Sketch, op: str, count: int, out: list[int], labels: str, **attrs: Any) -> Case:
    """A model of one classifier; ``labels`` is the name of its attribute for integers. Strings name classes too."""
    names: list[Any] = s.random.permutation(9)[:count].tolist()
    texts = s.rarely()
    attrs |= {"classlabels_strings": [f"c{name}" for name in names]} if texts else {labels: names}

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        label = gs.Variable("label", np.dtype(np.int64) if not texts else np.dtype(object), out[:1])
        y = gs.Variable("y", np.dtype(np.float32), list(out))
        g.made.append(Node(op, op, attrs, list(t.values()), [label, y], domain=ML))
        return [y] if texts else [label, y]

    case = s.model(build, opset=s.pick(15, 18))
    case.graph.import_domains = [onnx.helper.make_opsetid(ML, 3)]
    return case


def post_transform(s: Sketch) -> str:
    return str(s.pick("NONE", "NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT"))


@strategy("feature_extractor_as_gather")
def extracted(s: Sketch) -> Case:
    sizes = s.sizes(2, 3)
    count = s.integer(1, 3)
    s.input("x", "float32", sizes)
    s.operand("places", s.random.integers(0, sizes[-1], [count]))
    return ml_case(s, "ArrayFeatureExtractor", [*sizes[:-1], count], "float32")


@strategy("binarizer_as_comparison")
def binarised(s: Sketch) -> Case:
    sizes = s.sizes(1, 3)
    s.input("x", "float32", sizes)
    return ml_case(s, "Binarizer", sizes, threshold=s.pick(0.0, 0.5, -1.0))


@strategy("scaler_as_arithmetic")
def scaled(s: Sketch) -> Case:
    n, width = s.integer(1, 4), s.integer(1, 4)
    s.input("x", s.pick("float32", "int32", "int64"), [n, width])
    if s.inputs["x"][0] != "float32":
        s.feeds["x"] = (s.feeds["x"] % 100).astype(s.feeds["x"].dtype)
    count = s.pick(1, width)
    offset, scale = (s.random.uniform(0.1, 2, count).astype(np.float32).tolist() for _ in range(2))
    return ml_case(s, "Scaler", [n, width], offset=offset, scale=scale)


@strategy("normalizer_as_quotient")
def normalised(s: Sketch) -> Case:
    sizes = s.sizes(1, 2)
    s.input("x", "float32", np.abs(s.values("float32", sizes)))
    return ml_case(s, "Normalizer", sizes, norm=s.pick("MAX", "L1", "L2"))


@strategy("imputer_as_choice")
def imputed(s: Sketch) -> Case:
    n, width = s.integer(1, 4), s.integer(1, 4)
    if s.flag():
        s.input("x", "int64", s.random.integers(0, 3, [n, width]))
        values = s.random.integers(0, 9, s.pick(1, width)).tolist()
        return ml_case(s, "Imputer", [n, width], np.int64, imputed_value_int64s=values, replaced_value_int64=1)
    missing = s.pick(float("nan"), 0.0)
    x = s.values("float32", [n, width])
    s.input("x", "float32", np.where(s.random.random(x.shape) < 0.3, missing, x).astype(np.float32))
    values = s.random.uniform(0, 1, s.pick(1, width)).astype(np.float32).tolist()
    return ml_case(s, "Imputer", [n, width], imputed_value_floats=values, replaced_value_float=missing)


@strategy("label_encoder_as_comparisons")
def encoded(s: Sketch) -> Case:
    sizes, count = s.sizes(0, 3), s.integer(1, 5)
    s.input("x", "int64", s.random.integers(0, 6, sizes))
    keys = s.random.permutation(6)[:count].tolist()
    values = s.random.uniform(0, 1, count).astype(np.float32).tolist()
    return ml_case(s, "LabelEncoder", sizes, keys_int64s=keys, values_floats=values, default_float=-7.0)


@strategy("one_hot_encoder_as_comparisons")
def one_hot(s: Sketch) -> Case:
    sizes, count = s.sizes(1, 2), s.integer(1, 5)
    kind = s.pick("int64", "float32")
    s.input("x", kind, (s.random.integers(-6, 6, sizes) / (2 if kind == "float32" else 1)).astype(kind))
    categories = (s.random.permutation(9)[:count] - 4).tolist()
    return ml_case(s, "OneHotEncoder", [*sizes, count], cats_int64s=categories, zeros=1)


@strategy("linear_regressor_as_gemm")
def regressed(s: Sketch) -> Case:
    n, width, targets = (s.integer(1, 4) for _ in range(3))
    s.input("x", "float32", [n, width])
    weights = s.random.standard_normal(width * targets).astype(np.float32).tolist()
    attrs: dict[str, Any] = {"intercepts": s.random.standard_normal(targets).astype(np.float32).tolist()}
    attrs["post_transform"] = post_transform(s)
    return ml_case(s, "LinearRegressor", [n, targets], coefficients=weights, targets=targets, **attrs)


@strategy("linear_classifier_as_gemm")
def classified(s: Sketch) -> Case:
    n, width, count = s.integer(1, 4), s.integer(1, 4), s.integer(2, 4)
    scores = s.pick(1, 2) if count == 2 else count
    kind = s.pick("float32", "float32", "int32", "int64")
    s.input("x", kind, np.clip(s.values(kind, [n, width]), -99, 99))
    weights = np.round(s.random.standard_normal(width * scores), 1).astype(np.float32).tolist()
    attrs: dict[str, Any] = {"intercepts": np.round(s.random.standard_normal(scores), 1).astype(np.float32).tolist()}
    attrs["post_transform"] = post_transform(s)
    return ml_classifier(s, "LinearClassifier", count, [n, count], "classlabels_ints", coefficients=weights, **attrs)
