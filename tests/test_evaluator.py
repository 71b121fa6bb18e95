"""Low precision as it is: what a type cannot hold is seen, where ONNX Runtime hides it, and the layer that loses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bridge import evaluator
from bridge.errors import RunError, UsageError
from bridge.evaluator import evaluate, layer_errors
from bridge.layers import LayerError, TensorError, table, worst

from .support import run_onnx

FP32, FP16, BF16, BOOL, INT64 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.BOOL,
    TensorProto.INT64,
)
LOW = {FP16: np.dtype(np.float16), BF16: np.dtype(ml_dtypes.bfloat16)}

Infos = dict[str, tuple[int, list[int]]]


def info(name: str, kind: int, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name: str, values: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(values, dtype), name)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Infos,
    outputs: Infos,
    constants: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    """Writes the model, and checks it."""
    graph = helper.make_graph(
        nodes,
        "model",
        [info(name, *kind) for name, kind in inputs.items()],
        [info(name, *kind) for name, kind in outputs.items()],
        list(constants),
    )
    imports = [helper.make_opsetid("", 20), *(helper.make_opsetid(item.domain, 1) for item in functions)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"n_{outputs.split()[0]}", **attributes)


def random(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# --- evaluate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FP16, BF16])
def test_every_value_is_rounded_to_its_type(tmp_path: Path, kind: int) -> None:
    x, low = random(4, 5) * 100, LOW[kind]
    nodes = [node("Cast", "x", "a", to=kind), node("Mul", "a a", "b"), node("Add", "b a", "c"), node("Sqrt", "b", "d")]
    path = save(tmp_path / "m.onnx", nodes, {"x": (FP32, [4, 5])}, {"c": (kind, [4, 5]), "d": (kind, [4, 5])})
    (found,) = evaluate(path, [{"x": x}], ["a", "b", "c", "d"])
    a = x.astype(low).astype(np.float32)
    b = (a * a).astype(low).astype(np.float32)
    expected = {"a": a, "b": b, "c": (b + a).astype(low), "d": np.sqrt(b).astype(low)}
    for name, values in expected.items():
        assert found[name].dtype == low, name
        np.testing.assert_array_equal(found[name].astype(np.float32), values.astype(np.float32), err_msg=name)


def test_an_overflow_that_onnx_runtime_hides_is_seen(tmp_path: Path) -> None:
    nodes = [node("Cast", "x", "a", to=FP16), node("Mul", "a big", "b"), node("Div", "b big", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"x": (FP32, [3])}, {"y": (FP16, [3])}, [constant("big", 6e4, np.float16)])
    feeds = {"x": np.ones(3, np.float32) * 4}
    hidden = run_onnx(path, feeds)["y"]
    (found,) = evaluate(path, [feeds], ["b", "y"])
    assert np.isfinite(hidden).all(), "ONNX Runtime shows it by itself: this file has less to do"
    assert np.isinf(found["b"]).all() and np.isinf(found["y"]).all()


def grows(kind: int, source: str, result: str) -> list[onnx.NodeProto]:
    """result = source * 1000 / 1000, whose middle is more than float16 holds where the source is above 65."""
    return [
        node("Mul", f"{source} thousand", f"{result}_middle"),
        node("Div", f"{result}_middle thousand", f"{result}_ends"),
        node("Cast", f"{result}_ends", result, to=kind),
    ]


def branch(name: str, nodes: Sequence[onnx.NodeProto], output: onnx.ValueInfoProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [output])


def body_of(kind: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes from the low tensor ``a`` to ``y``, which overflow in a body."""
    constants = [constant("thousand", 1000, np.float16)]
    if kind == "If":
        then = branch("then", grows(FP16, "a", "t"), info("t", FP16, None))
        other = branch("else", [node("Neg", "a", "e")], info("e", FP16, None))
        return [node("If", "yes", "y", then_branch=then, else_branch=other)], [*constants, constant("yes", True, bool)]
    if kind == "Loop":
        nodes = [node("Identity", "go", "go_on"), *grows(FP16, "v", "grown"), node("Add", "grown a", "next")]
        inputs = [info("turn", INT64, []), info("go", BOOL, []), info("v", FP16, None)]
        outputs = [info("go_on", BOOL, []), info("next", FP16, None)]
        loop = helper.make_graph(nodes, "body", inputs, outputs)
        more = [constant("turns", 3, np.int64), constant("yes", True, bool)]
        return [node("Loop", "turns yes a", "y", body=loop)], [*constants, *more]
    inputs = [info("row", FP16, None)]
    scan = helper.make_graph(grows(FP16, "row", "grown"), "body", inputs, [info("grown", FP16, None)])
    return [node("Scan", "a", "y", body=scan, num_scan_inputs=1)], constants


@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
@pytest.mark.parametrize("size", [2, 100])
def test_bodies_are_evaluated_as_the_rest(tmp_path: Path, kind: str, size: int) -> None:
    nodes, constants = body_of(kind)
    nodes = [node("Cast", "x", "a", to=FP16), *nodes]
    path = save(tmp_path / "m.onnx", nodes, {"x": (FP32, [3, 2])}, {"y": (FP16, [3, 2])}, constants)
    (found,) = evaluate(path, [{"x": np.full((3, 2), size, np.float32)}])
    times = 4 if kind == "Loop" else 1
    expected = np.full((3, 2), size * times if size < 66 else np.inf, np.float16)
    np.testing.assert_array_equal(found["y"], expected)


def test_a_body_reads_low_tensors_around_it(tmp_path: Path) -> None:
    """What a body takes from outside is cast where it is made, and in its turn by a body within the body."""
    inner = branch("inner", [node("Mul", "a w", "i")], info("i", BF16, None))
    other = branch("other", [node("Identity", "a", "o")], info("o", BF16, None))
    outer = branch("outer", [node("If", "yes", "p", then_branch=inner, else_branch=other)], info("p", BF16, None))
    rest = branch("rest", [node("Identity", "a", "r")], info("r", BF16, None))
    nodes = [node("Cast", "x", "a", to=BF16), node("If", "yes", "y", then_branch=outer, else_branch=rest)]
    constants = [constant("w", random(3), ml_dtypes.bfloat16), constant("yes", True, bool)]
    path = save(tmp_path / "m.onnx", nodes, {"x": (FP32, [3])}, {"y": (BF16, [3])}, constants)
    x = random(3) + 2
    (found,) = evaluate(path, [{"x": x}])
    a, w = (item.astype(ml_dtypes.bfloat16).astype(np.float32) for item in (x, random(3)))
    np.testing.assert_array_equal(found["y"], (a * w).astype(ml_dtypes.bfloat16))


def test_inputs_and_outputs_of_a_low_type_may_come_in_any(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Add", "x x", "y")], {"x": (BF16, [3])}, {"y": (BF16, [3])})
    x = random(3)
    low = x.astype(ml_dtypes.bfloat16)
    found = evaluate(path, [{"x": x}, {"x": low}, {"x": x.astype(np.float64)}], ["x", "y"])
    for item in found:
        assert item["y"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(item["x"], low)
        np.testing.assert_array_equal(item["y"], low + low)


def test_types_that_attributes_name_are_rounded_too(tmp_path: Path) -> None:
    shape = constant("shape", [3], np.int64)
    value = helper.make_tensor("", FP16, [1], [0.1])
    nodes = [
        node("ConstantOfShape", "shape", "a", value=value),
        node("CastLike", "x a", "b"),
        node("Add", "a b", "c"),
        node("EyeLike", "x", "d", dtype=FP16),
        node("MatMul", "c d", "y"),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": (FP32, [3, 3])}, {"y": (FP16, [3, 3])}, [shape])
    x = random(3, 3)
    (found,) = evaluate(path, [{"x": x}])
    np.testing.assert_array_equal(found["y"], np.float16(0.1) + x.astype(np.float16))


def test_quantised_values_are_rounded_by_their_own_nodes(tmp_path: Path) -> None:
    scale = constant("scale", 0.1, np.float16)
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    nodes = [
        node("Cast", "x", "a", to=FP16),
        node("QuantizeLinear", "a scale zero", "q"),
        node("DequantizeLinear", "q scale zero", "y"),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": (FP32, [50])}, {"y": (FP16, [50])}, [scale, zero])
    x = random(50)
    (found,) = evaluate(path, [{"x": x}], ["q", "y"])
    factor = np.float32(np.float16(0.1))
    eighth = (x.astype(np.float16).astype(np.float32) / factor).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found["q"], eighth)
    np.testing.assert_array_equal(found["y"], (eighth.astype(np.float32) * factor).astype(np.float16))


def function(domain: str) -> onnx.FunctionProto:
    nodes = [helper.make_node("Mul", ["v", "v"], ["m"]), helper.make_node("Sqrt", ["m"], ["r"])]
    return helper.make_function(domain, "Size", ["v"], ["r"], nodes, [helper.make_opsetid("", 20)])


@pytest.mark.parametrize(("domain", "inside"), [("mine", np.inf), ("bridge.plugins", 300)])
def test_a_function_rounds_inside_and_a_plugin_only_what_it_returns(tmp_path: Path, domain: str, inside: float) -> None:
    call = helper.make_node("Size", ["a"], ["s"], name="call", domain=domain)
    nodes = [node("Cast", "x", "a", to=FP16), call, node("Neg", "s", "y")]
    model = save(tmp_path / "m.onnx", nodes, {"x": (FP32, [3])}, {"y": (FP16, [3])}, (), [function(domain)])
    (found,) = evaluate(model, [{"x": np.full(3, 300, np.float32)}])
    np.testing.assert_array_equal(found["y"], np.full(3, -inside, np.float16))


def test_a_model_of_float32_computes_what_it_did(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Softmax", "a", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"x": (FP32, [4, 8])}, {"y": (FP32, [4, 8])}, [constant("w", random(8, 8))])
    feeds = {"x": random(4, 8)}
    np.testing.assert_array_equal(evaluate(path, [feeds])[0]["y"], run_onnx(path, feeds)["y"])


def test_weights_in_a_file_stay_there(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    weight = random(64, 64)
    nodes = [node("Cast", "x", "a", to=FP16), node("MatMul", "a w", "y")]
    constants = [constant("w", weight, np.float16)]
    save(path, nodes, {"x": (FP32, [2, 64])}, {"y": (FP16, [2, 64])}, constants)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert path.stat().st_size < weight.nbytes / 4
    (found,) = evaluate(path, [{"x": random(2, 64)}])
    exact = random(2, 64).astype(np.float16).astype(np.float32) @ weight.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found["y"], exact.astype(np.float16))
    assert {item.name for item in tmp_path.iterdir()} == {"m.onnx", "weights.bin"}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Add", "x x", "y")], {"x": (FP16, [3])}, {"y": (FP16, [3])})
    feeds = {"x": random(3)}
    with pytest.raises(UsageError, match=r"m\.onnx: has no tensor 'z'"):
        evaluate(path, [feeds], ["z"])
    with pytest.raises(UsageError, match="input 'x' is not given; given are w"):
        evaluate(path, [{"w": feeds["x"]}])
    with pytest.raises(UsageError, match="input 'x' is float32, and int64 is given"):
        evaluate(path, [{"x": np.arange(3)}])
    with pytest.raises(RunError, match=r"m\.onnx does not run: .*Got: 4 Expected: 3"):
        evaluate(path, [{"x": random(4)}])
    with pytest.raises(RunError, match="cannot be read"):
        evaluate(tmp_path / "missing.onnx", [feeds])


# --- layer errors ------------------------------------------------------------------------------------------------

SHAPE: Infos = {"x": (FP32, [4, 8])}
WEIGHTS = [constant("w", random(8, 8)), constant("big", 3e4), constant("many", [[1e6]])]


def reference(path: Path) -> Path:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Mul", "a big", "b"),
        node("Div", "b big", "c"),
        node("Softmax", "c", "d"),
        node("Neg", "d", "y"),
    ]
    return save(path, nodes, SHAPE, {"y": (FP32, [4, 8])}, WEIGHTS)


def half(path: Path) -> Path:
    """All of it in float16 but the softmax, as a cast pass would write it: names of nodes stay, some tensors move."""
    nodes = [
        node("Cast", "x", "x_low", to=FP16),
        node("MatMul", "x_low w_low", "a"),
        node("Mul", "a big_low", "b"),
        node("Div", "b big_low", "c"),
        node("Cast", "c", "c_wide", to=FP32),
        node("Softmax", "c_wide", "d"),
        node("Cast", "d", "d_low", to=FP16),
        helper.make_node("Neg", ["d_low"], ["y_low"], name="n_y"),
        helper.make_node("Cast", ["y_low"], ["y"], name="cast_y", to=FP32),
    ]
    constants = [constant(f"{item.name}_low", onnx.numpy_helper.to_array(item), np.float16) for item in WEIGHTS[:2]]
    return save(path, nodes, SHAPE, {"y": (FP32, [4, 8])}, constants)


def by_tensor(errors: Sequence[LayerError]) -> dict[str, LayerError]:
    return {item.tensor: item for item in errors}


def figures(found: TensorError | None) -> TensorError:
    assert found is not None
    return found


def test_each_layer_says_what_it_introduces_and_what_it_carries(tmp_path: Path) -> None:
    samples = [{"x": random(4, 8) / 4}, {"x": random(4, 8) * 2}]
    errors = layer_errors(reference(tmp_path / "f.onnx"), half(tmp_path / "h.onnx"), samples)
    assert [item.tensor for item in errors] == ["a", "b", "c", "d", "y"]
    assert [item.precision for item in errors] == ["float16", "float16", "float16", "float32", "float16"]
    found = by_tensor(errors)
    # Only the product overflows, and only in the second sample; what divides it afterwards introduces next to nothing.
    a = np.concatenate([item["x"] @ onnx.numpy_helper.to_array(WEIGHTS[0]) for item in samples])
    lost = int((np.abs(a * 3e4) > 65520).sum())
    assert 0 < lost < a.size
    assert figures(found["b"].introduced).non_finite == lost
    assert figures(found["c"].carried).non_finite == lost
    # What is divided has overflowed already, by the product's doing.
    assert figures(found["c"].introduced).non_finite == 0
    assert figures(found["a"].introduced).non_finite == figures(found["a"].carried).non_finite == 0
    assert 1e-5 < (figures(found["a"].introduced).relative or 0) < 1e-3
    # The softmax is computed in float32 from what the reference has there, whatever comes before it.
    assert figures(found["d"].introduced) == TensorError(0.0, 0.0, 0)
    assert figures(found["d"].carried).non_finite > 0
    assert found["a"].largest == pytest.approx(np.abs(a).max())


def test_the_worst_layers_come_first_in_the_table(tmp_path: Path) -> None:
    errors = layer_errors(reference(tmp_path / "f.onnx"), half(tmp_path / "h.onnx"), [{"x": random(4, 8) * 2}])
    order = [item.tensor for item in worst(errors)]
    assert order[0] == "b" and "d" not in order, "a softmax in float32 adds nothing"
    assert "y" in order, "the cast in front of it rounds"
    lines = table(errors, count=1).splitlines()
    assert len(lines) == 2 and lines[0].split()[:4] == ["layer", "in", "introduced", "carried"]
    assert lines[1].split()[:3] == ["Mul", "n_b", "float16"]


def test_memory_is_bounded_by_chunks_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, samples = (reference(tmp_path / "f.onnx"), half(tmp_path / "h.onnx")), [{"x": random(4, 8)}]
    whole = layer_errors(*paths, samples)
    held: list[int] = []

    def counting(honest: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            run = honest(*args, **options)

            def measured(given: Any) -> Any:
                found = run(given)
                held.append(sum(array.nbytes for array in found.values()))
                return found

            return measured

        return counted

    monkeypatch.setattr(evaluator.Evaluator, "open", counting(evaluator.Evaluator.open))
    monkeypatch.setattr(evaluator.Walk, "next", counting(evaluator.Walk.next))
    limit = 5 * 4 * 8 * 4  # what one node takes: an input, and four times its output
    monkeypatch.setattr(evaluator, "CHUNK_BYTES", limit)
    assert layer_errors(*paths, samples) == whole
    assert len(held) == 5 * 4 and max(held) <= limit, held


def test_quantisation_counts_with_the_layer_that_reads_it(tmp_path: Path) -> None:
    weights = onnx.numpy_helper.to_array(WEIGHTS[0])
    scale = np.float32(np.abs(weights).max() / 127)
    nodes = [
        node("QuantizeLinear", "x x_scale zero", "x_q"),
        node("DequantizeLinear", "x_q x_scale zero", "x_dq"),
        node("DequantizeLinear", "w_q w_scale zero", "w_dq"),
        node("MatMul", "x_dq w_dq", "a"),
        *(node(op, *names) for op, *names in (("Mul", "a big", "b"), ("Div", "b big", "c"), ("Softmax", "c", "d"))),
        node("Neg", "d", "y"),
    ]
    constants = [
        constant("x_scale", 3 / 127),
        constant("w_scale", scale),
        constant("zero", 0, np.int8),
        constant("w_q", np.round(weights / scale), np.int8),
        WEIGHTS[1],
    ]
    low = save(tmp_path / "q.onnx", nodes, SHAPE, {"y": (FP32, [4, 8])}, constants)
    found = by_tensor(layer_errors(reference(tmp_path / "f.onnx"), low, [{"x": random(4, 8)}]))
    assert {name: item.precision for name, item in found.items()} == {
        "a": "int8",
        **dict.fromkeys(("b", "c", "d", "y"), "float32"),
    }
    assert 1e-3 < (figures(found["a"].introduced).relative or 0) < 0.1
    assert found["a"].introduced == found["a"].carried
    assert all(figures(found[name].introduced).relative == 0 for name in ("b", "c", "d", "y"))
    assert [item.tensor for item in worst(found.values())] == ["a"]


def test_what_became_the_end_of_the_range_is_told_apart(tmp_path: Path) -> None:
    """A mask's "minus infinity" is as good at the end of the low type's range, and would hide every other error."""
    x, mask = random(4, 8), np.where(np.arange(8) < 4, 0, -1e30).astype(np.float32)
    nodes = [node("Add", "x m", "a"), node("Softmax", "a", "y")]
    full = save(tmp_path / "f.onnx", nodes, SHAPE, {"y": (FP32, [4, 8])}, [constant("m", mask)])
    nodes = [node("Cast", "x", "x_low", to=FP16), node("Add", "x_low m", "a"), node("Softmax", "a", "y")]
    lowest = constant("m", np.maximum(mask, -65504), np.float16)
    low = save(tmp_path / "h.onnx", nodes, SHAPE, {"y": (FP16, [4, 8])}, [lowest])
    found = by_tensor(layer_errors(full, low, [{"x": x}]))
    added = figures(found["a"].introduced)
    assert (added.saturated, added.non_finite) == (16, 0)
    assert added.relative is not None and 1e-5 < added.relative < 1e-3
    assert figures(found["y"].carried).saturated == 0


@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
def test_a_body_is_one_layer(tmp_path: Path, kind: str) -> None:
    nodes, constants = body_of(kind)
    models = []
    for name, low in (("f", FP32), ("h", FP16)):
        for item in nodes:
            _retype(item, low)
        weights = [
            constant(item.name, onnx.numpy_helper.to_array(item), helper.tensor_dtype_to_np_dtype(low))
            if item.data_type in (FP16, FP32)
            else item
            for item in constants
        ]
        cast = node("Cast", "x", "a", to=low)
        models.append(
            save(tmp_path / f"{name}.onnx", [cast, *nodes], {"x": (FP32, [3, 2])}, {"y": (low, [3, 2])}, weights)
        )
    found = by_tensor(layer_errors(*models, [{"x": np.full((3, 2), 66, np.float32)}]))
    assert set(found) == {"a", "y"}
    assert figures(found["y"].introduced).non_finite == figures(found["y"].carried).non_finite == 6
    assert figures(found["a"].introduced).non_finite == 0


def _retype(item: onnx.NodeProto, kind: int) -> None:
    """Changes the low type of a node and its bodies."""
    for attribute in item.attribute:
        if attribute.name == "to":
            attribute.i = kind
        for body in [attribute.g] if attribute.HasField("g") else []:
            for tensor in (*body.input, *body.output):
                if tensor.type.tensor_type.elem_type in (FP16, FP32):
                    tensor.type.tensor_type.elem_type = kind
            for inner in body.node:
                _retype(inner, kind)


def test_no_samples_measure_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="samples: there are none"):
        layer_errors(reference(tmp_path / "f.onnx"), half(tmp_path / "h.onnx"), [])
