"""``bridge explain`` names every node that a target refuses, where it came from, and what would help."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx.helper as oh
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto
from torch import nn

import bridge
import passes
from bridge import asking, cli, explain
from bridge import build as building
from bridge.advice import NO_WAY, advise
from bridge.errors import ExportError, UsageError
from bridge.target import resolve
from passes import write
from passes.framework import Builder, example
from passes.model import from_proto

from .support import RTX, RTX_INSTALLED

FLOAT = TensorProto.FLOAT
needs_rtx = pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")


@pytest.fixture(autouse=True)
def _few_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library cannot rewrite becomes less; what these tests need to be refused stays refused."""
    rule = passes.all_rules()["det_by_cofactors"]
    monkeypatch.setattr(passes, "all_rules", lambda: {rule.name: rule})


def saved(build: Callable[..., Any], folder: Path, **inputs: list[int | str]) -> Path:
    graph = example({name: ("float32", shape) for name, shape in inputs.items()}, build)
    write(graph, folder / "m.onnx")
    return folder / "m.onnx"


def frobnicate(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """A node of an operator that nothing knows."""
    made: gs.Tensor = g.op.Neg(x)
    g.made[-1].domain, g.made[-1].op = "my.dom", "Frobnicate"
    return made


def names(found: bridge.Explanation) -> list[tuple[str, str]]:
    return sorted((node.operator, node.said_by) for node in found.refused)


# --- with TensorRT-RTX's own parser and builder ------------------------------------------------------------------


@needs_rtx
def test_what_the_parser_and_the_builder_refuse_is_listed_to_the_last_node(tmp_path: Path) -> None:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        flat = g.op.Reshape(g.op.Relu(x), [-1])
        top, _ = g.op.TopK(flat, g.constant([4000]), outputs=2)  # the builder's refusal
        large = g.op.Det(g.op.Sigmoid(x))  # the parser's first
        small = g.op.Det(g.op.Slice(x, [0, 0, 0], [2, 2, 2], [0, 1, 2]))
        return [top, g.op.Exp(large), small, g.op.Neg(frobnicate(g, g.op.Abs(x))), g.op.Det(x)]

    found = explain(saved(build, tmp_path, x=[2, 50, 50]), target=RTX)
    assert names(found) == [("Det", "parser"), ("Det", "parser"), ("TopK", "builder"), ("my.dom::Frobnicate", "parser")]
    assert found.verdict == f"4 of {found.nodes} nodes are refused" and not found.ok and not found.whole
    advice = {node.operator: [item.kind for item in node.advice] for node in found.refused}
    assert advice == {"Det": ["declined", "plugin"], "TopK": ["restriction"], "my.dom::Frobnicate": ["plugin"]}
    text = str(found)
    assert "the matrices are 50 by 50" in text and "checkDet" in text and "3840" in text
    assert "det_by_cofactors 1" in text and "Det, 2 nodes" in text
    assert "bridge.register_plugin('Frobnicate', replaces=('my.dom', 'Frobnicate'), library=" in text


@needs_rtx
def test_a_node_in_the_body_of_an_if_is_found_with_what_else_is_refused_there(tmp_path: Path) -> None:
    def branch(name: str, *nodes: Any) -> Any:
        out = nodes[-1].output[0]
        return oh.make_graph(list(nodes), name, [], [oh.make_tensor_value_info(out, FLOAT, ())])

    large = oh.make_node("Det", ["e"], ["d"], name="inner_det")
    frob = oh.make_node("Frobnicate", ["d"], ["t"], name="inner_frob", domain="my.dom")
    nodes = [
        oh.make_node("Frobnicate", ["x"], ["f"], name="before", domain="my.dom"),
        oh.make_node("Exp", ["f"], ["e"], name="exp"),
        oh.make_node("ReduceSum", ["x"], ["s"], name="sum", keepdims=0),
        oh.make_node("Cast", ["s"], ["c"], name="cast", to=TensorProto.BOOL),
        oh.make_node(
            "If",
            ["c"],
            ["y"],
            name="if",
            then_branch=branch("then", large, frob),
            else_branch=branch("else", oh.make_node("Neg", ["s"], ["n"], name="neg")),
        ),
    ]
    infos = [oh.make_tensor_value_info(name, FLOAT, shape) for name, shape in (("x", (9, 9)), ("y", ()), ("f", (9, 9)))]
    typed = [*infos[2:], oh.make_tensor_value_info("t", FLOAT, ())]
    graph = oh.make_graph(nodes, "g", infos[:1], infos[1:2], value_info=typed[:1])
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid("my.dom", 1)]
    write(from_proto(oh.make_model(graph, opset_imports=opsets, ir_version=10)), tmp_path / "m.onnx")
    found = explain(tmp_path / "m.onnx", target=RTX)
    assert {node.node: node.inside for node in found.refused} == {
        "before": "",
        "inner_det": "If if",
        "inner_frob": "If if",
    }, str(found)


@needs_rtx
def test_a_model_of_which_all_is_taken_says_so(tmp_path: Path) -> None:
    path = saved(lambda g, x: g.op.Det(g.op.Relu(x)), tmp_path, x=[2, 3, 3])
    found = explain(path, target=RTX)
    assert found.ok and found.verdict == f"all {found.nodes} nodes are taken" and "builder" in found.asked
    assert [(item.name, item.count) for item in found.rewrites] == [("det_by_cofactors", 1)]


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x)  # the refused line


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.relu(x)) + 1


def test_a_torch_module_is_explained_with_the_module_and_the_line() -> None:
    found = explain(Outer(), (torch.randn(2, 9, 9),), target=RTX)
    text = Path(__file__).read_text().splitlines()
    line = next(n for n, words in enumerate(text, 1) if words.endswith("# the refused line"))
    [node] = found.refused
    assert (node.operator, node.module, node.source) == ("Det", "inner", f"{__file__}:{line}")
    assert found.name == "Outer" and f"from inner, {__file__}:{line}" in str(found)


# --- what is known of a target that is not installed -------------------------------------------------------------


def test_a_target_that_is_not_installed_is_judged_by_its_table_and_the_answer_says_so(tmp_path: Path) -> None:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.Det(x), frobnicate(g, x), g.op.Relu(x)]

    found = explain(saved(build, tmp_path, x=["n", 9, 9]), target="tensorrt-8.5")
    assert names(found) == [("Det", "table"), ("my.dom::Frobnicate", "table")]
    assert "it is not installed here" in found.asked and "the table: " in str(found)
    written = json.loads(found.to_json())
    assert (written["verdict"], written["ok"]) == (found.verdict, False)
    assert written["refused"][0]["advice"][0]["kind"] in ("declined", "plugin")


def test_a_form_that_is_too_new_for_the_parser_is_refused_by_the_table_too(tmp_path: Path) -> None:
    path = saved(lambda g, x: g.reduce("ReduceMax", g.op.Relu(x), [1]), tmp_path, x=[2, 3])  # the rule is not there
    [node] = explain(path, target="tensorrt-8.5").refused
    assert node.operator == "ReduceMax" and "opset 20" in node.words, node
    taken = explain(saved(lambda g, x: g.op.Relu(x), tmp_path, x=[2, 3]), target="tensorrt-8.5")
    assert taken.ok and taken.verdict == "the only node is taken, as far as the table of its operators tells"


def test_advice_is_never_empty_and_names_what_stands_in_the_way() -> None:
    target = resolve("tensorrt-8.5")
    assert advise(target, "Relu") == [NO_WAY]
    assert [item.kind for item in advise(target, "Relu", types={"uint16", "float32"})] == ["restriction"]
    assert "has no tensors of uint16" in advise(target, "Relu", types={"uint16"})[0].text
    assert "no sequences" in advise(target, "SequenceInsert")[0].text
    assert [item.kind for item in advise(target, "Det", declined=[("r", "why")])] == ["declined", "plugin"]
    assert "ai.onnx.ml" in advise(target, "Scaler", "ai.onnx.ml")[0].text


# --- a parser and builder that stand in for TensorRT -------------------------------------------------------------

FAKE = """
import json, os, signal, sys
import onnx
job = json.loads(sys.stdin.readline())
nodes = onnx.load(job["onnx"]).graph.node
answer = {}
for node in nodes:
    if node.op_type == "Selu":  # the parser names the first that it refuses, and stops
        words = "Selu is not taken"
        answer = {"error": "refused", "refusals": [{"operator": "Selu", "node": node.name, "index": 0, "words": words}]}
        break
    if node.op_type == "Elu" and job["engine"]:
        os.kill(os.getpid(), signal.SIGSEGV)
    if node.op_type == "Celu":
        answer = {"error": "the parser refuses the model and does not say why"}
with os.fdopen(int(sys.argv[1]), "w") as reply:
    json.dump(answer, reply)
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "COMMAND", (sys.executable, "-c", FAKE))


@needs_rtx
def test_a_parser_that_names_one_node_at_a_time_is_asked_until_it_names_none(tmp_path: Path, fake: None) -> None:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        for alpha in (1.0, 2.0, 1.0):
            x = g.op.Selu(g.op.Relu(x), alpha=alpha)
        return x

    found = explain(saved(build, tmp_path, x=[2, 3]), target=RTX)
    assert [node.operator for node in found.refused] == ["Selu"] * 3
    assert {node.words for node in found.refused} == {"Selu is not taken"} and not found.whole
    assert [node.advice for node in found.refused] == [[NO_WAY]] * 3


@needs_rtx
def test_a_node_that_crashes_the_builder_is_found_by_building_each_kind_by_itself(tmp_path: Path, fake: None) -> None:
    path = saved(lambda g, x: g.op.Relu(g.op.Elu(g.op.Sigmoid(x))), tmp_path, x=[2, 3])
    [node] = (found := explain(path, target=RTX)).refused
    assert (node.operator, node.said_by) == ("Elu", "builder") and "SIGSEGV" in node.words
    assert found.verdict == "1 of 3 nodes is refused"


@needs_rtx
def test_a_refusal_that_names_no_node_is_told_of_the_model_as_a_whole(tmp_path: Path, fake: None) -> None:
    found = explain(saved(lambda g, x: g.op.Celu(x), tmp_path, x=[2, 3]), target=RTX)
    assert not found.ok and found.refused == [] and "does not say why" in found.whole
    assert "the model as a whole" in str(found) and "refused as a whole" in found.verdict


@needs_rtx
def test_questions_have_an_end(tmp_path: Path, fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        for alpha in (1.0, 2.0, 3.0):
            x = g.op.Selu(x, alpha=alpha)
        return x

    monkeypatch.setattr(asking, "MOST_QUESTIONS", 2)
    found = explain(saved(build, tmp_path, x=[2, 3]), target=RTX)
    assert len(found.refused) == 2 and any("was asked 2 times" in note for note in found.notes)


@needs_rtx
def test_without_a_profile_the_parser_alone_is_asked(tmp_path: Path, fake: None) -> None:
    path = saved(lambda g, x: g.op.Elu(x), tmp_path, x=["n", 3])
    found = explain(path, target=RTX)
    assert found.ok and "builder" not in found.asked
    assert [note for note in found.notes if "--shapes" in note and "x" in note]
    assert not explain(path, target=RTX, profiles={"x": ((1, 3), (2, 3), (4, 3))}).ok


# --- wrong calls and the command line ----------------------------------------------------------------------------


def test_wrong_calls_are_told_apart_from_models_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"garbage")
    with pytest.raises(ExportError, match="is not an ONNX file"):
        explain(tmp_path / "m.onnx", target="tensorrt-8.5")
    with pytest.raises(UsageError, match="no such file"):
        explain(tmp_path / "none.onnx", target="tensorrt-8.5")
    path = saved(lambda g, x: g.op.Relu(x), tmp_path, x=["n", 3])
    with pytest.raises(UsageError, match="'y' is no input"):
        explain(path, target="tensorrt-8.5", profiles={"y": ((1, 3), (1, 3), (1, 3))})


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["refused.onnx"], 1, "1 of 2 nodes is refused"),
        (["refused.onnx", "--json"], 1, '"verdict": "1 of 2 nodes is refused"'),
        (["taken.onnx", "--shapes", "x=1x3:2x3:4x3"], 0, "the only node is taken"),
        (["zoo:made"], 1, "made for tensorrt 8.5: 1 of 2 nodes is refused"),
        (["both.yaml", "--only", "b"], 0, "b for tensorrt 8.5"),
        (["both.yaml"], 2, "holds 2 models; choose one with --only NAME"),
        (["none.onnx"], 2, "no such file"),
        (["refused.onnx", "--shapes", "y=1x3"], 2, "'y' is no input"),
    ],
)
def test_the_exit_status_of_the_command_tells_refused_from_taken_and_from_a_wrong_call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    saved(lambda g, x: g.op.Relu(frobnicate(g, x)), tmp_path, x=[2, 3]).rename(tmp_path / "refused.onnx")
    saved(lambda g, x: g.op.Relu(x), tmp_path, x=["n", 3]).rename(tmp_path / "taken.onnx")
    (tmp_path / "zoo.py").write_text("print('noise')\ndef made():\n    return 'refused.onnx', None\n")
    (tmp_path / "both.yaml").write_text(
        "models: [{name: a, source: refused.onnx}, {name: b, source: taken.onnx, profiles: {x: 2x3}}]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = cli.main(["explain", "--target", "tensorrt-8.5", *arguments])
    shown = capsys.readouterr()
    assert found == status, shown
    assert words in (shown.err if status == 2 else shown.out), shown
    assert "noise" not in shown.out
    if "--json" in arguments:
        assert json.loads(shown.out)["refused"][0]["operator"] == "my.dom::Frobnicate"


def test_the_library_is_listed_whole_and_by_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes"]) == 0
    shown = capsys.readouterr().out
    assert "det_by_cofactors: Det (3 examples)" in shown and "TensorRT has no Det" in shown
    assert "passes over the whole graph" in shown and "fold_constants" in shown
    assert cli.main(["passes", "--json", "--target", "tensorrt-8.5"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["det_by_cofactors"]["replaces"] == ["Det"]
    assert listed["det_by_cofactors"]["targets"] == ["TensorRT 8.5"] and listed["take_branches"]["replaces"] == []
    assert all(entry["reason"].endswith(".") for entry in listed.values())


def test_a_plugin_that_cannot_be_created_is_not_advised_to_be_registered() -> None:
    [found] = advise(resolve("tensorrt-8.5"), "EfficientNMS_TRT", "bridge.plugins.2", outputs=4)
    assert found.kind == "restriction" and "build.log" in found.text and "register" not in found.text, found


def test_what_a_target_that_is_not_installed_is_known_to_refuse_is_a_note_of_the_conversion(tmp_path: Path) -> None:
    path = saved(lambda g, x: [g.op.Relu(x), g.op.Unique(x)], tmp_path, x=[4])
    result = bridge.convert(path, workdir=tmp_path / "out", target="tensorrt-8.5", build=False)
    assert result.status == "rewritten", result.error
    told = any("known to refuse Unique;" in note for note in result.notes)
    assert told or resolve("tensorrt-8.5").installed, result.notes
