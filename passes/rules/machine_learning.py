"""Operators of ai.onnx.ml on numbers: trees, linear models, scalers, encoders. scikit-learn and XGBoost export to them.

A forest is followed from its roots down, all trees of all rows at once, as many steps as its deepest tree has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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


@rule("LinearRegressor", domain=ML)
def linear_regressor_as_gemm(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no LinearRegressor; it is a product with the coefficients."""
    x = g.cast(node.inputs[0], np.float32)
    targets = int(node.attrs.get("targets", 1))
    weights = np.asarray(node.attrs["coefficients"], np.float32).reshape(targets, -1).T
    y = g.op.MatMul(x, g.constant(np.ascontiguousarray(weights)))
    if node.attrs.get("intercepts"):
        y = g.op.Add(y, g.constant(np.asarray(node.attrs["intercepts"], np.float32)))
    return _transformed(g, y, str(node.attrs.get("post_transform", "NONE")))


def _transformed(g: Builder, y: gs.Tensor, how: str) -> gs.Tensor:
    if how == "NONE":
        return y
    result: gs.Tensor
    if how == "LOGISTIC":
        result = g.op.Sigmoid(y)
    elif how == "SOFTMAX":
        result = g.op.Softmax(y, axis=len(g.shape(y)) - 1)
    else:
        g.decline(f"post_transform {how}")
    return result


# --- trees -------------------------------------------------------------------------------------------------------

COMPARE = {
    "BRANCH_LEQ": "LessOrEqual",
    "BRANCH_LT": "Less",
    "BRANCH_GTE": "GreaterOrEqual",
    "BRANCH_GT": "Greater",
    "BRANCH_EQ": "Equal",
    "BRANCH_NEQ": "Equal",
}
MODES = ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER"]


@dataclass
class Forest:
    """Trees as a list of nodes; a leaf goes on to itself."""

    roots: list[int] = field(default_factory=list)
    feature: list[int] = field(default_factory=list)
    mode: list[str] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    true: list[int] = field(default_factory=list)
    false: list[int] = field(default_factory=list)
    missing: list[bool] = field(default_factory=list)
    """Whether NaN goes the way of true."""
    weights: list[dict[int, float]] = field(default_factory=list)
    """Of leaves, what they add by target."""

    def add(self, feature: int = 0, mode: str = "LEAF", limit: float = 0.0, missing: bool = False) -> int:
        place = len(self.mode)
        self.feature.append(feature)
        self.mode.append(mode)
        self.limit.append(limit)
        self.true.append(place)
        self.false.append(place)
        self.missing.append(missing)
        self.weights.append({})
        return place

    def depth(self) -> int:
        deepest, level = 0, set(self.roots)
        while level := {
            child for place in level for child in (self.true[place], self.false[place]) if child not in (place,)
        }:
            deepest += 1
            if deepest > len(self.mode):
                raise ValueError("the trees run in circles")
        return deepest


def _answer(g: Builder, mode: str, value: gs.Tensor, limit: gs.Tensor) -> gs.Tensor:
    """Whether the value goes the way of true."""
    result: gs.Tensor
    if mode in ("BRANCH_LEQ", "BRANCH_GTE") and g.opset < 12:
        strict = g.node("Less" if mode == "BRANCH_LEQ" else "Greater", [value, limit], {})
        result = g.op.Or(strict, g.op.Equal(value, limit))
        return result
    result = g.node(COMPARE[mode], [value, limit], {})
    return g.op.Not(result) if mode == "BRANCH_NEQ" else result


def _followed(g: Builder, x: gs.Tensor, forest: Forest) -> gs.Tensor:
    """[rows, trees]: the leaf that each row of ``x`` [rows, features] comes to in each tree."""
    rows = g.op.Shape(x)
    count = g.slice(rows, [0], [1], [0], [1])
    start = g.constant(np.asarray([forest.roots], np.int64))
    place = g.op.Expand(start, g.op.Concat(count, g.constant([len(forest.roots)]), axis=0))
    columns = {
        "feature": np.asarray(forest.feature, np.int64),
        "limit": np.asarray(forest.limit, np.float64).astype(g.dtype(x)),
        "true": np.asarray(forest.true, np.int64),
        "false": np.asarray(forest.false, np.int64),
    }
    modes = sorted({mode for mode in forest.mode if mode != "LEAF"})
    for _ in range(forest.depth()):
        at = {name: g.op.Gather(g.constant(values), place) for name, values in columns.items()}
        value = g.op.GatherElements(x, at["feature"], axis=1)
        passed: gs.Tensor | None = None
        for mode in modes:
            here = _answer(g, mode, value, at["limit"])
            if len(modes) > 1:
                of_mode = g.constant(np.array([item == mode for item in forest.mode]))
                here = g.op.And(here, g.op.Gather(of_mode, place))
            passed = here if passed is None else g.op.Or(passed, here)
        assert passed is not None
        if any(forest.missing):
            goes = g.op.Gather(g.constant(np.asarray(forest.missing)), place)
            passed = g.op.Or(passed, g.op.And(g.op.IsNaN(value), goes))
        place = g.op.Where(passed, at["true"], at["false"])
    return place


def _scored(
    g: Builder, x: gs.Tensor, forest: Forest, targets: int, aggregate: str, base: Sequence[float], transform: str
) -> gs.Tensor:
    """[rows, targets]: what the leaves give together."""
    if len(g.shape(x)) != 2:
        g.decline(f"its input has the shape {g.shape(x)}, and not rows of features")
    kind = g.dtype(x)
    table = np.zeros([len(forest.mode), targets], np.float64)
    for place, weights in enumerate(forest.weights):
        for target, weight in weights.items():
            table[place, target] += weight
    found = g.op.Gather(g.constant(table.astype(kind)), _followed(g, x, forest))
    op = {"SUM": "ReduceSum", "AVERAGE": "ReduceMean", "MIN": "ReduceMin", "MAX": "ReduceMax"}[aggregate]
    y = g.reduce(op, found, [1])
    if len(base):
        y = g.op.Add(y, g.constant(np.asarray(base, np.float64).astype(kind)))
    return _transformed(g, y, transform)


@rule("TreeEnsembleRegressor", domain=ML)
def tree_regressor_in_steps(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no trees; all of them are followed at once, a step at a time."""
    forest, keys = _forest_by_ids(node, g)
    for tree, place, target, weight in zip(
        *(node.attrs[f"target_{name}"] for name in ("treeids", "nodeids", "ids", "weights")), strict=True
    ):
        leaf = forest.weights[keys[tree, place]]
        leaf[target] = leaf.get(target, 0.0) + weight
    x = node.inputs[0]
    x = x if g.dtype(x).kind == "f" else g.cast(x, np.float32)
    return g.cast(
        _scored(
            g,
            x,
            forest,
            int(node.attrs.get("n_targets", 1)),
            str(node.attrs.get("aggregate_function", "SUM")),
            node.attrs.get("base_values") or [],
            str(node.attrs.get("post_transform", "NONE")),
        ),
        np.float32,
    )


def _forest_by_ids(node: gs.Node, g: Builder) -> tuple[Forest, dict[tuple[int, int], int]]:
    attrs = node.attrs
    names = ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids")
    if any(f"nodes_{name}" not in attrs for name in names):
        g.decline("its thresholds are tensors")
    rows = list(zip(*(attrs[f"nodes_{name}"] for name in names), strict=True))
    missing = attrs.get("nodes_missing_value_tracks_true") or [0] * len(rows)
    forest, keys = Forest(), {}
    for (tree, place, feature, limit, mode, *_), goes in zip(rows, missing, strict=True):
        keys[tree, place] = forest.add(feature, mode, limit, bool(goes) and mode != "LEAF")
    for tree, place, _, _, mode, true, false in rows:
        if mode != "LEAF":
            forest.true[keys[tree, place]], forest.false[keys[tree, place]] = keys[tree, true], keys[tree, false]
    children = {*forest.true, *forest.false}
    first = {tree: keys[tree, place] for tree, place, *_ in reversed(rows)}
    leaves = {place for place, mode in enumerate(forest.mode) if mode == "LEAF"}
    forest.roots = [place for place in first.values() if place not in children or place in leaves][::-1]
    if len(forest.roots) != len(first):
        g.decline("the first node of a tree is not its root")
    return forest, keys


@rule("TreeEnsemble", domain=ML)
def tree_ensemble_in_steps(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no trees; all of them are followed at once, a step at a time."""
    attrs = node.attrs
    forest = Forest()
    modes = np.asarray(attrs["nodes_modes"].values).tolist()
    limits = np.asarray(attrs["nodes_splits"].values).astype(np.float64).tolist()
    missing = attrs.get("nodes_missing_value_tracks_true") or [0] * len(modes)
    inner = [
        forest.add(feature, MODES[mode], limit, bool(goes))
        for feature, mode, limit, goes in zip(attrs["nodes_featureids"], modes, limits, missing, strict=True)
    ]
    leaves = [forest.add() for _ in attrs["leaf_targetids"]]
    weights = np.asarray(attrs["leaf_weights"].values).astype(np.float64).tolist()
    for place, target, weight in zip(leaves, attrs["leaf_targetids"], weights, strict=True):
        forest.weights[place][target] = weight
    for side in ("true", "false"):
        ways = getattr(forest, side)
        for place, child, leaf in zip(inner, attrs[f"nodes_{side}nodeids"], attrs[f"nodes_{side}leafs"], strict=True):
            ways[place] = leaves[child] if leaf else inner[child]
    forest.roots = [inner[place] for place in attrs["tree_roots"]]
    _split_members(forest, attrs, inner)
    aggregate = ("AVERAGE", "SUM", "MIN", "MAX")[int(attrs.get("aggregate_function", 1))]
    transform = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")[int(attrs.get("post_transform", 0))]
    return _scored(g, node.inputs[0], forest, int(attrs.get("n_targets", 1)), aggregate, [], transform)


def _split_members(forest: Forest, attrs: dict[str, Any], inner: list[int]) -> None:
    """A question whether a value is one of several becomes a question for each of them."""
    if not isinstance(attrs.get("membership_values"), gs.Constant):
        return
    sets: list[list[float]] = [[]]
    for value in np.asarray(attrs["membership_values"].values).astype(np.float64).tolist():
        if np.isnan(value):
            sets.append([])
        else:
            sets[-1].append(value)
    asking = [place for place in inner if forest.mode[place] == "BRANCH_MEMBER"]
    for place, members in zip(asking, sets, strict=False):
        forest.mode[place], forest.limit[place] = "BRANCH_EQ", members[0]
        no, last = forest.false[place], place
        for value in members[1:]:
            another = forest.add(forest.feature[place], "BRANCH_EQ", value)
            forest.true[another], forest.false[last] = forest.true[place], another
            forest.false[another] = no
            last = another


# --- examples ----------------------------------------------------------------------------------------------------


def _ml(
    op: str, shape: list[Any], out: list[Any], kind: str = "float32", result: Any = np.float32, **attrs: Any
) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        y = gs.Variable("y", np.dtype(result), out)
        g.made.append(Node(op, op, attrs, [x], [y], domain=ML))
        return y

    graph = example({"x": (kind, shape)}, build, opset=18)
    graph.import_domains = [onnx_ml(5 if op == "TreeEnsemble" else 3)]
    return graph


def onnx_ml(version: int) -> Any:
    import onnx

    return onnx.helper.make_opsetid(ML, version)


@binarizer_as_comparison.example
def above_a_threshold() -> gs.Graph:
    return _ml("Binarizer", ["n", 4], ["n", 4], threshold=0.5)


@scaler_as_arithmetic.example
def centred_and_scaled() -> gs.Graph:
    return _ml("Scaler", ["n", 3], ["n", 3], offset=[1.0, 2.0, 3.0], scale=[0.5, 2.0, 1.0])


@normalizer_as_quotient.example
def rows_of_length_one() -> gs.Graph:
    return _ml("Normalizer", ["n", 3], ["n", 3], norm="L2")


@imputer_as_choice.example
def missing_numbers() -> gs.Graph:
    return _ml("Imputer", ["n", 2], ["n", 2], imputed_value_floats=[0.5, 7.0], replaced_value_float=float("nan"))


@label_encoder_as_comparisons.example
def classes_as_numbers() -> gs.Graph:
    return _ml(
        "LabelEncoder", ["n"], ["n"], "int64", keys_int64s=[2, 0, 7], values_floats=[0.5, 1.5, 9.0], default_float=-1.0
    )


@linear_regressor_as_gemm.example
def two_targets() -> gs.Graph:
    weights = [0.5, 1.0, -2.0, 1.5, 0.25, 3.0]
    return _ml("LinearRegressor", ["n", 3], ["n", 2], coefficients=weights, intercepts=[1.0, -1.0], targets=2)


@feature_extractor_as_gather.example
def chosen_columns() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        y = gs.Variable("y", np.dtype(np.float32), ["n", 2])
        g.made.append(Node("ArrayFeatureExtractor", "a", {}, [x, g.constant([3, 0])], [y], domain=ML))
        return y

    return example({"x": ("float32", ["n", 4])}, build, opset=18)


@tree_regressor_in_steps.example
def two_small_trees() -> gs.Graph:
    return _ml(
        "TreeEnsembleRegressor",
        ["n", 3],
        ["n", 1],
        n_targets=1,
        nodes_treeids=[0, 0, 0, 0, 0, 1, 1, 1],
        nodes_nodeids=[0, 1, 2, 3, 4, 0, 1, 2],
        nodes_featureids=[0, 2, 0, 0, 0, 1, 0, 0],
        nodes_values=[0.1, -0.5, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0],
        nodes_modes=["BRANCH_LEQ", "BRANCH_LEQ", "LEAF", "LEAF", "LEAF", "BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_truenodeids=[1, 3, 0, 0, 0, 1, 0, 0],
        nodes_falsenodeids=[2, 4, 0, 0, 0, 2, 0, 0],
        target_treeids=[0, 0, 0, 1, 1],
        target_nodeids=[2, 3, 4, 1, 2],
        target_ids=[0, 0, 0, 0, 0],
        target_weights=[1.0, 2.5, -3.0, 0.5, 4.0],
        base_values=[0.25],
    )


@tree_ensemble_in_steps.example
def a_tree_of_two_questions() -> gs.Graph:
    def tensor(values: list[float], kind: Any) -> gs.Constant:
        return gs.Constant("t", np.asarray(values, kind))

    return _ml(
        "TreeEnsemble",
        ["n", 2],
        ["n", 2],
        n_targets=2,
        aggregate_function=1,
        membership_values=tensor([1.2, 3.7, 8.0, np.nan], np.float32),
        nodes_featureids=[0, 1],
        nodes_modes=tensor([0, 6], np.uint8),
        nodes_splits=tensor([0.3, 0.0], np.float32),
        nodes_truenodeids=[1, 0],
        nodes_trueleafs=[0, 1],
        nodes_falsenodeids=[2, 1],
        nodes_falseleafs=[1, 1],
        tree_roots=[0],
        leaf_targetids=[0, 1, 0],
        leaf_weights=tensor([5.5, 2.5, -1.0], np.float32),
    )
