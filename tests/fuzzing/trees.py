"""Models for the rules of passes/rules/trees.py."""

from __future__ import annotations

from typing import Any

import hypothesis
import numpy as np
import onnx_graphsurgeon as gs

from . import Case, Sketch, strategy
from .machine_learning import ml_case, ml_classifier, post_transform


def _grow(s: Sketch, depth: int) -> Any:
    """A tree: a leaf (its weight), or a question (feature, limit, true, false)."""
    if depth == 0 or s.integer(0, 2) == 0:
        return float(np.float32(s.random.standard_normal()))
    limit = float(np.float32(np.round(s.random.standard_normal(), 1)))
    return (s.integer(0, 2), limit, _grow(s, depth - 1), _grow(s, depth - 1))


def _planted(s: Sketch, targets: int, what: str) -> tuple[dict[str, Any], list[list[int]]]:
    """The attributes of some trees, and which targets each leaf has a weight for."""
    rows: dict[str, list[Any]] = {
        name: [] for name in ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids")
    }
    weights: dict[str, list[Any]] = {name: [] for name in ("treeids", "nodeids", "ids", "weights")}
    carried: list[list[int]] = []
    modes = s.pick(["BRANCH_LEQ"], ["BRANCH_LT"], ["BRANCH_LEQ", "BRANCH_GT", "BRANCH_EQ"])
    choices = s.pick([list(range(targets))], [[0]], [[targets - 1]], [[target] for target in range(targets)])
    rounded, sign = s.flag(), s.pick(1, 1, -1, None)
    for tree in range(s.integer(1, 3)):
        queue: list[Any] = [_grow(s, 3)]
        for place, item in enumerate(queue):
            split = isinstance(item, tuple)
            feature, limit = item[:2] if split else (0, 0.0)
            children = (len(queue), len(queue) + 1) if split else (0, 0)
            row = [tree, place, feature, limit, s.pick(*modes) if split else "LEAF", *children]
            for name, value in zip(rows, row, strict=True):
                rows[name].append(value)
            if split:
                queue.extend(item[2:])
                continue
            carried.append(choices[s.integer(0, len(choices) - 1)])
            for target in carried[-1]:
                weight = np.round(s.random.standard_normal(), 1 if rounded else 7)
                weight = float(np.float32(weight if sign is None else sign * abs(weight)))
                for name, value in zip(weights, [tree, place, target, weight], strict=True):
                    weights[name].append(value)
    attrs = {f"nodes_{name}": values for name, values in rows.items()}
    return attrs | {f"{what}_{name}": values for name, values in weights.items()}, carried


def _base(s: Sketch, *counts: int) -> dict[str, list[float]]:
    count = s.pick(0, *counts)
    return {"base_values": np.round(s.random.standard_normal(count), 1).astype(np.float32).tolist()} if count else {}


@strategy("tree_regressor_in_steps")
def forests(s: Sketch) -> Case:
    n, targets = s.integer(1, 5), s.integer(1, 2)
    s.input("x", "float32", np.round(s.values("float32", [n, 3]), 1))
    attrs, _ = _planted(s, targets, "target")
    attrs |= {"aggregate_function": s.pick("SUM", "AVERAGE", "MIN", "MAX"), "post_transform": post_transform(s)}
    attrs |= _base(s, targets)
    return ml_case(s, "TreeEnsembleRegressor", [n, targets], n_targets=targets, **attrs)


@strategy("tree_classifier_in_steps")
def classified(s: Sketch) -> Case:
    n, count = s.integer(1, 5), s.integer(2, 4)
    s.input("x", "float32", np.round(s.values("float32", [n, 3]), 1))
    attrs, carried = _planted(s, count, "class")
    attrs |= _base(s, *{2: (1, 2)}.get(count, (count,)))
    attrs["post_transform"] = post_transform(s)
    if count == 2 and len(set(attrs["class_ids"])) == 2 and len(attrs.get("base_values", [])) == 1:
        hypothesis.assume(all(item == [0, 1] for item in carried))  # else ONNX Runtime leaves a score as it was
    return ml_classifier(s, "TreeEnsembleClassifier", count, [n, count], "classlabels_int64s", **attrs)


@strategy("tree_ensemble_in_steps")
def ensembles(s: Sketch) -> Case:
    n = s.integer(1, 5)
    s.input("x", "float32", np.round(s.values("float32", [n, 3]), 1))
    inner: list[list[Any]] = []
    weights: list[float] = []

    def place(item: Any) -> tuple[int, int]:
        """Its number, and whether it is a leaf."""
        if not isinstance(item, tuple):
            weights.append(item)
            return len(weights) - 1, 1
        number = len(inner)
        inner.append([])
        inner[number] = [item[0], item[1], *place(item[2]), *place(item[3])]
        return number, 0

    roots = []
    for _ in range(s.integer(1, 3)):
        tree = _grow(s, 3)
        roots.append(place(tree if isinstance(tree, tuple) else (0, 0.5, tree, -tree))[0])
    names = ("featureids", "splits", "truenodeids", "trueleafs", "falsenodeids", "falseleafs")
    attrs: dict[str, Any] = {
        f"nodes_{name}": list(values) for name, values in zip(names, zip(*inner, strict=True), strict=True)
    }
    attrs["nodes_splits"] = gs.Constant("splits", np.asarray(attrs["nodes_splits"], np.float32))
    modes = s.random.integers(0, 4 if s.flag() else 1, len(inner)).astype(np.uint8)
    attrs["nodes_modes"] = gs.Constant("modes", modes)
    attrs["leaf_weights"] = gs.Constant("weights", np.asarray(weights, np.float32))
    attrs |= {"leaf_targetids": [0] * len(weights), "tree_roots": roots, "n_targets": 1}
    return ml_case(s, "TreeEnsemble", [n, 1], version=5, aggregate_function=s.integer(0, 3), **attrs)
