"""The engine cache: what was built once is not built again.

An entry is a folder ``engines/<key>``: the engine and what else its build made (the log), the outputs of the rewritten
model in ONNX Runtime, and ``manifest.json`` with the size and digest of each file. It is made under another name and
renamed, under a lock of its key, so that it is there whole or not at all; what a killed process left is removed by the
next one. Entries are verified when they are loaded, and removed, the least recently used first, where they exceed the
limit together.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt

from .digests import both_digests, file_digest
from .errors import UsageError
from .npz import write_npz
from .workspace import ENGINE, write_text

Outputs = list[dict[str, npt.NDArray[Any]]]

LIMIT = 10 << 30
"""Bytes of all entries, unless $BRIDGE_CACHE_LIMIT says otherwise."""
OUTPUTS_LIMIT = 32 << 20
"""Larger outputs of a model (bytes) are not kept: ONNX Runtime makes them anew."""
OUTPUTS_KEPT = 4
"""Sets of inputs for which an entry keeps outputs."""
MANIFEST = "manifest.json"
_UNITS = {"": 1, **{unit: 1000**power for power, unit in enumerate("KMGT", 1)}}
_UNITS.update({f"{unit}I": 1024**power for power, unit in enumerate("KMGT", 1)})


def open_cache(cache: bool | str | Path) -> EngineCache | None:
    """What ``convert(cache=…)`` means: True the default folder, False none, a path another one. Raises UsageError."""
    if cache is False:
        return None
    if cache is not True and not (isinstance(cache, (str, Path)) and str(cache)):
        raise UsageError(f"cache: {cache!r} is neither True, False nor the path of a folder.")
    return EngineCache(None if cache is True else cache)


def default_folder() -> Path:
    """$BRIDGE_CACHE_DIR, or the user's own cache folder. Raises UsageError where that is unknown."""
    given = os.environ.get("BRIDGE_CACHE_DIR")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "torch-tensorrt-bridge"
    except RuntimeError as error:
        raise UsageError("cache: this user has no home folder; set $BRIDGE_CACHE_DIR, or give cache=False.") from error


def read_size(text: str) -> int:
    """Bytes of ``20GiB``, ``500 MB`` or ``1000000``. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size; write bytes, or such as 20GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _default_limit() -> int:
    text = os.environ.get("BRIDGE_CACHE_LIMIT")
    try:
        return read_size(text) if text else LIMIT
    except ValueError as error:
        raise UsageError(f"$BRIDGE_CACHE_LIMIT: {error}.") from error


class Damaged(Exception):
    """An entry is not what was stored."""


@dataclass(frozen=True)
class Entry:
    """What the manifest of an entry says."""

    folder: Path
    name: str
    """Of the model."""
    target: str
    built: str
    """When, in UTC and ISO 8601."""
    engine_sha256: str
    outcome: dict[str, Any]
    """The fields of the BuildOutcome."""
    files: dict[str, dict[str, Any]]
    """By name: size and digest (``digests.file_digest``)."""
    used: float = 0.0
    """When last, in seconds since the epoch."""

    @property
    def size(self) -> int:
        return sum(file["size"] for file in self.files.values())

    def verify(self, name: str, path: Path) -> None:
        """Raises Damaged where ``path`` is not what was stored as ``name``, and OSError where it cannot be read."""
        size = path.stat().st_size
        if size != self.files[name]["size"]:
            raise Damaged(f"{name} has {size} bytes, not {self.files[name]['size']}")
        if file_digest(path)[1] != self.files[name]["digest"]:
            raise Damaged(f"{name} has other bytes")


class EngineCache:
    """Engines in a folder, by key; ``limit`` in bytes. Raises OSError where the folder cannot be read or written."""

    def __init__(self, folder: str | Path | None = None, limit: int | None = None) -> None:
        self.folder = (Path(folder).expanduser() if folder is not None else default_folder()).absolute()
        self.limit = limit if limit is not None else _default_limit()
        self.notes: list[str] = []
        """What the user should know; the conversion takes them over."""

    # --- one entry ---

    @contextlib.contextmanager
    def locked(self, key: str, timeout: float | None = None) -> Iterator[None]:
        """Keeps other processes from this key. Raises filelock.Timeout after ``timeout`` seconds of waiting."""
        lock = self._lock(key)
        lock.acquire(timeout=-1 if timeout is None else timeout, poll_interval=0.02)
        try:
            yield
        finally:
            lock.release()

    def _lock(self, key: str) -> filelock.BaseFileLock:
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self.folder / "locks" / f"{key}.lock", thread_local=False)

    def find(self, key: str) -> Entry | None:
        """The entry; None where there is none, or a damaged one, which is removed."""
        folder = self.folder / "engines" / key
        try:
            return _read_entry(folder)
        except FileNotFoundError:
            if folder.is_dir():
                self.damaged(key, f"{MANIFEST} is missing")
            return None
        except Damaged as error:
            self.damaged(key, str(error))
            return None

    def take(self, entry: Entry, files: Mapping[str, Path]) -> None:
        """Puts the entry's files, by name, where they are to be. Raises Damaged where one is not what was stored."""
        for name, path in files.items():
            if name in entry.files:
                try:
                    _link(entry.folder / name, path)
                except FileNotFoundError as error:
                    raise Damaged(f"{name} is missing") from error
                entry.verify(name, path)
        with contextlib.suppress(OSError):  # a cache that can only be read is of use too
            os.utime(entry.folder)

    def put(self, key: str, files: Mapping[str, Path], name: str, target: str, outcome: Mapping[str, Any]) -> str:
        """Stores what was built, as far as it is there; returns the engine's SHA-256. The caller has the key's lock."""
        size, digest, sha256 = both_digests(files[ENGINE])
        if size > self.limit:
            self.notes.append(
                f"the engine was not kept: its {size_words(size)} are more than the cache's limit of "
                f"{size_words(self.limit)} ($BRIDGE_CACHE_LIMIT)"
            )
            return sha256
        waiting = self._temporary(key)
        try:
            _link(files[ENGINE], waiting / ENGINE)
            described: dict[str, dict[str, Any]] = {ENGINE: {"size": size, "digest": digest}}
            for other, path in files.items():
                if other != ENGINE and path.exists():
                    shutil.copyfile(path, waiting / other)
                    described[other] = dict(zip(("size", "digest"), file_digest(waiting / other), strict=True))
            for file in waiting.iterdir():
                file.chmod(0o444)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            entry = Entry(self.folder / "engines" / key, name, target, now, sha256, dict(outcome), described)
            _write_manifest(waiting, entry)
            self._remove(key)
            entry.folder.parent.mkdir(parents=True, exist_ok=True)
            waiting.rename(entry.folder)
        finally:
            shutil.rmtree(waiting, ignore_errors=True)
        self.prune(keep=key)
        return sha256

    def damaged(self, key: str, why: str) -> None:
        """Removes an entry that is not what was stored, and notes it."""
        self.notes.append(f"a cached engine was damaged and is built anew: {why}")
        with contextlib.suppress(OSError):  # of a cache that can only be read
            self._remove(key)

    # --- outputs of the rewritten model ---

    def outputs(self, entry: Entry, feeds: str) -> Outputs | None:
        """What the rewritten model computed from these inputs; None where that is not known, or damaged."""
        name = _outputs_name(feeds)
        if name not in entry.files:
            return None
        try:
            entry.verify(name, entry.folder / name)
            return _read_outputs(entry.folder / name)
        except (Damaged, FileNotFoundError, ValueError, KeyError) as error:
            self.notes.append(f"cached outputs of the rewritten model were damaged and are made anew: {error}")
            return None

    def put_outputs(self, key: str, feeds: str, outputs: Outputs) -> None:
        """Adds them to the entry, if there is one and they are small. The caller holds the key's lock."""
        if sum(array.nbytes for case in outputs for array in case.values()) > OUTPUTS_LIMIT:
            return
        entry = self.find(key)
        if entry is None:
            return
        name, waiting = _outputs_name(feeds), self._temporary(key)
        try:
            _write_outputs(waiting / name, outputs)
            described = dict(zip(("size", "digest"), file_digest(waiting / name), strict=True))
            (waiting / name).chmod(0o444)
            (waiting / name).replace(entry.folder / name)
        finally:
            shutil.rmtree(waiting, ignore_errors=True)
        kept = {other: file for other, file in entry.files.items() if other != name}
        older = [other for other in kept if other.startswith(_OUTPUTS)][: -OUTPUTS_KEPT + 1]
        entry.files.clear()
        entry.files.update({other: file for other, file in kept.items() if other not in older}, **{name: described})
        _write_manifest(entry.folder, entry)
        for other in older:
            (entry.folder / other).unlink(missing_ok=True)

    # --- all entries ---

    def entries(self) -> list[Entry]:
        """The least recently used first; those that cannot be read are left out."""
        found = []
        for folder in self._folders("engines"):
            with contextlib.suppress(Damaged, FileNotFoundError):
                found.append(_read_entry(folder))
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, keep: str = "") -> None:
        """Removes entries until the limit is kept, and what killed processes left; none that another process uses."""
        entries = self.entries()
        total = sum(entry.size for entry in entries)
        for entry in entries:
            if total <= self.limit:
                break
            if entry.folder.name != keep and self._remove_unused(entry.folder.name):
                total -= entry.size
        for folder in self._folders("partial"):
            key = folder.name.partition("-")[0]
            if key != keep:
                with contextlib.suppress(filelock.Timeout), self.locked(key, 0):
                    shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> int:
        """Removes all entries that no other process uses, and the timing caches; returns how many entries."""
        removed = sum(self._remove_unused(folder.name) for folder in self._folders("engines"))
        self.prune()
        shutil.rmtree(self.folder / "timing", ignore_errors=True)
        return removed

    def _folders(self, name: str) -> list[Path]:
        try:
            return sorted((self.folder / name).iterdir())
        except FileNotFoundError:
            return []

    def _remove_unused(self, key: str) -> bool:
        try:
            with self.locked(key, 0):
                self._remove(key)
                (self.folder / "locks" / f"{key}.lock").unlink(missing_ok=True)
        except filelock.Timeout:
            return False
        return True

    def _remove(self, key: str) -> None:
        """Takes the entry away whole: at no time does another process see half of it."""
        aside = self._temporary(key)
        try:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / "engines" / key).rename(aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _temporary(self, key: str) -> Path:
        folder = self.folder / "partial" / f"{key}-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        return folder

    def timing_file(self, name: str) -> Path:
        """Where timings of kernels are kept, by the TensorRT and GPU that they were taken with."""
        return self.folder / "timing" / (re.sub(r"[^\w.]+", "-", name).strip("-") + ".cache")


def size_words(size: float) -> str:
    """With three digits, so that sizes on both sides of a unit's end can be compared."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 999.5 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


def as_text(cache: EngineCache) -> str:
    """A line for each entry, and the sum."""
    entries = cache.entries()
    lines = [
        f"{size_words(entry.size):>10}  used {_ago(entry.used):15}  {entry.name} for {entry.target}"
        for entry in entries
    ]
    total, limit = size_words(sum(entry.size for entry in entries)), size_words(cache.limit)
    count = f"{len(entries)} engine{'' if len(entries) == 1 else 's'}"
    return "\n".join([*lines, f"{cache.folder}: {count}, {total} of at most {limit}"])


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


_FICLONE = 0x40049409
"""Linux's request to let a file share another's blocks until one of them is written to."""


def _link(source: Path, path: Path) -> None:
    """Makes ``path`` the same file: by sharing blocks, else as a hard link, else as a copy."""
    import fcntl

    path.unlink(missing_ok=True)
    try:
        with source.open("rb") as old, path.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return
    except FileNotFoundError:
        raise
    except OSError:  # most file systems cannot
        path.unlink(missing_ok=True)
    try:
        path.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(source, path)


def _read_entry(folder: Path) -> Entry:
    """Raises FileNotFoundError where there is no entry, and Damaged where it cannot be understood."""
    text = (folder / MANIFEST).read_bytes()
    try:
        entry = Entry(folder, **json.loads(text), used=folder.stat().st_mtime)
        if entry.files[ENGINE]["size"] and all(file["digest"] for file in entry.files.values()):
            return entry
    except (ValueError, TypeError, KeyError):
        pass  # told below
    raise Damaged(f"{MANIFEST} cannot be understood")


def _write_manifest(folder: Path, entry: Entry) -> None:
    values = {key: value for key, value in asdict(entry).items() if key not in ("folder", "used")}
    write_text(folder / MANIFEST, json.dumps(values, indent=1) + "\n")


# --- outputs as a file -------------------------------------------------------------------------------------------

_OUTPUTS = "outputs-"


def _outputs_name(feeds: str) -> str:
    return f"{_OUTPUTS}{feeds[:32]}.npz"


def _write_outputs(path: Path, outputs: Outputs) -> None:
    """As bytes with their types beside them: NumPy's own format has no bfloat16."""
    described: list[list[tuple[str, str, Sequence[int]]]] = []
    arrays: dict[str, npt.NDArray[Any]] = {}
    for case in outputs:
        described.append([(name, array.dtype.name, array.shape) for name, array in case.items()])
        for array in case.values():
            arrays[f"a{len(arrays)}"] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    write_npz(path, {"described": np.frombuffer(json.dumps(described).encode(), np.uint8), **arrays})


def _read_outputs(path: Path) -> Outputs:
    import ml_dtypes

    def dtype(name: str) -> np.dtype[Any]:
        return np.dtype(getattr(ml_dtypes, name, name))

    with np.load(path, allow_pickle=False) as file:
        cases = json.loads(file["described"].tobytes())
        arrays = (file[f"a{index}"] for index in range(sum(map(len, cases))))
        return [{name: next(arrays).view(dtype(kind)).reshape(shape) for name, kind, shape in case} for case in cases]
