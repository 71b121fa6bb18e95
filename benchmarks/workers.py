"""Work done in processes that may crash or hang: each costs the task that it was at, and another takes its place."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Say = Callable[[str], None]
Work = Callable[[Any, Say], Row]
"""Does a task; ``say`` names the step that it is at, so that it is known where a process ended."""


def serve(make: Callable[[Any], Work], setting: Any, pipe: Connection, log: str) -> None:
    """In a worker: does what comes through ``pipe`` until it is closed. What is printed goes to the file ``log``."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.setpgrp()  # so that what it starts ends with it
    faulthandler.enable()
    work = make(setting)
    pipe.send(("ready", None))
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(("row", work(task, lambda step: pipe.send(("step", step)))))


def onnx_runtime_threads(number: int) -> None:
    """So many in each of ONNX Runtime's sessions from now on, rather than one for each core in every worker."""
    import onnxruntime

    original = onnxruntime.SessionOptions

    def session_options() -> Any:
        options = original()
        options.intra_op_num_threads = number
        return options

    onnxruntime.SessionOptions = session_options


def end_group(process: Any) -> None:
    """Ends a process that made itself the head of a group, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # not yet a group of its own, or gone
        process.kill()
    process.join()


@dataclass
class Worker:
    process: Any
    pipe: Connection
    log: Path
    ready: bool = False
    task: Any = None
    step: str = "start"
    began: float = 0.0
    done: int = 0

    def late(self, seconds: float, start_seconds: float) -> bool:
        took = time.monotonic() - self.began
        return took > start_seconds if not self.ready else self.task is not None and took > seconds

    def stop(self) -> None:
        end_group(self.process)
        self.pipe.close()

    def tail(self, size: int = 2000) -> str:
        return self.log.read_text(errors="replace")[-size:] if self.log.is_file() else ""


@dataclass
class Pool:
    """``jobs`` processes that share a queue of tasks."""

    make: Callable[[Any], Work]
    """Makes, in a worker, what does the tasks; named at the top of a module, since workers are spawned."""
    setting: Any
    jobs: int
    seconds: float
    """That a task may take."""
    logs: Path
    start_seconds: float = 180.0
    """That a worker may take until it is ready."""
    tasks_each: int | None = None
    """After so many tasks a worker is replaced."""
    workers: list[Worker] = field(default_factory=list)
    started: int = 0

    def run(self, tasks: Iterable[Any], deadline: float, report: Callable[[Any, Row], None]) -> list[Any]:
        """Gives ``report`` the row of each task; returns those not reached when ``time.monotonic()`` is ``deadline``.

        The row of a task that did not end well has ``status`` crashed or timeout, its ``step``, and its ``error``.
        """
        queue = deque(tasks)
        self.logs.mkdir(parents=True, exist_ok=True)
        failed_starts = 0
        try:
            while queue or any(worker.task is not None for worker in self.workers):
                now = time.monotonic()
                if now >= deadline or failed_starts > self.jobs + 1:
                    break
                busy = sum(worker.task is not None for worker in self.workers)
                while len(self.workers) < min(self.jobs, len(queue) + busy):
                    self._start()
                failed_starts += self._listen(queue, min(1.0, deadline - now), report)
            under_way = [worker.task for worker in self.workers if worker.task is not None]
            return under_way + list(queue)
        finally:
            for worker in self.workers:
                worker.stop()
            self.workers.clear()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        log = self.logs / f"worker-{self.started}.log"
        self.started += 1
        process = context.Process(target=serve, args=(self.make, self.setting, theirs, str(log)), daemon=False)
        process.start()
        theirs.close()
        self.workers.append(Worker(process, ours, log, began=time.monotonic()))

    def _listen(self, queue: deque[Any], patience: float, report: Callable[[Any, Row], None]) -> int:
        """Takes what workers say, hands out tasks, and replaces the dead; returns how many did not start."""
        failed = 0
        said = set(wait([worker.pipe for worker in self.workers], patience))
        for worker in list(self.workers):
            if worker.pipe in said:
                failed += self._hear(worker, report)
            elif worker.late(self.seconds, self.start_seconds):
                failed += self._lose(worker, report, "timeout")
        for worker in self.workers:
            if worker.ready and worker.task is None and queue:
                task = queue.popleft()
                try:
                    worker.pipe.send(task)
                except (BrokenPipeError, OSError):  # it died idle: seen at the next turn
                    queue.appendleft(task)
                    continue
                worker.task, worker.step, worker.began = task, "begin", time.monotonic()
        return failed

    def _hear(self, worker: Worker, report: Callable[[Any, Row], None]) -> int:
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            return self._lose(worker, report, "crashed")
        if kind == "ready":
            worker.ready = True
        elif kind == "step":
            worker.step = value
        else:
            task, worker.task = worker.task, None
            worker.done += 1
            spent = value.pop("replace_worker", False) or worker.done == self.tasks_each
            report(task, {"seconds": round(time.monotonic() - worker.began, 2), **value})
            if spent:
                self.workers.remove(worker)
                worker.stop()
        return 0

    def _lose(self, worker: Worker, report: Callable[[Any, Row], None], status: str) -> int:
        """A worker that is dead or too slow: its task's row says so. Returns 1 where it never became ready."""
        self.workers.remove(worker)
        if status == "crashed":
            worker.process.join(5)
        code = worker.process.exitcode
        worker.stop()
        took = time.monotonic() - worker.began
        why = f"no result within {self.seconds:g} s" if status == "timeout" else f"process ended with status {code}"
        if worker.task is not None:
            row = {"status": status, "step": worker.step, "error": f"{why}\n{worker.tail()}", "seconds": round(took, 2)}
            report(worker.task, row)
        elif not worker.ready:
            print(f"a worker did not start ({why}):\n{worker.tail()}", file=sys.stderr, flush=True)
            return 1
        return 0
