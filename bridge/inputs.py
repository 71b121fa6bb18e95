"""What goes into a model: example inputs under the names of forward's parameters, and the shapes they may take."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import UsageError
from .tensors import named_leaves, to_torch

if TYPE_CHECKING:
    import torch

    from .runtime.flattener import Flattener

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = ("float32", "float16", "bfloat16", "float64", *_INTEGERS, "bool")
"""What goes in; the passes give what TensorRT has no type for another one, and say so."""

VARIATION = {2: 1 / 64, 4: 1 / 256, 8: 1 / 256}
"""What repeated values shrink by at most, by the bytes of their type: enough to tell them apart, and little noise."""
CONSTANTS = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class Profile:
    """The shapes that one input may have."""

    min: Shape
    opt: Shape
    max: Shape

    @property
    def dynamic_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis, (low, high) in enumerate(zip(self.min, self.max, strict=True)) if low != high)


Profiles = Mapping[str, Profile]
"""One for each input: an optimization profile of TensorRT's. An engine may have several."""


@dataclass(frozen=True)
class Case:
    """One set of inputs, by name; ``example``, or the same values at a profile's ``min`` or ``max`` shapes.

    With several profiles these are called ``profile 0 min``, and so on.
    """

    name: str
    feeds: dict[str, Array]


@dataclass(frozen=True)
class Call:
    """A call of a module, taken apart: its tensors by name, and how to put others together in the same way."""

    tensors: dict[str, Any]
    """torch tensors, in the order in which the exported model takes them."""
    structure: Flattener
    """Of the arguments: a tuple of positional ones, or a dict by name."""
    positional: int = 0
    """How many of a dict's are passed by position."""

    def rebuild(self, given: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """From tensors in the order of ``tensors`` to the positional and keyword arguments."""
        arguments = self.structure.unflatten(given)
        if isinstance(arguments, tuple):
            return arguments, {}
        items = list(arguments.items())
        return tuple(value for _, value in items[: self.positional]), dict(items[self.positional :])


def take_apart(
    forward: Callable[..., Any],
    inputs: Any,
    names: Sequence[str] | None = None,
    what: str = "the module",
    positional: int | None = None,
) -> Call:
    """Flattens example inputs; each tensor is named after forward's parameter, with dots where it is nested.

    ``inputs`` is a tuple or list of positional arguments, a dict of keyword arguments, or a single tensor; NumPy arrays
    in it become tensors. They are passed on as they are given or, where ``positional`` is a number, so many by position
    and the others by keyword.
    Raises UsageError where forward does not take them, or where a value is neither a tensor nor a constant.
    """
    import torch

    from .runtime.flattener import Flattener

    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise UsageError(
            f"inputs: a {type(inputs).__name__}; give a tuple of positional arguments or a dict of keyword arguments."
        )
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"inputs: {error}. {what} takes {inspect.signature(forward)}; {len(args)} positional and "
            f"{len(kwargs)} keyword arguments were given."
        ) from error
    arguments: tuple[Any, ...] | dict[str, Any] = kwargs if isinstance(inputs, Mapping) else args
    if positional is not None:
        arguments = dict(bound.arguments)
    parameters = _parameter_names(bound, len(args))
    found: list[str] = []
    values: list[Any] = []
    for path, leaf in named_leaves(arguments):
        name = _dotted(path, parameters)
        if isinstance(leaf, (torch.Tensor, np.ndarray)):
            _check_tensor(name, leaf)
            found.append(name)
            values.append(to_torch(leaf) if isinstance(leaf, np.ndarray) else leaf)
        elif not isinstance(leaf, CONSTANTS):
            raise UsageError(
                f"input {name!r}: is a {type(leaf).__name__}, neither a tensor nor a constant. "
                "Register a dataclass of tensors with torch.export.register_dataclass, or pass its tensors one by one."
            )
    if not found:
        raise UsageError("inputs: hold no tensor; an engine needs at least one input.")
    if names is not None:
        check_names("input_names", names, found)
    for name in found if names is None else ():
        if found.count(name) > 1:
            raise UsageError(f"inputs: two of them come to be called {name!r}; give input_names.")
    tensors = dict(zip(names or found, values, strict=True))
    return Call(tensors, Flattener.from_value(arguments), positional or 0)


def _check_tensor(name: str, tensor: torch.Tensor | Array) -> None:
    """Raises UsageError for what no engine takes, or has no values to compute with."""
    import torch

    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        parts = " Give its parts (torch.view_as_real), and join them in forward (torch.view_as_complex)."
        raise UsageError(
            f"input {name!r}: is {tensor.dtype}, which TensorRT has not; it takes {', '.join(DTYPES)}."
            + parts * ("complex" in str(tensor.dtype))
        )
    if isinstance(tensor, np.ndarray):
        return
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        raise UsageError(f"input {name!r}: is of layout {kind}, and engines take dense tensors: x.to_dense().")
    if tensor.is_meta:
        raise UsageError(f"input {name!r}: is on the meta device, and has no values; give a tensor that has.")


def check_names(what: str, names: Sequence[str], own: Sequence[str]) -> None:
    """Raises UsageError where ``names`` are not one for each tensor that is called ``own``, all different."""
    if odd := [name for name in names if not isinstance(name, str)]:
        raise UsageError(f"{what}: {odd[0]!r} is no word; give a list of names.")
    if len(names) != len(own) or len(set(names)) != len(names) or not all(names):
        kind = what.removesuffix("_names")
        raise UsageError(
            f"{what}: {list(names)} for {len(own)} {kind}s ({', '.join(own)}); give one name for each, all different."
        )


def _parameter_names(bound: inspect.BoundArguments, positional: int) -> list[str]:
    """The name of the parameter that each positional argument went to."""
    names: list[str] = []
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names.extend(f"{name}.{index}" for index in range(len(bound.arguments.get(name, ()))))
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            names.append(name)
    return names[:positional]


def _dotted(path: Sequence[Any], parameters: Sequence[str]) -> str:
    """A leaf's path from a tuple or dict of arguments as a name: the parameter, keys, places and fields, with dots."""
    first = parameters[path[0]] if isinstance(path[0], int) else str(path[0])
    return ".".join([first, *map(str, path[1:])])


# --- shapes ------------------------------------------------------------------------------------------------------


def make_profiles(given: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Profile]:
    """A profile for every input: the hull of what ``read_profiles`` reads."""
    return hull(read_profiles(given, shapes))


def read_profiles(given: Any, shapes: Mapping[str, Sequence[int]]) -> list[dict[str, Profile]]:
    """The optimization profiles, at least one; an input that one of them leaves out has the example's shape there.

    ``given`` is ``{input: (min, opt, max)}``, or a list of such, and ``shapes`` those of the example. Raises UsageError
    for an unknown input, a profile that is no three shapes of the input's rank, min > opt or opt > max, or an example
    outside of all of them.
    """
    example = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
    sets = []
    for ranges in known_profiles(given, list(example)) or [{}]:
        static = {name: Profile(shape, shape, shape) for name, shape in example.items()}
        sets.append(static | {name: _profile(name, value, example[name]) for name, value in ranges.items()})
    outside = [_outside(profiles, example) for profiles in sets]
    if all(outside):
        places = outside if len(sets) == 1 else [f"profile {index}: {words}" for index, words in enumerate(outside)]
        raise UsageError(f"profiles: {'; '.join(map(str, places))}.")
    return sets


def hull(sets: Sequence[Profiles]) -> dict[str, Profile]:
    """Of each input, the smallest range that holds all its profiles; its opt is the first one's."""
    return {
        name: Profile(
            tuple(map(min, *(item[name].min for item in sets), first.min)),
            first.opt,
            tuple(map(max, *(item[name].max for item in sets), first.max)),
        )
        for name, first in sets[0].items()
    }


def known_profiles(given: Any, inputs: Sequence[str]) -> list[Mapping[str, Any]]:
    """``given`` as a list, which is empty for None. Raises UsageError where it is neither a mapping nor a list of them,
    or names what is no input."""
    if given is None:
        return []
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    if not listed or not all(isinstance(item, Mapping) for item in listed):
        kind = "an empty list" if not listed else f"a {type(given).__name__}"
        raise UsageError(f"profiles: {kind}; give {{input: (min shape, opt shape, max shape)}}, or a list of such.")
    for name in (name for item in listed for name in item):
        if name not in inputs:
            near = difflib.get_close_matches(str(name), inputs, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"profiles: {name!r} is no input; the inputs are {', '.join(inputs)}.{hint}")
    return listed


def _profile(name: str, value: Any, example: Shape) -> Profile:
    try:
        low, opt, high = (tuple(index(size) for size in shape) for shape in value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"profiles: {name!r}: {value!r} is not three shapes (min, opt, max).") from error
    if {len(low), len(opt), len(high)} != {len(example)}:
        raise UsageError(f"profiles: {name!r}: has {len(example)} axes, and the profile is {value!r}.")
    for axis, (smallest, usual, largest) in enumerate(zip(low, opt, high, strict=True)):
        if not 0 <= smallest <= usual <= largest:
            raise UsageError(
                f"profiles: {name!r}, axis {axis}: min {smallest}, opt {usual}, max {largest} are not in this order."
            )
        if example[axis] == 0 and largest:
            raise UsageError(
                f"profiles: {name!r}, axis {axis}: the example input is empty there, and has no values to repeat "
                f"{largest} times."
            )
    return Profile(low, opt, high)


def _outside(profiles: Profiles, shapes: Mapping[str, Shape]) -> str:
    """Where the example is outside of the profiles, in words; empty where it is not."""
    for name, shape in shapes.items():
        for axis, (smallest, size, largest) in enumerate(
            zip(profiles[name].min, shape, profiles[name].max, strict=True)
        ):
            if not smallest <= size <= largest:
                return f"{name!r}, axis {axis}: the example input has {size}, outside of {smallest} to {largest}"
    return ""


def resized(array: Array, shape: Sequence[int]) -> Array:
    """``array`` cut or repeated along each axis until it has ``shape``: its values stay in their range.

    Within an item of the batch, what is repeated of measured values shrinks by up to ``VARIATION``: no two candidates
    that a model ranks are the same, whose order nothing would define. Whole numbers, masks among them, stay.
    """
    kept = array.shape
    for axis, size in enumerate(shape):
        if array.shape[axis] != size:
            array = np.take(array, np.arange(size) % max(1, array.shape[axis]), axis)
    if array.dtype.kind == "f" and any(now > before for now, before in zip(array.shape[1:], kept[1:], strict=True)):
        with np.errstate(invalid="ignore"):
            measured = np.isfinite(array) & (array != np.round(array))
        factors = 1 - VARIATION[array.dtype.itemsize] * np.random.default_rng(0).random(array.shape[1:], np.float32)
        factors[tuple(map(slice, kept[1:]))] = 1  # the example itself
        array = np.where(measured, array * factors, array).astype(array.dtype)
    return np.require(array, requirements="C")  # ascontiguousarray makes a vector of a scalar


def make_cases(example: Mapping[str, Array], sets: Sequence[Profiles]) -> list[Case]:
    """The example and, where axes are dynamic, the same values at the min and max shapes of each profile."""
    cases = [Case("example", dict(example))]
    for number, profiles in enumerate(sets):
        for which in ("min", "max"):
            feeds = {name: resized(array, getattr(profiles[name], which)) for name, array in example.items()}
            if all(not _same_shapes(feeds, case.feeds) for case in cases):
                cases.append(Case(which if len(sets) == 1 else f"profile {number} {which}", feeds))
    return cases


def with_numbers_that_fit(case: Case, example: Case) -> Iterator[tuple[int, Case]]:
    """``case`` with no whole number above the smallest axis that is shorter than the example's, then with none that
    reaches it: lengths and places along such an axis, where it has become too short for them. With the largest number.
    """
    shorter = [
        now
        for name, array in case.feeds.items()
        for now, before in zip(array.shape, example.feeds[name].shape, strict=True)
        if now < before
    ]
    for most in (min(shorter), max(0, min(shorter) - 1)) if shorter else ():
        feeds = {
            name: np.minimum(array, array.dtype.type(most)) if array.dtype.kind in "iu" else array
            for name, array in case.feeds.items()
        }
        yield most, Case(case.name, feeds)


def with_other_values(case: Case) -> Iterator[Case]:
    """``case`` with other numbers of the same signs and sizes: those of each input in another order, the real ones more
    or less large; then, for who wants an order or whole numbers as they are, the real ones larger by a quarter."""
    random = np.random.default_rng(0)

    def times(array: Array, factors: Any) -> Array:
        return array if array.dtype.kind in "iub" else np.asarray(array * factors).astype(array.dtype)

    def moved(array: Array) -> Array:
        mixed = random.permuted(array.reshape(-1)).reshape(array.shape)
        return times(mixed, random.uniform(0.5, 1.5, array.shape))

    def larger(array: Array) -> Array:
        return times(array, 1.25)

    for other in (moved, larger):
        yield Case(case.name, {name: other(array) for name, array in case.feeds.items()})


def with_one_row(case: Case) -> Case:
    """``case`` with the first row of each input in the place of all, but for a thousandth, by which torch and others
    put them in the same order; of whole numbers, and of a vector, with the first one."""
    random = np.random.default_rng(0)

    def alike(array: Array) -> Array:
        if not array.size:
            return array
        whole = array.dtype.kind in "iub"
        row = array.reshape(-1)[0] if whole or array.ndim < 2 else array.reshape(-1, array.shape[-1])[0]
        rows = np.broadcast_to(row, array.shape)
        return np.array(rows if whole else (rows * random.uniform(1, 1.001, array.shape)).astype(array.dtype))

    return Case(case.name, {name: alike(array) for name, array in case.feeds.items()})


def with_padding(case: Case) -> Case | None:
    """``case`` with the end of each mask of ones alone masked; None where it has no such mask."""

    def is_mask(array: Array) -> bool:
        return array.dtype.kind in "iub" and array.ndim > 0 and array.shape[-1] > 1 and bool((array == 1).all())

    def padded(array: Array) -> Array:
        keep = np.arange(array.shape[-1]) < array.shape[-1] - 1
        return np.where(keep, array, array.dtype.type(0))

    feeds = {name: padded(array) if is_mask(array) else array for name, array in case.feeds.items()}
    return Case(case.name, feeds) if any(is_mask(array) for array in case.feeds.values()) else None


def _same_shapes(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return all(a[name].shape == b[name].shape for name in a)
