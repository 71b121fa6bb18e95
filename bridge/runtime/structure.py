"""What nested values are made of, read off an example and compiled into closures that take them apart and make them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..errors import RunError
from ..tensors import children_of

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""What is kept as it is and given back by ``unflatten``, after saving and loading too."""

MAPPINGS = (dict, OrderedDict, defaultdict)

_NAMEDTUPLES: Any = namedtuple  # the key that pytree has for all of them
Condition = Callable[[Any], bool]
Taker = Callable[[Any, list[Any]], bool]
"""Puts the tensors of a value into their places; False where the value is not of the structure."""
Maker = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Leaf:
    """A tensor, and its place in the flat list."""

    index: int
    is_complex: bool = False
    """Whether the flat list has it as a real tensor with a last axis of 2."""


@dataclass(frozen=True)
class Constant:
    """A value that the engine was built with."""

    value: Any


@dataclass(frozen=True)
class Anything:
    """What the flat list has nothing of: any value is taken, and None given back. torch2trt's ``None``."""


@dataclass(frozen=True)
class Branch:
    """A container: whatever torch's pytree takes apart."""

    kind: type
    context: Any
    """What pytree needs to put one together again."""
    keys: tuple[Any, ...]
    children: tuple[Node, ...]

    def step(self, key: Any) -> str:
        """``key`` as it is written in Python, behind the container's name."""
        return f".{key}" if isinstance(key, str) and not issubclass(self.kind, Mapping) else f"[{key!r}]"


Node = Leaf | Constant | Anything | Branch


def is_tensor(value: Any) -> bool:
    """What is a leaf by default: a tensor of any dtype, or a NumPy array, which ``bridge.convert`` takes for one."""
    return isinstance(value, (torch.Tensor, np.ndarray))


def structure_of(value: Any, condition: Condition, leaves: list[bool]) -> Node:
    if condition(value):
        leaves.append(True)
        return Leaf(len(leaves) - 1, isinstance(value, torch.Tensor) and value.is_complex())
    if isinstance(value, CONSTANTS):
        return Constant(value)
    parts = children_of(value)
    if parts is None:
        return Anything()
    keys, children, context = parts
    nodes = tuple(structure_of(child, condition, leaves) for child in children)
    return Branch(type(value), context, tuple(keys), nodes)


def from_schema(schema: Any) -> Node:
    if schema is None:
        return Anything()
    if isinstance(schema, int):
        return Leaf(schema)
    if isinstance(schema, Mapping):
        keys = tuple(schema)
        return Branch(dict, list(keys), keys, tuple(from_schema(schema[key]) for key in keys))
    if isinstance(schema, (tuple, list)):
        kind = tuple if isinstance(schema, tuple) else list
        return Branch(kind, None, tuple(range(len(schema))), tuple(map(from_schema, schema)))
    raise RunError(f"Flattener: {schema!r} is no schema; it is made of lists, tuples, dicts, int and None.")


def to_schema(node: Node) -> Any:
    if isinstance(node, Leaf):
        return node.index
    if not isinstance(node, Branch):
        return None
    children = [to_schema(child) for child in node.children]
    if node.kind is list:
        return children
    fields = not issubclass(node.kind, tuple) and all(isinstance(key, str) for key in node.keys)
    named = issubclass(node.kind, Mapping) or fields
    return dict(zip(node.keys, children, strict=True)) if named else tuple(children)


def has_tensor(node: Node) -> bool:
    """Whether there is a tensor anywhere in it."""
    return isinstance(node, Leaf) or (isinstance(node, Branch) and any(map(has_tensor, node.children)))


def flat_tuple(size: int) -> Branch:
    """A tuple of so many tensors."""
    return Branch(tuple, None, tuple(range(size)), tuple(map(Leaf, range(size))))


def is_flat(node: Branch, size: int) -> bool:
    """Whether it holds ``size`` tensors, in order, and nothing else."""
    return node.children == tuple(map(Leaf, range(size)))


def unkept(node: Node) -> list[str]:
    """Where there is Anything, as Python writes it."""
    if isinstance(node, Anything):
        return [""]
    if not isinstance(node, Branch):
        return []
    parts = zip(node.keys, node.children, strict=True)
    return [node.step(key) + place for key, child in parts for place in unkept(child)]


def merged(one: Node, other: Node) -> Node:
    if isinstance(one, Branch) and isinstance(other, Branch) and one.kind is other.kind and one.keys == other.keys:
        children = tuple(merged(a, b) for a, b in zip(one.children, other.children, strict=True))
        return Branch(one.kind, one.context, one.keys, children)
    if isinstance(one, (Constant, Anything)) and isinstance(other, (Constant, Anything)):
        return one if isinstance(one, Constant) and _same(one, other) else Anything()
    if isinstance(one, Leaf) and one == other:
        return one
    raise RunError("the two have different structures.")


def _same(one: Constant, other: Constant | Anything) -> bool:
    return isinstance(other, Constant) and equal(one.value, other.value)


def equal(one: Any, other: Any) -> bool:
    """Whether two constants are the same to a module: 2 and 2.0 are, NaN and NaN are, True and 1 are not."""
    if one is other:
        return True
    if isinstance(one, bool) is not isinstance(other, bool) or not isinstance(other, CONSTANTS):
        return False
    return bool(one == other or (one != one and other != other))


def make(node: Node) -> Any:
    """The value of a structure without tensors."""
    return maker_of(node, -1)([])


# --- taking apart ----------------------------------------------------------------------------------------------------


def flat_taker(kind: Any, size: int) -> Callable[[Any], list[Any] | None]:
    tensor = torch.Tensor

    def take(value: Any) -> list[Any] | None:
        if type(value) is not kind or len(value) != size:
            return None
        for item in value:
            if not isinstance(item, tensor):
                return None
        return list(value)

    return take


def taker_of(node: Node, condition: Condition | None, loose: bool) -> Taker:
    if isinstance(node, Anything):
        return lambda value, out: True
    if isinstance(node, Constant):
        constant = node.value
        return lambda value, out: value is constant or equal(constant, value)
    if isinstance(node, Leaf):
        return _leaf_taker(node.index, condition)
    takers = [taker_of(child, condition, loose) for child in node.children]
    if node.kind in MAPPINGS:
        return _mapping_taker(node.kind, list(zip(node.keys, takers, strict=True)))
    if node.kind in (tuple, list):
        return _sequence_taker((tuple, list) if loose else (node.kind,), takers)
    return _class_taker(node.kind, node.context, takers)


def _leaf_taker(index: int, condition: Condition | None) -> Taker:
    if condition is not None:

        def take_any(value: Any, out: list[Any]) -> bool:
            out[index] = value
            return condition(value)

        return take_any
    tensor = torch.Tensor

    def take(value: Any, out: list[Any]) -> bool:
        out[index] = value
        return isinstance(value, tensor)

    return take


def _sequence_taker(kinds: tuple[type, ...], takers: list[Taker]) -> Taker:
    size = len(takers)

    def take(value: Any, out: list[Any]) -> bool:
        if type(value) not in kinds or len(value) != size:
            return False
        for taker, item in zip(takers, value):  # noqa: B905, SIM110 - of the same length; all() takes twice the time
            if not taker(item, out):
                return False
        return True

    return take


def _mapping_taker(kind: Any, takers: list[tuple[Any, Taker]]) -> Taker:
    size, missing = len(takers), object()

    def take(value: Any, out: list[Any]) -> bool:
        if type(value) is not kind or len(value) != size:
            return False
        for key, taker in takers:
            item = value.get(key, missing)
            if item is missing or not taker(item, out):
                return False
        return True

    return take


def _class_taker(kind: type, context: Any, takers: list[Taker]) -> Taker:
    flatten = _definition(kind).flatten_fn

    def take(value: Any, out: list[Any]) -> bool:
        if type(value) is not kind:
            return False
        children, found = flatten(value)
        if found != context:
            return False
        return all(taker(item, out) for taker, item in zip(takers, children, strict=True))

    return take


def _definition(kind: type) -> Any:
    return pytree.SUPPORTED_NODES[_NAMEDTUPLES if pytree.is_namedtuple_class(kind) else kind]


# --- putting together ------------------------------------------------------------------------------------------------


def maker_of(node: Node, size: int) -> Maker:
    if isinstance(node, Anything):
        return lambda flat: None
    if isinstance(node, Constant):
        constant = node.value
        return lambda flat: constant
    if isinstance(node, Leaf):
        index = node.index
        if node.is_complex:
            return lambda flat: torch.view_as_complex(flat[index].contiguous())
        return lambda flat: flat[index]
    kind = node.kind
    if kind in (tuple, list) and node.children and is_flat(node, size):
        return kind  # of all tensors, as they are
    makers = [maker_of(child, -1) for child in node.children]
    if kind is tuple:
        return lambda flat: tuple([maker(flat) for maker in makers])
    if kind is list:
        return lambda flat: [maker(flat) for maker in makers]
    if kind is dict:
        items = list(zip(node.keys, makers, strict=True))
        return lambda flat: {key: maker(flat) for key, maker in items}
    context, unflatten = node.context, _definition(kind).unflatten_fn
    return lambda flat: unflatten([maker(flat) for maker in makers], context)
