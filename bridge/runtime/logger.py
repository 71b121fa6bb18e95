"""The one TensorRT logger of a process: TensorRT keeps the first that it is given, whoever brings another later."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOG = logging.getLogger("bridge.tensorrt")
"""Where TensorRT's words go in a process that runs engines."""

_LEVELS = {
    "INTERNAL_ERROR": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}


@functools.cache
def trt_logger(trt: Any) -> Any:
    """The logger for TensorRT's module ``trt``: an ``ILogger`` that remembers the last errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Hands TensorRT's messages to Python's logging."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.quiet = self.errors = 0
            """How often ``silent`` is in force; how many errors there have been."""
            self._numbers = itertools.count(1)
            self._errors: deque[tuple[int, str]] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            level = _LEVELS.get(str(severity).rsplit(".", 1)[-1], logging.DEBUG)
            if level >= logging.ERROR:
                self.errors = next(self._numbers)
                self._errors.append((self.errors, message))
            if not self.quiet and LOG.isEnabledFor(level):
                LOG.log(level, "%s", message)

        def since(self, before: int) -> str:
            """What was said after so many errors, one a line."""
            return "\n".join(message for number, message in list(self._errors) if number > before)

        @contextmanager
        def silent(self) -> Iterator[None]:
            """What is said meanwhile is remembered, and not shown."""
            self.quiet += 1
            try:
                yield
            finally:
                self.quiet -= 1

    return Logger()
