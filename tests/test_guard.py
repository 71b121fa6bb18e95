"""An engine that does not compute in what was asked for is found out; one that does is not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bridge import builder as builder_process
from bridge.build import BuildJob, BuildOutcome, build
from bridge.build_plan import BuildPlan
from bridge.errors import BuildError
from bridge.guard import Layer, Verdict, judge
from bridge.inputs import Profile
from bridge.inspection import as_built, engine_layers, examine, inspect, told_by_size
from bridge.layer_precisions import Demands, constrain, given_precisions
from bridge.network_layers import network_layers, node_names, quantised_types
from bridge.subgraphs import Selection, ends
from bridge.target import resolve

from . import fake_network as fake
from .fake_network import DataType, ILayer, MatrixOperation, Network, Tensor
from .support import RTX_INSTALLED

# --- the judgement -----------------------------------------------------------------------------------------------


def conv(node: str, work: float, precision: str) -> Layer:
    return Layer(node, node, "CONVOLUTION", work, True, precision)


def relu(node: str, work: float, precision: str) -> Layer:
    return Layer(node, node, "ACTIVATION", work, False, precision)


def test_an_fp16_request_that_came_out_as_fp32_is_an_error() -> None:
    layers = [conv("a", 900, "fp32"), conv("b", 90, "fp32"), relu("c", 10, "fp32")]
    for asked in ({}, dict.fromkeys("abc", "fp16")):
        found = judge("fp16", asked, layers)
        assert found.error.startswith("fp16 was asked for, and all of the engine is in fp32")
        assert "a (fp32), b (fp32), c (fp32)" in found.error
        assert found.shares == {"fp32": 1.0}
        assert [(item["node"], item["asked"], item["share"]) for item in found.others] == [
            ("a", "fp16", 0.9),
            ("b", "fp16", 0.09),
            ("c", "fp16", 0.01),
        ]


def test_rules_that_leave_nothing_for_fp16_are_an_error_too() -> None:
    asked, layers = {"a": "fp32", "c": "fp32"}, [conv("a", 900, "fp32"), relu("c", 10, "fp32")]
    error = judge("fp16", asked, layers).error
    assert "all of the engine is in fp32" in error and "Relax the rules, ask for bf16" in error
    error = judge("bf16", asked, layers).error
    assert "Relax the rules, or ask for fp32" in error, "bf16 is what was asked for"


def test_what_the_setting_keeps_in_fp32_is_not_lost() -> None:
    """Most of this engine is in fp32, as it should be."""
    asked = {"a": "fp32", "b": "fp16", "c": "fp32"}
    found = judge("fp16", asked, [conv("a", 900, "fp32"), conv("b", 90, "fp16"), relu("c", 10, "fp32")])
    assert not found.error and not found.others and found.shares == {"fp32": 0.91, "fp16": 0.09}
    assert found.notes == [
        "precision fp16: 9.1% of the multiply-adds are in fp16; kept says which nodes are not, and why"
    ]


@pytest.mark.parametrize(("lost", "fails"), [(49, False), (51, True)])
def test_most_of_what_was_to_be_low_has_to_be(lost: int, fails: bool) -> None:
    layers = [conv("a", lost, "fp32"), conv("b", 100 - lost, "fp16")]
    found = judge("fp16", {"a": "fp16", "b": "fp16"}, layers)
    assert bool(found.error) == fails
    assert [item["node"] for item in found.others] == ["a"]
    if fails:
        assert "51% of the compute that was to be in it is in fp32" in found.error


def test_a_model_without_products_may_be_all_in_fp32() -> None:
    assert not judge("fp16", {"c": "fp32"}, [relu("c", 10, "fp32")]).error
    assert judge("fp16", {"c": "fp32"}, []) == Verdict({})


def test_fp32_is_not_judged_and_its_shares_are_told() -> None:
    found = judge("fp32", {}, [conv("a", 75, "fp16"), conv("b", 25, "fp32")])
    assert found == Verdict({"fp16": 0.75, "fp32": 0.25})


def test_int8_that_came_out_without_any_is_an_error_and_a_part_of_it_a_note() -> None:
    layers = [conv("a", 50, "int8"), conv("b", 50, "fp16"), relu("c", 1, "fp16")]
    part = judge("int8+fp16", {}, layers)
    assert not part.error and part.notes == ["precision int8+fp16: 50% of the compute that was to be in int8 is"]
    assert [item["node"] for item in part.others] == ["b"]
    none = judge("int8+fp16", {}, [conv("a", 50, "fp16"), relu("c", 1, "fp16")])
    assert none.error.startswith("int8+fp16 was asked for, and nothing of the engine is in int8")
    assert none.error.endswith("Ask for fp16 if that is what is wanted")
    alone = judge("int8", {}, [conv("a", 50, "int8"), relu("c", 1, "fp32")])
    assert not alone.error and not alone.notes and not alone.others


def test_what_was_to_be_in_fp32_and_is_not_is_told() -> None:
    asked = {"a": "fp16", "b": "fp32", "c": "fp32"}
    found = judge("fp16", asked, [conv("a", 9, "fp16"), conv("b", 1, "fp16"), relu("c", 1, "unknown")])
    assert found.notes[-1] == "precision fp16: 1 layers that were to be in fp32 are in fp16: b" and not found.error


def test_types_that_are_not_told_are_said_to_be_unknown() -> None:
    found = judge("fp16", {}, [conv("a", 60, "unknown"), conv("b", 40, "fp16")])
    assert not found.error and found.shares == {"unknown": 0.6, "fp16": 0.4}
    assert "does not tell the types inside of 60% of the compute" in found.notes[0]


# --- parsed networks ---------------------------------------------------------------------------------------------


def typed(dtype: DataType, *shape: int, name: str = "t") -> Tensor:
    return Tensor(name, dtype, shape)


HALF, FLOAT, INT8, INT32 = DataType.HALF, DataType.FLOAT, DataType.INT8, DataType.INT32
TRT = SimpleNamespace(**vars(fake))


def work_of(*layers: ILayer) -> list[tuple[float, bool]]:
    network = Network([], list(layers))
    return [(item.work, item.weighted) for item in network_layers(TRT, network, {}, {})]


def test_products_weigh_their_multiply_adds_and_the_rest_its_elements() -> None:
    x, y = typed(HALF, 2, 8, 10, 10, name="x"), typed(HALF, 2, 16, 8, 8, name="y")
    convolution = ILayer("CONVOLUTION", "c", [x], [y], kernel_size_nd=(3, 3), num_groups=4)
    transposed = ILayer("DECONVOLUTION", "d", [y], [x], kernel_size_nd=(3, 3), num_groups=1)
    a, b, c = typed(HALF, 4, 5, 7, name="a"), typed(HALF, 4, 7, 3, name="b"), typed(HALF, 4, 5, 3, name="c")
    product = ILayer("MATRIX_MULTIPLY", "m", [a, b], [c], op0=MatrixOperation.NONE)
    turned = ILayer("MATRIX_MULTIPLY", "n", [typed(HALF, 4, 7, 5), b], [c], op0=MatrixOperation.TRANSPOSE)
    einsum = ILayer("EINSUM", "e", [a, b], [c], equation="bij,bjk->bik")
    full = ILayer("FULLY_CONNECTED", "f", [typed(HALF, 2, 8, 1, 1)], [c], num_output_channels=5)
    q, k = typed(HALF, 2, 3, 10, 16, name="q"), typed(HALF, 2, 3, 20, 16, name="k")
    attention = ILayer("ATTENTION_INPUT", "t", [q, k, k], [q])
    softmax, mean = ILayer("SOFTMAX", "s", [c], [c]), ILayer("REDUCE", "r", [x], [typed(HALF, 2, 8)])
    moved, shape = (
        ILayer("SHUFFLE", "v", [x], [typed(HALF, 1600, name="v")]),
        ILayer("ELEMENTWISE", "w", [x], [typed(INT32, 4)]),
    )
    found = work_of(convolution, transposed, product, turned, einsum, full, attention, softmax, mean, moved, shape)
    assert found == [
        (2 * 16 * 8 * 8 * 8 * 9 / 4, True),
        (2 * 16 * 8 * 8 * 8 * 9, True),
        (4 * 5 * 3 * 7, True),
        (4 * 5 * 3 * 7, True),
        (4 * 5 * 3 * 7, True),
        (2 * 8 * 5, True),
        (2 * (2 * 3 * 10 * 16) * 20, True),
        (60, False),
        (1600, False),
    ]


def test_dynamic_axes_have_the_shapes_that_are_given() -> None:
    x = typed(FLOAT, -1, 3, name="x")
    network = Network([x], [ILayer("ACTIVATION", "r", [x], [x])])
    (layer,) = network_layers(TRT, network, {"x": [5, 3]}, {})
    assert layer.work == 15


def test_a_product_of_dequantised_values_is_quantised_and_one_of_dequantised_weights_alone_only_in_int4() -> None:
    x, q, dq, w, dw, y = (Tensor(name, HALF, (2, 2)) for name in ("x", "q", "dq", "w", "dw", "y"))
    q.dtype = w.dtype = INT8
    small, dsmall = Tensor("small", DataType.INT4, (2, 2)), Tensor("dsmall", HALF, (2, 2))
    turned = Tensor("turned", HALF, (2, 2))
    layers = [
        ILayer("QUANTIZE", "x_q", [x], [q]),
        ILayer("DEQUANTIZE", "x_dq", [q], [dq]),
        ILayer("DEQUANTIZE", "w_dq", [w], [dw]),
        ILayer("SHUFFLE", "w_t", [dw], [turned]),
        ILayer("MATRIX_MULTIPLY", "both", [dq, turned], [y], op0=MatrixOperation.NONE),
        ILayer("MATRIX_MULTIPLY", "weights", [x, turned], [y], op0=MatrixOperation.NONE),
        ILayer("DEQUANTIZE", "small_dq", [small], [dsmall]),
        ILayer("MATRIX_MULTIPLY", "small_weights", [x, dsmall], [y], op0=MatrixOperation.NONE),
        ILayer("ELEMENTWISE", "add", [dq, y], [y]),
        ILayer("MATRIX_MULTIPLY", "neither", [y, y], [y], op0=MatrixOperation.NONE),
    ]
    network = Network([x], layers)
    found = {item.name: item.precision for item in network_layers(TRT, network, {}, {})}
    assert found == {"both": "int8", "weights": "fp16", "small_weights": "int4", "add": "fp16", "neither": "fp16"}
    assert quantised_types(network) == {"int8", "int4"}


def test_what_tensorrt_8_says_of_no_tensor_is_quantised_in_int8() -> None:
    """Before a build all its tensors but inputs and outputs may be said to be in float32."""
    x, q, dq, w, wq, wdq, y = (Tensor(name, FLOAT, (2, 2)) for name in ("x", "q", "dq", "w", "wq", "wdq", "y"))
    layers = [
        ILayer("QUANTIZE", "x_q", [x], [q]),
        ILayer("DEQUANTIZE", "x_dq", [q], [dq]),
        ILayer("QUANTIZE", "w_q", [w], [wq]),
        ILayer("DEQUANTIZE", "w_dq", [wq], [wdq]),
        ILayer("MATRIX_MULTIPLY", "both", [dq, wdq], [y], op0=MatrixOperation.NONE),
        ILayer("MATRIX_MULTIPLY", "one", [x, wdq], [y], op0=MatrixOperation.NONE),
    ]
    network = Network([x], layers)
    found = {item.name: item.precision for item in network_layers(TRT, network, {}, {})}
    assert found == {"both": "int8", "one": "fp32"} and quantised_types(network) == {"int8"}


def test_layers_are_traced_to_the_nodes_that_they_were_made_for() -> None:
    """TensorRT 8 names layers after nodes, adds numbers, and leaves helpers without a name."""
    x, shaped, a, b, y = (Tensor(name) for name in ("x", "shaped", "a", "b", "y"))
    layers = [
        ILayer("CONSTANT", "weight", [], [Tensor("weight")]),
        ILayer("SHUFFLE", "(Unnamed Layer* 1) [Shuffle]", [x], [shaped]),
        ILayer("ELEMENTWISE", "/net/Add_7", [shaped, x], [a]),
        ILayer("REDUCE", "helper", [a], [b]),
        ILayer("ACTIVATION", "other", [b], [y]),
    ]
    made_by = {"a": "/net/Add", "y": "last"}
    assert node_names(layers, made_by) == ["", "/net/Add", "/net/Add", "last", "last"]
    # A later parser says it in the metadata, whatever the names are.
    layers[3].metadata = "[ONNX Layer: middle]"  # type: ignore[attr-defined]
    assert node_names(layers, {**made_by, "m": "middle"})[3] == "middle"
    assert node_names(layers[3:4], {}) == ["middle"]


# --- precisions of layers in weakly typed networks ---------------------------------------------------------------


def job(**options: Any) -> BuildJob:
    return BuildJob("tensorrt", "m.onnx", "m.engine", [], **{"precision": "fp16", **options})


def test_nodes_in_fp32_get_constraints_and_what_has_no_choice_is_left_alone() -> None:
    x, y, number = Tensor("x"), Tensor("y"), Tensor("number", INT32)
    made = {
        "conv": ILayer("CONVOLUTION", "conv", [x], [y]),
        "relu": ILayer("ACTIVATION", "relu", [x], [y]),
        "pow": ILayer("ELEMENTWISE", "pow", [x], [y]),
        "top": ILayer("TOPK", "top", [x], [Tensor("values"), number]),
        "weight": ILayer("CONSTANT", "weight", [], [y]),
        "cast": ILayer("IDENTITY", "cast", [x], [y]),
        "size": ILayer("SHAPE", "size", [x], [number]),
        "index": ILayer("GATHER", "index", [number], [number]),
        "resize": ILayer("ELEMENTWISE", "resize", [x], [Tensor("sizes", is_shape_tensor=True)]),
        "plugin": ILayer("PLUGIN_V2", "plugin", [x], [y]),
    }
    kept = dict.fromkeys(made, "fp32") | {"conv": "fp16", "relu": "fp16"}
    network = Network([x], list(made.values()))
    assert constrain(job(layer_precisions=kept, made_by=dict(zip(made, made, strict=True))), TRT, network)
    assert given_precisions(network) == {"conv": "fp16", "pow": "fp32", "top": "fp32"}
    assert {name: layer.output_types for name, layer in made.items() if layer.output_types} == {
        "pow": {0: FLOAT},
        "top": {0: FLOAT},
    }


@pytest.mark.parametrize(
    ("precision", "insist", "expected"),
    [
        ("int8", False, {"kept": "fp32"}),
        ("int8+fp16", False, {"kept": "fp32", "relu": "fp32"}),
        ("int8+fp16", True, {"kept": "fp32", "relu": "fp32", "quantised": "int8"}),
    ],
)
def test_beside_int8_alone_only_products_are_kept_in_fp32(
    precision: str, insist: bool, expected: dict[str, str]
) -> None:
    x, y = Tensor("x"), Tensor("y")
    layers = [ILayer("CONVOLUTION", name, [x], [Tensor(f"{name}_out")]) for name in ("quantised", "kept")]
    layers.append(ILayer("ACTIVATION", "relu", [x], [y]))
    asked = {"quantised": "int8", "kept": "fp32", "relu": "fp32"}
    made_by = {"quantised_out": "quantised", "kept_out": "kept", "y": "relu"}
    network = Network([x], layers)
    assert constrain(
        job(precision=precision, layer_precisions=asked, made_by=made_by), TRT, network, Demands(insist=insist)
    )
    assert given_precisions(network) == expected


def test_no_layer_is_constrained_where_nothing_is_to_be_lowered() -> None:
    network = Network([], [ILayer("CONVOLUTION", "conv", [Tensor("x")], [Tensor("y")])])
    for options in ({"precision": "fp32"}, {"strongly_typed": True}, {"precision": "int8", "layer_precisions": {}}):
        given: dict[str, Any] = {"layer_precisions": {"conv": "fp32"}, "made_by": {"y": "conv"}, **options}
        assert not constrain(job(**given), TRT, network) and not given_precisions(network)


@pytest.mark.parametrize("half", [False, True])
def test_a_model_of_half_tensors_is_planned_with_its_own_types(tmp_path: Path, half: bool) -> None:
    """TensorRT 8.5 refuses a layer that makes float16 where the builder is not allowed it, and computes in float32."""
    import onnx
    from onnx import TensorProto, helper

    from bridge.build_plan import plan_build
    from bridge.build_settings import BuildSettings
    from bridge.precision import Precision
    from passes import read

    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("Cast", ["r"], ["c"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Exp", ["c"], ["y"], name="exp"),
    ]
    inputs = [helper.make_tensor_value_info("x", kind, [2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])]
    model = onnx.shape_inference.infer_shapes(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs)))
    onnx.save(model, tmp_path / "m.onnx")
    settings: Any = SimpleNamespace(precision=Precision(), builder=BuildSettings())
    graph = read(tmp_path / "m.onnx")

    def plan(**options: Any) -> BuildPlan:
        return plan_build(settings, graph, False, **options)

    assert plan().low_types == (("fp16",) if half else ())
    assert plan().layer_precisions == ({"relu": "fp16", "cast": "fp16", "exp": "fp32"} if half else {})
    assert plan().made_by == ({"r": "relu", "c": "cast", "y": "exp"} if half else {})
    given = plan(layer_precisions={"exp": "fp32"})
    assert given.layer_precisions == {"exp": "fp32"} and given.key() != plan().key()


# --- subgraphs ---------------------------------------------------------------------------------------------------


class Choice:
    """One way to compute a subgraph with an input and an output."""

    def __init__(self, *dtypes: DataType) -> None:
        self.dtypes = dtypes

    def get_algorithm_io_info(self, index: int) -> Any:
        return SimpleNamespace(dtype=self.dtypes[index])


def chosen(selector: Any, name: str, *choices: Choice) -> list[int]:
    context = SimpleNamespace(name=name, num_inputs=1, num_outputs=1)
    found: list[int] = selector.select_algorithms(context, choices)
    return found


def test_subgraphs_take_and_give_float32_where_a_layer_is_to_be_in_it() -> None:
    layers = [ILayer("ACTIVATION", name, [Tensor("x")], [Tensor(f"{name}_out")]) for name in "abc"]
    layers[0].precision, layers[2].precision = HALF, FLOAT
    trt = SimpleNamespace(**vars(fake), IAlgorithmSelector=object)
    selection = Selection(True)
    selector = selection.selector(trt, Network([], layers))
    choices = [Choice(FLOAT, FLOAT), Choice(HALF, HALF), Choice(INT32, HALF), Choice(INT32, FLOAT)]
    for name in ("{ForeignNode[a...c]}", "{ForeignNode[a constant...b + c]}"):
        assert chosen(selector, name, *choices) == [0, 3], name
        span = ends(name)
        assert span is not None and selection.missed([span]), "it came out in half, and nobody was asked"
        assert chosen(selector, name, *choices[1:3]) == [0, 1], "nothing else is offered"
        assert not selection.missed([span])
    for other in ("a + b", "c"):
        assert chosen(selector, other, *choices) == [0, 1, 2, 3], other
    assert not selection.missed([])


def test_nothing_is_chosen_where_no_layer_is_to_be_in_float32_or_tensorrt_is_another() -> None:
    layer = ILayer("ACTIVATION", "a", [Tensor("x")], [Tensor("y")])
    trt = SimpleNamespace(**vars(fake), IAlgorithmSelector=object)
    assert Selection(True).selector(trt, Network([], [layer])) is None
    layer.precision = FLOAT
    other, eight = Selection(False), Selection(True)
    assert other.selector(trt, Network([], [layer])) is None and not other.wide
    assert eight.selector(trt, Network([], [layer])) is not None and eight.wide


def test_what_was_built_by_known_timings_in_half_is_built_again_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT may not ask about what it knows the timings of."""
    import polygraphy.backend.trt as loaders

    layer = ILayer("SOFTMAX", "a", [Tensor("x")], [Tensor("y")])
    layer.precision = FLOAT
    network = Network([], [layer])
    tried: list[tuple[bool, bool]] = []

    def config(job: BuildJob, trt: Any, builder: Any, network: Any, *more: Any) -> str:
        demands, timings, selection = more
        selection.selector(SimpleNamespace(**vars(fake), IAlgorithmSelector=object), network)
        tried.append((demands.untimed, timings is not None))
        return "untimed" if demands.untimed else "timed"

    class Engine:
        def __init__(self, parsed: Any, config: str) -> None:
            self.config = config

        def __call__(self) -> bytes:
            return self.config.encode()

    def inspected(trt: Any, logger: Any, engine: bytes, shapes: Any) -> str:
        kind = FP32 if engine == b"untimed" or obedient else FP16
        return json.dumps({"Layers": [told("{ForeignNode[a...a]}", "Myelin", kind, kind)]})

    monkeypatch.setattr(loaders, "EngineBytesFromNetwork", Engine)
    monkeypatch.setattr(builder_process, "make_config", config)
    monkeypatch.setattr("bridge.inspection.inspect", inspected)
    for obedient, expected in ((True, [(False, True)]), (False, [(False, True), (True, False)])):
        tried.clear()
        timings: Any = object()
        engine, *_ = builder_process._engine(job(of_tensorrt_8=True), TRT, (None, network, None), None, timings, False)
        assert tried == expected and engine == (b"timed" if obedient else b"untimed")


# --- the inspector -----------------------------------------------------------------------------------------------


def told(name: str, kind: str, *formats: str, **more: Any) -> dict[str, Any]:
    first, *rest = [{"Name": "t", "Dimensions": [1], "Format/Datatype": text} for text in formats]
    return {"Name": name, "LayerType": kind, "Inputs": [first], "Outputs": rest, **more}


FP16, FP32 = "Channel major FP16 format where channel % 8 == 0", "Row major linear FP32"


def precisions(items: Sequence[Any], names: str, **constrained: str) -> dict[str, str]:
    layers = [conv(name, 1, "fp32") for name in names]
    text = json.dumps({"Layers": list(items), "Bindings": ["x"]})
    return {item.name: item.precision for item in as_built(layers, engine_layers(text), constrained)}


def test_a_subgraph_in_float32_keeps_to_its_constraints_and_quantises_who_knows_what() -> None:
    """Measured of TensorRT 8.5.3; see ``bridge.subgraphs``."""
    items = [told("{ForeignNode[a...c]}", "Myelin", FP32, FP32)]
    assert precisions(items, "abc", a="fp16", b="fp32") == {"a": "fp16", "b": "fp32", "c": "fp32"}
    assert precisions(items, "abc") == dict.fromkeys("abc", "unknown"), "nothing had to be obeyed"
    engine = engine_layers(json.dumps({"Layers": items}))
    layers = [conv("a", 1, "int8"), conv("c", 1, "fp32")]
    assert [item.precision for item in as_built(layers, engine, {"c": "fp16"})] == ["unknown", "fp16"]


def test_layers_of_tensorrt_8_are_found_by_their_joined_names() -> None:
    items = [
        told("Reformatting CopyNode for Input Tensor 0 to a + b", "Reformat", FP32, FP16),
        told("a + b", "CaskConvolution", FP16, FP16, Weights={"Type": "Half", "Count": 9}),
        told("PWN(c, PWN(d))", "PointWiseV2", FP32, FP32),
        told("e || f", "CaskConvolution", "Thirty-two wide channel vectorized row major Int8 format", FP32),
        told("g [profile 0]", "CaskConvolution", FP16, FP16),
        told("g [profile 1]", "CaskConvolution", FP32, FP32),
    ]
    found = precisions(items, "abcdefg")
    assert found == {"a": "fp16", "b": "fp16", "c": "fp32", "d": "fp32", "e": "int8", "f": "int8", "g": "fp16"}


def test_a_product_that_no_layer_names_is_unknown_and_others_are_gone() -> None:
    engine = engine_layers(json.dumps({"Layers": [told("a", "CaskConvolution", FP16, FP16)]}))
    layers = [conv("a", 1, "fp32"), conv("lost", 1, "fp32"), relu("folded", 1, "fp32")]
    assert [(item.name, item.precision) for item in as_built(layers, engine, {})] == [
        ("a", "fp16"),
        ("lost", "unknown"),
    ]


def test_layers_of_later_versions_are_found_by_their_metadata() -> None:
    items = [
        told("__myl_Fc_0", "gemm", "BFloat16", "BFloat16", Metadata="[ONNX Layer: a]\x1f[ONNX Layer: b]"),
        told("__myl_Conv_1", "conv", "FP8", "Half", Metadata="[ONNX Layer: c]"),
        told("d", "kgen", "Float", "Float", Metadata=""),
    ]
    assert precisions(items, "abcd") == {"a": "bf16", "b": "bf16", "c": "fp8", "d": "fp32"}


def test_of_a_subgraph_that_tells_nothing_nobody_knows() -> None:
    """Not even those who gave its layers a precision that has to be obeyed."""
    subgraph = "{ForeignNode[b...c + d]}"
    items = [told("a", "CaskConvolution", FP16, FP16), told(subgraph, "Myelin", FP16, FP32)]
    assert precisions(items, "abcd") == {"a": "fp16", "b": "unknown", "c": "unknown", "d": "unknown"}
    assert precisions(items, "abcd", b="fp16", c="fp32") == {
        "a": "fp16",
        "b": "unknown",
        "c": "unknown",
        "d": "unknown",
    }
    assert precisions([told("a", "CaskConvolution", "N/A")], "a", a="fp32") == {"a": "fp32"}
    items[1] = told(subgraph, "Myelin", FP16, FP16)
    assert precisions(items, "abcd") == dict.fromkeys("abcd", "fp16")


@pytest.mark.parametrize(
    ("size", "asked", "found"),
    [
        (2_050, {}, ["fp16", "fp16", "fp32"]),  # of 1000 weights, which take 4000 bytes in float32
        (2_050, {"a": "fp16", "b": "fp32"}, ["fp16", "unknown", "fp32"]),
        (2_400, {}, ["unknown", "unknown", "fp32"]),
        (4_100, {}, ["unknown", "unknown", "fp32"]),
    ],
)
def test_what_an_engine_can_hold_in_16_bits_alone_is_in_these(
    size: int, asked: dict[str, str], found: list[str]
) -> None:
    layers = [conv("a", 1, "unknown"), conv("b", 1, "unknown"), conv("c", 1, "fp32")]
    given = job(precision="fp16", layer_precisions=asked, weights=1000)
    assert [layer.precision for layer in told_by_size(given, layers, size)] == found
    eight = job(precision="int8+fp16", layer_precisions={"a": "int8", "b": "fp16"}, weights=1000)
    assert [layer.precision for layer in told_by_size(eight, layers, 1_050)] == ["int8", "unknown", "fp32"]
    assert told_by_size(eight, layers, 2_050) == layers
    for other in ({"precision": "fp32"}, {"weights": 0}, {"builder": {"strip_weights": True}}):
        given = job(**{"precision": "fp16", "weights": 1000, **other})
        assert told_by_size(given, layers, 2_050) == layers


def test_names_alone_and_formats_that_depend_on_shapes_tell_no_types() -> None:
    assert precisions(["a + b"], "ab") == {"a": "unknown", "b": "unknown"}
    assert precisions([told("a", "CaskConvolution", "N/A due to dynamic shapes")], "a") == {"a": "unknown"}
    for text in ("", "no JSON", "[]", '{"Layers": 3}'):
        assert engine_layers(text) == [] and as_built([conv("a", 1, "fp32")], [], {})[0].precision == "unknown"


class Inspected:
    """TensorRT 8.5's runtime, engine, context and inspector, of which a dynamic engine tells all for shapes alone."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.shapes = items, {}  # type: list[Any], dict[str, Any]
        self.execution_context: Any = None
        self.LayerInformationFormat = SimpleNamespace(JSON="json")

    def Runtime(self, logger: Any) -> Inspected:
        return self

    def deserialize_cuda_engine(self, engine: Any) -> Inspected | None:
        return self if engine else None

    def create_engine_inspector(self) -> Inspected:
        return self

    def create_execution_context(self) -> Inspected:
        return self

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self.shapes[name] = shape
        return True

    def get_engine_information(self, kind: str) -> str:
        items = self.items if self.execution_context is self else []
        return json.dumps({"Layers": items})


def test_an_engine_that_was_looked_into_is_destroyed_last() -> None:
    gone: list[str] = []

    class Part(SimpleNamespace):
        def __del__(self) -> None:
            gone.append(self.name)

    def engine(_: Any) -> Part:
        return Part(
            name="engine",
            create_engine_inspector=lambda: Part(name="inspector", get_engine_information=lambda kind: "{}"),
            create_execution_context=lambda: Part(name="context", set_input_shape=lambda name, shape: True),
        )

    runtime = SimpleNamespace(deserialize_cuda_engine=engine)
    trt = SimpleNamespace(Runtime=lambda logger: runtime, LayerInformationFormat=SimpleNamespace(JSON="json"))
    assert inspect(trt, None, b"engine", {"x": (2,)}) == "{}"
    assert sorted(gone) == ["context", "engine", "inspector"] and gone[-1] == "engine"


@pytest.mark.parametrize(("words", "fails"), [(FP16, False), (FP32, True)])
def test_a_weakly_typed_engine_is_asked_at_the_typical_shape(words: str, fails: bool) -> None:
    x, y = typed(FLOAT, -1, 8, 6, 6, name="x"), typed(FLOAT, -1, 8, 4, 4, name="y")
    network = Network([x], [ILayer("CONVOLUTION", "conv", [x], [y], kernel_size_nd=(3, 3), num_groups=1)])
    trt = Inspected([told("conv", "CaskConvolution", words, words)])
    vars(trt).update({name: getattr(fake, name) for name in ("IConvolutionLayer",)})
    shapes = {"x": {"min": [1, 8, 6, 6], "opt": [2, 8, 6, 6], "max": [4, 8, 6, 6]}}
    asked = BuildJob("tensorrt", "m", "e", [shapes], precision="fp16", made_by={"y": "conv"})
    found = examine(asked, trt, None, network, b"engine", obeyed=False)
    assert trt.shapes == {"x": (2, 8, 6, 6)}
    assert bool(found.error) == fails and found.shares == {"fp32" if fails else "fp16": 1.0}
    unreadable = examine(asked, trt, None, network, b"", obeyed=False)
    assert unreadable.shares == {"unknown": 1.0} and "does not tell the types" in unreadable.notes[0]


# --- the builder's process ---------------------------------------------------------------------------------------


def test_constraints_that_no_kernel_keeps_to_are_loosened_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import polygraphy.backend.trt as loaders
    from polygraphy.exception import PolygraphyException

    tried: list[str] = []

    def config(job: BuildJob, trt: Any, builder: Any, network: Any, demands: Demands, *more: Any) -> str:
        tried.append(demands.constraints)
        return demands.constraints

    def attempt(refusals: Sequence[str], layers: Sequence[Any] = (), **options: Any) -> Any:
        """A build of which one attempt after the other is refused, in these words."""
        tried.clear()
        logger, left = SimpleNamespace(errors=[]), list(refusals)

        class Engine:
            def __init__(self, parsed: Any, config: str) -> None:
                self.config = config

            def __call__(self) -> bytes:
                if left:
                    logger.errors.append(left.pop(0))
                    raise PolygraphyException("no engine")
                return self.config.encode()

        monkeypatch.setattr(loaders, "EngineBytesFromNetwork", Engine)
        return builder_process._engine(job(**options), None, (None, Network([], layers), None), logger, None, False)

    monkeypatch.setattr(builder_process, "make_config", config)
    ruled = {"layer_precisions": {"pow": "fp32"}}
    words = "No implementation of layer pow obeys the requested constraints."
    marked = "All of the candidates were removed, which points to the node being incorrectly marked as an int8 node."
    assert attempt([], **ruled) == (b"obey", True, [])
    engine, obeyed, (note,) = attempt([words], **ruled)
    assert engine == b"prefer" and not obeyed and words in note and "not obeyed" in note
    x, y = typed(FLOAT, 8), typed(FLOAT, 8)
    quantised = [ILayer("QUANTIZE", "q", [x], [y])]
    engine, obeyed, (note,) = attempt([marked, marked], quantised, **ruled)
    assert engine == b"ignore" and tried == ["obey", "prefer", "ignore"] and marked in note and "left to it" in note
    for refusals, layers, options, attempts in (
        (["out of memory"], [], ruled, 1),
        ([words], [], {}, 1),
        ([words], [], {**ruled, "builder": {"strict_types": True}}, 1),
        ([words, words], [], ruled, 2),
        ([words, "out of memory"], quantised, ruled, 2),
        ([marked] * 3, quantised, ruled, 3),
    ):
        with pytest.raises(PolygraphyException):
            attempt(refusals, layers, **options)
        assert len(tried) == attempts


def test_what_helps_is_said_where_kernels_for_what_is_quantised_may_be_missing() -> None:
    x, y = typed(FLOAT, 8), typed(INT8, 8)
    quantised, plain = Network([], [ILayer("QUANTIZE", "q", [x], [y])]), Network([], [])
    assert "calibration_algorithm=" in builder_process._way_out(job(precision="int8+fp16"), quantised)
    for options, network in (
        ({"precision": "int8"}, plain),
        ({"precision": "fp16"}, quantised),
        ({"precision": "int8", "strongly_typed": True}, quantised),
    ):
        assert not builder_process._way_out(job(**options), network)


def test_what_is_fused_into_a_product_of_another_precision_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 8.5: 'Could not find any implementation for node node_linear + node_relu.'"""
    import polygraphy.backend.trt as loaders
    from polygraphy.exception import PolygraphyException

    made: list[tuple[str, Mapping[str, str]]] = []
    logger = SimpleNamespace(errors=[])

    class Engine:
        def __init__(self, parsed: Any, config: str) -> None: ...

        def __call__(self) -> bytes:
            if given_precisions(network).get(refused):
                logger.errors.append(f"[optimizer.cpp] Could not find any implementation for node {into}{refused}.")
                raise PolygraphyException("no engine")
            return b"engine"

    def config(job: BuildJob, trt: Any, builder: Any, network: Any, demands: Demands, *more: Any) -> str:
        constrain(job, trt, network, demands)
        made.append((demands.constraints, given_precisions(network)))
        return ""

    monkeypatch.setattr(loaders, "EngineBytesFromNetwork", Engine)
    monkeypatch.setattr(builder_process, "make_config", config)
    chain = (("MATRIX_MULTIPLY", "a"), ("ACTIVATION", "b"), ("MATRIX_MULTIPLY", "c"), ("ACTIVATION", "d"))
    chain = (*chain, ("MATRIX_MULTIPLY", "e"), ("ACTIVATION", "a.relu"), ("SOFTMAX", "f"))
    edges = [typed(FLOAT, 8, 8, name=f"t{index}") for index in range(len(chain) + 1)]
    layers = [
        ILayer(kind, name, [edges[index]], [edges[index + 1]], op0=None, op1=None)
        for index, (kind, name) in enumerate(chain)
    ]
    network = Network([edges[0]], layers)
    asked = dict.fromkeys("abcdef", "fp32") | {"a.relu": "fp32", "a": "fp16", "c": "fp16"}
    given = job(
        layer_precisions=asked, made_by={item.name: name for item, (_, name) in zip(edges[1:], chain, strict=True)}
    )
    into, refused = "a + ", "b"
    engine, obeyed, (note,) = builder_process._engine(given, TRT, (None, network, None), logger, None, False)
    assert (engine, obeyed) == (b"engine", True) and note.endswith("are b, d") and "two precisions" in note
    assert made == [("obey", asked), ("obey", {name: kind for name, kind in asked.items() if name not in "bd"})]
    assert layers[1].output_types == {} and layers[6].output_types == {0: FLOAT}
    into, refused = "", "a.relu"  # by itself, and of the precision of the product before
    made.clear()
    with pytest.raises(PolygraphyException):
        builder_process._engine(given, TRT, (None, network, None), logger, None, False)
    assert [constraints for constraints, _ in made] == ["obey", "prefer"]


@pytest.mark.parametrize(
    ("precision", "calibrated", "second", "insists", "made"),
    [
        ("int8+fp16", True, "", [False, True], "second"),
        ("int8+fp16", True, "no kernel", [False, True], "first"),
        ("int8+fp16", False, "", [False], "first"),
        ("int8", True, "", [False], "first"),
    ],
)
def test_what_calibration_leaves_without_int8_is_built_again_with_it(
    monkeypatch: pytest.MonkeyPatch, precision: str, calibrated: bool, second: str, insists: list[bool], made: str
) -> None:
    tried: list[bool] = []

    def attempt(job: BuildJob, trt: Any, logger: Any, *, insist: bool = False) -> tuple[BuildOutcome, str]:
        tried.append(insist)
        if insist:
            return BuildOutcome(error=second, notes=["second"]), ""
        return BuildOutcome(error="nothing of the engine is in int8", notes=["first"]), "int8"

    monkeypatch.setattr(builder_process, "_start", lambda job: (None, None))
    monkeypatch.setattr(builder_process, "_attempt", attempt)
    calibration = {"files": [], "cache": "c", "algorithm": "entropy", "profile": {}} if calibrated else {}
    outcome = builder_process.run(job(precision=precision, calibration=calibration))
    assert tried == insists and outcome.notes == [made] and bool(outcome.error) == (made == "first")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(image)).mean((2, 3)))


SHAPES = {"image": Profile((1, 3, 8, 8), (2, 3, 16, 16), (4, 3, 32, 32))}
needs_rtx = pytest.mark.skipif(not RTX_INSTALLED, reason="the Python package 'tensorrt_rtx' is not installed")


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import bridge

    folder = tmp_path_factory.mktemp("net")
    profiles = {name: (one.min, one.opt, one.max) for name, one in SHAPES.items()}
    result = bridge.convert(
        Net(), (torch.randn(2, 3, 16, 16),), workdir=folder, target="tensorrt-rtx", profiles=profiles, build=False
    )
    assert result.onnx is not None, result.error
    return result.onnx


def cast(path: Path, low: str, fp32: Sequence[str] = ()) -> Path:
    from passes import read, write
    from passes.casts import cast as cast_graph

    graph = read(path)
    cast_graph(graph, low, fp32)
    typed = path.with_name(f"{low}_{len(fp32)}.onnx")
    write(graph, typed)
    return typed


def built(model: Path, folder: Path, **plan: Any) -> BuildOutcome:
    target = resolve("tensorrt-rtx")
    return build(
        model,
        folder / "m.engine",
        folder / "log",
        target=target,
        profiles=[SHAPES],
        plan=BuildPlan(**plan),
        timeout=250,
    )


@needs_rtx
@pytest.mark.parametrize(("precision", "low"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_a_cast_model_computes_in_what_was_asked(rewritten: Path, tmp_path: Path, precision: str, low: str) -> None:
    found = built(cast(rewritten, low), tmp_path, precision=precision)
    assert found.precisions == {precision: 1.0} and not found.not_as_asked


@needs_rtx
def test_a_model_in_fp32_is_no_answer_to_fp16(rewritten: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="fp16 was asked for, and all of the engine is in fp32") as raised:
        built(rewritten, tmp_path, precision="fp16")
    assert raised.value.stage == "build" and not (tmp_path / "m.engine").exists()
    assert built(rewritten, tmp_path, precision="fp32").precisions == {"fp32": 1.0}


@needs_rtx
def test_what_is_kept_in_fp32_is_told_by_its_share(rewritten: Path, tmp_path: Path) -> None:
    import onnx

    (head,) = [node.name for node in onnx.load(rewritten).graph.node if node.op_type in ("Gemm", "MatMul")]
    model = cast(rewritten, "float16", [head])
    found = built(model, tmp_path, precision="fp16", layer_precisions={head: "fp32"})
    multiply_adds, product = 2 * 8 * 14 * 14 * 27, 2 * 8 * 4
    assert found.precisions["fp32"] == pytest.approx(product / multiply_adds, rel=0.3)
    assert sum(found.precisions.values()) == pytest.approx(1, abs=1e-5) and not found.not_as_asked
