"""Inputs that TensorRT's int8 calibrator is shown: read where the user's objects are, and handed over as files."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError
from .inputs import Array, Profiles

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from .export import Source

ALGORITHMS = ("entropy", "entropy_legacy", "minmax", "legacy")
"""What TensorRT calls ENTROPY_CALIBRATION_2, ENTROPY_CALIBRATION, MINMAX_CALIBRATION and LEGACY_CALIBRATION."""

Read = Callable[[Any], Mapping[str, Array]]
"""From one call's inputs, as ``convert`` takes them, to arrays by name."""


@dataclass(frozen=True)
class Calibration:
    """A calibration's inputs on the disk."""

    files: tuple[Path, ...]
    """An .npz file for each call, with an array for each input."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every call: TensorRT calibrates at one shape."""
    algorithm: str
    digest: str
    """SHA-256 of the inputs."""
    cache: Path
    """Where the ranges that were found are written."""

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
    if algorithm not in ALGORITHMS:
        raise UsageError(f"calibration_algorithm {algorithm!r}: not one of {', '.join(map(repr, ALGORITHMS))}.")
    if calibration is None:
        return
    if not wanted:
        raise UsageError("calibration: only precision 'int8' and 'int8+fp16' are calibrated; leave it out.")
    if isinstance(calibration, Mapping) or not (
        hasattr(calibration, "__iter__") or (hasattr(calibration, "__getitem__") and hasattr(calibration, "__len__"))
    ):
        raise UsageError(
            f"calibration: a {type(calibration).__name__}; give a sequence of inputs, each as the example is given."
        )


def write_calibration(
    items: Any,
    read: Read,
    example: Mapping[str, Array],
    allowed: Profiles,
    folder: Path,
    algorithm: str,
    cache: Path,
) -> Calibration:
    """Writes one file for each of ``items``, or for the example where there are none given.

    Raises UsageError where an item cannot be read, does not fit the model, is outside of the ``allowed`` shapes, or has
    other shapes than the first one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    files: list[Path] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for index, feeds in enumerate(_each(items, read) if items is not None else [example]):
        wrong = _misfit(feeds, example, allowed)
        if wrong:
            raise UsageError(f"calibration, item {index}: {wrong}.")
        found = {name: feeds[name].shape for name in example}
        shapes = shapes or found
        for name, shape in found.items():
            if shape != shapes[name]:
                raise UsageError(
                    f"calibration, item {index}: {name!r} has the shape {list(shape)}, and the first item "
                    f"{list(shapes[name])}: TensorRT calibrates at one shape."
                )
        arrays = {name: _plain(feeds[name]) for name in example}
        for name, array in arrays.items():
            digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
            digest.update(array.tobytes())
        files.append(folder / f"{index}.npz")
        np.savez(files[-1], **arrays)  # type: ignore[arg-type]  # NumPy's stubs take the names for its own keyword
    if not files:
        raise UsageError("calibration: holds no inputs.")
    return Calibration(tuple(files), shapes, algorithm, digest.hexdigest(), cache)


def _misfit(feeds: Mapping[str, Array], example: Mapping[str, Array], allowed: Profiles) -> str:
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


def _each(items: Any, read: Read) -> Iterator[Mapping[str, Array]]:
    """The items read; by their indices where they have a length (a Dataset need not end its own iteration)."""
    listed = hasattr(items, "__getitem__") and hasattr(items, "__len__")
    values = (items[index] for index in range(len(items))) if listed else iter(items)
    for index in itertools.count():
        try:
            feeds = read(next(values))
        except StopIteration:
            return
        except UsageError as error:
            raise UsageError(f"calibration, item {index}: {error}") from error
        except Exception as error:  # the user's data set may raise anything, and is named as the cause
            words = f"{type(error).__name__}: {error}"
            raise UsageError(f"calibration, item {index}: cannot be read: {words}") from error
        yield feeds


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
    """Reads inputs as an ONNX file takes them."""
    from .onnx_source import given_inputs

    return lambda item: given_inputs(graph, item)
