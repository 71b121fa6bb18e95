"""The build in a child process: what it refuses, crashes, hangs or prints becomes one error and one log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from onnx import TensorProto

from bridge import build as building
from bridge.build import build
from bridge.build_plan import BuildPlan
from bridge.builder_config import _profiles
from bridge.errors import BuildError, Refusal
from bridge.inputs import Profile
from bridge.target import Target, resolve

from .fake_network import DataType, Network, Tensor
from .support import RTX_INSTALLED

pytestmark = pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")

ROOT = Path(__file__).parents[1]
STATIC = [{"x": Profile((2, 3), (2, 3), (2, 3))}]


@pytest.fixture
def target() -> Target:
    return resolve("tensorrt-rtx")


def model(path: Path, nodes: list[onnx.NodeProto], shape: Any = (2, 3), opset: int = 20, **domains: int) -> Path:
    float32 = TensorProto.FLOAT
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", float32, shape)],
        [oh.make_tensor_value_info("y", float32, None)],
    )
    opsets = [oh.make_opsetid("", opset), *(oh.make_opsetid(key, value) for key, value in domains.items())]
    onnx.save(oh.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def relu(folder: Path) -> Path:
    return model(folder / "m.onnx", [oh.make_node("Relu", ["x"], ["y"], name="relu")])


def run(path: Path, target: Target, **options: Any) -> Any:
    folder = path.parent
    profiles = options.pop("profiles", STATIC)
    return build(path, folder / "e.engine", folder / "build.log", target=target, profiles=profiles, **options)


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Another builder in place of ``bridge.builder``: Python code with ``job`` and ``reply(outcome)``."""
    prelude = (
        "import json, os, signal, sys, threading, time\n"
        "job = json.loads(sys.stdin.readline())\n"
        "def reply(**outcome):\n"
        "    with os.fdopen(int(sys.argv[1]), 'w') as pipe: json.dump(outcome, pipe)\n"
    )
    monkeypatch.setattr(building, "COMMAND", (sys.executable, "-c", prelude + code))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Any, what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


# --- what comes out ----------------------------------------------------------------------------------------------


def test_an_engine_is_built_and_described_with_tensorrts_messages_in_the_log(tmp_path: Path, target: Target) -> None:
    outcome = run(relu(tmp_path), target)
    assert (tmp_path / "e.engine").stat().st_size > 1000
    assert outcome.inputs == [{"name": "x", "dtype": "FLOAT", "shape": [2, 3]}]
    assert outcome.outputs == [{"name": "y", "dtype": "FLOAT", "shape": [2, 3]}]
    log = (tmp_path / "build.log").read_text()
    assert "[I] " in log
    assert not any(word in log for word in building.NOISE), log


def test_a_dynamic_axis_is_built_with_its_profile(tmp_path: Path, target: Target) -> None:
    path = model(tmp_path / "m.onnx", [oh.make_node("Relu", ["x"], ["y"])], ("n", 3))
    outcome = run(path, target, profiles=[{"x": Profile((1, 3), (2, 3), (7, 3))}])
    assert outcome.inputs[0]["shape"] == [-1, 3]


def test_an_input_whose_values_are_sizes_is_told_with_what_the_engine_takes_there(
    tmp_path: Path, target: Target
) -> None:
    path = model(tmp_path / "m.onnx", [oh.make_node("Slice", ["x", "zero", "end", "one"], ["y"])])
    sized = onnx.load(str(path))
    sized.graph.input.append(oh.make_tensor_value_info("end", TensorProto.INT64, [1]))
    values = [oh.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in (("zero", 0), ("one", 1))]
    sized.graph.initializer.extend(values)
    onnx.save(sized, str(path))
    profiles = [{**STATIC[0], "end": Profile((1,), (1,), (1,))}]
    outcome = run(path, target, profiles=profiles)
    assert [note for note in outcome.notes if "'end'" in note and "no values but 1" in note], outcome.notes
    outcome = run(path, target, profiles=profiles, plan=BuildPlan(values={"end": [2]}))
    assert [note for note in outcome.notes if "no values but the example's (2)" in note], outcome.notes
    assert outcome.by_value
    plain = run(relu(tmp_path), target)
    assert plain.notes == [] and not plain.by_value


def test_a_profile_has_the_values_of_inputs_that_are_sizes() -> None:
    end, shift = Tensor("end", DataType.INT64, (2,), is_shape_tensor=True), Tensor("shift", DataType.INT64, (2,))
    x, shapes = Tensor("x", shape=(-1, 3)), {key: [4, 3] for key in ("min", "opt", "max")}
    values = {"end": [5, 7], "shift": [1, 2]}
    for given, network, expected in (
        ([{"x": shapes}] * 2, Network([x, end, shift]), [{"x": (4, 3), "end": (5, 7)}] * 2),
        ([{}], Network([end]), [{"end": (5, 7)}]),
        ([{}], Network([shift]), []),
    ):
        found = [{name: tuple(item.opt) for name, item in one.items()} for one in _profiles(given, network, values)]
        assert found == expected


def test_compute_capabilities_are_those_asked_for_and_an_unknown_one_is_refused_in_tensorrts_words(
    tmp_path: Path, target: Target
) -> None:
    assert run(relu(tmp_path), target, compute_capabilities=[(8, 9), (12, 0)]).compute_capabilities == [[8, 9], [12, 0]]
    with pytest.raises(BuildError) as caught:
        run(relu(tmp_path), target, compute_capabilities=[(9, 0)])
    assert "9.0" in str(caught.value) or "90" in str(caught.value), str(caught.value)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_refused_node_is_told_with_its_operator_the_parsers_words_its_origin_and_a_hint(
    tmp_path: Path, target: Target
) -> None:
    node = oh.make_node("Frobnicate", ["x"], ["y"], name="n0", domain="my.dom")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'bridge_module.encoder.layers.1', 'n0']")
    stack = 'File "/home/me/net.py", line 42, in forward\n    return frobnicate(x)'
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=stack)
    path = model(tmp_path / "m.onnx", [node], **{"my.dom": 1})
    with pytest.raises(BuildError) as caught:
        run(path, target, hints={"Frobnicate": "register a plugin"})
    [refusal] = caught.value.refusals
    assert (refusal.operator, refusal.node) == ("Frobnicate", "n0")
    assert (refusal.module, refusal.source, refusal.hint) == (
        "encoder.layers.1",
        "/home/me/net.py:42",
        "register a plugin",
    )
    assert "Frobnicate" in refusal.words or "plugin" in refusal.words.lower(), refusal.words
    for words in ("parser refuses a node", "encoder.layers.1", "/home/me/net.py:42", refusal.words, refusal.hint):
        assert words in str(caught.value)
    assert "[E] " in (tmp_path / "build.log").read_text()
    assert not (tmp_path / "e.engine").exists()


def test_a_node_inside_a_branch_is_found_for_its_origin(tmp_path: Path, target: Target) -> None:
    inner = oh.make_node("Frobnicate", ["x"], ["z"], name="inner", domain="my.dom")
    inner.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'bridge_module.head', 'n']")
    branches = {
        name: oh.make_graph([item], name, [], [oh.make_tensor_value_info("z", TensorProto.FLOAT, (2, 3))])
        for name, item in (("then_branch", inner), ("else_branch", oh.make_node("Relu", ["x"], ["z"], name="e")))
    }
    nodes = [
        oh.make_node("ReduceMax", ["x"], ["m"], keepdims=0, name="r"),
        oh.make_node("Greater", ["m", "m"], ["c"], name="g"),
        oh.make_node("If", ["c"], ["y"], name="if", **branches),
    ]
    with pytest.raises(BuildError) as caught:
        run(model(tmp_path / "m.onnx", nodes, **{"my.dom": 1}), target)
    assert "head" in [refusal.module for refusal in caught.value.refusals], caught.value.refusals


def test_a_parser_that_names_no_node_but_its_number_is_understood(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT 8.5's does."""
    refusal = {"operator": "", "node": "", "index": 0, "words": "no importer"}
    stand_in(monkeypatch, f"reply(refusals=[{refusal!r}])")
    with pytest.raises(BuildError) as caught:
        run(relu(tmp_path), target, hints={"relu": "rule r declined: it had to"})
    [told] = caught.value.refusals
    assert (told.operator, told.node, told.hint) == ("Relu", "relu", "rule r declined: it had to")


def test_a_failed_build_leads_with_tensorrts_own_last_error(tmp_path: Path, target: Target) -> None:
    nodes = [oh.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    path = model(tmp_path / "m.onnx", nodes, ("n", "k"))
    loaded = onnx.load(str(path))
    loaded.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((3, 2), np.float32), "w"))
    onnx.save(loaded, str(path))
    with pytest.raises(BuildError) as caught:
        run(path, target, profiles=[{"x": Profile((1, 4), (2, 4), (3, 4))}])
    message = str(caught.value)
    first = message.splitlines()[0]
    assert first.startswith(f"{target}: the builder refuses the model: "), message
    assert "product" in first or "MatMul" in first or "dimension" in first.lower(), message
    assert "Please ensure" not in message and "Invalid Engine" not in message, message
    assert message.count(first.partition("refuses the model: ")[2]) == 1, "said once"


# --- crashes -----------------------------------------------------------------------------------------------------


def test_a_segfault_of_tensorrts_builder_is_an_error_with_the_signals_name(tmp_path: Path, target: Target) -> None:
    """TensorRT-RTX 1.7.1 crashes where an Attention's Q, K and V are one tensor; a later one may not."""
    node = oh.make_node("Attention", ["x", "x", "x"], ["y"], name="attention", q_num_heads=1, kv_num_heads=1)
    path = model(tmp_path / "m.onnx", [node], (1, 4, 8), opset=23)
    profiles = [{"x": Profile((1, 4, 8), (1, 4, 8), (1, 4, 8))}]
    if target.version[:3] == (1, 7, 1):
        with pytest.raises(BuildError, match=f"{target} crashed while building: SIGSEGV"):
            run(path, target, profiles=profiles)
    assert (tmp_path / "build.log").exists()


@pytest.mark.parametrize("name", ["SIGABRT", "SIGSEGV", "SIGKILL", "SIGFPE"])
def test_a_builder_that_dies_is_an_error_with_the_signal_and_its_last_words(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stand_in(
        monkeypatch,
        "print('[I] at work'); print('[E] terminate called: no memory', flush=True)\n"
        f"os.kill(os.getpid(), signal.{name})",
    )
    with pytest.raises(BuildError) as caught:
        run(relu(tmp_path), target)
    assert f"crashed while building: {name}" in str(caught.value)
    assert "terminate called: no memory" in str(caught.value) and "build.log" in str(caught.value)
    assert ("out of memory" in str(caught.value)) == (name == "SIGKILL")
    assert (tmp_path / "build.log").read_text() == "[I] at work\n[E] terminate called: no memory\n"


def test_a_builder_that_leaves_without_a_result_is_an_error_with_its_status(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "sys.exit(7)")
    with pytest.raises(BuildError, match="ended with status 7 and no result"):
        run(relu(tmp_path), target)


def test_a_builder_that_raises_is_an_error_with_what_it_raised(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "raise TypeError('incompatible function arguments:\\n  1. (self, size: int)')")
    with pytest.raises(BuildError, match=r"no result\. It raised TypeError: incompatible function arguments"):
        run(relu(tmp_path), target)


def test_a_builder_that_dies_in_the_middle_of_its_answer_is_an_error(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "os.write(int(sys.argv[1]), b'{\"err'); os._exit(0)")
    with pytest.raises(BuildError, match="no result"):
        run(relu(tmp_path), target)


def test_a_builder_that_dies_before_it_has_read_its_job_is_an_error(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "COMMAND", (sys.executable, "-c", "import sys; sys.exit(3)"))
    profiles = [{f"x{number}": Profile((1,), (2,), (3,)) for number in range(4000)}]  # more than a pipe holds
    with pytest.raises(BuildError, match="ended with status 3"):
        run(relu(tmp_path), target, profiles=profiles)


def test_a_build_that_takes_too_long_is_stopped_with_all_that_it_started(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    stand_in(
        monkeypatch,
        "import subprocess; grandchild = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{grandchild.pid}}')\n"
        "print('[E] still at it', flush=True); time.sleep(600)",
    )
    began = time.monotonic()
    with pytest.raises(BuildError, match=r"longer than its time-out of 1\.5 s.*\n.*\n.*still at it"):
        run(relu(tmp_path), target, timeout=1.5)
    assert time.monotonic() - began < 10
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not alive(pid), f"process {pid} is still there")


def test_noise_is_left_out_of_the_log_and_errors_are_kept_whole(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        "print('[W] catchCudaError: cudaError 35'); print('[W] Thread context has not been set')\n"
        "print('[E] [graph.cpp] Error Code 4: ' + 'long ' * 500 + 'end')\n"
        "print('a line of a native library'); sys.stdout.flush(); reply(error='the builder refuses the model')",
    )
    with pytest.raises(BuildError) as caught:
        run(relu(tmp_path), target)
    log = (tmp_path / "build.log").read_text().splitlines()
    assert [line[:10] for line in log] == ["[E] [graph", "a line of "]
    assert log[0].endswith("end") and log[0][4:] in str(caught.value)


def test_the_builder_dies_with_its_parent_however_that_dies(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = (
        "import json, os, sys, threading, time; from bridge import builder\n"
        f"builder.run = lambda job: (open({str(pid_file)!r}, 'w').write(str(os.getpid())), time.sleep(600))\n"
        "builder.main()"
    )
    parent = (
        "import sys; from pathlib import Path; from bridge import build; from bridge.target import Target\n"
        f"build.COMMAND = (sys.executable, '-c', {child!r})\n"
        "target = Target('tensorrt-rtx', (1, 7), True, frozenset())\n"
        f"build.build(Path('m'), Path('e'), Path({str(tmp_path / 'log')!r}), target=target, profiles=[])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    wait_for(lambda: pid_file.exists() and pid_file.read_text(), "the builder has not started")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not alive(int(pid_file.read_text())), "the builder outlives its parent")


def test_an_engine_that_cannot_be_written_is_told_with_the_file(tmp_path: Path, target: Target) -> None:
    with pytest.raises(BuildError, match=r"cannot be written to .*nowhere/e.engine: No such file or directory"):
        build(relu(tmp_path), tmp_path / "nowhere" / "e.engine", tmp_path / "build.log", target=target, profiles=STATIC)


def test_the_job_is_told_to_the_child_in_json(tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "job.json"
    stand_in(monkeypatch, f"json.dump(job, open({str(seen)!r}, 'w')); reply()")
    run(relu(tmp_path), target, compute_capabilities=[(8, 9)])
    job = json.loads(seen.read_text())
    assert job["flavour"] == "tensorrt-rtx" and job["compute_capabilities"] == [[8, 9]]
    assert job["profiles"] == [{"x": {"min": [2, 3], "opt": [2, 3], "max": [2, 3]}}]
    assert os.path.isabs(job["onnx"])  # noqa: PTH117 - a string of the job


def test_a_refusal_that_names_no_node_is_of_the_whole_model() -> None:
    assert str(Refusal("", "", "cannot be sorted")) == "the model as a whole: cannot be sorted"
    assert str(Refusal("Det", "n0", "no", "head", "net.py:3")) == "Det (n0), from head, net.py:3: no"
