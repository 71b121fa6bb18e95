"""Models for the rules of passes/rules/support_vectors.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import Case, Sketch, strategy
from .machine_learning import ml_case, ml_classifier, post_transform


def _numbers(s: Sketch, *sizes: int) -> list[float]:
    return s.random.standard_normal(int(np.prod(sizes))).astype(np.float32).tolist()


def _kernel(s: Sketch, vectors: int, width: int) -> dict[str, Any]:
    kind = s.pick("LINEAR", "POLY", "RBF", "SIGMOID")
    degree = float(s.pick(1, 2, 3, 5))
    attrs = {"kernel_type": kind, "kernel_params": [0.3, float(s.pick(0.0, 0.5)), degree]}
    return attrs | ({"support_vectors": _numbers(s, vectors, width)} if vectors else {})


@strategy("svm_regressor_as_kernels")
def regressed(s: Sketch) -> Case:
    n, width, vectors = s.integer(1, 4), s.integer(1, 4), s.integer(0, 5)
    s.input("x", "float32", [n, width])
    attrs = {"coefficients": _numbers(s, vectors or width), "rho": _numbers(s, 1), "post_transform": post_transform(s)}
    attrs |= _kernel(s, vectors, width) | {"n_supports": vectors, "one_class": s.integer(0, 1)}
    return ml_case(s, "SVMRegressor", [n, 1], **attrs)


@strategy("svm_classifier_as_kernels")
def classified(s: Sketch) -> Case:
    n, width, count = s.integer(1, 4), s.integer(1, 4), s.integer(2, 5)
    s.input("x", "float32", [n, width])
    pairs = count * (count - 1) // 2
    per_class = [s.integer(1, 3) for _ in range(count)] if s.flag() else []
    vectors = sum(per_class)
    attrs: dict[str, Any] = {"coefficients": _numbers(s, (count - 1) * vectors if vectors else count * width)}
    if not vectors and s.flag():
        attrs["coefficients"] = np.abs(attrs["coefficients"]).tolist()
    attrs |= {"rho": _numbers(s, pairs)} | _kernel(s, vectors, width)
    probable = s.flag()
    if probable:
        attrs |= {"prob_a": [-float(abs(a)) for a in _numbers(s, pairs)], "prob_b": _numbers(s, pairs)}
    if vectors:
        attrs["vectors_per_class"] = per_class
    attrs["post_transform"] = post_transform(s)
    scores = count if not vectors or probable or count == 2 else pairs
    return ml_classifier(s, "SVMClassifier", count, [n, scores], "classlabels_ints", **attrs)
