"""Every rule of the library, proved on its own examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from bridge import target as targets
from passes import all_rules, read, rewrite
from passes.framework import Rule
from passes.model import scopes, to_proto, write
from tests.support import example_inputs, fitted, parse, run_onnx

TARGETS = [targets.resolve(name) for name in ("tensorrt-rtx-1.7", "tensorrt-8.5")]

EXAMPLES = [
    pytest.param(rule, build, target, id=f"{rule.name}-{build.__name__}-{target.flavour}")
    for rule in all_rules().values()
    for build in rule.examples
    for target in TARGETS
    if rule.when(target)
]


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule.name) for rule in all_rules().values()])
def test_every_rule_has_an_example_and_a_reason(rule) -> None:
    assert rule.examples, f"{rule.name} has no example"
    assert any(rule.when(target) for target in TARGETS), f"{rule.name} applies to none of {[*map(str, TARGETS)]}"
    assert rule.reason.endswith("."), f"{rule.name}: its docstring's first line is no sentence: {rule.reason!r}"


def outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In ONNX Runtime, or in ONNX's reference evaluator where ONNX Runtime lacks an operator."""
    try:
        return run_onnx(model, feeds)
    except (ort_state.NotImplemented, ort_state.InvalidGraph, ort_state.Fail, ort_state.RuntimeException):
        names = [info.name for info in model.graph.output]
        return dict(zip(names, ReferenceEvaluator(model).run(None, feeds), strict=True))


def expected_of(rule: Rule, name: str, model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The true outputs of a rule's example."""
    if name not in rule.references:
        return outputs(model, feeds)
    names = [output.name for output in model.graph.output]  # ONNX Runtime has it wrong, or not at all
    return dict(zip(names, rule.references[name](feeds), strict=True))


@pytest.mark.parametrize(("rule", "build", "target"), EXAMPLES)
def test_a_rule_changes_its_example_and_not_what_it_computes(
    rule, build: Callable[[], gs.Graph], target, tmp_path: Path
) -> None:
    before = build()
    original = to_proto(before)
    known = all(node.domain or onnx.defs.has(node.op_type) for node in original.graph.node)
    if known:  # unlike SimplifiedLayerNormalization, which ONNX Runtime has put into ONNX's domain
        onnx.checker.check_model(original)
    feeds = example_inputs(original)
    expected = expected_of(rule, build.__name__, original, feeds)

    write(before, tmp_path / "before.onnx")
    after = read(tmp_path / "before.onnx")
    log = rewrite(after, target)
    assert rule.name in log.nodes, f"{rule.name} did not apply; declined: {log.declined}"

    write(after, tmp_path / "after.onnx")
    rewritten = onnx.load(tmp_path / "after.onnx")
    onnx.checker.check_model(rewritten)
    found = run_onnx(rewritten, fitted(rewritten, feeds))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=f"{rule.name}: output {name}")
        told = any(repr(name) in note for note in log.notes)
        assert found[name].dtype == array.dtype or str(array.dtype) not in target.types or told

    if target.flavour == "tensorrt-rtx":
        refused = parse(tmp_path / "after.onnx")
        assert not refused, f"TensorRT-RTX refuses what {rule.name} made: {refused}"


def test_rewriting_twice_changes_nothing_more() -> None:
    target = targets.resolve("tensorrt-rtx-1.7")
    for rule in all_rules().values():
        for build in rule.examples:
            graph = build()
            rewrite(graph, target)
            again = rewrite(graph, target)
            assert not again.changes, f"{rule.name}, {build.__name__}: {again.nodes}"
            assert all(node.name for scope in scopes(graph) for node in scope.nodes)
