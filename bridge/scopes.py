"""The modules that the older exporter made nodes of, written where the newer one writes them.

That exporter names nodes after the modules that were called, each by the end of its name: ``/enc/layers.3/fc/Gemm``,
``/body/body.0/Conv``. A ModuleDict is not called, so that ``blocks.down.fc`` became ``/down/fc``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import onnx

from passes.provenance import SCOPES

_CALL = re.compile(r"(_\d+|@\d+)$")
"""What a second call of a module adds to its name."""


def write_scopes(path: Path, modules: Iterable[str]) -> None:
    """Writes the module of each node into the model at ``path``. ``modules``: the names of those that there are."""
    find = _finder(modules)
    model = onnx.load(str(path), load_external_data=False)
    for node in _nodes(model.graph):
        module = find(tuple(node.name.split("/")[1:-1]))
        if module:
            node.metadata_props.add(key=SCOPES, value=repr(["", module, node.name]))
    onnx.save(model, str(path))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


def _finder(modules: Iterable[str]) -> Callable[[tuple[str, ...]], str]:
    """From the steps of a node's name to the module; empty where none fits, or no one best."""
    by_end: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for name in modules:
        chain = _chain(name)
        by_end.setdefault(chain[-1], []).append((name, chain))

    @functools.cache
    def find(steps: tuple[str, ...]) -> str:
        if not steps:
            return ""
        ends = dict.fromkeys((steps[-1], _CALL.sub("", steps[-1])))
        rated = [(_misfit(steps, chain), name) for end in ends for name, chain in by_end.get(end, ())]
        fits = sorted((misfit, name) for misfit, name in rated if misfit is not None)
        alone = len(fits) == 1 or (fits and fits[0][0] < fits[1][0])
        return fits[0][1] if alone else ""

    return find


def _chain(name: str) -> tuple[str, ...]:
    """What the exporter calls a module and those around it: ``("enc", "layers", "layers.3")``."""
    parts = name.split(".")
    found = []
    for end in range(1, len(parts) + 1):
        start = next((place for place in range(end - 1, -1, -1) if not parts[place].isnumeric()), 0)
        found.append(".".join(parts[start:end]))
    return tuple(found)


def _misfit(steps: tuple[str, ...], chain: tuple[str, ...]) -> tuple[int, int] | None:
    """How many steps are the chain's only without the number of a call, and how many modules were not called; None
    where the steps are not the chain's, in its order up to its end."""
    place, numbered = len(chain), 0
    for step in reversed(steps):
        plain = _CALL.sub("", step)
        while place and chain[place - 1] not in (step, plain):
            place -= 1
        if not place:
            return None
        place -= 1
        numbered += chain[place] != step
    return numbered, len(chain) - len(steps)
