"""Proof at run time: each match is judged by itself, and the one that is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto
from torch import nn

import bridge
from bridge import proof as proving
from bridge.inputs import Case
from bridge.proof import culprit, prove
from bridge.report import render_report
from bridge.result import ConversionResult, Proof
from bridge.target import resolve
from passes import all_rules, read, rewrite, write
from passes.framework import RULES, Builder, Rule, always, example
from passes.model import from_proto

from .support import RTX

FLOAT = TensorProto.FLOAT
X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds a rule to the library for the length of a test."""

    def add(op: str, function: Callable[[gs.Node, Builder], Any]) -> None:
        all_rules()
        function.__doc__ = "Planted by a test."
        monkeypatch.setitem(RULES, function.__name__, Rule(function, (op,), always))

    return add


def wrong_relu(node: gs.Node, g: Builder) -> Any:
    return g.op.Add(g.op.Abs(node.inputs[0]), g.constant(0.25))


def right_relu(node: gs.Node, g: Builder) -> Any:
    x = node.inputs[0]
    return g.op.Max(x, g.constant(0.0, g.dtype(x)))


def softplus_by_relu(node: gs.Node, g: Builder) -> Any:
    """A right one whose Relu a wrong one may meet."""
    x = node.inputs[0]
    tail = g.op.Log(g.op.Add(g.op.Exp(g.op.Neg(g.op.Abs(x))), g.constant(1.0)))
    return g.op.Add(g.op.Relu(x), tail)


def proofs_of(
    graph: gs.Graph,
    feeds: Mapping[str, Any],
    folder: Path,
    target: str = "tensorrt-rtx-1.7",
    more: Mapping[str, Any] | None = None,
) -> list[Proof]:
    """The proofs of what the passes do to ``graph``, at ``feeds`` and at ``more``."""
    write(graph, folder / "exported.onnx")
    rewritten = read(folder / "exported.onnx")
    log = rewrite(rewritten, resolve(target), record=True)
    write(rewritten, folder / "rewritten.onnx", beside=folder)
    cases = [Case("example", dict(feeds))] + ([Case("max", dict(more))] if more else [])
    assert log.recorder is not None
    found = prove(log.recorder, folder / "exported.onnx", folder / "rewritten.onnx", cases)
    assert len(found) == len(log.matches)
    return found


def status(proofs: list[Proof]) -> dict[str, str]:
    return {proof.rule: proof.status for proof in proofs}


# --- through convert ---------------------------------------------------------------------------------------------


def net_file(folder: Path) -> Path:
    """A model like Net, as a file: a Relu, and something for the library to rewrite."""

    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.Relu(x), g.op.DFT(g.unsqueeze(x, [2]), None, g.constant(1), onesided=1)]

    folder.mkdir(exist_ok=True)
    write(example({"x": ("float32", [1, 4])}, build), folder / "net.onnx")
    return folder / "net.onnx"


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spectrum = torch.fft.rfft(x).abs()
        return torch.relu(x), spectrum  # the line of the Relu


def relu_line() -> str:
    text = Path(__file__).read_text().splitlines()
    return f"{__file__}:{next(n for n, line in enumerate(text, 1) if line.endswith('# the line of the Relu'))}"


def test_a_wrong_rule_is_named_with_its_node_its_line_and_how_far_it_is_off(
    tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant("Relu", wrong_relu)
    x = torch.tensor([[1.0, -2.0, 0.5, -0.5]])
    result = bridge.convert(Net(), (x,), workdir=tmp_path, target=RTX, build=False, prove=True)
    assert (result.status, result.stage) == ("failed", "rewrite")
    assert "the first match that moved its outputs is wrong_relu at Relu" in str(result.error), result.error
    assert relu_line() in str(result.error) and "off by 2.25 at most" in str(result.error), result.error
    assert status(result.proofs) == {"wrong_relu": "moved", "dft_as_matmul": "proved"}
    [moved] = [proof for proof in result.proofs if proof.status == "moved"]
    assert moved.max_abs_error == 2.25 and moved.inputs == "example"
    written = json.loads((tmp_path / "result.json").read_text())["proofs"]
    assert [(item["rule"], item["status"]) for item in written] == [(p.rule, p.status) for p in result.proofs]
    assert ConversionResult.load(tmp_path / "result.json").proofs == result.proofs
    page = " ".join(render_report(result).split())
    assert '<code>wrong_relu</code></th><td class="figure">0</td><td class="figure">1</td>' in page
    assert "off by 2.25 at most" in page


def test_without_proof_the_error_says_how_to_find_the_match(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant("Relu", wrong_relu)
    result = bridge.convert(net_file(tmp_path / "source"), workdir=tmp_path / "out", target=RTX, build=False)
    assert result.status == "failed" and result.proofs == []
    assert "prove=True (--prove) names the match that did it" in str(result.error)
    assert "Proofs" not in render_report(result)


def test_a_change_by_no_match_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import passes

    honest = passes.rewrite

    def wrong(graph: Any, *arguments: Any, **options: Any) -> Any:
        log = honest(graph, *arguments, **options)
        next(node for node in graph.nodes if node.op == "Relu").op = "Neg"
        return log

    monkeypatch.setattr(passes, "rewrite", wrong)
    result = bridge.convert(
        net_file(tmp_path / "source"), workdir=tmp_path / "out", target=RTX, build=False, prove=True
    )
    assert "of 1 matches, 1 were checked, and none of them moved its own outputs" in str(result.error), result.error
    assert "not checked by match" not in str(result.error)
    assert "what is not checked by match: float64_to_float32" in culprit(result.proofs, ["float64_to_float32"])


def test_the_files_are_the_same_with_and_without_proof(tmp_path: Path) -> None:
    path = net_file(tmp_path)
    for folder, on in (("with", True), ("without", False)):
        result = bridge.convert(path, workdir=tmp_path / folder, target=RTX, build=False, prove=on)
        assert result.status == "rewritten" and bool(result.proofs) == on, result.error
    assert {item.name for item in (tmp_path / "with").iterdir()} == {"rewritten.onnx", "result.json"}
    model = [onnx.load(tmp_path / folder / "rewritten.onnx") for folder in ("with", "without")]
    assert model[0] == model[1]


# --- which match -------------------------------------------------------------------------------------------------


def test_a_wrong_match_on_what_a_right_one_made_is_told_from_it(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant("Softplus", softplus_by_relu)
    plant("Relu", wrong_relu)
    found = proofs_of(example({"x": ("float32", [4, 6])}, lambda g, x: g.op.Softplus(x)), {"x": X}, tmp_path)
    assert status(found) == {"softplus_by_relu": "proved", "wrong_relu": "moved"}
    assert "wrong_relu" in culprit(found)


def test_a_right_match_after_a_wrong_one_is_proved(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant("Relu", wrong_relu)
    graph = example({"x": ("float32", [4, 6])}, lambda g, x: g.op.Mod(g.op.Relu(x), g.constant(0.3), fmod=1))
    plant("Mod", mod_by_truncation)
    found = proofs_of(graph, {"x": X}, tmp_path)
    assert status(found) == {"wrong_relu": "moved", "mod_by_truncation": "proved"}, found


def mod_by_truncation(node: gs.Node, g: Builder) -> Any:
    a, b = node.inputs
    quotient = g.op.Div(a, b)
    whole = g.op.Mul(g.op.Sign(quotient), g.op.Floor(g.op.Abs(quotient)))
    return g.op.Sub(a, g.op.Mul(b, whole))


def wrong_from_the_fifth_row(node: gs.Node, g: Builder) -> Any:
    x = node.inputs[0]
    rows = g.op.Range(g.constant(0), g.op.Squeeze(g.op.Shape(x, start=0, end=1)), g.constant(1))
    late = g.unsqueeze(g.op.GreaterOrEqual(rows, g.constant(4)), [1])
    return g.op.Where(late, x, g.op.Relu(x)) if node.inputs[0].name == "x" else None


def test_what_is_wrong_at_other_shapes_alone_is_found_there(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant("LeakyRelu", wrong_from_the_fifth_row)
    graph = example({"x": ("float32", ["n", 2])}, lambda g, x: g.op.LeakyRelu(x, alpha=0.0))
    small, large = -np.ones((2, 2), np.float32), -np.ones((6, 2), np.float32)
    [found] = proofs_of(graph, {"x": small}, tmp_path, more={"x": large})
    assert (found.status, found.inputs, found.max_abs_error) == ("moved", "max", 1.0)


def test_few_tensors_at_a_time_give_the_same_proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        for _ in range(3):
            x = g.op.LayerNormalization(x, g.constant(np.ones(6, np.float32)), axis=-1)
            x = g.op.ScatterElements(x, g.constant(np.zeros((1, 6), np.int64)), g.op.Neg(x), reduction="max")
        return x

    graph = example({"x": ("float32", [1, 6])}, build)
    together = proofs_of(graph, {"x": X[:1]}, tmp_path, "tensorrt-8.5")
    monkeypatch.setattr(proving, "BATCH_BYTES", 1)
    apart = proofs_of(read(tmp_path / "exported.onnx"), {"x": X[:1]}, tmp_path, "tensorrt-8.5")
    assert together == apart and len(together) >= 6
    assert {proof.status for proof in together} == {"proved"}, together


# --- every kind of pass and tensor -------------------------------------------------------------------------------


def test_constants_that_were_folded_functions_that_were_inlined_and_branches_that_were_taken_are_matches(
    tmp_path: Path,
) -> None:
    branch = [
        oh.make_graph(
            [oh.make_node(op, ["s"], [f"{op}_out"], name=op)],
            op,
            [],
            [oh.make_tensor_value_info(f"{op}_out", FLOAT, None)],
        )
        for op in ("Relu", "Neg")
    ]
    nodes = [
        oh.make_node("Shape", ["x"], ["shape"], name="shape"),
        oh.make_node("Softsign", ["x"], ["s"], name="soft"),
        oh.make_node("Gather", ["shape", "zero"], ["size"], name="gather"),
        oh.make_node("Greater", ["size", "zero"], ["many"], name="greater"),
        oh.make_node("If", ["many"], ["chosen"], name="if", then_branch=branch[0], else_branch=branch[1]),
        oh.make_node("CenterCropPad", ["chosen", "shape"], ["y"], name="crop"),
    ]
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", FLOAT, (4, 6))],
        [oh.make_tensor_value_info("y", FLOAT, (4, 6))],
        [onnx.numpy_helper.from_array(np.array(0, np.int64), "zero")],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=10)
    found = proofs_of(from_proto(model), {"x": X}, tmp_path)
    assert status(found)["take_branches"] == status(found)["expand_functions"] == "proved", found
    assert status(found)["fold_constants"] == "proved", found


@pytest.mark.parametrize("target", ["tensorrt-rtx-1.7", "tensorrt-8.5"])
def test_types_that_the_target_lacks_are_narrowed_on_both_sides(tmp_path: Path, target: str) -> None:
    def build(g: Builder, x: gs.Tensor, i: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.ScatterElements(x, i, x, axis=1, reduction="add"), g.op.BitwiseAnd(i, g.constant(3))]

    graph = example({"x": ("float64", [4, 6]), "i": ("int64", [4, 6])}, build)
    feeds = {"x": X.astype(np.float64), "i": np.random.default_rng(1).integers(0, 6, (4, 6))}
    found = proofs_of(graph, feeds, tmp_path, target)
    assert set(status(found).values()) == {"proved"} and len(found) >= 2, found


def test_a_number_beyond_int32_is_told_where_it_comes_in_and_goes_out(tmp_path: Path) -> None:
    graph = example({"i": ("int64", [3])}, lambda g, i: g.op.Mul(i, g.constant(1 << 20)))
    small = proofs_of(graph, {"i": np.array([1, 2, 3])}, tmp_path, "tensorrt-8.5")
    assert [proof.status for proof in small] == ["proved"] * 2, small
    large = proofs_of(read(tmp_path / "exported.onnx"), {"i": np.array([1, 1 << 20, 3])}, tmp_path, "tensorrt-8.5")
    assert [(proof.rule, proof.node, proof.status) for proof in large] == [
        ("int64_boundary_to_int32", "input i", "proved"),
        ("int64_boundary_to_int32", "Cast output_cast", "moved"),
    ]
    beyond = proofs_of(read(tmp_path / "exported.onnx"), {"i": np.array([1, 1 << 40, 3])}, tmp_path, "tensorrt-8.5")
    assert next((proof.node, proof.status) for proof in beyond) == ("input i", "moved")


def prelu_by_where(node: gs.Node, g: Builder) -> Any:
    x, slope = node.inputs
    return g.op.Where(g.op.Less(x, g.constant(0.0)), g.op.Mul(x, slope), x)


def test_weights_in_files_are_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None]
) -> None:
    import passes.writing

    monkeypatch.setattr(passes.writing, "INLINE_LIMIT", 0)
    monkeypatch.setattr(proving, "INLINE_BYTES", 0)
    weight = np.random.default_rng(0).standard_normal((60, 90)).astype(np.float32)
    slope = np.linspace(-1, 1, 360, dtype=np.float32).reshape(4, 90)

    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        return g.op.PRelu(g.op.MatMul(x, g.constant(weight)), g.constant(slope))

    plant("PRelu", prelu_by_where)
    graph = example({"x": ("float32", [4, 60])}, build)
    [found] = proofs_of(graph, {"x": np.ones((4, 60), np.float32)}, tmp_path)
    assert (tmp_path / "exported.onnx.data").exists()
    assert found.status == "proved", found


def test_bfloat16_which_onnx_runtime_does_not_compute_is_checked_by_onnx_itself(
    tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant("Relu", right_relu)
    graph = example({"x": ("float32", [1, 2, 5, 5])}, _bfloat16_network, opset=22)
    found = proofs_of(graph, {"x": np.random.default_rng(0).standard_normal((1, 2, 5, 5)).astype(np.float32)}, tmp_path)
    assert status(found)["right_relu"] == "proved", found


def _bfloat16_network(g: Builder, x: gs.Tensor) -> gs.Tensor:
    import ml_dtypes

    weight = np.ones((2, 2, 3, 3), np.float32).astype(ml_dtypes.bfloat16)
    low = g.op.Relu(g.op.Conv(g.op.Cast(x, to=TensorProto.BFLOAT16), gs.Constant("w", weight)))
    return g.op.Cast(low, to=FLOAT)


# --- what is not checked -----------------------------------------------------------------------------------------


def in_a_loop(graph: onnx.GraphProto) -> onnx.ModelProto:
    nodes = [oh.make_node("Loop", ["trips", "", "x"], ["y"], name="loop", body=graph)]
    main = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", FLOAT, (4, 6)), oh.make_tensor_value_info("trips", TensorProto.INT64, ())],
        [oh.make_tensor_value_info("y", FLOAT, (4, 6))],
    )
    return oh.make_model(main, opset_imports=[oh.make_opsetid("", 18)], ir_version=10)


def test_a_match_inside_a_loop_is_not_checked_and_says_in_which_but_one_on_outer_tensors_is(
    tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant("Relu", right_relu)
    body = oh.make_graph(
        [
            oh.make_node("Relu", ["state"], ["r"], name="inner"),
            oh.make_node("Relu", ["x"], ["outer"], name="outer"),
            oh.make_node("Add", ["r", "outer"], ["next"], name="add"),
            oh.make_node("Identity", ["go"], ["on"], name="on"),
        ],
        "body",
        [
            oh.make_tensor_value_info("i", TensorProto.INT64, ()),
            oh.make_tensor_value_info("go", TensorProto.BOOL, ()),
            oh.make_tensor_value_info("state", FLOAT, (4, 6)),
        ],
        [oh.make_tensor_value_info("on", TensorProto.BOOL, ()), oh.make_tensor_value_info("next", FLOAT, (4, 6))],
    )
    feeds = {"x": X, "trips": np.array(2)}
    found = {proof.node: proof for proof in proofs_of(from_proto(in_a_loop(body)), feeds, tmp_path)}
    assert found["Relu outer"].status == "proved", found
    assert found["Relu inner"].status == "not checked"
    assert "inside the body of Loop loop: 'state' exists only while that runs" in found["Relu inner"].reason


def test_random_numbers_are_not_compared(tmp_path: Path, plant: Callable[..., None]) -> None:
    def shifted_noise(node: gs.Node, g: Builder) -> Any:
        return (
            g.op.Add(g.op.RandomNormalLike(node.inputs[0], mean=5.0), g.constant(1.0))
            if "mean" not in node.attrs
            else None
        )

    plant("RandomNormalLike", shifted_noise)
    [found] = proofs_of(example({"x": ("float32", [4, 6])}, lambda g, x: g.op.RandomNormalLike(x)), {"x": X}, tmp_path)
    assert (found.status, found.reason) == ("not checked", "RandomNormalLike draws other numbers each time")


def test_what_no_evaluator_runs_is_not_checked_and_says_why(tmp_path: Path, plant: Callable[..., None]) -> None:
    def frobnicate(node: gs.Node, g: Builder) -> Any:
        made = g.op.Neg(node.inputs[0])
        g.made[-1].domain = "my.dom"
        g.made[-1].op = "Frobnicate"
        return made

    plant("Relu", frobnicate)
    [found] = proofs_of(example({"x": ("float32", [4, 6])}, lambda g, x: g.op.Relu(x)), {"x": X}, tmp_path)
    assert found.status == "not checked" and "what took its place does not run by itself" in found.reason
    assert "Frobnicate" in found.reason
    assert "one does not run" in culprit([found])


def test_a_model_that_does_not_run_proves_nothing_and_says_so(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant("Relu", right_relu)
    nodes = [
        oh.make_node("Frobnicate", ["x"], ["f"], name="frob", domain="my.dom"),
        oh.make_node("Relu", ["f"], ["y"], name="relu"),
    ]
    infos = [oh.make_tensor_value_info(name, FLOAT, (4, 6)) for name in ("x", "y", "f")]
    graph = oh.make_graph(nodes, "g", infos[:1], infos[1:2], value_info=infos[2:])
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid("my.dom", 1)]
    model = oh.make_model(graph, opset_imports=opsets, ir_version=10)
    [found] = proofs_of(from_proto(model), {"x": X}, tmp_path)
    assert found.status == "not checked" and "the exported model does not run" in found.reason
    assert "1 could not be checked" in culprit([found])
