"""Whether an engine computes in what was asked for: an fp16 request that comes out as fp32 is no success.

Each layer weighs as much as it computes: multiply-adds of convolutions, matrix products and attention, elements of the
rest. What only moves or converts values does not count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_LOST = 0.5
"""Share of the compute that was to be in a low precision which may be in fp32 all the same.

What the precision setting keeps in fp32 (rules, values beyond the range, operators that lose too much) is not counted
as lost, so an honest engine loses next to nothing: on a strongly typed target the types are those of the graph, and on
a weakly typed one the layers with multiply-adds are constrained to theirs; only small change is the builder's choice.
An engine without its low precision loses all. Half lies far from both, and where most of what was asked for was not
done, nobody would call it done."""
NEGLIGIBLE = 0.01
"""Share of the compute that is not worth a word."""
LISTED = 10
"""Layers that are named."""
UNKNOWN = "unknown"
QUANTISED = ("int8", "fp8", "int4", "fp4")
LOW = ("fp16", "bf16", *QUANTISED)


@dataclass(frozen=True)
class Layer:
    """One layer that computes."""

    name: str
    """The network's."""
    node: str
    """The ONNX node that it was made for; empty where that is not known."""
    kind: str
    """TensorRT's type of layer, such as ``CONVOLUTION``."""
    work: float
    weighted: bool
    """Whether the work is multiply-adds."""
    precision: str
    """``fp32``, ``fp16``, ``bf16``, ``int8``, …, or ``unknown``."""


@dataclass(frozen=True)
class Verdict:
    """What became of a request."""

    shares: dict[str, float]
    """Of the compute, by precision; empty for an engine that computes nothing."""
    others: list[dict[str, Any]] = field(default_factory=list)
    """The largest layers that are not in the precision that was asked for."""
    error: str = ""
    """Why the engine is not what was asked for; empty where it is."""
    notes: list[str] = field(default_factory=list)
    unquantised: str = ""
    """The quantised precision that was asked for, and that nothing is in."""


def judge(precision: str, asked: Mapping[str, str], layers: Sequence[Layer]) -> Verdict:
    """Compares what was asked for with what there is.

    ``precision`` is the name of the whole, such as ``int8+fp16``; ``asked`` what each ONNX node was to be computed in.
    Where that is empty, everything was to be in the low precision, and the multiply-adds in the quantised one.
    """
    total = sum(layer.work for layer in layers)
    if not total:
        return Verdict({})
    shares = _shares(layers, total)
    parts = precision.split("+")
    if parts == ["fp32"]:
        return Verdict(shares)
    products = {layer.node for layer in layers if layer.weighted}
    wanted = {id(layer): _wanted(layer, parts, asked, products) for layer in layers}
    off = [layer for layer in layers if wanted[id(layer)] in LOW and layer.precision != wanted[id(layer)]]
    off.sort(key=lambda layer: -layer.work)
    others = [
        {
            **{key: value for key, value in asdict(layer).items() if key in ("name", "node", "kind", "precision")},
            "asked": wanted[id(layer)],
            "share": round(layer.work / total, 6),
        }
        for layer in off[:LISTED]
    ]
    low = [layer for layer in layers if wanted[id(layer)] in LOW]
    unquantised = _unquantised(low, wanted)
    error = _nothing_low(precision, layers) or _lost(precision, low)
    if unquantised and not error:
        error = f"{precision} was asked for, and nothing of the engine is in {unquantised}"
    notes = [
        *_notes(precision, low, wanted),
        *_hardly_any(precision, parts, layers),
        *_lowered(precision, asked, layers),
    ]
    return Verdict(shares, others, error and f"{error}{_largest(precision, others)}", notes, unquantised)


def _shares(layers: Iterable[Layer], total: float) -> dict[str, float]:
    sums: dict[str, float] = {}
    for layer in layers:
        sums[layer.precision] = sums.get(layer.precision, 0.0) + layer.work
    return {name: round(work / total, 6) for name, work in sorted(sums.items(), key=lambda item: -item[1])}


def _wanted(layer: Layer, parts: Sequence[str], asked: Mapping[str, str], products: Collection[str]) -> str:
    """What the layer was to be computed in; empty where nobody said.

    Nobody says it of what else the node of a quantised product has, such as a bias that is added.
    """
    quantised = [name for name in parts if name in QUANTISED]
    floats = [name for name in parts if name not in QUANTISED]
    if asked:
        found = asked.get(layer.node, "")
        beside = found in QUANTISED and not layer.weighted and layer.node in products
        return "" if beside else found
    return (quantised or floats)[0] if layer.weighted else (floats or ["fp32"])[0]


def _sum(layers: Iterable[Layer], *precisions: str) -> float:
    return sum(layer.work for layer in layers if not precisions or layer.precision in precisions)


def _nothing_low(precision: str, layers: Sequence[Layer]) -> str:
    """A model with multiply-adds of which nothing at all is in a low precision, whoever wanted it so."""
    unknown = _sum(layers, UNKNOWN) > NEGLIGIBLE * _sum(layers)
    if unknown or _sum(layers, *LOW) or not any(layer.weighted for layer in layers):
        return ""
    return f"{precision} was asked for, and all of the engine is in fp32"


def _lost(precision: str, low: Sequence[Layer]) -> str:
    asked, lost = _sum(low), _sum(low, "fp32")
    if not asked or lost <= MOST_LOST * asked:
        return ""
    return f"{precision} was asked for, and {lost / asked:.0%} of the compute that was to be in it is in fp32"


def _unquantised(low: Sequence[Layer], wanted: Mapping[int, str]) -> str:
    """A quantised precision that was asked for and no layer has."""
    for name in QUANTISED:
        asked = [layer for layer in low if wanted[id(layer)] == name]
        if _sum(asked) and not _sum(asked, name, UNKNOWN):
            return name
    return ""


def _hardly_any(precision: str, parts: Sequence[str], layers: Sequence[Layer]) -> list[str]:
    """That most multiply-adds are not in what was asked for, whoever decided so."""
    notes = []
    products = [layer for layer in layers if layer.weighted]
    for name in parts:
        enough = (name,) if name in QUANTISED else LOW
        there = _sum(products, *enough, UNKNOWN)
        if there < (1 - MOST_LOST) * _sum(products):
            share = there / _sum(products)
            notes.append(
                f"precision {precision}: {share:.1%} of the multiply-adds are in {name}; kept says which nodes are "
                "not, and why"
            )
    return notes


def _lowered(precision: str, asked: Mapping[str, str], layers: Sequence[Layer]) -> list[str]:
    """That layers which were to be in fp32 are not."""
    found = [layer for layer in layers if asked.get(layer.node) == "fp32" and layer.precision in LOW]
    if not found:
        return []
    named = ", ".join(sorted({layer.node for layer in found})[:3])
    return [
        f"precision {precision}: {len(found)} layers that were to be in fp32 are in {found[0].precision}: {named}"
        f"{', …' * (len(found) > 3)}"
    ]


def _largest(precision: str, others: Sequence[Mapping[str, Any]]) -> str:
    if not others:
        wider = "ask for bf16, whose range is that of fp32, " if "fp16" in precision.split("+") else ""
        return (
            ". Every layer was to be kept in it: by a rule, because its values would leave the range, or because the "
            f"operators or the target have no such type; kept says which and why. Relax the rules, {wider}or ask for "
            "fp32"
        )
    named = ", ".join(f"{item['node'] or item['name']} ({item['precision']})" for item in others[:3])
    there = others[0]["precision"]
    there = "fp32" if there == UNKNOWN else there
    return f". The largest layers that are not in what was asked: {named}. Ask for {there} if that is what is wanted"


def _notes(precision: str, low: Sequence[Layer], wanted: Mapping[int, str]) -> list[str]:
    notes = []
    asked, unknown = _sum(low), _sum(low, UNKNOWN)
    if unknown > NEGLIGIBLE * asked:
        notes.append(
            f"precision {precision}: TensorRT does not tell the types inside of {unknown / asked:.0%} of the compute "
            "that was to be in low precision: whether it is, is not known"
        )
    for name in QUANTISED:
        layers = [layer for layer in low if wanted[id(layer)] == name]
        whole, there = _sum(layers), _sum(layers, name, UNKNOWN)
        if there < (1 - NEGLIGIBLE) * whole:
            notes.append(f"precision {precision}: {there / whole:.0%} of the compute that was to be in {name} is")
    return notes
