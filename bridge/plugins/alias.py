"""A second name for a shared library that is loaded already.

TensorRT-RTX aborts the process when it is given a plugin written in Python and ``libtensorrt_rtx.so`` cannot be found;
its wheel has the library as ``libtensorrt_rtx.so.1`` alone. A library of that name with nothing inside, which depends
on the real one, is enough for the dynamic linker, and it takes no compiler to write one.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import tempfile

_MACHINES = {"x86_64": 62, "aarch64": 183}
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_NEEDED, _HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 1, 4, 5, 6, 10, 11, 14
_READ_WRITE = 6
_HEADER, _SEGMENT, _SYMBOL = 64, 56, 24


def ensure_name(name: str, library: str) -> None:
    """Makes ``dlopen(name)`` find the loaded ``library``, where it would find nothing.

    Raises OSError where neither can be loaded.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError:
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(empty_library(name, library))
            file.flush()
            ctypes.CDLL(file.name, ctypes.RTLD_GLOBAL)  # mapped: the file itself is not needed again


def empty_library(name: str, needed: str) -> bytes:
    """A 64-bit ELF shared library called ``name`` that holds no symbol and depends on ``needed``.

    One segment is loaded: headers, symbol table (the null symbol alone), hash table, strings and the dynamic section.
    """
    import platform

    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(f"no shared library can be written for this machine ({platform.machine()})")
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    symbols = _HEADER + 3 * _SEGMENT
    hashes = symbols + _SYMBOL
    text = hashes + 16
    dynamic = (text + len(strings) + 15) // 16 * 16
    entries = (
        *((_SONAME, 1), (_NEEDED, 2 + len(name.encode()))),
        *((_HASH, hashes), (_STRTAB, text), (_SYMTAB, symbols), (_STRSZ, len(strings)), (_SYMENT, _SYMBOL), (0, 0)),
    )
    size = dynamic + 16 * len(entries)
    identity = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
    parts = [
        struct.pack("<16sHHIQQQIHHHHHH", identity, 3, machine, 1, 0, _HEADER, 0, 0, _HEADER, _SEGMENT, 3, 0, 0, 0),
        struct.pack("<IIQQQQQQ", _LOAD, _READ_WRITE, 0, 0, 0, size, size, 0x10000),
        struct.pack("<IIQQQQQQ", _DYNAMIC, _READ_WRITE, dynamic, dynamic, dynamic, size - dynamic, size - dynamic, 8),
        struct.pack("<IIQQQQQQ", _STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16),  # without it the stack becomes executable
        bytes(_SYMBOL),
        struct.pack("<4I", 1, 1, 0, 0),  # one bucket, one symbol, both empty
        strings.ljust(dynamic - text, b"\0"),
        *(struct.pack("<QQ", *entry) for entry in entries),
    ]
    return b"".join(parts)
