"""Plugins: what they are, and nodes that call them.

A node that calls a plugin carries the plugin's meaning along: a local ONNX function of the same name, made of ordinary
operators. ONNX Runtime runs that function, so the rewritten model is still compared with the one before it; TensorRT
runs the plugin.

    NORMS = register(
        Plugin(
            "RowNorms",
            attributes={"order": 2},
            reference=lambda g, x, order: g.op.ReduceL2(x, [-1]) if order == 2 else g.op.ReduceL1(x, [-1]),
            library="/opt/plugins/librownorms.so",
        )
    )


    @rule("row_norms", domain="mylib", when=has_plugin("RowNorms"))
    def row_norms_by_plugin(node, g):
        '''mylib::row_norms has a plugin of its own.'''
        return g.plugin(NORMS, node.inputs, {"order": node.attrs["order"]})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .ir import PLUGIN_DOMAIN, Node, calls, function_key, is_plugin_call, is_reference, scopes
from .writing import function_proto

if TYPE_CHECKING:
    import numpy.typing as npt

    from bridge.target import Target

    from .framework import Builder

Key: TypeAlias = tuple[str, str, str]
"""Namespace, name and version: what TensorRT's registry finds a creator by."""
Type: TypeAlias = "tuple[npt.DTypeLike, Sequence[int | str | None] | None]"
"""The dtype and the shape of an output."""

FIELDS = ("plugin_version", "plugin_namespace")
"""Attributes that TensorRT's parsers read themselves. With a namespace, the plugin goes before the local function."""


class PluginMisfit(ValueError):
    """A call that does not fit its plugin, or a reference body that does not fit the call."""


@dataclass(frozen=True, eq=False)
class Plugin:
    """A creator in TensorRT's plugin registry, and what it computes."""

    name: str
    """The creator's; the op type of the nodes that call it."""
    version: str = "1"
    namespace: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """By name the default, or the type (int, float, str, list, np.ndarray) of what has none. None: may be left out."""
    outputs: int = 1
    reference: Callable[..., Any] | None = None
    """``reference(g, *inputs, **attributes)`` writes with the Builder ``g`` what the plugin computes, and returns the
    tensors. ``inputs`` have the dtypes and shapes of the call's, and are None where the call leaves them out."""
    library: str | None = None
    """The shared library to load; None for a plugin that TensorRT brings along, or that ``module`` registers."""
    module: str | None = None
    """The Python module whose import registers creators of IPluginV3."""
    limits: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    """By name what the creator demands of an attribute's value: with others it makes no plugin, and the build fails."""

    @property
    def key(self) -> Key:
        return (self.namespace, self.name, self.version)

    def loads_into(self, target: Target) -> bool:
        """Whether the plugin brings along what this target can load."""
        return self.library is not None or (self.module is not None and target.takes_python_plugins)


PLUGINS: dict[Key, Plugin] = {}
"""Every plugin that rules and users have named."""


def register(plugin: Plugin) -> Plugin:
    """Makes the plugin known. Raises ValueError where another one has its namespace, name and version."""
    if PLUGINS.setdefault(plugin.key, plugin) is not plugin:
        raise ValueError(f"plugin {plugin.name!r} version {plugin.version} is registered twice")
    return plugin


def loadable(target: Target, name: str, version: str | None = None) -> bool:
    """Whether a registered plugin of this name can be loaded into ``target``."""
    return any(
        plugin.name == name and version in (None, plugin.version) and plugin.loads_into(target)
        for plugin in PLUGINS.values()
    )


# --- calls -------------------------------------------------------------------------------------------------------


def call(
    g: Builder, plugin: Plugin, inputs: Sequence[Any], attrs: Mapping[str, Any], types: Sequence[Type] | None
) -> list[gs.Variable]:
    """Makes the node that calls ``plugin``, and its reference body where the model does not have it yet."""
    tensors = [g.tensor(item) for item in inputs]
    while tensors and tensors[-1].is_empty():
        tensors.pop()
    values = _attributes(plugin, attrs)
    body = _body(g, plugin, tensors, values)
    results = [gs.Variable(g.names.new(f"{g.stem}/{plugin.name}")) for _ in range(plugin.outputs)]
    for index, result in enumerate(results):
        known: Any = types[index] if types is not None else (body.outputs[index].dtype, body.outputs[index].shape)
        result.dtype = None if known[0] is None else np.dtype(known[0])
        result.shape = None if known[1] is None else list(known[1])
    written = {**values, "plugin_version": plugin.version, "plugin_namespace": plugin.namespace}
    name = g.names.new(f"{g.stem}/{plugin.name}")
    node = Node(plugin.name, name, written, tensors, results, domain=_settle(body, g.functions))
    g.made.append(node)
    return results


def _attributes(plugin: Plugin, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the call's attributes, defaults included. Raises PluginMisfit where they do not fit the plugin."""
    unknown = attrs.keys() - plugin.attributes.keys()
    if unknown:
        raise PluginMisfit(f"plugin {plugin.name!r} has no attribute {sorted(unknown)[0]!r}")
    values: dict[str, Any] = {}
    for name, declared in plugin.attributes.items():
        if name not in attrs and isinstance(declared, type):
            raise PluginMisfit(f"plugin {plugin.name!r} needs the attribute {name!r}")
        value = _coerced(attrs.get(name, declared), declared)
        if value is not None and name in plugin.limits and not plugin.limits[name](value):
            raise PluginMisfit(f"the creator of plugin {plugin.name!r} refuses {name}={value!r}")
        if value is not None:
            values[name] = value
    return values


def _coerced(value: Any, declared: Any) -> Any:
    """The value in the type that the attribute was declared with: 1 for a float is 1.0, since a field has a type."""
    kind = declared if isinstance(declared, type) else type(declared)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return gs.Constant("", value)
    if kind in (int, float) and isinstance(value, (bool, int, float)):
        if kind is int and value != int(value):
            raise PluginMisfit(f"{value!r} is given for an integer")
        return kind(value)
    if isinstance(value, (list, tuple)):
        floats = isinstance(declared, (list, tuple)) and any(isinstance(item, float) for item in declared)
        return [float(item) for item in value] if floats else list(value)
    return value


def _body(g: Builder, plugin: Plugin, inputs: Sequence[gs.Tensor], values: Mapping[str, Any]) -> gs.Function:
    """The plugin's meaning for inputs of these types, as a local function; its domain is still to be settled."""
    from .framework import Builder, Declined
    from .ir import Names

    if plugin.reference is None:
        raise PluginMisfit(f"plugin {plugin.name!r} has no reference body: nothing could say what it computes")
    names = Names()
    formals: list[gs.Variable | None] = []
    for index, tensor in enumerate(inputs):
        shape = None if tensor.shape is None else list(tensor.shape)
        formals.append(None if tensor.is_empty() else gs.Variable(names.new(f"input_{index}"), tensor.dtype, shape))
    builder = Builder(names, g.opset, plugin.name)
    read = {name: value.values if isinstance(value, gs.Constant) else value for name, value in values.items()}
    left_out = {name: None for name in plugin.attributes if name not in read}
    try:
        made = plugin.reference(builder, *formals, **read, **left_out)
    except Declined:
        raise
    except Exception as error:  # the user's code may raise anything, and is named as the cause
        raise PluginMisfit(
            f"the reference body of plugin {plugin.name!r} raises {type(error).__name__}: {error}"
        ) from error
    results = [made] if isinstance(made, gs.Tensor) else list(made)
    if len(results) != plugin.outputs:
        raise PluginMisfit(f"plugin {plugin.name!r} has {plugin.outputs} outputs, its reference body {len(results)}")
    own = {id(tensor) for node in builder.made for tensor in node.outputs}
    for index, tensor in enumerate(results):
        if id(tensor) not in own or any(tensor is item for item in results[:index]):
            results[index] = builder.op.Identity(tensor)
    return gs.Function(
        plugin.name,
        PLUGIN_DOMAIN,
        nodes=builder.made,
        inputs=[
            gs.Variable(names.new(f"input_{index}")) if tensor is None else tensor
            for index, tensor in enumerate(formals)
        ],
        outputs=results,
        opset=g.opset,
        attrs=dict.fromkeys((*values, *FIELDS)),
    )


def _settle(body: gs.Function, functions: list[gs.Function]) -> str:
    """The domain of ``body``: that of an equal function in ``functions``, or one of its own, which it joins.

    TensorRT looks operators up by name alone, so that every domain leads to the same plugin.
    """
    text = _text(body)
    others = [function for function in functions if function.name == body.name and is_reference(function)]
    for other in others:
        if _text(other) == text:
            return str(other.domain)
    taken = {function.domain for function in others}
    number = 1
    while body.domain in taken:
        number += 1
        body.domain = f"{PLUGIN_DOMAIN}.{number}"
    functions.append(body)
    return str(body.domain)


def _text(function: gs.Function) -> bytes:
    """What the function does, whatever its domain and the shapes that it was written for."""
    proto = function_proto(function, ir_version=8)  # without types
    proto.domain = ""
    text: bytes = proto.SerializeToString(deterministic=True)
    return text


# --- operators that a plugin replaces ----------------------------------------------------------------------------

REPLACED: dict[tuple[str, str], Plugin] = {}
"""By domain (or torch's namespace) and op type: the user's plugin that takes its place."""


def replacing_rule(plugin: Plugin, domain: str, op: str) -> Callable[[gs.Node, Builder], Any]:
    """The function of a rule that replaces ``domain::op`` by a call of the plugin."""

    def replace(node: gs.Node, g: Builder) -> Any:
        known = len(node.outputs) == plugin.outputs and all(tensor.dtype is not None for tensor in node.outputs)
        types = [(tensor.dtype, tensor.shape) for tensor in node.outputs] if known else None
        return g.plugin(plugin, node.inputs, _given(node, plugin), types)

    replace.__name__ = f"plugin_{plugin.name}_for_{domain}_{op}"
    replace.__doc__ = f"{domain or 'ONNX'}::{op} has been given the plugin {plugin.name}."
    return replace


def call_plugins(graph: gs.Graph) -> list[str]:
    """Turns nodes that a plugin replaces, and that nothing else could run, into calls of it; returns their operators.

    That is what a custom operator of torch is exported as, or what an ONNX file has that is not ONNX's. A plugin of
    TensorRT's own is known by its name in any domain: EfficientNMS_TRT ends many a detector. Raises PluginMisfit where
    an operator is not as its plugin was registered.
    """
    from .framework import Builder, Declined
    from .ir import Names

    own = {function_key(function) for function in graph.functions}
    changed: dict[str, None] = {}
    for scope in scopes(graph):
        for node in scope.nodes:
            known = onnx.defs.has(node.op)
            plugin = None if known and not node.domain else REPLACED.get((node.domain or "", node.op))
            plugin = plugin or (None if known else PLUGINS.get(plugin_of(node)))
            if plugin is None or calls(node) in own:
                continue
            changed[f"{node.domain}::{node.op}" if node.domain else node.op] = None
            values = _attributes(plugin, _given(node, plugin))
            try:
                body = _body(Builder(Names(), scope.opset, node.op), plugin, node.inputs, values)
            except Declined as error:
                raise PluginMisfit(f"the reference body of plugin {plugin.name!r} has no form here: {error}") from error
            node.op, node.domain = plugin.name, _settle(body, graph.functions)
            node.attrs = {**values, "plugin_version": plugin.version, "plugin_namespace": plugin.namespace}
            for output, found in zip(node.outputs, body.outputs, strict=False):
                output.dtype = output.dtype if output.dtype is not None else found.dtype
            node.outputs.extend(
                gs.Variable(f"{node.name}/{index}") for index in range(len(node.outputs), plugin.outputs)
            )
    return list(changed)


def _given(node: gs.Node, plugin: Plugin) -> dict[str, Any]:
    """The node's attributes that are the plugin's; TensorRT's own two are not."""
    return {name: value for name, value in node.attrs.items() if name not in FIELDS or name in plugin.attributes}


# --- the bridge's own --------------------------------------------------------------------------------------------


def _non_max_suppression(g: Builder, *inputs: gs.Tensor, center_point_box: int, most: int) -> Any:
    chosen = g.op.NonMaxSuppression(*inputs, center_point_box=center_point_box)
    return chosen, g.cast(g.squeeze(g.slice(g.op.Shape(chosen), [0], [1], [0], [1]), [0]), np.int32)


def _deform_conv(g: Builder, *inputs: gs.Tensor, bias: int, mask: int, **attributes: Any) -> Any:
    rest = list(inputs[3:])
    given = [rest.pop(0) if there else None for there in (bias, mask)]
    return g.op.DeformConv(*inputs[:3], *given, **attributes)


NON_ZERO = register(Plugin("NonZero", reference=lambda g, x: g.op.NonZero(x), module="bridge.plugins.nonzero"))
"""TensorRT-RTX's parser asks for it by itself; no node of a model names it."""
NON_MAX_SUPPRESSION = register(
    Plugin(
        "NonMaxSuppression",
        namespace="bridge",
        attributes={"center_point_box": 0, "most": -1},
        outputs=2,
        reference=_non_max_suppression,
        module="bridge.plugins.nms",
    )
)
"""``most``: what is known of the largest number of boxes in a class, or -1. Its second output counts the rows."""
DEFORM_CONV = register(
    Plugin(
        "DeformConv",
        namespace="bridge",
        attributes={
            "strides": [1, 1],
            "pads": [0, 0, 0, 0],
            "dilations": [1, 1],
            "group": 1,
            "offset_group": 1,
            "bias": 0,
            "mask": 0,
        },
        reference=_deform_conv,
        module="bridge.plugins.deform_conv",
    )
)
"""``bias`` and ``mask`` say which of them follow the offset, in this order: a plugin's inputs have no gaps."""


# --- models ------------------------------------------------------------------------------------------------------


def plugin_of(node: gs.Node) -> Key:
    """The key of the plugin that a node of ours, or one that a plugin's user wrote, calls."""
    return (node.attrs.get("plugin_namespace", ""), node.op, node.attrs.get("plugin_version", "1"))


def plugin_calls(graph: gs.Graph) -> Iterator[gs.Node]:
    """The nodes that call a plugin, in bodies too."""
    for scope in scopes(graph):
        yield from filter(is_plugin_call, scope.nodes)


def drop_uncalled(graph: gs.Graph) -> None:
    """Leaves out local functions that no node calls any more."""
    while True:
        called = {calls(node) for scope in scopes(graph) for node in scope.nodes}
        kept = [function for function in graph.functions if function_key(function) in called]
        if len(kept) == len(graph.functions):
            return
        graph.functions = kept
