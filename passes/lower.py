"""Models of newer opsets, written in the forms that an older parser reads.

A parser reads an operator in the forms of its own time: of a newer one it ignores what it does not know (the axes of a
reduction became an input with opset 18) and computes something else without a word. So each node whose operator has
changed since is written anew, by a rule or by a cast around it, and the model is then of the older opset. Either all
of it is, or nothing: what cannot be lowered is named, and the model keeps the opset that it has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .clean import oldest_ir_version
from .engine import match_of, replace
from .framework import Builder, Declined, Log, PassError, Rule
from .ir import Names, bodies, elem_type, onnx_dtype, scopes
from .provenance import describe, inherited
from .restate import not_restated, restate, restated
from .writing import node_proto

if TYPE_CHECKING:
    from bridge.target import Target

REASON = "The target's parser reads no newer opset; of newer forms it ignores what it does not know."
KEPT = "lower_opset"
"""The name under which nodes that cannot be lowered are listed among what was declined."""


@dataclass
class _Change:
    """What is to take the place of one node, made and not yet put there."""

    node: gs.Node
    scope: gs.Graph
    name: str
    reason: str
    results: list[gs.Tensor | None]
    builder: Builder


@dataclass
class _Plan:
    limit: int
    changes: list[_Change] = field(default_factory=list)
    misfits: list[tuple[gs.Node, str]] = field(default_factory=list)


def lower(graph: gs.Graph, rules: Iterable[Rule], target: Target, log: Log) -> bool:
    """Brings ``graph`` down to the opset that ``target`` reads, if it is above it; True if it was brought down.

    ``rules`` are those that lower (``framework.lowering``). The other rules have come to rest before: what the target
    lacks, they have replaced, and operators with a function body are inlined.
    """
    limit = target.opset
    if limit is None or all(scope.opset <= limit for scope in scopes(graph, references=True)):
        return False
    by_op: dict[str, list[Rule]] = {}
    for item in rules:
        if item.since is not None and item.when(target):
            for op in item.ops:
                by_op.setdefault(op, []).append(item)
    plugins = restated(graph, limit)
    every = [*scopes(graph), *(s for item in not_restated(graph, plugins) for s in scopes(item, functions=False))]
    plan = _planned(graph, every, by_op, target, limit)
    if plan.misfits:
        _discard(plan, graph, target, log)
        return False
    _carry_out(plan, log)
    before = graph.opset
    for scope in every:
        scope.opset = min(scope.opset, limit)
    restate(graph, plugins)
    graph.ir_version = oldest_ir_version(graph)
    log.add(KEPT, REASON, [f"the model: opset {before} -> {limit}"])
    return True


def _planned(
    graph: gs.Graph, every: Iterable[gs.Graph], by_op: dict[str, list[Rule]], target: Target, limit: int
) -> _Plan:
    plan = _Plan(limit)
    names = Names(graph)
    for scope in every:
        for node in scope.nodes:
            if scope.opset <= limit or _unchanged(node, scope.opset, limit):
                continue
            builder = Builder(names, limit, f"{node.name or node.op}/lowered", target, scope)
            try:
                change = _change(node, scope, by_op.get(node.op, ()), builder)
                for made in builder.made:
                    _check(made, limit)
            except Declined as reason:
                plan.misfits.append((node, str(reason)))
                _detach(builder)
                continue
            if change is not None:
                plan.changes.append(change)
    return plan


def _change(node: gs.Node, scope: gs.Graph, rules: Iterable[Rule], builder: Builder) -> _Change | None:
    """What ``node`` becomes; None where it means the same under the old opset. Raises Declined where it has no form."""
    referring = any(isinstance(value, gs.Node.AttributeRef) for value in node.attrs.values())
    for item in rules if not referring else ():
        assert item.since is not None
        if scope.opset < item.since:
            continue
        try:
            result = item.function(node, builder)
        except Declined:
            raise
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            words = str(error).strip().splitlines()[0]
            raise Declined(f"opset {builder.opset} has {node.op} in another form: {words}") from error
        except Exception as error:  # a defect of one rule, reported as one
            where = describe(node)
            raise PassError(f"rule {item.name} broke on {where}: {type(error).__name__}: {error}") from error
        results = [result] if isinstance(result, gs.Tensor) else list(result or ())
        if results:
            return _Change(node, scope, item.name, item.reason, _fresh(results, builder), builder)
    _check_form(node, builder.opset)
    if _types_fit(node, builder.opset):
        return None
    results = _retyped(node, builder)
    return _Change(node, scope, "cast_around_old_operators", RETYPED, results, builder)


def _fresh(results: Sequence[gs.Tensor | None], builder: Builder) -> list[gs.Tensor | None]:
    """The results, each made by a new node: another change may replace a tensor that is there already."""
    new = {id(tensor) for node in builder.made for tensor in node.outputs}
    return [item if item is None or id(item) in new else builder.op.Identity(item) for item in results]


def _discard(plan: _Plan, graph: gs.Graph, target: Target, log: Log) -> None:
    """Leaves the model as it is, and says why."""
    for change in plan.changes:
        _detach(change.builder)
    known = {name for rule, name in log.declined if rule == KEPT}
    for node, reason in plan.misfits:
        log.declined[KEPT, node.name] = (describe(node), reason)
    if not known:
        count = len(plan.misfits)
        log.notes.append(
            f"the model stays at opset {graph.opset}, though {target} reads up to {plan.limit} and may misread newer "
            f"forms: {count} node{'s have' if count > 1 else ' has'} no older form (see what was declined)"
        )


def _detach(builder: Builder) -> None:
    for unused in builder.made:
        unused.inputs.clear()


def _carry_out(plan: _Plan, log: Log) -> None:
    changed: dict[int, tuple[gs.Graph, dict[int, list[gs.Node]]]] = {}
    for change in plan.changes:
        where, metadata = describe(change.node), inherited(change.node, change.name)
        if log.recorder is not None:
            log.matches.append(
                match_of(log.recorder, change.name, change.node, change.results, change.builder, change.scope)
            )
        changed.setdefault(id(change.scope), (change.scope, {}))[1][id(change.node)] = change.builder.made
        replace(change.node, change.results, change.builder.made, change.scope)
        for made in change.builder.made:
            made.metadata = dict(metadata)
        log.add(change.name, change.reason, [where])
        log.note(change.builder.notes)
    for scope, new in changed.values():
        scope.nodes = [item for node in scope.nodes for item in new.get(id(node), [node])]


# --- whether a node means the same under another opset ---------------------------------------------------------------


@functools.cache
def _schema(op: str, opset: int) -> Any:
    """The schema of ``op`` in ``opset``, or None where that has no such operator."""
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


def _unchanged(node: gs.Node, opset: int, limit: int) -> bool:
    """Whether the operator is the same in both opsets, or is no operator of the standard."""
    if node.domain or not onnx.defs.has(node.op):
        return True
    old, new = _schema(node.op, limit), _schema(node.op, opset)
    return old is not None and new is not None and old.since_version == new.since_version


def _check(node: gs.Node, opset: int) -> None:
    """Raises Declined where ``node`` is none of ``opset``."""
    if node.domain or not onnx.defs.has(node.op):
        return
    _check_form(node, opset)
    if not _types_fit(node, opset):
        kinds = ", ".join(_kind(tensor) or "?" for tensor in node.inputs)
        raise Declined(f"{node.op} of {kinds} does not exist in opset {opset}")


def _check_form(node: gs.Node, opset: int) -> None:
    schema = _schema(node.op, opset)
    if schema is None or schema.deprecated:
        raise Declined(f"opset {opset} has no {node.op}")
    if any(bodies(node)):
        return  # of control flow, the types alone have changed
    context = type(onnx.checker.DEFAULT_CONTEXT)()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {"": opset}
    try:
        onnx.checker.check_node(node_proto(node), context)
    except onnx.checker.ValidationError as error:
        words = str(error).strip().splitlines()[0]
        raise Declined(f"opset {opset} has {node.op} in another form: {words}") from error


def _kind(tensor: gs.Tensor) -> str | None:
    """The tensor's type as schemas write it; None where it is left out, unknown, or a container."""
    if tensor.is_empty() or tensor.dtype is None:
        return None
    number = elem_type(tensor) if isinstance(tensor, gs.Constant) else onnx_dtype(tensor.dtype)
    return f"tensor({onnx.TensorProto.DataType.Name(number).lower()})"


def _formals(formal: Sequence[Any], count: int) -> list[Any]:
    """The schema's parameters, the last one repeated where it is variadic."""
    return [formal[min(index, len(formal) - 1)] for index in range(count)] if formal else []


def _types_fit(node: gs.Node, opset: int) -> bool:
    schema = _schema(node.op, opset)
    for tensors, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for tensor, parameter in zip(tensors, _formals(formal, len(tensors)), strict=True):
            kind = _kind(tensor)
            if kind is not None and kind not in parameter.types:
                return False
    return True


# --- types that the old operator lacks -------------------------------------------------------------------------------

RETYPED = "The older operator lacks the type, and computes the same in one that it has."
_WIDER = {
    "float16": ("float32",),
    "bfloat16": ("float32",),
    "bool": ("uint8", "int32", "float32"),
    "uint8": ("int32", "float32"),
    "int8": ("int32", "float32"),
    "uint16": ("int32", "float32"),
    "int16": ("int32", "float32"),
    "int32": ("int64",),
    "uint32": ("int64",),
}
"""Types that hold every value of another, the nearest first."""


def _retyped(node: gs.Node, g: Builder) -> list[gs.Tensor | None]:
    """The node with its inputs in types that the operator has, and its outputs cast back."""
    schema = _schema(node.op, g.opset)
    chosen: dict[str, np.dtype[Any]] = {}
    parameters = _formals(schema.inputs, len(node.inputs))
    for tensor, parameter in zip(node.inputs, parameters, strict=True):
        kind = _kind(tensor)
        if kind is not None and kind not in parameter.types:
            chosen[parameter.type_str] = _wider(tensor, parameter, g)
    inputs = [
        g.cast(tensor, chosen[parameter.type_str]) if parameter.type_str in chosen and not tensor.is_empty() else tensor
        for tensor, parameter in zip(node.inputs, parameters, strict=True)
    ]
    made = g.node(node.op, inputs, node.attrs, len(node.outputs))
    outputs = made if len(node.outputs) > 1 else [made]
    return [
        new if not old.name or old.dtype is None else g.cast(new, old.dtype)
        for old, new in zip(node.outputs, outputs, strict=True)
    ]


def _wider(tensor: gs.Tensor, parameter: Any, g: Builder) -> np.dtype[Any]:
    dtype = g.dtype(tensor)
    for name in _WIDER.get(dtype.name, ()):
        if f"tensor({_ONNX_NAMES.get(name, name)})" in parameter.types:
            return np.dtype(name)
    return g.decline(f"in opset {g.opset}, it takes no {dtype.name}")


_ONNX_NAMES = {"float32": "float", "float64": "double"}
