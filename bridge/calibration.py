"""Inputs that TensorRT's int8 calibrator is shown: read where the user's objects are, and handed over as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .calibration_sources import Feeds, Samples, check_source
from .calibration_sources import Read as Read
from .errors import UsageError
from .inputs import Array, Profiles
from .npz import write_npz

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from .torch_source import Source

CALIBRATORS = {
    "LEGACY_CALIBRATION": "legacy",
    "ENTROPY_CALIBRATION": "entropy_legacy",
    "ENTROPY_CALIBRATION_2": "entropy",
    "MINMAX_CALIBRATION": "minmax",
}
"""TensorRT's own calibrators, by its names and in the order of their numbers, and the algorithm that is like each."""
METHOD_OF = {"entropy": "entropy", "entropy_legacy": "entropy", "minmax": "max", "legacy": "percentile"}
"""The algorithms, and what of ``bridge.ranges`` does each."""


@dataclass(frozen=True)
class Calibration:
    """A calibration's inputs on the disk."""

    files: tuple[Path, ...]
    """An .npz file for each call, with an array for each input."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the first call; TensorRT's own calibrator takes no others."""
    algorithm: str
    digest: str
    """SHA-256 of the inputs."""
    cache: Path
    """Where the ranges that were found are written."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Of each input."""
    notes: tuple[str, ...] = ()
    """What the user should know."""

    def samples(self) -> Iterator[dict[str, Array]]:
        """The inputs of one call after the other, as ``bridge.ranges.measure`` takes them."""
        for file in self.files:
            with np.load(file) as arrays:
                yield {name: arrays[name].astype(np.dtype(kind), copy=False) for name, kind in self.dtypes.items()}

    def job(self) -> dict[str, Any]:
        """For the builder's process."""
        return {
            "files": [str(file) for file in self.files],
            "profile": {
                name: {key: list(shape) for key in ("min", "opt", "max")} for name, shape in self.shapes.items()
            },
            "algorithm": self.algorithm,
            "cache": str(self.cache),
        }


def check_calibration(calibration: Any, algorithm: str, wanted: bool) -> None:
    """Raises UsageError where it is not what ``convert`` takes, or is given though nothing is ``wanted`` of it."""
    if algorithm not in (*METHOD_OF, *CALIBRATORS):
        known = ", ".join(map(repr, (*METHOD_OF, *CALIBRATORS)))
        raise UsageError(f"calibration_algorithm {algorithm!r}: not one of {known}.")
    if calibration is None:
        return
    if not wanted:
        raise UsageError(
            "calibration: nothing is computed in a lower precision, for which values would count; leave it out."
        )
    check_source(calibration)


def write_calibration(
    items: Any,
    read: Read,
    example: Mapping[str, Array],
    allowed: Profiles,
    folder: Path,
    algorithm: str,
    cache: Path,
    *,
    one_shape: bool = True,
) -> Calibration:
    """Writes one file for each of ``items`` (see ``calibration_sources``), or for the example where none are given.

    ``one_shape``: all of them have to have the same shapes, as for TensorRT's own calibrator; a DataLoader's last batch
    is left out where it is too small. Raises UsageError where an item cannot be read, does not fit the model, is
    outside of the ``allowed`` shapes, or has another shape than the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    files: list[Path] = []
    shapes: dict[str, tuple[int, ...]] = {}
    samples = Samples(items, read, example, allowed)
    last = ""
    for where, feeds in samples if items is not None else [("the example", example)]:
        if last:
            raise UsageError(last)
        found = {name: array.shape for name, array in feeds.items() if name in example}
        wrong = misfit(feeds, example, allowed) or (_other_shape(found, shapes) if one_shape else "")
        if wrong:
            last = f"calibration, {where}: {wrong}."
            if samples.batched and _fewer_rows(found, shapes):
                continue  # if it is the last
            raise UsageError(last)
        shapes = shapes or found
        arrays = {name: _plain(feeds[name]) for name in example}
        for name, array in arrays.items():
            digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
            digest.update(array.tobytes())
        files.append(folder / f"{len(files)}.npz")
        write_npz(files[-1], arrays)
    if not files:
        raise UsageError("calibration: holds no inputs.")
    notes = ("calibration: the last batch is smaller than the others, and left out",) if last else ()
    dtypes = {name: str(example[name].dtype) for name in example}
    return Calibration(tuple(files), shapes, algorithm, digest.hexdigest(), cache, dtypes, notes)


Shapes = Mapping[str, tuple[int, ...]]


def _other_shape(found: Shapes, first: Shapes) -> str:
    """That this item has other shapes than the first one, in words; empty where it has not, or is the first."""
    for name, shape in first.items():
        if found[name] != shape:
            return (
                f"{name!r} has the shape {list(found[name])}, and the first item {list(shape)}: "
                "TensorRT calibrates at one shape"
            )
    return ""


def _fewer_rows(found: Shapes, first: Shapes) -> bool:
    """Whether all that is wrong is that there are fewer rows than before."""
    return bool(first) and all(
        found[name][1:] == shape[1:] and found[name][:1] < shape[:1] for name, shape in first.items()
    )


def misfit(feeds: Feeds, example: Mapping[str, Array], allowed: Profiles) -> str:
    """What is wrong with the inputs of one call, in words; empty where nothing is."""
    for name, usual in example.items():
        if name not in feeds:
            return f"lacks the input {name!r}"
        array, span = feeds[name], allowed[name]
        if array.dtype != usual.dtype:
            return f"{name!r} is {array.dtype}, and the example {usual.dtype}"
        if array.ndim != usual.ndim or not all(
            low <= size <= high for low, size, high in zip(span.min, array.shape, span.max, strict=True)
        ):
            return f"{name!r} has the shape {list(array.shape)}, outside of {list(span.min)} to {list(span.max)}"
    return ""


def _plain(array: Array) -> Array:
    """In a type that NumPy's files keep; TensorRT calibrates in float32."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def torch_reader(source: Source) -> Read:
    """Reads inputs as a torch module takes them."""
    from .inputs import take_apart
    from .tensors import to_numpy

    names = list(source.call.tensors)
    program = source.program
    positional = len(program.example_inputs[0]) if program is not None and program.example_inputs else None

    def read(item: Any) -> dict[str, Array]:
        call = take_apart(source.module.forward, item, names, f"{type(source.module).__name__}.forward", positional)
        return {name: to_numpy(tensor) for name, tensor in call.tensors.items()}

    return read


def file_reader(graph: gs.Graph) -> Read:
    """Reads inputs as an ONNX file takes them; batches may be larger than its own, and are then taken apart."""
    from .onnx_source import named_inputs

    return lambda item: named_inputs(graph, item)
