"""Many models, each in its own process: one that fails, crashes or hangs costs itself, and the others go on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote

from . import worker
from .errors import BridgeError, Stage, UsageError
from .progress import Progress
from .result import ConversionResult
from .spec import by_precision
from .trade_off import trade_offs
from .workspace import ENGINE, EXPORTED, OUTPUT_FILES, PARTIAL, RESULT, REWRITTEN, TRADE_OFF, write_text

if TYPE_CHECKING:
    from .spec import ModelSpec

SUMMARY, INDEX, REPORT = "summary.json", "index.html", "report.html"

_TICK = 0.1
"""Seconds between two looks at the children."""
_PACKAGES = (
    *("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "onnx-graphsurgeon", "polygraphy"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
)


class BatchError(BridgeError):
    """Files of the run could not be written. ``results`` holds what was found nevertheless."""

    def __init__(self, message: str, results: list[ConversionResult]) -> None:
        super().__init__(message)
        self.results = results


class BatchInterrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP. ``results`` holds the models that were finished; the others have left no file."""

    def __init__(self, message: str, results: list[ConversionResult]) -> None:
        super().__init__(message)
        self.results = results


def run_batch(
    specs: Sequence[ModelSpec],
    out: Path,
    *,
    progress: Progress | None = None,
    jobs: int = 1,
    command: Sequence[str] = (),
) -> list[ConversionResult]:
    """Converts each model into ``out/NAME`` (with several precisions, ``out/NAME-PRECISION`` for each), and writes
    ``summary.json`` and ``index.html`` of them all into ``out``, and the trade-off of precisions.

    A failure is a result with ``status == "failed"``; its ``exception`` is a UsageError where the model was wrongly
    described. ``command`` is noted in the summary. Raises UsageError where ``out`` cannot be used, BatchError where a
    file of the run cannot be written, and BatchInterrupted.
    """
    models, specs = specs, [one for spec in specs for one in by_precision(spec).values() or [spec]]
    twice = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if twice:
        raise UsageError(f"two models would be in the folder {twice[0]!r}; give one of them another name")
    for spec in specs:
        if spec.source.endswith(".onnx"):
            from .settings import check_kept  # loads onnx, which only such a source needs

            check_kept(Path(spec.source), out / spec.name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (SUMMARY, INDEX, *(f"{spec.name}.{TRADE_OFF}" for spec in models)):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {out} cannot be used: {error.strerror}; choose another with -o") from error
    return _Batch(models, specs, out.absolute(), progress or Progress(), jobs, command).run()


class _Batch:
    def __init__(
        self,
        models: Sequence[ModelSpec],
        specs: Sequence[ModelSpec],
        out: Path,
        progress: Progress,
        jobs: int,
        command: Sequence[str],
    ) -> None:
        self.models = models
        self.specs = specs
        """Of each precision of each model."""
        self.out = out
        self.progress = progress
        self.jobs = jobs
        self.command = command
        self.started = datetime.now(timezone.utc)
        self.clock = time.monotonic()
        self.running: dict[int, worker.Worker] = {}
        self.found: dict[int, ConversionResult] = {}
        self.unwritten: dict[str, list[Path]] = {}
        """The files that could not be written, by the reason."""

    @property
    def results(self) -> list[ConversionResult]:
        return [self.found[index] for index in sorted(self.found)]

    def run(self) -> list[ConversionResult]:
        waiting = list(range(len(self.specs)))
        stopped: list[str] = []
        with _until_interrupted() as interrupted, self.progress:
            try:
                while (waiting or self.running) and not interrupted:
                    while waiting and len(self.running) < self.jobs:
                        self._start(waiting.pop(0))
                    time.sleep(_TICK)
                    for index in list(self.running):
                        self._look_at(index)
            finally:
                for index, child in self.running.items():
                    stopped.append(self.specs[index].name)
                    child.stop()
                    _discard(self._folder(index))
            self._write_summary()
            for made in trade_offs(self.models, self.results):
                self._write(self.out / f"{made.name}.{TRADE_OFF}", made.to_json)
            self._write(self.out / INDEX, self._index)
        if interrupted and len(self.found) < len(self.specs):
            at_work = f" in the middle of {' and '.join(stopped)}" if stopped else ""
            message = f"interrupted{at_work}: {len(self.found)} of {len(self.specs)} models have a result"
            raise BatchInterrupted(message, self.results)
        if self.unwritten:
            message = "; ".join(f"cannot write {_listed(files)}: {why}" for why, files in self.unwritten.items())
            raise BatchError(message, self.results)
        return self.results

    def _folder(self, index: int) -> Path:
        return self.out / self.specs[index].name

    def _start(self, index: int) -> None:
        self.progress.started(index, self.specs[index].name)
        folder = self._folder(index)
        try:
            folder.mkdir(exist_ok=True)
            _clear(folder)
            self.running[index] = worker.Worker(self.specs[index], folder, worker.COMMAND)
        except OSError as error:
            self._finish(index, self._failed(index, f"cannot start in {folder}: {error}"))

    def _look_at(self, index: int) -> None:
        child, limit = self.running[index], self.specs[index].timeout
        for stage in child.read_events():
            self.progress.stage(index, stage)
        if child.ended:
            result = self._outcome(index, child.wait())
        elif limit is not None and child.elapsed > limit:
            child.stop()
            way_out = f"give it a longer one; what it printed is in {worker.LOG}"
            result = self._failed(index, f"stopped after its timeout of {limit:g} s, in {child.stage!r}; {way_out}")
        else:
            return
        _remove_partial(self._folder(index))
        del self.running[index]
        self._finish(index, result)

    def _outcome(self, index: int, status: int) -> ConversionResult:
        last = self.running[index].last
        if last is None:
            return self._failed(index, f"{_death(status)}; what it printed before is in {worker.LOG}")
        if last["event"] == "failed":
            return self._failed(index, last["error"], last["stage"], usage=last["usage"])
        path = self._folder(index) / RESULT
        try:
            return ConversionResult.load(path)
        except (OSError, ValueError) as error:
            return self._failed(index, f"the conversion left no {RESULT} that can be read: {error}")

    def _failed(self, index: int, error: str, stage: str | None = None, usage: bool = False) -> ConversionResult:
        """The result of a model whose process could not write one."""
        spec, folder, child = self.specs[index], self._folder(index), self.running.get(index)
        stage = stage or (child.stage if child else "export")
        exported, onnx, engine = (
            path if path.is_file() else None for path in (folder / name for name in (EXPORTED, REWRITTEN, ENGINE))
        )
        result = ConversionResult(spec.name, error=error, source=spec.source)
        result.exported_onnx, result.onnx, result.engine = exported, onnx, engine
        result.stage = next((known for known in get_args(Stage) if known == stage), "export")
        result.precision = spec.precision or result.precision
        result.seconds = child.stages if child else {}
        result.exception = UsageError(error) if usage else BridgeError(error, result.stage)
        self._write(folder / RESULT, lambda: result.to_json(folder))
        return result

    def _finish(self, index: int, result: ConversionResult) -> None:
        self.found[index] = result
        self._write(self._folder(index) / REPORT, lambda: _report(result))
        self._write_summary()
        self.progress.finished(index, result)

    def _write_summary(self) -> None:
        """Kept true after every model, so that a batch which is killed leaves what it had found."""
        summary = {
            "models": [result.to_dict(self.out) for result in self.results],
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.clock, 3),
            "command": list(self.command),
            "versions": versions(),
        }
        self._write(self.out / SUMMARY, lambda: json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _index(self) -> str:
        from .report import render_index

        names = [result.name for result in self.results]
        links = {name: quote(f"{name}/{REPORT}") for name in names if (self.out / name / REPORT).is_file()}
        return render_index(self.results, links=links, trade_offs=trade_offs(self.models, self.results))

    def _write(self, path: Path, text: Any) -> None:
        """Writes ``text()``; a file that cannot be written is told of at the end, and costs no model its result."""
        try:
            write_text(path, text())
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception as error:  # noqa: BLE001 - a page that cannot be made must not cost the results
            reason = worker.describe(error)
        else:
            return
        files = self.unwritten.setdefault(reason, [])
        if path not in files:
            files.append(path)


@contextlib.contextmanager
def _until_interrupted() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C. Nothing is broken off by itself, so that no clean-up is interrupted either."""
    interrupted: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                before[number] = signal.signal(number, lambda received, _: interrupted.append(received))
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clear(folder: Path) -> None:
    """Removes what an earlier run left, lest it pass for this one's."""
    for name in OUTPUT_FILES:
        (folder / name).unlink(missing_ok=True)
    _remove_partial(folder)


def _discard(folder: Path) -> None:
    """Leaves nothing of a model that was interrupted."""
    with contextlib.suppress(OSError):
        _clear(folder)
        folder.rmdir()  # declines where the user has put something there


def _remove_partial(folder: Path) -> None:
    for _ in range(20):
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        if not (folder / PARTIAL).exists():
            return
        time.sleep(0.05)  # a builder that has just been killed may still be putting its last file there


def _death(status: int) -> str:
    if status >= 0:
        return f"the process ended by itself with exit status {status}"
    try:
        number = signal.Signals(-status)
    except ValueError:
        return f"the process was killed by signal {-status}"
    hint = ", as the system does when memory runs out" if number is signal.SIGKILL else ""
    return f"the process was killed by {number.name} ({signal.strsignal(number)}){hint}"


def _report(result: ConversionResult) -> str:
    from .report import render_report

    return render_report(result)


def _listed(files: Sequence[Path]) -> str:
    shown = ", ".join(str(file) for file in files[:4])
    return shown + (f" and {len(files) - 4} more" if len(files) > 4 else "")


def versions() -> dict[str, str]:
    """Of Python and of the packages here that a conversion depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
