"""Every rule's examples on a GPU: what a rule makes computes in TensorRT's engine what the example computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from bridge.target import gpu_compute_capabilities, installed
from passes import all_rules, read, rewrite
from passes.model import to_proto, write
from tests.support import build, example_inputs, fitted, run_engine
from tests.test_rules import expected_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_compute_capabilities(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(installed("tensorrt") is None, reason="the Python package 'tensorrt' is not installed"),
]

BEYOND_2_24 = pytest.mark.xfail(reason="where TensorRT 8.5 fuses operators on integers, it rounds them as floats")
KNOWN = {
    "bitwise_and_as_remainders-and_of_two_tensors": BEYOND_2_24,
    "bitwise_and_as_remainders-and_with_masks": BEYOND_2_24,
    "bitwise_or_as_sum-or_with_a_mask_and_with_a_tensor": BEYOND_2_24,
    "topk_of_integers-the_largest_integers": BEYOND_2_24,
}

EXAMPLES = [
    pytest.param(rule, example, id=name, marks=KNOWN.get(name, ()))
    for rule in all_rules().values()
    for example in rule.examples
    for name in [f"{rule.name}-{example.__name__}"]
]


@pytest.mark.parametrize(("rule", "example"), EXAMPLES)
def test_an_engine_of_what_a_rule_made_computes_the_same(rule, example: Callable[[], gs.Graph], tmp_path: Path) -> None:
    target = installed("tensorrt")
    assert target is not None
    if not rule.when(target):
        pytest.skip(f"{target} does not need {rule.name}")
    graph = example()
    original = to_proto(graph)
    feeds = example_inputs(original)
    expected = expected_of(rule, example.__name__, original, feeds)
    write(graph, tmp_path / "before.onnx")
    after = read(tmp_path / "before.onnx")
    log = rewrite(after, target)
    write(after, tmp_path / "after.onnx")
    feeds = fitted(onnx.load(tmp_path / "after.onnx"), feeds)
    told = "; ".join(f"{which}: {why}" for which, why in log.declined.values())
    if any(name == "int64_range" for name, _ in log.declined):
        pytest.skip(told)
    plan, refused = build(tmp_path / "after.onnx", target, feeds)
    if plan is None and told:
        pytest.skip(f"{told}. TensorRT: {refused}")
    assert plan is not None, refused
    found = run_engine(plan, target, feeds, tmp_path)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=f"{rule.name}: output {name}")
