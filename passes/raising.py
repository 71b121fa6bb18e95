"""Brings a model to a newer opset, where operators take a low type only from there on (bfloat16 Conv: 22)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .ir import Constant, Node, scopes
from .low_types import LowType, is_float32, ports
from .restate import not_restated, restate, restated
from .writing import node_proto

NEWEST = 23
"""At which a scale may be float32 where what it scales is not; later ones bring nothing of use here."""
OLDEST = 11
"""From this opset on, an operator whose form is still allowed means what it meant, but for those of ``_FORMS``."""


@dataclass(frozen=True)
class _Form:
    """How an older form of an operator is said in a newer opset."""

    since: int
    """The opset that changed it."""
    change: Callable[[gs.Node], bool]
    """Changes the node; False where that cannot be said."""


def _axes_as_input(node: gs.Node) -> bool:
    if "axes" in node.attrs:
        node.inputs.append(Constant(f"{node.name}/axes", np.array(node.attrs.pop("axes"), np.int64)))
    return True


def _split_as_input(node: gs.Node) -> bool:
    if "split" in node.attrs:
        node.inputs.append(Constant(f"{node.name}/split", np.array(node.attrs.pop("split"), np.int64)))
    return True


def _one_axis(node: gs.Node) -> bool:
    """Over all axes from one on, by default the second, became over one axis, by default the last."""
    axis, shape = int(node.attrs.get("axis", 1)), node.inputs[0].shape
    node.attrs["axis"] = axis
    return axis == -1 or (shape is not None and axis % len(shape) == len(shape) - 1)


def _without_ratio(node: gs.Node) -> bool:
    node.attrs.pop("ratio", None)  # which only training asks for
    return True


def _number_of_outputs(node: gs.Node) -> bool:
    if len(node.inputs) < 2 or node.inputs[1].is_empty():
        node.attrs["num_outputs"] = len(node.outputs)
    return True


def _mode_of_grid_sample(node: gs.Node) -> bool:
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = node.attrs.get("mode", "bilinear")
    node.attrs["mode"] = names.get(mode, mode)
    return True


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_FORMS: Mapping[str, tuple[_Form, ...]] = {
    **{f"Reduce{name}": (_Form(18, _axes_as_input),) for name in _REDUCTIONS},
    **dict.fromkeys(("ReduceSum", "Squeeze", "Unsqueeze"), (_Form(13, _axes_as_input),)),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), (_Form(13, _one_axis),)),
    "Dropout": (_Form(12, _without_ratio),),
    "Split": (_Form(13, _split_as_input), _Form(18, _number_of_outputs)),
    "GridSample": (_Form(20, _mode_of_grid_sample),),
    "GroupNormalization": (_Form(21, lambda node: False),),  # its scale was by group, and is by channel
}
"""By operator, in their order."""


def _changes(node: gs.Node, present: int, opset: int) -> list[_Form]:
    """What changed of the operator's form on the way from the ``present`` opset."""
    return [form for form in _FORMS.get(node.op, ()) if not node.domain and present < form.since <= opset]


def raise_for(graph: gs.Graph, low: LowType, fp32: Collection[str]) -> list[str]:
    """Brings ``graph`` to the opset in which the nodes that are not to be ``fp32`` take the low type; in place.

    Where some node has no form in that opset, all stays as it is, and the returned notes say so.
    """
    opset = needed_opset(graph, low, fp32)
    if opset is None:
        return []
    blockers = _blockers(graph, opset)
    if blockers:
        named = ", ".join(blockers[:3])
        return [
            f"the model stays at opset {graph.opset}, and what takes {low.name} from opset {opset} on is computed in "
            f"float32: {named} cannot be said in opset {opset}"
        ]
    raise_opset(graph, opset)
    return []


def needed_opset(graph: gs.Graph, low: LowType, fp32: Collection[str] = ()) -> int | None:
    """The opset in which most nodes but those in ``fp32`` take the low type; None where that is the present one."""
    if graph.opset is None or graph.opset >= NEWEST:
        return None
    needed = graph.opset
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            if node.domain or node.name in fp32 or not any(map(is_float32, (*node.inputs, *node.outputs))):
                continue
            if node.op in ("QuantizeLinear", "DequantizeLinear"):
                return NEWEST
            if len(ports(node, graph.opset, low).outputs) == 0:
                firsts = [version for version in (19, 22) if ports(node, version, low).outputs]
                needed = max(needed, *firsts[:1]) if firsts else needed
    return needed if needed > graph.opset else None


def _blockers(graph: gs.Graph, opset: int) -> list[str]:
    """The nodes that ``opset`` has no form for; of a graph older than OLDEST, that it is so."""
    if graph.opset < OLDEST:
        return [f"what is older than opset {OLDEST} (onnx.version_converter brings it there)"]
    context = type(onnx.checker.DEFAULT_CONTEXT)()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {"": opset}
    found = []
    bodies = restated(graph, opset)
    for function in not_restated(graph, bodies):
        found.append(f"the reference body of plugin {function.name!r}")
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            if node.domain or any(isinstance(value, gs.Graph) for value in node.attrs.values()):
                continue
            changes = _changes(node, scope.opset, opset)
            fits, proto = True, node_proto(node)
            if changes:
                probe = Node(node.op, node.name, dict(node.attrs), list(node.inputs), list(node.outputs))
                fits = all(form.change(probe) for form in changes)
                proto = node_proto(probe)
                probe.inputs.clear()
                probe.outputs.clear()
            try:
                onnx.checker.check_node(proto, context)
            except onnx.checker.ValidationError:
                fits = False
            if not fits:
                found.append(f"{node.op} {node.name}")
    return found


def raise_to(graph: gs.Graph, opset: int) -> list[str]:
    """Brings ``graph`` to ``opset``, where it is below, and returns nothing.

    Where some nodes have no form there, or the graph is older than OLDEST, all stays as it is, and the reasons are
    returned.
    """
    if graph.opset >= opset:
        return []
    blockers = _blockers(graph, opset)
    if not blockers:
        raise_opset(graph, opset)
    return blockers


def raise_opset(graph: gs.Graph, opset: int) -> None:
    """Says every node in the form of ``opset``, for which there are no blockers."""
    bodies = restated(graph, opset)
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            for form in _changes(node, scope.opset, opset):
                form.change(node)
    for scope in scopes(graph, functions=False):
        scope.opset = opset
    restate(graph, bodies)
