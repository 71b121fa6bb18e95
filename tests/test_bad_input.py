"""Bad input ends in one clear error with the input, the cause and the way out, and leaves nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch
from onnx import TensorProto
from torch import nn

import bridge
from bridge.errors import UsageError
from bridge.result import ConversionResult

from .support import RTX, RTX_INSTALLED, convert, has_ended

ROOT = Path(__file__).parents[1]
CLI = (sys.executable, str(ROOT / "scripts/convert.py"))
FLOAT = TensorProto.FLOAT


def product(weights: np.ndarray | None = None, *, shape: Any = ("n", 16)) -> onnx.ModelProto:
    """y = x @ w, with a dynamic batch."""
    if weights is None:
        weights = np.random.default_rng(0).standard_normal((16, 600)).astype(np.float32)
    graph = oh.make_graph(
        [oh.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [oh.make_tensor_value_info("x", FLOAT, shape)],
        [oh.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=10)


def of_nodes(nodes: Any, dtype: int = FLOAT, out: int = FLOAT, shape: Any = (2, 3)) -> onnx.ModelProto:
    inputs, outputs = [oh.make_tensor_value_info("x", dtype, shape)], [oh.make_tensor_value_info("y", out, None)]
    graph = oh.make_graph(nodes, "g", inputs, outputs)
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=10)


def external(folder: Path) -> Path:
    """``product`` with its weights in ``m.data`` beside it."""
    path = folder / "m.onnx"
    onnx.save(product(), str(path), save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def point_to(path: Path, location: str) -> None:
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())


BATCH = {"x": ((1, 16), (2, 16), (4, 16))}


def failure(path: Path, inputs: Any = None, **options: Any) -> tuple[str, ConversionResult]:
    """Converts what must fail; the one error, and that nothing half-written is there."""
    out = path.parent / "out"
    result = convert(path, inputs, workdir=out, **options)
    assert result.status == "failed" and result.error and result.stage, result
    assert "Traceback" not in result.error
    left = {item.name for item in out.iterdir()}
    assert left <= {"result.json", "build.log", "rewritten.onnx"}, left
    assert ConversionResult.load(out / "result.json").error == result.error
    return result.error, result


# --- files that are no model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.7, 0.99, 0.9999])
def test_an_onnx_file_that_is_cut_short_is_told_to_be_so(tmp_path: Path, share: float) -> None:
    whole = product().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole[: int(len(whole) * share)])
    error, result = failure(path, profiles=BATCH)
    assert result.stage == "export" and str(path) in error and "Export or download it again" in error, error


def test_every_cut_of_a_small_model_ends_in_words(tmp_path: Path) -> None:
    """protobuf takes many a cut at the border of a field for a whole message."""
    path = tmp_path / "m.onnx"
    whole = of_nodes([oh.make_node("Relu", ["x"], ["z"]), oh.make_node("Neg", ["z"], ["y"])]).SerializeToString()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        result = bridge.convert(path, workdir=tmp_path / "out", target=RTX, build=False)
        assert result.status == "failed" and str(path) in str(result.error), (length, len(whole), result.error)


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 64, b"PK\x03\x04 a zip file", b"<html>404 not found</html>", os.urandom(512), b"\x08\x0a"]
)
def test_bytes_that_are_no_protobuf_are_told_to_be_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    error, result = failure(path)
    assert result.stage == "export" and str(path) in error and "again" in error, error


def test_a_git_lfs_pointer_is_recognised_by_its_words(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert str(path) in failure(path)[0]


def test_a_file_that_is_not_there_and_a_folder_in_its_place_are_a_wrong_call(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            bridge.convert(path, workdir=tmp_path / "out", target=RTX)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_told_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(product(), str(path))
    path.chmod(0)
    assert "Permission denied" in failure(path)[0]


def test_a_source_that_is_no_model_at_all_is_a_wrong_call(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"source: a dict; give an nn\.Module"):
        bridge.convert({}, workdir=tmp_path / "out", target=RTX)


# --- external data -----------------------------------------------------------------------------------------------


def test_external_data_beside_the_file_is_used(tmp_path: Path) -> None:
    result = bridge.convert(external(tmp_path), workdir=tmp_path / "out", target=RTX, profiles=BATCH, build=False)
    assert result.status == "rewritten", result.error
    assert all(item.max_abs_error == 0 for item in result.comparisons)


def test_external_data_that_is_missing_is_named_with_its_folder(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "m.data").unlink()
    error, _ = failure(path, profiles=BATCH)
    assert "'w'" in error and "'m.data' is missing" in error and "Copy it" in error, error


def test_external_data_that_is_too_short_is_told_with_both_sizes(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:-1])
    error, _ = failure(path, profiles=BATCH)
    assert str(16 * 600 * 4) in error and str(len(data) - 1) in error and "cut short" in error, error


@pytest.mark.parametrize("where", ["../secret", "/etc/passwd", "folder/../../secret", "link", ""])
def test_external_data_outside_of_the_models_folder_is_never_read(tmp_path: Path, where: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = external(home)
    (home / "m.data").rename(tmp_path / "secret")
    (home / "link").symlink_to(tmp_path / "secret")
    (home / "folder").mkdir()
    point_to(path, where)
    error, result = failure(path, profiles=BATCH)
    assert result.stage == "export" and "lies outside of the model's folder" in error and repr(where) in error, error


@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("offset", "x"), ("length", "x"), ("offset", "1" * 30)])
def test_external_data_with_impossible_places_is_refused(tmp_path: Path, key: str, value: str) -> None:
    path = external(tmp_path)
    model = onnx.load(str(path), load_external_data=False)
    entries = model.graph.initializer[0].external_data
    for entry in [entry for entry in entries if entry.key == key]:
        entries.remove(entry)
    entries.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    assert "w" in failure(path, profiles=BATCH)[0]


# --- models that are wrong ---------------------------------------------------------------------------------------


def test_nodes_in_a_circle_are_refused(tmp_path: Path) -> None:
    nodes = [oh.make_node("Add", ["x", "b"], ["a"], name="p"), oh.make_node("Neg", ["a"], ["b"], name="q")]
    path = tmp_path / "m.onnx"
    path.write_bytes(of_nodes([*nodes, oh.make_node("Relu", ["b"], ["y"])]).SerializeToString())
    assert "depend on each other in a circle" in failure(path)[0]


def test_a_tensor_that_nothing_computes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(of_nodes([oh.make_node("Add", ["x", "nowhere"], ["y"], name="sum")]).SerializeToString())
    assert "nowhere" in failure(path)[0]


def test_an_output_that_nothing_computes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(of_nodes([oh.make_node("Relu", ["x"], ["z"])]).SerializeToString())
    assert "'y'" in failure(path)[0]


def test_an_output_that_is_an_input_is_named_with_the_way_out(tmp_path: Path) -> None:
    model = product()
    model.graph.output.append(model.graph.input[0])
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"output 'x': is an input too.*Identity"):
        bridge.convert(tmp_path / "m.onnx", np.zeros((2, 16), np.float32), workdir=tmp_path / "out")


def test_an_input_of_no_known_rank_has_the_axes_of_its_profile(tmp_path: Path) -> None:
    """As TensorFlow's placeholders of an unknown shape are written."""
    model = of_nodes([oh.make_node("Relu", ["x"], ["y"])], shape=None)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"input 'x'.*--shapes"):
        bridge.convert(path, workdir=tmp_path / "out", target=RTX)
    result = bridge.convert(path, workdir=tmp_path / "out", target=RTX, profiles=BATCH)
    assert result.ok, result.error
    assert len(result.comparisons) == 3 and any("how many axes the input 'x' has" in note for note in result.notes)


@pytest.mark.parametrize("change", ["names", "order", "version"])
def test_names_given_twice_nodes_out_of_order_and_a_version_too_new_are_put_right_and_said(
    tmp_path: Path, change: str
) -> None:
    nodes = [
        oh.make_node("Abs", ["x"], ["a"]),
        oh.make_node("Relu", ["a"], ["b"], name="one"),
        oh.make_node("Neg", ["b"], ["y"], name="one" if change == "names" else "two"),
    ]
    model = of_nodes(nodes[::-1] if change == "order" else nodes)
    if change == "version":
        model.ir_version = onnx.IR_VERSION + 1
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    result = bridge.convert(path, workdir=tmp_path / "out", target=RTX)
    assert result.ok, result.error
    assert change != "version" or any("put right" in note for note in result.notes), result.notes
    assert path.read_bytes() == model.SerializeToString()


@pytest.mark.parametrize(
    ("node", "dtype", "out"),
    [
        (oh.make_node("Identity", ["x"], ["y"]), TensorProto.STRING, TensorProto.STRING),
        (oh.make_node("Identity", ["x"], ["y"]), TensorProto.COMPLEX64, TensorProto.COMPLEX64),
    ],
)
def test_an_input_of_a_type_that_tensorrt_has_not_is_named(tmp_path: Path, node: Any, dtype: int, out: int) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(of_nodes([node], dtype, out).SerializeToString())
    with pytest.raises(UsageError, match=r"input 'x': .*float32"):
        bridge.convert(path, workdir=tmp_path / "out", target=RTX)


def test_an_output_of_a_type_that_tensorrt_has_not_ends_in_words(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    cast = oh.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING)
    path.write_bytes(of_nodes([cast], FLOAT, TensorProto.STRING).SerializeToString())
    error, _ = failure(path)
    assert "y" in error or "Cast" in error, error


def test_a_model_from_before_onnx_runtimes_time_is_told_with_what_makes_it_newer(tmp_path: Path) -> None:
    """onnx's evaluator, which is asked next, refuses it in words of its own: they are no traceback."""
    model = of_nodes([oh.make_node("Dropout", ["x"], ["y"], is_test=1)])
    model.opset_import[0].version = 6
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    error, result = failure(path)
    assert result.stage == "export" and "opset 6" in error and "version_converter" in error, error


def test_probabilities_that_are_no_tensor_are_told_with_the_option_that_makes_them_one(tmp_path: Path) -> None:
    """As scikit-learn's classifiers are converted by default."""
    node = oh.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    kind = oh.make_sequence_type_proto(oh.make_map_type_proto(TensorProto.INT64, oh.make_tensor_type_proto(FLOAT, ())))
    model = of_nodes([node])
    model.graph.output[0].CopyFrom(oh.make_value_info("y", kind))
    model.opset_import.add(domain="ai.onnx.ml", version=1)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"output 'y': is a sequence that ZipMap makes.*'zipmap': False"):
        bridge.convert(path, workdir=tmp_path / "out", target=RTX)


def test_labels_that_are_text_are_told_with_the_way_out(tmp_path: Path) -> None:
    weights = {"coefficients": [1.0, 2.0, 3.0] * 2, "intercepts": [0.0, 1.0], "classlabels_strings": ["cat", "dog"]}
    model = of_nodes([oh.make_node("LinearClassifier", ["x"], ["y", "z"], domain="ai.onnx.ml", **weights)])
    model.graph.output[0].CopyFrom(oh.make_tensor_value_info("y", TensorProto.STRING, None))
    model.opset_import.add(domain="ai.onnx.ml", version=1)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    error, _ = failure(path)
    assert "'y'" in error and "is text" in error and "Take it out of the model's outputs" in error, error


def test_an_axis_of_0_that_was_meant_dynamic_is_told_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(of_nodes([oh.make_node("Relu", ["x"], ["y"])], shape=(0, 3)).SerializeToString())
    for given in ({"profiles": {"x": ((1, 3), (2, 3), (4, 3))}}, {"inputs": {"x": np.ones((2, 3), np.float32)}}):
        with pytest.raises(UsageError, match=r"'x'.*dynamic axis.*dim_param = 'n'.*give a profile"):
            convert(path, workdir=tmp_path / "out", **given)
    notes = convert(path, workdir=tmp_path / "out", build=False).notes
    assert any("of no elements, nothing is proved" in note for note in notes), notes


def test_a_sequence_as_an_input_is_refused(tmp_path: Path) -> None:
    kind = oh.make_sequence_type_proto(oh.make_tensor_type_proto(FLOAT, (2, 3)))
    graph = oh.make_graph(
        [oh.make_node("ConcatFromSequence", ["x"], ["y"], axis=0)],
        "g",
        [oh.make_value_info("x", kind)],
        [oh.make_tensor_value_info("y", FLOAT, None)],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=10).SerializeToString())
    with pytest.raises(UsageError, match="input 'x'"):
        bridge.convert(path, workdir=tmp_path / "out", target=RTX)


def test_an_operator_of_another_domain_is_reported_and_not_taken_for_onnxs_own(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = of_nodes([oh.make_node("Relu", ["x"], ["y"], name="n0", domain="my.dom")])
    model.opset_import.append(oh.make_opsetid("my.dom", 1))
    path.write_bytes(model.SerializeToString())
    error, _ = failure(path)
    assert "my.dom" in error, error


# --- inputs and profiles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        (None, {}, ["input 'x'", "dynamic axes", "--shapes x="]),
        (None, {"profiles": {"xx": BATCH["x"]}}, ["'xx' is no input", "Did you mean 'x'?"]),
        (None, {"profiles": {**BATCH, "z": BATCH["x"]}}, ["'z' is no input", "the inputs are x"]),
        (None, {"profiles": {"x": ((4, 16), (2, 16), (1, 16))}}, ["'x', axis 0", "min 4"]),
        (None, {"profiles": {"x": ((1,), (2,), (4,))}}, ["'x'"]),
        (None, {"profiles": {"x": ((1, 15), (2, 15), (4, 15))}}, ["'x', axis 1", "the constant 16", "15"]),
        (None, {"profiles": {"x": 5}}, ["'x'", "not three shapes"]),
        (None, {"profiles": {"x": {"min": 1}}}, ["'x'", "not three shapes"]),
        ((np.zeros((1, 16), np.float32),) * 2, {}, ["2 were given", "the model has 1: x"]),
        ({"z": np.zeros(1, np.float32)}, {}, ["'z': no such input", "the model has x"]),
        ((np.zeros((1, 16), np.float64),), {}, ["'x'", "float64", "float32"]),
        ((np.zeros((1, 15), np.float32),), {}, ["'x'", "[1, 15]", "16"]),
        ((np.zeros(16, np.float32),), {}, ["'x'", "[16]"]),
        (("text",), {}, ["'x'"]),
        (None, {"profiles": BATCH, "target": "tensorrt-x"}, ["target 'tensorrt-x'"]),
        (None, {"profiles": BATCH, "precision": "fp17"}, ["precision 'fp17'"]),
        (None, {"profiles": BATCH, "compute_capabilities": ["8"]}, ["compute_capabilities: '8'"]),
        (None, {"profiles": BATCH, "int_range": (5, 1)}, ["int_range: 5 is above 1"]),
        (None, {"profiles": BATCH, "output_names": ["a", "b"]}, ["output_names"]),
        (None, {"profiles": BATCH, "input_names": ["a"]}, ["input_names"]),
        (None, {"profiles": BATCH, "tolerance": 1e-3}, ["tolerance", "0.001", "bridge.Tolerance"]),
        (None, {"profiles": BATCH, "tolerance": {"z": bridge.Tolerance(0, 0)}}, ["tolerance", "'z'", "y"]),
    ],
)
def test_a_wrong_call_is_told_with_the_name_the_numbers_and_what_would_fit(
    tmp_path: Path, inputs: Any, options: Any, words: list[str]
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(product(), str(path))
    with pytest.raises(UsageError) as caught:
        bridge.convert(path, inputs, workdir=tmp_path / "out", **{"target": RTX, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


# --- folders and disks -------------------------------------------------------------------------------------------


def test_a_workdir_that_is_a_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(product(), str(path))
    (tmp_path / "out").write_text("mine")
    result = bridge.convert(path, workdir=tmp_path / "out", target=RTX, profiles=BATCH)
    assert result.status == "failed" and f"{tmp_path}/out: File exists" in str(result.error), result.error
    assert (tmp_path / "out").read_text() == "mine"


def test_a_workdir_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(product(), str(path))
    result = bridge.convert(path, workdir="/proc/nowhere/out", target=RTX, profiles=BATCH)
    assert result.status == "failed" and "/proc/nowhere" in str(result.error), result.error


@pytest.mark.parametrize("name", ["exported.onnx", "rewritten.onnx"])
def test_a_source_that_the_conversion_would_overwrite_is_refused_and_left_as_it_was(tmp_path: Path, name: str) -> None:
    onnx.save(product(), str(tmp_path / name))
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UsageError, match="choose another workdir"):
        bridge.convert(tmp_path / name, workdir=tmp_path, target=RTX, profiles=BATCH)
    (tmp_path / "alias").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UsageError, match="choose another workdir"):
        bridge.convert(tmp_path / name, workdir=tmp_path / "alias", target=RTX, profiles=BATCH)
    assert (tmp_path / name).read_bytes() == before


def test_a_source_inside_its_workdir_under_another_name_is_converted_and_left_as_it_was(tmp_path: Path) -> None:
    path = external(tmp_path)
    before = path.read_bytes(), (tmp_path / "m.data").read_bytes()
    result = bridge.convert(path, workdir=tmp_path, target=RTX, profiles=BATCH)
    assert result.ok, result.error
    assert (path.read_bytes(), (tmp_path / "m.data").read_bytes()) == before


def test_external_data_that_the_conversion_would_overwrite_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(product(), str(path), save_as_external_data=True, location="exported.onnx.data", size_threshold=0)
    before = (tmp_path / "exported.onnx.data").read_bytes()
    with pytest.raises(UsageError, match=r"exported\.onnx\.data.*choose another workdir"):
        bridge.convert(path, workdir=tmp_path, target=RTX, profiles=BATCH)
    assert (tmp_path / "exported.onnx.data").read_bytes() == before


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Limits how large a file may become, which is told like a full disk is."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would leave parts of it, and read them later
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize(
    ("size", "stage", "whole"),
    [
        (10_000, "export", set()),
        (90_000, "build", {"exported.onnx", "rewritten.onnx", "build.log"}),
    ],
)
def test_a_full_disk_is_one_error_that_names_the_file_and_leaves_no_part_of_it(
    tmp_path: Path, room: Callable[[int], None], size: int, stage: str, whole: set[str]
) -> None:
    """Room for nothing but the result, and for all but the engine."""
    module = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).eval()
    room(size)
    result = bridge.convert(module, (torch.ones(1, 64),), workdir=tmp_path, target=RTX)
    assert (result.status, result.stage) == ("failed", stage), result
    assert "File too large" in str(result.error) and "Traceback" not in str(result.error), result.error
    left = {item.name: item.stat().st_size for item in tmp_path.iterdir()}
    assert set(left) == whole | {"result.json"}, left
    for name in whole & {"exported.onnx", "rewritten.onnx"}:
        onnx.checker.check_model(str(tmp_path / name))


def test_a_disk_without_room_for_the_result_is_told_all_the_same(tmp_path: Path, room: Callable[[int], None]) -> None:
    onnx.save(product(), str(tmp_path / "m.onnx"))
    room(0)
    result = bridge.convert(tmp_path / "m.onnx", workdir=tmp_path / "out", target=RTX, profiles=BATCH)
    assert result.status == "failed" and "File too large" in str(result.error), result.error
    assert list((tmp_path / "out").iterdir()) == []


HANGING = """
import sys
from bridge import build
child = "import os, sys, time; open('pid', 'w').write(str(os.getpid())); sys.stdin.readline(); sys.stdin.read()"
build.COMMAND = (sys.executable, "-c", child)
import bridge
bridge.convert("m.onnx", workdir="out", target="tensorrt-rtx", profiles={"x": ((1, 16), (2, 16), (4, 16))})
"""


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_ctrl_c_in_the_middle_of_a_build_leaves_no_process_and_no_part_of_a_file(tmp_path: Path) -> None:
    onnx.save(product(), str(tmp_path / "m.onnx"))
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pid = tmp_path / "pid"
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end and process.poll() is None, process.stderr
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, words = process.communicate(timeout=30)
    assert process.returncode != 0 and words.rstrip().endswith("KeyboardInterrupt"), words
    assert has_ended(int(pid.read_text()))
    left = {item.name for item in (tmp_path / "out").iterdir()}
    assert left == {"rewritten.onnx"}, left


# --- the same through the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "status", "words"),
    [
        (lambda path: path.write_bytes(product().SerializeToString()[:500]), [], 1, "cut short"),
        (lambda path: point_to(external(path.parent), "../secret"), [], 1, "outside of the model's folder"),
        (lambda path: (external(path.parent), (path.parent / "m.data").unlink()), [], 1, "is missing"),
        (lambda path: onnx.save(product(), str(path)), ["--shapes", "z=1x16:2x16:4x16"], 2, "'z' is no input"),
    ],
    ids=["cut short", "outside", "missing", "unknown input"],
)
def test_the_command_line_tells_bad_input_in_one_error_and_leaves_nothing_half_written(
    tmp_path: Path, make: Any, options: list[str], status: int, words: str
) -> None:
    make(tmp_path / "m.onnx")
    shapes = ["--shapes", "x=1x16:2x16:4x16"]
    done = subprocess.run(
        [*CLI, "m.onnx", "-o", "out", "--target", RTX, *shapes, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.count(words) == 1, done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    left = {item.name for item in (tmp_path / "out" / "m").iterdir()}
    assert left == {"result.json", "report.html", "convert.log"}, left
