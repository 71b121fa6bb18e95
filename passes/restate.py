"""Plugins' reference bodies, written anew where the model comes to another opset."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from .framework import Builder
from .ir import Names, is_plugin_call, is_reference, scopes
from .plugins import FIELDS, PLUGINS, _body, _settle, plugin_of


def restate(graph: gs.Graph, opset: int) -> None:
    """Gives every call of a plugin that is known a body of this opset: a function's operators are the model's."""
    calls = [node for scope in scopes(graph) for node in scope.nodes if is_plugin_call(node)]
    known = [node for node in calls if plugin_of(node) in PLUGINS]
    others = {node.domain for node in calls if plugin_of(node) not in PLUGINS}
    functions = [item for item in graph.functions if not is_reference(item) or item.domain in others]
    for node in known:
        values = {name: value for name, value in node.attrs.items() if name not in FIELDS}
        body = _body(Builder(Names(), opset, node.op), PLUGINS[plugin_of(node)], node.inputs, values)
        node.domain = _settle(body, functions)
    graph.functions = functions
