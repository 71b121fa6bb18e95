"""Every rule on models drawn at random: it leaves the outputs what they were, or leaves the model alone.

    pytest tests/test_fuzz.py -k RULE                                   a few models of each, always the same
    pytest tests/test_fuzz.py -k RULE --hypothesis-profile=thorough     300 of each, and TensorRT-RTX's parser

Strategies are in tests/fuzzing/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by it
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from bridge import target as targets
from bridge.target import Target
from passes import Log, Rule, all_rules, rewrite
from passes.ir import is_reference
from passes.model import from_proto, numpy_dtype, to_proto
from tests.fuzzing import Arrays, Case, Sketch, all_strategies
from tests.fuzzing.parser import Parser
from tests.support import RTX_INSTALLED, fitted, run_onnx

TARGETS = [targets.resolve(name) for name in ("tensorrt-rtx-1.7", "tensorrt-8.5")]

ORT_LACKS = (ort_state.NotImplemented, ort_state.InvalidGraph)
ORT_FAILS = (ort_state.InvalidArgument, ort_state.Fail, ort_state.RuntimeException)
EVALUATOR_FAILS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}

LEAST_SHARE = 0.1
"""Of the models drawn for a rule, those that it has to have rewritten."""

RULES = [
    pytest.param(rule, target, id=f"{rule.name}-{target.flavour}-{target.version_text}")
    for rule in all_rules().values()
    for target in TARGETS
    if rule.when(target)
]


@pytest.fixture(scope="module")
def parser():
    with Parser() as child:
        yield child


def test_every_rule_has_a_strategy_and_every_strategy_a_rule() -> None:
    strategies, rules = set(all_strategies()), set(all_rules())
    assert not rules - strategies, f"rules without a strategy in tests/fuzzing/: {sorted(rules - strategies)}"
    assert not strategies - rules, f"strategies of no rule: {sorted(strategies - rules)}"


@pytest.mark.parametrize(("rule", "target"), RULES)
def test_a_rule_leaves_the_outputs_of_any_model_what_they_were(rule: Rule, target: Target, parser: Parser) -> None:
    sketch = all_strategies().get(rule.name)
    assert sketch is not None, f"{rule.name} has no strategy: write one in tests/fuzzing/"
    seen: Counter[str] = Counter()
    thorough = hypothesis.settings().max_examples >= 100

    @st.composite
    def cases(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
        return sketch(Sketch(draw, target))

    @hypothesis.given(cases())
    def prove(case: Case) -> None:
        original = to_proto(case.graph)
        expected = outputs_before(original, case)
        log, graph = rewritten_by_all(original, target)
        rewritten = to_proto(graph)
        what = "applied" if rule.name in log.nodes else "declined" if log.declined else "nothing to do"
        if what == "applied":
            check_still_valid(original, rewritten)
            feeds = fitted(rewritten, case.feeds)
            empty = any(array.size == 0 for array in (*feeds.values(), *expected.values()))
            found = outputs(rewritten, feeds, (*ORT_LACKS, *ORT_FAILS) if empty else ORT_LACKS)
            compare(expected, found, rewritten, case, target)
            if thorough and target.flavour == "tensorrt-rtx" and RTX_INSTALLED and case.builds and has_types(graph):
                refused = parser.refuses(rewritten)
                assert not refused, f"{refused}\n{onnx.printer.to_text(rewritten)}"
        hypothesis.event(what)
        seen[what] += 1

    prove()
    share = seen["applied"] / max(1, seen.total())
    assert share >= LEAST_SHARE, f"{rule.name} applied to too few of its models: {dict(seen)}"


def outputs_before(model: onnx.ModelProto, case: Case) -> Arrays:
    """The true outputs; a model that has none (indices out of range, say) is drawn again."""
    names = [info.name for info in model.graph.output]
    if case.reference is not None:
        return dict(zip(names, map(np.asarray, case.reference(case.feeds)), strict=True))
    try:
        found = outputs(model, case.feeds, (*ORT_LACKS, *ORT_FAILS))
    except EVALUATOR_FAILS:
        hypothesis.reject()
    hypothesis.assume(all(fits(found[tensor.name].shape, tensor.shape) for tensor in case.graph.outputs))
    return found


def fits(shape: tuple[int, ...], declared: list[int | str | None] | None) -> bool:
    """Whether an output has the shape that ONNX says it has; the evaluator does not know every attribute."""
    if declared is None:
        return True
    return len(shape) == len(declared) and all(
        not isinstance(wanted, int) or size == wanted for size, wanted in zip(shape, declared, strict=True)
    )


def outputs(model: onnx.ModelProto, feeds: Arrays, refusals: tuple[type[Exception], ...] = ORT_LACKS) -> Arrays:
    """In ONNX Runtime, or in ONNX's reference evaluator where ONNX Runtime refuses it."""
    kinds = [numpy_dtype(info.type.tensor_type.elem_type) for info in (*model.graph.input, *model.graph.output)]
    try:
        if all(kind.isbuiltin == 1 for kind in kinds):  # its binding knows no others
            return run_onnx(model, feeds)
    except refusals:
        pass
    names = [info.name for info in model.graph.output]
    return dict(zip(names, map(np.asarray, ReferenceEvaluator(model).run(None, feeds)), strict=True))


def check_still_valid(original: onnx.ModelProto, model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(original)
    except onnx.checker.ValidationError:  # an output of unknown rank, say
        return
    onnx.checker.check_model(model)


def rewritten_by_all(model: onnx.ModelProto, target: Target) -> tuple[Log, gs.Graph]:
    graph = from_proto(model)
    log = rewrite(graph, target)
    again = rewrite(graph, target)
    assert not again.changes, f"a second rewriting changed more: {again.nodes}"
    return log, graph


def has_types(graph: gs.Graph) -> bool:
    """Whether TensorRT-RTX has tensors of all the types at the model's boundary, and none of no elements."""
    kinds = {"uint8", *TARGETS[0].types}
    boundary = [*graph.inputs, *graph.outputs]
    inner = [tensor for node in graph.nodes for tensor in (*node.inputs, *node.outputs) if not tensor.is_empty()]
    if any(map(is_reference, graph.functions)):
        return False  # plugins are registered in the process that builds, and not here
    return all(tensor.dtype is None or np.dtype(tensor.dtype).name in kinds for tensor in boundary) and not any(
        0 in (tensor.shape or ()) for tensor in (*boundary, *inner)
    )


def compare(expected: Arrays, found: Arrays, model: onnx.ModelProto, case: Case, target: Target) -> None:
    assert list(found) == list(expected)
    for name, wanted in expected.items():
        got = found[name]
        assert got.shape == wanted.shape, f"{name}: shape {got.shape}, not {wanted.shape}\n{text(model)}"
        plain = wanted.dtype != np.int8 or target.strongly_typed  # else int8 is for quantised numbers
        if wanted.dtype.name in target.types and plain:
            assert got.dtype == wanted.dtype, f"{name}: {got.dtype}, not {wanted.dtype}\n{text(model)}"
        elif got.dtype == np.int32 and wanted.dtype.kind in "iu":  # of 64 bits, what 32 can hold
            wanted = wanted.astype(np.int32)
        elif wanted.dtype.name != "float64":  # a wider type holds it: of uint64, the bits
            got = got.astype(wanted.dtype)
        if wanted.dtype.name not in TOLERANCE:
            np.testing.assert_array_equal(got, wanted, err_msg=f"{name}\n{text(model)}")
            continue
        left, right = got.astype(np.float64), wanted.astype(np.float64)
        scale = max(1.0, float(np.abs(right[np.isfinite(right)]).max(initial=0)))
        bound = (case.tolerance or TOLERANCE[wanted.dtype.name]) * scale
        np.testing.assert_allclose(left, right, rtol=0, atol=bound, err_msg=f"{name}\n{text(model)}")


def text(model: onnx.ModelProto) -> str:
    return str(onnx.printer.to_text(model))
