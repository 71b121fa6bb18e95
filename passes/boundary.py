"""Inputs and outputs of types that no engine has become ones of a wider type, with a Cast inside; the user is told.

What the wider type holds is the same: an output in float8 is one in float32 that has float8's values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from .framework import Log
from .ir import Names, Node, onnx_dtype
from .rules.integers import CARRIERS, carrier

if TYPE_CHECKING:
    from bridge.target import Target

NAME = "boundary_to_wider_types"

_QUANTISED = ("int8", "float8_e4m3fn", "int4")
"""Types that a target may have, and then only between QuantizeLinear and DequantizeLinear.

Of int8, only where the target chooses types by itself: it takes other int8 for quantised too."""


def boundary_to_wider_types(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Gives inputs and outputs of types that the target lacks the type that carries theirs."""
    names: Names | None = None
    outer: dict[int, gs.Variable] = {}
    before: list[gs.Node] = []
    after: list[gs.Node] = []
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for index, tensor in enumerate(tensors):
            if tensor.dtype is None or not _lacking(tensor, kind, target):
                continue
            if id(tensor) not in outer:  # else an input that is an output too
                names = names or Names(graph)
                narrow, wide = np.dtype(tensor.dtype), carrier(tensor.dtype)
                shape = list(tensor.shape) if tensor.shape is not None else None
                wider = outer[id(tensor)] = gs.Variable(tensor.name, wide, shape)
                tensor.name = names.new(f"{tensor.name}_{narrow.name}")
                if log.recorder is not None:
                    log.recorder.renamed[tensor.name] = wider.name
                if kind == "input":
                    cast = Node("Cast", names.new("input_cast"), {"to": onnx_dtype(narrow)}, [wider], [tensor])
                    before.append(cast)
                else:
                    cast = Node("Cast", names.new("output_cast"), {"to": onnx_dtype(wide)}, [tensor], [wider])
                    after.append(cast)
                cast.domain = ""
                log.notes.append(
                    f"{kind} {wider.name!r} is {narrow.name} in the source; {target} has no such {kind}: "
                    f"it is {wide.name}"
                )
            tensors[index] = outer[id(tensor)]
    if not outer:
        return False
    graph.nodes = [*before, *graph.nodes, *after]
    log.add(NAME, f"{target} has no inputs and outputs of this type.", [node.name for node in (*before, *after)])
    return True


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
