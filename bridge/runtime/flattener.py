"""Nested values of tensors as flat lists, and back: what a module takes and returns, beside what its engine does.

A structure is read off an example once and compiled into closures; a value that does not fit it is looked at a second
time, slowly, for the words of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import RunError
from ..tensors import children_of
from .structure import (
    CONSTANTS,
    MAPPINGS,
    Branch,
    Condition,
    Constant,
    Leaf,
    Node,
    equal,
    flat_taker,
    from_schema,
    is_flat,
    is_tensor,
    maker_of,
    merged,
    structure_of,
    taker_of,
    to_schema,
    unkept,
)

Plain = dict[str, Any]


class _Misfit(Exception):
    """A value that is not of the structure: ``say`` makes a sentence of the place's name."""

    def __init__(self, path: tuple[str, ...], say: Callable[[str], str]) -> None:
        super().__init__(path)
        self.path, self.say = path, say


class Flattener:
    """torch2trt's Flattener, for all that torch's pytree takes apart, all dtypes, and the constants between.

    The order of the tensors is that of the containers, dicts in the order in which they were filled; it is the order
    of the engine's inputs and outputs. A saved schema of torch2trt's, which sorts the keys of dicts, keeps its own.
    """

    def __init__(self, schema: Any, size: int) -> None:
        """``schema``: nested lists, tuples and dicts with the place of each tensor, and None for what is none."""
        self._setup(from_schema(schema), size, loose=True)

    def _setup(self, root: Node, size: int, loose: bool = False, condition: Condition | None = None) -> None:
        self._root, self._size, self._loose, self._condition = root, size, loose, condition
        self.take = self._compiled_take()
        """The tensors of a value that is exactly of the structure, in a few hundred nanoseconds; else None."""
        self._make = maker_of(root, size)
        self.is_one_tensor = isinstance(root, Leaf) and not root.is_complex
        kinds = (tuple, list) if loose else (tuple,)
        self.is_arguments = (
            condition is None and isinstance(root, Branch) and root.kind in kinds and is_flat(root, size)
        )
        """Whether it is a tuple of tensors and nothing else, in the order of ``flatten``."""

    @classmethod
    def of(cls, root: Node, size: int, loose: bool = False) -> Flattener:
        """A Flattener of a structure; ``loose``: lists and tuples stand for one another."""
        made = cls.__new__(cls)
        made._setup(root, size, loose)
        return made

    @classmethod
    def from_value(cls, value: Any, condition: Condition | None = None) -> Flattener:
        """Reads the structure off an example. ``condition`` says what is a leaf; by default each tensor is.

        What is neither a leaf nor a constant is taken for ``Anything``: ``unflatten`` gives None in its place.
        """
        leaves: list[bool] = []
        root = structure_of(value, condition or is_tensor, leaves)
        made = cls.__new__(cls)
        made._setup(root, len(leaves), condition=condition)
        return made

    @staticmethod
    def from_dict(x: Mapping[str, Any]) -> Flattener:
        """Of what ``dict`` or torch2trt's own ``Flattener.dict`` wrote."""
        return Flattener(x["schema"], x["size"])

    def dict(self) -> Plain:
        """``{'schema', 'size'}``, as torch2trt writes it: classes become dicts and tuples, constants None."""
        return {"schema": self.schema, "size": self.size}

    @property
    def schema(self) -> Any:
        return to_schema(self._root)

    @property
    def size(self) -> int:
        return self._size

    @property
    def root(self) -> Node:
        return self._root

    @property
    def loose(self) -> bool:
        return self._loose

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Flattener):
            return NotImplemented
        return (self._root, self._size, self._loose) == (other._root, other._size, other._loose)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Flattener({self.schema!r}, {self.size})"

    def __getstate__(self) -> tuple[Any, ...]:
        return self._root, self._size, self._loose, self._condition

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._setup(*state)

    def flatten(self, value: Any, names: Sequence[str] = (), shapes: bool = True) -> list[Any]:
        """The tensors of ``value`` in order; or shapes, where it has a torch.Size, tuple or list of int in their place.

        ``names`` are what the outermost parts are called in errors; without ``shapes``, only tensors will do. Raises
        RunError where ``value`` has not the structure of the example: other keys, another length or container,
        another constant, no tensor.
        """
        flat = self.take(value)
        return self._read(value, names, shapes) if flat is None else flat

    def unflatten(self, flat: Sequence[Any]) -> Any:
        """A value like the example, with the tensors of ``flat``. Raises RunError for another number of them."""
        if len(flat) != self._size:
            raise RunError(f"unflatten: {len(flat)} tensors for a structure of {self._size}.")
        return self._make(flat)

    def pack(self) -> Plain:
        """As plain values, for JSON and ``torch.load(weights_only=True)``. Raises RunError where it holds others."""
        from .packing import pack_flattener

        return pack_flattener(self)

    @staticmethod
    def unpack(packed: Mapping[str, Any]) -> Flattener:
        """Of what ``pack`` wrote. Imports nothing: raises RunError where a class of the structure is not known yet."""
        from .packing import unpack_flattener

        return unpack_flattener(packed)

    def without_varying(self, other: Flattener) -> Flattener:
        """This structure, with Anything where ``other`` has another constant. Raises RunError for other structures."""
        return Flattener.of(merged(self._root, other._root), self._size, self._loose)

    def lost(self, name: str) -> list[str]:
        """The places where ``unflatten`` gives None for what was neither a tensor nor a constant."""
        return [name + place for place in unkept(self._root)]

    def _compiled_take(self) -> Callable[[Any], list[Any] | None]:
        root, size = self._root, self._size
        if self._condition is None and isinstance(root, Branch) and root.kind in (tuple, list) and is_flat(root, size):
            return flat_taker(tuple if self._loose else root.kind, size)  # loose: the arguments of a call are a tuple
        taker = taker_of(root, self._condition, self._loose)

        def take(value: Any) -> list[Any] | None:
            out = [None] * size
            return out if taker(value, out) else None

        return take

    def _read(self, value: Any, names: Sequence[str], shapes: bool) -> list[Any]:
        reader = _Reader(self._condition, self._loose, [None] * self._size, shapes)
        first = _first_names(self._root, names)
        try:
            reader.read(self._root, value, (), first)
            if reader.forgiven is not None and (reader.tensors or not reader.shapes):
                raise reader.forgiven
        except _Misfit as misfit:
            place = "".join(misfit.path)
            raise RunError(
                misfit.say(place if names and place else f"value{place}" if place else "the value")
            ) from None
        return reader.out


def _first_names(root: Node, names: Sequence[str]) -> Mapping[Any, str]:
    return dict(zip(root.keys, names, strict=False)) if isinstance(root, Branch) else {}


# --- the slow way ----------------------------------------------------------------------------------------------------


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(size) is int or isinstance(size, np.integer) for size in value)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, CONSTANTS) else f"a {type(value).__name__}"
    return text if len(text) < 80 else f"{text[:77]}..."


class _Reader:
    """Takes a value apart as the closures do, and says where it does not fit.

    ``forgiven`` is the first misfit that does not matter among shapes, which torch2trt takes from lists and tuples
    alike, with anything in the place of a constant.
    """

    def __init__(self, condition: Condition | None, loose: bool, out: list[Any], take_shapes: bool) -> None:
        self.condition, self.loose, self.out, self.take_shapes = condition, loose, out, take_shapes
        self.forgiven: _Misfit | None = None
        self.shapes = self.tensors = 0

    def read(self, node: Node, value: Any, path: tuple[str, ...], names: Mapping[Any, str]) -> None:
        if isinstance(node, Leaf):
            self._leaf(node, value, path)
        elif isinstance(node, Constant) and not equal(node.value, value):
            built_in = repr(node.value)
            words = f"is {_short(value)}; the engine has"
            self._forgive(path, lambda place: f"{place}: {words} {place}={built_in} built in.")
        elif isinstance(node, Branch):
            children = self._children(node, value, path)
            for key, child in zip(node.keys, node.children, strict=True):
                self.read(child, children[key], (*path, names.get(key, node.step(key))), {})

    def _leaf(self, node: Leaf, value: Any, path: tuple[str, ...]) -> None:
        tensor = self.condition(value) if self.condition is not None else isinstance(value, torch.Tensor)
        if not tensor and not (self.take_shapes and _is_shape(value)):
            more = "; make a tensor of it" if isinstance(value, np.ndarray) else ""
            shape = " or a shape of whole numbers" if self.take_shapes and isinstance(value, (tuple, list)) else ""
            raise _Misfit(path, lambda place: f"{place}: is {_short(value)}, where a tensor{shape} belongs{more}.")
        self.tensors += tensor
        self.shapes += not tensor
        self.out[node.index] = value

    def _forgive(self, path: tuple[str, ...], say: Callable[[str], str]) -> None:
        self.forgiven = self.forgiven or _Misfit(path, say)

    def _children(self, node: Branch, value: Any, path: tuple[str, ...]) -> Mapping[Any, Any]:
        sequences = node.kind in (tuple, list) and type(value) in (tuple, list)
        if type(value) is not node.kind and not (sequences and self.loose):
            given, kind = _short(value), node.kind.__name__
            what = (path, lambda place: f"{place}: is {given}, where the example has a {kind}.")
            if not sequences:
                raise _Misfit(*what)
            self._forgive(*what)
        if node.kind in MAPPINGS:
            return self._same_keys(node, dict(value), path)
        parts = children_of(value)
        assert parts is not None  # its type is the example's
        keys, children, context = parts
        if len(children) != len(node.children) and node.kind in (tuple, list):
            here, before = len(children), len(node.children)
            raise _Misfit(path, lambda place: f"{place}: has {here} elements, and the example has {before}.")
        found = self._same_keys(node, dict(zip(keys, children, strict=True)), path)
        if node.kind not in (tuple, list) and context != node.context:
            raise _Misfit(
                path, lambda place: f"{place}: a {node.kind.__name__} with {context!r}, and with {node.context!r} then."
            )
        return found

    @staticmethod
    def _same_keys(node: Branch, found: dict[Any, Any], path: tuple[str, ...]) -> dict[Any, Any]:
        missing = [key for key in node.keys if key not in found]
        extra = [key for key in found if key not in node.keys]
        named = ((missing, "missing"), (extra, "not expected"))
        words = [f"{', '.join(map(repr, keys))} {what}" for keys, what in named if keys]
        if words:
            has = ", ".join(map(repr, node.keys)) or "nothing"
            raise _Misfit(path, lambda place: f"{place}: {' and '.join(words)}; the example has {has}.")
        return found
