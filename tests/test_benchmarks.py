"""What the benchmarks promise where no GPU is needed: their figures, workers, tables, and going on after a failure."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import changes, compiled, latency, leak, modules, timing, torch_models, ways
from benchmarks.latency_table import table
from benchmarks.models import CASES, MODELS, Case, Model
from benchmarks.workers import Pool
from bridge.errors import RunError

from . import fake_gpu, sample_work
from .fake_gpu import fake_gpu as fake_gpu_fixture  # noqa: F401 (a fixture)
from .support import RTX, RTX_INSTALLED


def test_quantiles_lie_between_the_nearest_values() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert [timing.quantile(values, part) for part in (0, 0.1, 0.5, 0.9, 1)] == pytest.approx([1, 1.4, 3, 4.6, 5])
    assert timing.summary([7.0]) == {"median": 7.0, "p10": 7.0, "p90": 7.0, "samples": 1}


class DriftingClock:
    """Each call takes its own time, and all of them longer and longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: int(self.now * 1e3))

    def call(self, microseconds: float) -> Any:
        def run() -> None:
            self.now += microseconds + self.now * 1e-3

        return run

    def synchronize(self) -> None:
        """It is synchronous."""

    def back_to_back(self, call: Any, times: int) -> float:
        began = self.now
        for _ in range(times):
            call()
        return (self.now - began) / times


def test_a_difference_is_found_while_the_clock_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = DriftingClock(monkeypatch)
    ways = {"raw": clock.call(100), "module": clock.call(110)}
    blocks = timing.interleaved(ways, clock, rounds=10, calls=5, launches=2, warm_calls=1, warm_seconds=0)
    rows = blocks.rows()
    assert rows["raw"]["host_us"]["samples"] == 50 and rows["raw"]["gpu_us"]["samples"] == 10
    assert rows["raw"]["host_us"]["p90"] > rows["raw"]["host_us"]["p10"] + 5, "it does not drift"
    difference = blocks.difference("module", "raw")
    assert difference is not None and difference["host_us"] == pytest.approx(10, abs=2)
    assert blocks.difference("module", "nothing") is None


def test_a_difference_of_calls_in_turns_is_that_of_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = DriftingClock(monkeypatch)
    found = timing.paired(clock.call(110), clock.call(100), clock, pairs=40)
    assert found["host_us"] == pytest.approx(10, abs=2) and found["pairs"] == 40


def test_a_way_that_fails_on_the_way_is_given_up_and_named() -> None:
    calls = 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise RuntimeError("out of order")

    ways = {"one": lambda: None, "fails": fails}
    blocks = timing.interleaved(ways, timing.HostClock(), rounds=4, calls=5, launches=2, warm_calls=1, warm_seconds=0)
    assert blocks.failed == {"fails": "RuntimeError: out of order"}
    assert list(blocks.rows()) == ["one"] and blocks.rows()["one"]["host_us"]["samples"] == 20


def test_a_worker_that_crashes_or_hangs_costs_its_task_alone(tmp_path: Path) -> None:
    rows: dict[str, Any] = {}
    pool = Pool(sample_work.make, None, jobs=1, seconds=1.5, logs=tmp_path)
    left = pool.run(["a", "crash", "b", "spoilt", "c", "hang", "d"], time.monotonic() + 60, rows.__setitem__)
    assert left == [] and {key: row["status"] for key, row in rows.items()} == {
        **dict.fromkeys("abcd", "ok"),
        "spoilt": "ok",
        "crash": "crashed",
        "hang": "timeout",
    }
    assert rows["crash"]["step"] == "step of crash" and "-11" in rows["crash"]["error"]
    assert rows["b"]["pid"] == rows["spoilt"]["pid"] != rows["c"]["pid"]


def test_what_is_not_reached_in_time_is_named(tmp_path: Path) -> None:
    pool = Pool(sample_work.make, None, jobs=1, seconds=60, logs=tmp_path)
    rows: dict[str, Any] = {}
    assert pool.run(["hang", "a", "b"], time.monotonic() + 2, rows.__setitem__) == ["hang", "a", "b"] and not rows


def test_workers_that_do_not_start_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = Pool(sample_work.broken, None, jobs=1, seconds=60, logs=tmp_path)
    assert pool.run(["a"], time.monotonic() + 60, lambda task, row: None) == ["a"]
    assert "no GPU" in capsys.readouterr().err


# modules

COLLECTION = """
import os, torch
from torch import nn
class Double(nn.Module):
    def forward(self, x): return x * 2
class Crash(nn.Module):
    def forward(self, x): os.abort()
M = {"double": (Double, (torch.randn(2, 3),), {0: "B"}, {}), "crash": (Crash, (torch.randn(2),), None, {}),
     "again": (Double, (torch.randn(2, 3),), None, {})}
"""


def test_the_modules_of_a_collection_are_checked_and_a_run_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(COLLECTION)

    def run(result: str, *options: str) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "benchmarks.modules",
            str(tmp_path / "few.py"),
            "--device",
            "cpu",
            "--jobs",
            "1",
        ]
        done = subprocess.run(
            [*command, "--json", str(tmp_path / result), *options],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == (1 if "crash" in done.stdout else 0), done.stderr
        return dict(json.loads((tmp_path / result).read_text())["rows"])

    first = run("first.json", "--only", "double", "crash")
    assert {key: row["status"] for key, row in first.items()} == {"double": "ok", "crash": "crashed"}
    assert first["crash"]["step"] == "convert"
    assert {key for key, check in first["double"]["checks"].items() if check["status"] == "ok"} >= {
        "changed",
        "dynamic smallest",
        "dynamic largest",
        "non-contiguous",
        "threads",
    }
    assert list(run("second.json", "--skip", str(tmp_path / "first.json"))) == ["again"]


class Halved(nn.Module):
    """An engine that computes something else, in another type, and refuses what is not contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous():
            raise ValueError("not contiguous")
        return (x * 2 + 0.01).half()


def test_a_wrong_engine_is_found_out_by_every_check_and_named() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    row: dict[str, Any] = {"status": "ok", "notes": [], "checks": {}, "stages": {}}
    modules.Checks(Double(), Halved(), (torch.randn(3, 4),), "cpu", row, lambda step: None).all({0: "B"})
    found = {key: check["status"] for key, check in row["checks"].items()}
    assert found.pop("non-contiguous") == "raised" and found.pop("side stream") == found.pop("graph") == "left out"
    assert set(found.values()) == {"wrong"} and len(found) == 6
    assert "output 0 is torch.float16, and torch's is torch.float32" in row["notes"]


@pytest.mark.usefixtures("fake_gpu_fixture")
def test_the_checks_of_a_gpu_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "on", lambda inputs, device: inputs)
    monkeypatch.setattr(nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)

    class Doubling(nn.Module):
        captures = True

        def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"double": x * 2, "sum": x + more["y"]}

        def capture(self, *inputs: Any) -> None:
            if not self.captures:
                raise RunError("no CUDA graph can be made of this engine")

    inputs = (torch.randn(3, 4), {"y": torch.arange(4)})
    for captures, graph in ((True, "ok"), (False, "left out")):
        row: dict[str, Any] = {"status": "ok", "notes": [], "checks": {}, "stages": {}}
        engine = Doubling()
        engine.captures = captures
        modules.Checks(Doubling(), engine, inputs, "cuda", row, lambda step: None).all(None)
        found = {key: check["status"] for key, check in row["checks"].items()}
        assert found == {**dict.fromkeys(("example", "changed", "non-contiguous", "side stream", "threads"), "ok")} | {
            "graph": graph
        }, row
        assert not row["notes"]


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_a_model_of_the_collection_is_compared_with_torch_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SimpleNamespace(target=RTX, dynamic=False, keep=True)
    case = (lambda: nn.Linear(4, 2), (torch.randn(3, 4),), None)
    row = torch_models.run("fine", case, options, tmp_path)
    assert (row["status"], row["beyond"], row["error"]) == ("built", [], None)

    def fails(*_: Any) -> list[str]:
        raise ImportError("no such name")

    monkeypatch.setattr(torch_models, "beyond_tolerance", fails)
    row = torch_models.run("unknown", case, options, tmp_path)
    assert (row["status"], row["stage"]) == ("failed", "crash")
    assert "not compared with torch" in row["error"]


def test_where_torch_draws_random_numbers_only_shapes_are_compared() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.randn_like(x)

    row: dict[str, Any] = {"status": "ok", "notes": [], "checks": {}, "stages": {}}
    modules.Checks(Noise(), Noise(), (torch.randn(3, 4),), "cpu", row, lambda step: None).all(None)
    assert row["checks"]["changed"] == {"status": "ok"} and "only shapes" in " ".join(row["notes"])


def test_torch_that_refuses_inputs_is_not_held_against_the_engine() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 4)

    row: dict[str, Any] = {"status": "ok", "notes": [], "checks": {}, "stages": {}}
    modules.Checks(Fixed(), Fixed(), (torch.randn(3, 4),), "cpu", row, lambda step: None).all({0: "B"})
    assert row["checks"]["dynamic larger"]["status"] == "left out"
    assert "view of its input" in " ".join(row["notes"])


def test_changed_inputs_stay_of_their_kind() -> None:
    matrix = torch.randn(2, 4, 4)
    positive = matrix @ matrix.mT + 4 * torch.eye(4)
    (other,), kept = changes.changed(lambda given: [torch.linalg.cholesky(*given)], (positive,), 0)
    assert not kept and torch.equal(other, other.mT) and not torch.equal(other, positive)
    indices = torch.tensor([0, 4, 9])
    bag = nn.EmbeddingBag(20, 8)
    (ids, offsets), kept = changes.changed(lambda given: [bag(*given)], (torch.arange(12), indices), 0)
    assert kept == [1] and torch.equal(offsets, indices) and sorted(ids.tolist()) == list(range(12))


def test_changed_inputs_have_no_ties_or_thresholds() -> None:
    (other,), kept = changes.changed(lambda given: [given[0] > 1e30], (torch.randn(4),), 0)
    assert not kept and not torch.equal(other, torch.zeros(4))
    _, kept = changes.changed(lambda given: [(given[0] * 1e9).long()], (torch.randn(64),), 0)
    assert kept == [0], "each of these values is next to a step"


def test_spread_values_are_equal_and_not_contiguous() -> None:
    given = (torch.randn(2, 3), torch.arange(6).reshape(2, 3), torch.tensor(1.0))
    found = changes.spread(given)
    assert [item.is_contiguous() for item in found] == [False, False, True]
    assert all(torch.equal(one, other) for one, other in zip(given, found, strict=True))


def test_disagreements_see_nan_shapes_and_integers() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert changes.disagreements([nan], [nan.clone()]) == []
    assert "1 of 2 off" in changes.disagreements([nan], [torch.tensor([0.0, 1.0])])[0]
    assert "shape" in changes.disagreements([nan], [nan[:1]])[0]
    assert "integers differ" in changes.disagreements([torch.tensor([1, 2])], [torch.tensor([1, 3])])[0]
    assert changes.disagreements([torch.tensor([1.0])], [torch.tensor([1.0015])]) == []
    assert changes.disagreements([torch.tensor([1.0])], [torch.tensor([1.0025])]) != []
    assert "2 outputs" in changes.disagreements([nan], [nan, nan])[0]


# latency


class FakeModule(nn.Module):
    """A TRTModule over ``fake_gpu.Engine``."""

    def __init__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.inner = module
        engine = fake_gpu.Engine(
            lambda *given: module(*given), list(inputs), ["FLOAT" if i.is_floating_point() else "INT32" for i in inputs]
        )
        self.engine = SimpleNamespace(trt_engine=engine)
        given = {f"input_{index}": tensor for index, tensor in enumerate(inputs)}
        self.told = ways.Raw(engine, ways.by_name(engine, given))
        self.context = self.told.context

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.inner(*inputs)

    def capture(self, *inputs: torch.Tensor) -> None:
        raise RuntimeError("a loop cannot be captured")


class Pick(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.words(ids) * mask[..., None]


def draw_ids(batch: int, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
    return torch.randint(0, 10, (batch, 3), generator=draw), torch.ones(batch, 3, dtype=torch.int64)


@pytest.mark.usefixtures("fake_gpu_fixture")
def test_every_way_is_timed_and_one_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, model = Case("pick", 2, "fp32"), Model(Pick, draw_ids)
    monkeypatch.setitem(MODELS, "pick", model)
    monkeypatch.setitem(CASES, case.name, case)
    monkeypatch.setattr(latency, "load", lambda folder: FakeModule(model.module(), model.inputs(2)))
    folder = tmp_path / "engines" / case.name
    folder.mkdir(parents=True)
    (folder / "module.pt").touch()
    row = latency.time_one(tmp_path, 2, case.name, lambda step: None)
    assert row["status"] == "ok", row
    assert set(row["ways"]) == {"raw", "raw_elsewhere", "module", "module_engine_types", "allocating", "eager"} | {
        "raw_graph",
        "raw_graph_copied_out",
    }
    assert row["failed_ways"] == {"module_graph": "RuntimeError: a loop cannot be captured"} and row["replace_worker"]
    assert {key: value["max_abs"] for key, value in row["errors"].items()} == dict.fromkeys(row["errors"], 0.0)
    assert set(row["errors"]) == {"module", "raw", "allocating", "eager", "raw_graph"}
    assert row["differences"]["module - raw"]["host_us"] < 1e4
    assert row["differences"]["module - raw"]["in_rows"]["host_us"] < 1e4
    assert row["ways"]["raw"]["host_us"]["samples"] == 40 and row["enqueue_waits"] is False
    json.dumps(row)


@pytest.mark.usefixtures("fake_gpu_fixture")
@pytest.mark.parametrize("waits", [True, False])
def test_an_enqueue_that_waits_for_the_gpu_is_told(waits: bool) -> None:
    x = torch.ones(2)
    engine = fake_gpu.Engine(torch.neg, [x], ["FLOAT"])
    engine.waits = waits
    raw = ways.Raw(engine, {"input_0": x})
    assert ways.waits(raw.call(fake_gpu.Stream.cuda_stream)) is waits
    assert torch.equal(raw.outputs["output_0"], -x) and fake_gpu.Stream().query()


def test_an_engine_that_was_not_built_fails_its_case_alone(tmp_path: Path) -> None:
    row = latency.time_one(tmp_path, 2, "lstm-b8-fp32", lambda step: None)
    assert row == {"status": "failed", "error": "there is no engine: it was not built"}


def test_the_models_are_of_the_sizes_that_they_are_named_after() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in MODELS[name].make().parameters()) for name in ("resnet50", "vit_b16")}
    assert sizes == {"resnet50": 25_557_032, "vit_b16": 86_567_656}
    assert len(CASES) == 15 and next(iter(CASES)) == "resnet50-b8-fp16"
    ids, mask = MODELS["bert"].inputs(8)
    assert ids.dtype == mask.dtype == torch.int64 and ids.shape == (8, 128) and 0 < int(mask.sum()) < 8 * 128
    assert torch.equal(ids, MODELS["bert"].inputs(8)[0]) and not torch.equal(ids, MODELS["bert"].inputs(8, seed=1)[0])


def test_the_table_names_what_is_missing(tmp_path: Path) -> None:
    def way(us: float) -> dict[str, Any]:
        return {"host_us": timing.summary([us]), "gpu_us": timing.summary([us])}

    name = "resnet50-b8-fp16"
    row = {
        "status": "ok",
        "ways": {
            key: way(us) for key, us in (("raw", 500), ("module", 512), ("eager", 4000), ("eager_channels_last", 3000))
        },
        "differences": {"module - raw": {"host_us": 12.04, "in_rows": {"host_us": 7.96}}},
        "errors": {"module": {"max_abs": 0.00123}},
        "failed_ways": {"module_graph": "RunError: no graph"},
    }
    timing.write_json(tmp_path / "run.json", {"cases": {name: row}})
    timing.write_json(tmp_path / "build.json", {"cases": {key: {"status": "ok"} for key in CASES}})
    rows = {
        f"{name} default": {"status": "ok", **way(900)},
        f"{name} reduce-overhead": {"status": "ok", **way(700)},
        f"{name} max-autotune": {"status": "timeout", "error": "compiling after 200 s"},
    }
    timing.write_json(tmp_path / "compile.json", {"rows": rows})
    text = table(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| resnet50, 8, fp16"))
    assert line == (
        "| resnet50, 8, fp16 | 0.500 | 0.512 | +8.0 us | +12.0 us | – | – | – | – | – | 3.000 "
        "| 0.700 (reduce-overhead, best of 2) | 1.2e-03 |"
    )
    assert f"- {name}: module_graph: RunError: no graph" in text and "max-autotune: timeout" in text
    assert "- lstm-b8-fp32: no run" in text and len(text.split("\n\n")[0].splitlines()) == 2 + len(CASES)


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    timing.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        timing.write_json(tmp_path / "a.json", {"a": object()})
    assert timing.read_json(tmp_path / "a.json") == {"a": 1} and timing.read_json(tmp_path / "b.json") is None


def test_compiling_goes_on_after_a_failure_and_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = SimpleNamespace(
        command="prepare", out=tmp_path, only=["lstm-b8-fp32"], modes=["nonsense"], jobs=1, each=100.0, rounds=1
    )
    compiled.compile_all(options, time.monotonic() + 100)
    report = timing.read_json(tmp_path / "prepare.json")
    assert report["rows"]["lstm-b8-fp32 nonsense"]["status"] == "failed"
    assert "nonsense" in report["rows"]["lstm-b8-fp32 nonsense"]["error"]
    report["rows"]["lstm-b8-fp32 nonsense"] = {"status": "ok"}
    timing.write_json(tmp_path / "prepare.json", report)
    compiled.compile_all(options, time.monotonic() + 100)
    assert timing.read_json(tmp_path / "prepare.json")["rows"] == report["rows"]
    assert capsys.readouterr().out.count("nonsense") == 1 + 1  # its mode and its error, once


def test_inductors_benchmarks_are_made_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime import benchmarking

    class Benchmarker:
        def benchmark_gpu(self, call: Any) -> Any:
            return call()

    monkeypatch.setattr(benchmarking, "benchmarker", Benchmarker())
    assert compiled.tune_alone(str(tmp_path / "lock"))
    inner = benchmarking.benchmarker.benchmark_gpu
    assert inner(lambda: inner(lambda: 3)) == 3, "one within another has the lock already"
    monkeypatch.setattr(benchmarking, "benchmarker", object())
    assert not compiled.tune_alone(str(tmp_path / "lock"))


# leak


def test_growth_in_the_second_half_alone_is_a_leak() -> None:
    def read_of(sizes: list[float]) -> Any:
        points = iter(sizes)
        return lambda: {"host_rss": next(points)}

    assert leak.halves(lambda index: None, 10, 1, read_of([100.0, 500.0, 510.0]))["status"] == "ok"
    row = leak.halves(lambda index: None, 10, 1, read_of([100.0, 110.0, 130.0]))
    assert row["status"] == "grew" and row["beyond_limit"] == {"host_rss": 20.0}


def test_memory_that_is_held_is_seen() -> None:
    held: list[bytearray] = []
    row = leak.halves(lambda index: held.append(bytearray(1 << 20)), 64, 2)
    assert row["status"] == "grew" and row["second_half_mib"]["host_rss"] == pytest.approx(32, abs=6)
