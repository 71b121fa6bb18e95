"""Quantises a model by QuantizeLinear and DequantizeLinear pairs, placed where TensorRT makes kernels of them.

Scales are symmetric (TensorRT knows no zero point other than 0), one for each activation and one for each output
channel of a weight. A tensor has one pair, which all its quantised readers share. Weights stay what they are, behind a
pair that the builder computes away, so that a model of many gigabytes is quantised in megabytes; those of int4 alone,
which has no QuantizeLinear, are stored anew. A bias stays in floating point.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from .clean import infer_types, oldest_ir_version
from .ir import Array, Constant, Names, Node, collector_paused, node_metadata, scopes, type_name
from .raising import raise_to

if TYPE_CHECKING:
    from bridge.ranges import Ranges

Scheme = Literal["int8", "fp8", "int4"]

PRODUCTS = frozenset(("MatMul", "Gemm"))
QUANTISABLE: Mapping[Scheme, frozenset[str]] = {
    "int8": PRODUCTS | {"Conv", "ConvTranspose"},
    "fp8": PRODUCTS,
    "int4": PRODUCTS,
}
"""Operators that have kernels for it: TensorRT documents fp8 and int4 for matrix products alone."""
OPSETS: Mapping[Scheme, int] = {"int8": 13, "fp8": 19, "int4": 21}
"""The first opset that can say it (scales by channel, the type, blocks) of float32; of half precision, 19 or later."""
LARGEST: Mapping[Scheme, float] = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
"""The number that the largest magnitude becomes; the types have no more of both signs."""
BLOCKS = (128, 64)
"""How many int4 weights may share a scale."""
SMALLEST_SCALE = 2.0**-24
"""float16's smallest number: scales may become float16 later on, and none may become 0."""
FLOATS = ("float32", "float16", "bfloat16")
VIEWS = frozenset(("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"))
"""What moves a weight's values and changes none."""


@dataclass
class QuantisationLog:
    """What was done."""

    scheme: str
    quantised: dict[str, str] = field(default_factory=dict)
    """Operators by the names of the nodes that compute on quantised inputs."""
    declined: dict[str, str] = field(default_factory=dict)
    """Of the other nodes that were asked for: why not."""
    pairs: int = 0
    """How many tensors were given a pair (int4: a DequantizeLinear)."""
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many nodes of each operator are quantised."""
        return dict(Counter(self.quantised.values()))


class _Decline(Exception):
    """Why a node is not quantised."""


@collector_paused()
def quantise(graph: gs.Graph, scheme: Scheme, ranges: Ranges, nodes: Collection[str]) -> QuantisationLog:
    """Gives the inputs of the nodes called as in ``nodes`` their pairs; in place, bodies included.

    ``ranges`` (``bridge.ranges.measure``, by the names that tensors have here) scale the activations; int4 needs none.
    Inputs that come from a DequantizeLinear are left as they are, so that doing it twice changes nothing. A node that
    cannot be quantised is left in floating point, with the reason in the log. The model comes to a newer opset where
    its own cannot say it.
    """
    log = QuantisationLog(scheme)
    infer_types(graph)
    blockers = raise_to(graph, _needed_opset(graph, scheme, wanted := set(nodes)))
    log.notes.extend(f"the model stays at opset {graph.opset}: of a newer one, {item} has no form" for item in blockers)
    names = Names(graph)
    for scope in scopes(graph, functions=False):
        _Quantiser(scope, scheme, ranges, names, log).run(wanted)
    graph.ir_version = max(graph.ir_version or 0, oldest_ir_version(graph))
    return log


def _needed_opset(graph: gs.Graph, scheme: Scheme, wanted: Collection[str]) -> int:
    """For the nodes of ``wanted``; the graph's own where there are none."""
    nodes = [node for scope in scopes(graph, functions=False) for node in scope.nodes if node.name in wanted]
    inputs = [tensor for node in nodes if node.op in QUANTISABLE[scheme] for tensor in node.inputs[:2]]
    kinds = {type_name(tensor.dtype) for tensor in inputs if tensor.dtype is not None}
    present: int = graph.opset
    return max([present, *(_opset_of(scheme, kind) for kind in kinds if kind in FLOATS)])


def _opset_of(scheme: Scheme, kind: str) -> int:
    return max(OPSETS[scheme], 13 if kind == "float32" else 19)


@dataclass
class _Weight:
    """A constant, and the views through which a node reads it, the last one first."""

    tensor: gs.Tensor
    views: list[gs.Node]
    quantised: bool = False
    """Whether it is no constant, but what a DequantizeLinear gives."""
    axis: int | None = None
    """Of the constant: the one that has a scale for each index."""
    largest: Array = field(default_factory=lambda: np.zeros(()))
    """The largest magnitude, along that axis."""

    @property
    def values(self) -> Array:
        constant = self.tensor if isinstance(self.tensor, gs.Constant) else self.tensor.inputs[0].attrs["value"]
        return np.asarray(constant.values)

    def channel(self, axis: int | None) -> int | None:
        """The axis of the constant that is ``axis`` where the node reads it; None where it is no axis there."""
        for view in self.views:
            if axis is None:
                return None
            axis = _axis_before(view, axis)
        return axis


def _weight(tensor: gs.Tensor) -> _Weight | None:
    """What ``tensor`` is a view of, where that is a constant or quantised already; None for an activation."""
    views: list[gs.Node] = []
    while not isinstance(tensor, gs.Constant):
        if not tensor.inputs:
            return None
        maker = tensor.inputs[0]
        if maker.domain or maker.op not in (*VIEWS, "Constant", "DequantizeLinear"):
            return None
        if maker.op == "DequantizeLinear":
            return _Weight(tensor, views, quantised=True)
        if maker.op == "Constant":
            return _Weight(tensor, views) if isinstance(maker.attrs.get("value"), gs.Constant) else None
        views.append(maker)
        tensor = maker.inputs[0]
    return _Weight(tensor, views)


def _axis_before(view: gs.Node, axis: int) -> int | None:
    """Which axis of the view's input became ``axis`` of its output."""
    given, made = view.inputs[0].shape, view.outputs[0].shape
    if given is None or made is None or not all(isinstance(size, int) for size in (*given, *made)):
        return None
    if view.op == "Transpose":
        return int(view.attrs.get("perm", range(len(given))[::-1])[axis])
    before = math.prod(made[:axis])
    return next((i for i, size in enumerate(given) if size == made[axis] and math.prod(given[:i]) == before), None)


@dataclass
class _Quantiser:
    """One graph or body, its nodes in their order."""

    scope: gs.Graph
    scheme: Scheme
    ranges: Ranges
    names: Names
    log: QuantisationLog
    pairs: dict[tuple[int, int | None], gs.Tensor] = field(default_factory=dict)
    """By tensor and axis of its scales: what its quantised readers read."""
    views: dict[tuple[int, int], gs.Tensor] = field(default_factory=dict)
    """By the tensor that a view gives and the one that its copy is made of: what the copy gives."""
    nodes: list[gs.Node] = field(default_factory=list)

    def run(self, wanted: Collection[str]) -> None:
        for node in self.scope.nodes:
            if node.name in wanted:
                try:
                    self._quantise(node)
                    self.log.quantised[node.name] = node.op
                except _Decline as reason:
                    self.log.declined[node.name] = str(reason)
            elif self.scheme == "int8" and node.op == "Add" and not node.domain:
                self._residual(node)
            self.nodes.append(node)
        self.scope.nodes = self.nodes

    def _quantise(self, node: gs.Node) -> None:
        if node.domain or node.op not in QUANTISABLE[self.scheme]:
            raise _Decline(f"{node.op} has no kernels for {self.scheme}")
        inputs = [(place, tensor, _weight(tensor)) for place, tensor in enumerate(node.inputs[:2])]
        for place, tensor, weight in inputs:  # all is checked before anything is changed
            self._check_type(tensor)
            if weight is None:
                self._check_activation(node, place, tensor)
            elif not weight.quantised:
                self._measure(weight, _channel(node, place))
        if all(weight is not None and not weight.quantised for _, _, weight in inputs):
            raise _Decline("both factors are constants")
        if self.scheme == "int4":
            self._store(node, inputs)
            return
        for place, tensor, weight in inputs:
            if weight is None:
                scale = _scale(self.scheme, self.ranges[tensor.name].largest)
                node.inputs[place] = self._pair(tensor, scale, None, node)
            elif not weight.quantised:
                node.inputs[place] = self._weight_pair(weight, node)

    # whether

    def _check_type(self, tensor: gs.Tensor) -> None:
        kind = None if tensor.dtype is None else type_name(tensor.dtype)
        if kind not in FLOATS:
            raise _Decline(f"its input {tensor.name!r} is {kind or 'of a type that is not known'}")
        needed = _opset_of(self.scheme, kind)
        if self.scope.opset < needed:
            raise _Decline(f"{self.scheme} of {kind} needs opset {needed}, to which the model does not come")

    def _check_activation(self, node: gs.Node, place: int, tensor: gs.Tensor) -> None:
        if self.scheme == "int4":
            return
        if place == 1 and node.op in ("Conv", "ConvTranspose"):
            raise _Decline("its weights are computed at run time")
        seen = self.ranges.get(tensor.name)
        if seen is None:
            raise _Decline(f"no calibration sample gave its input {tensor.name!r} a value")
        if not seen.finite:
            raise _Decline(f"its input {tensor.name!r} was infinite or NaN for a calibration sample")
        if seen.largest == 0:
            raise _Decline(f"its input {tensor.name!r} was 0 for all calibration samples")

    def _measure(self, weight: _Weight, axis: int | None) -> None:
        """Finds the weight's scales: by channels, where they are still an axis of the constant (``axis`` where the node
        reads it). In fp8 each value has an exponent of its own, and one scale is enough."""
        weight.axis = weight.channel(axis) if self.scheme == "int8" else None
        values = weight.values
        if values.size == 0:
            raise _Decline(f"its weight {weight.tensor.name!r} is empty")
        others = tuple(i for i in range(values.ndim) if i != weight.axis)
        weight.largest = np.maximum(values.max(others), -values.min(others)).astype(np.float64)
        if not np.isfinite(weight.largest).all():
            raise _Decline(f"its weight {weight.tensor.name!r} is not finite")

    # pairs

    def _pair(self, tensor: gs.Tensor, scale: Array, axis: int | None, reader: gs.Node) -> gs.Tensor:
        """``tensor`` quantised and dequantised, before ``reader``."""
        key = (id(tensor), axis)
        if key not in self.pairs:
            kind = np.dtype(np.int8 if self.scheme == "int8" else ml_dtypes.float8_e4m3fn)
            steps = self._constant(tensor, "scale", np.asarray(scale, tensor.dtype))
            zero = self._constant(tensor, "zero_point", np.zeros(scale.shape, kind))
            attrs = {} if axis is None else {"axis": axis}
            stored = self._node("QuantizeLinear", [tensor, steps, zero], attrs, tensor, kind, reader)
            self.pairs[key] = self._node("DequantizeLinear", [stored, steps, zero], attrs, tensor, tensor.dtype, reader)
            self.log.pairs += 1
        return self.pairs[key]

    def _weight_pair(self, weight: _Weight, reader: gs.Node) -> gs.Tensor:
        """The weight quantised where it lies, as the reader sees it."""
        largest = weight.largest
        scale = _scale(self.scheme, np.where(largest > 0, largest, largest.max() or 1.0))  # 0 is exact at any scale
        return self._viewed(weight, self._pair(weight.tensor, scale, weight.axis, reader), reader)

    def _viewed(self, weight: _Weight, tensor: gs.Tensor, reader: gs.Node) -> gs.Tensor:
        """The weight's views of ``tensor``; copies, since others may read the views too."""
        for view in reversed(weight.views):
            key = (id(view.outputs[0]), id(tensor))
            if key not in self.views:
                old = view.outputs[0]
                copy = gs.Variable(self.names.new(f"{old.name}/quantised"), old.dtype, old.shape)
                inputs = [tensor, *view.inputs[1:]]
                self._append(Node(view.op, copy.name, dict(view.attrs), inputs, [copy], domain=""), reader)
                self.views[key] = copy
            tensor = self.views[key]
        return tensor

    def _residual(self, node: gs.Node) -> None:
        """Quantises what is added to a quantised convolution: only then does the convolution's kernel add it."""
        for place in (0, 1):
            other = node.inputs[1 - place]
            seen = self.ranges.get(other.name)
            if not self._of_convolution(node.inputs[place]) or _weight(other) is not None:
                continue
            if seen is None or not seen.finite or not seen.largest or other.shape != node.inputs[place].shape:
                continue
            node.inputs[1 - place] = self._pair(other, _scale(self.scheme, seen.largest), None, node)
            return

    def _of_convolution(self, tensor: gs.Tensor) -> bool:
        """Whether ``tensor`` comes straight from a quantised convolution, and the Add alone reads it."""
        while len(tensor.outputs) == 1 and tensor.inputs and not any(tensor is item for item in self.scope.outputs):
            maker = tensor.inputs[0]
            if maker.op != "BatchNormalization":
                return maker.op == "Conv" and maker.name in self.log.quantised
            tensor = maker.inputs[0]
        return False

    # int4

    def _store(self, node: gs.Node, inputs: Sequence[tuple[int, gs.Tensor, _Weight | None]]) -> None:
        """The node's second factor, a constant, in blocks of 4-bit integers along the axis that is summed over."""
        _, tensor, weight = inputs[1]
        if weight is None or tensor.shape is None or len(tensor.shape) != 2:
            raise _Decline("int4 is for constant matrices that are the second factor")
        if weight.quantised:
            return
        axis = 1 if node.op == "Gemm" and node.attrs.get("transB", 0) else 0
        rows = int(tensor.shape[axis])
        whole = [size for size in BLOCKS if rows % size == 0]
        if not whole:
            raise _Decline(f"the {rows} rows of its weight are no multiple of {' or '.join(map(str, BLOCKS))}")
        block = next((size for size in whole if size < math.prod(tensor.shape)), None)
        if block is None:  # TensorRT takes a single scale for that of the whole tensor, which int4 has none of
            raise _Decline(f"its weight is a single block of {rows}")
        key = (id(tensor), axis)
        if key not in self.pairs:
            stored, scale = _in_blocks(_seen_through(weight), axis, block)
            packed = self._constant(tensor, "int4", stored)
            steps = self._constant(tensor, "scale", np.asarray(scale, tensor.dtype))
            attrs = {"axis": axis, "block_size": block}
            self.pairs[key] = self._node("DequantizeLinear", [packed, steps], attrs, tensor, tensor.dtype, node)
            self.log.pairs += 1
        node.inputs[1] = self.pairs[key]

    # nodes

    def _constant(self, tensor: gs.Tensor, what: str, values: Array) -> gs.Constant:
        return Constant(self.names.new(f"{tensor.name}/{what}"), values)

    def _node(
        self,
        op: str,
        inputs: list[gs.Tensor],
        attrs: Mapping[str, int],
        like: gs.Tensor,
        kind: Any,
        reader: gs.Node,
    ) -> gs.Tensor:
        result = gs.Variable(self.names.new(f"{like.name}/{op}"), kind, like.shape)
        self._append(Node(op, result.name, dict(attrs), inputs, [result], domain=""), reader)
        return result

    def _append(self, node: gs.Node, reader: gs.Node) -> None:
        """Puts ``node`` before the reader that it is made for, whose place in the user's code it is said to be of."""
        node_metadata(node).update(node_metadata(reader))
        self.nodes.append(node)


def _channel(node: gs.Node, place: int) -> int | None:
    """Along which axis of a weight its output channels lie; None where one scale is for all of it."""
    shape = node.inputs[place].shape
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":  # a scale for each channel of one group is none for a channel of the output
        return 1 if int(node.attrs.get("group", 1)) == 1 else None
    if node.op == "Gemm":
        transposed = bool(node.attrs.get("transB" if place else "transA", 0))
        return int(transposed != bool(place))
    if shape is None or len(shape) < 2 or any(size != 1 for size in shape[:-2]):
        return None
    return len(shape) - (1 if place else 2)


def _seen_through(weight: _Weight) -> Array:
    """The weight's values where its node reads them."""
    values = weight.values
    for view in reversed(weight.views):
        if view.op == "Transpose":
            values = values.transpose(view.attrs.get("perm"))
        else:
            values = values.reshape(view.outputs[0].shape)
    return values


def _in_blocks(values: Array, axis: int, block: int) -> tuple[Array, Array]:
    """A matrix as 4-bit integers, and its scales, one for each ``block`` along ``axis``."""
    rows = np.moveaxis(np.asarray(values, np.float32), axis, -1)
    parts = rows.reshape(rows.shape[0], -1, block)
    scale = _scale("int4", np.abs(parts).max(-1)).astype(np.float32)
    steps = np.clip(np.rint(parts / scale[..., None]), -8, 7).astype(np.int8).astype(ml_dtypes.int4)
    stored = np.moveaxis(steps.reshape(rows.shape), -1, axis)
    return np.ascontiguousarray(stored), np.ascontiguousarray(np.moveaxis(scale, -1, axis))


def _scale(scheme: Scheme, largest: Any) -> Array:
    return np.maximum(np.asarray(largest, np.float64) / LARGEST[scheme], SMALLEST_SCALE)
