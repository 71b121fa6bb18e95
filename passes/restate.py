"""Plugins' reference bodies, written anew where the model comes to another opset."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from .framework import Builder, Declined
from .ir import Names, calls, function_key, is_plugin_call, is_reference, scopes
from .plugins import FIELDS, PLUGINS, PluginMisfit, _body, _settle, plugin_of

Bodies = dict[int, tuple[gs.Node, gs.Function]]
"""By the id of a node that calls a plugin: the node, and its reference body."""


def restated(graph: gs.Graph, opset: int) -> Bodies:
    """Bodies of this opset for the calls whose plugin is known and can write one."""
    found: Bodies = {}
    for scope in scopes(graph):
        for node in filter(is_plugin_call, scope.nodes):
            plugin = PLUGINS.get(plugin_of(node))
            if plugin is None:
                continue
            values = {name: value for name, value in node.attrs.items() if name not in FIELDS}
            try:
                found[id(node)] = node, _body(Builder(Names(), opset, node.op), plugin, node.inputs, values)
            except (Declined, PluginMisfit):
                continue  # it is written with newer operators
    return found


def not_restated(graph: gs.Graph, bodies: Bodies) -> list[gs.Function]:
    """The reference bodies of the other calls, which are lowered as the model itself is."""
    others = {
        calls(node)
        for scope in scopes(graph)
        for node in scope.nodes
        if is_plugin_call(node) and id(node) not in bodies
    }
    return [item for item in graph.functions if is_reference(item) and function_key(item) in others]


def restate(graph: gs.Graph, bodies: Bodies) -> None:
    """Gives each call its body of ``bodies``: a function's operators are of the model's opset."""
    kept = {id(item) for item in not_restated(graph, bodies)}
    functions = [item for item in graph.functions if not is_reference(item) or id(item) in kept]
    for node, body in bodies.values():
        node.domain = _settle(body, functions)
    graph.functions = functions
