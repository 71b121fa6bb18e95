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
        self._given = b""

    def options(self) -> dict[str, Any]:
        """Polygraphy's option with the known timings, of which ``watched`` is told the result.

        TensorRT 8.5 takes one cache for each configuration, and adds nothing to one that a configuration has.
        """
        self._given = self._read()
        if not self._given:
            return {}
        file = tempfile.TemporaryFile()  # noqa: SIM115 - Polygraphy reads it later; an io.BytesIO it does not take
        file.write(self._given)
        return {"load_timing_cache": file}

    def watched(self, create_config: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """``create_config`` with ``options``, whose configurations are seen to have a cache."""

        def create(builder: Any, network: Any) -> Any:
            self._config = config = create_config(builder, network)
            empty = config.create_timing_cache(b"")
            there = config.get_timing_cache()
            known = _bytes(there) if there is not None else b""
            if len(known) <= len(_bytes(empty)) < len(self._given):
                self._note("is of another GPU or TensorRT, and was not used")
            if there is None:
                config.set_timing_cache(empty, False)
            return config

        return create

    def save(self) -> None:
        """Adds what the build has measured to the file. What prevents that is a note."""
        made = self._config.get_timing_cache()
        if made is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{self.path}.lock").acquire(timeout=_PATIENCE):
                there = self._read()
                if there not in (b"", self._given):  # others have written meanwhile
                    others = self._config.create_timing_cache(there)
                    if others is not None and others.combine(made, False):
                        made = others
                _write(self.path, _bytes(made))
        except (OSError, filelock.Timeout) as error:
            self._note(f"was not written: {error}")

    def _read(self) -> bytes:
        """The timings in the file; none where there is none, or it is damaged."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._note(f"cannot be read: {error.strerror}")
            return b""
        digest, data = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            self._note("is damaged, and is begun anew")
            return b""
        return data

    def _note(self, what: str) -> None:
        note = f"the timing cache {self.path} {what}"
        if note not in self.notes:
            self.notes.append(note)


def _bytes(cache: Any) -> bytes:
    return bytes(memoryview(cache.serialize()))


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
