"""Trees of ai.onnx.ml: a forest is followed from its roots down, all trees of all rows at once, as many steps as its
deepest tree has. Scores and labels are those that ONNX Runtime gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    transform_of,
    transformed,
)

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

    def carried(self, targets: int) -> Array:
        """[leaves, targets]: for which targets each leaf has a weight."""
        leaves = [place for place, mode in enumerate(self.mode) if mode == "LEAF"]
        return np.array([[target in self.weights[place] for target in range(targets)] for place in leaves])

    def reaches(self, target: int) -> bool:
        """Whether some tree has a weight for the target in each of its leaves."""
        return any(all(target in self.weights[place] for place in self._leaves(root)) for root in self.roots)

    def _leaves(self, root: int) -> list[int]:
        found, open_ = [], [root]
        while open_:
            place = open_.pop()
            if self.mode[place] == "LEAF":
                found.append(place)
            else:
                open_ += [self.true[place], self.false[place]]
        return found

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


def _table(g: Builder, forest: Forest, targets: int, kind: Any) -> gs.Constant:
    """[nodes, targets]: what each leaf adds."""
    table = np.zeros([len(forest.mode), targets], np.float64)
    for place, weights in enumerate(forest.weights):
        for target, weight in weights.items():
            table[place, target] += weight
    return g.constant(table.astype(kind))


def _scored(
    g: Builder, x: gs.Tensor, forest: Forest, targets: int, aggregate: str, base: Sequence[float], transform: str
) -> gs.Tensor:
    """[rows, targets]: what the leaves give together."""
    if len(g.shape(x)) != 2:
        g.decline(f"its input has the shape {g.shape(x)}, and not rows of features")
    if aggregate in ("MIN", "MAX") and not forest.carried(targets).all():
        g.decline(f"its aggregate_function is {aggregate}, and of some leaves there is no weight for every target")
    if base and not all(forest.reaches(target) for target in range(targets)):
        g.decline("it has base values, and of some targets no tree has a weight in each leaf")
    kind = g.dtype(x)
    found = g.op.Gather(_table(g, forest, targets, kind), _followed(g, x, forest))
    op = {"SUM": "ReduceSum", "AVERAGE": "ReduceMean", "MIN": "ReduceMin", "MAX": "ReduceMax"}[aggregate]
    y = g.reduce(op, found, [1])
    if len(base) == targets:
        y = g.op.Add(y, g.constant(np.asarray(base, np.float64).astype(kind)))
    return transformed(g, y, transform, targets)


@rule("TreeEnsembleRegressor", domain=ML)
def tree_regressor_in_steps(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no trees; all of them are followed at once, a step at a time."""
    forest = _forest_by_ids(node, g, "target")
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
            transform_of(node),
        ),
        np.float32,
    )


def _forest_by_ids(node: gs.Node, g: Builder, what: str) -> Forest:
    """The trees of a node whose leaves have weights for each ``what``: a target or a class."""
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
    for tree, place, target, weight in zip(
        *(attrs[f"{what}_{name}"] for name in ("treeids", "nodeids", "ids", "weights")), strict=True
    ):
        leaf = forest.weights[keys[tree, place]]
        leaf[target] = leaf.get(target, 0.0) + weight
    return forest


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


# --- classifiers -------------------------------------------------------------------------------------------------


@rule("TreeEnsembleClassifier", domain=ML)
def tree_classifier_in_steps(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT knows no trees; all of them are followed at once, step by step, and the largest score has the label."""
    forest = _forest_by_ids(node, g, "class")
    names, base = class_names(node), list(node.attrs.get("base_values") or [])
    count = len(names)
    if count < 2 or len(base) not in ({0, 1, 2} if count == 2 else {0, count}):
        g.decline(f"it has {count} classes and {len(base)} base values")
    x = node.inputs[0]
    x = x if g.dtype(x).kind == "f" else g.cast(x, np.float32)
    rank = len(g.shape(x))
    if rank not in (1, 2):
        g.decline(f"its input has the shape {g.shape(x)}, and not rows of features")
    leaves = _followed(g, g.unsqueeze(x, [0]) if rank == 1 else x, forest)
    sums = g.reduce("ReduceSum", g.op.Gather(_table(g, forest, count, g.dtype(x)), leaves), [1])
    if count == 2:
        place, scores = _of_two_classes(node, g, forest, leaves, sums, base)
        together = len(set(node.attrs["class_ids"])) == 1
        named = label(node, g, place, names if together or isinstance(names[0], str) else [0, 1])
        return [named, g.cast(scores, np.float32)]
    judged = sums
    if base:
        judged = sums = g.op.Add(sums, g.constant(np.asarray(base, g.dtype(x))))
    elif not all(
        forest.reaches(target) for target in range(count)
    ):  # a class that no leaf speaks of is not the largest, and if all others are negative
        there = _spoken_of(g, forest, leaves, list(range(count)))
        judged = g.op.Where(there, sums, g.constant(np.asarray(np.finfo(np.float32).min, g.dtype(x))))
    place = g.op.ArgMax(judged, axis=1, keepdims=0)
    return [label(node, g, place, names), g.cast(transformed(g, sums, transform_of(node), count), np.float32)]


def _spoken_of(g: Builder, forest: Forest, leaves: gs.Tensor, targets: list[int]) -> gs.Tensor:
    """[rows, targets]: whether one of the leaves of a row has a weight for the target."""
    table = np.array([[target in weights for target in targets] for weights in forest.weights], np.float32)
    found = g.reduce("ReduceMax", g.op.Gather(g.constant(table), leaves), [1])
    there: gs.Tensor = g.op.Greater(found, g.constant(0.5, np.float32))
    return there


def _of_two_classes(
    node: gs.Node, g: Builder, forest: Forest, leaves: gs.Tensor, sums: gs.Tensor, base: list[float]
) -> tuple[gs.Tensor, gs.Tensor]:
    """The place of the label [rows] and the scores [rows, 2]: ONNX Runtime has another way for each kind of weights."""
    if not forest.carried(2).any(1).all():
        g.decline("it has leaves without a weight for either of its two classes")
    ids, weights = set(node.attrs["class_ids"]), node.attrs["class_weights"]
    positive = len(ids) == 1 and all(weight >= 0 for weight in weights)
    kind, how = g.dtype(sums), transform_of(node)
    first, second = (g.slice(sums, [place], [place + 1], [1], [1]) for place in (0, 1))

    def plus(score: gs.Tensor, place: int) -> gs.Tensor:
        return g.op.Add(score, g.constant(np.asarray(base[place], kind))) if place < len(base) else score

    def of_both() -> tuple[gs.Tensor, gs.Tensor]:
        decisive = g.op.Add(first, g.constant(np.asarray(base[1], kind))) if len(base) == 2 else second
        other = g.op.Neg(decisive) if len(base) == 2 else plus(first, 0)
        if base and not forest.reaches(0):  # what nothing speaks of is 0
            other = g.op.Where(_spoken_of(g, forest, leaves, [0]), other, first) if 0 in ids else first
        return decisive, transformed(g, g.op.Concat(other, decisive, axis=1), how, 2)

    def of_the_first() -> tuple[gs.Tensor, gs.Tensor]:
        decisive = plus(first, 0)
        if len(base) == 2:
            return decisive, transformed(g, g.op.Concat(decisive, second, axis=1), how, 2)
        if len(base) == 1 and len(ids) == 2:
            g.decline("of two classes and one base value, ONNX Runtime computes the score of one alone")
        return decisive, of_one_score(g, decisive, how, opposite=not positive)

    if forest.reaches(1):
        decisive, scores = of_both()
    elif 1 not in ids:
        decisive, scores = of_the_first()
    else:
        there = _spoken_of(g, forest, leaves, [1])
        decisive, scores = (g.op.Where(there, *pair) for pair in zip(of_both(), of_the_first(), strict=True))
    above = g.op.Greater(decisive, g.constant(np.asarray(0.5 if positive else 0.0, kind)))
    return g.squeeze(g.cast(above, np.int64), [1]), scores


# --- examples ----------------------------------------------------------------------------------------------------


@tree_regressor_in_steps.example
def two_small_trees() -> gs.Graph:
    return ml_example(
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

    return ml_example(
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


_STUMP: dict[str, Any] = {
    "nodes_treeids": [0, 0, 0],
    "nodes_nodeids": [0, 1, 2],
    "nodes_featureids": [1, 0, 0],
    "nodes_values": [0.1, 0.0, 0.0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
    "nodes_truenodeids": [1, 0, 0],
    "nodes_falsenodeids": [2, 0, 0],
}


@tree_classifier_in_steps.example
def three_classes_of_one_tree() -> gs.Graph:
    return ml_example(
        "TreeEnsembleClassifier",
        ["n", 2],
        ["n", 3],
        labels=True,
        **_STUMP,
        classlabels_int64s=[5, 3, 8],
        class_treeids=[0, 0, 0, 0],
        class_nodeids=[1, 1, 2, 2],
        class_ids=[0, 1, 1, 2],
        class_weights=[0.75, 0.25, -0.5, -0.125],
    )


@tree_classifier_in_steps.example
def two_classes_of_one_weight() -> gs.Graph:
    return ml_example(
        "TreeEnsembleClassifier",
        ["n", 2],
        ["n", 2],
        labels=True,
        **_STUMP,
        classlabels_int64s=[5, 3],
        class_treeids=[0, 0],
        class_nodeids=[1, 2],
        class_ids=[0, 0],
        class_weights=[0.75, -0.5],
        post_transform="LOGISTIC",
    )
