"""Reading a model and writing it again: what must survive, and what it may cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from bridge import target as targets
from passes import ModelError, read, rewrite, write
from passes.model import from_proto, scopes, to_proto
from passes.writing import ALIGNMENT, COPY_CHUNK, EXTERNAL_MIN, INLINE_LIMIT
from tests.support import run_onnx

RTX = targets.resolve("tensorrt-rtx-1.7")


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` as read and written, without touching the one given."""
    return to_proto(from_proto(onnx.ModelProto.FromString(model.SerializeToString())))


def canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with the lists sorted whose order means nothing."""
    result = onnx.ModelProto.FromString(model.SerializeToString())

    def sort(items: Any, key: Any) -> None:
        ordered = sorted(items, key=key)
        del items[:]
        items.extend(ordered)

    def visit(graph: onnx.GraphProto) -> None:
        sort(graph.initializer, lambda item: item.name)
        sort(graph.value_info, lambda item: item.name)
        visit_nodes(graph.node)

    def visit_nodes(nodes: Any) -> None:
        for node in nodes:
            sort(node.metadata_props, lambda item: item.key)
            for name in ("domain", "name"):
                if not getattr(node, name):
                    node.ClearField(name)
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(result.graph)
    for function in result.functions:
        visit_nodes(function.node)
    sort(result.opset_import, lambda item: item.domain)
    return result


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    left, right = canonical(before), canonical(after)
    if left != right:
        raise AssertionError(f"before:\n{left}\n\nafter:\n{right}")


def test_whatever_the_format_has_a_field_for_survives() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20, "my.ops" : 3], producer_name: "exporter", producer_version: "1.2",
         domain: "org.example", model_version: 7, doc_string: "of the model", metadata_props: ["author": "me"]>
        main (float[N, 3] x, float[N, 3] u) => (float[N, 3] y, float[N, 3] p) {
            [first] h = my.ops.Thing <flags: ints = [], names: strings = [], rates: floats = [], word: string = "a",
                words: strings = ["b", "c"], half: float = 0.5, halves: floats = [0.1, 0.2], many: ints = [1, 2],
                t: tensor = int32[2] {1, 2}> (x, "", u)
            [second] y, "", z = my.ops.Other (h)
            [third] p = Relu (z)
        }
        """
    )
    first = model.graph.node[0]
    first.doc_string = "of the node"
    first.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="line 3")
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.DOUBLE, ["k", 2]))
    first.attribute.append(helper.make_attribute("kind", kind))
    first.attribute.append(helper.make_attribute("raw", b"\xff\xfe"))
    first.attribute.append(
        AttributeProto(
            name="tensors",
            type=AttributeProto.TENSORS,
            tensors=[numpy_helper.from_array(np.arange(3, dtype=np.float16), "inner")],
        )
    )
    model.graph.doc_string = "of the graph"
    model.graph.metadata_props.add(key="graph", value="note")
    model.graph.quantization_annotation.add(tensor_name="h")
    model.graph.input[0].doc_string = "of the input"
    model.graph.input[0].metadata_props.add(key="input", value="note")
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", None]))
    assert_same(model, copy(model))


@pytest.mark.parametrize(
    "dtype",
    [
        *(np.float32, np.float64, np.float16, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32),
        *(np.int64, np.uint64, np.bool_, np.complex64, np.complex128, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn),
        *(ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu),
        *(ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn, ml_dtypes.int2, ml_dtypes.uint2, object),
    ],
    ids=lambda dtype: np.dtype(dtype).name,
)
@pytest.mark.parametrize("where", ["inside", "external"])
def test_every_element_type_survives(dtype: Any, where: str, tmp_path: Path) -> None:
    values = np.array([0 if dtype is not ml_dtypes.float8_e8m0fnu else 2, 1, 1, 1, 1], np.float32).astype(dtype)
    if dtype is object:
        values = np.array(["a", "", "ü", "d", "e"], object)
        if where == "external":
            pytest.skip("strings cannot be external")
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Thing", ["w"], ["y"], domain="my.ops")],
            "types",
            [],
            [helper.make_tensor_value_info("y", kind, [5])],
            [numpy_helper.from_array(values, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("my.ops", 1)],
    )
    stored = numpy_helper.from_array(values, "w")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=where == "external", size_threshold=0)
    graph = read(tmp_path / "m.onnx")
    constant = graph.nodes[0].inputs[0]
    assert constant.dtype == np.dtype(dtype) and constant.shape == (5,)
    assert list(constant.values) == list(values)
    (tmp_path / "elsewhere").mkdir()
    write(graph, tmp_path / "elsewhere" / "m.onnx")
    after = onnx.load(tmp_path / "elsewhere" / "m.onnx").graph
    assert after.initializer[0].data_type == kind == after.output[0].type.tensor_type.elem_type
    assert after.initializer[0].raw_data == stored.raw_data
    assert list(numpy_helper.to_array(after.initializer[0])) == list(values)


def test_local_functions_keep_attributes_defaults_references_and_overloads() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20, "fun" : 1]>
        main (float[N] x, bool c) => (float[N] y) { y = fun.outer <slope = 0.5> (x, c) }
        <domain: "fun", opset_import: ["" : 20, "fun" : 1], doc_string: "why">
        outer <slope, scale: float = 3.0> (x, c) => (y) {
            s = Constant <value_float: float = @scale> ()
            a = fun.inner <alpha: float = @slope> (x)
            y = If (c) <then_branch = t () => (o) { o = LeakyRelu <alpha: float = @slope> (x) },
                        else_branch = e () => (o) { o = Mul (a, s) }>
        }
        <domain: "fun", opset_import: ["" : 20]>
        inner <alpha> (x) => (y) { y = LeakyRelu <alpha: float = @alpha> (x) }
        """
    )
    model.functions[1].metadata_props.add(key="note", value="of the function")
    after = copy(model)
    assert_same(model, after)
    for condition in (True, False):
        feeds = {"x": np.array([-2, 3], np.float32), "c": np.array(condition)}
        np.testing.assert_array_equal(run_onnx(after, feeds)["y"], run_onnx(model, feeds)["y"])
    model.functions[1].overload = model.functions[0].node[1].overload = "variant"
    assert_same(model, copy(model))


NESTED = """
<ir_version: 8, opset_import: ["" : 18]>
main (float[2] x, int64 n, bool c) => (float[2] y, float[k, 2] all)
<float[2] w = {10, 20}, bool yes = {1}> {
    h = Mul (x, w)
    y, all = Loop (n, yes, x) <body = once
      (int64 i, bool go, float[2] state) => (bool again, float[2] next, float[2] seen)
      <float[2] k = {1, 1}> {
        again = Identity (go)
        a = Add (state, h)
        next = If (c) <then_branch = t () => (float[2] o) <float[2] k2 = {5, 5}> { b = Mul (w, k2)  o = Add (a, b) },
                       else_branch = e () => (float[2] o) <float[2] k2 = {7, 7}> { b = Add (w, k2)  o = Sub (a, b) }>
        seen = Mul (next, k)
      }>
}
"""


def test_bodies_read_outer_tensors_and_weights_where_they_are() -> None:
    model = onnx.parser.parse_model(NESTED)
    after = copy(model)
    onnx.checker.check_model(after, full_check=True)
    names = [item.name for item in after.graph.initializer]
    assert sum(name.startswith("w") for name in names) == 1, f"the outer weight was copied: {names}"
    assert len(names) == len(set(names)) == 5, names
    for condition in (True, False):
        feeds = {"x": np.array([1, 2], np.float32), "n": np.array(3), "c": np.array(condition)}
        before, found = run_onnx(model, feeds), run_onnx(after, feeds)
        for name in before:
            np.testing.assert_array_equal(found[name], before[name], err_msg=f"{name}, condition {condition}")


def test_a_name_in_a_body_means_the_bodys_own_tensor() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        main (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
            h = Neg (x)
            p = If (c) <then_branch = t () => (float[2] o) <float[2] w = {3, 4}> { h = Mul (x, w)  o = Add (h, x) },
                        else_branch = e () => (float[2] o) { o = Mul (h, w) }>
            y = Add (p, h)
        }
        """
    )
    graph = from_proto(onnx.ModelProto.FromString(model.SerializeToString()))
    then = graph.nodes[1].attrs["then_branch"]
    assert then.nodes[1].inputs[0] is then.nodes[0].outputs[0] is not graph.nodes[0].outputs[0]
    rewrite(graph, RTX)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    x = np.array([1, 2], np.float32)
    np.testing.assert_array_equal(run_onnx(after, {"x": x, "c": np.array(True)})["y"], x * [3, 4] + x - x)
    np.testing.assert_array_equal(run_onnx(after, {"x": x, "c": np.array(False)})["y"], -x * [1, 2] - x)


def test_a_scan_body_survives() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        main (float[2] s, float[4, 2] xs) => (float[2] last, float[4, 2] ys) <float[2] w = {2, 3}> {
            last, ys = Scan <num_scan_inputs = 1, body = b (float[2] a, float[2] x) => (float[2] o, float[2] p)
                { m = Mul (x, w)  o = Add (a, m)  p = Identity (o) }> (s, xs)
        }
        """
    )
    feeds = {"s": np.zeros(2, np.float32), "xs": np.arange(8, dtype=np.float32).reshape(4, 2)}
    np.testing.assert_array_equal(run_onnx(copy(model), feeds)["ys"], run_onnx(model, feeds)["ys"])


def test_a_constant_that_a_body_returns_is_returned() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        main (bool c) => (float[2] y) {
            y = If (c) <then_branch = t () => (float[2] o) <float[2] o = {3, 4}> { },
                        else_branch = e () => (float[2] o) { o = Constant <value = float[2] {5, 6}> () }>
        }
        """
    )
    graph = from_proto(onnx.ModelProto.FromString(model.SerializeToString()))
    rewrite(graph, RTX)
    after = to_proto(graph)
    for condition, expected in ((True, [3, 4]), (False, [5, 6])):
        np.testing.assert_array_equal(run_onnx(after, {"c": np.array(condition)})["y"], expected)


def test_outputs_that_are_inputs_or_initializers_survive() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        main (float[2] x) => (float[2] x, float[2] w, float[2] y) <float[2] w = {1, 2}> { y = Add (x, w) }
        """
    )
    feeds = {"x": np.array([3, 4], np.float32)}
    graph = from_proto(onnx.ModelProto.FromString(model.SerializeToString()))
    rewrite(graph, RTX)
    for after in (copy(model), to_proto(graph)):
        found = run_onnx(after, feeds)
        assert list(found) == ["x", "w", "y"]
        np.testing.assert_array_equal(np.stack(list(found.values())), [[3, 4], [1, 2], [4, 6]])


def test_initializers_listed_as_inputs_stay_listed_and_are_constants_for_the_passes() -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Mul", ["w", "x"], ["y"])],
            "old",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("w", "x")],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
            [numpy_helper.from_array(np.array([2, 3], np.float32), "w")],
        ),
        ir_version=3,
        opset_imports=[helper.make_opsetid("", 9)],
    )
    assert_same(model, copy(model))
    graph = from_proto(model)
    assert [tensor.name for tensor in graph.inputs] == ["x"]
    rewrite(graph, RTX)
    after = to_proto(graph)
    assert [item.name for item in after.graph.input] == ["x"] and after.ir_version == 8
    np.testing.assert_array_equal(run_onnx(after, {"x": np.ones(2, np.float32)})["y"], [2, 3])


@pytest.mark.parametrize("layout", ["linear", "coordinates"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_sparse_initializers_become_dense_ones_of_their_type(layout: str, dtype: Any) -> None:
    places = np.array([1, 5]) if layout == "linear" else np.array([[0, 1], [1, 2]])
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([7, 8], dtype), "w"), numpy_helper.from_array(places.astype(np.int64)), [2, 3]
    )
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "sparse",
        [helper.make_tensor_value_info("x", kind, [2, 3])],
        [helper.make_tensor_value_info("y", kind, [2, 3])],
        sparse_initializer=[sparse],
    )
    after = copy(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]))
    found = run_onnx(after, {"x": np.zeros((2, 3), dtype)})["y"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, [[0, 7, 0], [0, 0, 8]])


def test_a_sparse_constant_becomes_a_dense_one() -> None:
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 5]), "places"), [3, 2])
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["w"], sparse_value=sparse), helper.make_node("MatMul", ["x", "w"], ["y"])],
        "sparse",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    read_back = copy(model)
    assert [item.name for item in read_back.graph.node[0].attribute] == ["value"]
    x = np.random.default_rng(0).random((2, 3), np.float32)
    assert np.array_equal(run_onnx(read_back, {"x": x})["y"], run_onnx(model, {"x": x})["y"])


def test_sequences_and_optionals_keep_their_types() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        main (seq(float[N]) s, optional(float[2]) o, int64 i) => (seq(float[N]) t, float[2] y) {
            a = SequenceAt (s, i)
            t = SequenceInsert (s, a)
            y = OptionalGetElement (o)
        }
        """
    )
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N"]))
    assert_same(model, copy(model))
    graph = from_proto(onnx.ModelProto.FromString(model.SerializeToString()))
    rewrite(graph, RTX)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    feeds = {"s": [np.ones(2, np.float32)], "o": np.zeros(2, np.float32), "i": np.array(0)}
    session = ort.InferenceSession(after.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [len(session.run(["t"], feeds)[0])] == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("main (float[2] x) => (float[2] y) { y = Add (x, lost) }", "reads the tensor 'lost', which nothing makes"),
        ("main (float[2] x) => (float[2] y) { z = Neg (x) }", "reads the tensor 'y', which nothing makes"),
        ("main (float[2] x) => (float[2] y) { y = Neg (x)  y = Abs (x) }", "makes the tensor 'y' twice"),
    ],
)
def test_a_model_that_is_none_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=message):
        read(tmp_path / "m.onnx")


# --- ONNX's own tests of every operator --------------------------------------------------------------------------


@cache
def node_tests() -> list[Any]:
    import warnings

    from onnx.backend.test.loader import load_node_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflows that the tests mean
        return sorted(load_node_model_tests(), key=lambda case: case.name)


def plain(value: Any) -> Any:
    if isinstance(value, onnx.SequenceProto):
        return numpy_helper.to_list(value)
    if isinstance(value, onnx.OptionalProto):
        return numpy_helper.to_optional(value)
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def run_or_none(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any] | None:
    """The outputs; None where ONNX Runtime lacks the operator or one of its types."""
    try:
        return list(run_onnx(model, feeds).values())
    except (RuntimeError, TypeError, ValueError, *ort_errors()):
        return None


def ort_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.NotImplemented, state.InvalidGraph, state.Fail, state.RuntimeException, state.InvalidArgument)


def equal(left: Any, right: Any, tolerance: float) -> bool:
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(equal, left, right, [tolerance] * 99))
    if left is None or right is None:
        return left is right
    left, right = np.asarray(left), np.asarray(right)
    if left.shape != right.shape:
        return False
    if left.dtype.kind in "OUSb" or tolerance == 0:
        same = (left == right) | ((left != left) & (right != right))
        return left.dtype.kind == right.dtype.kind and bool(np.all(same))
    wide = np.complex128 if left.dtype.kind == "c" else np.float64
    return np.allclose(left.astype(wide), right.astype(wide), rtol=tolerance, atol=1e-4, equal_nan=True)


RANDOM = ("Bernoulli", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial")


@pytest.mark.parametrize("part", range(4))
def test_models_of_every_operator_compute_the_same_after_a_round_trip_and_after_the_passes(part: int) -> None:
    """A sample of ONNX's tests; set BRIDGE_ALL_NODE_TESTS for all 2,000."""
    step = 4 if "BRIDGE_ALL_NODE_TESTS" in os.environ else 24
    ran, wrong = 0, []
    for case in node_tests()[part::step]:
        names = [item.name for item in case.model.graph.input]
        feeds = {name: plain(value) for name, value in zip(names, case.data_sets[0][0], strict=False)}
        stored = [plain(value) for value in case.data_sets[0][1]]
        again = copy(case.model)
        graph = from_proto(onnx.ModelProto.FromString(case.model.SerializeToString()))
        rewrite(graph, RTX)
        rewritten = to_proto(graph)
        expected = run_or_none(case.model, feeds)
        if expected is None or any(node.op_type in RANDOM for node in case.model.graph.node):
            continue
        ran += 1
        if not equal(expected, run_or_none(again, feeds), 0):
            wrong.append(f"{case.name}: the round trip changed it")
        if equal(stored, expected, 1e-3):
            kinds = {item.name: item.type.tensor_type.elem_type for item in rewritten.graph.input}
            narrow = {
                name: value.astype(helper.tensor_dtype_to_np_dtype(kinds[name]))
                if isinstance(value, np.ndarray) and kinds[name]  # a sequence has none
                else value
                for name, value in feeds.items()
            }
            if not equal(stored, run_or_none(rewritten, narrow), 1e-3):
                wrong.append(f"{case.name}: the passes changed it")
    assert ran > 30, f"only {ran} models ran"
    assert not wrong, "\n".join(wrong)


# --- weights -----------------------------------------------------------------------------------------------------


def chain(path: Path, sizes: list[int], data: str = "weights.bin") -> None:
    """Writes a model x * w0 * w1 …, whose weights lie in a sparse file of zeros, each ending with its number + 1."""
    offset, initializers, nodes, last = 0, [], [], "x"
    with (path.parent / data).open("wb") as file:
        for number, size in enumerate(sizes):
            tensor = TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT, dims=[size])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data), ("offset", offset), ("length", 4 * size)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
            offset += 4 * size
            file.truncate(offset)
            file.seek(offset - 4)
            file.write(np.float32(number + 1).tobytes())
            nodes += [
                helper.make_node("Identity", [f"w{number}"], [f"v{number}"]),
                helper.make_node("Gather", [f"v{number}", "end"], [f"g{number}"]),
                helper.make_node("Add", [last, f"g{number}"], [f"y{number}"]),
            ]
            last = f"y{number}"
    initializers.append(numpy_helper.from_array(np.array([-1]), "end"))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [1])],
        initializers,
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    path.write_bytes(model.SerializeToString())


def entries(path: Path) -> dict[str, dict[str, str]]:
    model = onnx.load(path, load_external_data=False)
    return {
        item.name: {entry.key: entry.value for entry in item.external_data}
        for item in model.graph.initializer
        if item.data_location == TensorProto.EXTERNAL
    }


def test_weights_that_lie_where_the_model_ends_up_are_referred_to(tmp_path: Path) -> None:
    chain(tmp_path / "m.onnx", [40_000, 50_000])
    (tmp_path / ".partial").mkdir()
    graph = read(tmp_path / "m.onnx")
    assert float(graph.nodes[0].inputs[0].values[-1]) == 1  # looking at values does not unmap them
    files = write(graph, tmp_path / ".partial" / "out.onnx", beside=tmp_path)
    assert files == ("out.onnx",)
    assert {item["location"] for item in entries(tmp_path / ".partial" / "out.onnx").values()} == {"weights.bin"}
    (tmp_path / ".partial" / "out.onnx").rename(tmp_path / "out.onnx")
    assert run_onnx(tmp_path / "out.onnx", {"x": np.zeros(1, np.float32)})["y1"] == 3


def test_weights_from_elsewhere_are_copied_one_by_one_to_aligned_places(tmp_path: Path) -> None:
    size = INLINE_LIMIT // 8 + 100
    chain(tmp_path / "m.onnx", [size, 100, size])
    (tmp_path / "out").mkdir()
    graph = read(tmp_path / "m.onnx")
    tracemalloc.start()
    files = write(graph, tmp_path / "out" / "m.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * COPY_CHUNK, f"copying {8 * size >> 20} MB took {peak >> 20} MB of memory"
    assert files == ("m.onnx.data", "m.onnx")
    found = entries(tmp_path / "out" / "m.onnx")
    assert set(found) == {"w0", "w2"}, "a tensor below EXTERNAL_MIN belongs inside"
    assert EXTERNAL_MIN >= 400 and all(int(item["offset"]) % ALIGNMENT == 0 for item in found.values())
    assert run_onnx(tmp_path / "out" / "m.onnx", {"x": np.zeros(1, np.float32)})["y2"] == 6


def test_small_weights_from_elsewhere_come_inside(tmp_path: Path) -> None:
    chain(tmp_path / "m.onnx", [40_000, 50_000])
    (tmp_path / "out").mkdir()
    assert write(read(tmp_path / "m.onnx"), tmp_path / "out" / "m.onnx") == ("m.onnx",)
    assert not entries(tmp_path / "out" / "m.onnx")


def test_writing_over_the_model_that_was_read_does_not_destroy_its_weights(tmp_path: Path) -> None:
    chain(tmp_path / "m.onnx", [40_000], data="m.onnx.data")
    graph = read(tmp_path / "m.onnx")
    large = np.zeros(INLINE_LIMIT // 4 + 1, np.float32)
    large[-1] = 5
    graph.nodes[0].inputs[0] = gs.Constant("large", large)
    files = write(graph, tmp_path / "m.onnx")
    assert files == ("m.onnx.data", "m.onnx")
    assert run_onnx(tmp_path / "m.onnx", {"x": np.zeros(1, np.float32)})["y0"] == 5


def test_a_model_over_two_gigabytes_is_rewritten_in_little_memory(tmp_path: Path) -> None:
    """2.4 GB of weights in a sparse file: read, rewritten and written beside it, then copied elsewhere."""
    chain(tmp_path / "m.onnx", [200_000_000, 200_000_000, 200_000_000])
    script = f"""
import json, resource, time
from pathlib import Path
from bridge import target
from passes import read, rewrite, write
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
graph = read(Path({str(tmp_path / "m.onnx")!r}))
log = rewrite(graph, target.resolve("tensorrt-rtx-1.7"))
files = write(graph, Path({str(tmp_path / "out.onnx")!r}))
print(json.dumps(dict(
    grown=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024,
    seconds=time.perf_counter() - start, files=files, changes=log.changes)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["files"] == ["out.onnx"] and report["changes"] >= 3, report
    assert report["grown"] < 150, f"resident memory grew by {report['grown']} MB"
    assert (tmp_path / "out.onnx").stat().st_size < 10_000
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    places = entries(tmp_path / "out.onnx")
    assert sum(int(item["length"]) for item in places.values()) == 2_400_000_000
    assert read(tmp_path / "out.onnx").nodes[0].inputs[0].values[-1] == 1


def test_the_passes_do_not_touch_a_graph_that_needs_nothing(tmp_path: Path) -> None:
    chain(tmp_path / "m.onnx", [5_000])
    graph = read(tmp_path / "m.onnx")
    rewrite(graph, RTX)
    before = to_proto(graph).SerializeToString(deterministic=True)
    log = rewrite(graph, RTX)
    assert not log.changes and to_proto(graph).SerializeToString(deterministic=True) == before
    assert all(node.name for scope in scopes(graph) for node in scope.nodes)
