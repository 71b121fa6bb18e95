"""Computes a float32 model in float16 or bfloat16: each node of which the standard allows it, but for those named.

A tensor has the type that its node makes; where a reader wants another one, one Cast behind the maker serves all of
them, so that no pair of casts arises. Bodies are cast inside, and keep float32 at their boundaries: what a Loop carries
from round to round adds up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .clean import infer_types, oldest_ir_version, put_in_order, refine_types
from .expand import inline_functions
from .ir import Constant, Names, Node, bodies, collector_paused, node_metadata, scopes, type_known
from .low_types import (
    FLOAT32,
    TYPE_ATTRIBUTES,
    LowType,
    extent,
    is_float32,
    is_half,
    low_type,
    ports,
    rounded_constant,
)
from .raising import raise_for

if TYPE_CHECKING:
    Io = Literal["keep", "convert"]

COMPUTE = frozenset(
    ("Attention", "Conv", "ConvTranspose", "DeformConv", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN")
)
"""Operators that multiply and add; what they compute in is what a model computes in."""
MASKING = frozenset(
    ("Add", "Concat", "ConstantOfShape", "Expand", "Mul", "Pad", "ScatterElements", "ScatterND", "Sub", "Where")
)
"""Operators whose constants beyond the low type's range are masks: they stand for infinity."""
ORIGIN = "bridge.rule"


@dataclass
class CastLog:
    """What was done."""

    low: str = ""
    nodes: list[str] = field(default_factory=list)
    """Nodes that are computed in the low type."""
    casts: int = 0
    clamped: dict[str, float] = field(default_factory=dict)
    """Of constants with finite values beyond the low type's, which became its ends: the largest magnitude by name."""
    notes: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return bool(self.nodes or self.casts)


@collector_paused()
def cast(
    graph: gs.Graph, low: str, fp32: Collection[str], io: Io = "keep", *, saturated: Collection[str] = ()
) -> CastLog:
    """Computes ``graph`` in ``low`` (``float16`` or ``bfloat16``), but for the nodes called as in ``fp32``; in place.

    ``io``: the graph's float32 inputs and outputs keep their type, or ``convert`` to the low one. ``saturated`` names
    tensors that hold values beyond the low type's range which may become its ends (a mask's "minus infinity").
    Local functions are inlined; plugins and operators of other domains are computed in float32. A model that computes
    in 16 bits already is left as it is.
    """
    kind = low_type(low)
    log = CastLog(low)
    if computes_in_half(graph):
        log.notes.append("the model computes in 16 bits already: its types are left as they are")
        return log
    prepare(graph)
    log.notes.extend(raise_for(graph, kind, fp32))
    _Caster(graph, kind, frozenset(fp32), frozenset(saturated), log).run(io)
    if log.changed:
        graph.ir_version = max(graph.ir_version or 0, oldest_ir_version(graph))
    return log


def prepare(graph: gs.Graph) -> None:
    """Inlines local functions, puts the nodes in order, gives them names of their own, and learns all types."""
    inline_functions(graph)
    put_in_order(graph)
    if any(
        not type_known(tensor)
        for scope in scopes(graph, functions=False)
        for node in scope.nodes
        for tensor in node.outputs
        if tensor.name
    ):
        infer_types(graph)
        refine_types(graph)
    for scope in scopes(graph, functions=False):
        for node in scope.nodes:
            if node.op == "Cast" and not node.domain and all(map(is_float32, (*node.inputs, *node.outputs))):
                node.op = "Identity"  # as a Cast, it would round when its output is of the low type
                node.attrs.clear()


def computes_in_half(graph: gs.Graph) -> bool:
    """Whether most of what multiplies and adds is in 16 bits, or there is none in float32 and something in 16 bits."""
    halves = floats = 0
    other = False
    for scope in scopes(graph):
        for node in scope.nodes:
            half = any(map(is_half, node.outputs))
            other |= half
            if node.op in COMPUTE and not node.domain:
                halves += half
                floats += not half and any(map(is_float32, node.outputs))
    return halves > floats or (other and not halves and not floats)


class _Caster:
    """One graph under way. ``lowered`` are the tensors that get the low type, and have it in the end."""

    def __init__(
        self, graph: gs.Graph, low: LowType, fp32: frozenset[str], saturated: frozenset[str], log: CastLog
    ) -> None:
        self.graph, self.low, self.fp32, self.saturated, self.log = graph, low, fp32, saturated, log
        self.names = Names(graph)
        self.lowered: dict[int, gs.Tensor] = {}
        self.copies: dict[int, gs.Tensor] = {}
        """Of a tensor (by its id), the one in the other type."""
        self.masks: dict[int, gs.Tensor] = {}
        """The same of constants that are masks."""
        self.after: dict[int, list[gs.Node]] = {}
        """Of a tensor, what has to follow its maker."""
        self.constants: list[tuple[gs.Constant, gs.Constant]] = []
        """Constants, and what they are in the low type."""

    def run(self, io: Io) -> None:
        if io == "convert":
            for tensor in self.graph.inputs:
                if is_float32(tensor):
                    self.lowered[id(tensor)] = tensor
        self._scope(self.graph)
        for tensor in self.lowered.values():
            tensor.dtype = self.low.dtype
        self._outputs(io)
        self._place(self.graph)
        self._name_constants()

    # types

    def _scope(self, scope: gs.Graph) -> None:
        for node in scope.nodes:
            scanned: frozenset[int] = frozenset()
            for body in bodies(node):
                self._scope(body)
                for index, tensor in enumerate(body.outputs):
                    body.outputs[index] = self._as_float32(tensor)
                if node.op == "Scan" and not node.domain:
                    scanned = self._cast_before(node, body)
            self._node(node, scope.opset, scanned)

    def _cast_before(self, scan: gs.Node, body: gs.Graph) -> frozenset[int]:
        """Casts what a Scan goes through before the Scan, where its body wants it low; returns these inputs.

        One Cast of all is as good as one in each round, which TensorRT-RTX's builder refuses. What the body wants in
        both types it gets twice.
        """
        found = []
        end = len(body.inputs)
        first = end - int(scan.attrs["num_scan_inputs"])
        ahead = len(scan.inputs) - end  # before opset 9, the lengths
        for index in range(first, end):
            formal, copy = body.inputs[index], self.copies.get(id(body.inputs[index]))
            behind = self.after.get(id(formal), [])
            if copy is None or len(behind) != 1:
                continue
            del self.after[id(formal)]
            behind[0].inputs.clear()
            behind[0].outputs.clear()
            self.log.casts -= 1
            if formal.outputs or any(formal is tensor for tensor in body.outputs):
                body.inputs.append(copy)
                scan.inputs.append(scan.inputs[index + ahead])
                scan.attrs["num_scan_inputs"] += 1
                for name in ("scan_input_axes", "scan_input_directions"):
                    if name in scan.attrs:
                        scan.attrs[name] = [*scan.attrs[name], scan.attrs[name][index - first]]
                found.append(len(scan.inputs) - 1)
            else:
                body.inputs[index], copy.name = copy, formal.name
                found.append(index + ahead)
        return frozenset(found)

    def _node(self, node: gs.Node, opset: int, scanned: frozenset[int]) -> None:
        found = ports(node, opset, self.low)
        if node.name in self.fp32:
            found = found.kept
        either = self._either(node, found.either)
        for index, tensor in enumerate(node.inputs):
            if tensor.is_empty() or not (is_float32(tensor) or id(tensor) in self.lowered):
                continue
            low = index in found.inputs or index in scanned or either.get(index, False)
            node.inputs[index] = self._as_low(tensor, node.op in MASKING) if low else self._as_float32(tensor)
        if found.outputs:
            self.log.nodes.append(node.name)
        for index in sorted(found.outputs):
            self.lowered[id(node.outputs[index])] = node.outputs[index]
        self._attributes(node, found.outputs)

    def _either(self, node: gs.Node, either: Mapping[int, str]) -> dict[int, bool]:
        """Of inputs that may be of either type, whether they are low: where all of one variable's are so already."""
        found: dict[int, bool] = {}
        for variable in set(either.values()):
            places = [index for index, name in either.items() if name == variable]
            free = [index for index in places if not isinstance(node.inputs[index], gs.Constant)]
            low = bool(free) and all(id(node.inputs[index]) in self.lowered for index in free)
            found.update(dict.fromkeys(places, low))
        return found

    def _attributes(self, node: gs.Node, outputs: Collection[int]) -> None:
        """Lets attributes that name a type or hold a value follow the node's output."""
        if not outputs:
            return
        if node.op in TYPE_ATTRIBUTES:
            node.attrs[TYPE_ATTRIBUTES[node.op]] = self.low.number
        elif node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            values = np.zeros(1, FLOAT32) if value is None else value
            constant = values if isinstance(values, gs.Constant) else Constant("value", np.asarray(values))
            node.attrs["value"] = self._rounded(constant, node.name, self.low.mask)
        elif node.op == "DequantizeLinear" and is_float32(node.inputs[1]):
            if node.attrs.get("block_size"):  # TensorRT-RTX's builder takes no other type than its scales'
                node.inputs[1] = self._as_low(node.inputs[1])
            else:
                node.attrs["output_dtype"] = self.low.number

    # tensors in the other type

    def _as_float32(self, tensor: gs.Tensor) -> gs.Tensor:
        return self._copy(tensor, FLOAT32) if id(tensor) in self.lowered else tensor

    def _as_low(self, tensor: gs.Tensor, mask: bool = False) -> gs.Tensor:
        """``mask``: of a constant, what is beyond the range stands for infinity, and is no bound."""
        if id(tensor) in self.lowered:
            return tensor
        if not isinstance(tensor, gs.Constant):
            source = self._widened(tensor)
            if source is not None:
                return source
        return self._copy(tensor, self.low.dtype, mask)

    def _widened(self, tensor: gs.Tensor) -> gs.Tensor | None:
        """What the tensor was in the low type, where a Cast that the source has widened it: nothing is lost."""
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is None or maker.op != "Cast" or maker.domain or maker.inputs[0].dtype is None:
            return None
        return maker.inputs[0] if np.dtype(maker.inputs[0].dtype) == self.low.dtype else None

    def _copy(self, tensor: gs.Tensor, dtype: np.dtype[Any], mask: bool = False) -> gs.Tensor:
        maker = tensor.inputs[0] if tensor.inputs else None
        constant = tensor if isinstance(tensor, gs.Constant) else _constant_of(maker)
        copies = self.masks if mask and constant is not None and self._is_beyond(constant) else self.copies
        if id(tensor) in copies:
            return copies[id(tensor)]
        made: gs.Tensor
        if constant is not None:
            made = self._rounded(constant, tensor.name, self.low.mask if mask else self.low.largest)
            self.constants.append((constant, made))
        else:
            shape = None if tensor.shape is None else list(tensor.shape)
            made = gs.Variable(self.names.new(f"{tensor.name}_{dtype.name}"), dtype, shape)
            self._add_cast(tensor, made, maker)
        copies[id(tensor)] = made
        return made

    def _add_cast(self, tensor: gs.Tensor, made: gs.Variable, maker: gs.Node | None) -> None:
        """Casts ``tensor`` to ``made``, whose type says how, behind what makes it."""
        source = tensor
        metadata = {**(node_metadata(maker) if maker is not None else {}), ORIGIN: "cast"}
        behind = self.after.setdefault(id(tensor), [])
        if tensor.name in self.saturated and made.dtype == self.low.dtype:
            shape = None if tensor.shape is None else list(tensor.shape)
            source = gs.Variable(self.names.new(f"{tensor.name}_saturated"), FLOAT32, shape)
            ends = [Constant(f"{tensor.name}_{end}", np.array(end, FLOAT32)) for end in (-self.low.mask, self.low.mask)]
            clip = Node("Clip", self.names.new(f"{tensor.name}/saturate"), {}, [tensor, *ends], [source], domain="")
            clip.metadata = dict(metadata)
            behind.append(clip)
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(made.dtype))
        name = self.names.new(f"{tensor.name}/cast_{np.dtype(made.dtype).name}")
        node = Node("Cast", name, {"to": int(to)}, [source], [made], domain="")
        node.metadata = metadata
        behind.append(node)
        self.log.casts += 1

    def _rounded(self, constant: gs.Constant, name: str, end: float) -> gs.Constant:
        if self._is_beyond(constant):
            self.log.clamped[name] = extent(constant).largest
        return rounded_constant(constant, self.low, constant.name, end)

    def _is_beyond(self, constant: gs.Constant) -> bool:
        return extent(constant).largest > self.low.largest

    # the boundary, and what was added

    def _outputs(self, io: Io) -> None:
        """Gives the graph's outputs their type; a tensor that changes its type leaves its name to the output."""
        renamed: dict[int, gs.Tensor] = {}
        for index, tensor in enumerate(self.graph.outputs):
            low = id(tensor) in self.lowered
            if id(tensor) in renamed:
                self.graph.outputs[index] = renamed[id(tensor)]
            elif low != (io == "convert") and (low or is_float32(tensor)):
                outer = self._as_float32(tensor) if low else self._as_low(tensor)
                if any(outer is item for item in self.graph.inputs) or outer is self._widened(tensor):
                    outer = self._identity(outer)
                name, outer_name = tensor.name, self.names.new(f"{tensor.name}_inner")
                outer.name, tensor.name = name, outer_name
                renamed[id(tensor)] = self.graph.outputs[index] = outer

    def _identity(self, tensor: gs.Tensor) -> gs.Variable:
        shape = None if tensor.shape is None else list(tensor.shape)
        copy = gs.Variable(self.names.new(f"{tensor.name}_copy"), tensor.dtype, shape)
        node = Node("Identity", self.names.new(f"{tensor.name}/identity"), {}, [tensor], [copy], domain="")
        self.graph.nodes.append(node)
        return copy

    def _place(self, scope: gs.Graph) -> None:
        nodes: list[gs.Node] = self._behind(scope.inputs)
        for node in scope.nodes:
            for body in bodies(node):
                self._place(body)
            nodes.append(node)
            nodes.extend(self._behind(node.outputs))
        scope.nodes = [node for node in nodes if node.op != "Constant" or node.domain or _read(node, scope)]

    def _behind(self, tensors: Iterable[gs.Tensor]) -> list[gs.Node]:
        return [node for tensor in tensors for node in self.after.get(id(tensor), ())]

    def _name_constants(self) -> None:
        """A constant that is read in both types leaves its name to the one in float32."""
        boundary = {id(tensor) for scope in scopes(self.graph, functions=False) for tensor in scope.outputs}
        for constant, made in self.constants:
            if (constant.outputs or id(constant) in boundary) and id(made) not in boundary:
                made.name = self.names.new(f"{constant.name}_{self.low.name}")


def _constant_of(maker: gs.Node | None) -> gs.Constant | None:
    """What a Constant node holds."""
    if maker is None or maker.op != "Constant" or maker.domain:
        return None
    name = maker.outputs[0].name
    for attribute in ("value", "value_float", "value_floats"):
        value = maker.attrs.get(attribute)
        if isinstance(value, gs.Constant):
            return Constant(name, value._values)
        if value is not None and not isinstance(value, gs.Node.AttributeRef):
            return Constant(name, np.asarray(value, FLOAT32))
    return None


def _read(node: gs.Node, scope: gs.Graph) -> bool:
    return any(tensor.outputs or any(tensor is item for item in scope.outputs) for tensor in node.outputs)
