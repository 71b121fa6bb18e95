"""Rewrites an ONNX model until a given TensorRT takes it, and says what was changed.

``rewrite(graph, target)`` is the one entry; rules live in ``passes.rules``, one family a module.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from . import rules as _rules
from .boundary import boundary_to_wider_types, int64_boundary_to_int32
from .clean import infer_types, pin_inputs, refine_types, remove_unused, sanitise
from .engine import run_rules
from .expand import expand_functions
from .fold import fold_constants, take_branches
from .framework import RULES, Log, PassError, Rule
from .ir import ModelError, collector_paused
from .loops import settle_loops
from .lower import lower
from .matches import Recorder
from .narrow import bfloat16_to_float32, check_infinite_constants, check_int64_range, float64_to_float32
from .plugins import PLUGINS, Plugin, drop_uncalled
from .reading import read
from .unroll import unroll_loops
from .writing import write

if TYPE_CHECKING:
    from bridge.target import Target

__all__ = ["PLUGINS", "Log", "ModelError", "PassError", "Plugin", "Rule", "all_rules", "read", "rewrite", "write"]

MAX_SWEEPS = 30
"""Real models settle in two to five sweeps; more means that two rules undo each other."""


def all_rules() -> dict[str, Rule]:
    """Every rule of the library by name."""
    for module in pkgutil.iter_modules(_rules.__path__):
        importlib.import_module(f"{_rules.__name__}.{module.name}")
    return RULES


@collector_paused()
def rewrite(
    graph: gs.Graph,
    target: Target,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    *,
    record: bool = False,
) -> Log:
    """Rewrites ``graph`` in place for ``target`` until nothing changes any more.

    ``shapes`` gives inputs the shapes that they will have (a string is a dynamic axis), where the file says less;
    ``record`` keeps each match in the log's ``matches``. Raises PassError where a pass breaks.
    """
    log = Log(recorder=Recorder(graph) if record else None)
    rules = list(all_rules().values())
    sanitise(graph, target, log)
    pinned = pin_inputs(graph, shapes or {})
    infer_types(graph, afresh=pinned)
    float64_to_float32(graph, target, log)
    bfloat16_to_float32(graph, target, log)
    boundary_to_wider_types(graph, target, log)
    int64_boundary_to_int32(graph, target, log)
    settled = changed = False
    for _ in range(MAX_SWEEPS):
        learnt = refine_types(graph)
        if learnt or not settled:  # what folding makes constant the rules see at once; else types have to tell
            taught = fold_constants(graph, log)
            taken = take_branches(graph, log)
            taken = unroll_loops(graph, log) or taken
            taken = settle_loops(graph, log) or taken
            remove_unused(graph, log)
            applied = run_rules(graph, rules, target, log)
            settled = not (taught or taken or applied)
            changed = changed or not settled
            continue
        if changed and infer_types(graph):  # through values as well, which ONNX's inference can follow now
            settled = changed = False
            continue
        changed = expand_functions(graph, target, log)
        changed = changed or lower(graph, rules, target, log)
        if not changed:
            drop_uncalled(graph)
            check_int64_range(graph, target, log)
            check_infinite_constants(graph, target, log)
            return log
        settled = False
    busy = ", ".join(sorted(log.nodes))
    raise PassError(f"the passes do not come to rest after {MAX_SWEEPS} sweeps; they applied: {busy}")
