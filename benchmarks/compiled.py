"""torch.compile of the same models, its modes each in a process of its own; no ``bridge`` here.

The processes of a wave compile beside each other, then wait, and are timed one after the other: while one is timed, the
others do nothing. What Inductor tries out on the GPU, to choose kernels by, is done by one process at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .models import CASES, MODELS
from .timing import GpuClock, HostClock, interleaved, read_json, words, write_json
from .workers import end_group

MODES = ("reduce-overhead", "max-autotune", "default")
Row = dict[str, Any]


def compile_all(options: argparse.Namespace, deadline: float) -> None:
    """Wave by wave, the cases that matter most first; ``prepare`` times nothing and keeps its rows elsewhere."""
    timing = options.command == "compile"
    path = options.out / ("compile.json" if timing else "prepare.json")
    report = read_json(path) or {"rows": {}}
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.out / "inductor"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    logs = options.out / "logs" / options.command
    logs.mkdir(parents=True, exist_ok=True)
    todo = [
        (name, mode)
        for name in options.only or [name for name, case in CASES.items() if not case.quantised]
        for mode in options.modes or MODES
        if report["rows"].get(f"{name} {mode}", {}).get("status") != "ok"
    ]
    jobs = options.jobs or 9
    while todo and time.monotonic() < deadline:
        wave, todo = todo[:jobs], todo[jobs:]
        children = [start(name, mode, logs, options, timing) for name, mode in wave]
        try:
            ends = min(deadline - 4.0 * len(wave) * timing, time.monotonic() + options.each)
            gather(children, ends)
            for child in children:
                if timing and child.row is None and child.state == "ready":
                    child.go(min(deadline, time.monotonic() + 60))
                report["rows"][f"{child.name} {child.mode}"] = child.result(options.each)
                write_json(path, report)
                row = report["rows"][f"{child.name} {child.mode}"]
                print(
                    f"{options.command} {child.name} {child.mode}: {row['status']} {row.get('error', '')[:300]}",
                    flush=True,
                )
        finally:
            for child in children:
                child.stop()
    report["not_reached"] = [f"{name} {mode}" for name, mode in todo]
    write_json(path, report)


@dataclass
class Child:
    name: str
    mode: str
    process: Any
    pipe: Connection
    log: Path
    state: str = "compiling"
    row: Row | None = None
    found: Any = None

    def hear(self) -> None:
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            self.state = "dead"
            tail = self.log.read_text(errors="replace")[-1500:]
            self.row = {"status": "crashed", "error": f"process ended with status {self.process.exitcode}\n{tail}"}
            return
        if kind == "ready":
            self.state, self.found = "ready", value
        else:
            self.state, self.row = "done", value

    def go(self, ends: float) -> None:
        """Lets it take its times, alone."""
        try:
            self.pipe.send("go")
        except OSError:
            self.hear()
            return
        while self.row is None and time.monotonic() < ends:
            if self.pipe.poll(0.5):
                self.hear()

    def result(self, seconds: float) -> Row:
        if self.row is not None:
            return self.row
        if self.state == "ready" and self.found is not None:
            return {"status": "compiled", **self.found, "error": "not timed in time"}
        return {"status": "timeout", "error": f"{self.state} after {seconds:g} s, or when time was up"}

    def stop(self) -> None:
        end_group(self.process)
        self.pipe.close()


def gather(children: Sequence[Child], ends: float) -> None:
    """Until each has compiled, failed or run out of time; those that did are stopped, so that they disturb no one."""
    while time.monotonic() < ends:
        busy = [child for child in children if child.state == "compiling"]
        if not busy:
            break
        ready = wait([child.pipe for child in busy], 1.0)
        for child in busy:
            if child.pipe in ready:
                child.hear()
    for child in children:
        if child.state == "compiling":
            end_group(child.process)


def start(name: str, mode: str, logs: Path, options: argparse.Namespace, timing: bool) -> Child:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    log = logs / f"{name}-{mode}.log"
    setting = {"rounds": options.rounds, "lock": str(options.out / "autotune.lock"), "timing": timing}
    process = context.Process(target=child_main, args=(name, mode, setting, theirs, str(log)))
    process.start()
    theirs.close()
    return Child(name, mode, process, ours, log)


def child_main(name: str, mode: str, setting: Row, pipe: Connection, log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.setpgrp()
    try:
        pipe.send(("row", compile_one(name, mode, setting, pipe)))
    except Exception as error:  # noqa: BLE001 (Inductor may raise anything, and the report says what)
        pipe.send(("row", {"status": "failed", "error": words(error)}))


def compile_one(name: str, mode: str, setting: Row, pipe: Connection) -> Row:
    """Compiles, says ``ready``, waits for a word, and times; channels last for convolutions."""
    import torch

    from .ways import errors, exact, on_device, prepared

    exact()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = tune_alone(setting["lock"])
    case = CASES[name]
    model = MODELS[case.model]
    drawn = on_device(model.inputs(case.batch, seed=1), device, half=False, channels_last=False)
    plain = model.module().to(device)
    with torch.no_grad():
        expected = plain(*drawn)
        module = prepared(plain, case, device, model.convolutional)
        del plain
        inputs = on_device(drawn, device, case.half, model.convolutional)
        compiled = torch.compile(module, mode=mode)
        began = time.monotonic()
        found = errors(expected, compiled(*inputs))
        row = {
            "compile_seconds": round(time.monotonic() - began, 2),
            "errors": found,
            "tuned_alone": alone,
            "machine": {"torch": torch.__version__, "python": platform.python_version()},
        }
        del expected
        clock = GpuClock() if device == "cuda" else HostClock()
        for _ in range(5):  # CUDA graphs are recorded in these
            compiled(*inputs)
        clock.synchronize()
        if not setting["timing"]:
            return {"status": "ok", **row}
        pipe.send(("ready", row))
        pipe.recv()
        blocks = interleaved({mode: lambda: compiled(*inputs)}, clock, rounds=setting["rounds"])
    if blocks.failed:
        return {**row, "status": "failed", "error": blocks.failed[mode]}
    return {"status": "ok", **row, **blocks.rows()[mode]}


def tune_alone(lock: str) -> bool:
    """Has Inductor's benchmarks of kernels wait for those of other processes; False where it has no such place."""
    from torch._inductor.runtime import benchmarking

    benchmarker = getattr(benchmarking, "benchmarker", None)
    original = getattr(benchmarker, "benchmark_gpu", None)
    if benchmarker is None or original is None:
        return False

    here = threading.RLock()
    depth = 0

    def benchmark_gpu(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        with here, contextlib.ExitStack() as stack:
            if depth == 0:  # one benchmark may call another, and the lock is this process's already
                fcntl.flock(stack.enter_context(Path(lock).open("w")), fcntl.LOCK_EX)  # until the file is closed
            depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth -= 1

    benchmarker.benchmark_gpu = benchmark_gpu
    return True
