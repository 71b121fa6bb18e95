"""Inputs and outputs of types that the engine cannot have become ones of others, with a Cast inside; the user is told.

What a wider type holds is the same: an output in float8 is one in float32 that has float8's values. int64 alone becomes
a narrower one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from .framework import Log
from .ir import Names, Node, onnx_dtype
from .matches import Match, Part, Recorder, part
from .provenance import describe
from .rules.integers import CARRIERS, carrier

if TYPE_CHECKING:
    from bridge.target import Target

_QUANTISED = ("int8", "float8_e4m3fn", "int4")
"""Types that a target may have, and then only between QuantizeLinear and DequantizeLinear.

Of int8, only where the target chooses types by itself: it takes other int8 for quantised too."""


def boundary_to_wider_types(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Gives inputs and outputs of types that the target lacks the type that carries theirs."""
    casts = _cast_inside(
        graph,
        target,
        log,
        lambda tensor, kind: carrier(tensor.dtype) if _lacking(tensor, kind, target) else None,
    )
    if casts:
        log.add("boundary_to_wider_types", f"{target} has no inputs and outputs of this type.", _names(casts))
    return bool(casts)


def int64_boundary_to_int32(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Makes int64 outputs int32 where the target has no int64, by a Cast; its parser does so with inputs.

    Inputs are left to it: TensorRT 8.5.3 computes wrongly from a Cast of an int32 input to int64, which is a copy to it
    (sorting, and gathering from the input). Between them the parser narrows too, and so the graph stays one that ONNX
    Runtime runs. What an int32 does not hold is lost, and so each narrowing is a match, to be proved.
    """
    if "int64" in target.types:
        return False
    name, int32 = "int64_boundary_to_int32", np.dtype(np.int32)
    narrowed = [tensor for tensor in graph.inputs if tensor.dtype == np.int64]
    given = {id(tensor) for tensor in graph.inputs}
    for tensor in narrowed:
        log.notes.append(f"input {tensor.name!r} is int64 in the source; {target} has no such input: it is int32")
    if log.recorder is not None:
        log.matches.extend(_narrowing(graph, tensor, name, log.recorder) for tensor in narrowed)
    casts = _cast_inside(
        graph,
        target,
        log,
        lambda tensor, kind: int32 if tensor.dtype == np.int64 and id(tensor) not in given else None,
    )
    if not casts:
        return False
    log.add(name, f"{target} has no int64: outputs are int32.", _names(casts))
    if log.recorder is not None:
        for cast in casts:
            before, after = Part(graph.opset), part([cast], graph.opset)
            made = {tensor.name: tensor.name for tensor in cast.outputs}
            log.matches.append(log.recorder.match(name, describe(cast), graph, before, after, made))
    return True


def _narrowing(graph: gs.Graph, tensor: gs.Variable, name: str, recorder: Recorder) -> Match:
    """What the parser does to an int64 input, as nodes that are in no graph."""
    names = Names(graph)
    narrow, wide = (gs.Variable(names.new(f"{tensor.name}_{kind}"), kind, tensor.shape) for kind in ("int32", "int64"))
    there = Node("Cast", f"{tensor.name}/to_int32", {"to": onnx_dtype(narrow.dtype)}, [tensor], [narrow], domain="")
    back = Node("Cast", f"{tensor.name}/to_int64", {"to": onnx_dtype(wide.dtype)}, [narrow], [wide], domain="")
    after = part([there, back], graph.opset, [wide])
    there.inputs.clear()  # or the graph's input would know them as its readers
    return recorder.match(name, f"input {tensor.name}", graph, Part(graph.opset), after, {tensor.name: wide.name})


def _cast_inside(
    graph: gs.Graph, target: Target, log: Log, wanted: Callable[[gs.Variable, str], np.dtype[Any] | None]
) -> list[gs.Node]:
    """Gives inputs and outputs the types that ``wanted`` says of them as ``input`` or ``output``; returns the Casts."""
    names: Names | None = None
    outer: dict[int, gs.Variable] = {}
    before: list[gs.Node] = []
    after: list[gs.Node] = []
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for index, tensor in enumerate(tensors):
            other = wanted(tensor, kind) if tensor.dtype is not None else None
            if other is None:
                continue
            own = np.dtype(tensor.dtype)
            if id(tensor) not in outer:  # else an input that is an output too
                names = names or Names(graph)
                shape = list(tensor.shape) if tensor.shape is not None else None
                shown = outer[id(tensor)] = gs.Variable(tensor.name, other, shape)
                tensor.name = names.new(f"{tensor.name}_{own.name}")
                if log.recorder is not None:
                    log.recorder.renamed[tensor.name] = shown.name
                way = (before, own, shown, tensor) if kind == "input" else (after, other, tensor, shown)
                way[0].append(_cast(names.new(f"{kind}_cast"), *way[1:]))
            tensors[index] = outer[id(tensor)]
            log.notes.append(
                f"{kind} {tensors[index].name!r} is {own.name} in the source; {target} has no such {kind}: "
                f"it is {other.name}"
            )
    graph.nodes = [*before, *graph.nodes, *after]
    return [*before, *after]


def _cast(name: str, to: np.dtype[Any], x: gs.Variable, y: gs.Variable) -> gs.Node:
    return Node("Cast", name, {"to": onnx_dtype(to)}, [x], [y], domain="")


def _names(nodes: list[gs.Node]) -> list[str]:
    return [node.name for node in nodes]


def _lacking(tensor: gs.Variable, kind: str, target: Target) -> bool:
    name = np.dtype(tensor.dtype).name
    if name == "int8" and target.strongly_typed:
        return False
    if name not in target.types:
        return name in CARRIERS
    if name not in _QUANTISED:
        return False
    if kind == "output":
        return not (tensor.inputs and tensor.inputs[0].op == "QuantizeLinear" and _around_zero(tensor.inputs[0]))
    return not all(node.op == "DequantizeLinear" and _around_zero(node) for node in tensor.outputs)


def _around_zero(node: gs.Node) -> bool:
    """Whether it quantises as TensorRT does."""
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return True
    zero = node.inputs[2]
    return isinstance(zero, gs.Constant) and not np.asarray(zero.values).astype(np.float32).any()
