"""Arrays in an ``.npz`` file with a ``.json`` manifest beside it, of which neither can be cut or changed unnoticed.

The manifest has the SHA-256 of the arrays' file and, under ``sha256``, its own; that finds damage and mixed-up files,
and is no signature. ``npz`` has neither bfloat16 nor other types of ml_dtypes: these are stored as integers of their
size.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..digests import sha256
from ..errors import BridgeError, Stage, UsageError
from ..inputs import Array
from ..npz import write_npz
from ..workspace import replacing, write_text

SCHEMA = 1

Groups = Mapping[str, Mapping[str, Array]]
"""The tensors of one case by name, in groups: ``inputs``, and the outputs of each stage."""


class EvidenceError(BridgeError):
    """Evidence that is cut short, was changed, or belongs to other files."""

    stage: Stage = "compare"


@dataclass(frozen=True)
class Bundle:
    """What ``write_bundle`` wrote."""

    facts: dict[str, Any]
    cases: list[tuple[str, dict[str, dict[str, Array]]]]
    """Name and tensors of each."""
    digest: str
    """Of the manifest, and so of everything."""

    def tensors(self, group: str) -> list[dict[str, Array]]:
        """Of each case."""
        return [groups[group] for _, groups in self.cases]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.cases]

    @property
    def groups(self) -> list[str]:
        return list(self.cases[0][1])


def write_bundle(
    manifest: Path, arrays: Path, kind: str, facts: Mapping[str, Any], cases: Sequence[tuple[str, Groups]]
) -> None:
    """Writes both files whole, the manifest last. Raises OSError, and leaves nothing half-written."""
    stored: dict[str, Array] = {}
    described = []
    for name, groups in cases:
        tensors = {
            group: {key: _store(stored, array) for key, array in members.items()} for group, members in groups.items()
        }
        described.append({"name": name, "tensors": tensors})
    with replacing(arrays) as temporary:
        write_npz(temporary, stored)
        content: dict[str, Any] = {"schema": SCHEMA, "kind": kind, **facts}
        content |= {"arrays": {"file": arrays.name, "sha256": sha256(temporary)}, "cases": described}
        text = json.dumps({**content, "sha256": _digest(content)}, indent=1, allow_nan=False) + "\n"
        manifest.unlink(missing_ok=True)  # it would not fit the new arrays
    write_text(manifest, text)


def read_bundle(manifest: Path, kind: str) -> Bundle:
    """Reads what ``write_bundle`` wrote as this ``kind``.

    Raises UsageError where there is no such file, and EvidenceError where it or its arrays were cut short or changed.
    """
    content = _read_manifest(manifest, kind)
    arrays = manifest.parent / str(content["arrays"]["file"])
    if arrays.parent != manifest.parent or not arrays.is_file():
        raise EvidenceError(f"{manifest}: its arrays, {arrays.name}, are not there; copy both files.")
    if sha256(arrays) != content["arrays"]["sha256"]:
        raise EvidenceError(
            f"{arrays}: its checksum is not the one in {manifest.name}: it was cut short or changed, or is of another "
            "conversion. Copy both files again."
        )
    try:
        with np.load(arrays, allow_pickle=False) as file:
            cases = [
                (case["name"], {group: _load_all(file, members) for group, members in case["tensors"].items()})
                for case in content["cases"]
            ]
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise EvidenceError(f"{arrays}: does not hold what {manifest.name} says: {error}.") from error
    facts = {key: value for key, value in content.items() if key not in ("cases", "arrays", "sha256")}
    return Bundle(facts, cases, content["sha256"])


def _read_manifest(path: Path, kind: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file.") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise EvidenceError(f"{path}: was cut short or changed: {error}. Copy it again.") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise EvidenceError(f"{path}: is no manifest of kind {kind!r}.")
    if content.get("schema") != SCHEMA:
        raise EvidenceError(f"{path}: has schema {content.get('schema')!r}; this version reads schema {SCHEMA}.")
    if content.get("sha256") != _digest({key: value for key, value in content.items() if key != "sha256"}):
        raise EvidenceError(
            f"{path}: its checksum is not its own: it was cut short or changed. Copy it again; other tolerances are "
            "given with --tolerance."
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _store(stored: dict[str, Array], array: Array) -> dict[str, Any]:
    key = f"a{len(stored)}"
    foreign = array.dtype.isbuiltin == 2  # registered with NumPy by ml_dtypes
    if array.dtype.kind in "OUSmM":
        raise UsageError(f"an array of {array.dtype} cannot be kept as evidence: tensors hold numbers.")
    stored[key] = array.view(f"u{array.dtype.itemsize}") if foreign else array
    return {"array": key, "dtype": array.dtype.name, "shape": list(array.shape)}


def _load_all(file: Mapping[str, Array], members: Mapping[str, Mapping[str, Any]]) -> dict[str, Array]:
    import ml_dtypes

    found = {}
    for name, info in members.items():
        array = file[info["array"]]
        if array.dtype.name != info["dtype"]:
            array = array.view(np.dtype(getattr(ml_dtypes, info["dtype"])))
        if list(array.shape) != info["shape"]:
            raise ValueError(f"{name!r} has the shape {list(array.shape)}, not {info['shape']}")
        found[name] = array
    return found
