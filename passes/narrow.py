"""Types that the target lacks are replaced by others, and the user is told: float64, bfloat16 and int64.

TensorRT's parsers do some of it unsaid; said in the graph, ONNX Runtime shows what it costs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto

from .framework import Log
from .ir import calls, function_key, numpy_dtype, onnx_dtype, scopes
from .provenance import describe

if TYPE_CHECKING:
    from bridge.target import Target

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision", "precision")


@dataclass(frozen=True)
class _Swap:
    """A type of the source, and the one that takes its place throughout."""

    old: np.dtype[Any]
    new: np.dtype[Any]

    @property
    def old_number(self) -> int:
        return onnx_dtype(self.old)

    @property
    def new_number(self) -> int:
        return onnx_dtype(self.new)


def float64_to_float32(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Computes in float32 what the model computes in float64, where the target has no float64; says where."""
    swap = _Swap(np.dtype(np.float64), np.dtype(np.float32))
    reason = f"{target} has no float64; its parser would turn some of it into float32 unsaid."
    return _swap_type(graph, swap, target, log, "float64_to_float32", reason)


def bfloat16_to_float32(graph: gs.Graph, target: Target, log: Log) -> bool:
    """Computes in float32 what the model computes in bfloat16, where the target has no bfloat16; says where.

    Every bfloat16 is a float32. What is computed keeps digits that bfloat16 would have lost.
    """
    swap = _Swap(onnx_bfloat16(), np.dtype(np.float32))
    return _swap_type(graph, swap, target, log, "bfloat16_to_float32", f"{target} has no bfloat16.")


def onnx_bfloat16() -> np.dtype[Any]:
    return numpy_dtype(onnx.TensorProto.BFLOAT16)


def _is(tensor: gs.Tensor, dtype: np.dtype[Any]) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype) == dtype  # NumPy takes None for float64


def _swap_type(graph: gs.Graph, swap: _Swap, target: Target, log: Log, name: str, reason: str) -> bool:
    old, new = swap.old.name, swap.new.name
    if old in target.types:
        return False
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.op == "BitCast" and any(_is(tensor, swap.old) for tensor in (*node.inputs, *node.outputs)):
                log.notes.append(f"{target} has no {old}, and {describe(node)} reads or makes the bits of one")
                return False
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for tensor in tensors:
            if _is(tensor, swap.old):
                log.notes.append(f"{kind} {tensor.name!r} is {old} in the source; {target} has no {old}: it is {new}")
    changed: list[str] = []
    type_names = _type_attributes(graph)
    for scope in scopes(graph):
        for node in scope.nodes:
            typed = type_names.get(calls(node), () if node.domain else _TYPE_ATTRIBUTES)
            if _swap_in_node(node, swap, typed):
                changed.append(describe(node))
        for tensor in (*scope.inputs, *scope.outputs):
            _swap_in_tensor(tensor, swap)
    for function in graph.functions:
        for attribute in type_names[function_key(function)]:
            if function.attrs.get(attribute) == swap.old_number:
                function.attrs[attribute] = swap.new_number
    if changed:
        log.add(name, reason, changed)
    return bool(changed)


def _swap_in_node(node: gs.Node, swap: _Swap, typed: Collection[str]) -> bool:
    """True if any of the node's tensors or attributes was of the old type; ``typed`` attributes name a type."""
    hit = [_swap_in_tensor(tensor, swap) for tensor in (*node.inputs, *node.outputs)]
    for name, value in node.attrs.items():
        if isinstance(value, gs.Constant):
            hit.append(_swap_in_tensor(value, swap))
        elif isinstance(value, AttributeProto):
            hit.append(_swap_in_proto(value.tp, swap))
        elif isinstance(value, int) and value == swap.old_number and name in typed:
            node.attrs[name] = swap.new_number
            hit.append(True)
    return any(hit)


def _type_attributes(graph: gs.Graph) -> dict[tuple[str, str, str], set[str]]:
    """Of each local function, the attributes that give an element type to a node inside, or in turn to a function."""
    found: dict[tuple[str, str, str], set[str]] = {function_key(function): set() for function in graph.functions}
    for _ in graph.functions:  # each round goes one call further out
        for function in graph.functions:
            for scope in scopes(function, functions=False):
                for node in scope.nodes:
                    for name, value in node.attrs.items():
                        typed = found.get(calls(node), () if node.domain else _TYPE_ATTRIBUTES)
                        if isinstance(value, gs.Node.AttributeRef) and name in typed:
                            found[function_key(function)].add(value.name)
    return found


def _swap_in_tensor(tensor: gs.Tensor, swap: _Swap) -> bool:
    """Gives a tensor of the old type, or a container of such, the new one; True if it was one."""
    container = tensor.__dict__.get("container")
    if container is not None:
        return _swap_in_proto(container, swap)
    if not _is(tensor, swap.old):
        return False
    if isinstance(tensor, gs.Constant):
        values = np.asarray(tensor.values)
        if swap.old.itemsize > swap.new.itemsize:
            limits = np.finfo(swap.new)
            values = np.where(np.isfinite(values), np.clip(values, limits.min, limits.max), values)
        tensor.values = values.astype(swap.new)
    else:
        tensor.dtype = swap.new
    return True


def _swap_in_proto(proto: onnx.TypeProto, swap: _Swap) -> bool:
    kind = proto.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        inner = getattr(proto, kind)
        old = inner.elem_type == swap.old_number
        if old:
            inner.elem_type = swap.new_number
        return bool(old)
    if kind in ("sequence_type", "optional_type"):
        return _swap_in_proto(getattr(proto, kind).elem_type, swap)
    return kind == "map_type" and _swap_in_proto(proto.map_type.value_type, swap)


# --- int64 that the parser narrows by itself -------------------------------------------------------------------------

ORDER = frozenset(("Clip", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Slice"))
"""Operators that compare: of what lies beyond int32, the last int32 stands in for it."""
ENDS = frozenset(("Concat", "ConstantOfShape", "Expand", "Pad", "Where"))
"""Operators that hand a value on: the ends of int64 (a mask's "less than all") become the ends of int32."""
GROWING = frozenset(("CumSum", "MatMul", "Mul", "Pow", "ReduceProd", "ReduceSum"))
"""Integer arithmetic whose result may be far from what it is made of."""
BOUNDED = frozenset(("ArgMax", "ArgMin", "NonZero", "Shape", "Size", "TopK"))
"""Operators whose integers are places or sizes, whatever they read."""


def check_int64_range(graph: gs.Graph, target: Target, log: Log) -> None:
    """Names the nodes whose int64 constants are beyond int32, where the target's parser makes int32 of int64.

    It clamps them without an error. What is computed from the caller's integers cannot be known; a note says where.
    """
    if "int64" in target.types:
        return
    for scope in scopes(graph):
        for node in scope.nodes:
            held = [item for item in (*node.inputs, *node.attrs.values()) if isinstance(item, gs.Constant)]
            beyond = [value for item in held if item.dtype == np.int64 for value in _beyond_int32(item)]
            if not beyond or node.op in ORDER or (node.op in ENDS and all(map(_is_end, beyond))):
                continue
            reason = f"{target} has no int64 and clamps the constant {beyond[0]}, which is beyond int32"
            log.declined["int64_range", node.name] = (describe(node), reason)
    growing = _growing(graph)
    if growing:
        named = ", ".join(growing[:3]) + (f" and {len(growing) - 3} more" if len(growing) > 3 else "")
        fused = " (and within 2**24, 16777216, where it fuses several operators)" if target.of_tensorrt_8 else ""
        log.notes.append(
            f"{target} has no int64: integers computed from the inputs must stay within int32{fused} at {named}"
        )


def _beyond_int32(constant: gs.Constant) -> list[int]:
    """The lowest and the highest value, where they are beyond int32."""
    values = np.asarray(constant.values)
    limits = np.iinfo(np.int32)
    ends = [int(values.min()), int(values.max())] if values.size else []
    return [value for value in ends if not limits.min <= value <= limits.max]


def _is_end(value: int) -> bool:
    limits = np.iinfo(np.int64)
    return value in (limits.min, limits.min + 1, limits.max)


def _growing(graph: gs.Graph) -> list[str]:
    """The int64 arithmetic on what the caller gives, or what is rounded from floats."""
    free = {id(tensor) for tensor in graph.inputs if tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iu"}
    found = []
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            reads = any(id(tensor) in free for tensor in node.inputs)
            rounded = node.op == "Cast" and node.inputs[0].dtype is not None and node.inputs[0].dtype.kind == "f"
            for tensor in node.outputs:
                if tensor.dtype != np.int64 or node.op in BOUNDED or not (reads or rounded):
                    continue
                free.add(id(tensor))
                if node.op in GROWING:
                    found.append(describe(node))
    return found


# --- infinity, which TensorRT 8 computes with as 1e38 ----------------------------------------------------------------

COMPARING = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"))
COMPUTING = frozenset(("Add", "Div", "Max", "Min", "Mul", "Sub", "Where"))
HANDING = COMPUTING | {"Cast", "Expand", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
HIDING = frozenset(("Softmax", "LogSoftmax"))
"""Operators to which the least of numbers is as good as minus infinity."""


def check_infinite_constants(graph: gs.Graph, target: Target, log: Log) -> None:
    """Notes where TensorRT 8 takes 1e38 for an infinite constant, unless nothing but a softmax sees it."""
    if not target.of_tensorrt_8:
        return
    outputs = {id(tensor) for tensor in graph.outputs}
    found = [
        describe(node)
        for scope in scopes(graph, functions=False)
        for node in scope.nodes
        if node.op in COMPARING | COMPUTING and any(map(_is_infinite, node.inputs)) and not _is_hidden(node, outputs)
    ]
    if found:
        named = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        log.notes.append(
            f"{target} computes with 1e38 where a constant is infinite, as at {named}; where that matters, write "
            "torch.finfo(x.dtype).max (or min) for infinity"
        )


def _is_infinite(tensor: gs.Tensor) -> bool:
    if not isinstance(tensor, gs.Constant) or np.dtype(tensor.dtype).kind != "f":
        return False
    return bool(np.isinf(np.asarray(tensor.values)).any())


def _is_hidden(node: gs.Node, outputs: set[int], depth: int = 8) -> bool:
    """Whether all readers are a softmax, or hand its numbers on to one."""
    if node.op in HIDING:
        return True
    readers = [reader for tensor in node.outputs for reader in tensor.outputs]
    if not readers or depth == 0 or node.op not in HANDING or any(id(tensor) in outputs for tensor in node.outputs):
        return False
    return all(_is_hidden(reader, outputs, depth - 1) for reader in readers)
