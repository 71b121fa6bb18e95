"""Which nodes of a float32 model lose too much in float16 or bfloat16, and why: they are better left in float32.

What stays is small: sums over many elements, powers and exponentials, places and phases, what would overflow or vanish,
and the arithmetic between such nodes. What multiplies and adds goes low, as do softmax and the normalisations that
TensorRT computes in float32 inside, whatever their tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import onnx_graphsurgeon as gs

from .ir import CONTROL_FLOW, bodies
from .low_types import LowType, Ports, extent, is_float32, ports
from .sound_nodes import (
    absorbed,
    added_to,
    chosen_from,
    elementwise,
    extent_of,
    gain,
    handed_on,
    is_bound,
    is_constant,
    is_integer,
    maker_of,
    may_clamp,
    shown,
)
from .sound_tables import (
    ABSORBING,
    ARGUMENTS,
    ARITHMETIC,
    CANCELLED,
    COMPARISONS,
    EXACT,
    FEW_DIGITS,
    MASKS,
    MOVEMENT,
    NEAR,
    ONE_SIDED,
    PASSING,
    PLACED,
    PRODUCTS,
    PROPORTIONAL,
    REASONS,
    SCALES,
    SPREAD,
    SUMS,
    TERMS,
    WIDE,
)


class Seen(Protocol):
    """The range of a tensor."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


@dataclass
class Kept:
    """What is left in float32."""

    reasons: dict[str, str] = field(default_factory=dict)
    """By name of the node."""
    free: set[str] = field(default_factory=set)
    """The names of the nodes that are not."""
    saturated: set[str] = field(default_factory=set)
    """Tensors of float32 that hold a mask's "minus infinity", which may become the low type's end."""


def keep_in_float32(
    graph: gs.Graph,
    low: LowType,
    ranges: Mapping[str, Seen],
    forced: Mapping[str, str],
    head_room: float,
    opset: int | None = None,
) -> Kept:
    """The nodes of ``graph``, bodies included, that touch float32: those to be left in it, with the reasons.

    ``ranges`` are of tensors, by name; where values ``head_room`` times as large would leave the low type's range, what
    makes and reads them is left. ``forced`` says of nodes why they are left, or, where empty, that they are not.
    ``opset`` is the one whose schemas count, by default the graph's.
    """
    return _Analysis(graph, low, ranges, forced, head_room, opset).run()


class _Analysis:
    def __init__(
        self,
        graph: gs.Graph,
        low: LowType,
        ranges: Mapping[str, Seen],
        forced: Mapping[str, str],
        head_room: float,
        opset: int | None,
    ) -> None:
        self.graph, self.low, self.ranges, self.forced, self.opset = graph, low, ranges, forced, opset
        self.limit = low.largest / head_room
        self.nodes: list[gs.Node] = []
        self.ports: dict[int, Ports] = {}
        """Of the nodes that can go low."""
        self.kept: dict[int, str] = {}
        self.boundary: set[int] = set()
        """Tensors that leave a graph or a body, as float32."""
        self.carried: set[int] = set()
        """Those that a Loop or Scan hands from round to round, and its bodies' inputs."""
        self.counted: set[int] = set()
        """Tensors that are computed from integers alone."""
        self.precise: set[int] = set()
        """Tensors that have more digits than the low type: of the caller, or computed from integers."""
        self.led: set[int] = set()
        """Nodes that make such a tensor for what needs all its digits."""
        self.masks: set[float] = set()
        """Constants that stand for infinity, or near enough to the range's end to be taken for it."""
        self.large: set[int] = set()
        """Tensors that may be beyond the low type's range, since a constant is, and of which no range is known."""
        self.done = Kept()

    def run(self) -> Kept:
        self._collect(self.graph)
        for node in self.nodes:
            if id(node) in self.ports:
                self._by_operator(node)
                self._by_constants(node)
        self._find_precise()
        for node in self.nodes:
            if id(node) in self.ports:
                self._by_ranges(node)
        self._by_places()
        self._by_logarithms()
        for node in self.nodes:
            self._by_argument(node)
        settled = False
        while not settled:
            settled = not sum(self._by_neighbours(node) or self._by_comparison(node) for node in self.nodes)
        self._find_saturated()
        self.done.reasons.update({node.name: self.kept[id(node)] for node in self.nodes if id(node) in self.kept})
        self.done.free.update(node.name for node in self.nodes if self._is_free(node))
        return self.done

    def _collect(self, scope: gs.Graph) -> None:
        self.boundary.update(map(id, scope.outputs))
        for node in scope.nodes:
            for body in bodies(node):
                self._collect(body)
                if node.op != "If":
                    self.carried.update(map(id, (*body.inputs, *body.outputs)))
            if node.op in CONTROL_FLOW or (node.op == "Constant" and not node.domain):
                continue
            if not any(map(is_float32, (*node.inputs, *node.outputs))):
                continue
            found = ports(node, self.opset or scope.opset, self.low)
            self.nodes.append(node)
            if found.outputs:
                self.ports[id(node)] = found
                if self.forced.get(node.name):
                    self.kept[id(node)] = self.forced[node.name]
            elif any(map(is_float32, node.outputs)) or len(found.either) < sum(map(is_float32, node.inputs)):
                what = f"{node.domain}::{node.op}" if node.domain else node.op
                self.kept[id(node)] = f"{what} takes no {self.low.name}"

    def _is_free(self, node: gs.Node) -> bool:
        return id(node) in self.ports and id(node) not in self.kept

    def _keep(self, node: gs.Node, reason: str) -> bool:
        """Leaves a node in float32; True if that is new."""
        if not self._is_free(node) or node.name in self.forced:
            return False
        self.kept[id(node)] = reason
        return True

    # one node by itself

    def _by_operator(self, node: gs.Node) -> None:
        reason = REASONS.get(node.op)
        if reason is not None:
            self._keep(node, f"by default: {reason}")

    def _by_constants(self, node: gs.Node) -> None:
        """Keeps what reads a constant that the low type has no good value for, or what such a node computes."""
        for index in (*self.ports[id(node)].inputs, None):
            known = extent_of(node, index)
            if known is None:
                continue
            beyond = [end for end in (known.low, known.high) if abs(end) > self.limit]
            mask = (
                bool(beyond)
                and may_clamp(node, index, known)
                and (is_bound(node) or absorbed(node, beyond, self.boundary))
            )
            if mask or (beyond and node.op == "Mul" and max(beyond) < 0 and absorbed(node, beyond, self.boundary)):
                self.masks.update(beyond)
            if known.largest > self.low.largest and not mask:
                self._keep(node, f"a constant of {shown(known)} is beyond the range of {self.low.name}")
                if max(beyond) > 0 and node.op in ("Add", "Conv", "ConvTranspose", "Gemm", "MatMul", "Mul"):
                    self.large.update(id(tensor) for tensor in node.outputs if tensor.name not in self.ranges)
            if 0 < known.largest < self.low.smallest:
                self._keep(node, f"a constant of {shown(known)} is too small for {self.low.name}")
        if any(id(tensor) in self.large for tensor in node.inputs):
            self._keep(node, f"it reads what is multiplied by a constant beyond the range of {self.low.name}")
            if (
                elementwise(node) or node.op in PASSING or node.op in ONE_SIDED
            ) and node.op not in ABSORBING - ONE_SIDED:
                self.large.update(id(tensor) for tensor in node.outputs if tensor.name not in self.ranges)

    def _by_ranges(self, node: gs.Node) -> None:
        found = self.ports[id(node)]
        tensors = [("input", node.inputs[index]) for index in sorted(found.inputs)]
        tensors += [("output", node.outputs[index]) for index in sorted(found.outputs)]
        for what, tensor in tensors:
            seen = self.ranges.get(tensor.name) if not isinstance(tensor, gs.Constant) else None
            if seen is None:
                continue
            mask = seen.low < -self.limit and seen.high <= self.limit and self._is_mask(seen.low)
            if mask and seen.low < -self.low.largest:
                self.done.saturated.add(tensor.name)
            for end in (seen.low, seen.high):
                if abs(end) > self.limit and not mask:
                    end_of_type = f"{self.low.name} ends at {self.low.largest:.6g}"
                    self._keep(node, f"its {what} {tensor.name!r} reaches {end:.4g}; {end_of_type}")
            shares = (maker := handed_on(tensor)) is not None and maker.op == "Softmax"  # which add up to 1
            if 0 < max(abs(seen.low), abs(seen.high)) < self.low.smallest * (1 if shares else FEW_DIGITS):
                largest = max(abs(seen.low), abs(seen.high))
                small = f"is never above {largest:.4g}, where {self.low.name} has few digits"
                self._keep(node, f"its {what} {tensor.name!r} {small}")
        self._by_cancellation(node)

    def _by_cancellation(self, node: gs.Node) -> None:
        """Keeps a sum that is much smaller than its terms, and what makes these: their errors are the result's."""
        places = TERMS.get(node.op) if not node.domain else None
        result = self._largest(node.outputs[0]) if places is not None else 0.0
        if places is None or not result:
            return
        exact = node.op not in PRODUCTS and all(id(item) in self.precise or is_constant(item) for item in node.inputs)
        most = CANCELLED["exact" if exact else self.low.name] * result
        for tensor in node.inputs[places]:
            term = self._largest(tensor) if is_float32(tensor) else 0.0
            if term <= most:
                continue
            self._keep(node, f"a term of {term:.4g} is nearly cancelled: the result is never above {result:.4g}")
            for maker in filter(None, map(maker_of, node.inputs)):
                self._keep(maker, f"{node.op} subtracts nearly all of what it makes")
            self._lead_to_large(tensor, most, f"{node.op} subtracts nearly all of what comes of it")

    def _lead_to_large(self, tensor: gs.Tensor, limit: float, reason: str) -> None:
        """Keeps what makes a tensor, up to the products that it comes from and as far as it is more than ``limit``."""
        waiting, seen = [(tensor, limit)], dict[int, float]()
        while waiting:
            tensor, limit = waiting.pop()
            maker = maker_of(tensor)
            if maker is None or self._largest(tensor) <= limit or not (elementwise(maker) or maker.op in PRODUCTS):
                continue
            if limit > seen.get(id(maker), math.inf) / 2:
                continue
            seen[id(maker)] = limit
            self._keep(maker, reason)
            factor = gain(maker) if id(maker) in self.kept else 0.0
            waiting.extend((item, limit / factor) for item in maker.inputs if factor and is_float32(item))

    def _largest(self, tensor: gs.Tensor) -> float:
        """The largest magnitude that was seen of a tensor, or that a constant has; 0 where nothing is known."""
        if isinstance(tensor, gs.Constant):
            return extent(tensor).largest if is_float32(tensor) else 0.0
        seen = self.ranges.get(tensor.name)
        return max(abs(seen.low), abs(seen.high)) if seen is not None else 0.0

    def _is_mask(self, end: float) -> bool:
        return abs(end) >= MASKS or any(abs(end - mask) <= NEAR * abs(mask) for mask in self.masks)

    # places and phases

    def _by_places(self) -> None:
        """Keeps what is computed from integers alone, and what leads to an exact input."""
        for node in self.nodes:
            if any(id(tensor) in self.counted for tensor in node.outputs):
                self._keep(node, f"it computes with integers, of which {self.low.name} holds only small ones")
        for node in self.nodes:
            cuts = node.op == "Cast" and not node.domain and node.outputs[0].dtype.kind in "iu"
            for index in (0,) if cuts else EXACT.get(node.op, ()) if not node.domain else ():
                if index < len(node.inputs):
                    self._lead(node.inputs[index], node)
            if REASONS.get(node.op) == PLACED and not node.domain:
                most = self._largest(node.inputs[1])
                self._lead_to_large(node.inputs[1], most / 8, f"{node.op} is given what it makes as places")

    def _find_precise(self) -> None:
        self.precise.update(id(tensor) for tensor in self.graph.inputs if is_float32(tensor))
        for node in self.nodes:
            self._follow(node)

    def _follow(self, node: gs.Node) -> None:
        free = [tensor for tensor in node.inputs if is_float32(tensor) and not is_constant(tensor)]
        if node.op == "Range" or (node.op == "Cast" and is_integer(node.inputs[0])):
            self.counted.update(map(id, node.outputs))
        elif free and elementwise(node) and all(id(tensor) in self.counted for tensor in free):
            self.counted.update(id(tensor) for tensor in node.outputs if is_float32(tensor))
        if elementwise(node) and any(id(tensor) in self.precise for tensor in free):
            self.precise.update(id(tensor) for tensor in node.outputs if is_float32(tensor))
        self.precise.update(id(tensor) for tensor in node.outputs if id(tensor) in self.counted)

    def _lead(self, tensor: gs.Tensor, to: gs.Node) -> None:
        """Keeps the arithmetic that makes a tensor whose digits count."""
        waiting = [tensor]
        while waiting:
            maker = maker_of(waiting.pop())
            if maker is None or not elementwise(maker) or id(maker) in self.led:
                continue
            if not any(id(item) in self.precise for item in maker.outputs):
                continue
            self.led.add(id(maker))
            self._keep(maker, f"{to.op} needs all digits of it")
            if id(maker) in self.kept:
                waiting.extend(item for item in maker.inputs if is_float32(item))
        if id(tensor) in self.precise:
            self._keep(to, "it needs all digits of its input")

    # logarithms

    def _by_logarithms(self) -> None:
        """Keeps what leads to small values among large ones, as of a spectrum: a logarithm makes as much of them."""
        for node in self.nodes:
            seen = self.ranges.get(node.inputs[0].name) if node.op == "Log" and not node.domain else None
            if seen is not None and max(seen.low, 0.0) * SPREAD < seen.high:
                self._lead_to_small(node.inputs[0])

    def _lead_to_small(self, tensor: gs.Tensor) -> None:
        """Up to the sums that the small values come from, and through all that is linear before these."""
        waiting, seen = [(tensor, False)], set()
        while waiting:
            tensor, linear = waiting.pop()
            maker = maker_of(tensor)
            if maker is None or maker.domain or (id(maker), linear) in seen:
                continue
            seen.add((id(maker), linear))
            free = [item for item in maker.inputs if is_float32(item) and not is_constant(item)]
            if maker.op in SUMS:
                linear = linear or maker.op == "Sub" or not all(map(self._is_positive, maker.inputs))
            elif maker.op in PROPORTIONAL:
                scales = len(free) == 1 and (maker.op == "Mul" or (maker.op == "Div" and free[0] is maker.inputs[0]))
                if linear and not scales and maker.op != "Neg":
                    continue
            elif maker.op not in MOVEMENT:
                continue
            self._keep(maker, "it leads to a Log, which makes as much of the smallest values as of the largest")
            waiting.extend((item, linear) for item in free)

    def _is_positive(self, tensor: gs.Tensor) -> bool:
        """Whether nothing below 0 was seen of it, or is in the constant."""
        if isinstance(tensor, gs.Constant):
            return not is_float32(tensor) or extent(tensor).low >= 0
        seen = self.ranges.get(tensor.name)
        return tensor.is_empty() or not is_float32(tensor) or (seen is not None and seen.low >= 0)

    # large arguments

    def _by_argument(self, node: gs.Node) -> None:
        """Keeps what makes a large argument of a sine, an exponential or a softmax: rounded, it has too few digits."""
        most = ARGUMENTS[self.low.name].get(node.op) if not node.domain else None
        if most is None or self._argument(node, node.inputs[0]) <= most:
            return
        waiting, found = [node.inputs[0]], {id(node): node}
        while waiting:
            maker = maker_of(waiting.pop())
            if maker is None or id(maker) in found or not self._is_free(maker):
                continue
            if not (elementwise(maker) or maker.op in PRODUCTS):
                continue
            found[id(maker)] = maker
            if maker.op not in PRODUCTS:
                adds = maker.op in ("Add", "Sum", "Sub")
                waiting.extend(item for item in maker.inputs if not adds or self._argument(node, item) > most / 2)
        if added_to(node.outputs[0], {id(tensor) for maker in found.values() for tensor in maker.outputs}):
            return
        for maker in found.values():
            self._keep(maker, f"{node.op} is given {self._argument(node, node.inputs[0]):.4g}: it needs all digits")
            for item in maker.inputs if maker.op in PRODUCTS else ():
                self._lead(item, node)

    def _argument(self, node: gs.Node, tensor: gs.Tensor) -> float:
        """How large an argument of ``node`` is, where that counts: an exponential of what is far below 0 vanishes."""
        if node.op not in ("Exp", "Softmax"):
            return self._largest(tensor)
        seen = self.ranges.get(tensor.name)
        return max(0.0, seen.high) if seen is not None else 0.0

    # neighbours

    def _by_comparison(self, node: gs.Node) -> bool:
        """Keeps what hands on values of float32 to where they are compared with these themselves, as the largest with
        all: rounded, none is equal to itself."""
        if node.domain or node.op not in COMPARISONS:
            return False
        (left, to_left), (right, to_right) = map(chosen_from, node.inputs)
        wide = [left[key] for key in left.keys() & right if not self._is_made_low(left[key])]
        reason = f"{node.op} compares it with float32 that it comes from"
        return bool(wide) and sum(self._keep(item, reason) for item in (*to_left, *to_right)) > 0

    def _is_made_low(self, tensor: gs.Tensor) -> bool:
        maker = maker_of(tensor)
        return is_constant(tensor) or (maker is not None and self._is_free(maker))

    def _by_neighbours(self, node: gs.Node) -> bool:
        if not self._is_free(node):
            return False
        free = [tensor for tensor in node.inputs if is_float32(tensor) and not is_constant(tensor)]
        if node.op == "Div" and len(node.inputs) > 1 and self._source(node.inputs[1]) is not None:
            return self._keep(node, "it divides by what is computed in float32")
        if node.op == "Mul":
            makers = [self._source(tensor) for tensor in free]
            if any(maker is not None and maker.op in SCALES for maker in makers):
                return self._keep(node, "it multiplies by what is computed in float32")
        if node.op in ("Div", "Mul") and len(free) == 1:
            maker = self._source(free[0])
            if maker is not None and maker.op in WIDE:
                return self._keep(node, f"it scales what {maker.op} computes in float32")
        square = node.op == "Mul" and len(free) == 2 and free[0] is free[1]
        if node.op in ARITHMETIC and all(
            any(id(tensor) in self.carried for tensor in tensors) for tensors in (free, node.outputs)
        ):
            return self._keep(node, "it adds up from round to round")
        if node.op in ARITHMETIC and self._ends_in(self.carried, node):
            inside = (id(tensor) in self.carried or self._kept_maker(tensor) for tensor in free)
            if square or any(inside):
                return self._keep(node, "it is arithmetic between nodes in float32")
        if node.op not in MOVEMENT or not self._ends_in(self.boundary, node):
            return False
        if node.op == "DequantizeLinear" or all(map(self._is_float32_until, free)):
            return self._keep(node, "it hands on what is float32 on both sides")
        return False

    def _source(self, tensor: gs.Tensor) -> gs.Node | None:
        """The node in float32 that makes what the tensor holds, other than by handing it on."""
        maker = maker_of(tensor)
        while maker is not None and maker.op in MOVEMENT and not maker.domain:
            if not maker.inputs or not is_float32(maker.inputs[0]):
                break
            maker = maker_of(maker.inputs[0])
        return maker if maker is not None and id(maker) in self.kept else None

    def _is_float32_until(self, tensor: gs.Tensor) -> bool:
        """Whether it holds what is float32 anyway (of a node or of the caller) and was only handed on since."""
        waiting, seen = [tensor], {id(tensor)}
        while waiting:
            one = waiting.pop()
            maker = maker_of(one)
            if maker is None or self._kept_maker(one):
                continue
            if maker.domain or maker.op not in MOVEMENT or maker.op in ("Cast", "DequantizeLinear"):
                return False
            more = [
                item for item in maker.inputs if is_float32(item) and not is_constant(item) and id(item) not in seen
            ]
            seen.update(map(id, more))
            waiting.extend(more)
        return True

    def _kept_maker(self, tensor: gs.Tensor) -> bool:
        maker = maker_of(tensor)
        return maker is not None and (id(maker) in self.kept or maker.op in CONTROL_FLOW)

    def _ends_in(self, outside: set[int], node: gs.Node) -> bool:
        """Whether all that reads what the node makes wants float32, as what leaves the graph by ``outside`` does."""
        wanted = False
        for tensor in (node.outputs[index] for index in self.ports[id(node)].outputs):
            if id(tensor) in self.boundary:
                if id(tensor) not in outside:
                    return False
                wanted = True
            for reader in tensor.outputs:
                if self._is_free(reader):
                    return False
                wanted |= id(reader) in self.kept or (reader.op in CONTROL_FLOW and not reader.domain)
        return wanted

    # masks

    def _find_saturated(self) -> None:
        """Finds the tensors of float32 that hold a constant beyond the low type's range."""
        holding: set[int] = set()
        for node in self.nodes:
            if id(node) not in self.kept or not elementwise(node):
                continue
            known = [extent_of(node, index) for index in range(len(node.inputs))]
            own = any(item is not None and item.largest > self.low.largest for item in known)
            if own or any(id(tensor) in holding for tensor in node.inputs):
                holding.update(map(id, node.outputs))
                self.done.saturated.update(tensor.name for tensor in node.outputs if is_float32(tensor))
