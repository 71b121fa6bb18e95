"""``bridge passes``: the library of rules and whole-graph passes, what each is for, and for which targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .target import Target, known_targets


@dataclass(frozen=True)
class Entry:
    """One rule, or one pass over the whole graph."""

    name: str
    family: str
    """The module that it is in."""
    replaces: list[str]
    """Operators, with their domain where it is not the standard one; empty for a pass over the whole graph."""
    reason: str
    targets: list[str]
    """Those of the known ones that it applies to."""
    examples: int


def library(target: Target | None = None) -> list[Entry]:
    """Every rule in the order of application, and then the passes over the whole graph; of ``target``, its own."""
    from passes import all_rules

    known = [target] if target is not None else known_targets()
    entries = []
    for rule in all_rules().values():
        targets = [str(item) for item in known if rule.when(item)]
        family = rule.function.__module__.rpartition(".")[2]
        operators = [f"{rule.domain}::{op}" if rule.domain else op for op in rule.ops]
        entries.append(Entry(rule.name, family, operators, rule.reason, targets, len(rule.examples)))
    for run in _whole_graph():
        reason = (run.__doc__ or "").strip().splitlines()[0].partition("; True if")[0].rstrip(".") + "."
        entries.append(
            Entry(run.__name__, run.__module__.rpartition(".")[2], [], reason, [str(item) for item in known], 0)
        )
    return [entry for entry in entries if entry.targets or target is None]


def _whole_graph() -> list[Callable[..., Any]]:
    """In the order in which ``passes.rewrite`` runs them."""
    from passes.boundary import boundary_to_wider_types, int64_boundary_to_int32
    from passes.clean import remove_unused, sanitise
    from passes.expand import expand_functions
    from passes.fold import fold_constants, take_branches
    from passes.loops import settle_loops
    from passes.lower import lower
    from passes.narrow import bfloat16_to_float32, float64_to_float32
    from passes.unroll import unroll_loops

    return [
        sanitise,
        float64_to_float32,
        bfloat16_to_float32,
        boundary_to_wider_types,
        int64_boundary_to_int32,
        fold_constants,
        take_branches,
        unroll_loops,
        settle_loops,
        remove_unused,
        expand_functions,
        lower,
    ]


def as_json(entries: Sequence[Entry]) -> str:
    return json.dumps([asdict(entry) for entry in entries], indent=2, ensure_ascii=False) + "\n"


def as_text(entries: Sequence[Entry], target: Target | None = None) -> str:
    rules = [entry for entry in entries if entry.replaces]
    every = [str(target)] if target is not None else [str(item) for item in known_targets()]
    lines = [f"{len(rules)} rules for {', '.join(every)}"]
    for family in dict.fromkeys(entry.family for entry in rules):
        lines += ["", family]
        for entry in rules:
            if entry.family == family:
                lines += _told(entry, every)
    lines += ["", "passes over the whole graph"]
    for entry in entries:
        if not entry.replaces:
            lines += [f"  {entry.name}", f"      {entry.reason}"]
    return "\n".join(lines) + "\n"


def _told(entry: Entry, every: Sequence[str]) -> list[str]:
    where = "" if entry.targets == list(every) else f"; for {', '.join(entry.targets) or 'no known target'}"
    examples = "1 example" if entry.examples == 1 else f"{entry.examples} examples"
    head = f"  {entry.name}: {', '.join(entry.replaces)} ({examples}{where})"
    return [head, f"      {entry.reason}"]
