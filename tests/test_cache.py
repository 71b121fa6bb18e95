"""The engine cache: what is the same is built once, what differs anew, and no fault of it costs a conversion."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch

import bridge
from bridge import ConversionResult, gpu, target
from bridge import build as building
from bridge.build_plan import BuildPlan
from bridge.cache import Damaged, EngineCache, default_folder, open_cache, read_size
from bridge.cache_key import NoKey, engine_key, feeds_key
from bridge.cli import main
from bridge.errors import BuildTimeout, UsageError
from bridge.inputs import Case, Profile
from bridge.plugins.loading import NeededPlugin
from bridge.report import render_report
from bridge.runtime.dataset import ListDataset
from bridge.settings import Settings
from bridge.stages import state
from bridge.target import Target, resolve
from bridge.timing import TimingCache

from .fake_builder import IBuilderConfig
from .support import RTX, RTX_INSTALLED

ROOT = Path(__file__).parents[1]
builds = pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "gpu_compute_capabilities", tuple)


def model(path: Path, scale: float = 2.0, size: int = 4, node: str = "product", inline: bool = True) -> Path:
    """y = x @ w."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = onnx.numpy_helper.from_array(np.full((size, size), scale, np.float32), "w")
    tensors = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("n", size)) for name in "xy"]
    graph = oh.make_graph(
        [oh.make_node("MatMul", ["x", "w"], ["y"], name=node)], "g", tensors[:1], tensors[1:], [weights]
    )
    made = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9)
    options: dict[str, Any] = {"save_as_external_data": True, "location": f"{path.stem}.bin", "size_threshold": 0}
    onnx.save(made, str(path), **({} if inline else options))
    return path


def profiles(size: int = 4, largest: int = 8) -> dict[str, Any]:
    return {"x": ((1, size), (2, size), (largest, size))}


def convert(source: Path, workdir: Path, **options: Any) -> ConversionResult:
    given = {"target": RTX, "profiles": profiles(), "check": True, **options}
    return bridge.convert(source, **given, workdir=workdir)


def count_builds(monkeypatch: pytest.MonkeyPatch, log: Path, body: str = "") -> None:
    """A stand-in for TensorRT, whose engine is a digest of the model; each build leaves a line in ``log``."""
    code = (
        "import hashlib, json, os, sys, time\n"
        "from pathlib import Path\n"
        "job = json.loads(sys.stdin.readline())\n"
        f"handle = os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.write(handle, b'built\\n')\n"
        f"{body}\n"
        "Path(job['engine']).write_bytes(hashlib.sha256(Path(job['onnx']).read_bytes()).digest() * 1000)\n"
        "with os.fdopen(int(sys.argv[1]), 'w') as pipe: json.dump({'seconds': 1.5, 'notes': ['said once']}, pipe)\n"
    )
    monkeypatch.setattr(building, "COMMAND", (sys.executable, "-c", code))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "builds.log"
    count_builds(monkeypatch, path)
    return path


def built(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def engines(cache: Path) -> list[Path]:
    return sorted((cache / "engines").glob("*/model.engine"))


# --- hits --------------------------------------------------------------------------------------------------------


@builds
def test_the_second_conversion_takes_the_engine_into_another_folder_and_compares_it_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = convert(model(tmp_path / "a" / "m.onnx"), tmp_path / "one")
    monkeypatch.setattr(building, "COMMAND", (sys.executable, "-c", "raise SystemExit('no build was expected')"))
    ran: list[str] = []
    run_stage = state.run_stage
    monkeypatch.setattr(state, "run_stage", lambda name, *rest: (ran.append(name), run_stage(name, *rest))[1])
    second = convert(model(tmp_path / "b" / "n.onnx"), tmp_path / "two" / "deep", name="m")
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.engine is not None and second.engine is not None
    assert first.engine.read_bytes() == second.engine.read_bytes()
    assert ran == ["exported"], "the rewritten model's outputs are known"
    assert second.comparisons == first.comparisons and len(second.comparisons) == 3
    assert any(note.startswith("engine from the cache, built on 20") for note in second.notes), second.notes
    read = [json.loads(item.with_name("model.engine.json").read_text()) for item in (first.engine, second.engine)]
    assert read[0] == read[1] and read[0]["tensorrt_seconds"] > 0 and read[0]["engine_inputs"][0]["shape"] == [-1, 4]
    assert read[1]["engine_sha256"] == hashlib.sha256(second.engine.read_bytes()).hexdigest()
    assert (tmp_path / "one" / "build.log").read_text() == (tmp_path / "two" / "deep" / "build.log").read_text()
    assert ConversionResult.load(tmp_path / "two" / "deep" / "result.json").from_cache
    assert "from the cache" in render_report(second) and "from the cache" not in render_report(first)


def test_other_inputs_take_the_engine_and_run_the_rewritten_model(tmp_path: Path, log: Path) -> None:
    source = model(tmp_path / "m.onnx")
    assert "said once" in convert(source, tmp_path / "one").notes
    for workdir in ("two", "three"):
        result = convert(source, tmp_path / workdir, seed=1)
        assert result.from_cache and [item.agreed for item in result.comparisons] == [True] * 3
        assert "said once" not in result.notes
    assert built(log) == 1
    assert result.seconds["run"] >= 0 and len(list(engines(default_folder())[0].parent.glob("outputs-*"))) == 2


def test_known_outputs_are_compared_with_this_runs_and_not_believed(tmp_path: Path, log: Path) -> None:
    source = model(tmp_path / "m.onnx")
    convert(source, tmp_path / "one")
    cache = EngineCache()
    [entry] = cache.entries()
    [name] = [name for name in entry.files if name.startswith("outputs-")]
    cache.put_outputs(
        entry.folder.name, name.removeprefix("outputs-").removesuffix(".npz"), [{"y": np.ones((2, 4))}] * 3
    )
    result = bridge.convert(source, target=RTX, profiles=profiles(), workdir=tmp_path / "two")
    assert result.status == "failed" and "the passes changed what the model computes" in str(result.error)


def test_without_a_cache_each_conversion_builds_and_keeps_nothing(
    tmp_path: Path, log: Path, engine_cache: Path
) -> None:
    for workdir in ("one", "two"):
        assert not convert(model(tmp_path / "m.onnx"), tmp_path / workdir, cache=False).from_cache
    assert built(log) == 2 and not list(engine_cache.iterdir())


def test_the_cache_may_be_another_folder(tmp_path: Path, log: Path, engine_cache: Path) -> None:
    for cache, hit in ((tmp_path / "mine", False), (str(tmp_path / "mine"), True), (True, False)):
        assert convert(model(tmp_path / "m.onnx"), tmp_path / "out", cache=cache).from_cache is hit
    assert len(engines(tmp_path / "mine")) == len(engines(engine_cache)) == 1


# --- the key -----------------------------------------------------------------------------------------------------


def key(path: Path, ranges: Any = None, plugins: Any = (), **options: Any) -> str:
    settings = replace(Settings(resolve("tensorrt-rtx-1.7")), **options)
    return engine_key(path, settings, ranges or [{"x": Profile((1, 4), (2, 4), (8, 4))}], plugins)


def test_where_a_model_and_its_weights_lie_makes_no_difference(tmp_path: Path) -> None:
    same = {
        key(model(tmp_path / "a" / "m.onnx")),
        key(model(tmp_path / "b" / "other.onnx")),
        key(model(tmp_path / "c" / "m.onnx", inline=False)),
        key(model(tmp_path / "d" / "other.onnx", inline=False)),
    }
    assert len(same) == 1


def test_what_is_written_for_people_makes_no_difference(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx")
    before = key(path)
    loaded = onnx.load(str(path))
    loaded.doc_string = loaded.graph.doc_string = loaded.graph.node[0].doc_string = "made by me"
    loaded.producer_name = "somebody"
    for holder in (loaded, loaded.graph, loaded.graph.node[0], loaded.graph.initializer[0], loaded.graph.input[0]):
        holder.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/home/me/net.py", line 42')
    onnx.save(loaded, str(path))
    assert key(path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 2.0000002},
        {"size": 5},
        {"node": "another_name"},
    ],
    ids=str,
)
@pytest.mark.parametrize("inline", [True, False])
def test_another_model_is_another_key(tmp_path: Path, change: Any, inline: bool) -> None:
    before = key(model(tmp_path / "m.onnx", inline=inline))
    assert key(model(tmp_path / "n.onnx", inline=inline, **change)) != before


def test_large_weights_differ_by_a_bit_at_their_end(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", size=1500, inline=False)
    before = key(path)
    with (tmp_path / "m.bin").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x41")
    assert key(path) != before


RTX_8 = Target("tensorrt-rtx", (1, 8, 0, 1), False, frozenset())


@pytest.mark.parametrize(
    "change",
    [
        {"ranges": [{"x": Profile((1, 4), (2, 4), (9, 4))}]},
        {"ranges": [{"x": Profile((1, 4), (2, 4), (8, 4))}] * 2},
        {"ranges": [[{"x": Profile((1, 4), (2, 4), (8, 4))}], BuildPlan(builder={"optimization_level": 5}).key()]},
        {"ranges": [[{"x": Profile((1, 4), (2, 4), (8, 4))}], BuildPlan(devices={"product": "DLA"}).key()]},
        {"compute_capabilities": ((8, 9),)},
        {"target": RTX_8},
        {"target": replace(RTX_8, flavour="tensorrt")},
        {"plugins": (NeededPlugin("RowNorms", "1"),)},
        {"plugins": (NeededPlugin("RowNorms", "1", module="tests.row_norms_plugin"),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_else_reaches_the_builder_makes_another_key(tmp_path: Path, change: Mapping[str, Any]) -> None:
    path = model(tmp_path / "m.onnx")
    others = [key(path, target=RTX_8), key(path)]
    assert len({key(path, **change), key(path)}) == 2
    assert change.get("target") is RTX_8 or key(path, **change) not in others


def test_what_does_not_reach_the_builder_makes_no_difference(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx")
    others: dict[str, Any] = {"seed": 5, "build_timeout": 9.0, "prove": True, "task_check": print, "opset": 17}
    assert key(path, **others) == key(path)


def test_a_setting_that_is_not_known_belongs_to_the_key_and_one_without_a_plain_form_has_none(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx")

    @dataclass(frozen=True)
    class Later(Settings):
        later: Any = None

    def later(value: Any) -> str:
        ranges = [{"x": Profile((1, 4), (2, 4), (8, 4))}]
        return engine_key(path, Later(resolve("tensorrt-rtx-1.7"), later=value), ranges, ())

    given = (
        [torch.zeros(3)],
        [torch.ones(3)],
        [torch.ones(1, 3)],
        [np.ones(3)],
        [{"x": np.ones(3)}],
        [{"y": np.ones(3)}],
    )
    assert len({later(value) for value in (None, "files", *given)}) == 2 + len(given)
    assert later(ListDataset([(torch.ones(3),)])) == later([[torch.ones(3)]]) == later([(np.ones(3, np.float32),)])
    with pytest.raises(NoKey, match="a object among the settings"):
        later(object())


def test_another_gpu_is_another_key_unless_others_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path / "m.onnx")
    before = key(path), key(path, compute_capabilities=((8, 9),))
    monkeypatch.setattr("bridge.cache_key.gpu_here", lambda: "NVIDIA H100 80GB HBM3 9.0")
    after = key(path), key(path, compute_capabilities=((8, 9),))
    assert before[0] != after[0] and before[1] == after[1]
    assert gpu.gpu_here() == ""


def test_another_library_or_source_of_a_plugin_is_another_key_and_another_place_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path / "m.onnx")
    keys = []
    for name, content in (("a.so", b"1"), ("b.so", b"1"), ("c.so", b"2")):
        (tmp_path / name).write_bytes(content)
        keys.append(key(path, plugins=(NeededPlugin("P", "1", library=str(tmp_path / name)),)))
    assert keys[0] == keys[1] != keys[2]
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []
    for source in ("A = 1\n", "A = 22\n"):
        (tmp_path / "plugin_of_mine.py").write_text(source)
        written.append(key(path, plugins=(NeededPlugin("P", "1", module="plugin_of_mine"),)))
    assert written[0] != written[1]


def test_inputs_are_told_apart_by_name_type_shape_and_values() -> None:
    array = np.arange(6, dtype=np.float32)
    feeds = ({"x": array}, {"y": array}, {"x": array.reshape(2, 3)}, {"x": array.view(np.int32)}, {"x": array + 1})
    assert len({feeds_key([Case("example", dict(feed))]) for feed in feeds}) == 5


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["changed", "short", "gone", "manifest", "no manifest", "outputs"])
def test_a_damaged_entry_is_removed_with_a_note_and_built_anew(tmp_path: Path, log: Path, how: str) -> None:
    source = model(tmp_path / "m.onnx")
    first = convert(source, tmp_path / "one")
    [engine] = engines(default_folder())
    content = engine.read_bytes()
    if how == "outputs":
        [file] = engine.parent.glob("outputs-*")
        damage(file, b"\0" * 100)
    elif how in ("changed", "short"):
        damage(engine, content[:-1] + (b"" if how == "short" else bytes([content[-1] ^ 1])))
    elif how == "gone":
        engine.unlink()
    elif how == "manifest":
        damage(engine.with_name("manifest.json"), b"{")
    else:
        engine.with_name("manifest.json").unlink()
    second = convert(source, tmp_path / "two")
    assert any("damaged" in note for note in second.notes), second.notes
    assert second.from_cache == (how == "outputs") and built(log) == 2 - (how == "outputs")
    assert second.engine is not None and second.engine.read_bytes() == content
    assert first.ok and convert(source, tmp_path / "three").from_cache


def test_what_shares_a_damaged_file_is_not_written_into_by_the_build_that_replaces_it(tmp_path: Path) -> None:
    source = model(tmp_path / "m.onnx")
    convert(source, tmp_path / "one")
    [engine] = engines(default_folder())
    damage(engine, b"not what was built")
    engine.chmod(0o444)
    (tmp_path / "another users").hardlink_to(engine)
    second = convert(source, tmp_path / "two")
    assert second.ok and not second.from_cache
    assert (tmp_path / "another users").read_bytes() == b"not what was built"


def damage(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def test_what_a_user_writes_over_his_engine_never_comes_out_of_the_cache(tmp_path: Path, log: Path) -> None:
    source = model(tmp_path / "m.onnx")
    engine = convert(source, tmp_path / "one").engine
    assert engine is not None
    content = engine.read_bytes()
    engine.chmod(0o644)
    engine.write_bytes(b"mine")
    second = convert(source, tmp_path / "two").engine
    assert second is not None and second.read_bytes() == content


def test_a_killed_writer_leaves_no_entry_and_its_files_go_with_the_next_one(
    tmp_path: Path, log: Path, engine_cache: Path
) -> None:
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from bridge import cache\n"
        "cache._write_manifest = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"kept = cache.EngineCache(); engine = Path({str(tmp_path / 'engine')!r}); engine.write_bytes(b'1' * 1000)\n"
        "with kept.locked('a' * 64): kept.put('a' * 64, {'model.engine': engine}, 'm', 't', {})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((engine_cache / "partial").iterdir())) == 1 and not EngineCache().entries()
    convert(model(tmp_path / "m.onnx"), tmp_path / "one")
    assert not list((engine_cache / "partial").iterdir()) and len(EngineCache().entries()) == 1


def test_two_processes_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, script = tmp_path / "builds.log", tmp_path / "one.py"
    count_builds(monkeypatch, log, "time.sleep(1.5)")
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport bridge\nfrom bridge import build\n"
        f"build.COMMAND = {building.COMMAND!r}\n"
        f"result = bridge.convert({str(model(tmp_path / 'm.onnx'))!r}, target={RTX!r}, profiles={profiles()!r}, "
        "workdir=sys.argv[1], check=True)\n"
        "print(result.from_cache)\n"
    )
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([*command, str(tmp_path / name)], env=environment, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert said == ["False", "True"] and built(log) == 1


def test_who_waits_for_another_build_waits_no_longer_than_his_time_out(tmp_path: Path, log: Path) -> None:
    source = model(tmp_path / "m.onnx")
    convert(source, tmp_path / "one")
    cache = EngineCache()
    [entry] = cache.entries()
    other = filelock.FileLock(cache.folder / "locks" / f"{entry.folder.name}.lock", thread_local=False)
    with other:
        began = time.monotonic()
        with pytest.raises(BuildTimeout, match=r"another process .* time-out of 0\.5 s"):
            convert(source, tmp_path / "two", build_timeout=0.5)
        assert time.monotonic() - began < 10


def test_the_least_recently_used_entries_go_and_none_that_is_in_use(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache", limit=2500)
    engine = tmp_path / "engine"
    keys = [letter * 64 for letter in "abcd"]
    for number, name in enumerate(keys[:2]):
        stored(cache, name, engine)
        os.utime(cache.folder / "engines" / name, (number, number))
    entry = cache.find(keys[0])
    assert entry is not None
    cache.take(entry, {"model.engine": tmp_path / "taken", "build.log": tmp_path / "none"})  # now b is the oldest
    assert (tmp_path / "taken").read_bytes() == b"a" * 1000 and not (tmp_path / "none").exists()
    stored(cache, keys[2], engine)
    assert [entry.name for entry in cache.entries()] == ["a", "c"]
    other = EngineCache(cache.folder, limit=2500)
    with other.locked(keys[0]):
        os.utime(cache.folder / "engines" / keys[0], (1, 1))
        stored(cache, keys[3], engine)
    assert sorted(entry.name for entry in cache.entries()) == ["a", "d"], "a is being read, so c went"


def stored(cache: EngineCache, key: str, engine: Path, size: int = 1000) -> None:
    engine.unlink(missing_ok=True)
    engine.write_bytes(key[:1].encode() * size)
    with cache.locked(key):
        cache.put(key, {"model.engine": engine, "build.log": engine.with_name("no log")}, key[:1], "a target", {})


def test_an_engine_larger_than_the_limit_is_not_kept_and_the_note_says_so(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_CACHE_LIMIT", "10 KiB")
    result = convert(model(tmp_path / "m.onnx"), tmp_path / "one")
    assert result.ok and any("31.2 KiB" in note and "limit of 10 KiB" in note for note in result.notes), result.notes
    assert not EngineCache().entries()


@pytest.mark.parametrize("where", ["a file is in its place", "no space"])
def test_a_cache_that_cannot_be_written_costs_a_note(
    tmp_path: Path, log: Path, engine_cache: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "no space":

        def full(*given: Any) -> None:
            raise OSError(28, "No space left on device", str(engine_cache))

        monkeypatch.setattr("bridge.cache._write_manifest", full)
    else:
        engine_cache.rmdir()
        engine_cache.write_text("")
    for workdir in ("one", "two"):
        result = convert(model(tmp_path / "m.onnx"), tmp_path / workdir)
        assert result.status == "built" and not result.from_cache
        assert any(str(engine_cache) in note for note in result.notes), result.notes
    assert built(log) == 2


def test_a_cache_that_can_only_be_read_is_read(
    tmp_path: Path, log: Path, engine_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By refusing locks: a superuser, as in many containers, may write to folders that are read-only."""
    source = model(tmp_path / "m.onnx")
    convert(source, tmp_path / "one")

    def refused(self: Any, *given: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(engine_cache))

    monkeypatch.setattr(EngineCache, "_lock", refused)
    monkeypatch.setattr(EngineCache, "_temporary", refused)
    monkeypatch.setattr("os.utime", refused)
    result = convert(source, tmp_path / "two")
    assert result.from_cache and built(log) == 1
    assert any("Permission denied" in note for note in result.notes), result.notes
    missed = convert(model(tmp_path / "n.onnx", scale=3.0), tmp_path / "three")
    assert missed.status == "built" and not missed.from_cache


def test_a_failed_build_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    for workdir in ("one", "two"):
        result = bridge.convert(model(tmp_path / "m.onnx"), target=RTX, profiles=profiles(), workdir=tmp_path / workdir)
        assert result.status == "failed" and "ended with status 3" in str(result.error)
    assert not EngineCache().entries()


def test_types_that_numpy_has_not_and_empty_outputs_are_kept_as_they_are(tmp_path: Path) -> None:
    import ml_dtypes

    cache = EngineCache(tmp_path / "cache")
    stored(cache, "a" * 64, tmp_path / "engine")
    outputs = [
        {"half": np.array([[1.5], [np.nan]], ml_dtypes.bfloat16), "none": np.zeros((0, 3), np.int64)},
        {"half": np.array(2, ml_dtypes.bfloat16), "none": np.array([True, False])},
    ]
    cache.put_outputs("a" * 64, "f" * 64, outputs)
    entry = cache.find("a" * 64)
    assert entry is not None
    found = cache.outputs(entry, "f" * 64)
    assert found is not None and cache.outputs(entry, "0" * 64) is None
    for before, after in zip(outputs, found, strict=True):
        for name, array in before.items():
            assert (after[name].dtype, after[name].shape) == (array.dtype, array.shape)
            assert after[name].tobytes() == array.tobytes()
    with pytest.raises(Damaged):
        entry.verify("model.engine", Path(__file__))


# --- settings and commands ---------------------------------------------------------------------------------------


def test_sizes_and_folders_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [read_size(text) for text in ("20GiB", "1.5 kb", "7", "2M")] == [20 << 30, 1500, 7, 2_000_000]
    monkeypatch.setenv("BRIDGE_CACHE_LIMIT", "lots")
    with pytest.raises(UsageError, match=r"BRIDGE_CACHE_LIMIT.*'lots'"):
        open_cache(True)
    monkeypatch.delenv("BRIDGE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "torch-tensorrt-bridge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "torch-tensorrt-bridge"
    assert open_cache(False) is None
    with pytest.raises(UsageError, match="cache: 3"):
        open_cache(3)  # type: ignore[arg-type]


def test_the_command_lists_and_clears(tmp_path: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(model(tmp_path / "m.onnx"), tmp_path / "one", name="resnet")
    assert main(["cache"]) == 0
    listed = capsys.readouterr().out
    assert "resnet for TensorRT-RTX" in listed and "KiB" in listed and "just now" in listed and "1 engine" in listed
    assert main(["cache", "--clear"]) == 0
    assert "1 engine removed" in capsys.readouterr().out and not EngineCache().entries()
    assert main(["cache", "--cache", str(tmp_path / "none")]) == 0
    assert "0 engines" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_a_manifest_and_the_command_line_choose_the_cache(tmp_path: Path) -> None:
    from bridge.manifest import read_sources

    model(tmp_path / "m.onnx")
    manifest = tmp_path / "models.yaml"
    for text, expected in (("false", False), ("true", True), ("kept", str(tmp_path / "kept"))):
        manifest.write_text(f"defaults: {{cache: {text}}}\nmodels: [{{name: m, source: m.onnx}}]\n")
        [spec] = read_sources([str(manifest)], {})
        assert spec.cache == expected
    assert read_sources([str(manifest)], {"cache": False})[0].cache is False
    manifest.write_text("models: [{name: m, source: m.onnx, cache: no}]\n")
    assert read_sources([str(manifest)], {})[0].cache is False, "a word in YAML 1.2, and no folder"
    manifest.write_text("models: [{name: m, source: m.onnx, cache: ''}]\n")
    with pytest.raises(UsageError, match="write true, false or the path"):
        read_sources([str(manifest)], {})


# --- timings -----------------------------------------------------------------------------------------------------


def configured(timings: TimingCache, gpu: bytes = b"H100") -> IBuilderConfig:
    """As Polygraphy does: with what it is given, or an empty cache."""
    from polygraphy.util import load_file

    config, data = IBuilderConfig(gpu), timings.options().get("load_timing_cache")
    config.set_timing_cache(config.create_timing_cache(load_file(data) if data is not None else b""), False)
    return timings.watched(lambda builder, network: config)(None, None)  # type: ignore[no-any-return]


def timed(path: Path, entry: bytes, gpu: bytes = b"H100", meanwhile: Any = None) -> TimingCache:
    """A build that measures ``entry``."""
    timings = TimingCache(path)
    made = configured(timings, gpu)
    assert made.timings is not None
    made.timings.entries.add(entry)
    if meanwhile is not None:
        meanwhile()
    timings.save()
    return timings


def known(path: Path, gpu: bytes = b"H100") -> set[bytes]:
    there = configured(TimingCache(path), gpu).timings
    assert there is not None and there.header == gpu
    return there.entries


def test_timings_are_kept_and_merged_with_what_others_measured_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "timing" / "t.cache"
    assert timed(path, b"one").notes == []
    timed(path, b"two", meanwhile=lambda: timed(path, b"three"))
    assert known(path) == {b"one", b"two", b"three"}


def test_damaged_timings_are_ignored_with_a_note_and_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    timed(path, b"one")
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "t.cache.killed.partial").write_bytes(b"half")
    [note] = timed(path, b"two").notes
    assert "is damaged" in note and known(path) == {b"two"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.cache", "t.cache.lock"]


def test_timings_of_another_gpu_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    timed(path, b"one")
    timings = timed(path, b"two", b"Orin")
    assert any("another GPU" in note for note in timings.notes), timings.notes
    assert known(path, b"Orin") == {b"two"}


def test_timings_that_cannot_be_written_cost_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    timings = timed(tmp_path / "file" / "t.cache", b"one")
    assert any("was not written" in note for note in timings.notes), timings.notes
