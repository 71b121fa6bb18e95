"""A float32 model in float16 or bfloat16: valid, close to what it was, cast once, and untouched where it has to be."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from bridge.build import build
from bridge.evaluator import evaluate
from bridge.target import resolve
from passes import read, write
from passes.casts import CastLog, cast
from passes.ir import Constant, Node, node_metadata, scopes
from passes.low_types import RoundedValues, extent, low_type, rounded
from passes.model import from_proto, to_proto
from tests.support import RTX, RTX_INSTALLED, example_inputs, run_onnx

LOWS = ("float16", "bfloat16")
CLOSE = {"float16": 5e-3, "bfloat16": 4e-2}
FLOATS = {1: "float32", 10: "float16", 16: "bfloat16"}


def parse(text: str, opset: int = 20) -> onnx.ModelProto:
    """The model of ``text`` in ONNX's own notation, its nodes named after what they make."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}, "own": 1, "mine": 1]>\n{text}')
    for node in all_nodes(model.graph):
        node.name = node.name or node.output[0]
    return filled(model)


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            found.extend(all_nodes(attribute.g))
    return found


def half(
    model: onnx.ModelProto, low: str, folder: Path, fp32: Collection[str] = (), **options: Any
) -> tuple[onnx.ModelProto, CastLog]:
    """The cast model, valid, with no Cast that only undoes another, and the same where it is cast again."""
    graph = from_proto(model)
    log = cast(graph, low, fp32, **options)
    write(graph, folder / "half.onnx")
    onnx.checker.check_model(str(folder / "half.onnx"), full_check=True)
    made = onnx.load(str(folder / "half.onnx"))
    makers = {name: node for node in all_nodes(made.graph) for name in node.output}
    for node in all_nodes(made.graph):
        if node.op_type == "Cast" and node.input[0] in makers:
            assert makers[node.input[0]].op_type != "Cast" or "asked" in node.name, node.name
    again = read(folder / "half.onnx")
    assert not cast(again, low, fp32, **options).changed
    assert to_proto(again).graph == to_proto(read(folder / "half.onnx")).graph
    return made, log


def types(model: onnx.ModelProto) -> dict[str, str]:
    """The type of each tensor that is of a floating-point type, by name."""
    found = {}
    for scope in scopes(from_proto(onnx.shape_inference.infer_shapes(model))):
        for tensor in (*scope.inputs, *scope.outputs, *(item for node in scope.nodes for item in node.outputs)):
            if tensor.dtype is not None and np.dtype(tensor.dtype).name in FLOATS.values():
                found[tensor.name] = np.dtype(tensor.dtype).name
    return found


def agrees(
    model: onnx.ModelProto, low: str, folder: Path, fp32: Collection[str] = (), feeds: Mapping[str, Any] | None = None
) -> onnx.ModelProto:
    """The cast model, whose outputs are near those of ``model``."""
    feeds = dict(feeds) if feeds is not None else example_inputs(model)
    expected = run_onnx(model, feeds)
    made, _ = half(model, low, folder, fp32)
    found = evaluate(folder / "half.onnx", [feeds])[0]
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        if array.dtype.kind != "f":
            np.testing.assert_array_equal(found[name], array, err_msg=name)
            continue
        scale = float(np.abs(array[np.isfinite(array)]).max(initial=1e-6))
        np.testing.assert_allclose(found[name] / scale, array / scale, atol=CLOSE[low], rtol=0, err_msg=name)
    return made


# --- types -------------------------------------------------------------------------------------------------------


CONV = """g (float[1,3,8,8] x) => (float[1,4,6,6] y)
<float[4,3,3,3] w, float[4] b> { h = Conv(x, w, b)  r = Relu(h)  y = Softmax<axis = 1>(r) }"""


def filled(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """With initializers of random values for the weights that the text only declares."""
    rng = np.random.default_rng(seed)
    made = {name for node in all_nodes(model.graph) for name in node.output}
    for item in [item for item in model.graph.value_info if item.name not in made]:
        shape = [dim.dim_value for dim in item.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(0.3)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, item.name))
        model.graph.value_info.remove(item)
    return model


@pytest.mark.parametrize("low", LOWS)
def test_what_can_be_low_is_low_and_the_boundary_keeps_its_types(low: str, tmp_path: Path) -> None:
    made = agrees(parse(CONV), low, tmp_path)
    found = types(made)
    assert found["x"] == found["y"] == "float32"
    assert found["h"] == found["r"] == low
    assert Counter(node.op_type for node in made.graph.node) == {"Conv": 1, "Relu": 1, "Softmax": 1, "Cast": 2}
    assert {item.name: FLOATS[item.data_type] for item in made.graph.initializer} == {"w": low, "b": low}


@pytest.mark.parametrize("low", LOWS)
def test_inputs_and_outputs_are_converted_where_that_is_asked(low: str, tmp_path: Path) -> None:
    text = """g (float[2,3] x, int64[2] i) => (float[2,3] y, float[2,3] x2, float[2,3] kept, int64[2] j)
    { a = Relu(x)  y = Neg(a)  x2 = Identity(x)  kept = Exp(a)  j = Identity(i) }"""
    made, _ = half(parse(text), low, tmp_path, {"kept"}, io="convert")
    for item in (*made.graph.input, *made.graph.output):
        wanted = "int64" if item.name in "ij" else low
        kind = onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
        assert kind.name == wanted, item.name
    assert [item.name for item in made.graph.output] == ["y", "x2", "kept", "j"]


@pytest.mark.parametrize("io", ["keep", "convert"])
def test_outputs_that_are_inputs_constants_or_read_inside_keep_their_names(io: Any, tmp_path: Path) -> None:
    model = parse(
        """g (float[2,2] x) => (float[2,2] y, float[2,2] x, float[2,2] w, float[2,2] z, float[2,2] v)
        <float[2,2] w> { y = MatMul(x, w)  z = MatMul(y, w)  v = Exp(y) }"""
    )
    made, _ = half(model, "float16", tmp_path, {"v"}, io=io)
    assert [item.name for item in made.graph.output] == ["y", "x", "w", "z", "v"]
    feeds = {"x": np.eye(2, dtype=np.float32) + 1}
    expected = run_onnx(model, feeds)
    for name, array in evaluate(tmp_path / "half.onnx", [feeds])[0].items():
        assert array.dtype == (np.float32 if io == "keep" else np.float16), name
        np.testing.assert_allclose(array, expected[name], rtol=5e-3, atol=1e-3, err_msg=name)


def test_an_initializer_that_both_types_read_is_there_once_in_each(tmp_path: Path) -> None:
    text = """g (float[2,2] x) => (float[2,2] y, float[2,2] z, float[2,2] v)
    <float[2,2] w> { y = MatMul(x, w)  z = MatMul(y, w)  v = MatMul(z, w) }"""
    made = agrees(parse(text), "float16", tmp_path, {"z"})
    assert sorted((item.name, FLOATS[item.data_type]) for item in made.graph.initializer) == [
        ("w", "float32"),
        ("w_float16", "float16"),
    ]


def test_one_cast_serves_all_readers(tmp_path: Path) -> None:
    text = """g (float[2,2] x) => (float[2,2] y, float[2,2] z)
    { a = Relu(x)  b = Exp(a)  c = Exp(a)  y = Add(b, c)  z = Mul(b, b) }"""
    made = agrees(parse(text), "float16", tmp_path, {"b", "c"})
    # x down, a up, b and c down, y and z up
    assert Counter(node.op_type for node in made.graph.node)["Cast"] == 6


def test_what_asks_only_for_a_shape_or_a_comparison_takes_what_there_is(tmp_path: Path) -> None:
    text = """g (float[2,3] x, float[2,3] t) => (int64[2] s, bool[2,3] b, bool[2,3] m, int64[2,1] k, int64[2,3] n)
    { a = Relu(x)  e = Exp(x)  s = Shape(a)  b = Greater(a, t)  m = Greater(a, e)  k = ArgMax<axis = 1>(a)
      n = Cast<to = 7>(a) }"""
    made = agrees(parse(text), "float16", tmp_path, {"e"})
    readers = {node.name: list(node.input) for node in made.graph.node}
    assert readers["s"] == readers["k"] == readers["n"] == ["a"]
    assert types(made)["a"] == "float16"
    assert [types(made)[name] for name in readers["m"]] == ["float32", "float32"], "a comparison loses no digits"


def test_integers_are_left_alone(tmp_path: Path) -> None:
    text = """g (float[N,4] x) => (float[M,2] y) <int64[1] two = {2}, int64[1] all = {-1}>
    { s = Shape(x)  c = Concat<axis = 0>(all, two)  q = Mul(s, s)  r = Reshape(x, c)  y = Relu(r) }"""
    made = agrees(parse(text), "bfloat16", tmp_path, feeds={"x": np.ones((3, 4), np.float32)})
    assert all(item.data_type == 7 for item in made.graph.initializer)


@pytest.mark.parametrize("low", LOWS)
def test_attributes_that_name_a_type_follow_the_output(low: str, tmp_path: Path) -> None:
    text = """g (int64[2] s, int64[2,2] i, bool[2,2] m) => (float[A,B] y)
    { c = ConstantOfShape<value: tensor = float[1] {1.5}>(s)  d = ConstantOfShape(s)  e = EyeLike<dtype = 1>(i)
      f = Cast<to = 1>(i)  g0 = Cast<to = 1>(m)  k = Constant<value: tensor = float[2,2] {1, 2, 3, 4}>()
      l = Constant<value_float = 0.25>()  n = Constant<value_floats = [1.0, 2.0]>()
      y = Sum(c, d, e, f, g0, k, l, n) }"""
    feeds = {"s": np.array([2, 2]), "i": np.arange(4).reshape(2, 2), "m": np.eye(2, dtype=bool)}
    made = agrees(parse(text, 22), low, tmp_path, feeds=feeds)
    found = types(made)
    assert {found[name] for name in "cdef"} == {low}
    assert Counter(node.op_type for node in made.graph.node)["Cast"] == 3, "two of the source, and the output's"
    assert "Constant" not in {node.op_type for node in made.graph.node}


@pytest.mark.parametrize("low", LOWS)
def test_optional_inputs_scales_and_statistics(low: str, tmp_path: Path) -> None:
    model = parse(
        """g (float[1,2,4,4] x) => (float[1,2,8,8] y)
        <float[4] up = {1, 1, 2, 2}, float high = {3.4e38}, float low = {-3.4e38}, float six = {0.6},
         float[2] s, float[2] b, float[2] m, float[2] v = {0.5, 1e-8}, float power = {2.2}>
        { a = Clip(x, , six)  c = Clip(a, low, high)  n = BatchNormalization(c, s, b, m, v)
          r = Resize<mode = "linear">(n, , up)  e = Abs(r)  y = Pow(e, power) }""",
        18,
    )
    made = agrees(model, low, tmp_path)
    kept = {item.name: FLOATS[item.data_type] for item in made.graph.initializer}
    assert kept["up"] == kept["v"] == kept["m"] == kept["power"] == "float32"
    assert types(made)["n"] == types(made)["r"] == low


def test_what_the_standard_does_not_allow_stays_in_float32(tmp_path: Path) -> None:
    text = """g (float x, float[4] z) => (float[N] y)
    <float one = {1}, float five = {5}> { r = Range(x, five, one)  a = Relu(r)  n = Celu(z)  s = ReduceSum(n)
      y = Mul(a, s) }"""
    made = agrees(parse(text), "float16", tmp_path, feeds={"x": np.array(1, np.float32), "z": np.ones(4, np.float32)})
    found = types(made)
    assert found["r"] == found["n"] == "float32"
    assert found["a"] == "float16"


def test_other_domains_are_given_float32(tmp_path: Path) -> None:
    graph = from_proto(parse("g (float[2,2] x) => (float[2,2] y) <float[2,2] w> "
                                    "{ a = MatMul(x, w)  b = own.Thing(a)  y = MatMul(b, w) }"))  # fmt: skip
    thing = next(node for node in graph.nodes if node.op == "Thing")
    thing.outputs[0].dtype, thing.outputs[0].shape = np.dtype(np.float32), [2, 2]
    cast(graph, "float16", ())
    assert [tensor.dtype for tensor in (*thing.inputs, *thing.outputs)] == [np.float32, np.float32]
    assert {str(tensor.dtype) for node in graph.nodes if node.op == "MatMul" for tensor in node.inputs} == {"float16"}


def test_a_tensor_whose_type_nobody_knows_is_given_to_nothing_low() -> None:
    graph = from_proto(parse("g (float[2,2] x) => (float[2,2] y) { a = own.Thing(x)  b = Mul(a, x)  y = Relu(b) }"))
    cast(graph, "float16", ())
    assert [str(tensor.dtype) for tensor in graph.outputs] == ["float32"]
    assert next(node for node in graph.nodes if node.op == "Mul").inputs[1].dtype == np.float32


def test_local_functions_are_cast_where_they_are_called(tmp_path: Path) -> None:
    model = parse(
        """g (float[2,2] x) => (float[2,2] y) <float[2,2] w> { a = mine.twice(x, w)  y = mine.twice(a, w) }
        <domain: "mine", opset_import: ["": 20]> twice (x, w) => (y) { h = MatMul(x, w)  y = MatMul(h, w) }"""
    )
    made = agrees(model, "bfloat16", tmp_path)
    assert not made.functions
    assert Counter(node.op_type for node in made.graph.node) == {"MatMul": 4, "Cast": 2}


def test_nodes_keep_their_metadata_and_casts_have_their_makers() -> None:
    model = parse(CONV)
    for node in model.graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{node.name}']")
    graph = from_proto(model)
    cast(graph, "float16", {"r"})
    for node in graph.nodes:
        source = node.name.split("/")[0].removesuffix("_inner")
        if source != "x":
            assert source in node_metadata(node)["pkg.torch.onnx.name_scopes"], node.name


# --- bodies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("flag", [True, False])
def test_branches_are_cast_inside(low: str, flag: bool, tmp_path: Path) -> None:
    model = parse(
        """g (float[2,2] x, bool c) => (float[2,2] y, float[2,2] z) <float[2,2] w, float[2,2] other>
        { a = MatMul(x, w)  e = Exp(x)
          y, z = If (c) <
            then_branch = t () => (float[2,2] t1, float[2,2] t2) { p = MatMul(a, w)  t1 = Relu(p)  t2 = Identity(e) },
            else_branch = f () => (float[2,2] f1, float[2,2] f2) { f1 = MatMul(e, w)  f2 = Identity(other) }> }"""
    )
    made = agrees(model, low, tmp_path, {"e"}, feeds={**example_inputs(model), "c": np.array(flag)})
    found = types(made)
    assert found["p"] == low


def test_a_branch_may_return_what_is_outside_of_it(tmp_path: Path) -> None:
    model = parse("g (float[2,2] x, bool c) => (float[2,2] y) <float[2,2] w> { a = MatMul(x, w)  "
                         "y = If (c) <then_branch = t () => (float[2,2] a2) { a2 = Identity(a) }, "
                         "else_branch = f () => (float[2,2] b2) { b2 = MatMul(a, w) }> }")  # fmt: skip
    graph = from_proto(model)
    branch = next(value for node in graph.nodes if node.op == "If" for value in node.attrs.values())
    branch.outputs[0] = branch.nodes[0].inputs[0]
    branch.nodes[0].inputs.clear()
    branch.nodes.clear()
    agrees(to_proto(graph), "float16", tmp_path, feeds={"x": np.eye(2, dtype=np.float32), "c": np.array(True)})


@pytest.mark.parametrize("low", LOWS)
def test_loops_are_cast_inside_and_carry_float32(low: str, tmp_path: Path) -> None:
    model = parse(
        """g (float[2,2] x, int64 n) => (float[2,2] y, float[N,2,2] all) <float[2,2] w, bool yes = {1}>
        { a = MatMul(x, w)
          y, all = Loop (n, yes, x) <
            body = b (int64 i, bool k, float[2,2] s) => (bool k2, float[2,2] s2, float[2,2] out)
            { k2 = Identity(k)  h = MatMul(s, w)  r = Relu(h)  s2 = Add(r, a)  out = MatMul(s2, a) }> }"""
    )
    feeds = {**example_inputs(model), "n": np.array(3)}
    made = agrees(model, low, tmp_path, feeds=feeds)
    found = types(made)
    assert found["h"] == found["r"] == low
    assert found["s"] == "float32"
    outside = [node.name for node in made.graph.node]
    assert sum("cast" in name for name in outside) <= 2, "what a body reads from outside is cast once, outside"


SCAN = """g (float[2] s0, float[2,5] xs, float[5,2] zs) => (float[2] s, float[5,2] ys) <float[2,2] w>
{ s, ys = Scan <num_scan_inputs = 2, scan_input_axes = [1, 0], scan_input_directions = [0, 1],
    body = b (float[2] s1, float[2] x1, float[2] z1) => (float[2] s2, float[2] y1)
    { h = MatMul(x1, w)  e = Exp(z1)  k = Add(e, h)  m = Mul(k, z1)  s2 = Add(s1, m)  y1 = Tanh(m) }> (s0, xs, zs) }"""


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("fp32", [(), ("e",), ("e", "k", "m")])
def test_scans_are_cast_inside_and_what_they_go_through_before(low: str, fp32: Collection[str], tmp_path: Path) -> None:
    made = agrees(parse(SCAN), low, tmp_path, fp32)
    assert types(made)["h"] == low
    (scan,) = [node for node in made.graph.node if node.op_type == "Scan"]
    (body,) = [item.g for item in scan.attribute if item.type == onnx.AttributeProto.GRAPH]
    states = {body.input[0].name}
    assert all(
        node.input[0] in states for node in body.node if node.name.endswith(f"cast_{low}") and node.input[0][0] in "sxz"
    )
    assert len(body.input) == len(scan.input) == (4 if fp32 == ("e",) else 3)


@pytest.mark.skipif(not RTX_INSTALLED, reason="needs TensorRT-RTX")
@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("fp32", [(), ("e",)])
def test_a_cast_scan_builds(low: str, fp32: Collection[str], tmp_path: Path) -> None:
    half(parse(SCAN), low, tmp_path, fp32)
    outcome = build(tmp_path / "half.onnx", tmp_path / "e", tmp_path / "log", target=resolve(RTX), profiles=[])
    assert [item["dtype"] for item in outcome.outputs] == ["FLOAT", "FLOAT"]


# --- values ------------------------------------------------------------------------------------------------------


def test_rounding_keeps_finite_values_finite() -> None:
    values = np.array([1e9, -1e9, np.inf, -np.inf, np.nan, 1e-9, 65519, 65520, 3.4028235e38], np.float32)
    ends = rounded(values, low_type("float16"))
    np.testing.assert_array_equal(ends[[0, 1, 6, 7, 8]].astype(np.float32), [65504, -65504, 65504, 65504, 65504])
    assert np.isposinf(ends[2]) and np.isneginf(ends[3]) and np.isnan(ends[4]) and ends[5] == 0
    brain = rounded(values, low_type("bfloat16")).astype(np.float32)
    assert np.isfinite(brain[8]) and np.isposinf(brain[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounded(values, low_type("float16"))


def test_masks_leave_room_for_what_they_are_added_to() -> None:
    low = low_type("float16")
    np.testing.assert_array_equal(rounded(np.array([-1e9, 1.0], np.float32), low, low.mask), [-32752, 1])
    np.testing.assert_array_equal(rounded(np.array([-1e9, -4e4], np.float32), low, low.mask), [-65504, -4e4])


def test_clamped_constants_are_told(tmp_path: Path) -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] big = {1e9, -3.4e38}> { y = Add(x, big) }"
    _, log = half(parse(text), "float16", tmp_path)
    assert list(log.clamped) == ["big"]
    assert log.clamped["big"] == pytest.approx(3.4e38)


@pytest.mark.parametrize("low", LOWS)
def test_a_mask_stays_one_even_where_all_is_masked(low: str, tmp_path: Path) -> None:
    text = """g (float[2,4] x, float[2,4] m) => (float[2,4] y)
    <float one = {1}, float least = {-3.4028234663852886e38}>
    { n = Sub(one, m)  a = Mul(n, least)  s = Add(x, a)  y = Softmax<axis = -1>(s) }"""
    x = np.array([[0, 0, 0, 0], [-40, -40, -40, -40]], np.float32)
    feeds = {"x": x, "m": np.array([[1, 1, 0, 0], [0, 0, 0, 0]], np.float32)}
    for fp32 in ((), {"n", "a"}, {"n", "a", "s"}):
        graph = from_proto(parse(text))
        cast(graph, low, fp32, saturated={"a", "s"})
        write(graph, tmp_path / "mask.onnx")
        found = evaluate(tmp_path / "mask.onnx", [feeds])[0]["y"]
        np.testing.assert_allclose(found, [[0.5, 0.5, 0, 0], [0.25] * 4], atol=1e-2, err_msg=str(fp32))


def test_infinite_constants_stay_infinite(tmp_path: Path) -> None:
    model = parse("g (float[2] x, bool[2] c) => (float[2] y) <float least = {0}> { y = Where(c, x, least) }")
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array(-np.inf, np.float32), "least"))
    half(model, "float16", tmp_path)
    feeds = {"x": np.ones(2, np.float32), "c": np.array([True, False])}
    np.testing.assert_array_equal(evaluate(tmp_path / "half.onnx", [feeds])[0]["y"], [1, -np.inf])


@pytest.mark.parametrize("low", LOWS)
def test_scales_of_quantisation_keep_their_digits(low: str, tmp_path: Path) -> None:
    text = """g (float[2,4] x) => (float[2,3] y) <float s = {3e-7}, float t = {0.01}, int8 z = {0}, float[4,3] w>
    { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  a = MatMul(d, w)
      r = QuantizeLinear(a, t, z)  y = DequantizeLinear(r, t, z) }"""
    model = parse(text, 17)
    made, _ = half(model, low, tmp_path)
    found = types(made)
    assert found["d"] == found["a"] == low
    assert {item.name: FLOATS.get(item.data_type) for item in made.graph.initializer if item.name in "st"} == {
        "s": "float32",
        "t": "float32",
    }


# --- models that are not float32, and opsets ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("low", LOWS)
def test_a_model_in_16_bits_is_left_as_it_is(kind: str, low: str, tmp_path: Path) -> None:
    model = parse(
        f"""g ({kind}[2,2] x, {kind}[2,2] w, float[2,2] f) => ({kind}[2,2] y)
        {{ a = MatMul(x, w)  u = Cast<to = 1>(a)  n = ReduceMean(u)  v = Sub(u, n)  y = CastLike(v, x) }}"""
    )
    graph = from_proto(model)
    log = cast(graph, low, ())
    assert not log.changed
    assert "already" in log.notes[0]
    assert to_proto(graph).graph.node == to_proto(from_proto(model)).graph.node


def test_a_widening_that_the_source_asks_for_is_not_undone_with_loss(tmp_path: Path) -> None:
    text = """g (float[2,2] x, float16[2,2] p, float[2,2] w) => (float[2,2] y, float[2,2] z, float[2,2] v)
    { u = Cast<to = 1>(p)  y = MatMul(u, w)  v = Exp(u)  asked0 = Cast<to = 10>(x)  asked = Cast<to = 1>(asked0)
      m = MatMul(x, w)  z = Exp(asked) }"""
    made = agrees(parse(text), "float16", tmp_path, {"v", "z"})
    readers = {node.name: list(node.input) for node in made.graph.node}
    assert readers["y"][0] == "p", "what was float16 is read as that"
    assert readers["z"] == ["asked"] and readers["v"] == ["u"]


@pytest.mark.parametrize("opset", [13, 17, 18, 20, 22])
def test_bfloat16_raises_the_opset_where_it_has_to(opset: int, tmp_path: Path) -> None:
    axes = "r = ReduceMax<axes = [2, 3], keepdims = 0>(h)" if opset < 18 else "r = ReduceMax<keepdims = 0>(h, ax)"
    model = parse(
        f"""g (float[1,4,8,8] x) => (float[1,4] y, float[1,2,8,8] p, float[1,2,8,8] q)
        <float[4,4,3,3] w, int64[2] ax = {{2, 3}}>
        {{ h = Conv<pads = [1, 1, 1, 1]>(x, w)  {axes}  y = Relu(r)
           p, q = Split<axis = 1{", num_outputs = 2" if opset >= 18 else ""}>(h) }}""",
        opset,
    )
    made = agrees(model, "bfloat16", tmp_path)
    assert types(made)["h"] == "bfloat16"
    assert max(item.version for item in made.opset_import if not item.domain) == 22


@pytest.mark.parametrize("opset", [11, 12])
def test_older_forms_of_operators_are_said_anew_where_the_low_type_needs_it(opset: int, tmp_path: Path) -> None:
    ratio = "<ratio = 0.3>" if opset < 12 else ""
    model = parse(
        f"""g (float[2,6,4] x) => (float[2,3] y, float[2,3,4] p, float[2,1] s, float[2] t) <float[4,4] w, float[4,3] v>
        {{ h = MatMul(x, w)  d = Dropout{ratio}(h)  p, q = Split<axis = 1, split = [3, 3]>(d)
          r = ReduceSum<axes = [1], keepdims = 0>(q)  l = LogSoftmax<axis = 1>(r)  y = Gemm(l, v)  z = Relu(y)
          u = ReduceSum<axes = [1]>(z)  s = Softmax(u)
          t0 = Unsqueeze<axes = [0]>(u)  t = Squeeze<axes = [0, 2]>(t0) }}""",
        opset,
    )
    made = agrees(model, "bfloat16", tmp_path)
    assert types(made).items() >= {"h": "bfloat16", "l": "bfloat16", "t0": "bfloat16"}.items()


def test_a_model_that_is_too_old_for_the_low_type_is_told_so() -> None:
    graph = from_proto(parse("g (float[2,4] x) => (float[2,4] y) <float[4,4] w> { h = MatMul(x, w)  y = Relu(h) }", 9))
    log = cast(graph, "bfloat16", ())
    assert graph.opset == 9 and not log.nodes
    assert "older than opset 11 (onnx.version_converter brings it there)" in log.notes[0]


def test_a_softmax_over_several_axes_has_no_newer_form() -> None:
    graph = from_proto(
        parse("g (float[2,3,4] x) => (float[2,3,4] y) <float[4,4] w> { h = MatMul(x, w)  y = Softmax(h) }", 11)
    )
    log = cast(graph, "bfloat16", ())
    assert graph.opset == 11 and "Softmax" in log.notes[0]


def test_an_opset_that_cannot_be_raised_is_told(tmp_path: Path) -> None:
    text = """g (float[1,4,8,8] x) => (float[1,4,8,8] y) <float[4,4,1,1] w, float[2] s = {1, 1}, float[2] b = {0, 0}>
    { h = Conv(x, w)  n = GroupNormalization<num_groups = 2>(h, s, b)  y = Add(n, h) }"""
    graph = from_proto(parse(text, 18))
    log = cast(graph, "bfloat16", ())
    assert graph.opset == 18
    assert "opset 22" in log.notes[0] and "GroupNormalization" in log.notes[0]
    assert next(node for node in graph.nodes if node.op == "Conv").outputs[0].dtype == np.float32


def test_grid_samples_modes_get_their_new_names(tmp_path: Path) -> None:
    text = """g (float[1,2,4,4] x, float[1,2,2,2] grid) => (float[1,2,2,2] y) <float[2,2,1,1] w>
    { h = Conv(x, w)  y = GridSample<mode = "bilinear">(h, grid) }"""
    made = agrees(parse(text, 18), "bfloat16", tmp_path, {"y"})
    sample = next(node for node in made.graph.node if node.op_type == "GridSample")
    assert {item.name: item.s for item in sample.attribute}["mode"] == b"linear"


@pytest.mark.skipif(not RTX_INSTALLED, reason="needs TensorRT-RTX")
@pytest.mark.parametrize("fp32", [{"y"}, {"p"}, {"x"}, set()])
def test_an_image_and_the_places_in_it_have_one_type_which_tensorrt_asks_for(
    fp32: Collection[str], tmp_path: Path
) -> None:
    text = """g (float[1,2,4,4] a, float[1,2,2,2] b) => (float[1,2,2,2] y)
    { x = Relu(a)  p = Tanh(b)  y = GridSample(x, p) }"""
    agrees(parse(text, 20), "float16", tmp_path, fp32)
    build(tmp_path / "half.onnx", tmp_path / "e", tmp_path / "log", target=resolve("tensorrt-rtx"), profiles=[])


# --- large models ------------------------------------------------------------------------------------------------


def test_weights_in_files_are_rounded_when_they_are_written(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((2100, 2100)).astype(np.float32)
    model = parse("g (float[1,2100] x) => (float[1,2100] y) <float[2100,2100] w> { y = MatMul(x, w) }")
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0)
    graph = read(tmp_path / "m.onnx")
    cast(graph, "float16", ())
    product = next(node for node in graph.nodes if node.op == "MatMul")
    assert isinstance(product.inputs[1]._values, RoundedValues), "still in its file"
    write(graph, tmp_path / "half.onnx")
    found = onnx.numpy_helper.to_array(onnx.load(str(tmp_path / "half.onnx")).graph.initializer[0])
    np.testing.assert_array_equal(found, weights.astype(np.float16))


def test_extents_look_at_finite_values_alone() -> None:
    values = np.array([np.nan, -np.inf, -3, 7, np.inf], np.float32)
    found = extent(Constant("c", values))
    assert (found.low, found.high) == (-3, 7)
    assert extent(Constant("c", np.zeros(0, np.float32))).largest == 0
    assert extent(Constant("c", np.full(3, np.inf, np.float32))).largest == 0


# --- any graph ---------------------------------------------------------------------------------------------------


def some_graph(rng: np.random.Generator) -> gs.Graph:
    """A graph of twenty nodes that read whatever was made before them."""
    x = gs.Variable("x", np.dtype(np.float32), [3, 3])
    c = gs.Variable("c", np.dtype(np.bool_), [3, 3])
    tensors: list[Any] = [x, Constant("k", rng.standard_normal((3, 3)).astype(np.float32))]
    nodes = []
    for index in range(20):
        op, count = [("Add", 2), ("MatMul", 2), ("Tanh", 1), ("Where", 2), ("Max", 3), ("Identity", 1), ("Cast", 1),
                     ("Concat", 2), ("Transpose", 1), ("Sigmoid", 1), ("Softmax", 1)][rng.integers(11)]  # fmt: skip
        inputs = [tensors[rng.integers(len(tensors))] for _ in range(count)]
        made = gs.Variable(f"t{index}", np.dtype(np.float32), [3, 3])
        attrs = {"to": 1} if op == "Cast" else {}
        if op == "Where":
            inputs = [c, *inputs]
        if op == "Concat":
            middle = gs.Variable(f"m{index}", np.dtype(np.float32), [6, 3])
            nodes.append(Node(op, f"concat{index}", {"axis": 0}, inputs, [middle], domain=""))
            ends = [Constant(f"e{index}{n}", np.array([n], np.int64)) for n in (1, 4, 0)]
            op, inputs = "Slice", [middle, *ends]
        nodes.append(Node(op, f"n{index}", attrs, inputs, [made], domain=""))
        tensors.append(made)
    outputs = [tensors[index] for index in sorted(rng.choice(np.arange(2, len(tensors)), 4, replace=False))]
    return gs.Graph(nodes, [x, c], outputs, name="some", opset=20, ir_version=9)


@pytest.mark.parametrize("seed", range(20))
def test_any_graph_with_any_nodes_in_float32(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    model = to_proto(some_graph(rng))
    fp32 = {f"n{index}" for index in rng.choice(20, rng.integers(0, 16), replace=False)}
    low = LOWS[seed % 2]
    feeds = {"x": rng.standard_normal((3, 3)).astype(np.float32), "c": rng.random((3, 3)) > 0.5}
    made = agrees(model, low, tmp_path, fp32, feeds)
    makers = {name: node for node in made.graph.node for name in node.output}
    casts = [node for node in made.graph.node if node.op_type == "Cast" and "/cast_" in node.name]
    assert len({(node.input[0], node.output[0]) for node in casts}) == len({node.input[0] for node in casts})
    assert not any("/cast_" in makers[node.input[0]].name for node in casts if node.input[0] in makers)


@pytest.mark.skipif(not RTX_INSTALLED, reason="needs TensorRT-RTX")
@pytest.mark.parametrize("low", LOWS)
def test_a_cast_model_builds(low: str, tmp_path: Path) -> None:
    half(parse(CONV), low, tmp_path)
    outcome = build(
        tmp_path / "half.onnx", tmp_path / "e", tmp_path / "log", target=resolve("tensorrt-rtx"), profiles=[]
    )
    assert [item["dtype"] for item in outcome.outputs] == ["FLOAT"]


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="float8"):
        cast(from_proto(parse(CONV)), "float8", ())
    assert low_type("bfloat16").dtype == np.dtype(ml_dtypes.bfloat16)
