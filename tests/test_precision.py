"""One precision setting: its names and files, and which node it puts into what, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bridge import target as targets
from bridge.assignment import Assignment, assign
from bridge.errors import UsageError
from bridge.evaluator import evaluate
from bridge.precision import Place, Precision, Rule
from bridge.ranges import Range
from passes import write
from passes.casts import cast
from passes.model import from_proto
from tests.support import run_onnx
from tests.test_casts import parse

RTX = targets.resolve("tensorrt-rtx-1.7")
OLD = targets.resolve("tensorrt-8.5")
TEN = targets.resolve("tensorrt-10.0")


# --- the setting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "low", "quantised", "name"),
    [
        ("fp32", "fp32", "", "fp32"),
        ("fp16", "fp16", "", "fp16"),
        ("bf16", "bf16", "", "bf16"),
        ("int8", "fp32", "int8", "int8"),
        ("int8+fp32", "fp32", "int8", "int8"),
        ("fp16+int8", "fp16", "int8", "int8+fp16"),
        ("FP8 + bf16", "bf16", "fp8", "fp8+bf16"),
        ("int4", "fp32", "int4", "int4"),
    ],
)
def test_a_name_says_what_is_low_and_what_is_quantised(text: str, low: str, quantised: str, name: str) -> None:
    made = Precision.of(text)
    assert (made.low, made.quantised, made.name, str(made)) == (low, quantised, name, name)
    assert Precision.of(made) is made


@pytest.mark.parametrize("text", ["", "fp15", "fp16+bf16", "int8+fp8", "int8++fp16", "fp16,int8", 16, None, ["fp16"]])
def test_other_names_are_refused(text: Any) -> None:
    with pytest.raises(UsageError, match="precision"):
        Precision.of(text)


FILE = """
precision: int8+fp16
io: convert
fp32: [decoder.norm*, "op:Softmax", "node:node_conv_3"]
fp16:
  - module:decoder.norm.last
"""


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_a_file_says_the_same_as_the_mapping_in_it(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"p{suffix}"
    if suffix == ".json":
        text = (
            '{"precision": "int8+fp16", "io": "convert", "fp32": ["decoder.norm*", "op:Softmax", "node:node_conv_3"],'
            ' "fp16": "module:decoder.norm.last"}'
        )
    else:
        text = FILE
    path.write_text(text)
    made = Precision.of(str(path))
    assert made == Precision.of(path)
    assert made.name == "int8+fp16" and made.io == "convert"
    assert made.rules == (
        Rule("fp32", "decoder.norm*"),
        Rule("fp32", "Softmax", "op"),
        Rule("fp32", "node_conv_3", "node"),
        Rule("fp16", "decoder.norm.last", "module"),
    )


@pytest.mark.parametrize(
    "made",
    [
        Precision(),
        Precision("fp16", "int8", io="convert"),
        Precision("bf16", "", (Rule("fp32", "a*"), Rule("bf16", "Conv", "op"))),
        Precision("fp16", "", (Rule("fp32", "a"), Rule("fp16", "b"), Rule("fp32", "ü: #'\"", "node"))),
    ],
)
def test_what_is_written_as_a_file_is_read_as_the_same(made: Precision, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(made.file_text(), encoding="utf-8")
    assert Precision.of(path) == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("precision: fp17", "fp17"),
        ("fp33: [a]", "fp33"),
        ("precision: fp16\nfp32: 3", "list of patterns"),
        ("precision: fp16\nrules: [a]", "list of pairs"),
        ("precision: fp16\nrules: [{fp9: a}]", "fp9"),
        ("precision: fp16\nfp32: ['']", "empty"),
        ("precision: fp16\nbf16: [a]", "only one 16-bit type"),
        ("precision: int8\nfp8: [a]", "only one quantisation"),
        ("precision: fp16\nio: drop", "drop"),
        ("io: convert", "convert"),
        ("- fp16", "mapping"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_a_wrong_file_is_named_with_the_mistake(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"wrong\.yaml") as caught:
        Precision.of(path)
    assert words in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml"):
        Precision.of(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["decoder"], "decoder"),
        (["decoder.norm"], None),
        (["decoder.norm1"], "decoder.norm1"),
        (["decoder.norm*"], "decoder.norm*"),
        (["dec?der"], "dec?der"),
        (["node_add_?"], "node_add_?"),
        (["node:decoder"], None),
        (["op:Add", "op:*"], "op:*"),
        (["decoder", "op:Add"], "decoder"),
        (["node_add_1", "decoder.norm1", "op:Add"], "node_add_1"),
        (["decoder.norm1", "decoder"], "decoder"),
        (["[a]dd", "node_add_.", ".*"], None),
    ],
)
def test_the_most_specific_pattern_wins_and_of_equal_ones_the_last(patterns: list[str], found: str | None) -> None:
    rules = tuple(Rule.of("fp32", text) for text in patterns)
    rule = Precision("fp16", "", rules).rule_for(Place(("node_add_1",), ("Add",), ("decoder.norm1",)))
    assert (str(rule) if rule is not None else None) == found


def test_a_pattern_that_fits_nothing_is_named_with_what_is_near() -> None:
    nodes = [
        Place(("node_conv",), ("Conv",), ("encoder.layers.0",)),
        Place(("node_norm",), ("Add",), ("decoder.norm1",)),
    ]
    with pytest.raises(UsageError, match=r"fp32: 'decodr.norm' fits no node.*decoder.norm1"):
        Precision.of({"fp32": ["decodr.norm"]}).check_rules(nodes)
    with pytest.raises(UsageError, match=r"'op:Cnv' fits no node.*Conv"):
        Precision.of({"fp32": ["op:Cnv"]}).check_rules(nodes)
    Precision.of({"fp32": ["decoder", "encoder.layers", "op:Conv", "node_norm"]}).check_rules(nodes)


# --- the assignment ----------------------------------------------------------------------------------------------


def assigned(
    model: onnx.ModelProto,
    precision: Any = "fp16",
    ranges: Mapping[str, Range] | None = None,
    target: targets.Target = RTX,
) -> Assignment:
    return assign(from_proto(model), Precision.of(precision), ranges, target)


def run_low(model: onnx.ModelProto, precision: str, feeds: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the model computes in a precision, as it is assigned by default."""
    graph = from_proto(model)
    asked = Precision.of(precision)
    found = assign(graph, asked, None, RTX)
    cast(graph, asked.half_dtype, found.fp32, saturated=found.saturated)
    write(graph, folder / "low.onnx")
    return evaluate(folder / "low.onnx", [feeds])[0]


def close_to_float32(model: onnx.ModelProto, precision: str, feeds: Mapping[str, Any], folder: Path) -> None:
    for name, array in run_low(model, precision, feeds, folder).items():
        expected = run_onnx(model, dict(feeds))[name]
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=1e-6)
        np.testing.assert_allclose(array / scale, expected / scale, atol=1e-2 if precision == "fp16" else 5e-2, rtol=0)


MLP = """g (float[2,8] x) => (float[2,8] y) <float[8,8] w, float[8,8] v>
{ a = MatMul(x, w)  b = Relu(a)  e = Exp(b)  s = ReduceSum<keepdims = 1>(e)  d = Div(e, s)  y = MatMul(d, v) }"""


def test_products_are_low_and_sums_exponentials_and_quotients_are_not() -> None:
    found = assigned(parse(MLP))
    assert found.nodes == {"a": "fp16", "b": "fp16", "e": "fp32", "s": "fp32", "d": "fp32", "y": "fp16"}
    assert set(found.reasons) == found.fp32 == {"e", "s", "d"}
    assert "adds up" in found.reasons["s"] and "divides" in found.reasons["d"]


def test_a_rule_goes_before_what_is_usual() -> None:
    found = assigned(parse(MLP), {"precision": "fp16", "fp32": ["node:a"], "fp16": ["op:Exp", "op:ReduceSum"]})
    assert found.nodes == {"a": "fp32", "b": "fp16", "e": "fp16", "s": "fp16", "d": "fp16", "y": "fp16"}
    assert "a" not in found.reasons, "it is in what was asked for"


def test_a_part_of_a_float32_model_may_be_low() -> None:
    found = assigned(parse(MLP), {"precision": "fp32", "bf16": ["op:MatMul"]})
    assert found.of("bf16") == {"a", "y"}
    assert not found.reasons


def test_a_rule_for_what_cannot_be_low_is_answered_with_the_reason() -> None:
    model = parse("g (float[4] x) => (float[4] y) { a = Relu(x)  y = Celu(a) }")
    found = assigned(model, {"precision": "fp16", "fp16": ["op:Celu"]})
    assert found.nodes["y"] == "fp32"
    assert "Celu" in found.reasons["y"]


def test_a_pattern_for_nothing_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="op:Conv"):
        assigned(parse(MLP), {"precision": "fp16", "fp32": ["op:Conv"]})


def test_quantised_are_products_unless_they_have_to_be_in_float32() -> None:
    found = assigned(parse(MLP), "int8+fp16", {"a": Range(-1e6, 1e6)})
    assert found.nodes == {"a": "fp32", "b": "fp32", "e": "fp32", "s": "fp32", "d": "fp32", "y": "int8"}
    assert assigned(parse(MLP), "int8").nodes["e"] == "fp32"
    assert assigned(parse(MLP), "int8").of("int8") == {"a", "y"}
    assert not assigned(parse(MLP), "int8").reasons
    some = assigned(parse(MLP), {"precision": "fp16", "int8": ["y", "b"]})
    assert some.nodes["y"] == "int8" and some.nodes["b"] == "fp16"
    assert "not among what is quantised" in some.reasons["b"]
    assert assigned(parse(MLP), {"precision": "int8+fp16", "fp16": ["y"]}).nodes["y"] == "fp16"


def test_int4_is_for_products_with_constant_weights() -> None:
    model = parse(
        "g (float[2,8] x) => (float[2,2] y) <float[8,8] w> { a = MatMul(x, w)  t = Transpose(x)  y = MatMul(a, t) }"
    )
    assert assigned(model, "int4+fp16").of("int4") == {"a"}


def test_values_beyond_the_range_stay_in_float32_and_the_rest_does_not() -> None:
    nodes = "  ".join(f"t{i + 1} = MatMul(t{i}, w)" for i in range(20))
    model = parse(f"g (float[4,4] t0) => (float[4,4] t20) <float[4,4] w> {{ {nodes} }}")
    ranges = {f"t{i}": Range(-10, 10) for i in range(21)} | {"t7": Range(-9000, 3)}
    found = assigned(model, "fp16", ranges)
    assert found.fp32 == {"t7", "t8"}, "what makes it, and what reads it"
    assert "9000" in found.reasons["t7"] and "input" in found.reasons["t8"]
    assert not assigned(model, "bf16", ranges).fp32


def test_values_too_small_for_the_type_stay_in_float32() -> None:
    model = parse("g (float[4] x) => (float[4] y) { a = Relu(x)  b = Mul(a, a)  c = Neg(b)  y = Tanh(c) }")
    found = assigned(model, "fp16", {"b": Range(0, 1e-7), "c": Range(0, 0)})
    assert found.fp32 == {"b", "c"}


@pytest.mark.parametrize("least", [-1e4, -1e9, -3.4028234663852886e38])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["bool", "int64", "float"])
def test_a_mask_costs_nothing_and_holds_where_all_is_masked(
    least: float, precision: str, kind: str, tmp_path: Path
) -> None:
    model = parse(
        f"""g (float[2,4] x, {kind}[2,4] m) => (float[2,4] y) <float one = {{1}}, float least = {{{least}}}>
        {{ {"f = Identity(m)" if kind == "float" else "f = Cast<to = 1>(m)"}  n = Sub(one, f)  a = Mul(n, least)
           s = Add(x, a)  y = Softmax<axis = -1>(s) }}"""
    )
    dtype = {"bool": np.bool_, "int64": np.int64, "float": np.float32}[kind]
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0]])
    feeds = {"x": np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32), "m": mask.astype(dtype)}
    close_to_float32(model, precision, feeds, tmp_path)
    seen = {"a": Range(least, 0), "s": Range(least, 4), "x": Range(0, 4), "n": Range(0, 1), "f": Range(0, 1)}
    assert assigned(model, precision, seen).nodes["y"] == precision, "the softmax itself"


def test_a_mask_that_leaves_the_model_is_exact() -> None:
    model = parse(
        "g (float[4] x, bool[4] c) => (float[4] y) <float least = {-1e9}> { a = Relu(x)  y = Where(c, a, least) }"
    )
    assert assigned(model).fp32 == {"y"}


def test_a_large_factor_is_no_mask() -> None:
    model = parse("g (float[4] x) => (float[4] y) <float big = {1e6}> { a = Mul(x, big)  b = Relu(a)  y = Softmax(b) }")
    assert assigned(model).fp32 == {"a", "b", "y"}
    seen = {"x": Range(0, 1e-4), "a": Range(0, 100), "b": Range(0, 100), "y": Range(0, 1)}
    assert assigned(model, "fp16", seen).fp32 == {"a"}


def test_weights_beyond_the_range_stay_in_float32_with_what_reads_their_products() -> None:
    model = parse(
        """g (float[1,2] x) => (float[1,2] y) <float[2,2] big = {1e6, 1, 2, 3}, float[2,2] w>
        { a = MatMul(x, big)  b = Relu(a)  c = MatMul(b, w)  y = MatMul(c, w) }"""
    )
    assert assigned(model).fp32 == {"a", "b", "c"}
    assert not assigned(model, "bf16").fp32


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_small_epsilon_does_not_vanish(precision: str, tmp_path: Path) -> None:
    model = parse(
        """g (float[2,4] x) => (float[2,4] y, float[2,4] z)
        <float eps = {1e-12}, int64[1] ax = {1}>
        { q = Mul(x, x)  s = ReduceSum(q, ax)  r = Sqrt(s)  e = Add(r, eps)  w = Expand(e, sh)  y = Div(x, w)
          m = Max(r, eps)  z = Div(x, m) }""".replace("int64[1] ax = {1}", "int64[1] ax = {1}, int64[2] sh = {2, 4}")
    )
    feeds = {"x": np.array([[0, 0, 0, 0], [300, -400, 0, 0]], np.float32)}
    close_to_float32(model, precision, feeds, tmp_path)
    if precision == "fp16":
        assert assigned(model).fp32 >= {"q", "s", "r", "e", "y", "m", "z"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_places_and_phases_keep_their_digits(precision: str, tmp_path: Path) -> None:
    model = parse(
        """g (float[1,4] t, int64 n, float[1,4] h) => (float[N,4] y, float[1,4] z, float[1,4] k)
        <float[1,4] freq = {1.0, 0.1, 0.01, 0.001}, int64 zero = {0}, int64 one = {1}, int64[1] ax = {1}>
        { r = Range(zero, n, one)  f = Cast<to = 1>(r)  u = Unsqueeze(f, ax)  p = MatMul(u, freq)  y = Sin(p)
          a = Mul(t, freq)  z = Cos(a)  c = Mul(h, freq)  k = Tanh(c) }"""
    )
    feeds = {"t": np.full((1, 4), 999.5, np.float32), "n": np.array(5000), "h": np.ones((1, 4), np.float32)}
    close_to_float32(model, precision, feeds, tmp_path)
    assert assigned(model, precision).of(precision) == {"c", "k"}


def test_what_is_rounded_down_keeps_its_digits() -> None:
    model = parse(
        """g (float[4] x) => (int64[4] y, float[4] z) <float k = {0.3}, float[4] w>
        { a = Mul(x, k)  b = Floor(a)  y = Cast<to = 7>(b)  c = Mul(x, k)  z = Tanh(c) }"""
    )
    assert assigned(model).fp32 == {"a", "b"}


@pytest.mark.parametrize("given", ["x", "r"])
def test_what_is_compared_with_what_it_was_chosen_from_is_still_equal_to_it(given: str, tmp_path: Path) -> None:
    """Values of float32, of which the largest were rounded to float16, would all be other than these."""
    model = parse(
        f"""g (float[2,40] x) => (bool[2,40] e, bool[2,40] g) <int64[1] k = {{3}}, int64[1] ax = {{1}}>
        {{ r = Sqrt(x)  m = ReduceMax({given}, ax)  e = Equal({given}, m)
           v, i = TopK({given}, k)  s, t, u = Split<axis = 1, num_outputs = 3>(v)  z = Squeeze(u, ax)
           d = Unsqueeze(z, ax)  g = GreaterOrEqual({given}, d) }}"""
    )
    rows = {"x": np.random.default_rng(3).uniform(1, 2, (2, 40)).astype(np.float32)}
    found = run_low(model, "fp16", rows, tmp_path)
    assert found["e"].sum(1).tolist() == [1, 1] and found["g"].sum(1).tolist() == [3, 3]


def test_what_is_low_already_is_chosen_from_and_compared_as_it_is() -> None:
    model = parse(
        """g (float[2,4] x) => (float[2,4] y) <float[4,4] w, float no = {-1000}, int64[1] ax = {1}>
        { l = MatMul(x, w)  m = ReduceMax(l, ax)  e = Less(l, m)  y = Where(e, no, l) }"""
    )
    assert assigned(model).nodes.items() >= {"l": "fp16", "m": "fp16"}.items()


def test_what_a_loop_adds_up_is_added_in_float32() -> None:
    model = parse(
        """g (float[2,2] x, int64 n) => (float[2,2] y) <float[2,2] w, bool yes = {1}>
        { y = Loop (n, yes, x) <body = b (int64 i, bool k, float[2,2] s) => (bool k2, float[2,2] s2)
          { k2 = Identity(k)  h = MatMul(s, w)  s2 = Add(s, h) }> }"""
    )
    assert assigned(model).nodes == {"h": "fp16", "s2": "fp32"}


def test_what_a_scan_adds_up_and_puts_out_is_added_in_float32() -> None:
    model = parse(
        """g (float[2] s0, float[5,2] xs) => (float[2] s, float[5,2] ys) <float[2,2] w>
        { s, ys = Scan <num_scan_inputs = 1, body = b (float[2] s1, float[2] x1) => (float[2] s2, float[2] y1)
          { h = MatMul(x1, w)  s2 = Add(s1, h)  y1 = Identity(s2) }> (s0, xs) }"""
    )
    assert assigned(model).nodes == {"h": "fp16", "s2": "fp32", "y1": "fp32"}


def test_what_only_hands_on_between_nodes_in_float32_does_so_too() -> None:
    model = parse(
        """g (float[2,3] x) => (float[3,2] y) <int64[2] sh = {3, 2}>
        { e = Exp(x)  t = Transpose(e)  r = Reshape(t, sh)  l = Log(r)  y = Transpose<perm = [0, 1]>(l) }"""
    )
    assert assigned(model).fp32 == {"e", "t", "r", "l", "y"}


def test_a_model_of_arithmetic_alone_is_low_all_the_same() -> None:
    assert assigned(parse("g (float[4] x, float[4] z) => (float[4] y) { a = Mul(x, z)  y = Add(a, x) }")).fp32 == set()


def test_what_leads_to_places_stays_in_float32_through_what_is_there_by_default() -> None:
    model = parse(
        """g (float[1,3,8,8] x, float[1,4,4,2] t) => (float[1,3,4,4] y)
        { a = Mul(t, t)  b = Exp(a)  c = Relu(x)  y = GridSample(c, b) }"""
    )
    assert assigned(model, "bf16").fp32 == {"a", "b", "y"}


def test_places_that_the_model_makes_keep_their_digits_and_what_moves_them_a_little_does_not() -> None:
    text = """g (float[1,2,9,9] x) => (float[1,2,9,9] y) <float[2,2,1,1] w, float[1,9,9,2] grid, float s = {0.1}>
        { f = Conv(x, w)  t = Transpose<perm = [0, 2, 3, 1]>(f)  m = Mul(t, s)  p = Add(m, grid)
          y = GridSample(x, p) }"""
    seen = {"f": Range(-1, 1), "t": Range(-1, 1), "m": Range(-0.1, 0.1), "p": Range(-1, 1)}
    for precision in ("fp16", "bf16"):
        found = assigned(parse(text, 22), precision, seen)
        assert found.fp32 == {"p", "y"} and found.reasons["p"] == "GridSample is given what it makes as places"
    far = {"f": Range(-9, 9), "t": Range(-9, 9), "m": Range(-0.9, 0.9), "p": Range(-1.9, 1.9)}
    assert assigned(parse(text, 22), "fp16", far).fp32 == {"f", "t", "m", "p", "y"}


def test_what_turns_places_in_space_keeps_its_digits() -> None:
    model = parse(
        """g (float[1,3,9,9] x, float[1,8] h) => (float[1,3,9,9] y) <float[8,6] w, float[1,3,81] grid>
        { l = MatMul(h, w)  r = Reshape<allowzero = 0>(l, turn)  q = MatMul(r, grid)
          t = Transpose<perm = [0, 2, 1]>(q)  p = Reshape(t, places)  y = GridSample(x, p) }"""
    )
    for name, values in (("turn", [1, 2, 3]), ("places", [1, 9, 9, 2])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values), name))
    seen = {name: Range(-1, 1) for name in "hlrqtp"}
    assert assigned(model, "fp16", seen).fp32 == {"l", "r", "q", "t", "p", "y"}


def test_einsum_is_said_in_products_where_the_type_has_none(tmp_path: Path) -> None:
    model = parse(
        """g (float[2,3,4] x, float[2,5,4] z) => (float[2,3,5] y)
        { a = Einsum<equation = "bij,bkj->bik">(x, z)  y = Relu(a) }"""
    )
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 3, 4), np.float32), "z": rng.standard_normal((2, 5, 4), np.float32)}
    close_to_float32(model, "bf16", feeds, tmp_path)
    assert not assigned(model, "bf16").fp32
    assert assigned(model, {"precision": "bf16", "fp32": ["op:Einsum"]}).fp32 == {"a"}


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_sum_that_cancels_nearly_all_of_its_terms_stays_in_float32_with_what_makes_them(name: str) -> None:
    model = parse(
        """g (float[2,4] x) => (float[2,4] y) <float[4,4] w, float[4] b = {2000, 0, 0, 0}>
        { a = MatMul(x, w)  c = Gemm(a, w, b)  d = MatMul(c, w)  y = Tanh(d) }"""
    )
    seen = {"x": Range(-6, 6), "a": Range(-2000, 6), "c": Range(-7, 7), "d": Range(-7, 7), "y": Range(-1, 1)}
    found = assigned(model, name, seen)
    assert found.fp32 == {"a", "c"}
    assert found.reasons["c"] == "a term of 2000 is nearly cancelled: the result is never above 7"
    assert found.reasons["a"] == "Gemm subtracts nearly all of what it makes"
    assert not assigned(model, name, {**seen, "c": Range(-7, 300)}).fp32


def test_what_makes_cancelled_terms_stays_in_float32_up_to_the_products_and_down_to_the_size_of_the_result() -> None:
    model = parse(
        """g (float[2,4] x) => (float[2,4] y) <float[4,4] w, float s = {1.001}, float o = {200}>
        { h = MatMul(x, w)  k = Mul(h, s)  t = Transpose<perm = [0, 1]>(k)  a = Add(h, o)  b = Add(t, o)
          d = Sub(a, b)  y = Tanh(d) }"""
    )
    seen = {"x": Range(-6, 6), "h": Range(-2, 2), "k": Range(-2, 2), "t": Range(-2, 2)}
    seen |= {"a": Range(198, 202), "b": Range(198, 202), "d": Range(-0.02, 0.02), "y": Range(-0.02, 0.02)}
    assert assigned(model, "fp16", seen).fp32 == {"h", "k", "t", "a", "b", "d"}
    larger = {**seen, "d": Range(-1, 1), "y": Range(-1, 1)}
    assert assigned(model, "fp16", larger).fp32 == {"a", "b", "d"}, "the other terms are no larger than the result"


def test_differences_of_given_places_keep_the_digits_that_only_rounding_would_take() -> None:
    text = """g (float[2,4] x, float[2,4] z) => (float[2,4] y) <float[4,4] w>
        { MAKES  d = Sub(a, b)  y = MatMul(d, w) }"""
    seen = {"x": Range(95, 105), "z": Range(95, 105), "a": Range(95, 105), "b": Range(95, 105), "d": Range(-8, 8)}
    given = parse(text.replace("MAKES", "a = Identity(x)  b = Transpose<perm = [0, 1]>(z)"))
    assert assigned(given, "fp16", seen).nodes.items() >= {"d": "fp32", "y": "fp16"}.items()
    rounded = parse(text.replace("MAKES", "a = MatMul(x, w)  b = MatMul(z, w)"))
    assert assigned(rounded, "fp16", seen).nodes["d"] == "fp16", "so little is cancelled of what is rounded anyway"


LARGE = """g (float[2,5] x) => (float[2,8] y) <float[5,8] w, float[8,8] v, float s = {6.3}>
        { m = Mul(x, s)  p = MatMul(m, w)  a = Mul(p, s)  e = OPERATOR(a)  y = MatMul(e, v) }"""


@pytest.mark.parametrize(("operator", "largest"), [("Sin", 300), ("Exp", 40), ("Softmax", 400)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_makes_a_large_argument_keeps_its_digits(precision: str, operator: str, largest: float) -> None:
    model = parse(LARGE.replace("OPERATOR", operator))
    found = assigned(model, precision, {"p": Range(-largest, largest), "a": Range(-largest, largest)})
    assert found.fp32 == {"m", "p", "a", "e"}, "also what the caller's values go through before the product"
    assert found.reasons["p"] == f"{operator} is given {largest}: it needs all digits"
    usual = assigned(model, precision, {"a": Range(-3, 3)}).fp32
    assert "p" not in usual and "a" not in usual
    vanishing = assigned(model, precision, {"p": Range(-largest, 2), "a": Range(-largest, 2)}).fp32
    assert ("p" in vanishing) == (operator == "Sin"), "an exponential of what is far below 0 is 0"


@pytest.mark.parametrize("precision", ["int8", "fp8", "int8+fp16"])
def test_products_that_lead_to_phases_are_not_quantised(precision: str) -> None:
    seen = {"p": Range(-300, 300), "a": Range(-300, 300)}
    found = assigned(parse(LARGE.replace("OPERATOR", "Sin")), precision, seen)
    assert found.of(precision.partition("+")[0]) == {"y"} and "Sin is given 300" in found.reasons["p"]
    positions = parse(
        """g (int64[1,5] t, float[5,8] x) => (float[5,8] y) <float[8,1] f, float[8,8] w>
        { p = Cast<to = 1>(t)  a = MatMul(f, p)  b = Transpose(a)  c = Cos(b)  d = MatMul(x, w)  y = Mul(d, c) }"""
    )
    found = assigned(positions, precision, {"a": Range(0, 9)})
    assert found.of(precision.partition("+")[0]) == {"d"} and "a" in found.reasons


@pytest.mark.parametrize("precision", ["int8", "fp8+fp16"])
def test_what_turns_points_in_space_is_not_quantised(precision: str) -> None:
    model = parse(
        """g (float[9,3] x, float[3,3] r) => (float[9,8] y) <float[3,8] w, float[8,8] v>
        { a = MatMul(x, r)  b = MatMul(a, w)  y = MatMul(b, v) }"""
    )
    found = assigned(model, precision)
    assert found.of(precision.partition("+")[0]) == {"y"}
    assert "points in space" in found.reasons["a"] and "points in space" in found.reasons["b"]


def test_what_is_added_to_its_own_argument_may_lose_digits_as_that_does() -> None:
    text = """g (float[1,4,9] x) => (float[1,4,9] y) <float[4,4,1] w, float[4,1] s, float two = {2}>
        { h = Conv(x, w)  a = Mul(h, s)  p = Sin(a)  q = Pow(p, two)  d = Div(q, s)  r = Add(OTHER, d)  y = Tanh(r) }"""
    seen = {"x": Range(-50, 50), "h": Range(-50, 50), "a": Range(-50, 50), "r": Range(-50, 50)}
    assert "h" not in assigned(parse(text.replace("OTHER", "h"), 22), "bf16", seen).fp32
    assert "h" in assigned(parse(text.replace("OTHER", "x"), 22), "bf16", seen).fp32


def test_a_tensor_that_leads_to_another_by_many_ways_is_looked_at_once() -> None:
    turns = "  ".join(f"p{i} = Neg(t{i})  q{i} = Abs(t{i})  t{i + 1} = Mul(p{i}, q{i})" for i in range(60))
    sums = "  ".join(f"n{i} = Neg(s{i})  s{i + 1} = Sub(s{i}, n{i})" for i in range(60))
    model = parse(
        f"""g (float[8,8] x) => (float[8,8] y) <float[8,8] w>
        {{ t0 = MatMul(x, w)  {turns}  a = Sin(t60)  b = MatMul(a, w)  s0 = MatMul(b, w)  {sums}
           c = MatMul(s60, w)  d = Sub(s60, c)  y = Tanh(d) }}"""
    )
    seen = {f"{name}{i}": Range(-99, 99) for name in "tpqsn" for i in range(61)} | {"c": Range(-99, 99)}
    found = assigned(model, "fp16", {**seen, "d": Range(-1, 1), "a": Range(-1, 1)})
    assert {"t0", "t60", "s0", "s60", "d"} <= found.fp32 and "b" not in found.fp32


@pytest.mark.parametrize("made", ["Softmax<axis = -1>(l)", "Tanh(l)"])
def test_shares_of_a_whole_may_be_small_where_other_values_may_not(made: str) -> None:
    model = parse(
        f"""g (float[9,8] q, float[8,700] k, float[700,8] v, bool[9,700] m) => (float[9,8] y) <float zero = {{0}}>
        {{ l = MatMul(q, k)  s = {made}  c = Where(m, zero, s)  y = MatMul(c, v) }}"""
    )
    seen = {"l": Range(-1, 1), "s": Range(0, 0.0004), "c": Range(0, 0.0004), "y": Range(-1, 1)}
    assert assigned(model, "fp16", seen).fp32 == (set() if made.startswith("Softmax") else {"s", "c", "y"})


def test_a_rule_quantises_what_would_stay_in_float32() -> None:
    seen = {"p": Range(-300, 300), "a": Range(-300, 300)}
    for precision in ("int8", "int8+fp16"):
        found = assigned(parse(LARGE.replace("OPERATOR", "Sin")), {"precision": precision, "int8": ["p"]}, seen)
        assert found.nodes["p"] == "int8" and "p" not in found.reasons


def test_bfloat16_can_afford_to_cancel_less() -> None:
    model = parse("g (float[4] x, float[4] z) => (float[4] y) { a = Relu(x)  b = Sub(a, z)  y = Tanh(b) }")
    seen = {"x": Range(-20, 20), "z": Range(0, 20), "a": Range(0, 20), "b": Range(-1, 1), "y": Range(-1, 1)}
    assert assigned(model, "bf16", seen).fp32 == {"a", "b"}
    assert not assigned(model, "fp16", seen).fp32


SPECTRUM = """g (float[1,1,64] x) => (float[1,4,15] y)
        <float[8,1,8] w, float eps = {1e-3}, float[4,4] m, float[64] window>
        { p = Mul(window, x)  s = Conv<strides = [4]>(p, w)  r, i = Split<axis = 1, num_outputs = 2>(s)
          a = Mul(r, r)  b = Mul(i, i)  c = Add(a, b)  e = Add(c, eps)  l = Log(e)  d = MatMul(m, l)  y = Tanh(d) }"""


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_leads_to_the_logarithm_of_a_spectrum_keeps_its_digits(precision: str) -> None:
    seen = {"x": Range(-1, 1), "s": Range(-9, 9), "a": Range(0, 81), "b": Range(0, 81), "c": Range(0, 90)}
    model = parse(SPECTRUM, 22)
    found = assigned(model, precision, {**seen, "e": Range(1e-3, 90)})
    assert found.fp32 == {"p", "s", "r", "a", "b", "c", "e", "l"}
    assert found.reasons["s"] == "it leads to a Log, which makes as much of the smallest values as of the largest"
    assert assigned(model, precision, {**seen, "e": Range(1, 90)}).fp32 == {"l"}, "they are of one size"


def test_before_the_logarithm_of_probabilities_nothing_is_kept_but_what_is_linear() -> None:
    text = """g (float[2,4] x) => (float[2,4] y) <float[4,4] w>
        { a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, w)  h = NAME(c)  l = Log(h)  y = MatMul(l, w) }"""
    seen = {name: Range(-4, 4) for name in "abcx"} | {"h": Range(1e-9, 1)}
    assert assigned(parse(text.replace("NAME", "Softmax")), "fp16", seen).fp32 == {"l"}
    assert assigned(parse(text.replace("NAME", "Abs")), "fp16", seen).fp32 == {"c", "h", "l"}
    positive = {**seen, "b": Range(0, 4), "c": Range(0, 4)}
    assert assigned(parse(text.replace("NAME", "Abs")), "fp16", positive).fp32 == {"c", "h", "l"}, "the weights are not"


def test_values_of_which_float16_has_few_digits_stay_in_float32() -> None:
    model = parse("g (float[4] x) => (float[4] y) { a = Relu(x)  b = Mul(a, a)  c = Neg(b)  y = Tanh(c) }")
    seen = {"b": Range(0, 5e-4), "c": Range(-5e-4, 0)}
    assert assigned(model, "fp16", seen).fp32 == {"b", "c", "y"}
    assert not assigned(model, "bf16", seen).fp32


@pytest.mark.parametrize("shape", ["even", "normal", "heavy"])
def test_values_of_which_float16_has_enough_digits_do_not(shape: str) -> None:
    """What rounding costs of values that are just large enough is no more than of any others."""
    random = np.random.default_rng(0)
    drawn = {"even": random.random, "normal": random.standard_normal, "heavy": lambda n: random.standard_t(4, n)}
    values = drawn[shape](4096)
    values *= 1e-3 / np.abs(values).max()
    lost = [np.linalg.norm(item.astype(np.float16) - item) / np.linalg.norm(item) for item in (values, 1e3 * values)]
    assert lost[0] < 3 * lost[1] < 1e-3
    model = parse("g (float[4] x) => (float[4] y) { a = Relu(x)  b = Mul(a, a)  c = Neg(b)  y = Tanh(c) }")
    assert not assigned(model, "fp16", {"b": Range(0, 1e-3), "c": Range(-1e-3, 0)}).fp32


def test_a_model_in_16_bits_is_assigned_nothing() -> None:
    found = assigned(parse("g (float16[2,2] x) => (float16[2,2] y) { y = MatMul(x, x) }"), "bf16")
    assert not found.nodes and "already" in found.notes[0]


def test_weakly_typed_targets_keep_the_opset_and_get_the_same_nodes() -> None:
    text = """g (float[1,3,8,8] x) => (float[1,3,6,6] y)
    <float[3,3,3,3] w> { h = Conv(x, w)  e = Exp(h)  y = Relu(e) }"""
    graph = from_proto(parse(text, 16))
    found = assign(graph, Precision.of("bf16"), None, TEN)
    assert graph.opset == 16
    assert found.nodes == assigned(parse(text, 16), "bf16").nodes == {"h": "bf16", "e": "fp32", "y": "bf16"}
    with pytest.raises(UsageError, match="bfloat16"):
        assigned(parse(text, 16), "bf16", target=OLD)
    assert assigned(parse(text, 16), "fp16", target=OLD).of("fp16") == {"h", "y"}
