"""The passes: what each promises, shown on small models that ONNX Runtime runs before and after."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bridge import target as targets
from passes import Log, ModelError, PassError, rewrite
from passes.engine import run_rules
from passes.framework import Builder, Rule, always, example
from passes.ir import node_metadata
from passes.model import from_proto, scopes, to_proto
from passes.provenance import SCOPES, STACK, origin_of
from tests.support import example_inputs, fitted, parse, run_onnx

RTX = targets.resolve("tensorrt-rtx-1.7")
OLD = targets.resolve("tensorrt-8.5")


def model(text: str, opset: int = 20, ir_version: int = 9, header: str = "") -> onnx.ModelProto:
    """A model in ONNX's text form, without its header."""
    return onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}{header}]> {text}')


def inputs(source: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in example_inputs(source).items()}


@dataclass
class Rewritten:
    graph: gs.Graph
    log: Log
    model: onnx.ModelProto

    @property
    def ops(self) -> list[str]:
        """The operators that are left, those of bodies and functions after the others."""
        return [node.op for scope in scopes(self.graph) for node in scope.nodes]


def rewritten(
    source: onnx.ModelProto,
    *feeds: Mapping[str, np.ndarray],
    target: targets.Target = RTX,
    shapes: Mapping[str, list[int | str]] | None = None,
    run: Callable[[onnx.ModelProto, dict[str, np.ndarray]], dict[str, np.ndarray]] = run_onnx,
) -> Rewritten:
    """``source`` after the passes, which must not have changed what it computes of each of ``feeds``."""
    graph = from_proto(onnx.ModelProto.FromString(source.SerializeToString()))
    log = rewrite(graph, target, shapes)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    for feed in feeds or (inputs(source),):
        given = fitted(after, dict(feed))  # kept: an output that is an input may share its memory
        expected, found = run(source, dict(feed)), run(after, given)
        assert list(found) == list(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=f"{name} of {after.graph}")
    again = rewrite(graph, target)
    assert not again.changes, f"the passes do not come to rest: {again.nodes}"
    return Rewritten(graph, log, after)


# --- folding -----------------------------------------------------------------------------------------------------


def test_arithmetic_on_constants_is_done_once() -> None:
    done = rewritten(
        model("""main (float[3] x) => (float[3] y) <float[3] a = {1, 2, 3}> {
            b = Exp (a)  c = Constant <value_floats: floats = [1.0, 2.0, 4.0]> ()  d = Div (b, c)  y = Mul (x, d) }""")
    )
    assert done.ops == ["Mul"]


@pytest.mark.parametrize(
    "made",
    [
        "r = RandomNormal <shape: ints = [3]> ()",
        "r = RandomUniform <shape: ints = [3]> ()",
        "r = RandomNormalLike (a)",
        "r = RandomUniformLike (a)",
        "r = Bernoulli (a)",
        "i = Constant <value = float[1, 3] {1, 1, 1}> ()  m = Multinomial <sample_size = 3> (i)  r0 = Cast <to = 1> (m)"
        "  s = Constant <value_ints: ints = [3]> ()  r = Reshape (r0, s)",
        "p = Constant <value_float = 0.5> ()  t = Constant <value = bool {1}> ()  r, k = Dropout (a, p, t)",
        "s = Constant <value_float = 0.5> ()  z = Constant <value = int8 {0}> ()  q = QuantizeLinear (a, s, z)"
        "  r = DequantizeLinear (q, s, z)",
    ],
    ids=["normal", "uniform", "normal-like", "uniform-like", "bernoulli", "multinomial", "dropout", "quantise"],
)
def test_random_numbers_and_quantisation_are_never_folded(made: str) -> None:
    source = model(f"main (float[3] x) => (float[3] y) <float[3] a = {{0.5, 0.5, 0.5}}> {{ {made}  y = Add (x, r) }}")
    graph = from_proto(source)
    kept = {node.op for node in graph.nodes} - {"Constant", "Add", "Cast", "Reshape"}
    rewrite(graph, RTX)
    assert kept <= {node.op for node in graph.nodes}, f"{kept} became {[node.op for node in graph.nodes]}"


def test_a_big_constant_that_is_generated_stays_generated() -> None:
    done = rewritten(
        model("""main (float[1, 1] x) => (float[n, m] y)
            <int64[2] size = {4000, 4000}, float one = {1}, int64[1] two = {2}> {
            half = Div (size, two)  all = Mul (half, two)
            zeros = ConstantOfShape (all)  ones = Add (zeros, one)  y = Add (x, ones) }""")
    )
    assert "ConstantOfShape" in done.ops
    assert sum(item.ByteSize() for item in done.model.graph.initializer) < 1000


def test_constants_are_folded_in_bodies_across_their_borders_and_in_functions() -> None:
    done = rewritten(
        model(
            """main (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
                v = Neg (w)
                p = If (c) <then_branch = t () => (float[2] o) <float[2] k = {3, 4}> { m = Mul (v, k)  o = Add (x, m) },
                            else_branch = e () => (float[2] o) { m = Abs (v)  o = Sub (x, m) }>
                y = fun.f (p) }
            <domain: "fun", opset_import: ["" : 20]>
            f (x) => (y) { a = Constant <value = float[2] {5, 6}> ()  b = Neg (a)  y = Add (x, b) }""",
            header=', "fun" : 1',
        ),
        *({"x": np.array([7, 8], np.float32), "c": np.array(condition)} for condition in (True, False)),
    )
    assert sorted(done.ops) == ["Add", "Add", "If", "Sub", "f"], done.ops


def test_what_onnx_runtime_lacks_is_left_and_the_rest_folded() -> None:
    source = model(
        """main (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            b = Neg (a)  d = my.ops.Unknown (b)  e = Add (b, d)  y = Add (x, e) }""",
        header=', "my.ops" : 1',
    )
    graph = from_proto(source)
    rewrite(graph, RTX)
    assert [node.op for node in graph.nodes] == ["Unknown", "Add", "Add"]
    np.testing.assert_array_equal(graph.nodes[0].inputs[0].values, [-1, -2])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16])
def test_constants_of_every_float_type_fold_exactly(dtype: Any) -> None:
    values = np.array([0.5, -1.5, 3, 24], np.float32).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["w", "shape"], ["r"], "reshape"),
            helper.make_node("Cast", ["r"], ["f"], "cast", to=TensorProto.FLOAT),
            helper.make_node("Cast", ["s"], ["b"], "back", to=kind),
            helper.make_node("my.Op", ["x", "f", "b"], ["y"], "read", domain="my.ops"),
        ],
        "types",
        [helper.make_tensor_value_info("x", 1, [2])],
        [helper.make_tensor_value_info("y", 1, [2])],
        [
            numpy_helper.from_array(values, "w"),
            numpy_helper.from_array(np.array([2, 2]), "shape"),
            numpy_helper.from_array(np.array([0.25, 2], np.float32), "s"),
        ],
    )
    source = helper.make_model(
        graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("my.ops", 1)]
    )
    result = from_proto(source)
    rewrite(result, RTX)
    (node,) = result.nodes
    np.testing.assert_array_equal(node.inputs[1].values, values.astype(np.float32).reshape(2, 2))
    assert node.inputs[2].dtype == np.dtype(dtype) and list(node.inputs[2].values) == [0.25, 2]


def test_a_constant_that_is_an_output_keeps_its_node_and_name() -> None:
    done = rewritten(
        model("""main (float[2] x) => (float[2] y, float[2] b) <float[2] a = {1, 2}> { b = Neg (a)  y = Add (x, b) }""")
    )
    assert [item.name for item in done.model.graph.output] == ["y", "b"]


@pytest.mark.parametrize(
    ("read", "ops"),
    [
        ("i = Constant <value_int = 1> ()  g = Gather (s, i)  f = Cast <to = 1> (g)  y = Mul (x, f)", ["Mul"]),
        ("i = Constant <value_ints: ints = [1]> ()  g = Gather (s, i)  f = Cast <to = 1> (g)  y = Mul (x, f)", ["Mul"]),
        (
            "i = Constant <value_ints: ints = [-1]> ()  z = Constant <value_ints: ints = [0]> ()  g = Gather (s, i)"
            "  q = Squeeze (g, z)  u = Unsqueeze (q, z)  m = Constant <value_ints: ints = [-1]> ()"
            "  c = Concat <axis = 0> (m, u)  r = Reshape (x, c)  y = Identity (r)",
            ["Reshape"],
        ),
        ("h = Shape <start = 1> (x)  f = Cast <to = 1> (h)  y = Mul (x, f)", ["Mul"]),
        ("z = Size (s)  f = Cast <to = 1> (z)  y = Mul (x, f)", ["Mul"]),
    ],
)
def test_what_is_static_of_a_dynamic_shape_is_folded_with_its_rank(read: str, ops: list[str]) -> None:
    done = rewritten(model(f"main (float[n, 4] x) => (float[n, 4] y) {{ s = Shape (x)  {read} }}"))
    assert done.ops == ops


def test_shapes_that_the_caller_pins_reach_every_node() -> None:
    source = model("""main (float[n, m] x) => (float[k] y) {
        s = Shape (x)  p = ReduceProd <keepdims = 1> (s)  y = Reshape (x, p) }""")
    done = rewritten(source, {"x": np.ones((2, 3), np.float32)}, shapes={"x": [2, 3]})
    assert done.ops == ["Reshape"] and done.graph.outputs[0].shape == [6]


# --- branches ----------------------------------------------------------------------------------------------------


def test_nested_ifs_on_ranks_and_shapes_are_decided() -> None:
    """As the older exporter writes squeeze(): an If on whether the axis has size 1, in one on the rank."""
    done = rewritten(
        model("""main (float[n, 1] x) => (float[a] y, float[n, 1] z) {
            s = Shape (x)  r = Size (s)  two = Constant <value_int = 2> ()  is = Equal (r, two)
            y, z = If (is) <then_branch = t () => (float[a] o, float[n, 1] p) {
                one = Constant <value_int = 1> ()  d = Gather (s, one)  flat = Equal (d, one)
                o = If (flat) <then_branch = tt () => (float[b] q) { ax = Constant <value_ints: ints = [1]> ()
                                                                     n = Neg (x)  q = Squeeze (n, ax) },
                               else_branch = te () => (float[b] q) { q = Identity (x) }>
                p = Abs (x) },
              else_branch = e () => (float[a] o, float[n, 1] p) { o = Identity (x)  p = Identity (x) }> }""")
    )
    assert "If" not in done.ops and {"Neg", "Squeeze", "Abs"} <= set(done.ops)
    assert done.log.nodes["take_branches"]


def test_an_if_inside_a_loop_and_inside_a_function_is_decided() -> None:
    done = rewritten(
        model(
            """main (float[2] x, int64 n) => (float[2] y) <bool yes = {1}> {
                h = Exp (x)
                l = Loop (n, yes, x) <body = b (int64 i, bool go, float[2] s) => (bool again, float[2] o) {
                    again = Identity (go)
                    o = If (yes) <then_branch = t () => (float[2] q) { q = Add (s, h) },
                                  else_branch = e () => (float[2] q) { q = Sub (s, h) }> }>
                y = fun.f (l) }
            <domain: "fun", opset_import: ["" : 20]>
            f (x) => (y) { c = Constant <value = bool {0}> ()
                y = If (c) <then_branch = t () => (q) { q = Neg (x) }, else_branch = e () => (q) { q = Abs (x) }> }""",
            header=', "fun" : 1',
        ),
        {"x": np.array([-9, 2], np.float32), "n": np.array(3)},
    )
    assert "If" not in done.ops and "Abs" in done.ops and "Sub" not in done.ops


def test_a_branch_may_return_one_tensor_twice_an_outer_one_or_a_constant() -> None:
    done = rewritten(
        model("""main (float[2] x) => (float[2] a, float[2] b, float[2] c, float[2] d) <bool yes = {1}> {
            h = Neg (x)
            a, b, c, d = If (yes) <
                then_branch = t () => (float[2] o, float[2] o2, float[2] p, float[2] q) {
                    o = Abs (h)  o2 = Identity (o)  p = Identity (h)  q = Constant <value = float[2] {3, 4}> () },
                else_branch = e () => (float[2] o, float[2] o2, float[2] p, float[2] q) {
                    o = Identity (x)  o2 = Identity (x)  p = Identity (x)  q = Identity (x) }> }""")
    )
    assert "If" not in done.ops


def test_a_branch_not_taken_holds_nothing_back() -> None:
    done = rewritten(
        model("""main (float[2] x) => (float[2] y) <bool yes = {1}> {
            only_else = Exp (x)
            y = If (yes) <then_branch = t () => (float[2] o) { o = Abs (x) },
                          else_branch = e () => (float[2] o) { o = Neg (only_else) }> }""")
    )
    assert "Exp" not in done.ops


# --- sanitising --------------------------------------------------------------------------------------------------


def test_unnamed_and_equally_named_nodes_get_names_of_their_own() -> None:
    source = model("""main (float[2] x, bool c) => (float[2] y) { [same] a = Neg (x)  [same] b = Abs (a)  d = Exp (b)
        y = If (c) <then_branch = t () => (float[2] o) { [same] o = Neg (d) },
                    else_branch = e () => (float[2] o) { o = Abs (d) }> }""")
    graph = from_proto(source)
    rewrite(graph, RTX)
    names = [node.name for scope in scopes(graph) for node in scope.nodes]
    assert all(names) and len(set(names)) == len(names) and "same" in names, names


def test_unsorted_nodes_are_sorted_also_where_a_body_reads_what_comes_later() -> None:
    source = model("""main (float[2] x, bool c) => (float[2] y) {
        h = Neg (x)
        p = If (c) <then_branch = t () => (float[2] o) { k = Abs (h)  o = Exp (k) },
                    else_branch = e () => (float[2] o) { o = Abs (x) }>
        y = Sqrt (p) }""")
    shuffled = onnx.ModelProto.FromString(source.SerializeToString())
    nodes = [shuffled.graph.node[index] for index in (2, 1, 0)]
    inner = nodes[1].attribute[0].g
    swapped = [inner.node[1], inner.node[0]]
    for holder, ordered in ((inner, swapped), (shuffled.graph, nodes)):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del holder.node[:]
        holder.node.extend(copies)
    graph = from_proto(shuffled)
    rewrite(graph, RTX)
    assert [node.op for node in graph.nodes] == ["Neg", "If", "Sqrt"]
    for condition in (True, False):
        feeds = {"x": np.array([-1, 2], np.float32), "c": np.array(condition)}
        np.testing.assert_allclose(run_onnx(to_proto(graph), feeds)["y"], run_onnx(source, feeds)["y"])


def test_a_circle_is_an_error_that_names_its_nodes() -> None:
    source = model("main (float[2] x) => (float[2] y) { [one] a = Add (x, b)  [two] b = Neg (a)  [three] y = Abs (x) }")
    with pytest.raises(ModelError, match=r"2 nodes depend on each other.*Add one, Neg two"):
        rewrite(from_proto(source), RTX)


def test_axes_of_unknown_size_are_not_taken_for_equal() -> None:
    source = model("main (float[a, 3] x, float[a, 3] z) => (float[b, 3] y) { p = Neg (x)  y = Add (p, z) }")
    for info in source.graph.input:
        info.type.tensor_type.shape.dim[0].dim_param = "?"
    done = rewritten(source)
    first, second = (tensor.shape[0] for tensor in done.graph.inputs)
    assert "?" not in (first, second) and first != second


@pytest.mark.parametrize(("opset", "expected"), [(11, 8), (17, 8), (20, 9), (21, 10)])
def test_the_ir_version_is_the_oldest_that_the_opset_needs(opset: int, expected: int) -> None:
    graph = from_proto(model("main (float[2] x) => (float[2] y) { y = Neg (x) }", opset=opset, ir_version=13))
    rewrite(graph, RTX)
    assert to_proto(graph).ir_version == expected


# --- types -------------------------------------------------------------------------------------------------------


def double_model() -> onnx.ModelProto:
    return model(
        f"""main (double[2] x, int64 n, bool c) => (double[2] y, double[k, 2] all, double[2, 2] e)
            <double[2] w = {{1, 2}}, bool yes = {{1}}> {{
            y0, all = Loop (n, yes, x) <body = b
                    (int64 i, bool go, double[2] s) => (bool again, double[2] o, double[2] seen)
                    <double[2] k = {{0.5, 0.25}}> {{
                again = Identity (go)
                m = Mul (s, k)
                o = If (c) <then_branch = t () => (double[2] q) {{ q = Add (m, w) }},
                            else_branch = z () => (double[2] q) {{ i1 = Cast <to = 11> (i)  q = Sub (m, i1) }}>
                seen = Neg (o) }}>
            size = Constant <value_ints: ints = [2]> ()
            fill = ConstantOfShape <value = double[1] {{3}}> (size)
            y1 = Add (y0, fill)
            h = fun.f <kind = {TensorProto.DOUBLE}> (x)
            y2 = Add (y1, h)
            seq = SequenceConstruct (y2, w)
            pos = Constant <value_int = 0> ()
            y = SequenceAt (seq, pos)
            shape2 = Constant <value_ints: ints = [2, 2]> ()
            like = ConstantOfShape <value = int32[1] {{0}}> (shape2)
            e = EyeLike <dtype = 11> (like) }}
        <domain: "fun", opset_import: ["" : 20]>
        f <kind> (x) => (y) {{ h = Cast <to = 1> (x)  y = Cast <to: int = @kind> (h) }}""",
        header=', "fun" : 1',
    )


@pytest.mark.parametrize("condition", [True, False])
def test_float64_becomes_float32_in_bodies_functions_sequences_and_attributes(condition: bool) -> None:
    feeds = {"x": np.array([1, 2], np.float64), "n": np.array(3), "c": np.array(condition)}
    done = rewritten(double_model(), feeds)
    assert TensorProto.DOUBLE not in {info.type.tensor_type.elem_type for info in done.model.graph.output}
    for scope in scopes(done.graph):
        for node in scope.nodes:
            kinds = {tensor.dtype for tensor in (*node.inputs, *node.outputs)}
            assert np.dtype(np.float64) not in kinds, f"{node.op} {node.name}"
    notes = [note for note in done.log.notes if "float64" in note]
    assert [note.split("'")[1] for note in notes] == ["x", "y", "all", "e"]


def test_numbers_beyond_float32_stay_finite() -> None:
    source = model("main (double[2] x) => (double[2] y) <double[2] w = {1e300, -1e300}> { y = Min (x, w) }")
    graph = from_proto(source)
    rewrite(graph, RTX)
    limits = np.finfo(np.float32)
    np.testing.assert_array_equal(graph.nodes[0].inputs[1].values, np.array([limits.max, limits.min]))


def test_int64_outputs_become_int32_where_the_target_has_no_int64_and_inputs_are_the_parsers_affair() -> None:
    source = model("""main (int64[2] i, int64[2] same) => (int64[2] j, int64[2] same, int64[1] k, int64[2] w)
        <int64[2] w = {5, 6}> {
        j = Add (i, i)  one = Constant <value_ints: ints = [0]> ()  k = Gather (j, one) }""")
    done = rewritten(source, {"i": np.array([1, 2]), "same": np.array([3, 4])}, target=OLD)
    boundary = (*done.model.graph.input, *done.model.graph.output)
    narrow = [info.name for info in boundary if info.type.tensor_type.elem_type == TensorProto.INT32]
    assert narrow == ["j", "k", "w"] and len(boundary) == 6
    assert any("input 'i' is int64 in the source" in note for note in done.log.notes), done.log.notes


def test_a_constant_beyond_int32_is_told_unless_the_last_int32_stands_in_for_it() -> None:
    source = model("""main (int64[1] i) => (int64[1] j, int64[1] k) <int64[1] w = {4294967296}> {
        j = Min (i, w)  k = Add (i, w) }""")
    log = rewrite(from_proto(source), OLD)
    told = [(where, reason) for (rule, _), (where, reason) in log.declined.items() if rule == "int64_range"]
    assert len(told) == 1 and told[0][0].startswith("Add") and "4294967296" in told[0][1], told


# --- expanding ---------------------------------------------------------------------------------------------------


def with_origin(source: onnx.ModelProto, op: str) -> onnx.ModelProto:
    for node in source.graph.node:
        if node.op_type == op:
            node.metadata_props.add(key=SCOPES, value="['', 'head.loss', 'node']")
            node.metadata_props.add(key=STACK, value='File "/me/net.py", line 12, in forward')
    return source


@pytest.mark.parametrize(
    ("op", "source"),
    [
        (
            "SoftmaxCrossEntropyLoss",
            "main (float[3, 5] x, int64[3] t) => (float y, float[3, 5] p) { y, p = SoftmaxCrossEntropyLoss (x, t) }",
        ),
        (
            "LayerNormalization",
            """main (float[3, 4] x) => (float[3, 4] y, float[3, 1] m, float[3, 1] d) <float[4] g = {1, 2, 3, 4}> {
                y, m, d = LayerNormalization (x, g) }""",
        ),
        (
            "AffineGrid",
            """main (float[2, 2, 3] x) => (float[2, 4, 5, 2] y) <int64[4] size = {2, 3, 4, 5}> {
                y = AffineGrid <align_corners = 1> (x, size) }""",
        ),
        (
            "CenterCropPad",
            """main (float[6, 3] x) => (float[4, 5] y) <int64[2] size = {4, 5}> { y = CenterCropPad (x, size) }""",
        ),
    ],
    ids=lambda value: value if value.isalpha() else "",
)
def test_operators_that_the_target_lacks_become_those_that_define_them(op: str, source: str) -> None:
    done = rewritten(with_origin(model(source), op))
    assert op not in done.ops
    for scope in scopes(done.graph):
        for node in scope.nodes:
            assert node_metadata(node)["bridge.rule"], node.op
            assert str(origin_of(node.name, node_metadata(node))) == "head.loss, /me/net.py:12", node.op


def by_definition(source: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX says that the model computes; ONNX Runtime 1.23 applies softcap in another place."""
    names = [output.name for output in source.graph.output]
    return dict(zip(names, ReferenceEvaluator(source).run(None, feeds), strict=True))


@pytest.mark.parametrize(
    "call",
    [
        "y = Attention (q, k, v)",
        "y = Attention <is_causal = 1, scale = 0.3> (q, k, v)",
        "y = Attention (q, k, v, mask)",
        "y = Attention <softcap = 2.0> (q, k, v, mask)",
    ],
)
@pytest.mark.parametrize("opset", [23, 24])
def test_attention_is_expanded_in_every_form(call: str, opset: int) -> None:
    source = model(
        f"""main (float[1, 4, 3, 8] q, float[1, 2, 5, 8] k, float[1, 2, 5, 8] v, float[3, 5] mask)
            => (float[1, 4, 3, 8] y) {{ {call} }}""",
        opset=opset,
        ir_version=11,
    )
    assert "Attention" not in rewritten(source, run=by_definition).ops


def test_attention_with_past_and_present_is_expanded() -> None:
    source = model(
        """main (float[1, 3, 16] q, float[1, 3, 8] k, float[1, 3, 8] v, float[1, 2, 4, 4] pk, float[1, 2, 4, 4] pv)
            => (float[1, 3, 16] y, float[1, 2, 7, 4] nk, float[1, 2, 7, 4] nv) {
            y, nk, nv = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v, "", pk, pv) }""",
        opset=23,
        ir_version=11,
    )
    assert "Attention" not in rewritten(source, run=by_definition).ops


FUNCTIONS = """
<domain: "fun", opset_import: ["" : 20, "fun" : 1]>
outer <slope, power: float = 2.0> (x, gain) => (y) {
    a = fun.inner <alpha: float = @slope> (x)
    p = Constant <value_float: float = @power> ()
    y = Pow (a, p)
}
<domain: "fun", opset_import: ["" : 20]>
inner <alpha> (x) => (y) { h = LeakyRelu <alpha: float = @alpha> (x)  y = OPERATOR (h) }
"""


def test_functions_that_the_target_takes_stay_functions() -> None:
    source = model(
        "main (float[2] x) => (float[2] y) { y = fun.outer <slope = 0.5> (x) }" + FUNCTIONS.replace("OPERATOR", "Abs"),
        header=', "fun" : 1',
    )
    done = rewritten(source)
    assert done.graph.nodes[0].op == "outer" and len(done.graph.functions) == 2


def test_functions_with_an_operator_that_the_target_lacks_are_inlined_with_their_attributes() -> None:
    body = FUNCTIONS.replace(
        "y = OPERATOR (h)",
        "s = Constant <value_ints: ints = [1, 2, 2]> ()  r = Reshape (h, s)  d = Det (r)  t = Mul (h, d)  y = Abs (t)",
    )
    source = model(
        """main (float[4] x, float[1] g) => (float[4] y, float[4] z) {
            [call] y = fun.outer <slope = 0.5> (x, g)
            [call2] z = fun.outer <slope = 0.25, power = 3.0> (x) }"""
        + body,
        header=', "fun" : 1',
    )
    assert not RTX.takes("Det"), "the test needs an operator that the target lacks"
    feeds = {"x": np.array([-1, 2, 3, -4], np.float32), "g": np.ones(1, np.float32)}
    done = rewritten(with_origin(source, "outer"), feeds)
    assert not done.graph.functions and "Det" not in done.ops
    slopes = sorted(node.attrs["alpha"] for node in done.graph.nodes if node.op == "LeakyRelu")
    assert slopes == [0.25, 0.5]
    for node in done.graph.nodes:
        assert str(origin_of(node.name, node_metadata(node))) == "head.loss, /me/net.py:12", f"{node.op} {node.name}"


# --- rules -------------------------------------------------------------------------------------------------------


def run_rule(
    source: onnx.ModelProto, op: str, function: Callable[[gs.Node, Builder], Any], sweeps: int = 10
) -> tuple[gs.Graph, Log]:
    """Runs one rule to its fixed point and compares what the model computes."""
    expected = run_onnx(source, inputs(source))
    graph, log = from_proto(onnx.ModelProto.FromString(source.SerializeToString())), Log()
    function.__doc__ = "For a test."
    for _ in range(sweeps):
        if not run_rules(graph, [Rule(function, (op,), always)], RTX, log):
            break
    else:
        raise AssertionError(f"not at rest after {sweeps} sweeps")
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    found = run_onnx(after, inputs(source))
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, err_msg=name)
    return graph, log


def test_a_new_node_says_which_rule_made_it_and_where_the_old_one_came_from() -> None:
    def neg_as_mul(node: gs.Node, g: Builder) -> Any:
        return g.op.Mul(node.inputs[0], g.constant(np.float32(-1)))

    source = with_origin(model("main (float[2] x) => (float[2] y) { [n] h = Neg (x)  y = Exp (h) }"), "Neg")
    graph, log = run_rule(source, "Neg", neg_as_mul)
    made = graph.nodes[0]
    assert made.op == "Mul" and made.outputs[0].name == "h"
    assert node_metadata(made)["bridge.rule"] == "neg_as_mul"
    assert str(origin_of(made.name, node_metadata(made))) == "head.loss, /me/net.py:12"
    assert log.nodes == {"neg_as_mul": ["Neg n (head.loss, /me/net.py:12)"]}
    assert log.reasons == {"neg_as_mul": "For a test."}


def test_a_rule_that_declines_leaves_nothing_but_its_reason() -> None:
    def half_done(node: gs.Node, g: Builder) -> Any:
        g.op.Exp(node.inputs[0])
        g.decline("it is Tuesday")

    graph, log = run_rule(model("main (float[2] x) => (float[2] y) { [n] y = Neg (x) }"), "Neg", half_done)
    assert log.declined == {("half_done", "n"): ("Neg n", "it is Tuesday")}
    assert len(graph.inputs[0].outputs) == 1, "an abandoned node still reads the input"


def test_a_broken_rule_is_named_with_its_node() -> None:
    def broken(node: gs.Node, g: Builder) -> Any:
        return node.attrs["no such attribute"]

    def makes_nonsense(node: gs.Node, g: Builder) -> Any:
        return g.op.MatMul(node.inputs[0], g.constant(np.ones((7, 7), np.float32)))

    def loses_an_output(node: gs.Node, g: Builder) -> Any:
        return [g.op.Identity(node.inputs[0])]

    source = with_origin(model("main (float[2] x) => (float[2] y) { [n] y = Neg (x) }"), "Neg")
    for function, message in ((broken, "KeyError: 'no such attribute'"), (makes_nonsense, "Incompatible dimensions")):
        expected = rf"rule {function.__name__} broke on Neg n \(head.loss, .*net.py:12\): .*{message}"
        with pytest.raises(PassError, match=expected):
            run_rule(source, "Neg", function)
    source = model("main (float[4] x) => (float[2] y, float[2] z) { [n] y, z = Split <num_outputs = 2> (x) }")
    with pytest.raises(PassError, match="gives nothing for the output 'z', which is read"):
        run_rule(source, "Split", loses_an_output)


@pytest.mark.parametrize("rest", ["y = Neg (m)", "y = Identity (m)", "y = Add (m, m)"])
@pytest.mark.parametrize("outputs", ["float[2] y", "float[2] y, float[2] m", "float[2] m, float[2] y, float[2] h"])
@pytest.mark.parametrize("what", ["input", "constant", "output", "fresh"])
def test_any_tensor_can_replace_an_output(what: str, outputs: str, rest: str) -> None:
    """The graph's input, a constant, an output of another node, a new node's; read by nodes, returned, or both."""
    read = {"constant": "w", "input": "x"}.get(what, "h")
    source = model(
        f"main (float[2] x) => ({outputs}) <float[2] w = {{5, 6}}> {{ h = Exp (x)  m = Max ({read})  {rest} }}"
    )

    def max_of_one(node: gs.Node, g: Builder) -> Any:
        (x,) = node.inputs
        return g.op.Mul(x, g.constant(np.float32(1))) if what == "fresh" else x

    graph, log = run_rule(source, "Max", max_of_one)
    assert log.changes == 1 and "Max" not in [node.op for node in graph.nodes]


def test_two_outputs_can_become_one_tensor() -> None:
    def halves(node: gs.Node, g: Builder) -> Any:
        first = g.slice(node.inputs[0], [0], [1], [0], [1])
        return [first, first]

    for extra in ("", ", float[1] a", ", float[1] b", ", float[1] a, float[1] b"):
        source = model(f"""main (float[1] x) => (float[1] y{extra}) {{
            p = Abs (x)  j = Concat <axis = 0> (p, p)
            a, b = Split <num_outputs = 2> (j)  c = Add (a, b)  y = Exp (c) }}""")
        run_rule(source, "Split", halves)


def test_a_rule_reaches_consumers_and_nodes_in_bodies() -> None:
    def neg_as_mul(node: gs.Node, g: Builder) -> Any:
        return g.op.Mul(node.inputs[0], g.constant(np.float32(-1)))

    source = model("""main (float[2] x, bool c) => (float[2] y) {
        h = Neg (x)
        y = If (c) <then_branch = t () => (float[2] o) { o = Neg (h) },
                    else_branch = e () => (float[2] o) { k = Neg (x)  o = Add (h, k) }> }""")
    graph, log = run_rule(source, "Neg", neg_as_mul)
    assert log.changes == 3 and "Neg" not in [node.op for scope in scopes(graph) for node in scope.nodes]


def test_a_body_whose_output_becomes_an_outer_tensor_still_returns_it() -> None:
    def max_of_one(node: gs.Node, g: Builder) -> Any:
        return node.inputs[0]

    source = model("""main (float[2] x, bool c) => (float[2] y) {
        h = Exp (x)
        y = If (c) <then_branch = t () => (float[2] o) { o = Max (h) },
                    else_branch = e () => (float[2] o) { k = Neg (x)  o = Max (k) }> }""")
    graph, _ = run_rule(source, "Max", max_of_one)
    assert "Max" not in [node.op for scope in scopes(graph) for node in scope.nodes]


def test_rules_that_undo_each_other_are_an_error_and_no_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def there(node: gs.Node, g: Builder) -> Any:
        """One way."""
        return g.op.Sinh(node.inputs[0])

    def back(node: gs.Node, g: Builder) -> Any:
        """The other."""
        return g.op.Cosh(node.inputs[0])

    rules = {rule.name: rule for rule in (Rule(there, ("Cosh",), always), Rule(back, ("Sinh",), always))}
    monkeypatch.setattr("passes.all_rules", lambda: rules)
    with pytest.raises(PassError, match=r"do not come to rest.*back.*there"):
        rewrite(from_proto(model("main (float[2] x) => (float[2] y) { y = Cosh (x) }")), RTX)


# --- what nothing reads ------------------------------------------------------------------------------------------


def test_what_nothing_reads_goes_in_bodies_too() -> None:
    done = rewritten(
        model("""main (float[2] x, bool c) => (float[2] y) {
            dead = Exp (x)  dead2 = Neg (dead)  h = Sqrt (x)
            y = If (c) <then_branch = t () => (float[2] o) { k = Abs (h)  o = Neg (x) },
                        else_branch = e () => (float[2] o) { o = Abs (x) }> }""")
    )
    assert sorted(done.ops) == ["Abs", "If", "Neg"]


@pytest.mark.parametrize(
    ("text", "outputs"),
    [
        ("main (float[2, 2] x) => (float[2, 2] y) <float[2] g = {1, 1}> { y, m, d = LayerNormalization (x, g) }", 1),
        ("main (float[1, 1, 8] x) => (float[1, 1, 4] y) { y, i = MaxPool <kernel_shape = [2], strides = [2]> (x) }", 1),
    ],
)
def test_optional_outputs_that_nothing_reads_are_left_out(text: str, outputs: int, tmp_path: Any) -> None:
    done = rewritten(model(text))
    assert [len(node.outputs) for node in done.graph.nodes] == [outputs]
    onnx.save(done.model, tmp_path / "m.onnx")
    assert not parse(tmp_path / "m.onnx")


@pytest.mark.parametrize("kept", ["y", "h", "c", "h c"])
def test_unused_outputs_before_used_ones_become_empty(kept: str, tmp_path: Any) -> None:
    shapes = {"y": "float[3, 1, 1, 2]", "h": "float[1, 1, 2]", "c": "float[1, 1, 2]"}
    declared = ", ".join(f"{shapes[name]} {name}" for name in kept.split())
    source = model(f"""main (float[3, 1, 2] x, float[1, 8, 2] w, float[1, 8, 2] r) => ({declared}) {{
        y, h, c = LSTM <hidden_size = 2> (x, w, r) }}""")
    done = rewritten(source)
    names = [tensor.name for tensor in done.graph.nodes[0].outputs]
    wanted = [name if name in kept.split() else "" for name in ("y", "h", "c")]
    while not wanted[-1]:
        wanted.pop()
    assert names == wanted
    onnx.save(done.model, tmp_path / "m.onnx")
    refused = parse(tmp_path / "m.onnx")
    assert not refused, refused


# --- provenance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("node_add", {SCOPES: "['', 'encoder', 'encoder.layers.3', 'add']"}, "encoder.layers.3"),
        ("node_add", {SCOPES: "['', 'bridge_module', 'bridge_module.head', 'add']"}, "head"),
        ("node_add", {SCOPES: "['', 'add']"}, ""),
        ("node_add", {SCOPES: "not a list at all ("}, ""),
        ("node_add", {SCOPES: "{'a': 1}"}, ""),
        ("node_add", {SCOPES: "3"}, ""),
        ("/encoder/layers.3/attn/MatMul", {}, "encoder.layers.3.attn"),
        ("/bridge_module/fc/Gemm", {}, "fc"),
        ("model/dense/MatMul;other", {}, ""),
        ("", {}, ""),
        ("n", {STACK: 'File "/a/net.py", line 7, in forward\\n  x'}, "/a/net.py:7"),
        (
            "n",
            {
                STACK: 'File "/a/net.py", line 7, in forward\n x\n'
                'File "/v/lib/python3.11/site-packages/torch/nn/linear.py", line 125, in forward\n y'
            },
            "/a/net.py:7",
        ),
        (
            "n",
            {STACK: 'File "/v/site-packages/torch/nn/linear.py", line 125, in forward'},
            "/v/site-packages/torch/nn/linear.py:125",
        ),
        ("n", {STACK: "at com.example.Main(Main.java:3)"}, ""),
        ("n", {"some.other.tool": "x", "bridge.rule": "r"}, ""),
    ],
)
def test_a_node_knows_where_it_came_from(name: str, metadata: dict[str, str], expected: str) -> None:
    assert str(origin_of(name, metadata)) == expected


# --- speed -------------------------------------------------------------------------------------------------------


def test_a_model_of_many_nodes_is_rewritten_in_time_proportional_to_them() -> None:
    """What a transformer's export is made of; one constant is read by all, and a list is searched for each by mistake
    soon costs minutes. Of 20,000 nodes, reading, rewriting and writing took 3 to 5 s in 2026."""
    block = """
        s{n} = Shape (x{n})  i{n} = Gather (s{n}, zero)  u{n} = Unsqueeze (i{n}, axis)
        c{n} = Concat <axis = 0> (u{n}, rest)  r{n} = Reshape (x{n}, c{n})
        m{n} = MatMul (r{n}, w)  a{n} = Add (m{n}, one)  d{n} = Identity (a{n})
        k{n} = Cast <to = 1> (d{n})  x{next} = Add (k{n}, x{n})"""
    header = """main (float[n, 2, 4] x0) => (float[n, 2, 4] x{last}) <int64 zero = {{0}}, int64[1] axis = {{0}},
        int64[2] rest = {{2, 4}}, float[1] one = {{1}}, float[4, 4] w = {{1,2,3,4,1,2,3,4,1,2,3,4,1,2,3,4}}>"""
    seconds = {}
    for blocks in (100, 400):
        body = "".join(block.format(n=number, next=number + 1) for number in range(blocks))
        source = model(header.format(last=blocks) + "{" + body + "}")
        start = time.process_time()
        graph = from_proto(source)
        rewrite(graph, RTX)
        to_proto(graph)
        seconds[blocks] = time.process_time() - start
        assert "Cast" not in {node.op for node in graph.nodes}
    assert seconds[400] < 10 * seconds[100] + 0.5, f"four times the nodes took {seconds}"
    assert seconds[400] < 10, seconds


def test_a_batch_normalization_in_training_mode_keeps_the_outputs_that_it_has_to_have() -> None:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
        return g.op.BatchNormalization(x, ones, zeros, zeros, ones, training_mode=1, outputs=3)[0]

    graph = example({"x": ("float32", [2, 3, 4])}, build, opset=16)
    feeds = example_inputs(to_proto(graph))
    expected = run_onnx(to_proto(graph), feeds)
    rewrite(graph, RTX)
    [(name, before)], found = expected.items(), run_onnx(to_proto(graph), feeds)
    np.testing.assert_allclose(found[name], before, rtol=1e-6)
