"""Classifiers of ai.onnx.ml, beyond what the rules' examples and strategies show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from bridge.target import resolve
from passes import rewrite
from passes.model import to_proto
from passes.rules import support_vectors
from passes.rules.machine_learning import ml_example
from tests.support import run_onnx
from tests.test_rule_families import check_declined

TARGET = resolve("tensorrt-rtx")


def _same_before_and_after(graph: gs.Graph, x: np.ndarray, rtol: float = 1e-5) -> None:
    before = run_onnx(to_proto(graph), {"x": x})
    log = rewrite(graph, TARGET)
    assert log.nodes and not log.declined, log.declined
    after = run_onnx(to_proto(graph), {"x": x})
    for name, wanted in before.items():
        np.testing.assert_allclose(after[name], wanted, rtol=rtol, atol=1e-6, err_msg=name)


def _votes_of_many(count: int, width: int, probable: bool) -> dict[str, Any]:
    random, pairs = np.random.default_rng(0), count * (count - 1) // 2
    attrs = {
        "classlabels_ints": list(range(count)),
        "vectors_per_class": [3] * count,
        "support_vectors": (500 + random.standard_normal(3 * count * width)).astype(np.float32).tolist(),
        "coefficients": random.standard_normal(3 * count * (count - 1)).astype(np.float32).tolist(),
        "rho": random.standard_normal(pairs).astype(np.float32).tolist(),
        "kernel_type": "RBF",
        "kernel_params": [1 / width, 0.0, 3.0],
    }
    fitted = {"prob_a": [-3.0] * pairs, "prob_b": random.standard_normal(pairs).astype(np.float32).tolist()}
    return attrs | (fitted if probable else {})


@pytest.mark.parametrize("most", [0, support_vectors.MOST_DIFFERENCES])
def test_distances_to_support_vectors_far_from_zero_keep_their_digits(most: int, monkeypatch) -> None:
    """Of |x|² - 2xv + |v|² nothing would be left at 500."""
    monkeypatch.setattr(support_vectors, "MOST_DIFFERENCES", most)
    attrs = _votes_of_many(4, 6, probable=False)
    x = (500 + np.random.default_rng(1).standard_normal([50, 6])).astype(np.float32)
    _same_before_and_after(ml_example("SVMClassifier", ["n", 6], ["n", 6], labels=True, **attrs), x, rtol=2e-4)


def test_probabilities_of_many_classes_end_where_onnx_runtimes_do() -> None:
    """Who seeks them until they are near, and no further."""
    count = support_vectors.MOST_CLASSES
    attrs = _votes_of_many(count, 5, probable=True)
    x = (500 + np.random.default_rng(1).standard_normal([200, 5])).astype(np.float32)
    graph = ml_example("SVMClassifier", ["n", 5], ["n", count], labels=True, **attrs)
    _same_before_and_after(graph, x, rtol=1e-3)


def test_probabilities_of_too_many_classes_are_declined_with_the_figure(tmp_path: Path) -> None:
    attrs = _votes_of_many(13, 2, probable=True)
    graph = ml_example("SVMClassifier", ["n", 2], ["n", 13], labels=True, **attrs)
    check_declined(graph, tmp_path, "svm_classifier_as_kernels", "13 classes")


def test_labels_that_are_strings_are_declined_with_the_way_out(tmp_path: Path) -> None:
    weights = {"coefficients": [1.0, -1.0], "intercepts": [0.0, 1.0], "classlabels_strings": ["cat", "dog"]}
    graph = ml_example("LinearClassifier", ["n", 1], ["n", 2], labels=True, **weights)
    graph.outputs[0].dtype = np.dtype(object)
    check_declined(graph, tmp_path, "linear_classifier_as_gemm", "train it with integers as labels")


def test_a_class_that_no_leaf_speaks_of_is_not_the_largest() -> None:
    """Its score is 0, more than those below it."""
    tree = {
        "nodes_treeids": [0],
        "nodes_nodeids": [0],
        "nodes_featureids": [0],
        "nodes_values": [0.0],
        "nodes_modes": ["LEAF"],
        "nodes_truenodeids": [0],
        "nodes_falsenodeids": [0],
        "class_treeids": [0, 0],
        "class_nodeids": [0, 0],
        "class_ids": [0, 2],
        "class_weights": [-0.5, -0.25],
        "classlabels_int64s": [5, 6, 7],
    }
    graph = ml_example("TreeEnsembleClassifier", ["n", 2], ["n", 3], labels=True, **tree)
    _same_before_and_after(graph, np.zeros([2, 2], np.float32))
