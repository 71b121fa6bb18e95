"""Two forms of one model side by side: which nodes belong together, and models in which each runs by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from ml_dtypes import finfo
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from passes.provenance import origin_of

from .layers import LayerError, Total
from .rounded import LOW_TYPES, captured

APART = "/by itself"
"""Behind the name of a tensor that a node makes of what it is given, and no other node reads."""
UNREAD = "/not read"
"""Behind the name of what a node makes beside what is wanted of it, where all that read that are given it."""
FLOATS = frozenset((TensorProto.FLOAT, TensorProto.DOUBLE)) | LOW_TYPES
COUNTS = frozenset(
    (
        *(TensorProto.BOOL, TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
        *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
    )
)
"""Integers and booleans: of indices and masks that are wrong, only what they choose is seen in floating point."""
MOST = 1000
"""Pairs in a chunk: what ONNX Runtime takes to load a model grows with the square of its outputs."""
HELD = 4
"""How often a compared tensor is in memory: from either model, and from either node by itself."""


@dataclass(frozen=True)
class Pair:
    """A tensor that nodes of both main graphs make."""

    tensor: str
    node: NodeProto
    low_tensor: str
    low_node: NodeProto
    precision: str
    limit: float
    """The largest finite value of the type that the low model has it in."""

    def error(self, carried: Total, introduced: Total) -> LayerError:
        where = origin_of(self.node.name, {item.key: item.value for item in self.node.metadata_props})
        return LayerError(
            self.tensor,
            self.node.name,
            self.node.op_type,
            where.module,
            where.source,
            self.precision,
            carried.largest,
            carried.figures(),
            introduced.figures(),
        )


class Side:
    """One of the two models, which is ``plain``."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.graph: GraphProto = model.graph
        infos = (*self.graph.value_info, *self.graph.output, *self.graph.input)
        self.types = {item.name: item.type.tensor_type.elem_type for item in infos if item.type.HasField("tensor_type")}
        self.initializers = {item.name: item for item in self.graph.initializer}
        self.types.update({name: item.data_type for name, item in self.initializers.items()})
        self.inputs = {item.name for item in self.graph.input} - set(self.initializers)
        self.place = {name: index for index, node in enumerate(self.graph.node) for name in node.output if name}

    def maker(self, name: str) -> NodeProto | None:
        index = self.place.get(name)
        return self.graph.node[index] if index is not None else None

    def needs(self, node: NodeProto, given: Callable[[str], bool]) -> tuple[set[str], set[int]]:
        """The ``given`` tensors that ``node`` depends on, and the places of the nodes between them and it."""
        read: set[str] = set()
        between: set[int] = set()
        waiting = list(captured([node]))
        while waiting:
            name = waiting.pop()
            index, maker = self.place.get(name), self.maker(name)
            if given(name) and (maker is None or maker.op_type != "Constant"):
                read.add(name)
            elif index is not None and index not in between:
                between.add(index)
                waiting.extend(captured([self.graph.node[index]]))
        return read, between

    def apart(self, tensors: Sequence[str], given: set[str], between: set[int]) -> ModelProto:
        """A model with the inputs ``given`` that makes each of ``tensors`` (with APART behind its name) by itself."""
        model = ModelProto(ir_version=self.model.ir_version)
        graph = model.graph
        graph.name = "layers"
        for place in sorted(between):
            graph.node.add().CopyFrom(self.graph.node[place])
            # Of one node's outputs some may be given and others not: a name that is given has no other maker.
            graph.node[-1].output[:] = [name + UNREAD if name in given else name for name in graph.node[-1].output]
        for place in sorted({self.place[name] for name in tensors}):
            graph.node.add().CopyFrom(self.graph.node[place])
            if graph.node[-1].name:
                graph.node[-1].name += APART  # it may be between others, too
            graph.node[-1].output[:] = [name and name + APART for name in graph.node[-1].output]
        graph.input.extend(_info(name, self.types[name]) for name in sorted(given))
        wanted = {name + APART for name in tensors}
        for name in (name for node in graph.node for name in node.output):
            kind = self.types.get(name.removesuffix(APART).removesuffix(UNREAD))
            if kind is not None:
                (graph.output if name in wanted else graph.value_info).append(_info(name, kind))
        read = captured(graph.node) - given
        graph.initializer.extend(item for name, item in self.initializers.items() if name in read)
        model.opset_import.extend(self.model.opset_import)
        model.functions.extend(self.model.functions)
        return model


def _info(name: str, kind: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, kind, None)


@dataclass
class Parts:
    """Nodes of both models, each of which runs by itself on what the reference computes."""

    reference: ModelProto
    low: ModelProto
    pairs: list[Pair]
    """Those whose nodes are here."""
    given: dict[str, str] = field(default_factory=dict)
    """By the name of an input of ``low``: the reference's tensor that it is given."""
    read: set[str] = field(default_factory=set)
    """The inputs of ``reference``, which are called as they are."""
    kept_as: dict[str, np.dtype[np.generic]] = field(default_factory=dict)
    """By a tensor of the reference: the low type in which the low model keeps it."""


class Pairs:
    """Two models, and what belongs together in them."""

    def __init__(self, reference: ModelProto, low: ModelProto, kinds: frozenset[int] = FLOATS) -> None:
        """``kinds``: the types of the tensors that are compared."""
        self.reference, self.low, self.kinds = Side(reference), Side(low), kinds
        self.same: dict[str, str] = {}
        """By the name of a tensor in the low model: its name in the reference."""
        self.found: list[Pair] = []
        self._match()

    @property
    def tensors(self) -> list[str]:
        """Those of the reference that are compared, or that nodes are given."""
        return [name for name in dict.fromkeys(self.same.values()) if name in self.reference.types]

    def _match(self) -> None:
        reference, low = self.reference, self.low
        self.same.update((name, name) for name in low.inputs & reference.inputs)
        named, low_named = (
            {(node.name, node.op_type, node.domain): node for node in side.graph.node if node.name}
            for side in (reference, low)
        )
        made: list[tuple[str, NodeProto, str, NodeProto]] = []
        for node in low.graph.node:
            twin = named.get((node.name, node.op_type, node.domain))
            for index, name in enumerate(node.output):
                # By the tensor's name first: a node that took another one in (a BatchNorm) makes what that one made.
                if name in reference.place:
                    made.append((name, reference.graph.node[reference.place[name]], name, node))
                    continue
                tensor = twin.output[index] if twin is not None and index < len(twin.output) and name else ""
                # What was put behind a node may have its tensor's name; then the two are one layer.
                if twin is not None and tensor and tensor not in low.place:
                    made.append((tensor, twin, name, node))
        self.same.update((name, tensor) for tensor, _, name, _ in made)
        listed: set[str] = set()
        for tensor, twin, name, node in made:
            kind = low.types.get(name)
            if kind in self.kinds and reference.types.get(tensor) in self.kinds and tensor not in listed:
                listed.add(tensor)
                own = low_named.get((twin.name, twin.op_type, twin.domain), node)
                precision = type_name(kind) if kind in COUNTS else self._precision(own)
                place = list(twin.output).index(tensor)
                held = low.types.get(own.output[place], kind) if place < len(own.output) else kind
                self.found.append(Pair(tensor, twin, name, node, precision, min(map(_largest, (kind, held)))))

    def _precision(self, node: NodeProto) -> str:
        """What the node computes in: quantised where it reads dequantised values, else the low type that it has."""
        for name in node.input:
            maker = self.low.maker(name)
            while maker is not None and maker.op_type == "Cast" and maker.output[0] not in self.same:
                maker = self.low.maker(maker.input[0])
            if maker is not None and maker.op_type == "DequantizeLinear":
                return type_name(self.low.types.get(maker.input[0], TensorProto.INT8))
        kinds = [self.low.types.get(name) for name in (*node.input, *node.output)]
        low = [kind for kind in kinds if kind in LOW_TYPES]
        return type_name(low[0]) if low else "float32"

    def chunks(self, sizes: Mapping[str, int], limit: int) -> Iterator[list[Pair]]:
        """The pairs, so many at a time that what they make and read takes no more than ``limit`` bytes."""
        chunk: list[Pair] = []
        taken: set[str] = set()
        total = 0
        for pair in self.found:
            read = self._read(pair)
            made = HELD * sizes.get(pair.tensor, 0)
            more = made + sum(sizes.get(name, 0) for name in read - taken)
            if len(chunk) == MOST or (chunk and total + more > limit):
                yield chunk
                chunk, taken, total = [], set(), 0
                more = made + sum(sizes.get(name, 0) for name in read)
            chunk.append(pair)
            taken |= read
            total += more
        if chunk:
            yield chunk

    def _needs_low(self, pair: Pair) -> tuple[set[str], set[int]]:
        return self.low.needs(pair.low_node, self.same.__contains__)

    def _needs_reference(self, pair: Pair) -> tuple[set[str], set[int]]:
        return self.reference.needs(
            pair.node, lambda name: name in self.reference.place or name in self.reference.inputs
        )

    def known(self, chunk: Sequence[Pair]) -> list[str]:
        """The reference's tensors that are compared, or given to nodes, in ``chunk``."""
        names = {name: None for pair in chunk for name in (pair.tensor, *sorted(self._read(pair)))}
        return [name for name in names if name in self.reference.types]

    def _read(self, pair: Pair) -> set[str]:
        return {self.same[name] for name in self._needs_low(pair)[0]} | self._needs_reference(pair)[0]

    def parts(self, chunk: Sequence[Pair]) -> Parts:
        """The nodes of the pairs, as far as they can run by themselves."""
        pairs: list[Pair] = []
        given: set[str] = set()
        between: tuple[set[int], set[int]] = set(), set()
        read: set[str] = set()
        for pair in chunk:
            (of_low, inserted), (of_reference, constants) = self._needs_low(pair), self._needs_reference(pair)
            if not (of_low <= self.low.types.keys() and of_reference <= self.reference.types.keys()):
                continue  # they read a sequence, which nobody can hand over
            pairs.append(pair)
            given |= of_low
            read |= of_reference
            between[0].update(constants)
            between[1].update(inserted)
        return Parts(
            self.reference.apart([pair.tensor for pair in pairs], read, between[0]),
            self.low.apart([pair.low_tensor for pair in pairs], given, between[1]),
            pairs,
            {name: self.same[name] for name in sorted(given)},
            read,
            {self.same[name]: _dtype(self.low.types[name]) for name in given if self.low.types[name] in LOW_TYPES},
        )


def _dtype(kind: int) -> np.dtype[np.generic]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def _largest(kind: int) -> float:
    if kind == TensorProto.BOOL:
        return 1.0
    dtype: np.dtype[Any] = _dtype(kind)
    return float(np.iinfo(dtype).max if kind in COUNTS else finfo(dtype).max)  # type: ignore[no-untyped-call]


def type_name(kind: int) -> str:
    return str(_dtype(kind).name)
