"""What a node is, and what its constants hold, as far as that counts for its precision."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from .ir import CONTROL_FLOW, scopes
from .low_types import Extent, extent, is_float32, is_half
from .sound_tables import (
    ABSORBING,
    ARITHMETIC,
    CHOOSING,
    IN_SPACE,
    LINEAR,
    MASKS,
    MOVEMENT,
    ONE_SIDED,
    PASSING,
    REASONS,
)


def touched(graph: gs.Graph) -> Iterator[gs.Node]:
    """The nodes of ``graph`` and its bodies that read or make float32, or 16 bits, but for what runs bodies."""
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            if node.op not in CONTROL_FLOW and any(
                is_float32(item) or is_half(item) for item in (*node.inputs, *node.outputs)
            ):
                yield node


def maker_of(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def elementwise(node: gs.Node) -> bool:
    """Whether it computes element by element, or hands on; a product with one term to each sum does."""
    if node.domain:
        return False
    if node.op in ("MatMul", "Gemm"):
        return terms(node) == 1
    return node.op in ARITHMETIC or node.op in MOVEMENT or node.op in REASONS


def gain(node: gs.Node) -> float:
    """How much larger the errors of its inputs are behind the node; 0 where they are not to be followed through it.

    A product of vectors in space has so few terms that these do not average out.
    """
    if node.op in ("Gemm", "MatMul"):
        return float(is_in_space(node))
    if node.op not in ("Div", "Mul"):
        return float(node.op in MOVEMENT or node.op in LINEAR)
    factors = [extent(item).largest for item in node.inputs if isinstance(item, gs.Constant) and is_float32(item)]
    factor = factors[0] if len(factors) == 1 else 0.0
    return 1 / factor if factor and node.op == "Div" else factor


def terms(node: gs.Node) -> int | None:
    """How many products each sum of a MatMul or Gemm has; None where that is not known."""
    shape = node.inputs[0].shape
    found = shape[0 if node.attrs.get("transA", 0) else -1] if shape else None
    return found if isinstance(found, int) else None


def is_in_space(node: gs.Node) -> bool:
    """Whether it is a MatMul or Gemm of so few terms as points in space have coordinates."""
    known = terms(node) if node.op in ("Gemm", "MatMul") and not node.domain else None
    return known is not None and known <= IN_SPACE


def handed_on(tensor: gs.Tensor) -> gs.Node | None:
    """What makes the values that the tensor holds, some of which a Where may have replaced by a constant."""
    maker = maker_of(tensor)
    while maker is not None and not maker.domain and (maker.op in MOVEMENT or maker.op == "Where"):
        free = [item for item in maker.inputs[maker.op == "Where" :] if not is_constant(item)]
        maker = maker_of(free[0]) if free else None
    return maker


def chosen_from(tensor: gs.Tensor) -> tuple[dict[int, gs.Tensor], list[gs.Node]]:
    """All tensors, by their ids, that the values of ``tensor`` were handed on from, itself among them; and by which
    nodes."""
    found, by, waiting = {id(tensor): tensor}, list[gs.Node](), [tensor]
    while waiting:
        maker = maker_of(waiting.pop())
        if maker is None or maker.domain or maker.op in ("Cast", "DequantizeLinear"):
            continue
        if maker.op not in MOVEMENT and maker.op not in CHOOSING:
            continue
        by.append(maker)
        more = [item for item in maker.inputs if is_float32(item) and not is_constant(item) and id(item) not in found]
        found.update((id(item), item) for item in more)
        waiting.extend(more)
    return found, by


def absorbed(node: gs.Node, ends: Collection[float], boundary: Collection[int]) -> bool:
    """Whether what the node makes of values as large as ``ends`` ends where they are as good as infinite, and leaves
    the graph by none of the tensors whose ids are in ``boundary``."""
    absorbing = ABSORBING if max(ends) < 0 and node.op != "Sub" else ABSORBING - ONE_SIDED
    waiting, seen = list(node.outputs), {id(tensor) for tensor in node.outputs}
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in boundary:
            return False
        for reader in tensor.outputs:
            if reader.domain or reader.op in CONTROL_FLOW:
                return False
            if reader.op in absorbing or not any(map(is_float32, reader.outputs)):
                continue
            if not elementwise(reader) and reader.op not in PASSING:
                return False
            more = [item for item in reader.outputs if is_float32(item) and id(item) not in seen]
            seen.update(map(id, more))
            waiting.extend(more)
    return True


def added_to(tensor: gs.Tensor, others: Collection[int]) -> bool:
    """Whether what becomes of it, element by element, is next added to one of ``others``, as a part of these."""
    waiting, seen = [tensor], {id(tensor)}
    while waiting:
        for reader in waiting.pop().outputs:
            if reader.op in ("Add", "Sub", "Sum"):
                if any(id(item) in others for item in reader.inputs):
                    return True
            elif elementwise(reader):
                waiting.extend(item for item in reader.outputs if id(item) not in seen)
                seen.update(map(id, reader.outputs))
    return False


def is_integer(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iu"


def is_constant(tensor: gs.Tensor) -> bool:
    if isinstance(tensor, gs.Constant) or tensor.is_empty():
        return True
    maker = maker_of(tensor)
    return maker is not None and maker.op == "Constant" and not maker.domain


def extent_of(node: gs.Node, index: int | None) -> Extent | None:
    """What a constant input of float32 holds, or (None) the value that a ConstantOfShape fills with."""
    value = node.attrs.get("value") if index is None and node.op == "ConstantOfShape" else None
    if index is not None:
        tensor = node.inputs[index]
        value = tensor
        if not isinstance(tensor, gs.Constant) and is_constant(tensor) and not tensor.is_empty():
            value = tensor.inputs[0].attrs.get("value")
    return extent(value) if isinstance(value, gs.Constant) and is_float32(value) else None


def may_clamp(node: gs.Node, index: int | None, known: Extent) -> bool:
    """Whether the constant means the same at the end of the low type's range: as a mask, or as a bound."""
    if node.op in ("Where", "Clip", "Max", "Min", "Pad", "ScatterElements", "ScatterND") or index is None:
        return True
    if node.op == "Add":
        return abs(known.low) > abs(known.high)
    if node.op == "Sub":
        return (known.high if index == 1 else -known.low) >= known.largest
    if node.op == "Mul":
        return all(is_binary(tensor) for place, tensor in enumerate(node.inputs) if place != index)
    return known.largest >= MASKS and node.op in MOVEMENT


def is_bound(node: gs.Node) -> bool:
    """Whether a constant of the node is a bound: that of the type is one as well."""
    return node.op in ("Clip", "Max", "Min")


def is_binary(tensor: gs.Tensor, depth: int = 8) -> bool:
    """Whether it holds only zeros and ones, or the negative of such: a mask as numbers."""
    maker = maker_of(tensor)
    if maker is None or not depth or maker.domain:
        return False
    if maker.op == "Cast":
        kind = maker.inputs[0].dtype
        return kind is not None and np.dtype(kind) == np.bool_
    if maker.op == "Sub" or maker.op in MOVEMENT or maker.op == "Neg":
        free = [item for item in maker.inputs if is_float32(item) and not is_constant(item)]
        ones = [extent_of(maker, place) for place, item in enumerate(maker.inputs) if is_constant(item)]
        plain = all(item is None or (item.low in (0.0, 1.0) and item.high in (0.0, 1.0)) for item in ones)
        return bool(free) and plain and all(is_binary(item, depth - 1) for item in free)
    return False


def shown(known: Extent) -> str:
    return f"{known.low if abs(known.low) > abs(known.high) else known.high:.4g}"
