"""What a batch shows: live on a terminal, plain lines elsewhere, and at the end a table."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from .result import STATUS_MEANING, Comparison, ConversionResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 140
"""Columns of the table where there is no terminal to ask."""


class Progress:
    """Told what a batch does; shows nothing."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def started(self, index: int, name: str) -> None:
        """The process of a model was started; its first stage is ``export``."""

    def stage(self, index: int, stage: str) -> None:
        """A model entered a stage."""

    def finished(self, index: int, result: ConversionResult) -> None:
        """A model has its result."""


class PlainProgress(Progress):
    """A line for each event: ``[3/6] mobilenet: build (4.2 s)``, the time being that since the model was started."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.running: dict[int, tuple[str, float]] = {}

    def started(self, index: int, name: str) -> None:
        self.running[index] = (name, time.monotonic())
        self._line(index, "export")

    def stage(self, index: int, stage: str) -> None:
        self._line(index, stage)

    def finished(self, index: int, result: ConversionResult) -> None:
        self._line(index, result.status if result.ok else f"failed ({result.stage})")
        del self.running[index]

    def _line(self, index: int, text: str) -> None:
        name, started = self.running[index]
        self.write(f"[{index + 1}/{self.total}] {name}: {text} ({time.monotonic() - started:.1f} s)")

    def write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more, which is no reason to give up the batch
            print(line, file=sys.stderr, flush=True)


class LiveProgress(PlainProgress):
    """The models at work in a table that keeps itself up to date; those that are finished, as lines above it."""

    def __init__(self, total: int, console: Console) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        super().__init__(total)
        self.console = console
        self.stages: dict[int, str] = {}
        self.done = 0
        self.spinner = Spinner("dots")
        self.live = Live(get_renderable=self._table, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Progress:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def started(self, index: int, name: str) -> None:
        self.stages[index] = "export"
        self.running[index] = (name, time.monotonic())

    def stage(self, index: int, stage: str) -> None:
        self.stages[index] = stage

    def finished(self, index: int, result: ConversionResult) -> None:
        super().finished(index, result)
        self.done += 1

    def write(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, title=f"{self.done} of {self.total} models", title_justify="left", pad_edge=False)
        for column in ("", "model", "stage", "elapsed"):
            table.add_column(column, justify="right" if column == "elapsed" else "left")
        for index, (name, started) in list(self.running.items()):
            elapsed = f"{time.monotonic() - started:.1f} s"
            table.add_row(self.spinner, Text(name), self.stages[index], elapsed)
        return table


def make_progress(total: int) -> Progress:
    """Live where stderr is a terminal that can move its cursor, plain lines elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(total, console)
    return PlainProgress(total)


def print_results(results: Sequence[ConversionResult], out: Path) -> None:
    """The table at the end, what its statuses mean, and under it the error of each model that failed.

    ``out`` is the folder of the run.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    table = Table("model", "status", "worst error", "task check")
    table.add_column("time", justify="right")
    styles = {"verified": "green", "built": "cyan", "rewritten": "cyan", "failed": "bold red"}
    for result in results:
        table.add_row(
            Text(result.name),
            Text(result.status if result.ok else f"failed ({result.stage})", styles[result.status]),
            worst_error(result),
            "" if result.task_check is None else "passed" if result.task_check.passed else "failed",
            f"{sum(result.seconds.values()):.1f} s",
        )
    console.print(table)

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    for status in dict.fromkeys(result.status for result in results if result.ok):
        meaning = STATUS_MEANING[status]
        say(meaning if meaning.startswith(status) else f"{status}: {meaning}", "dim")
    for result in results:
        if not result.ok:
            say(f"\n{result.name}: failed ({result.stage}), in {out / result.name}", "bold red")
            say("  " + (result.error or "no error was given").replace("\n", "\n  "))


def worst_error(result: ConversionResult) -> str:
    """The comparison that disagrees, or else has the largest absolute error: ``1.2e-05 (torch → exported)``."""

    def badness(comparison: Comparison) -> tuple[bool, float]:
        error = comparison.max_abs_error
        return not comparison.agreed, -1.0 if error is None else error

    if not result.comparisons:
        return ""
    worst = max(result.comparisons, key=badness)
    error = "no figure" if worst.max_abs_error is None else f"{worst.max_abs_error:.2g}"
    return f"{error} ({worst.reference} → {worst.candidate})"
