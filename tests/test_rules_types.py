"""Types, integers, quantised operators, sorts and loops compute after the passes what they did before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from bridge import target as targets
from passes import Log, read, rewrite
from passes.framework import Builder, example
from passes.model import numpy_dtype, onnx_dtype, to_proto, write
from tests.support import RTX_INSTALLED, fitted, parse, run_onnx

RTX = targets.resolve("tensorrt-rtx-1.7")


def rewritten(model: onnx.ModelProto, folder: Path, builds: bool = True) -> tuple[onnx.ModelProto, Log]:
    onnx.save(model, str(folder / "before.onnx"))
    graph = read(folder / "before.onnx")
    log = rewrite(graph, RTX)
    write(graph, folder / "after.onnx")
    if builds and RTX_INSTALLED:
        refused = parse(folder / "after.onnx")
        assert not refused, refused
    return onnx.load(folder / "after.onnx"), log


# --- casts -------------------------------------------------------------------------------------------------------

NARROW = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")


@pytest.mark.parametrize("saturate", [0, 1])
@pytest.mark.parametrize("name", NARROW)
def test_a_cast_to_float8_and_back_rounds_as_onnx_says(name, saturate, tmp_path: Path) -> None:
    kind = getattr(TensorProto, name)
    graph = example(
        {"x": ("float32", ["n"])}, lambda g, x: g.op.Cast(g.op.Cast(x, to=kind, saturate=saturate), to=1), opset=20
    )
    random = np.random.default_rng(0)
    grid = np.arange(256, dtype=np.uint8).view(numpy_dtype(kind)).astype(np.float32)
    between = (grid[:-1] + grid[1:]) / 2
    x = np.concatenate([grid, between, random.standard_normal(500) * 2.0 ** random.integers(-20, 20, 500)])
    x = np.concatenate([x, [np.inf, -np.inf, np.nan, 1e30, -1e30, 0.0]]).astype(np.float32)
    model, log = rewritten(to_proto(graph), tmp_path)
    assert "cast_past_missing_type" in log.nodes
    cast = onnx.numpy_helper.saturate_cast if saturate else np.ndarray.astype
    expected = cast(x, numpy_dtype(kind)).astype(np.float32)  # ONNX Runtime makes NaN of some that round to infinity
    np.testing.assert_array_equal(next(iter(run_onnx(model, {"x": x}).values())), expected)


@pytest.mark.parametrize("name", ["INT4", "UINT4"])
def test_four_bit_outputs_come_as_int32(name, tmp_path: Path) -> None:
    kind = getattr(TensorProto, name)
    original = to_proto(example({"x": ("float32", ["n"])}, lambda g, x: g.op.Cast(x, to=kind), opset=21))
    model, log = rewritten(original, tmp_path)
    assert "boundary_to_wider_types" in log.nodes
    assert any("int32" in note for note in log.notes)
    x = np.arange(-20, 20).astype(np.float32)
    expected = x.astype(np.int32).astype(numpy_dtype(kind)).astype(np.int32)
    np.testing.assert_array_equal(next(iter(run_onnx(model, {"x": x}).values())), expected)


@pytest.mark.parametrize("kind", ["uint16", "int16", "uint32", "uint64"])
def test_inputs_of_types_without_tensors_are_carried(kind, tmp_path: Path) -> None:
    graph = example(
        {"x": (kind, ["n", 3])},
        lambda g, x: g.op.Cast(g.op.Add(g.op.Transpose(x, perm=[1, 0]), g.constant(3, kind)), to=1),
    )
    original = to_proto(graph)
    model, _ = rewritten(original, tmp_path)
    limits = np.iinfo(kind)
    x = np.array([[limits.min, limits.max, 5], [limits.max - 3, 9, 1]], kind)
    wanted = next(iter(run_onnx(original, {"x": x}).values()))
    found = next(iter(run_onnx(model, fitted(model, {"x": x})).values()))
    np.testing.assert_allclose(found, wanted, rtol=2e-7)


# --- integers ----------------------------------------------------------------------------------------------------


def test_an_image_pipeline_in_uint8_keeps_every_byte(tmp_path: Path) -> None:
    """Crop, flip, brighten with saturation, threshold, pool: as written with torch on uint8."""

    def build(g: Any, x: Any) -> list[Any]:
        cropped = g.slice(x, [1, 2], [7, 8], [2, 3], [1, 1])
        flipped = g.slice(cropped, [-1], [-(1 << 31)], [3], [-1])
        wide = g.op.Mul(g.cast(flipped, np.int32), g.constant(2, np.int32))
        bright = g.cast(g.op.Min(wide, g.constant(255, np.int32)), np.uint8)
        wrapped = g.op.Mul(bright, g.constant(3, np.uint8))
        mask = g.op.Greater(wrapped, g.constant(127, np.uint8))
        chosen = g.op.Where(mask, bright, g.op.Sub(g.constant(255, np.uint8), bright))
        return [chosen, g.op.MaxPool(chosen, kernel_shape=[2, 2], strides=[2, 2]), g.cast(wrapped, np.float32)]

    original = to_proto(example({"x": ("uint8", ["n", 3, 8, 9])}, build))
    model, _ = rewritten(original, tmp_path)
    x = np.random.default_rng(0).integers(0, 255, [2, 3, 8, 9], np.uint8, endpoint=True)
    expected = run_onnx(original, {"x": x})
    for name, array in run_onnx(model, {"x": x}).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_remainders_of_floats_have_the_sign_of_the_divisor(kind, tmp_path: Path) -> None:
    graph = example({"x": (kind, ["n"]), "y": (kind, ["n"])}, lambda g, x, y: g.op.Mod(x, y), opset=26)
    model, _ = rewritten(to_proto(graph), tmp_path)
    x, y = (np.array(values, kind) for values in ([7, -7, 7, -7, 6, -6, 0, 5.5, -0.0], [3, 3, -3, -3, 3, -3, 2, -2, 1]))
    np.testing.assert_array_equal(next(iter(run_onnx(model, {"x": x, "y": y}).values())), np.mod(x, y))


@pytest.mark.parametrize("products", [100, 258, 259, 4000])
def test_integer_products_are_exact_however_many_are_summed(products, tmp_path: Path) -> None:
    graph = example(
        {"x": ("uint8", ["n", products]), "y": ("uint8", [products, 3])}, lambda g, x, y: g.op.MatMulInteger(x, y)
    )
    original = to_proto(graph)
    model, _ = rewritten(original, tmp_path)
    feeds = {"x": np.full([2, products], 255, np.uint8), "y": np.full([products, 3], 255, np.uint8)}
    feeds["x"][0, ::3] = 254
    expected = feeds["x"].astype(np.int64) @ feeds["y"].astype(np.int64)
    np.testing.assert_array_equal(next(iter(run_onnx(model, feeds).values())), expected)


# --- sorts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("kind", ["float32", "int32", "int64"])
def test_a_long_sort_keeps_ties_in_order_and_infinities_at_the_ends(kind, largest, tmp_path: Path) -> None:
    n = 8000
    graph = example({"x": (kind, ["n", n])}, lambda g, x: g.op.TopK(x, [n], outputs=2, largest=largest))
    original = to_proto(graph)
    model, log = rewritten(original, tmp_path, builds=kind == "float32")
    assert "long_topk_in_rounds" in log.nodes
    x = np.random.default_rng(0).integers(-200, 200, [2, n]).astype(kind)
    if kind == "float32":
        x[:, ::50], x[:, 1::70] = np.inf, -np.inf
    else:
        x[:, ::50], x[:, 1::70] = np.iinfo(kind).min, np.iinfo(kind).max
    expected, found = run_onnx(original, {"x": x}), run_onnx(model, {"x": x})
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_more_than_can_be_sorted_is_declined_with_the_numbers(tmp_path: Path) -> None:
    graph = example({"x": ("float32", [1, 300_000])}, lambda g, x: g.op.TopK(x, [300_000], outputs=2))
    _, log = rewritten(to_proto(graph), tmp_path, builds=False)
    assert any("300,000 elements" in why for _, why in log.declined.values())


# --- loops -------------------------------------------------------------------------------------------------------


def loop(rounds: int, condition: str, opset: int = 18) -> onnx.ModelProto:
    """A state that grows by an outer tensor, and what it was in each round."""
    body = parser.parse_graph(
        f"""body (int64 i, bool go, float[n, 3] s) => (bool more, float[n, 3] t, float[n, 3] seen) {{
            step = Cast <to = 1> (i)
            part = Mul (x, step)
            t = Add (s, part)
            total = ReduceSum <keepdims = 0> (t)
            limit = Constant <value = float {{100.0}}> ()
            small = Less (total, limit)
            {condition}
            seen = Identity (t)
        }}"""
    )
    count = helper.make_tensor("count", TensorProto.INT64, [], [rounds])
    nodes = [helper.make_node("Loop", ["count", "", "x"], ["y", "history"], body=body)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    history = helper.make_tensor_value_info("history", TensorProto.FLOAT, [None, "n", 3])
    graph = helper.make_graph(nodes, "loop", [x], [y, history], [count])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


@pytest.mark.parametrize("rounds", [1, 2, 7])
@pytest.mark.parametrize("condition", ["more = Identity (go)", "more = Constant <value = bool {1}> ()"])
def test_a_loop_of_known_rounds_is_written_out(rounds, condition, tmp_path: Path) -> None:
    original = loop(rounds, condition)
    model, log = rewritten(original, tmp_path)
    assert "unroll_loops" in log.nodes
    assert "Loop" not in {node.op_type for node in model.graph.node}
    x = np.random.default_rng(0).standard_normal([4, 3]).astype(np.float32)
    expected = run_onnx(original, {"x": x})
    for name, array in run_onnx(model, {"x": x}).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6)


@pytest.mark.parametrize(("rounds", "condition"), [(3, "more = Identity (small)"), (10_000, "more = Identity (go)")])
def test_a_loop_that_may_end_early_or_is_long_stays(rounds, condition, tmp_path: Path) -> None:
    model, log = rewritten(loop(rounds, condition), tmp_path, builds=False)
    assert "unroll_loops" not in log.nodes
    assert "Loop" in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize(("zero", "named"), [(np.uint8(3), "uint8"), (np.int8(-7), "int8"), (np.int8(0), "")])
def test_quantisation_that_loses_its_kernels_is_said_once_with_the_way_out(zero, named, tmp_path: Path) -> None:
    def build(g: Builder, x: Any) -> Any:
        for scale in (0.1, 0.2):
            steps, place = g.constant(np.float32(scale)), g.constant(zero)
            x = g.op.DequantizeLinear(g.op.QuantizeLinear(x, steps, place), steps, place)
        return x

    _, log = rewritten(to_proto(example({"x": ("float32", [2, 4])}, build)), tmp_path)
    told = [note for note in log.notes if f"quantises to {named} " in note and "precision='int8'" in note]
    assert len(told) == len(log.notes) == bool(named), log.notes


def test_types_without_a_format_are_named_in_the_notes(tmp_path: Path) -> None:
    graph = example({"x": ("float32", [2])}, lambda g, x: g.op.Cast(x, to=onnx_dtype(np.uint16)))
    _, log = rewritten(to_proto(graph), tmp_path)
    assert any("uint16" in note and "int32" in note for note in log.notes)
