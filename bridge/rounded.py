"""A copy of a low-precision model in which each value of a low type is really rounded to it, for ONNX Runtime's CPU.

Left to itself, that provider computes float16 in float32, leaves pairs of casts out, and so hides overflow; of bfloat16
it has few kernels. In the copy each node that reads or makes a low type is computed in float32, and what it makes is
cast down: ``node → Cast to low → Identity → the tensor, under its own name and type → Cast to float32 → whatever reads
it``. No optimisation takes two casts together where an Identity in the low type stands between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from passes.ir import CONTROL_FLOW, PLUGIN_DOMAIN

from .errors import RunError

LOW_TYPES = frozenset((TensorProto.FLOAT16, TensorProto.BFLOAT16))
"""float8 and the small integers are made by quantisation and casts alone, whose kernels round."""

TYPE_ATTRIBUTES = frozenset(
    ("dtype", "output_dtype", "output_datatype", "precision", "softmax_precision", "stash_type")
)
"""Attributes that name an element type in which a node computes, or which it makes."""

LEFT_ALONE = CONTROL_FLOW | {
    "Constant",
    "Identity",
    "ConcatFromSequence",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
}
"""They compute nothing: their bodies do, and what goes through them keeps its type."""


@dataclass
class Rounded:
    """The copy."""

    model: ModelProto
    types: dict[str, int]
    """Element types of the main graph's tensors, as they are in the model that was copied."""
    inputs: dict[str, str]
    """By the name of an input in that model, its name in the copy: those of low types are taken as float32."""
    wide: dict[str, str]
    """By the name of a low tensor of the main graph, that of the same values in float32, where something reads them."""


@dataclass
class Scope:
    """One graph while its nodes are replaced; ``outer`` is what its nodes see beside it."""

    types: dict[str, int]
    outer: Scope | None = None
    nodes: list[NodeProto] = field(default_factory=list)
    wide: dict[str, str] = field(default_factory=dict)
    """By the name of a low tensor: that of the same values in float32."""

    def home(self, name: str) -> Scope | None:
        """Where the tensor is made; None where its type is not known."""
        if name in self.types:
            return self
        return self.outer.home(name) if self.outer is not None else None

    def type(self, name: str) -> int | None:
        home = self.home(name)
        return home.types[name] if home is not None else None

    def low(self, name: str) -> bool:
        return bool(name) and self.type(name) in LOW_TYPES


class Names:
    """Names that nothing in the model has."""

    def __init__(self, graph: GraphProto) -> None:
        self.taken = set(_all_names(graph))

    def new(self, stem: str) -> str:
        name, number = stem, 1
        while name in self.taken:
            name, number = f"{stem}_{number}", number + 1
        self.taken.add(name)
        return name


def _all_names(graph: GraphProto) -> Iterator[str]:
    for item in (*graph.input, *graph.initializer):
        yield item.name
    for node in graph.node:
        yield from node.output
        for body in bodies(node):
            yield from _all_names(body)


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that the node runs; changing them changes the node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def has_bfloat16(graph: GraphProto) -> bool:
    """Whether any tensor of the graph, or of a body, is said to be bfloat16."""
    return TensorProto.BFLOAT16 in _types_said(graph)


def half_type(graph: GraphProto) -> str:
    """``bf16`` or ``fp16`` where any tensor of the graph, or of a body, is said to be of it, the coarser first."""
    types = _types_said(graph)
    return "bf16" if TensorProto.BFLOAT16 in types else "fp16" if TensorProto.FLOAT16 in types else ""


def _types_said(graph: GraphProto) -> set[int]:
    types = {info.type.tensor_type.elem_type for info in (*graph.input, *graph.output, *graph.value_info)}
    types |= {item.data_type for item in graph.initializer}
    types |= {item.i for node in graph.node if node.op_type == "Cast" for item in node.attribute if item.name == "to"}
    return types.union(*(_types_said(body) for node in graph.node for body in bodies(node)))


def plain(model: ModelProto) -> ModelProto:
    """The model with its local functions inlined, except for what plugins compute, and with the types of its tensors.

    A plugin is one node: what happens inside is its own affair.
    """
    if any(not is_plugin(item.domain) for item in model.functions):
        from onnx import inliner

        references = [(item.domain, item.name) for item in model.functions if is_plugin(item.domain)]
        model = inliner.inline_selected_functions(model, references, exclude=True)
    return onnx.shape_inference.infer_shapes(model)


def is_plugin(domain: str) -> bool:
    return domain == PLUGIN_DOMAIN or domain.startswith(f"{PLUGIN_DOMAIN}.")


def rounded(model: ModelProto) -> Rounded:
    """The copy of ``model``, which is ``plain``. Weights in external files stay there.

    Raises RunError where the type of what a low node makes is not known.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph, names = copy.graph, Names(copy.graph)
    scope = _scope(graph, None)
    types = dict(scope.types)
    with_default = {item.name for item in graph.initializer}
    inputs = {}
    given = list(graph.input)
    del graph.input[:]
    for info in given:
        if info.name in with_default:
            continue
        inputs[info.name] = info.name
        if scope.low(info.name):
            wide = onnx.ValueInfoProto()
            wide.CopyFrom(info)
            wide.name = inputs[info.name] = names.new(f"{info.name}/given")
            wide.type.tensor_type.elem_type = TensorProto.FLOAT
            _round(wide.name, info.name, scope, names)
            info = wide
        graph.input.append(info)
    _replace(graph, scope, names)
    _say_older(copy)
    return Rounded(copy, types, inputs, scope.wide)


def _say_older(model: ModelProto) -> None:
    """Says the copy in opset 22, where nothing needs 23, in which QuantizeLinear and DequantizeLinear take values and
    scales of two float types. In the copy both are float32, and they mean what they did; and for their newer forms
    ONNX Runtime 1.23, the last one for Python 3.10, has no kernels.
    """
    older = ModelProto()
    older.CopyFrom(model)
    imports = [item for owner in (older, *older.functions) for item in owner.opset_import if item.domain in _DEFAULT]
    if max((item.version for item in imports), default=0) != _SCALES_APART:
        return
    for item in imports:
        item.version = min(item.version, _SCALES_APART - 1)
    context = type(onnx.checker.DEFAULT_CONTEXT)()
    context.ir_version, context.opset_imports = older.ir_version, {"": _SCALES_APART - 1}
    for node in _all_nodes(older.graph.node, *(function.node for function in older.functions)):
        if node.domain not in _DEFAULT:
            continue
        if node.op_type in _QUANTISES:
            kept = [item for item in node.attribute if item.name not in _QUANTISES[node.op_type]]
            del node.attribute[:]
            node.attribute.extend(kept)
        if not any(True for _ in bodies(node)):  # whose nodes are looked at one by one
            try:
                onnx.checker.check_node(node, context)
            except onnx.checker.ValidationError:
                return
    model.CopyFrom(older)


_DEFAULT = ("", "ai.onnx")
_SCALES_APART = 23
"""The opset from which on a scale may be of another type than what it scales."""
_QUANTISES = {"QuantizeLinear": ("precision",), "DequantizeLinear": ("output_dtype",)}
"""With the attributes that they have from there on."""


def _all_nodes(*sequences: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """With those of bodies."""
    for node in itertools.chain(*sequences):
        yield node
        yield from _all_nodes(*(body.node for body in bodies(node)))


def _scope(graph: GraphProto, outer: Scope | None) -> Scope:
    """The graph's own tensors with their types."""
    infos = (*graph.value_info, *graph.output, *graph.input)
    types = {info.name: info.type.tensor_type.elem_type for info in infos if info.type.HasField("tensor_type")}
    types.update({item.name: item.data_type for item in graph.initializer})
    types.update({item.values.name: item.values.data_type for item in graph.sparse_initializer})
    return Scope({name: kind for name, kind in types.items() if kind}, outer)


def _replace(graph: GraphProto, scope: Scope, names: Names) -> None:
    for node in graph.node:
        for body in bodies(node):
            _replace(body, _scope(body, scope), names)
        if node.op_type in LEFT_ALONE and node.domain in _DEFAULT:
            scope.nodes.append(node)
        else:
            _node(node, scope, names)
    nodes = list(scope.nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def _node(node: NodeProto, scope: Scope, names: Names) -> None:
    """Adds the node, computed in float32 where it reads or makes low types."""
    low_inputs = any(map(scope.low, node.input))
    if low_inputs:
        unknown = [name for name in node.output if name and scope.home(name) is None]
        if unknown:
            raise RunError(
                f"node {node.name!r} ({node.op_type}) reads half precision, and the type of {unknown[0]!r}, which it "
                "makes, is not known: shape inference finds none. State it in the model's value_info."
            )
    elif not any(map(scope.low, node.output)):
        scope.nodes.append(node)
        return
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [_wide(name, scope, names) if scope.low(name) else name for name in node.input]
    casts = node.op_type in ("Cast", "CastLike") and node.domain in _DEFAULT
    if node.op_type == "CastLike" and casts:
        copy.op_type = "Cast"
        del copy.input[1:]
        kind = scope.type(node.output[0])
        copy.attribute.append(onnx.helper.make_attribute("to", kind or TensorProto.FLOAT))
    if not casts:
        _widen_attributes(copy)
    low_outputs = [(index, name) for index, name in enumerate(node.output) if scope.low(name)]
    for index, name in low_outputs:
        copy.output[index] = names.new(f"{name}/{'low' if casts else 'exact'}")
    scope.nodes.append(copy)
    for index, name in low_outputs:
        if casts:  # which rounds by itself
            scope.nodes.append(make("Identity", copy.output[index], name))
        else:
            _round(copy.output[index], name, scope, names)


def _widen_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in TYPE_ATTRIBUTES and attribute.i in LOW_TYPES:
            attribute.i = TensorProto.FLOAT
        elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type in LOW_TYPES:
            values = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(values, attribute.t.name))


def _round(source: str, name: str, scope: Scope, names: Names) -> None:
    """Makes the low tensor ``name`` of the float32 tensor ``source``."""
    low = names.new(f"{name}/low")
    scope.nodes.append(make("Cast", source, low, scope.types[name]))
    scope.nodes.append(make("Identity", low, name))


def _wide(name: str, scope: Scope, names: Names) -> str:
    """The values of a low tensor in float32: cast once, where the tensor is made, and not in each turn of a loop."""
    home = scope.home(name)
    assert home is not None
    if name not in home.wide:
        home.wide[name] = names.new(f"{name}/wide")
        home.nodes.append(make("Cast", name, home.wide[name], TensorProto.FLOAT))
    return home.wide[name]


def make(op: str, source: str, output: str, to: int | None = None) -> NodeProto:
    """A node of one input, called like its output; ``to`` is a Cast's type."""
    node = NodeProto(op_type=op, input=[source], output=[output])  # nodes of the model may be called as their outputs
    if to is not None:
        node.attribute.append(onnx.helper.make_attribute("to", to))
    return node


def captured(nodes: Iterable[NodeProto]) -> set[str]:
    """The tensors that the nodes and their bodies read, except for those that bodies make themselves."""
    read: set[str] = set()
    for node in nodes:
        read.update(node.input)
        for body in bodies(node):
            made = {item.name for item in (*body.input, *body.initializer)}
            made.update(name for inner in body.node for name in inner.output)
            read |= (captured(body.node) | {item.name for item in body.output}) - made
    return read - {""}
