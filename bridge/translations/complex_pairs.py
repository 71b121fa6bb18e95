"""Complex tensors as pairs of real ones: the graph of a program is rewritten until none but transforms' are left.

torch.onnx writes a complex tensor with a last axis of 2 and has translations for some operators on these; the others,
broadcasting, masks and products among them, it refuses. Here each complex value becomes two real nodes.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.export.graph_signature import TensorArgument

from .registry import ON_PAIRS, Untranslatable, overload


class Real:
    """A real node of the graph, or a number, with the arithmetic of tensors."""

    def __init__(self, writer: Writer, node: Any) -> None:
        self.writer, self.node = writer, node

    def __add__(self, other: Any) -> Real:
        return self.writer("add.Tensor", self, other)

    def __sub__(self, other: Any) -> Real:
        return self.writer("sub.Tensor", self, other)

    def __mul__(self, other: Any) -> Real:
        return self.writer("mul.Tensor", self, other)

    def __truediv__(self, other: Any) -> Real:
        return self.writer("div.Tensor", self, other)

    def __neg__(self) -> Real:
        return self.writer("neg", self)


class Pair(NamedTuple):
    re: Real
    im: Real


def parts(value: Any) -> tuple[Any, Any]:
    """Both parts of an operand; None for the imaginary one of what is real."""
    if isinstance(value, Pair):
        return value.re, value.im
    if isinstance(value, complex):
        return value.real, value.imag
    return value, None


class Writer:
    """Writes real operators before a node, which they take their origin from."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.fake: Any = detect_fake_mode([node.meta.get("val") for node in graph.nodes]) or contextlib.nullcontext()
        self.place: fx.Node | None = None
        self.target: Any = None
        """The operator that is being replaced."""
        self.meta: dict[str, Any] = {}

    def at(self, place: fx.Node, origin: fx.Node) -> None:
        self.place, self.target = place, origin.target
        self.meta = {key: value for key, value in origin.meta.items() if key not in ("val", "tensor_meta")}

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Real:
        target = overload(op) if isinstance(op, str) else op
        assert target is not None and self.place is not None, op
        nodes = mapped((args, kwargs), lambda item: item.node if isinstance(item, Real) else item)
        with torch.no_grad(), self.fake, enable_python_dispatcher():  # else composite operators want plain numbers
            value = target(*_values(nodes[0]), **_values(nodes[1]))
        with self.graph.inserting_before(self.place):
            node = self.graph.call_function(target, nodes[0], nodes[1])
        node.meta = {**self.meta, "val": value}
        return Real(self, node)

    def item(self, many: Real, index: int) -> Real:
        assert self.place is not None
        with self.graph.inserting_before(self.place):
            node = self.graph.call_function(operator.getitem, (many.node, index))
        node.meta = {**self.meta, "val": many.node.meta["val"][index]}
        return Real(self, node)

    def unpack(self, packed: Any) -> Pair:
        """Of a real node whose last axis is the two parts."""
        return Pair(self("select.int", packed, -1, 0), self("select.int", packed, -1, 1))

    def pack(self, pair: Pair) -> Real:
        if pair.re.node.target is pair.im.node.target is overload("select.int"):
            (of, *real), (other, *imaginary) = pair.re.node.args, pair.im.node.args
            if of is other and (real, imaginary) == ([-1, 0], [-1, 1]):  # what ``unpack`` made
                return Real(self, of)
        return self("stack", list(pair), -1)


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of each leaf of nested tuples, lists and dicts; a Pair is a leaf."""
    if isinstance(tree, (list, tuple)) and not isinstance(tree, Pair):
        return type(tree)(mapped(item, function) for item in tree)
    if isinstance(tree, dict):
        return {key: mapped(item, function) for key, item in tree.items()}
    return function(tree)


def _values(tree: Any) -> Any:
    return mapped(tree, lambda item: item.meta["val"] if isinstance(item, fx.Node) else item)


def is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, torch.Tensor) and item.is_complex() for item in value)
    return isinstance(value, torch.Tensor) and value.is_complex()


NATIVE = ("view_as_real", "view_as_complex", "_fft_r2c", "_fft_c2c")
"""What is left of complex values, which torch.onnx translates."""


ASSERTIONS = {overload("_assert_tensor_metadata")}

VIEWS = {overload("view"), overload("_unsafe_view")}


def lower_complex(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program, changed in place, with no complex values but between transforms and real ones.

    Raises Untranslatable where an operator on complex values is not known here.
    """
    native = {overload(name) for name in NATIVE}
    calls = [node for node in program.graph.nodes if node.op == "call_function" and node.target not in native]
    if not any(is_complex(item) for node in calls for item in (node, *node.all_input_nodes)):
        return program
    renamed = _Lowering(program.graph).run()
    for spec in program.graph_signature.output_specs:
        if spec.arg.name in renamed:
            spec.arg = TensorArgument(name=renamed[spec.arg.name])
    program.graph_module.recompile()
    return program


class _Lowering:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.writer = Writer(graph)
        self.pairs: dict[fx.Node, Any] = {}
        """By complex node its Pair; by one of several outputs, a list of them."""
        self.replaced: dict[fx.Node, fx.Node] = {}

    def run(self) -> dict[str, str]:
        """Rewrites the graph; returns the new names of the outputs that have one."""
        outputs = next(node for node in self.graph.nodes if node.op == "output").all_input_nodes
        before = {item: item.name for item in outputs}
        self._contiguous_views()
        nodes = list(self.graph.nodes)
        body = next(node for node in nodes if node.op not in ("placeholder", "get_attr"))
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                if is_complex(node):
                    self.writer.at(body if node.op == "placeholder" else node.next, node)
                    self.pairs[node] = self.writer.unpack(self.writer("view_as_real", Real(self.writer, node)))
            elif node.op == "output":
                self._outputs(node)
            elif is_complex(node) or any(item in self.pairs for item in node.all_input_nodes):
                self._lower(node)
        after = {name: self.replaced[node].name for node, name in before.items() if node in self.replaced}
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return after

    def _contiguous_views(self) -> None:
        """Each view is of a copy: the pairs' strides, and those of what is computed from them, differ from before."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in VIEWS:
                self.writer.at(node, node)
                source = Real(self.writer, node.args[0])
                copied = self.writer("clone", source, memory_format=torch.contiguous_format)
                node.replace_input_with(source.node, copied.node)

    def _outputs(self, node: fx.Node) -> None:
        self.writer.at(node, node)
        for item in node.all_input_nodes:
            if item in self.pairs:
                packed = self.writer("view_as_complex", self.writer.pack(self.pairs[item]))
                node.replace_input_with(item, packed.node)
                self.replaced[item] = packed.node

    def _lower(self, node: fx.Node) -> None:
        self.writer.at(node, node)
        if node.target in ASSERTIONS:
            self.graph.erase_node(node)
            return
        if node.target is operator.getitem:
            many = self.pairs[node.args[0]]  # type: ignore[index]
            self.pairs[node] = many[node.args[1]]
            return
        args, kwargs = (mapped(item, self._operand) for item in (node.args, node.kwargs))
        handler = ON_PAIRS.get(node.target)
        if handler is not None:
            made = handler(self.writer, *args, **kwargs)
        elif not any(item in self.pairs for item in node.all_input_nodes):  # a transform of what is real
            self.writer.at(node.next, node)
            made = self.writer.unpack(self.writer("view_as_real", Real(self.writer, node)))
        else:
            raise Untranslatable(f"{node.target} has no translation for complex values")
        if is_complex(node):
            self.pairs[node] = made
        else:
            node.replace_all_uses_with(made.node)
            self.replaced[node] = made.node

    def _operand(self, item: Any) -> Any:
        if isinstance(item, fx.Node):
            return self.pairs[item] if item in self.pairs else Real(self.writer, item)
        return item
