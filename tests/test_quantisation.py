"""Pairs of QuantizeLinear and DequantizeLinear: where they are put, how they are scaled, and what is left in float."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import nn

import bridge
from bridge.build import build
from bridge.inputs import Profile
from bridge.ranges import Range, measure
from bridge.target import resolve
from passes import all_rules, read, rewrite, write
from passes.framework import Builder, example
from passes.ir import Constant, scopes
from passes.model import to_proto
from passes.provenance import origin
from passes.quantisation import QUANTISABLE, QuantisationLog, quantise

from .support import RTX_INSTALLED, example_inputs, run_onnx


def weights(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """The same for the same shape."""
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * 0.3).astype(dtype)


def products(graph: gs.Graph, scheme: str = "int8") -> set[str]:
    return {node.name for scope in scopes(graph) for node in scope.nodes if node.op in QUANTISABLE[scheme]}


def ranges_of(graph: gs.Graph, largest: float = 3.0) -> dict[str, Range]:
    tensors = [*graph.inputs, *(tensor for scope in scopes(graph) for node in scope.nodes for tensor in node.outputs)]
    return {tensor.name: Range(-largest, largest) for tensor in tensors}


def quantised(graph: gs.Graph, scheme: Any = "int8", nodes: Collection[str] | None = None) -> QuantisationLog:
    return quantise(graph, scheme, ranges_of(graph), products(graph, scheme) if nodes is None else nodes)


def pair_of(tensor: gs.Tensor) -> tuple[gs.Tensor, np.ndarray, int | None]:
    """What was quantised, its scales, and their axis."""
    back = tensor.inputs[0]
    assert back.op == "DequantizeLinear", f"{tensor.name} comes from {back.op}"
    there = back.inputs[0].inputs[0]
    assert there.op == "QuantizeLinear" and there.inputs[1] is back.inputs[1] and there.inputs[2] is back.inputs[2]
    assert not np.asarray(back.inputs[2].values).astype(np.float32).any(), "TensorRT knows no other zero point"
    assert there.attrs == back.attrs
    return there.inputs[0], np.asarray(back.inputs[1].values), there.attrs.get("axis")


def only(graph: gs.Graph, op: str) -> gs.Node:
    (node,) = (node for scope in scopes(graph) for node in scope.nodes if node.op == op)
    return node


def error_of(build: Callable[[], gs.Graph], scheme: Any = "int8", nodes: Collection[str] | None = None) -> float:
    """The error's norm over the output's, with ranges as measured on the very inputs."""
    graph = build()
    model = to_proto(graph)
    feeds = example_inputs(model)
    expected = run_onnx(model, feeds)
    found = {
        tensor.name: Range(float(feeds[tensor.name].min()), float(feeds[tensor.name].max())) for tensor in graph.inputs
    }
    quantise(graph, scheme, {**ranges_of(graph, 6.0), **found}, products(graph, scheme) if nodes is None else nodes)
    quantised_model = to_proto(graph)
    onnx.checker.check_model(quantised_model, full_check=True)
    actual = run_onnx(quantised_model, feeds)
    assert any((actual[name] != expected[name]).any() for name in expected), "nothing was rounded"
    return max(
        float(
            np.linalg.norm(actual[name].astype(float) - expected[name]) / np.linalg.norm(expected[name].astype(float))
        )
        for name in expected
    )


# --- where the scales lie ----------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Callable[[], gs.Graph], int, tuple[int, ...] | None, int | None]] = {
    # how to make it, which input the weight is, the axes that one scale is over, and the axis with a scale each
    "Conv": (
        lambda: example({"x": ("float32", [2, 4, 6, 6])}, lambda g, x: g.op.Conv(x, g.constant(weights(8, 4, 3, 3)))),
        1,
        (1, 2, 3),
        0,
    ),
    "Conv of sequences in groups": (
        lambda: example(
            {"x": ("float32", [2, 4, 9])}, lambda g, x: g.op.Conv(x, g.constant(weights(8, 2, 3)), group=2)
        ),
        1,
        (1, 2),
        0,
    ),
    "ConvTranspose": (
        lambda: example(
            {"x": ("float32", [2, 4, 6, 6])}, lambda g, x: g.op.ConvTranspose(x, g.constant(weights(4, 8, 3, 3)))
        ),
        1,
        (0, 2, 3),
        1,
    ),
    "ConvTranspose in groups": (
        lambda: example(
            {"x": ("float32", [2, 4, 6, 6])},
            lambda g, x: g.op.ConvTranspose(x, g.constant(weights(4, 3, 3, 3)), group=2),
        ),
        1,
        None,
        None,
    ),
    "MatMul": (
        lambda: example({"x": ("float32", [2, 5, 6])}, lambda g, x: g.op.MatMul(x, g.constant(weights(6, 8)))),
        1,
        (0,),
        1,
    ),
    "MatMul of one matrix with batch axes": (
        lambda: example({"x": ("float32", [2, 5, 6])}, lambda g, x: g.op.MatMul(x, g.constant(weights(1, 6, 8)))),
        1,
        (0, 1),
        2,
    ),
    "MatMul of a batch of matrices": (
        lambda: example({"x": ("float32", [2, 5, 6])}, lambda g, x: g.op.MatMul(x, g.constant(weights(2, 6, 8)))),
        1,
        None,
        None,
    ),
    "MatMul with a vector": (
        lambda: example({"x": ("float32", [5, 6])}, lambda g, x: g.op.MatMul(x, g.constant(weights(6)))),
        1,
        None,
        None,
    ),
    "MatMul with the weight first": (
        lambda: example({"x": ("float32", [6, 5])}, lambda g, x: g.op.MatMul(g.constant(weights(8, 6)), x)),
        0,
        (1,),
        0,
    ),
    "Gemm": (
        lambda: example(
            {"x": ("float32", [5, 6])}, lambda g, x: g.op.Gemm(x, g.constant(weights(6, 8)), g.constant(weights(8)))
        ),
        1,
        (0,),
        1,
    ),
    "Gemm, transposed": (
        lambda: example(
            {"x": ("float32", [5, 6])},
            lambda g, x: g.op.Gemm(x, g.constant(weights(8, 6)), g.constant(weights(8)), transB=1),
        ),
        1,
        (1,),
        0,
    ),
    "Gemm with the weight first, transposed": (
        lambda: example({"x": ("float32", [6, 5])}, lambda g, x: g.op.Gemm(g.constant(weights(6, 8)), x, transA=1)),
        0,
        (0,),
        1,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_weight_has_a_scale_for_each_output_channel_and_an_activation_one(name: str) -> None:
    make, place, over, axis = FORMS[name]
    graph = make()
    log = quantised(graph)
    (product,) = log.quantised
    node = next(node for node in graph.nodes if node.name == product)
    weight, scales, found = pair_of(node.inputs[place])
    assert isinstance(weight, gs.Constant) and found == axis
    assert scales == pytest.approx(np.abs(weight.values).max(over) / 127)
    activation, scale, none = pair_of(node.inputs[1 - place])
    assert activation is graph.inputs[0] and none is None and scale.shape == () and scale == pytest.approx(3 / 127)
    assert len(node.inputs) < 3 or isinstance(node.inputs[2], gs.Constant), "a bias stays in float"
    assert log.pairs == 2 and log.counts() == {node.op: 1} and not log.declined
    error = error_of(make)
    assert error < 0.02, f"{name}: off by {error:.4f}"


@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("Conv")])
def test_fp8_has_one_scale_for_each_tensor(name: str) -> None:
    make, place, _, _ = FORMS[name]
    graph = make()
    (product,) = quantised(graph, "fp8").quantised
    node = next(node for node in graph.nodes if node.name == product)
    weight, scale, axis = pair_of(node.inputs[place])
    assert axis is None and scale == pytest.approx(np.abs(weight.values).max() / 448)
    assert pair_of(node.inputs[1 - place])[1] == pytest.approx(3 / 448)
    error = error_of(make, "fp8")
    assert error < 0.08, f"{name}: off by {error:.4f}"


def test_a_channel_of_zeros_and_a_weight_of_zeros_have_scales_that_are_not_zero() -> None:
    values = weights(8, 4, 3, 3)
    values[3] = 0
    values[5] *= 1e-12
    graph = example({"x": ("float32", [2, 4, 6, 6])}, lambda g, x: g.op.Conv(x, g.constant(values)))
    quantised(graph)
    scales = pair_of(only(graph, "Conv").inputs[1])[1]
    assert scales[3] == pytest.approx(np.abs(values).max() / 127) and scales[5] == 2.0**-24
    assert scales.astype(np.float16).all(), "nor do they become zero in half precision"
    empty = example({"x": ("float32", [2, 6])}, lambda g, x: g.op.MatMul(x, g.constant(np.zeros((6, 4), np.float32))))
    quantised(empty)
    assert (pair_of(only(empty, "MatMul").inputs[1])[1] > 0).all()


# --- which tensors -----------------------------------------------------------------------------------------------


def test_readers_of_one_tensor_share_its_pair_and_those_in_float_read_the_tensor_itself() -> None:
    shared = weights(6, 6)

    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        weight = g.constant(shared)
        a, b = g.op.MatMul(x, weight), g.op.Gemm(x, weight)
        return [g.op.Add(a, b), g.op.Exp(x), g.op.MatMul(x, weight)]

    graph = example({"x": ("float32", [5, 6])}, build)
    first, last = (node.name for node in graph.nodes if node.op == "MatMul")
    log = quantised(graph, nodes={first, only(graph, "Gemm").name})
    kept = next(node for node in graph.nodes if node.name == last)
    product, gemm = next(node for node in graph.nodes if node.name == first), only(graph, "Gemm")
    assert product.inputs[0] is gemm.inputs[0] and product.inputs[1] is gemm.inputs[1] and log.pairs == 2
    assert kept.inputs[0] is graph.inputs[0] and isinstance(kept.inputs[1], gs.Constant)
    assert only(graph, "Exp").inputs[0] is graph.inputs[0]


def test_one_weight_read_along_two_axes_has_a_pair_for_each() -> None:
    shared = weights(6, 6)

    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        weight = g.constant(shared)
        return g.op.Gemm(g.op.Gemm(x, weight), weight, transB=1)

    graph = example({"x": ("float32", [5, 6])}, build)
    assert quantised(graph).pairs == 4
    axes = [pair_of(node.inputs[1])[2] for node in graph.nodes if node.op == "Gemm"]
    assert axes == [1, 0] and error_of(lambda: example({"x": ("float32", [5, 6])}, build)) < 0.05


def test_a_product_of_activations_has_both_quantised() -> None:
    def attention() -> gs.Graph:
        def build(g: Builder, q: gs.Tensor, k: gs.Tensor) -> gs.Tensor:
            return g.op.MatMul(g.op.Softmax(g.op.MatMul(q, g.op.Transpose(k, perm=[0, 2, 1])), axis=-1), k)

        return example({"q": ("float32", [2, 5, 6]), "k": ("float32", [2, 7, 6])}, build)

    graph = attention()
    log = quantised(graph)
    assert log.counts() == {"MatMul": 2} and log.pairs == 4, log
    assert error_of(attention) < 0.05


def views(op: str) -> Callable[[Builder, gs.Tensor], gs.Tensor]:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        if op == "Transpose":
            weight = g.op.Transpose(g.constant(weights(8, 6)))
        elif op == "Reshape":
            weight = g.op.Reshape(g.op.Transpose(g.constant(weights(1, 8, 2, 3)), perm=[0, 2, 3, 1]), [6, 8])
        elif op == "Unsqueeze":
            weight = g.unsqueeze(g.op.Identity(g.constant(weights(6, 8))), [0])
        else:  # the channels are no axis of what is stored
            weight = g.op.Reshape(g.constant(weights(4, 12)), [6, 8])
        return g.op.MatMul(x, weight)

    return build


@pytest.mark.parametrize(("op", "axis"), [("Transpose", 0), ("Reshape", 1), ("Unsqueeze", 1), ("mixed", None)])
def test_a_weight_behind_views_is_quantised_where_it_lies(op: str, axis: int | None) -> None:
    graph = example({"x": ("float32", [2, 5, 6])}, views(op))
    log = quantised(graph)
    weight = only(graph, "MatMul").inputs[1]
    while weight.inputs[0].op != "DequantizeLinear":
        assert weight.inputs[0].op in ("Transpose", "Reshape", "Unsqueeze", "Identity")
        weight = weight.inputs[0].inputs[0]
    stored, scales, found = pair_of(weight)
    assert isinstance(stored, gs.Constant) and found == axis and log.pairs == 2
    assert scales.shape == (() if axis is None else (8,))
    assert error_of(lambda: example({"x": ("float32", [2, 5, 6])}, views(op))) < 0.03


def test_views_that_others_read_too_still_give_them_the_float_weight() -> None:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        turned = g.op.Transpose(g.constant(weights(8, 6)))
        return [g.op.MatMul(x, turned), g.op.Exp(turned)]

    graph = example({"x": ("float32", [5, 6])}, build)
    quantised(graph)
    source = only(graph, "Exp").inputs[0].inputs[0].inputs[0]
    assert isinstance(source, gs.Constant), "the pair is of the copy"


def test_constants_in_nodes_are_weights_too() -> None:
    graph = example({"x": ("float32", [5, 6])}, lambda g, x: g.op.MatMul(x, g.constant(weights(6, 8))))
    node = only(graph, "MatMul")
    made = gs.Variable("w", np.dtype(np.float32), [6, 8])
    values = Constant("", node.inputs[1].values)
    graph.nodes.insert(0, type(node)("Constant", "w", {"value": values}, [], [made], domain=""))
    node.inputs[1] = made
    quantised(graph)
    assert pair_of(node.inputs[1])[0] is made and pair_of(node.inputs[1])[2] == 1
    run_onnx(to_proto(graph), {"x": weights(5, 6)})


# --- residual adds -----------------------------------------------------------------------------------------------


def residual(shortcut: str) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        y = g.op.Conv(x, g.constant(weights(4, 4, 3, 3)), pads=[1, 1, 1, 1])
        y = g.op.Conv(g.op.Relu(y), g.constant(weights(4, 4, 3, 3)), g.constant(weights(4)), pads=[1, 1, 1, 1])
        if shortcut == "conv":
            return g.op.Relu(g.op.Add(y, g.op.Conv(x, g.constant(weights(4, 4, 1, 1)))))
        if shortcut == "bias":
            return g.op.Add(y, g.constant(weights(1, 4, 1, 1)))
        if shortcut == "read twice":
            return g.op.Mul(g.op.Add(y, x), y)
        return g.op.Relu(g.op.Add(x, y))

    return example({"x": ("float32", ["n", 4, 8, 8])}, build)


def test_what_is_added_to_a_convolution_is_quantised_and_the_convolution_itself_is_not() -> None:
    for shortcut, place in (("input", 1), ("conv", 0)):
        graph = residual(shortcut)
        log = quantised(graph)
        add = only(graph, "Add")
        assert add.inputs[place].inputs[0].op == "Conv", "the kernel that adds is this one's"
        added, scale, _ = pair_of(add.inputs[1 - place])
        assert scale.shape == () and (shortcut == "conv" or added is graph.inputs[0])
        assert log.pairs == (4 if shortcut == "input" else 6), "that of the input serves the convolution too"
        assert error_of(lambda shortcut=shortcut: residual(shortcut)) < 0.1


@pytest.mark.parametrize("shortcut", ["bias", "read twice"])
def test_other_adds_stay_in_float(shortcut: str) -> None:
    graph = residual(shortcut)
    quantised(graph)
    assert not any(tensor.inputs and tensor.inputs[0].op == "DequantizeLinear" for tensor in only(graph, "Add").inputs)


def test_nothing_is_added_in_int8_to_a_convolution_in_float() -> None:
    graph = residual("input")
    log = quantised(graph, nodes=set())
    assert log.pairs == 0 and {node.op for node in graph.nodes} == {"Conv", "Relu", "Add"}


# --- what is declined --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        ({}, "no calibration sample gave its input 'x' a value"),
        ({"x": Range(-1, 1, finite=False)}, "its input 'x' was infinite or NaN for a calibration sample"),
        ({"x": Range(0, 0)}, "its input 'x' was 0 for all calibration samples"),
    ],
)
def test_an_activation_without_a_range_keeps_its_node_in_float(seen: Mapping[str, Range], why: str) -> None:
    graph = example({"x": ("float32", [5, 6])}, lambda g, x: g.op.MatMul(x, g.constant(weights(6, 8))))
    name = only(graph, "MatMul").name
    log = quantise(graph, "int8", seen, {name})
    assert log.declined == {name: why} and not log.quantised and log.pairs == 0
    assert [node.op for node in graph.nodes] == ["MatMul"], "all is checked before anything is changed"


def test_what_has_no_kernel_is_named_with_the_reason() -> None:
    def reason(build: Callable[..., Any], scheme: Any = "int8", kind: str = "float32") -> str:
        shapes = {"x": (kind, [6, 6]), "y": (kind, [6, 6])}
        graph = example(shapes, build)
        name = graph.nodes[-1].name
        log = quantise(graph, scheme, ranges_of(graph), {name})
        assert not log.quantised and not log.pairs
        return log.declined[name]

    assert reason(lambda g, x, y: g.op.Exp(g.op.Add(x, y))) == "Exp has no kernels for int8"
    assert reason(lambda g, x, y: g.op.MatMul(x, y), kind="int32") == "its input 'x' is int32"
    constant = reason(lambda g, x, y: g.op.MatMul(g.constant(weights(2, 6)), g.constant(weights(6, 2))))
    assert constant == "both factors are constants"
    infinite = np.full((6, 6), np.inf, np.float32)
    assert "is not finite" in reason(lambda g, x, y: g.op.MatMul(x, g.constant(infinite)))
    assert "is empty" in reason(lambda g, x, y: g.op.MatMul(x, g.constant(np.zeros((6, 0), np.float32))))
    image = example({"x": ("float32", [1, 4, 6, 6]), "w": ("float32", [4, 4, 3, 3])}, lambda g, x, w: g.op.Conv(x, w))
    assert list(quantised(image).declined.values()) == ["its weights are computed at run time"]


@pytest.mark.parametrize(("scheme", "kind", "opset"), [("fp8", "float32", 19), ("int8", "float16", 19)])
def test_the_model_comes_to_the_opset_that_can_say_it(scheme: Any, kind: str, opset: int) -> None:
    shapes = {"x": (kind, [5, 6]), "y": (kind, [6, 6])}
    graph = example(shapes, lambda g, x, y: g.reduce("ReduceMax", g.op.MatMul(x, y), [1]), 17)
    assert quantised(graph, scheme).pairs == 2 and graph.opset == opset
    onnx.checker.check_model(to_proto(graph), full_check=True)
    images = {"x": ("float32", [2, 4, 6, 6]), "s": ("float32", [4])}
    int4 = example(
        images, lambda g, x, s: g.op.MatMul(g.op.InstanceNormalization(x, s, s), g.constant(weights(6, 8))), 18
    )
    norm = int4.nodes[0]
    norm.op, norm.attrs = "GroupNormalization", {"num_groups": 4}  # opset 21 gave its scale another meaning
    log = quantised(int4, "int4")
    assert list(log.declined.values()) == ["int4 of float32 needs opset 21, to which the model does not come"]
    assert int4.opset == 18 and "GroupNormalization" in log.notes[0], log.notes


def test_quantising_twice_changes_nothing() -> None:
    for make in (
        lambda: residual("conv"),
        FORMS["Gemm"][0],
        lambda: example({"x": ("float32", [5, 6])}, views("mixed")),
    ):
        for scheme in ("int8", "fp8"):
            graph = make()
            first = quantised(graph, scheme)
            before = to_proto(graph).SerializeToString()
            again = quantised(graph, scheme)
            assert to_proto(graph).SerializeToString() == before and again.pairs == 0
            assert again.quantised == first.quantised


def test_half_precision_is_scaled_in_its_own_type() -> None:
    def make() -> gs.Graph:
        return example(
            {"x": ("float16", [5, 6])}, lambda g, x: g.op.MatMul(x, g.constant(weights(6, 8, dtype=np.float16)))
        )

    graph = make()
    quantised(graph)
    node = only(graph, "MatMul")
    assert pair_of(node.inputs[0])[1].dtype == pair_of(node.inputs[1])[1].dtype == np.float16
    assert node.inputs[0].dtype == np.float16 and error_of(make) < 0.03


# --- int4 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "block"), [(256, 128), (192, 64)])
@pytest.mark.parametrize("form", ["MatMul", "Gemm", "Gemm, transposed", "MatMul, through a view"])
def test_int4_weights_are_stored_in_blocks_along_the_axis_that_is_summed_over(rows: int, block: int, form: str) -> None:
    values = weights(rows, 5)

    def make() -> gs.Graph:
        def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
            if form == "MatMul":
                return g.op.MatMul(x, g.constant(values))
            if form == "MatMul, through a view":
                return g.op.MatMul(x, g.op.Transpose(g.constant(values.T.copy())))
            turned = form != "Gemm"
            return g.op.Gemm(x, g.constant(values.T.copy() if turned else values), transB=int(turned))

        return example({"x": ("float32", [3, rows])}, build, 21)

    graph = make()
    log = quantise(graph, "int4", {}, products(graph))
    node = next(node for node in graph.nodes if node.name in log.quantised)
    back = node.inputs[1].inputs[0]
    axis = 1 if form == "Gemm, transposed" else 0
    assert back.op == "DequantizeLinear" and back.attrs == {"axis": axis, "block_size": block}
    assert node.inputs[0] is graph.inputs[0], "activations stay as they are"
    stored, scales = (np.moveaxis(np.asarray(item.values, np.float32), axis, 0) for item in back.inputs)
    assert scales.shape == (rows // block, 5) and np.abs(stored).max() == 7
    found = stored * np.repeat(scales, block, 0)
    assert (np.abs(found - values) <= np.repeat(scales, block, 0) / 2 + 1e-6).all()
    error = error_of(make, "int4")
    assert error < 0.15, f"off by {error:.3f}"


def test_int4_declines_what_is_no_constant_matrix_of_whole_blocks() -> None:
    def reasons(build: Callable[..., Any]) -> list[str]:
        graph = example({"x": ("float32", [64, 64])}, build, 21)
        return list(quantise(graph, "int4", {}, products(graph)).declined.values())

    assert reasons(lambda g, x: g.op.MatMul(x, x)) == ["int4 is for constant matrices that are the second factor"]
    assert reasons(lambda g, x: g.op.MatMul(g.constant(weights(64, 64)), x)) == [
        "int4 is for constant matrices that are the second factor"
    ]
    odd = reasons(lambda g, x: g.op.MatMul(g.op.Slice(x, [0], [60], [1]), g.constant(weights(60, 4))))
    assert odd == ["the 60 rows of its weight are no multiple of 128 or 64"]
    assert reasons(lambda g, x: g.op.MatMul(x, g.constant(weights(64, 1)))) == ["its weight is a single block of 64"]


# --- models ------------------------------------------------------------------------------------------------------


def test_nodes_of_bodies_are_quantised_there(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
    main (float[2, 6] x, int64 rounds) => (float[2, 6] y) <float[6, 6] w = {%s}> {
      yes = Constant <value = bool {1}> ()
      y = Loop (rounds, yes, x) <body = body (int64 i, bool c, float[2, 6] v) => (bool d, float[2, 6] u) {
        d = Identity (c)
        [inner] m = MatMul (v, w)
        u = Tanh (m)
      }>
    }"""
    numbers = ", ".join(f"{value:.4f}" for value in weights(36))
    path = tmp_path / "loop.onnx"
    onnx.save(onnx.parser.parse_model(text % numbers), str(path))
    feeds = {"x": weights(2, 6) * 5, "rounds": np.array(3)}
    graph = read(path)
    log = quantise(graph, "int8", measure(path, [feeds]), {"inner"})
    assert log.quantised == {"inner": "MatMul"} and log.pairs == 2
    assert [node.op for node in graph.nodes if node.op.endswith("Linear")] == [], "the pairs are in the body"
    write(graph, tmp_path / "quantised.onnx")
    before, after = run_onnx(path, feeds)["y"], run_onnx(tmp_path / "quantised.onnx", feeds)["y"]
    assert 0 < np.abs(after - before).max() < 0.1


class Small(nn.Module):
    """A convolution with a shortcut, pooling, attention and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.linear, self.head = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.nn.functional.max_pool2d(torch.relu(self.second(x) + x), 2)
        x = torch.cat([self.up(x), self.up(x).neg()], 1)[:, :16].flatten(2).transpose(1, 2)
        q, k, v = self.linear(x).chunk(3, -1)
        return self.head((torch.softmax(q @ k.transpose(1, 2) * 0.25, -1) @ v).mean(1))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    options: dict[str, Any] = {"profiles": {"x": ((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))}}
    result = bridge.convert(
        Small().eval(),
        (x,),
        workdir=tmp_path_factory.mktemp("small"),
        target="tensorrt-rtx-1.7",
        build=False,
        **options,
    )
    assert result.status == "rewritten", result.error
    return result.onnx, x.numpy()


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_module_is_quantised_from_samples_of_several_shapes_and_builds(
    small: tuple[Path, np.ndarray], tmp_path: Path, scheme: Any
) -> None:
    path, x = small
    graph = read(path)
    nodes = {node.name for node in graph.nodes if node.op in QUANTISABLE[scheme]}
    before = {node.name: origin(node) for node in graph.nodes}
    log = quantise(graph, scheme, measure(path, [{"x": x}, {"x": x[:2]}]), nodes)
    assert not log.declined and log.counts().get("Conv", 0) == (2 if scheme == "int8" else 0)
    assert sum(log.counts().values()) == len(nodes) and log.counts()["MatMul"] >= 3
    for node in graph.nodes:
        assert node.name not in before or origin(node) == before[node.name]
        assert not node.op.endswith("Linear") or origin(node).module or origin(node).source, "pairs have their reader's"
    made = tmp_path / f"{scheme}.onnx"
    write(graph, made)
    onnx.checker.check_model(str(made), full_check=True)
    expected, actual = (next(iter(run_onnx(file, {"x": x}).values())) for file in (path, made))
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.1, f"{scheme}: off by {error:.3f}"
    if RTX_INSTALLED:
        profile = {"x": Profile((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))}
        build(made, tmp_path / "engine", tmp_path / "log", target=resolve("tensorrt-rtx"), profiles=[profile])
        assert (tmp_path / "engine").stat().st_size > 0


def test_weights_in_files_stay_there(tmp_path: Path) -> None:
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, ["n", 512])],
            [onnx.helper.make_tensor_value_info("y", 1, ["n", 512])],
            [onnx.numpy_helper.from_array(weights(512, 512), "w")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(proto, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.data")
    graph = read(tmp_path / "m.onnx")
    quantise(graph, "int8", measure(tmp_path / "m.onnx", [{"x": weights(3, 512)}]), {"product"})
    assert write(graph, tmp_path / "typed.onnx") == ("typed.onnx",)
    assert (tmp_path / "typed.onnx").stat().st_size < 20_000, "it refers to the weights of the other file"
    run_onnx(tmp_path / "typed.onnx", {"x": weights(3, 512)})


@pytest.mark.parametrize("rule", ["matmul_of_few_bits_as_matmul", "quantisation_of_the_standard"])
def test_weights_of_four_bits_are_floats_where_tensorrt_has_no_such_type(rule: str) -> None:
    for model in all_rules()[rule].examples:
        graph = model()
        log = rewrite(graph, resolve("tensorrt-8.5"))
        types = {str(tensor.dtype) for tensor in graph.tensors().values()}
        assert not types & {"int4", "uint4"}, (model.__name__, types)
        assert not log.declined, log.declined
