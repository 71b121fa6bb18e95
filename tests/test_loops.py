"""Loops of every form that ONNX has become ones that TensorRT's parser takes, and compute what they did."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bridge import convert
from passes import read, rewrite
from tests.support import RTX_INSTALLED
from tests.test_rules_types import RTX

FORMS = [
    form
    for form in itertools.product([True, False], repeat=4)
    if form[2] or (form[3] and not form[1])  # else it ends with a condition that nothing computes, or never
]


def loop(reads_round: bool, passes_condition: bool, rounds: str, condition: str) -> onnx.ModelProto:
    """A sum of the round's numbers, or of ones, which may end early; it carries what nothing reads."""
    known = (
        [helper.make_node("Identity", ["go"], ["more"])]
        if passes_condition
        else [
            helper.make_node("ReduceSum", ["state"], ["total"], keepdims=0),
            helper.make_node("Less", ["total", "limit"], ["more"]),
        ]
    )
    step = "number" if reads_round else "one"
    body = helper.make_graph(
        [
            *known,
            helper.make_node("Cast", [step], ["part"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["state", "part"], ["grown"]),
            helper.make_node("Mul", ["grown", "grown"], ["square"]),
            helper.make_node("ReduceMax", ["other"], ["least"], keepdims=1),
            helper.make_node("Sub", ["other", "least"], ["left"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["n", "t"]),
            helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", "t"]),
        ],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("grown", TensorProto.FLOAT, ["n", "t"]),
            helper.make_tensor_value_info("left", TensorProto.FLOAT, ["n", "t"]),
        ],
    )
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "one"], ["length"]),
        helper.make_node("Loop", [rounds, condition, "x", "x"], ["y", "rest"], body=body),
    ]
    constants = [
        helper.make_tensor("one", TensorProto.INT64, [], [1]),
        helper.make_tensor("many", TensorProto.INT64, [], [2**63 - 1]),
        helper.make_tensor("limit", TensorProto.FLOAT, [], [40.0]),
        helper.make_tensor("true", TensorProto.BOOL, [], [True]),
    ]
    graph = helper.make_graph(
        nodes,
        "loop",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "t"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "t"])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def converts(model: onnx.ModelProto, folder: Path) -> None:
    onnx.save(model, folder / "loop.onnx")
    x = np.random.default_rng(0).standard_normal([2, 5]).astype(np.float32)
    shapes = {"x": ((1, 3), (2, 5), (4, 9))}
    result = convert(folder / "loop.onnx", {"x": x}, target="tensorrt-rtx-1.7", profiles=shapes, workdir=folder / "out")
    assert result.status == ("built" if RTX_INSTALLED else "rewritten") or result.status == "verified", result.error
    assert len(result.comparisons) >= 3 and all(item.agreed for item in result.comparisons)


@pytest.mark.parametrize(("reads_round", "passes_condition", "counted", "conditioned"), FORMS)
def test_a_loop_may_have_a_number_a_condition_or_both(
    reads_round: bool, passes_condition: bool, counted: bool, conditioned: bool, tmp_path: Path
) -> None:
    converts(loop(reads_round, passes_condition, "length" if counted else "", "true" if conditioned else ""), tmp_path)


def test_a_number_without_bound_is_none(tmp_path: Path) -> None:
    converts(loop(True, False, "many", "true"), tmp_path)


def test_a_loop_that_has_a_form_of_tensorrts_is_left_as_it_is(tmp_path: Path) -> None:
    model = loop(True, False, "length", "")
    body = model.graph.node[2].attribute[0].g
    del body.node[:2]
    body.initializer.append(helper.make_tensor("more", TensorProto.BOOL, [], [True]))
    onnx.save(model, tmp_path / "loop.onnx")
    assert "settle_loops" not in rewrite(read(tmp_path / "loop.onnx"), RTX).nodes


def test_a_sequence_that_a_loop_fills_is_joined(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["more"]),
            helper.make_node("Cast", ["number"], ["part"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["x", "part"], ["grown"]),
            helper.make_node("SequenceInsert", ["members", "grown"], ["filled"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_sequence_value_info("members", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_sequence_value_info("filled", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("SequenceEmpty", [], ["nothing"]),
        helper.make_node("Loop", ["three", "", "nothing"], ["all"], body=body),
        helper.make_node("ConcatFromSequence", ["all"], ["y"], axis=1, new_axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "sequence",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "t"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, "t"])],
        [helper.make_tensor("three", TensorProto.INT64, [], [3])],
    )
    converts(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path)
