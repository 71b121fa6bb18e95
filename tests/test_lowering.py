"""Models of newer opsets, brought down to the one that an old parser reads; or named, where they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from bridge import target as targets
from passes import Log, rewrite
from passes.framework import Builder, example
from passes.model import from_proto, scopes, to_proto, write
from tests.support import example_inputs, fitted, run_onnx

OLD = targets.resolve("tensorrt-8.5")
RTX = targets.resolve("tensorrt-rtx-1.7")

Build = Callable[..., gs.Tensor | Sequence[gs.Tensor]]


def lowered(graph: gs.Graph, target: targets.Target = OLD) -> tuple[onnx.ModelProto, Log]:
    """The rewritten model and the log; its outputs are those of before."""
    original = to_proto(graph)
    feeds = example_inputs(original)
    expected = run_onnx(original, feeds)
    after = from_proto(original)
    log = rewrite(after, target)
    model = to_proto(after)
    onnx.checker.check_model(model)
    found = run_onnx(model, fitted(model, feeds))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    return model, log


def opset(model: onnx.ModelProto) -> int:
    return next(item.version for item in model.opset_import if not item.domain)


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op for scope in scopes(from_proto(model)) for node in scope.nodes}


def model(text: str, opset: int = 20) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')


@pytest.mark.parametrize(("name", "limit"), [("8.5", 16), ("8.6", 17), ("9.1", 20), ("10.0", 20), ("10.9", None)])
def test_each_target_names_the_newest_opset_that_its_parser_reads(name: str, limit: int | None) -> None:
    assert targets.resolve(f"tensorrt-{name}").opset == limit


def test_a_model_that_the_parser_reads_keeps_its_opset() -> None:
    for target, version in ((OLD, 16), (RTX, 22)):
        graph = example({"x": ("float32", ["n", 4])}, lambda g, x: g.reduce("ReduceMean", x, [1]), version)
        assert opset(lowered(graph, target)[0]) == version


def test_a_model_becomes_one_of_the_older_opset_with_the_ir_version_of_its_time() -> None:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        y = g.op.Gelu(g.op.LayerNormalization(x, g.constant(np.ones(6, np.float32))), approximate="tanh")
        low, high = g.op.Split(g.op.Mish(y), outputs=2, axis=1, num_outputs=2)
        padded = g.op.Pad(g.op.Mul(low, high), [1, 1], None, [1])
        made: gs.Tensor = g.op.ReduceMax(padded, [-1], keepdims=0)
        return made

    made, log = lowered(example({"x": ("float32", ["n", 6])}, build, 20))
    assert opset(made) == 16 and made.ir_version == 8
    assert operators(made) <= OLD.operators
    assert not log.declined
    assert "lower_opset" in log.nodes


def test_bodies_of_control_flow_are_lowered_too() -> None:
    made, _ = lowered(
        from_proto(
            model("""main (float[4, 5] x, bool[1] c) => (float[4, 1] y) <int64[1] axes = {1}> {
                y = If (c) <
                    then_branch = yes () => (float[4, 1] a) { a = ReduceMax (x, axes) },
                    else_branch = no () => (float[4, 1] b) { b = ReduceMin (x, axes) }
                > }""")
        )
    )
    branches = [attribute.g.node[0] for node in made.graph.node for attribute in node.attribute]
    assert {node.op_type for node in branches} == {"ReduceMax", "ReduceMin"}
    assert all(len(node.input) == 1 and node.attribute[0].name in ("axes", "keepdims") for node in branches)


def test_local_functions_are_inlined_for_parsers_that_read_none() -> None:
    source = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20, "my" : 1]>
        main (float[2, 3] x) => (float[2, 1] y) { y = my.largest (x) }
        <domain: "my", opset_import: ["" : 20]>
        largest (a) => (b) { axes = Constant <value_ints: ints = [1]> ()  b = ReduceMax (a, axes) }""")
    made, _ = lowered(from_proto(source))
    assert not made.functions and operators(made) == {"ReduceMax"}


def test_a_node_without_an_older_form_is_named_and_the_model_keeps_its_opset() -> None:
    def build(g: Builder, x: gs.Tensor, axis: gs.Tensor) -> gs.Tensor:
        made: gs.Tensor = g.op.ReduceMax(g.op.CumProd(x, axis), [1])
        return made

    graph = example({"x": ("float32", [2, 3]), "axis": ("int32", [])}, build, 26)
    log = rewrite(graph, OLD)
    assert graph.opset == 26
    assert [node.op for node in graph.nodes] == ["CumProd", "ReduceMax"]
    assert len(graph.nodes[1].inputs) == 2, "half of the model was lowered"
    said = {where: reason for (rule, _), (where, reason) in log.declined.items() if rule == "lower_opset"}
    assert len(said) == 1 and "no CumProd" in next(iter(said.values())), said
    assert any("stays at opset 26" in note for note in log.notes), log.notes


def test_axes_that_are_computed_have_no_older_form() -> None:
    def build(g: Builder, x: gs.Tensor, axes: gs.Tensor) -> gs.Tensor:
        made: gs.Tensor = g.op.ReduceMax(x, axes)
        return made

    graph = example({"x": ("float32", [2, 3]), "axes": ("int64", [1])}, build)
    log = rewrite(graph, OLD)
    assert graph.opset == 20
    assert any(rule == "lower_opset" for rule, _ in log.declined), log.declined


def test_a_type_that_the_older_operator_lacks_is_cast_around_it() -> None:
    target = targets.Target("tensorrt", (8, 5), False, OLD.operators | {"IsInf"})
    graph = example({"x": ("float16", ["n", 3])}, lambda g, x: g.op.IsInf(x))
    made, log = lowered(graph, target)
    assert opset(made) == 16
    assert "cast_around_old_operators" in log.nodes


def test_bfloat16_is_computed_in_float32() -> None:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        weight = g.constant(np.full((4, 4), 0.5, ml_dtypes.bfloat16))
        made: gs.Tensor = g.op.Cast(g.op.MatMul(g.op.Cast(x, to=TensorProto.BFLOAT16), weight), to=TensorProto.FLOAT)
        return made

    graph = example({"x": ("float32", ["n", 4])}, build, 22)
    log = rewrite(graph, OLD)
    made = to_proto(graph)
    onnx.checker.check_model(made)
    assert opset(made) == 16 and "bfloat16_to_float32" in log.nodes
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = next(iter(run_onnx(made, {"x": x}).values()))
    np.testing.assert_array_equal(found, x @ np.full((4, 4), 0.5, np.float32))


def test_bfloat16_at_the_boundary_becomes_float32_and_is_told() -> None:
    graph = example({"x": ("bfloat16", [2, 3])}, lambda g, x: g.op.Neg(x))
    log = rewrite(graph, OLD)
    assert [tensor.dtype for tensor in (*graph.inputs, *graph.outputs)] == [np.float32, np.float32]
    assert sum("bfloat16 in the source" in note for note in log.notes) == 2, log.notes
    kept = example({"x": ("bfloat16", [2, 3])}, lambda g, x: g.op.Neg(x))
    rewrite(kept, RTX)
    assert kept.inputs[0].dtype == np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("value", "build", "told"),
    [
        (1 << 40, lambda g, x, w: g.op.Add(x, w), True),
        (1 << 40, lambda g, x, w: g.op.Where(g.op.Less(x, [3]), x, w), True),
        (1 << 40, lambda g, x, w: g.op.Min(x, w), False),
        (np.iinfo(np.int64).max, lambda g, x, w: g.op.Where(g.op.Less(x, [3]), x, w), False),
        (np.iinfo(np.int64).max, lambda g, x, w: g.op.Slice(x, [0], w), False),
        (7, lambda g, x, w: g.op.Add(x, w), False),
    ],
)
def test_an_int64_constant_beyond_int32_is_named_unless_its_end_stands_in_for_it(
    value: int, build: Build, told: bool
) -> None:
    graph = example({"x": ("int64", ["n"])}, lambda g, x: build(g, x, g.constant([value])))
    log = rewrite(graph, OLD)
    assert any(rule == "int64_range" for rule, _ in log.declined) == told, log.declined
    again = example({"x": ("int64", ["n"])}, lambda g, x: build(g, x, g.constant([value])))
    assert not any(rule == "int64_range" for rule, _ in rewrite(again, RTX).declined)


def test_arithmetic_on_the_callers_integers_is_noted_where_it_may_outgrow_int32() -> None:
    def noted(build: Build) -> bool:
        log = rewrite(example({"x": ("int64", ["n", 3])}, build), OLD)
        return any("must stay within int32" in note for note in log.notes)

    assert noted(lambda g, x: g.op.Mul(x, x))
    assert not noted(lambda g, x: g.op.Add(x, [1]))
    assert not noted(lambda g, x: g.op.Mul(g.op.Shape(x), [4]))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda g, x: g.op.Where(g.op.Less(x, g.constant(0.0)), g.constant(-np.inf), x), True),
        (lambda g, x: g.op.Softmax(g.op.Where(g.op.Less(x, g.constant(0.0)), g.constant(-np.inf), x)), False),
        (lambda g, x: g.op.Softmax(g.op.Add(x, g.constant(np.triu(np.full((4, 4), -np.inf, np.float32), 1)))), False),
        (
            lambda g, x: g.op.ReduceMax(
                g.op.Add(x, g.constant(np.triu(np.full((4, 4), -np.inf, np.float32), 1))), axes=[1]
            ),
            True,
        ),
        (lambda g, x: g.op.Softmax(g.op.Where(g.op.Equal(x, g.constant(-np.inf)), g.constant(0.0), x)), True),
        (lambda g, x: g.op.IsInf(g.op.Div(x, g.constant(2.0))), False),
    ],
)
def test_an_infinite_constant_is_told_unless_a_softmax_hides_it(build: Build, told: bool) -> None:
    def notes(target: targets.Target) -> list[str]:
        return rewrite(example({"x": ("float32", [4, 4])}, build, 13), target).notes

    assert any("1e38 where a constant is infinite" in note for note in notes(OLD)) == told
    assert not any("1e38" in note for note in notes(RTX))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...d,de->...e", [[2, 3, 4], [4, 5]]),
        ("ii->i", [[4, 4]]),
        ("ab,bc,cd->ad", [[2, 3], [3, 4], [4, 5]]),
        ("bhid,bhjd->bhij", [[2, 3, 4, 5], [2, 3, 6, 5]]),
        ("iij,jk->k", [[3, 3, 2], [2, 4]]),
    ],
)
def test_einsum_needs_no_einsum(equation: str, shapes: list[list[int]]) -> None:
    inputs: dict[str, Any] = {f"x{index}": ("float32", shape) for index, shape in enumerate(shapes)}
    made, _ = lowered(example(inputs, lambda g, *tensors: g.op.Einsum(*tensors, equation=equation), 18))
    assert "Einsum" not in operators(made)


def test_what_was_lowered_is_written_and_read_as_such(tmp_path: Path) -> None:
    graph = example({"x": ("float32", ["n", 4])}, lambda g, x: g.op.ReduceMean(x, [1]), 18)
    rewrite(graph, OLD)
    write(graph, tmp_path / "low.onnx")
    read_back = onnx.load(tmp_path / "low.onnx")
    assert opset(read_back) == 16
    assert {attribute.name for attribute in read_back.graph.node[0].attribute} == {"axes", "keepdims"}


def test_what_a_loop_carries_has_the_type_that_it_has_outside() -> None:
    made, _ = lowered(
        from_proto(
            model(
                """main (int64[1] n) => (float[2] y) <float[2] zero = {0, 0}, bool go = {1}, int64 one = {1}> {
                many = Squeeze (n)
                y = Loop (many, go, zero) <body = step (int64 i, bool c, carried) => (bool d, float[2] sum) {
                    d = Identity (c)
                    more = CastLike (one, carried)
                    sum = Add (carried, more)
                }>
                }""",
                19,
            )
        )
    )
    assert "CastLike" not in operators(made) and "Loop" in operators(made)


def test_the_oldest_form_of_topk_is_no_business_of_what_orders_integers() -> None:
    graph = from_proto(model("main (float[n, 6] x) => (float[n, 2] y, int64[n, 2] i) { y, i = TopK <k = 2> (x) }", 9))
    assert "topk_of_integers" not in rewrite(graph, OLD).nodes
