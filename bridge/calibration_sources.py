"""Where calibration inputs come from: a data set, a DataLoader, a function, a folder of files, or one .npz file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from .errors import UsageError
from .inputs import Array, Profiles

Read = Callable[[Any], Mapping[str, Array]]
"""From one call's inputs, as ``convert`` takes them, to arrays by name."""
Feeds = Mapping[str, Array]

FILES = (".npy", ".npz")
TAKEN = (
    "a sequence of inputs, each as the example is given, a bridge.Dataset, a torch DataLoader, a function that returns "
    "or yields such inputs, a folder of .npz or .npy files, or one .npz file with all samples along the first axis"
)


def check_source(given: Any) -> None:
    """Raises UsageError where ``given`` is none of TAKEN."""
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        if not path.exists():
            raise UsageError(f"calibration: there is no {path}; give {TAKEN}.")
        if path.is_dir():
            _listed(path)
        elif path.suffix not in FILES:
            raise UsageError(f"calibration: {path} is no {' or '.join(FILES)} file; give {TAKEN}.")
        return
    if isinstance(given, type):
        raise UsageError(f"calibration: {given.__name__} is a class; give one of it, or a function that returns one.")
    iterable = hasattr(given, "__iter__") or (hasattr(given, "__getitem__") and hasattr(given, "__len__"))
    if isinstance(given, Mapping) or not (iterable or callable(given)):
        raise UsageError(f"calibration: a {type(given).__name__}; give {TAKEN}.")


@dataclass(frozen=True)
class Samples:
    """Calibration inputs, to be read for a model of which ``example`` is one call."""

    given: Any
    read: Read
    example: Feeds
    allowed: Profiles

    @property
    def batched(self) -> bool:
        """Whether the sizes along the first axis are accidental: a DataLoader's last batch has what is left over."""
        if isinstance(self.given, (str, os.PathLike)):
            return not Path(self.given).is_dir()
        return _is_loader(self.given)

    def __iter__(self) -> Iterator[tuple[str, Feeds]]:
        """The inputs of each call, and what they are called in an error. Raises UsageError where one cannot be read."""
        if isinstance(self.given, (str, os.PathLike)):
            yield from self._of_files(Path(self.given))
            return
        if _is_function(self.given):
            found = _called(self.given)
            if _of_torch(found):
                yield from replace(self, given=found)
                return
            values = _returned(found)
        else:
            values = _in_turn(self.given)
        for index in itertools.count():
            name = f"item {index}"
            try:
                feeds = self._read(next(values))
            except StopIteration:
                return
            except UsageError as error:
                raise UsageError(f"calibration, {name}: {error}") from error
            except Exception as error:  # the user's data set may raise anything, and is named as the cause
                words = f"{type(error).__name__}: {error}"
                raise UsageError(f"calibration, {name}: cannot be read: {words}") from error
            for piece in self._pieces(feeds) if self.batched else [feeds]:
                yield name, piece

    # what a data set holds

    def _read(self, item: Any) -> Feeds:
        """The inputs alone: what else a torch data set's item holds (a target) the module does not take."""
        try:
            return self.read(item)
        except UsageError:
            for part in self._parts(item):
                try:
                    return self.read(part)
                except UsageError:
                    continue
            raise

    def _parts(self, item: Any) -> Iterator[Any]:
        if isinstance(item, np.ndarray):
            yield (item,)
        elif not _of_torch(self.given):
            return
        elif isinstance(item, Mapping):
            known = {name.partition(".")[0] for name in self.example}
            yield {key: value for key, value in item.items() if key in known}
        elif isinstance(item, (tuple, list)):
            yield from (tuple(item[:count]) for count in range(len(item) - 1, 0, -1))
            if item and isinstance(item[0], (tuple, list, Mapping)):
                yield item[0]

    def _pieces(self, feeds: Feeds) -> Iterator[Feeds]:
        """A batch as it is or, where the model takes fewer rows at a time, in pieces of as many as the example has."""
        rows = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
        usual = {array.shape[0] if array.ndim else 0 for array in self.example.values()}
        if len(rows) != 1 or len(usual) != 1 or not self._too_many(feeds):
            yield feeds
            return
        (count,), (size,) = rows, usual
        for start in range(0, count - size + 1, size):
            yield {name: array[start : start + size] for name, array in feeds.items()}

    def _too_many(self, feeds: Feeds) -> bool:
        """Whether it is the first axis alone that has more rows than the model takes."""
        return all(
            name in feeds
            and feeds[name].ndim == usual.ndim > 0
            and feeds[name].shape[0] > max(self.allowed[name].max[0], usual.shape[0])
            for name, usual in self.example.items()
        )

    # files

    def _of_files(self, path: Path) -> Iterator[tuple[str, Feeds]]:
        if path.is_dir():
            for file in _listed(path):
                yield f"file {file.name}", self._named(file)
            return
        feeds = self._named(path)
        for index, sample in enumerate(self._samples(feeds, path)):
            yield f"sample {index} of {path.name}", sample

    def _named(self, file: Path) -> dict[str, Array]:
        """The arrays of a file by the model's names, in the model's types where these are of the same kind."""
        try:
            with np.load(file) if file.suffix == ".npz" else _one(np.load(file)) as arrays:
                found = {name: np.asarray(arrays[name]) for name in arrays}
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise UsageError(f"calibration: {file} cannot be read: {error}") from error
        names = list(self.example)
        if not set(found) <= set(names) and list(found) == [f"arr_{place}" for place in range(len(names))]:
            found = dict(zip(names, found.values(), strict=True))
        if set(found) != set(names):
            raise UsageError(
                f"calibration: {file} holds {', '.join(map(repr, found))}; the model takes "
                f"{', '.join(map(repr, names))}. Save each input under its name."
            )
        for name, usual in self.example.items():
            if found[name].dtype.kind == usual.dtype.kind:
                found[name] = found[name].astype(usual.dtype, copy=False)
        return found

    def _samples(self, feeds: Feeds, path: Path) -> Iterator[Feeds]:
        """Along the first axis, of all arrays: each index a call or, where the model has this axis too, as many as the
        example has; what is left over of the last is left out."""
        counts = {name: array.shape[0] if array.ndim else 0 for name, array in feeds.items()}
        if len(set(counts.values())) != 1:
            sizes = ", ".join(f"{name!r} {count}" for name, count in counts.items())
            raise UsageError(f"calibration: {path}: the first axis is that of the samples, and has the sizes {sizes}.")
        count = next(iter(counts.values()))
        if all(feeds[name].ndim == usual.ndim + 1 for name, usual in self.example.items()):
            yield from ({name: array[index] for name, array in feeds.items()} for index in range(count))
            return
        sizes_of_example = {usual.shape[0] if usual.ndim else 1 for usual in self.example.values()}
        if len(sizes_of_example) != 1:
            raise UsageError(
                f"calibration: {path}: the model's inputs have first axes of different sizes; give each an axis more, "
                "that of the samples, or a folder with a file for each sample."
            )
        (size,) = sizes_of_example
        for start in range(0, count - size + 1, size):
            yield {name: array[start : start + size] for name, array in feeds.items()}


class _one(dict[str, Array]):
    """The array of an .npy file, as if it were that of an .npz file."""

    def __init__(self, array: Array) -> None:
        super().__init__(arr_0=array)

    def __enter__(self) -> _one:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def _listed(folder: Path) -> Sequence[Path]:
    """The folder's files in the order of their names. Raises UsageError where there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix in FILES and not path.name.startswith("."))
    if not found:
        raise UsageError(f"calibration: the folder {folder} holds no {' or '.join(FILES)} files.")
    return found


def _is_loader(given: Any) -> bool:
    """Whether it is a torch DataLoader, or one of the kind; torch need not be imported to tell."""
    return any(base.__name__ == "DataLoader" for base in type(given).__mro__)


def _of_torch(given: Any) -> bool:
    """Whether it is one of torch's data sets or loaders, whose items are often pairs of inputs and a target."""
    return _is_loader(given) or any(base.__module__.startswith("torch.utils.data") for base in type(given).__mro__)


def _is_function(given: Any) -> bool:
    return callable(given) and not hasattr(given, "__iter__") and not hasattr(given, "__getitem__")


def _called(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # the user's function may raise anything, and is named as the cause
        name = getattr(function, "__name__", type(function).__name__)
        raise UsageError(f"calibration: {name}() raises {type(error).__name__}: {error}") from error


def _in_turn(given: Any) -> Iterator[Any]:
    """By their indices where they have a length (a Dataset need not end its own iteration)."""
    if hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        return (given[index] for index in range(len(given)))
    return iter(given)


def _returned(found: Any) -> Iterator[Any]:
    """What a function gave: many inputs, or the tensor, tuple or mapping that is one call's."""
    if isinstance(found, (tuple, Mapping)) or hasattr(found, "dtype"):
        return iter([found])
    if found is None or not hasattr(found, "__iter__"):
        raise UsageError(f"calibration: the function returned a {type(found).__name__}, and no inputs; give {TAKEN}.")
    return _in_turn(found)
