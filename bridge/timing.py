"""TensorRT's timing cache: what the builder has measured of kernels, kept for the next build on the same kind of GPU.

Polygraphy writes such a file in place, so a process that is killed leaves half of it behind. Here the file begins with
its own SHA-256, and is written under another name and renamed; what others have added meanwhile is merged in.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

_DIGEST = hashlib.sha256().digest_size
_PATIENCE = 60.0
"""Seconds to wait for another process that writes: it takes that one milliseconds."""


class TimingCache:
    """The timings of one build; ``path`` is where they come from and go to. Used in the builder's process alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self._config: Any = None
        self._known: Any = None
        """TensorRT reads it until the engine is built."""

    def into(self, create_config: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """``create_config`` of a builder and network, the known timings added to what it makes."""

        def create(builder: Any, network: Any) -> Any:
            self._config = create_config(builder, network)
            self._known = self._read()
            if self._known is not None and not self._add(self._known):
                self._note("is of another GPU or TensorRT, and was not used")
            return self._config

        return create

    def save(self) -> None:
        """Adds what the build has measured to the file. What prevents that is a note."""
        made = self._config.get_timing_cache()
        if made is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{self.path}.lock").acquire(timeout=_PATIENCE):
                others = self._read()
                if others is not None:
                    made.combine(others, False)
                _write(self.path, bytes(memoryview(made.serialize())))
        except (OSError, filelock.Timeout) as error:
            self._note(f"was not written: {error}")

    def _add(self, known: Any) -> bool:
        """Whether TensorRT takes what is known. Polygraphy's configurations have a cache, which TensorRT 8.5 does not
        replace by another: what is known is put into it."""
        there = self._config.get_timing_cache()
        taken = there.combine(known, False) if there is not None else self._config.set_timing_cache(known, False)
        return bool(taken)

    def _read(self) -> Any:
        """The timings of the file; None where there is none, or it is damaged."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note(f"cannot be read: {error.strerror}")
            return None
        digest, data = content[:_DIGEST], content[_DIGEST:]
        known = self._config.create_timing_cache(data) if hashlib.sha256(data).digest() == digest else None
        if known is None:
            self._note("is damaged, and is begun anew")
        return known

    def _note(self, what: str) -> None:
        note = f"the timing cache {self.path} {what}"
        if note not in self.notes:
            self.notes.append(note)


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    for left in path.parent.glob(f"{path.name}.*.partial"):  # by a killed process: the lock keeps all others out
        left.unlink(missing_ok=True)
