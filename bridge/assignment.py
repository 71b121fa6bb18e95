"""Which node is computed in what: the low precision by default, and float32 where that would be unsound, with reasons.

One assignment serves both kinds of targets: on strongly typed ones it becomes casts, on weakly typed ones the
precisions of layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .errors import UsageError
from .precision import DTYPES, FLOATS, SCHEMES, Place, Precision, Rule

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from .ranges import Range
    from .target import Target

HEAD_ROOM = 8
"""Values of other inputs may be so many times as large as those that were seen."""


@dataclass(frozen=True)
class Assignment:
    """What each node of a model is computed in."""

    nodes: dict[str, str] = field(default_factory=dict)
    """By name, ``fp32``, ``fp16``, ``bf16``, ``int8``, ``fp8`` or ``int4``, of those with floating-point numbers; none
    where a model keeps the types that it has."""
    floats: dict[str, str] = field(default_factory=dict)
    """The same, had nothing been quantised."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Of nodes that are not in the precision asked for, why."""
    saturated: frozenset[str] = frozenset()
    """Tensors of float32 that may end at the ends of the low type: masks of "minus infinity"."""
    notes: tuple[str, ...] = ()

    def of(self, precision: str) -> frozenset[str]:
        """The names of the nodes in ``precision``."""
        return frozenset(name for name, found in self.nodes.items() if found == precision)

    @property
    def fp32(self) -> frozenset[str]:
        """What ``passes.casts.cast`` is to leave in float32."""
        return self.of("fp32")


def assign(graph: gs.Graph, precision: Precision, ranges: Mapping[str, Range] | None, target: Target) -> Assignment:
    """The assignment for ``graph``, bodies included. ``ranges`` are what its tensors were seen to hold.

    The graph is ``made_ready`` for it and, where precisions are casts, brought to the opset that the low type needs. Of
    a model in 16 bits nothing is assigned but what is to be quantised, and its types stay. Raises UsageError where a
    rule's pattern fits no node, and where the target lacks a type.
    """
    from passes.casts import computes_in_half
    from passes.low_types import low_type
    from passes.raising import NEWEST, needed_opset, raise_for

    lacking = target.lacks_type(precision.half_dtype) if precision.half else ""
    if lacking:
        raise UsageError(f"precision {precision.name!r}: {target} {lacking}.")
    make_ready(graph, precision, target)
    assigning = _Assigning(graph, precision, ranges or {}, target)
    if computes_in_half(graph):
        return assigning.in_half()
    notes = []
    if precision.half and target.strongly_typed:
        low = low_type(precision.half_dtype)
        if needed_opset(graph, low) is not None:
            notes = raise_for(graph, low, assigning.run(NEWEST).fp32)
    # A weakly typed network has none of ONNX's types: what an operator takes in any version counts.
    return replace(assigning.run(None if target.strongly_typed else NEWEST), notes=tuple(notes))


def make_ready(graph: gs.Graph, precision: Precision, target: Target) -> bool:
    """Makes the graph one whose nodes can be given their precisions, in place; True where its tensors are others then.

    It loses its local functions and, where precisions are put into it, each Einsum that has to be products. Raises
    UsageError where a rule's pattern fits no node.
    """
    from passes.casts import prepare
    from passes.sound_nodes import touched

    functions = bool(graph.functions)
    prepare(graph)
    precision.check_rules(map(place_of, touched(graph)))
    assigning = _Assigning(graph, precision, {}, target)
    in_graph = target.strongly_typed or bool(precision.scheme)
    return (in_graph and _without_einsum(graph, assigning.needs_products, target)) or functions


def _without_einsum(graph: gs.Graph, wanted: Callable[[gs.Node], bool], target: Target) -> bool:
    """Makes products of the Einsum nodes that are ``wanted`` so; True if there were any."""
    from passes.engine import run_rules
    from passes.framework import Builder, Log, Replacement, always
    from passes.rules.einsum import einsum_as_products

    @functools.wraps(einsum_as_products.function)
    def products(node: gs.Node, g: Builder) -> Replacement:
        return einsum_as_products.function(node, g) if wanted(node) else None

    return run_rules(graph, [replace(einsum_as_products, function=products, when=always)], target, Log())


class _Assigning:
    def __init__(self, graph: gs.Graph, precision: Precision, ranges: Mapping[str, Range], target: Target) -> None:
        from passes.sound_nodes import touched

        self.graph, self.precision, self.ranges, self.target = graph, precision, ranges, target
        self.nodes = list(touched(graph))
        self.rules = rules_for(graph, precision)

    def needs_products(self, node: gs.Node) -> bool:
        """Whether an Einsum has to be products: nothing else is quantised, and ONNX has none in bfloat16."""
        if not _is_floating(node.outputs[0]):
            return False
        lacking = self.target.strongly_typed and self.precision.half == "bf16"
        return bool(self._scheme(node.name)) or (lacking and self._asked(node.name) == "bf16")

    def in_half(self) -> Assignment:
        """The assignment for a model in 16 bits."""
        note = "the model computes in 16 bits already: its types are left as they are"
        left = [str(rule) for rule in self.precision.rules if rule.precision in FLOATS]
        notes = (f"{note}, and rules for float types ({', '.join(left)}) have no effect" if left else note,)
        if not self.precision.scheme:
            return Assignment(notes=notes)
        return replace(self._quantised(self._own(), self._losing(), frozenset()), notes=notes)

    def _own(self) -> dict[str, str]:
        return {node.name: own_precision(node) for node in self.nodes}

    def run(self, opset: int | None = None) -> Assignment:
        """The assignment by the schemas of ``opset``, by default the graph's."""
        if not self.precision.half:
            return self._quantised(self._own(), self._losing(), frozenset())
        from passes.low_types import low_type
        from passes.soundness import keep_in_float32

        low = low_type(self.precision.half_dtype)
        kept = keep_in_float32(self.graph, low, self.ranges, self._forced(), HEAD_ROOM, opset)
        nodes = {**dict.fromkeys(kept.reasons, "fp32"), **dict.fromkeys(kept.free, self.precision.half)}
        asked = {name for name in kept.reasons if self._asked(name) != "fp32"}
        reasons = {name: reason for name, reason in kept.reasons.items() if name in asked}
        return self._quantised(nodes, reasons, frozenset(kept.saturated))

    def _losing(self) -> dict[str, str]:
        """The products that a quantisation, beside float32, would take too many digits from, and why: what bfloat16,
        with its range, has too few for."""
        from passes.low_types import low_type
        from passes.raising import NEWEST
        from passes.soundness import keep_in_float32

        kept = keep_in_float32(self.graph, low_type("bfloat16"), self.ranges, {}, HEAD_ROOM, NEWEST)
        asked = {node.name for node in self.nodes if (scheme := self._scheme(node.name)) and _can_be(node, scheme)}
        return {name: reason for name, reason in kept.reasons.items() if name in asked}

    def _asked(self, name: str) -> str:
        """The float type that a node is asked to be in: a quantised one is in the low type around."""
        rule = self.rules.get(name)
        return rule.precision if rule is not None and rule.precision in FLOATS else self.precision.low

    def _scheme(self, name: str) -> str:
        """What a node is to be quantised to, if it can be; empty for nothing."""
        rule = self.rules.get(name)
        asked = rule.precision if rule is not None else self.precision.quantised
        return asked if asked in SCHEMES else ""

    def _is_named(self, node: gs.Node) -> bool:
        """Whether a rule is for this very node or its operator, and not for all of a module."""
        rule = self.rules.get(node.name)
        return rule is not None and not rule.fits(Place((), (), place_of(node).modules))

    def _forced(self) -> dict[str, str]:
        """Of nodes that a rule, or the target, decides about: why they are in float32; empty where they are not."""
        dtype = self.precision.half_dtype
        forced = {
            name: "a rule asks for it" if rule.precision == "fp32" else ""
            for name, rule in self.rules.items()
            if rule.precision in FLOATS
        }
        if self.precision.low == "fp32":
            forced = {name: forced.get(name, "float32 is asked for") for name in (node.name for node in self.nodes)}
        for node in self.nodes:
            if not node.domain and not self.target.computes_in(node, dtype):
                forced[node.name] = f"{self.target} does not compute {node.op} in {dtype}"
        return forced

    def _quantised(self, nodes: dict[str, str], reasons: dict[str, str], saturated: frozenset[str]) -> Assignment:
        """With the nodes that are to be quantised: those that can be, and are not left in float32 for a reason."""
        floats = dict(nodes)
        for node in self.nodes:
            scheme = self._scheme(node.name)
            if not scheme or node.name not in nodes:
                continue
            if not _can_be(node, scheme):
                if _is_product(node) or self._is_named(node):
                    reasons.setdefault(node.name, _why_not(node, scheme))
            elif node.name not in reasons or node.name in self.rules:
                nodes[node.name] = scheme
                reasons.pop(node.name, None)
        return Assignment(nodes, floats, reasons, saturated)


def rules_for(graph: gs.Graph, precision: Precision) -> dict[str, Rule]:
    """By name, the rule that says what a node is computed in; those of which none does are not here."""
    from passes.sound_nodes import touched

    found = {node.name: precision.rule_for(place_of(node)) for node in touched(graph)}
    return {name: rule for name, rule in found.items() if rule is not None}


def _can_be(node: gs.Node, scheme: str) -> bool:
    """Whether the operator has kernels for it; int4 is for weights alone."""
    from passes.quantisation import QUANTISABLE
    from passes.sound_nodes import is_in_space

    if node.domain or node.op not in QUANTISABLE[scheme] or is_in_space(node):  # type: ignore[index]
        return False
    return scheme != "int4" or any(map(_is_weight, node.inputs[:2]))


def _is_product(node: gs.Node) -> bool:
    """Whether the operator has multiply-adds, which a quantisation is all about."""
    from passes.casts import COMPUTE

    return not node.domain and node.op in COMPUTE


def _why_not(node: gs.Node, scheme: str) -> str:
    from passes.quantisation import QUANTISABLE
    from passes.sound_nodes import is_in_space

    if is_in_space(node):
        return f"it adds up so few products that {scheme} gains nothing, as of points in space, whose digits count"
    if node.op in QUANTISABLE[scheme]:  # type: ignore[index]
        return f"{scheme} is for weights alone, and {node.op} multiplies no weight here"
    return f"{node.op} is not among what is quantised to {scheme}"


def own_precision(node: gs.Node) -> str:
    """The lowest float type of the node's tensors, such as ``fp16``; empty where they have none."""
    from passes.ir import type_name

    kinds = {type_name(item.dtype) for item in (*node.inputs, *node.outputs) if item.dtype is not None}
    return next((name for name in ("fp16", "bf16", "fp32") if DTYPES[name] in kinds), "")


def place_of(node: gs.Node) -> Place:
    """What a rule's pattern may fit of the node."""
    from passes.provenance import origin, replaced

    operator, name = replaced(node)
    names, operators = ((node.name, name), (node.op, operator)) if operator else ((node.name,), (node.op,))
    return Place(names, operators, (origin(node).module, *_modules_of_weights(node)))


def _is_floating(tensor: gs.Tensor) -> bool:
    from passes.low_types import is_float32, is_half

    return is_float32(tensor) or is_half(tensor)


def _modules_of_weights(node: gs.Node) -> list[str]:
    """Where its parameters come from: a convolution that a batch normalisation went into is otherwise the latter's."""
    import onnx_graphsurgeon as gs

    from passes.provenance import WRAPPED

    names = [tensor.name for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    return [name.removeprefix(f"{WRAPPED}.").rpartition(".")[0] for name in names if name.startswith(f"{WRAPPED}.")]


def _is_weight(tensor: gs.Tensor) -> bool:
    """Whether it is a constant, or a view of one."""
    import onnx_graphsurgeon as gs

    from passes.quantisation import VIEWS

    while tensor.inputs and tensor.inputs[0].op in VIEWS:
        tensor = tensor.inputs[0].inputs[0]
    made_constant = bool(tensor.inputs) and tensor.inputs[0].op == "Constant"
    return made_constant or (isinstance(tensor, gs.Constant) and not tensor.is_empty())
