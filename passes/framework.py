"""Rewrite rules: what a rule is, and what it builds with. ``engine`` runs them.

A rule is a function of one node. It returns the tensors that replace the node's outputs, returns None where there is
nothing to do, or calls ``g.decline(reason)`` where it ought to help and cannot. Its docstring's first line says why it
exists. Every rule has examples; the test suite runs each before and after, and gives the result to the parser.

    @rule("Det", when=lacks("Det"))
    def det_by_cofactors(node, g):
        '''TensorRT has no Det; of a small matrix it is a sum of products.'''
        ...
        return g.op.Add(a, b)

    @det_by_cofactors.example
    def two_by_two():
        return example({"x": ("float32", [5, 2, 2])}, lambda g, x: g.op.Det(x))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .ir import Array, Names, Node, set_type, tensor_proto, type_known, type_proto
from .matches import Match, Recorder
from .writing import node_proto

if TYPE_CHECKING:
    from bridge.target import Target

    from .plugins import Plugin, Type

Replacement: TypeAlias = gs.Tensor | Sequence[gs.Tensor | None] | None
RuleFunction = Callable[[gs.Node, "Builder"], Replacement]
Reference = Callable[[Mapping[str, Array]], Sequence[Array]]
"""From the inputs by name to the outputs in order."""


class PassError(RuntimeError):
    """A pass that broke on a model: a defect of the pass, told with the node that it was at."""


class Declined(Exception):
    """A rule's word that it cannot rewrite a node, with the reason."""


@dataclass
class Rule:
    """A rewrite of one node, with the reason it exists, its condition on the target, and examples that prove it."""

    function: RuleFunction
    ops: tuple[str, ...]
    when: Callable[[Target], bool]
    domain: str = ""
    since: int | None = None
    """Of a rule that lowers: the opset that brought the form which it replaces."""
    examples: list[Callable[[], gs.Graph]] = field(default_factory=list)
    references: dict[str, Reference] = field(default_factory=dict)
    """By the example's name: what gives its true outputs, where ONNX Runtime's are not what is meant."""

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def reason(self) -> str:
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def example(self, function: Callable[[], gs.Graph]) -> Callable[[], gs.Graph]:
        """Decorator of a function that returns a small model which the rule rewrites."""
        self.examples.append(function)
        return function

    def example_against(self, reference: Reference) -> Callable[[Callable[[], gs.Graph]], Callable[[], gs.Graph]]:
        """As ``example``, for a model that its exporter got wrong: ``reference`` computes what it was meant to."""

        def register(function: Callable[[], gs.Graph]) -> Callable[[], gs.Graph]:
            self.references[function.__name__] = reference
            return self.example(function)

        return register


RULES: dict[str, Rule] = {}
"""Every rule by name, in the order in which they are tried."""


def always(target: Target) -> bool:
    return True


@dataclass(frozen=True)
class Condition:
    """What a rule asks of the target; conditions combine by ``&``, ``|`` and ``~``."""

    holds: Callable[[Target], bool]

    def __call__(self, target: Target) -> bool:
        return self.holds(target)

    def __and__(self, other: Callable[[Target], bool]) -> Condition:
        return Condition(lambda target: self(target) and other(target))

    def __or__(self, other: Callable[[Target], bool]) -> Condition:
        return Condition(lambda target: self(target) or other(target))

    def __invert__(self) -> Condition:
        return Condition(lambda target: not self(target))


def lacks(op: str) -> Condition:
    """True of targets whose parser does not take ``op`` at all."""
    return Condition(lambda target: not target.takes(op))


def has_plugin(name: str, version: str | None = None) -> Condition:
    """True of targets whose registry has this plugin, or into which it can be loaded."""
    return Condition(lambda target: target.has_plugin(name, version))


def rule(
    *ops: str, when: Callable[[Target], bool] = always, domain: str = "", since: int | None = None
) -> Callable[[RuleFunction], Rule]:
    """Registers the decorated function as the rewrite of nodes of ``ops``, of the standard ``domain`` or another."""

    def register(function: RuleFunction) -> Rule:
        made = Rule(function, ops, when, domain, since)
        if made.name in RULES or not made.reason:
            raise ValueError(f"rule {made.name!r} is registered twice, or has no docstring")
        RULES[made.name] = made
        return made

    return register


def lowering(*ops: str, since: int) -> Callable[[RuleFunction], Rule]:
    """Registers a rule that writes ``ops``, in the form that opset ``since`` brought, in an older one.

    Such rules run last, and only for targets whose parser reads no opset so new; their builder is of the target's
    opset. See ``passes.lower``.
    """
    return rule(*ops, when=lambda target: target.opset is not None and target.opset < since, since=since)


@dataclass
class Log:
    """What was changed, by which rule or pass, and what was declined."""

    reasons: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, list[str]] = field(default_factory=dict)
    declined: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """By (rule, name of the node): the node with its origin, and the reason."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of the changes."""
    recorder: Recorder | None = None
    """What takes down each match, where that is asked for."""

    @property
    def matches(self) -> list[Match]:
        """Each match in order of application; none where none were recorded."""
        return self.recorder.matches if self.recorder is not None else []

    def note(self, notes: Iterable[str]) -> None:
        """Adds those that are not there yet."""
        self.notes.extend(text for text in dict.fromkeys(notes) if text not in self.notes)

    def add(self, name: str, reason: str, nodes: Iterable[str]) -> None:
        self.reasons[name] = reason
        self.nodes.setdefault(name, []).extend(nodes)

    @property
    def changes(self) -> int:
        return sum(map(len, self.nodes.values()))


# --- what rules build with ---------------------------------------------------------------------------------------


class _Ops:
    """``g.op.MatMul(a, b, transA=1)`` makes a node and returns its output (or outputs, with ``outputs=2``)."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder

    def __getattr__(self, op: str) -> Callable[..., Any]:
        def make(*inputs: Any, outputs: int = 1, **attrs: Any) -> Any:
            return self._builder.node(op, inputs, attrs, outputs)

        return make


OLDEST_OPSET = 13
"""Rules know the forms of operators from this opset on; in an older model what they make may have no meaning."""


class Builder:
    """Makes the nodes that replace one node. Every tensor it returns knows its type and, where possible, its shape."""

    def __init__(
        self,
        names: Names,
        opset: int,
        stem: str,
        target: Target | None = None,
        scope: gs.Graph | None = None,
        functions: Sequence[gs.Function] = (),
    ) -> None:
        self.names = names
        self.opset = opset
        self.stem = stem
        self.target = target
        self.scope = scope
        self.op = _Ops(self)
        self.made: list[gs.Node] = []
        self.notes: list[str] = []
        self.functions = list(functions)
        """The model's local functions; those that say what a plugin computes join them."""

    @staticmethod
    def decline(reason: str) -> NoReturn:
        raise Declined(reason)

    def note(self, text: str) -> None:
        """Tells the user of the change; once, of however many nodes it is said."""
        self.notes.append(text)

    # reading

    def shape(self, tensor: gs.Tensor) -> list[int | str | None]:
        """The dimensions, dynamic ones as a name or None; declines where even the rank is unknown."""
        if tensor.shape is None:
            self.decline(f"the rank of {tensor.name!r} is unknown")
        return list(tensor.shape)

    def static_shape(self, tensor: gs.Tensor) -> list[int]:
        shape = self.shape(tensor)
        if not all(isinstance(size, int) for size in shape):
            self.decline(f"the shape of {tensor.name!r} is dynamic: {shape}")
        return [int(size) for size in shape if size is not None]

    def static_dim(self, tensor: gs.Tensor, axis: int) -> int:
        size = self.shape(tensor)[axis]
        if not isinstance(size, int):
            self.decline(f"axis {axis} of {tensor.name!r} is dynamic")
        return size

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any]:
        if tensor.dtype is None:
            self.decline(f"the type of {tensor.name!r} is unknown")
        dtype: np.dtype[Any] = np.dtype(tensor.dtype)
        return dtype

    def value(self, tensor: gs.Tensor) -> Array:
        """The values of a constant; declines where the tensor is computed."""
        if not isinstance(tensor, gs.Constant):
            self.decline(f"{tensor.name!r} is computed at run time")
        return np.asarray(tensor.values)

    @staticmethod
    def input(node: gs.Node, index: int) -> gs.Tensor | None:
        """An optional input, or None where it is left out."""
        if index < len(node.inputs) and not node.inputs[index].is_empty():
            return node.inputs[index]
        return None

    def used(self, tensor: gs.Tensor) -> bool:
        """Whether anything reads the tensor, the caller of the graph included."""
        return bool(tensor.name) and (bool(tensor.outputs) or self.is_output(tensor))

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether it is one of its graph's."""
        return self.scope is not None and any(tensor is item for item in self.scope.outputs)

    # making

    def constant(self, values: Any, dtype: Any = None) -> gs.Constant:
        array = np.asarray(values, dtype=dtype)
        if dtype is None and not isinstance(values, (np.ndarray, np.generic)):
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        return gs.Constant(self.names.new(f"{self.stem}/constant"), array)

    def node(self, op: str, inputs: Sequence[Any], attrs: Mapping[str, Any], outputs: int = 1) -> Any:
        tensors = [self.tensor(item) for item in inputs]
        while tensors and tensors[-1].is_empty():
            tensors.pop()
        results = [gs.Variable(self.names.new(f"{self.stem}/{op}")) for _ in range(outputs)]
        kept = {name: value for name, value in attrs.items() if value is not None}
        node = Node(op, self.names.new(f"{self.stem}/{op}"), kept, tensors, results, domain="")
        try:
            infer(node, self.opset, strict=True)
        except (onnx.defs.SchemaError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            if self.opset >= OLDEST_OPSET:
                raise
            self.decline(
                f"its rewrite needs {op} as it is since opset {OLDEST_OPSET}, and the model's is {self.opset}: export "
                f"it at opset {OLDEST_OPSET} or newer, or let onnx.version_converter bring it there"
            )
        self.made.append(node)
        return results[0] if outputs == 1 else results

    def plugin(
        self,
        plugin: Plugin,
        inputs: Sequence[Any],
        attrs: Mapping[str, Any] | None = None,
        types: Sequence[Type] | None = None,
    ) -> Any:
        """Makes a node that calls ``plugin`` and returns its output, or a list of them where it has several.

        ``types`` gives dtype and shape of each output where the plugin's reference body does not tell.
        """
        from .plugins import call

        results = call(self, plugin, inputs, attrs or {}, types)
        return results[0] if plugin.outputs == 1 else results

    def tensor(self, item: Any) -> gs.Tensor:
        """An operand: a tensor as it is, None as an input left out, values as a constant."""
        if item is None:
            return gs.Variable.empty()
        return item if isinstance(item, gs.Tensor) else self.constant(item)

    # operators whose form changed between opsets

    def reduce(self, op: str, x: gs.Tensor, axes: Sequence[int], keepdims: bool = False) -> gs.Variable:
        """ReduceSum, ReduceMax, …: axes are an input from opset 18 on (ReduceSum from 13)."""
        if self.opset >= (13 if op == "ReduceSum" else 18):
            return self.node(op, [x, list(axes)], {"keepdims": int(keepdims)})
        return self.node(op, [x], {"axes": list(axes), "keepdims": int(keepdims)})

    def unsqueeze(self, x: gs.Tensor, axes: Sequence[int]) -> gs.Variable:
        if self.opset >= 13:
            return self.node("Unsqueeze", [x, list(axes)], {})
        return self.node("Unsqueeze", [x], {"axes": list(axes)})

    def squeeze(self, x: gs.Tensor, axes: Sequence[int]) -> gs.Variable:
        if self.opset >= 13:
            return self.node("Squeeze", [x, list(axes)], {})
        return self.node("Squeeze", [x], {"axes": list(axes)})

    def slice(
        self, x: gs.Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]
    ) -> gs.Variable:
        return self.node("Slice", [x, list(starts), list(ends), list(axes), list(steps)], {})

    def cast(self, x: gs.Tensor, dtype: Any) -> gs.Tensor:
        """``x`` as ``dtype``, itself where it is that already."""
        if x.dtype is not None and np.dtype(x.dtype) == np.dtype(dtype):
            return x
        return self.node("Cast", [x], {"to": int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))})

    def moveaxis(self, x: gs.Tensor, source: int, destination: int) -> gs.Tensor:
        rank = len(self.shape(x))
        order = [axis for axis in range(rank) if axis != source % rank]
        order.insert(destination % rank, source % rank)
        return x if order == list(range(rank)) else self.node("Transpose", [x], {"perm": order})


def schema_of(op: str, opset: int) -> Any:
    """ONNX's, of an operator that it has. One that is newer than the opset is as it became: ONNX Runtime's optimizer
    writes LayerNormalization into models of any opset."""
    return onnx.defs.get_schema(op, opset if onnx.defs.has(op, opset, "") else onnx.defs.onnx_opset_version(), "")


INFERENCE_DATA = 4096
"""Constants above this many elements are not shown to shape inference: none of them is a shape."""


def infer(node: gs.Node, opset: int, *, strict: bool = False) -> bool:
    """Fills in the types of the node's outputs from those of its inputs; True if one became more specific.

    A node that ONNX does not allow (torch's exporter writes ScatterND with int32 indices) teaches nothing; ``strict``
    raises ONNX's SchemaError, ValidationError or InferenceError for it.
    """
    if node.domain or not onnx.defs.has(node.op) or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
        return False
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for tensor in node.inputs:
        if tensor.is_empty():
            continue
        if not type_known(tensor):
            return False
        types[tensor.name] = type_proto(tensor)
        if isinstance(tensor, gs.Constant) and np.prod(tensor.shape, dtype=np.int64) <= INFERENCE_DATA:
            data[tensor.name] = tensor_proto(tensor)
    schema = onnx.defs.get_schema(node.op, opset, "") if strict else schema_of(node.op, opset)
    if node.op in ("GreaterOrEqual", "LessOrEqual"):  # whose older forms tell no shape
        schema = schema_of(node.op, max(opset, 16))
    opsets = [onnx.helper.make_opsetid("", opset)]
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, node_proto(node), types, data, opset_imports=opsets)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        if strict:
            raise
        return False
    changed = False
    for tensor in node.outputs:
        if tensor.name in found and isinstance(tensor, gs.Variable):
            changed |= merge_type(tensor, found[tensor.name])
    return changed


def merge_type(tensor: gs.Variable, proto: onnx.TypeProto) -> bool:
    """Takes from ``proto`` what is more specific than what ``tensor`` knows; True if that was anything."""
    new = gs.Variable(tensor.name)
    set_type(new, proto)
    if new.dtype is None:
        if type_known(tensor) or not type_known(new):
            return False
        set_type(tensor, proto)  # a container
        return True
    changed = tensor.dtype is None
    tensor.dtype = tensor.dtype if tensor.dtype is not None else new.dtype
    if new.shape is None:
        return changed
    if tensor.shape is None or len(tensor.shape) != len(new.shape):
        tensor.shape = new.shape
        return True
    for axis, (old, better) in enumerate(zip(list(tensor.shape), new.shape, strict=True)):
        if not isinstance(old, int) and (isinstance(better, int) or (not old and better)):
            tensor.shape[axis] = better
            changed = True
    return changed


def example(
    inputs: Mapping[str, tuple[str, Sequence[int | str]]],
    build: Callable[..., gs.Tensor | Sequence[gs.Tensor]],
    opset: int = 20,
) -> gs.Graph:
    """A small model: ``inputs`` by name with dtype and shape, ``build(g, *tensors)`` its body."""
    graph = gs.Graph(name="example", opset=opset, ir_version=10)
    graph.inputs = [gs.Variable(name, np.dtype(dtype), list(shape)) for name, (dtype, shape) in inputs.items()]
    builder = Builder(Names(graph), opset, "example")
    results = build(builder, *graph.inputs)
    graph.nodes = builder.made
    graph.functions = builder.functions
    graph.outputs = [results] if isinstance(results, gs.Tensor) else list(results)
    return graph
