"""How the engine's tensors are found among the arguments of a call, and made into what the module would return."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import RunError
from .flattener import Flattener
from .launch import Launches
from .structure import CONSTANTS, Branch, equal, flat_taker, flat_tuple, has_tensor, make

_MISSING = object()


@dataclass(frozen=True)
class Parameters:
    """The parameters of a ``forward``, by name and kind; no default values."""

    positional: tuple[str, ...] = ()
    """Those that a positional argument may go to, in order."""
    positional_only: frozenset[str] = frozenset()
    keyword_only: tuple[str, ...] = ()
    rest: str | None = None
    """The name of ``*args``."""
    keywords: str | None = None
    """The name of ``**kwargs``."""

    @classmethod
    def read(cls, words: Sequence[str]) -> Parameters:
        """Of what Python writes between the brackets: ``("x", "/", "mask", "*", "scale", "**more")``."""
        before: list[str] = []
        only: list[str] = []
        after: list[str] = []
        rest = keywords = None
        current = before
        for word in words:
            if word == "/":
                only = list(before)
            elif word.startswith("**"):
                keywords = word[2:]
            elif word.startswith("*"):
                rest, current = word[1:] or None, after
            else:
                current.append(word)
        return cls(tuple(before), frozenset(only), tuple(after), rest, keywords)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter; what ``**kwargs`` takes under its own name. Raises RunError in Python's words."""
        if len(args) > len(self.positional) and self.rest is None:
            count = len(self.positional)
            takes = f"{count} positional argument{'s' * (count != 1)}"
            raise RunError(
                f"forward() takes {takes} but {len(args)} {'was' if len(args) == 1 else 'were'} given{self}."
            )
        bound: dict[str, Any] = dict(zip(self.positional, args, strict=False))
        if self.rest is not None:
            bound[f"*{self.rest}"] = tuple(args[len(self.positional) :])
        for name, value in kwargs.items():
            if self.keywords is None:
                self._check_keyword(name)
            elif name in self.positional_only:  # a name that is free for **kwargs
                bound[f"{self.keywords}[{name!r}]"] = value
                continue
            if name in bound:
                raise RunError(f"forward() got multiple values for argument {name!r}.")
            bound[name] = value
        return bound

    def _check_keyword(self, name: str) -> None:
        if name in self.positional_only:
            raise RunError(f"forward() got a positional-only argument passed as keyword argument: {name!r}.")
        if name not in self.positional and name not in self.keyword_only:
            near = difflib.get_close_matches(name, (*self.positional, *self.keyword_only), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RunError(f"forward() got an unexpected keyword argument {name!r}{self}.{hint}")

    def __str__(self) -> str:
        names = ", ".join((*self.positional, *self.keyword_only)) or "none"
        return f"; its parameters are {names}"


def parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters of a function, as ``Parameters.read`` takes them."""
    words: list[str] = []
    kinds = inspect.Parameter
    parameters = list(inspect.signature(forward).parameters.values())
    for place, parameter in enumerate(parameters):
        before = parameters[place - 1].kind if place else None
        if before is kinds.POSITIONAL_ONLY and parameter.kind is not before:
            words.append("/")
        if parameter.kind is kinds.KEYWORD_ONLY and before not in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL):
            words.append("*")
        words.append(str(parameter.replace(default=kinds.empty, annotation=kinds.empty)))  # with its stars
    if parameters and parameters[-1].kind is kinds.POSITIONAL_ONLY:
        words.append("/")
    return tuple(words)


def _as_they_are(tensors: Sequence[torch.Tensor]) -> Any:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _never(arguments: Any) -> None:
    return None


def _some(take: Callable[[Any], list[Any] | None], places: Sequence[int], arguments: Any) -> list[Any] | None:
    flat = take(arguments)
    return None if flat is None else [flat[place] for place in places]


@dataclass
class Calling:
    """From a call's arguments to the engine's inputs, and from its outputs to what the module would return.

    An omitted parameter is what it was at conversion: an engine has its constants built in.
    """

    parameters: tuple[str, ...]
    """Of the module's forward, as written between its brackets: ``("x", "*", "scale")``; empty where unknown."""
    inputs: Flattener | None
    """Of the example: a tuple of positional arguments, or a dict of arguments by name. None: arguments are tensors."""
    outputs: Flattener | None
    """Of what the module returned. None: one tensor, or a tuple of them."""
    names: tuple[str, ...]
    """Of the engine's inputs, in the order of ``flatten``."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Constants that parameters left out of the example have by default."""

    def __post_init__(self) -> None:
        root = self.inputs.root if self.inputs is not None else None
        self._root = root if isinstance(root, Branch) else None
        self._by_name = self._root is not None and issubclass(self._root.kind, Mapping)
        self._bind = Parameters.read(self.parameters) if self.parameters else self._unknown()
        self._take = self.inputs.take if self.inputs is not None else flat_taker(tuple, len(self.names))
        self.take: Callable[[Any], list[Any] | None] = _never if self._by_name else self._take
        """``flatten`` for positional arguments alone that are just as in the example; else None."""
        self.unflatten = self.outputs.unflatten if self.outputs is not None else _as_they_are
        """From the engine's outputs, in order, to what the module returns."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Calling, (self.parameters, self.inputs, self.outputs, self.names, dict(self.defaults))

    def _unknown(self) -> Parameters:
        """Where no signature says: arguments are called as the engine's inputs, where each is one."""
        if self._by_name:
            return Parameters(keyword_only=tuple(self._argument_names()))
        parts = len(self._root.children) if self._root is not None else len(self.names)
        plain = parts == len(self.names) and all(map(has_tensor, self._root.children if self._root is not None else ()))
        return Parameters(self.names if plain else tuple(f"argument {place}" for place in range(parts)))

    @classmethod
    def of(
        cls, forward: Callable[..., Any], inputs: Flattener, outputs: Flattener | None, names: Sequence[str]
    ) -> Calling:
        """Of a module's ``forward``, called with what ``inputs`` was read off."""
        defaults = {
            parameter.name: parameter.default
            for parameter in inspect.signature(forward).parameters.values()
            if isinstance(parameter.default, CONSTANTS)
        }
        made = cls(parameters_of(forward), inputs, outputs, tuple(names))
        given = made._argument_names()
        made.defaults = {name: value for name, value in defaults.items() if name not in given}
        return made

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: bool = False) -> list[Any]:
        """The tensors of a call, in the order of ``names``; with ``shapes``, there may be shapes in their place.

        Raises RunError where the call is not one that was converted.
        """
        if not kwargs and not self._by_name:
            flat = self._take(args)
        else:
            flat = self._take(kwargs) if self._by_name and not args else None
        return self._flatten_slowly(args, kwargs, shapes) if flat is None else flat

    def launches(
        self,
        hooks: tuple[Mapping[Any, Any], ...],
        tracing: Callable[[], Any],
        outputs: int,
        taken: Sequence[int] | None,
    ) -> Launches:
        """What makes calls like the ones before them, of an engine with so many outputs that takes these of the tensors
        (None: all). ``hooks`` and ``tracing`` are as ``Launches`` has them."""
        take: Callable[[Any], list[Any] | None] | None = self._take
        if taken is not None:
            take = functools.partial(_some, self._take, taken)
        elif self.inputs is None or self.inputs.is_arguments:
            take = None
        one = outputs == 1 if self.outputs is None else self.outputs.is_one_tensor
        names = None if self._by_name or self._bind.positional_only else tuple(self._argument_names())
        return Launches(hooks, take, None if one else self.unflatten, self._by_name, names, tracing)

    def loosened(self) -> Calling:
        """The same, where lists and tuples stand for one another, as they do in torch2trt."""
        if self.inputs is None:
            return self
        return replace(self, inputs=Flattener.of(self.inputs.root, self.inputs.size, loose=True))

    def pack(self) -> dict[str, Any]:
        """As plain values, for JSON and ``torch.load(weights_only=True)``."""
        defaults = Flattener.from_value(dict(self.defaults), lambda value: False)
        return {
            "parameters": list(self.parameters),
            "inputs": self.inputs.pack() if self.inputs is not None else None,
            "outputs": self.outputs.pack() if self.outputs is not None else None,
            "names": list(self.names),
            "defaults": defaults.pack(),
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Calling:
        """Of what ``pack`` wrote. Raises RunError where a class of the structures is not known in this process."""
        try:
            inputs, outputs = (
                Flattener.unpack(packed[key]) if packed[key] is not None else None for key in ("inputs", "outputs")
            )
            defaults = Flattener.unpack(packed["defaults"]).unflatten([])
            return cls(tuple(packed["parameters"]), inputs, outputs, tuple(packed["names"]), defaults)
        except (KeyError, TypeError) as error:
            raise RunError(f"Calling.unpack: this is not what pack wrote: {type(error).__name__}: {error}.") from error

    def _argument_names(self) -> list[str]:
        """What each part of the example was given to."""
        if self._root is None:
            return list(self.names)
        if self._by_name:
            return [str(key) for key in self._root.keys]
        names = list(self._bind.positional[: len(self._root.children)])
        more = len(self._root.children) - len(names)
        return names + [f"{self._bind.rest or 'argument '}[{index}]" for index in range(more)]

    def _flatten_slowly(self, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: bool) -> list[Any]:
        bound = self._bind.bind(args, kwargs)
        rest = bound.pop(f"*{self._bind.rest}", ())
        names = self._argument_names()
        if self.inputs is None or self._root is None:
            values = [self._given(bound, name) for name in names]
            if self.inputs is not None:
                return self.inputs.flatten(values[0], names, shapes)
            return Flattener.of(flat_tuple(len(names)), len(names)).flatten(tuple(values), names, shapes)
        count = len(self._root.children) if self._by_name else min(len(self._bind.positional), len(names))
        found = [self._given(bound, names[place], self._root.children[place]) for place in range(count)]
        if len(found) + len(rest) != len(names):
            raise RunError(
                f"forward() was given *{self._bind.rest} of length {len(rest)}, and at conversion of "
                f"{len(names) - len(found)}."
            )
        for name, value in bound.items():
            self._check_default(name, value)
        if self._by_name:
            return self.inputs.flatten(dict(zip(self._root.keys, found, strict=True)), names, shapes)
        return self.inputs.flatten(self._root.kind((*found, *rest)), names, shapes)

    def _given(self, bound: dict[str, Any], name: str, node: Any = None) -> Any:
        """The argument for one part of the example, taken out of ``bound``; else the constant that it was."""
        value = bound.pop(name, _MISSING)
        if value is not _MISSING:
            return value
        if node is None or has_tensor(node):
            raise RunError(f"forward() missing a required argument: {name!r}{self._bind}.")
        return make(node)

    def _check_default(self, name: str, value: Any) -> None:
        """Raises RunError where an argument that the example did not have is not what it was by default."""
        if name not in self.defaults:
            raise RunError(f"{name}: was left out at conversion, and the engine has no place for it; convert with it.")
        if not equal(self.defaults[name], value):
            given = repr(value) if isinstance(value, CONSTANTS) else f"a {type(value).__name__}"
            raise RunError(f"{name}: is {given}; the engine has {name}={self.defaults[name]!r} built in.")
