"""Digests of large files, each byte hashed once and on every core; what hashes lets other threads run meanwhile.

SHA-256 says what a thing is. Whether a file is still as it was written, in a folder of the user's own, XXH3 tells in a
fifth of the time; it is no defence against somebody who means to deceive.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import xxhash

PIECE = 4 << 20
"""Bytes that one thread hashes at a time."""
_BUFFER = 256 << 10
"""Bytes that are read at a time: as much as stays in a core's own cache."""


class Region(NamedTuple):
    """A part of a file, or bytes that are in memory."""

    source: Path | bytes
    offset: int
    length: int

    def pieces(self) -> list[Region]:
        starts = range(0, max(1, self.length), PIECE)
        return [Region(self.source, self.offset + at, min(PIECE, self.length - at)) for at in starts]


class Hash(Protocol):
    """What hashlib makes, and xxhash."""

    def update(self, data: memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


def region_digests(regions: Sequence[Region], make: Callable[..., Hash] = hashlib.sha256) -> list[bytes]:
    """Of each region, the digest of its pieces' digests. Raises OSError, also where a file ends too early."""
    pieces = [region.pieces() for region in regions]
    flat = iter(_hashed([piece for group in pieces for piece in group], make))
    return [make(b"".join(next(flat) for _ in group)).digest() for group in pieces]


def file_digest(path: Path) -> tuple[int, str]:
    """The size of a file, and the XXH3 of its pieces' XXH3s, on every core. Raises OSError."""
    size = path.stat().st_size
    return size, region_digests([Region(path, 0, size)], xxhash.xxh3_128)[0].hex()


def sha256(path: Path) -> str:
    """The plain SHA-256 of a file, on one core. Raises OSError."""
    return _hash(Region(path, 0, path.stat().st_size), hashlib.sha256).hex()


def both_digests(path: Path) -> tuple[int, str, str]:
    """``file_digest`` and ``sha256`` at the same time."""
    with ThreadPoolExecutor(1) as pool:
        plain = pool.submit(sha256, path)
        return *file_digest(path), plain.result()


def _hashed(pieces: Sequence[Region], make: Callable[..., Hash]) -> list[bytes]:
    """The digest of each piece; neighbours share a task, so that many small tensors do not cost a task each."""
    if sum(piece.length for piece in pieces) <= PIECE:
        return _hash_all(pieces, make)
    tasks: list[list[Region]] = [[]]
    room = PIECE
    for piece in pieces:
        if piece.length > room:
            tasks.append([])
            room = PIECE
        tasks[-1].append(piece)
        room -= piece.length
    with ThreadPoolExecutor(_cores()) as pool:
        return [digest for found in pool.map(_hash_all, tasks, itertools.repeat(make)) for digest in found]


def _hash_all(pieces: Iterable[Region], make: Callable[..., Hash]) -> list[bytes]:
    return [_hash(piece, make) for piece in pieces]


def _hash(piece: Region, make: Callable[..., Hash]) -> bytes:
    if isinstance(piece.source, bytes):
        return make(memoryview(piece.source)[piece.offset : piece.offset + piece.length]).digest()
    digest, at, end = make(), piece.offset, piece.offset + piece.length
    buffer = memoryview(bytearray(min(_BUFFER, max(1, piece.length))))
    handle = os.open(piece.source, os.O_RDONLY)
    try:
        while at < end:
            read = os.preadv(handle, [buffer[: min(len(buffer), end - at)]], at)
            if not read:
                raise OSError(f"{piece.source} has become shorter while it was read")
            digest.update(buffer[:read])
            at += read
    finally:
        os.close(handle)
    return digest.digest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
