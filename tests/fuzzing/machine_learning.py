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


def _case(s: Sketch, op: str, out: list[int], result: Any = np.float32, version: int = 3, **attrs: Any) -> Case:
    def build(g: Builder, t: Tensors) -> gs.Tensor:
        y = gs.Variable("y", np.dtype(result), list(out))
        g.made.append(Node(op, op, attrs, list(t.values()), [y], domain=ML))
        return y

    case = s.model(build, opset=s.pick(15, 18))
    case.graph.import_domains = [onnx.helper.make_opsetid(ML, version)]
    return case


@strategy("feature_extractor_as_gather")
def extracted(s: Sketch) -> Case:
    sizes = s.sizes(2, 3)
    count = s.integer(1, 3)
    s.input("x", "float32", sizes)
    s.operand("places", s.random.integers(0, sizes[-1], [count]))
    return _case(s, "ArrayFeatureExtractor", [*sizes[:-1], count], "float32")


@strategy("binarizer_as_comparison")
def binarised(s: Sketch) -> Case:
    sizes = s.sizes(1, 3)
    s.input("x", "float32", sizes)
    return _case(s, "Binarizer", sizes, threshold=s.pick(0.0, 0.5, -1.0))


@strategy("scaler_as_arithmetic")
def scaled(s: Sketch) -> Case:
    n, width = s.integer(1, 4), s.integer(1, 4)
    s.input("x", s.pick("float32", "int32", "int64"), [n, width])
    if s.inputs["x"][0] != "float32":
        s.feeds["x"] = (s.feeds["x"] % 100).astype(s.feeds["x"].dtype)
    count = s.pick(1, width)
    offset, scale = (s.random.uniform(0.1, 2, count).astype(np.float32).tolist() for _ in range(2))
    return _case(s, "Scaler", [n, width], offset=offset, scale=scale)


@strategy("normalizer_as_quotient")
def normalised(s: Sketch) -> Case:
    sizes = s.sizes(1, 2)
    s.input("x", "float32", np.abs(s.values("float32", sizes)))
    return _case(s, "Normalizer", sizes, norm=s.pick("MAX", "L1", "L2"))


@strategy("imputer_as_choice")
def imputed(s: Sketch) -> Case:
    n, width = s.integer(1, 4), s.integer(1, 4)
    if s.flag():
        s.input("x", "int64", s.random.integers(0, 3, [n, width]))
        values = s.random.integers(0, 9, s.pick(1, width)).tolist()
        return _case(s, "Imputer", [n, width], np.int64, imputed_value_int64s=values, replaced_value_int64=1)
    missing = s.pick(float("nan"), 0.0)
    x = s.values("float32", [n, width])
    s.input("x", "float32", np.where(s.random.random(x.shape) < 0.3, missing, x).astype(np.float32))
    values = s.random.uniform(0, 1, s.pick(1, width)).astype(np.float32).tolist()
    return _case(s, "Imputer", [n, width], imputed_value_floats=values, replaced_value_float=missing)


@strategy("label_encoder_as_comparisons")
def encoded(s: Sketch) -> Case:
    sizes, count = s.sizes(0, 3), s.integer(1, 5)
    s.input("x", "int64", s.random.integers(0, 6, sizes))
    keys = s.random.permutation(6)[:count].tolist()
    values = s.random.uniform(0, 1, count).astype(np.float32).tolist()
    return _case(s, "LabelEncoder", sizes, keys_int64s=keys, values_floats=values, default_float=-7.0)


@strategy("linear_regressor_as_gemm")
def regressed(s: Sketch) -> Case:
    n, width, targets = (s.integer(1, 4) for _ in range(3))
    s.input("x", "float32", [n, width])
    weights = s.random.standard_normal(width * targets).astype(np.float32).tolist()
    attrs: dict[str, Any] = {"intercepts": s.random.standard_normal(targets).astype(np.float32).tolist()}
    return _case(s, "LinearRegressor", [n, targets], coefficients=weights, targets=targets, **attrs)


def _grow(s: Sketch, depth: int) -> Any:
    """A tree: a leaf (its weight), or a question (feature, limit, true, false)."""
    if depth == 0 or s.integer(0, 2) == 0:
        return float(np.float32(s.random.standard_normal()))
    limit = float(np.float32(np.round(s.random.standard_normal(), 1)))
    return (s.integer(0, 2), limit, _grow(s, depth - 1), _grow(s, depth - 1))


@strategy("tree_regressor_in_steps")
def forests(s: Sketch) -> Case:
    n = s.integer(1, 5)
    s.input("x", "float32", np.round(s.values("float32", [n, 3]), 1))
    rows: dict[str, list[Any]] = {
        name: [] for name in ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids")
    }
    leaves: dict[str, list[Any]] = {name: [] for name in ("treeids", "nodeids", "ids", "weights")}
    modes = s.pick(["BRANCH_LEQ"], ["BRANCH_LT"], ["BRANCH_LEQ", "BRANCH_GT", "BRANCH_EQ"])
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
            else:
                for name, value in zip(leaves, [tree, place, 0, item], strict=True):
                    leaves[name].append(value)
    attrs = {f"nodes_{name}": values for name, values in rows.items()}
    attrs |= {f"target_{name}": values for name, values in leaves.items()}
    aggregate = s.pick("SUM", "AVERAGE", "MIN", "MAX")
    return _case(s, "TreeEnsembleRegressor", [n, 1], n_targets=1, aggregate_function=aggregate, **attrs)


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
    return _case(s, "TreeEnsemble", [n, 1], version=5, aggregate_function=s.integer(0, 3), **attrs)
