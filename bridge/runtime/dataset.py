"""Sets of example inputs, torch2trt's: recorded from a running module, kept in memory or in a folder, and their shapes.

An item is the arguments of one call: a tuple of positional ones, or a dict where keywords were given too. All items of
a set have the structure of the first.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..errors import RunError, UsageError
from .calling import Parameters, parameters_of
from .flattener import Flattener

Shapes = list[torch.Size]


class DatasetRecorder(contextlib.AbstractContextManager["DatasetRecorder"]):
    """Inserts the arguments of every call of a module into a dataset, for as long as it is entered."""

    def __init__(self, dataset: Dataset, module: torch.nn.Module) -> None:
        self.dataset, self.module = dataset, module
        self._handle: Any = None

    def __enter__(self) -> DatasetRecorder:
        if self._handle is not None:
            raise UsageError("record: this recorder is entered already; dataset.record(module) makes another one.")
        self._handle = self.module.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()
        self._handle = None

    def _record(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not kwargs:
            self.dataset.insert(args)
            return
        parameters = Parameters.read(parameters_of(module.forward))
        bound = parameters.bind(args, kwargs)
        rest = bound.pop(f"*{parameters.rest}", ())
        if rest:
            raise UsageError(
                f"record: {type(module).__name__} was called with keywords and with *{parameters.rest}; "
                "such a call cannot be kept as a tuple or a dict."
            )
        self.dataset.insert(bound)


class Dataset:
    """Example inputs of a module. Subclasses have ``__len__``, ``__getitem__`` and ``insert``."""

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} has no __len__")

    def __getitem__(self, index: int) -> Any:
        """The arguments of one call: a tuple of positional ones, or a dict by name."""
        raise NotImplementedError(f"{type(self).__name__} has no __getitem__")

    def insert(self, item: Any) -> None:
        """Adds a copy of the arguments of a call: a tuple or list, a dict by name, or a single tensor."""
        raise NotImplementedError(f"{type(self).__name__} has no insert")

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def record(self, module: torch.nn.Module) -> DatasetRecorder:
        """``with dataset.record(module): …`` keeps the arguments of each call of ``module`` within."""
        return DatasetRecorder(self, module)

    @property
    def flattener(self) -> Flattener:
        """The structure of an item."""
        self._check_any()
        return Flattener.from_value(_arguments(self[0]))

    def num_inputs(self) -> int:
        """How many tensors an item has, nested ones included."""
        return len(self.flattener)

    def getitem_flat(self, index: int) -> list[torch.Tensor]:
        """The tensors of an item. Raises UsageError where it has another structure than the first."""
        return self._flat_item(index, self.flattener)

    def shapes_for_index(self, index: int, flat: bool = False) -> Any:
        """The shapes of an item's tensors: nested as the item is, or ``flat``."""
        return self._nested([tensor.shape for tensor in self.getitem_flat(index)], flat)

    def shapes(self, flat: bool = False) -> Any:
        """Of each input the shapes that it has in the items, in their order."""
        return self._nested([list(each) for each in zip(*self._all_shapes(), strict=True)], flat)

    def min_shapes(self, flat: bool = False) -> Any:
        """Of each input the smallest size along each axis."""
        return self._along(min, flat)

    def max_shapes(self, flat: bool = False) -> Any:
        """Of each input the largest size along each axis."""
        return self._along(max, flat)

    def item_numel(self, index: int) -> int:
        """How many elements the tensors of an item have together."""
        return sum(tensor.numel() for tensor in self.getitem_flat(index))

    def median_numel_shapes(self, flat: bool = False) -> Any:
        """The shapes of the item that stands in the middle of all by its number of elements."""
        sizes = [sum(map(math.prod, shapes)) for shapes in self._all_shapes()]
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        return self.shapes_for_index(order[len(order) // 2], flat)

    def infer_dynamic_axes(self, flat: bool = False) -> Any:
        """Of each input the axes along which the items differ in size."""
        low, high = self.min_shapes(flat=True), self.max_shapes(flat=True)
        return self._nested([dynamic_axes(a, b) for a, b in zip(low, high, strict=True)], flat)

    def _check_any(self) -> None:
        if len(self) == 0:
            raise UsageError(f"{type(self).__name__}: is empty; insert or record at least one example.")

    def _flat_item(self, index: int, flattener: Flattener) -> list[torch.Tensor]:
        try:
            return flattener.flatten(_arguments(self[index]))
        except RunError as error:
            raise UsageError(f"{type(self).__name__}: item {index} is not as item 0, the example: {error}") from error

    def _all_shapes(self) -> list[Shapes]:
        flattener = self.flattener
        found = [[tensor.shape for tensor in self._flat_item(index, flattener)] for index in range(len(self))]
        for index, shapes in enumerate(found):
            if list(map(len, shapes)) != list(map(len, found[0])):
                raise UsageError(
                    f"{type(self).__name__}: item {index} has the shapes {_words(shapes)}, of other ranks than those "
                    f"of item 0, {_words(found[0])}; an engine's inputs keep their rank."
                )
        return found

    def _along(self, choose: Callable[..., int], flat: bool) -> Any:
        inputs = zip(*self._all_shapes(), strict=True)
        return self._nested([torch.Size(map(choose, zip(*each, strict=True))) for each in inputs], flat)

    def _nested(self, values: list[Any], flat: bool) -> Any:
        return values if flat else self.flattener.unflatten(values)


def _words(shapes: Shapes) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def dynamic_axes(low: Sequence[int], high: Sequence[int]) -> list[int]:
    """The axes along which two shapes differ."""
    return [axis for axis, (a, b) in enumerate(zip(low, high, strict=True)) if a != b]


def _arguments(item: Any) -> Any:
    """The arguments of a call, as a tuple or a dict."""
    if isinstance(item, torch.Tensor):
        return (item,)
    if not isinstance(item, (tuple, list, Mapping)):
        raise UsageError(
            f"a data set's item: a {type(item).__name__}; give the arguments of a call: a tuple or a dict."
        )
    return dict(item) if isinstance(item, Mapping) else tuple(item)


def _copied(item: Any) -> Any:
    """The arguments of a call, with tensors of their own: a module may overwrite its inputs."""
    arguments = _arguments(item)
    flattener = Flattener.from_value(arguments, torch.is_tensor)
    if lost := flattener.lost("item"):
        raise UsageError(f"insert: {lost[0]} is neither a tensor nor a constant, and cannot be kept.")
    return flattener.unflatten([tensor.detach().clone() for tensor in flattener.flatten(arguments)])


class ListDataset(Dataset):
    """Example inputs in memory."""

    def __init__(self, items: Sequence[Any] = ()) -> None:
        self.items: list[Any] = []
        for item in items:
            self.insert(item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def insert(self, item: Any) -> None:
        self.items.append(_copied(item))


class TensorBatchDataset(Dataset):
    """Example inputs as one batch: item i is row i of each tensor, with a batch axis of 1."""

    def __init__(self, tensors: Any = None) -> None:
        """``tensors``: the arguments of a call, each tensor with all examples along its first axis."""
        self.tensors: Any = None
        self._structure = Flattener.from_value(())
        if tensors is not None:
            self.insert(tensors)

    def __len__(self) -> int:
        return 0 if self.tensors is None else int(self._flat()[0].shape[0])

    def __getitem__(self, index: int) -> Any:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"item {index} of {count}")
        row = index % count
        return self._structure.unflatten([tensor[row : row + 1] for tensor in self._flat()])

    def insert(self, item: Any) -> None:
        """Adds examples to the end of the batch; all but the first axis must be as before."""
        item = _copied(item)
        structure = Flattener.from_value(item)
        flat = structure.flatten(item) if self.tensors is None else self._structure.flatten(item)
        if not flat or any(tensor.dim() == 0 for tensor in flat) or len({tensor.shape[0] for tensor in flat}) > 1:
            shapes = _words([tensor.shape for tensor in flat])
            raise UsageError(f"TensorBatchDataset: tensors of the shapes {shapes} have no first axis in common.")
        if self.tensors is None:
            self._structure, self.tensors = structure, item
            return
        for old, new in zip(self._flat(), flat, strict=True):
            if old.shape[1:] != new.shape[1:]:
                raise UsageError(
                    f"TensorBatchDataset: {tuple(new.shape)} does not go behind {tuple(old.shape)}: all axes but the "
                    "first must be the same. A ListDataset takes any shapes."
                )
        joined = [torch.cat(pair) for pair in zip(self._flat(), flat, strict=True)]
        self.tensors = self._structure.unflatten(joined)

    def _flat(self) -> list[torch.Tensor]:
        return self._structure.flatten(self.tensors)


_ITEM = re.compile(r"input_(\d+)\.pth")


def _number(path: Path) -> float:
    """Of an item's file; infinity where it has none."""
    match = _ITEM.fullmatch(path.name)
    return int(match[1]) if match else math.inf


class FolderDataset(Dataset):
    """Example inputs as files of a folder: ``input_0.pth``, ``input_1.pth``, … and whatever else ends in ``.pth``.

    Several processes may insert at once.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """``folder`` is made where it is not there."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def file_paths(self) -> list[Path]:
        """The files in the order of their numbers, and behind them those of other names."""
        return sorted(self.folder.glob("[!.]*.pth"), key=lambda path: (_number(path), path.name))

    def __len__(self) -> int:
        return len(self.file_paths())

    def __getitem__(self, index: int) -> Any:
        """Raises UsageError for a file that torch does not load, or only where a class in it is allowed."""
        path = self.file_paths()[index]
        try:
            return torch.load(path, weights_only=True, map_location=None if torch.cuda.is_available() else "cpu")
        except (pickle.UnpicklingError, struct.error, EOFError, RuntimeError) as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise UsageError(
                f"{path}: holds a {found[1]}, which torch loads where it is allowed alone: "
                f"torch.serialization.add_safe_globals([{found[1]}])."
                if found
                else f"{path}: is damaged, or was not written by torch.save ({type(error).__name__}: {error})."
            ) from error

    def insert(self, item: Any) -> None:
        """Writes a file that is there whole or not at all, under the next number that is free."""
        item = _copied(item)
        handle, name = tempfile.mkstemp(prefix=".input_", suffix=".partial", dir=self.folder)
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(item, file)
            with FileLock(self.folder / ".lock"):
                number = max([-1, *(found for path in self.file_paths() if (found := _number(path)) < math.inf)]) + 1
                partial.replace(self.folder / f"input_{number}.pth")
        finally:
            partial.unlink(missing_ok=True)
