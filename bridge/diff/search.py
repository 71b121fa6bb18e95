"""The search for few nodes that have to be raised to a higher precision, in few trials; it knows no model.

Steps are ranked by what they are believed to help. The shortest sequence of them that suffices is found first; its last
step is then necessary, and the sequence before it is shortened in the same way, until what is necessary suffices by
itself (QuickXplain's idea: U. Junker, AAAI 2004). Single nodes of what is left are then dropped (delta debugging:
A. Zeller, R. Hildebrandt, IEEE TSE 28(2), 2002). Whatever is returned has been tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Raised = Mapping[str, str]
"""By node, the precision that it is raised to: ``fp32`` or the 16-bit type."""

HIGHEST = "fp32"
SOONEST = 4
"""Trials in which the sequence grows from its first length to all steps."""


@dataclass(frozen=True)
class Step:
    """Nodes that are raised together, since the one without the other would not help."""

    nodes: tuple[str, ...]
    precision: str = HIGHEST
    sensitivity: float = 0.0
    """What share of the output's error comes from here, up to a common factor; infinite where it is not finite."""
    reason: str = ""


class Verdict(Protocol):
    """What a trial gave."""

    @property
    def ok(self) -> bool: ...

    @property
    def error(self) -> float:
        """As a share of the tolerance; infinite where the outputs are not finite."""
        ...


class Exhausted(Exception):
    """No trial is left."""


@dataclass
class Search:
    """One search; ``trial`` is what costs."""

    steps: Sequence[Step]
    """Best first."""
    trial: Callable[[Raised], Verdict]
    limit: int
    """How many trials there may be, those of ``known`` included."""
    known: dict[frozenset[tuple[str, str]], Verdict] = field(default_factory=dict)
    best: dict[str, str] | None = None
    """The smallest set that was seen to suffice."""
    minimal: bool = False
    """Whether it was seen that none of its nodes can be left out."""

    @property
    def used(self) -> int:
        return len(self.known)

    def run(self) -> None:
        """Looks for ``best``, which stays None where all steps together do not suffice, or no trial was left."""
        try:
            found = self._sufficient()
            if found is not None:
                self._shortened(*found)
                self._without_single_nodes()
        except Exhausted:
            return

    def suffices(self, raised: Raised) -> bool:
        """Tries a set, unless that has been done. Raises Exhausted where no trial is left."""
        key = frozenset(raised.items())
        if key not in self.known:
            if self.used >= self.limit:
                raise Exhausted
            self.known[key] = self.trial(raised)
        ok = self.known[key].ok
        if ok and (self.best is None or _size(raised) < _size(self.best)):
            self.best = dict(raised)
        return ok

    def _sufficient(self) -> tuple[int, int] | None:
        """How many steps did not suffice, and how many did."""
        count = len(self.steps)
        if not count:
            return None
        length, failed = self._first_length(), 0
        left = max(1, min(SOONEST, self.limit - self.used - 1))
        factor = max(2.0, (count / length) ** (1 / left))
        while True:
            if self.used == self.limit - 1:
                length = count  # the last trial tells whether anything helps
            if self.suffices(merged(self.steps[:length])):
                return failed, length
            if length == count:
                return None
            failed, length = length, min(count, math.ceil(length * factor))

    def _first_length(self) -> int:
        """How many steps should suffice, if errors add up as those of independent roundings do."""
        certain = sum(math.isinf(step.sensitivity) for step in self.steps)
        before = self.suffices_nothing()
        if certain or not math.isfinite(before):
            return max(1, certain)
        squares = [step.sensitivity**2 for step in self.steps]
        left, total = sum(squares), sum(squares)
        for length, square in enumerate(squares):
            if length and left <= total / before**2:
                return length
            left -= square
        return len(self.steps)

    def suffices_nothing(self) -> float:
        """The error where nothing is raised, if that is known."""
        found = self.known.get(frozenset())
        return found.error if found is not None else math.inf

    def _shortened(self, failed: int, length: int) -> None:
        """Drops steps: the last of a shortest sequence is needed, and those before it may not be."""
        needed: list[Step] = []
        while True:
            while length - failed > 1:
                if self.used == self.limit - 1:  # perhaps what did not suffice is of no use at all
                    self.suffices(merged([*needed, *self.steps[failed:length]]))
                middle = (failed + length) // 2
                if self.suffices(merged([*needed, *self.steps[:middle]])):
                    length = middle
                else:
                    failed = middle
            needed.append(self.steps[length - 1])
            if length == 1 or self.suffices(merged(needed)):
                return
            failed, length = 0, length - 1

    def _without_single_nodes(self) -> None:
        """Drops nodes of ``best``, in halves, quarters and so on, down to single ones."""
        assert self.best is not None
        self._lowered()
        size = math.ceil(len(self.best) / 2)
        while len(self.best) > 1:
            dropped = False
            names = list(self.best)
            for start in range(0, len(names), size):
                piece = set(names[start : start + size])
                rest = {name: kind for name, kind in self.best.items() if name not in piece}
                if rest and len(rest) < len(self.best) and self.suffices(rest):
                    dropped = True
            if size == 1 and not dropped:
                break
            size = min(size if dropped else math.ceil(size / 2), max(1, math.ceil(len(self.best) / 2)))
        self.minimal = True

    def _lowered(self) -> None:
        """Tries the 16-bit type for what is in float32, where that is a step of its own."""
        assert self.best is not None
        halves = {name: step.precision for step in self.steps if step.precision != HIGHEST for name in step.nodes}
        lower = {name: halves.get(name, kind) for name, kind in self.best.items()}
        if lower != self.best:
            self.suffices(lower)


def merged(steps: Iterable[Step]) -> dict[str, str]:
    """What the steps raise together; of two precisions of a node the higher one counts."""
    raised: dict[str, str] = {}
    for step in steps:
        for name in step.nodes:
            if raised.get(name) != HIGHEST:
                raised[name] = step.precision
    return raised


def _size(raised: Raised) -> tuple[int, int]:
    """How much is in float32, then how much is raised at all."""
    return sum(kind == HIGHEST for kind in raised.values()), len(raised)
