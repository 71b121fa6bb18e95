"""Where a node came from: the path of its torch module and the line of the user's code.

``torch.onnx.export(dynamo=True)`` writes both into ``metadata_props``; the older exporter leaves the module path in the
node's name (``/encoder/layers.3/attn/MatMul``).
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import PurePath

import onnx_graphsurgeon as gs

from .ir import node_metadata

SCOPES = "pkg.torch.onnx.name_scopes"
STACK = "pkg.torch.onnx.stack_trace"
REPLACED = "bridge.replaced"
"""Of a node that a pass made, operator and name of the exported model's node that it stands for."""
WRAPPED = "bridge_module"
"""Name under which the exporter's wrapper holds the user's module: taken off the front of module paths."""

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_LIBRARIES = re.compile(r"[/\\](?:site|dist)-packages[/\\]|^<")
_WRAPPER = re.compile(r"[/\\]bridge[/\\]export\.py$")


@dataclass(frozen=True)
class Origin:
    """A place in the user's code. Either part may be unknown, and is then empty."""

    module: str = ""
    """Such as ``encoder.layers.3.attn``."""
    source: str = ""
    """File and line, such as ``/home/me/model.py:42``."""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.module, self.source) if part)


def origin(node: gs.Node) -> Origin:
    return origin_of(node.name or "", node_metadata(node))


def origin_of(name: str, metadata: dict[str, str]) -> Origin:
    """The origin of a node of this name with this ``metadata_props``."""
    return Origin(_module(name, metadata), _source(metadata.get(STACK, "")))


def _module(name: str, metadata: dict[str, str]) -> str:
    if SCOPES in metadata:
        try:
            scopes = ast.literal_eval(metadata[SCOPES])
        except (ValueError, SyntaxError):  # some other tool wrote it
            return ""
        paths = [str(scope) for scope in scopes[:-1]] if isinstance(scopes, (list, tuple)) else []
        return _unwrap(paths[-1]) if paths else ""
    if name.startswith("/"):
        return _unwrap(".".join(name.split("/")[1:-1]))
    return ""


def _unwrap(path: str) -> str:
    first, _, rest = path.partition(".")
    return rest if first == WRAPPED else path


def _source(stack: str) -> str:
    """The innermost frame of the trace that is the user's own: neither torch's nor another library's."""
    frames = [(match["file"], match["line"]) for match in _FRAME.finditer(stack)]
    frames = [frame for frame in frames if not _WRAPPER.search(frame[0])]
    own = [frame for frame in frames if not _LIBRARIES.search(frame[0])] or frames[-1:]
    return f"{PurePath(own[-1][0])}:{own[-1][1]}" if own else ""


def inherited(node: gs.Node, made_by: str) -> dict[str, str]:
    """The metadata of what the pass called ``made_by`` puts into the node's place."""
    return {REPLACED: f"{node.op} {node.name}", **node_metadata(node), "bridge.rule": made_by}


def replaced(node: gs.Node) -> tuple[str, str]:
    """Operator and name of the exported model's node that this one was made for; empty where it is that node itself."""
    operator, _, name = node_metadata(node).get(REPLACED, "").partition(" ")
    return operator, name


def describe(node: gs.Node) -> str:
    """The node as a person finds it: operator, name, origin."""
    where = str(origin(node))
    return f"{node.op} {node.name}" + (f" ({where})" if where else "")
