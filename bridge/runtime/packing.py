"""Structures as plain values, which JSON and ``torch.load(weights_only=True)`` take, and back.

What is read may come from anyone: nothing is imported and nothing called but what puts together the containers that
torch's pytree knows in this process, and namedtuples of modules that are loaded.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import RunError
from .flattener import Flattener
from .structure import Anything, Branch, Constant, Leaf, Node

_BUILTINS: Mapping[str, type] = {
    f"builtins:{kind.__name__}": kind for kind in (tuple, list, dict, set, int, float, str, bool)
}


def pack_flattener(flattener: Flattener) -> dict[str, Any]:
    return {"size": flattener.size, "loose": flattener.loose, "structure": _pack(flattener.root)}


def unpack_flattener(packed: Mapping[str, Any]) -> Flattener:
    if "schema" in packed:
        return Flattener.from_dict(packed)
    try:
        size, root = int(packed["size"]), _unpack(packed["structure"])
        loose = bool(packed["loose"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RunError(f"Flattener.unpack: this is not what pack wrote: {type(error).__name__}: {error}.") from error
    places = sorted(_places(root))
    if places != list(range(size)):
        raise RunError(f"Flattener.unpack: the structure has the tensors {places}, and should have {size}.")
    return Flattener.of(root, size, loose)


def _places(node: Node) -> list[int]:
    if isinstance(node, Leaf):
        return [node.index]
    return [place for child in node.children for place in _places(child)] if isinstance(node, Branch) else []


# --- nodes -----------------------------------------------------------------------------------------------------------


def _pack(node: Node) -> dict[str, Any]:
    if isinstance(node, Leaf):
        return {"tensor": node.index, "complex": node.is_complex}
    if isinstance(node, Anything):
        return {"anything": True}
    if isinstance(node, Constant):
        return {"constant": _pack_value(node.value)}
    return {
        "container": _class_name(node.kind),
        "namedtuple": list(node.kind._fields) if pytree.is_namedtuple_class(node.kind) else None,  # type: ignore[attr-defined]
        "context": None if pytree.is_namedtuple_class(node.kind) else _pack_value(node.context),
        "keys": [_pack_value(key) for key in node.keys],
        "children": [_pack(child) for child in node.children],
    }


def _unpack(packed: Mapping[str, Any]) -> Node:
    if "tensor" in packed:
        return Leaf(int(packed["tensor"]), bool(packed["complex"]))
    if "anything" in packed:
        return Anything()
    if "constant" in packed:
        return Constant(_unpack_value(packed["constant"]))
    keys = tuple(_unpack_value(key) for key in packed["keys"])
    children = tuple(_unpack(child) for child in packed["children"])
    if len(keys) != len(children):
        raise ValueError(f"{len(keys)} keys for {len(children)} children")
    name = packed["container"]
    if packed["namedtuple"] is not None:
        kind = _namedtuple(name, packed["namedtuple"])
        return Branch(kind, kind, keys, children)
    return Branch(_registered(name), _unpack_value(packed["context"]), keys, children)


# --- classes ---------------------------------------------------------------------------------------------------------


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _registered(name: str) -> type:
    for kind in pytree.SUPPORTED_NODES:
        if isinstance(kind, type) and _class_name(kind) == name:
            return kind
    raise RunError(
        f"the saved structure has a {name.replace(':', '.')}, which torch's pytree does not know in this process: "
        f"{_import_first(name)}, and register the class (torch.export.register_dataclass) where that does not."
    )


def _namedtuple(name: str, fields: list[str]) -> type:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and pytree.is_namedtuple_class(found)):
        raise RunError(f"the saved structure has a namedtuple {name.replace(':', '.')}: {_import_first(name)}.")
    if list(found._fields) != fields:  # type: ignore[attr-defined]
        raise RunError(f"{name.replace(':', '.')} has not the fields {', '.join(fields)} that it was saved with.")
    return found


def _import_first(name: str) -> str:
    module, _, path = name.partition(":")
    if "<locals>" in path:
        return f"it was defined inside a function, and is not found again; define it at the top of {module}"
    return f"import {module} before you load it"


# --- values ----------------------------------------------------------------------------------------------------------


def _pack_value(value: Any) -> Any:
    """A constant, a key or a context. Plain scalars stand for themselves, all else is ``{kind: …}``."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return {"float": repr(float(value))}  # JSON has no NaN and no infinity
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_pack_value(item) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_pack_value(key), _pack_value(item)] for key, item in value.items()]}
    if isinstance(value, type):
        return {"class": _class_name(value)}
    if isinstance(value, (int, str)):  # enum members that are numbers or words
        return _pack_value(int(value) if isinstance(value, int) else str.__str__(value))
    raise RunError(
        f"a structure with {value!r} (a {type(value).__qualname__}) in it cannot be saved: keys and contexts are "
        "numbers, words, tuples, lists, dicts and classes."
    )


def _unpack_value(packed: Any) -> Any:
    if not isinstance(packed, Mapping):
        return packed
    ((kind, value),) = packed.items()
    if kind == "float":
        return float(value)
    if kind == "complex":
        return complex(float(value[0]), float(value[1]))
    if kind == "bytes":
        return base64.b64decode(value)
    if kind == "device":
        return torch.device(value)
    if kind == "dtype":
        found = getattr(torch, value, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{value!r} is no dtype of torch")
        return found
    if kind in ("tuple", "list"):
        items = [_unpack_value(item) for item in value]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {_unpack_value(key): _unpack_value(item) for key, item in value}
    if kind == "class":
        return _BUILTINS[value] if value in _BUILTINS else _registered(value)
    raise ValueError(f"{kind!r} is no kind of value")
