"""What an export took for granted of dynamic sizes, and allowed shapes where that does not hold.

torch.export follows one run. Where the code asks something of a size, as by ``if height % 8``, the answer of that run
is in the program, which is the module's only where the same answers are given; torch keeps these as guards, and nothing
asks them of an ONNX model. Example, min and max may well give the same answers, and a shape between them another.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any

from .inputs import Case, Profile, resized

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, Sequence[int]]

STEPS = 256
"""Shapes from min to max that the guards are asked about."""

MOST = 4
"""Shapes beyond the example, min and max that are tried."""


@dataclass(frozen=True)
class Assumed:
    guards: dict[str, CodeType]
    """By what they say."""

    symbols: dict[str, tuple[str, int]]
    """The first input and axis whose size each symbol stands for; that others are as long is a guard too."""

    @classmethod
    def of(cls, program: torch.export.ExportedProgram, inputs: Sequence[str]) -> Assumed:
        """What it says of the sizes of its ``inputs``."""
        from torch.utils._sympy.printers import PythonPrinter

        taken = set(program.graph_signature.user_inputs)
        values = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder") if node.name in taken]
        sizes = [
            (name, axis, size.node)
            for name, value in zip(inputs, values, strict=True)
            for axis, size in enumerate(getattr(value, "shape", ()))
            if not isinstance(size, int)
        ]
        if not sizes:
            return cls({}, {})
        symbols: dict[str, tuple[str, int]] = {}
        for name, axis, node in sizes:
            if node.expr.is_symbol:
                symbols.setdefault(str(node.expr), (name, axis))

        def known(expr: Any) -> bool:
            return {str(symbol) for symbol in expr.free_symbols} <= set(symbols)

        def named(word: re.Match[str]) -> str:
            return "{}.shape[{}]".format(*symbols[word[0]]) if word[0] in symbols else word[0]

        printed, env = PythonPrinter().doprint, sizes[0][2].shape_env
        deferred = itertools.chain.from_iterable(env.deferred_runtime_asserts.values())
        asked = [printed(guard.expr) for guard in (*env.guards, *deferred) if known(guard.expr)]
        guards = {re.sub(r"\w+", named, code): code for code in asked}
        for name, axis, node in sizes:
            if symbols.get(str(node.expr)) != (name, axis) and known(node.expr):
                code = printed(node.expr)
                guards[f"{name}.shape[{axis}] == " + re.sub(r"\w+", named, code)] = (
                    f"shapes[{name!r}][{axis}] == {code}"
                )
        return cls({words: compile(code, "<guard>", "eval") for words, code in guards.items()}, symbols)

    def broken(self, shapes: Shapes) -> set[str]:
        """What does not hold there, in words."""
        from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

        known = {**SYMPY_INTERP, "math": math, "shapes": shapes}
        known.update((symbol, shapes[name][axis]) for symbol, (name, axis) in self.symbols.items())
        return {words for words, code in self.guards.items() if not _holds(code, known)}

    def elsewhere(self, cases: Sequence[Case], sets: Sequence[Mapping[str, Profile]]) -> list[Case]:
        """Allowed shapes, the smallest first, where something does not hold that holds in all ``cases``."""
        seen = set().union(*(self.broken(shapes_of(case)) for case in cases))
        found: list[Case] = []
        for profiles in sets if self.guards else ():
            for shapes in _between(profiles):
                broken = self.broken(shapes) - seen
                if broken and len(found) < MOST:
                    seen |= broken
                    found.append(_case_of(shapes, cases[0], profiles))
        return found


def most_general(seen: Sequence[Assumed], example: Case, sets: Sequence[Mapping[str, Profile]]) -> Case | None:
    """The allowed shapes where most does not hold of what exports took for granted, and some of the last one's; among
    these not the small ones, which have ways of their own. None where all of the last one's holds everywhere."""
    best: tuple[int, int] = (0, 0)
    found: Case | None = None
    for profiles in sets:
        dynamic = [(name, axis) for name, item in profiles.items() for axis in item.dynamic_axes]
        for shapes in (*_between(profiles), *_scattered(profiles), {name: item.max for name, item in profiles.items()}):
            if not seen[-1].broken(shapes):
                continue
            smallest = min((shapes[name][axis] for name, axis in dynamic), default=0)
            score = sum(len(item.broken(shapes)) for item in seen), smallest
            if score > best:
                best, found = score, _case_of(shapes, example, profiles)
    return found


def _case_of(shapes: Shapes, example: Case, profiles: Mapping[str, Profile]) -> Case:
    feeds = {name: resized(array, shapes[name]) for name, array in example.feeds.items()}
    return Case(in_words(shapes, profiles), feeds)


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in case.feeds.items()}


def in_words(shapes: Shapes, profiles: Mapping[str, Profile]) -> str:
    return ", ".join(f"{name} {list(shapes[name])}" for name, item in profiles.items() if item.dynamic_axes)


def _holds(code: CodeType, known: dict[str, Any]) -> bool:
    try:
        return bool(eval(code, known))  # torch's own words, of sizes alone
    except ZeroDivisionError:
        return False
    except (NameError, TypeError, ValueError):
        return True  # of a torch that says it in other words


def _between(profiles: Mapping[str, Profile]) -> Iterator[Shapes]:
    """All axes grow together from min to max, as sizes that belong together do; of a single dynamic input, some also
    shrink while others grow."""
    ends = {name: list(zip(item.min, item.max, strict=True)) for name, item in profiles.items()}
    steps = min(max((high - low for sizes in ends.values() for low, high in sizes), default=0), STEPS)
    for opposite in (False, True) if _alone(profiles) else (False,):
        for step in range(1, steps):
            parts = (step, steps - step if opposite else step)  # of axes with an even, an odd number
            yield {
                name: [low + round((high - low) * parts[axis % 2] / steps) for axis, (low, high) in enumerate(sizes)]
                for name, sizes in ends.items()
            }


def _scattered(profiles: Mapping[str, Profile]) -> Iterator[Shapes]:
    """Of a single dynamic input, each axis by itself."""
    draw = random.Random(0).randint
    for _ in range(STEPS // 2 if _alone(profiles) else 0):
        yield {name: [draw(*ends) for ends in zip(item.min, item.max, strict=True)] for name, item in profiles.items()}


def _alone(profiles: Mapping[str, Profile]) -> bool:
    return sum(bool(item.dynamic_axes) for item in profiles.values()) == 1
