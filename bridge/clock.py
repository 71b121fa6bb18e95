"""Which stage a conversion is in, and how long each has taken."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from .errors import Stage


class Clock:
    """The stage under way, and seconds by stage; a stage inside another stops the outer one's clock."""

    def __init__(self, seconds: dict[str, float], tell: Callable[[Stage], None]) -> None:
        self.seconds = seconds
        self.tell = tell
        self.stage: Stage = "export"
        """The one that an error belongs to."""
        self._running: list[str] = []
        self._since = time.perf_counter()

    def enter(self, stage: Stage) -> None:
        self.stage = stage
        self.tell(stage)

    @contextlib.contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        """Books the time of the block on ``stage``."""
        self._book()
        self._running.append(stage)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now
