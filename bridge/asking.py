"""Which nodes of a model a TensorRT refuses: its parser and builder are asked until the answer is complete.

A parser names the nodes that it refuses only until it gives up. So each is taken out, its results become inputs, and
the parser is asked again, until it takes what is left; then the builder likewise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import BuildError
from .inputs import Profile, make_profiles
from .target import Target

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

MOST_QUESTIONS = 200
"""Each asks the parser once; a model that needs more has more kinds of refused nodes than anybody reads."""
SMALL = 256
"""Bytes of a constant whose values may be why a node is refused (axes, K, a scale)."""

Place = tuple["gs.Node", "list[gs.Node]", str]
"""A node; the nodes of the main graph that it is, is inside of, or is called by; and what it is inside of, in words."""


def everywhere(graph: gs.Graph) -> Iterator[Place]:
    """Every node of the model, those of bodies and local functions included."""
    from passes.ir import calls, function_key, is_reference, scopes

    called: dict[tuple[str, str, str], list[gs.Node]] = {}
    for top in graph.nodes:
        for node, inside in _with_bodies(top):
            called.setdefault(calls(node), []).append(top)
            yield node, [top], inside
    for function in graph.functions:
        if is_reference(function):
            continue
        for scope in scopes(function, functions=False):
            for node in scope.nodes:
                yield node, called.get(function_key(function), []), f"the function {function.name}"


def _with_bodies(top: gs.Node, inside: str = "") -> Iterator[tuple[gs.Node, str]]:
    from passes.ir import bodies

    yield top, inside
    for body in bodies(top):
        for node in body.nodes:
            yield from _with_bodies(node, f"{top.op} {top.name}")


@dataclass(frozen=True)
class Found:
    node: str
    words: str
    said_by: Literal["parser", "builder", "table"]


@dataclass
class Asker:
    """Asks the target, in child processes, what it refuses."""

    target: Target
    folder: Path
    profiles: Mapping[str, Profile]
    plugins: tuple[Any, ...]
    build: bool
    timeout: float | None
    notes: list[str] = field(default_factory=list)
    asked: str = ""
    questions: int = 0

    def refused(self, graph: gs.Graph) -> tuple[list[Found], str]:
        """The refused nodes, and why the model is refused where none is named."""
        if not self.target.installed:
            self.asked = f"the table of what {self.target} takes; it is not installed here"
            return _by_table(graph, self.target), ""
        self.asked = f"the parser of {self.target}"
        refusals, words = self._ask(graph)
        found: list[Found] = []
        if refusals or words:
            found, words = self._by_parser(graph, refusals, words)
        while self.build and not words and graph.nodes:
            profiles = {**_static_profiles(graph), **self.profiles}
            unknown = [tensor.name for tensor in graph.inputs if tensor.name not in profiles]
            if unknown:
                self.notes.append(f"the builder was not asked: no profile gives the sizes of {', '.join(unknown)}")
                break
            self.asked = f"the parser and the builder of {self.target}"
            more, words = self._by_builder(graph, profiles)
            if not more:
                break
            found += more
            if not self._take_out(graph, [item.node for item in more]):
                break
        if words and found:
            self.notes.append(f"of what is left once these nodes are taken out, {self.target} says: {words}")
        return found, "" if found else words

    def _by_parser(
        self,
        graph: gs.Graph,
        refusals: Sequence[tuple[str, str]],
        words: str,
        known: Mapping[str, Found] | None = None,
    ) -> tuple[list[Found], str]:
        """Takes out what is refused and asks again, until the rest is taken; what is ``known`` is not told again."""
        found: dict[str, Found] = {}
        while refusals:
            places = {place[0].name: place for place in everywhere(graph)}
            named = {node: said for node, said in refusals if node in places}
            if not named:
                break
            for node, said in list(named.items()):
                named.update((other, said) for other in _alike_nodes(places[node][0], places))
            told = {**(known or {}), **found}
            found.update((node, Found(node, said, "parser")) for node, said in named.items() if node not in told)
            _keep_alive(graph, {id(top): top for node in named for top in places[node][1]}.values())
            for body in _bodies_with([places[node] for node in named]):
                found.update((item.node, item) for item in self._in_body(graph, body, {**told, **found}))
            if not self._take_out(graph, named) or not graph.nodes:
                return list(found.values()), ""
            refusals, words = self._ask(graph)
        return list(found.values()), words or "; ".join(said for _, said in refusals)

    def _take_out(self, graph: gs.Graph, names: Iterable[str]) -> bool:
        """Takes nodes out, and with them those that read what no input can be; False where there is none to take."""
        places = {place[0].name: place for place in everywhere(graph)}
        tops = {id(top): top for name in names if name in places for top in places[name][1]}
        also = _take_out(graph, list(tops.values()))
        if also:
            self.notes.append(f"not asked, since they read a sequence or what has no known type: {', '.join(also)}")
        return bool(tops)

    def _in_body(self, graph: gs.Graph, body: gs.Graph, found: Mapping[str, Found]) -> list[Found]:
        """What else is refused in a body of which a node is: the body is asked as a model of its own."""
        model = _as_model(body.nodes, [*body.inputs], body.outputs, graph)
        if model is None:
            self.notes.append(f"the other nodes of the body {body.name!r} were not asked: the types there are unknown")
            return []
        refusals, words = self._ask(model)
        return self._by_parser(model, refusals, words, found)[0]

    def _by_builder(self, graph: gs.Graph, profiles: Mapping[str, Profile]) -> tuple[list[Found], str]:
        """Which node the builder's error means: one that it names, or one that it refuses by itself."""
        _, words = self._ask(graph, profiles)
        if not words:
            return [], ""
        words = words.removeprefix(f"{self.target}: the builder refuses the model: ")
        nodes = [node for node, _, _ in everywhere(graph)]
        named = [node for node in nodes if re.search(rf"(?<![\w/.]){re.escape(node.name)}(?![\w/.])", words)]
        if len(named) == 1:
            alike = _alike_nodes(named[0], {node.name: (node, [], "") for node in nodes})
            return [Found(name, words, "builder") for name in alike], ""
        found = []
        forms: dict[Any, list[gs.Node]] = {}
        for node in graph.nodes:
            forms.setdefault(_form(node), []).append(node)
        for group in forms.values():
            model = _as_model([group[0]], [], [tensor for tensor in group[0].outputs if tensor.name], graph)
            shapes = _static_profiles(model) if model is not None else {}
            if model is None or any(tensor.name not in shapes for tensor in model.inputs):
                continue
            _, said = self._ask(model, shapes)
            found += [Found(node.name, said, "builder") for node in group] if said else []
        return found, "" if found else words

    def _ask(self, graph: gs.Graph, profiles: Mapping[str, Profile] | None = None) -> tuple[list[tuple[str, str]], str]:
        """(node, words) of each refusal that names a node, or else the words; of the builder too, with ``profiles``."""
        from passes import write

        from .build import build

        self.questions += 1
        if self.questions > MOST_QUESTIONS:
            return [], f"it was asked {MOST_QUESTIONS} times, and not about what is left"
        write(graph, self.folder / "asked.onnx", beside=self.folder)
        try:
            build(
                self.folder / "asked.onnx",
                self.folder / "engine" if profiles is not None else None,
                self.folder / "log",
                target=self.target,
                profiles=[profiles or {}],
                timeout=self.timeout,
                plugins=self.plugins,
            )
        except BuildError as error:
            named = [(refusal.node, refusal.words) for refusal in error.refusals if refusal.node]
            return named, "" if named else str(error)
        return [], ""


def _static_profiles(graph: gs.Graph) -> dict[str, Profile]:
    """Of the inputs without dynamic axes."""
    shapes = {tensor.name: tensor.shape for tensor in graph.inputs if tensor.shape is not None}
    static = {name: shape for name, shape in shapes.items() if all(isinstance(size, int) for size in shape)}
    return make_profiles(None, static)


def known_refusals(graph: gs.Graph, target: Target) -> list[str]:
    """The operators in the graph that the target's parser is known to refuse, without asking it."""
    refused = {item.node for item in _by_table(graph, target)}
    return sorted({node.op for node, _, _ in everywhere(graph) if node.name in refused})


def _by_table(graph: gs.Graph, target: Target) -> list[Found]:
    from passes.ir import calls, function_key

    functions = {function_key(function) for function in graph.functions}
    found = []
    for node, _, _ in everywhere(graph):
        if calls(node) in functions or target.has_plugin(node.op):
            continue
        if node.domain:
            words = f"{target} has no operators of the domain {node.domain!r}, and no plugin {node.op!r}"
        elif not target.takes(node.op):
            words = f"{node.op} is not among the operators of its parser"
        elif target.refuses(node):
            words = f"its parser is known to refuse this form of {node.op}"
        elif _too_new(node, graph, target):
            words = f"the model is of opset {graph.opset}, whose form of {node.op} its parser does not read"
        else:
            continue
        found.append(Found(node.name, words, "table"))
    return found


def _too_new(node: gs.Node, graph: gs.Graph, target: Target) -> bool:
    """Whether the node's form came after the last opset that the target's parser reads."""
    import onnx

    from passes.framework import schema_of

    if target.opset is None or graph.opset <= target.opset or not onnx.defs.has(node.op):
        return False
    return int(schema_of(node.op, graph.opset).since_version) > target.opset


# --- taking a model apart ----------------------------------------------------------------------------------------


def _form(node: gs.Node) -> tuple[Any, ...]:
    """What a parser can see of a node by itself; nodes of one form are refused alike."""
    import numpy as np
    import onnx_graphsurgeon as gs

    from passes.ir import constant_bytes
    from passes.writing import node_proto

    proto = node_proto(node)
    del proto.input[:], proto.output[:]
    proto.ClearField("name")
    inputs = []
    for tensor in node.inputs:
        small = isinstance(tensor, gs.Constant) and constant_bytes(tensor) <= SMALL
        values = np.asarray(tensor.values).tobytes() if small else b""
        inputs.append((str(tensor.dtype), str(tensor.shape), isinstance(tensor, gs.Constant), values))
    return (proto.SerializeToString(deterministic=True), tuple(inputs), len(node.outputs))


def _alike_nodes(node: gs.Node, places: Mapping[str, Place]) -> list[str]:
    """The names of the nodes of the same form."""
    form = _form(node)
    return [name for name, (other, _, _) in places.items() if other.op == node.op and _form(other) == form]


def _keep_alive(graph: gs.Graph, nodes: Iterable[gs.Node]) -> None:
    """Makes outputs of what the nodes read, which nothing else may: what made it is to be asked about as well."""
    outputs = {id(tensor): tensor for tensor in (*graph.outputs, *_variables(nodes)) if tensor.inputs}
    graph.outputs = list(outputs.values())


def _bodies_with(places: Iterable[Place]) -> list[gs.Graph]:
    """The bodies that directly hold one of the nodes."""
    from passes.ir import bodies, scopes

    wanted = {id(node) for node, _, _ in places}
    tops = {id(top): top for _, owners, _ in places for top in owners}
    return [
        scope
        for top in tops.values()
        for body in bodies(top)
        for scope in scopes(body, functions=False)
        if any(id(node) in wanted for node in scope.nodes)
    ]


def _as_model(
    nodes: Sequence[gs.Node], inputs: list[gs.Tensor], outputs: Sequence[gs.Tensor], graph: gs.Graph
) -> gs.Graph | None:
    """A model of these nodes alone; what they read from outside becomes inputs. None where a type is unknown."""
    import onnx_graphsurgeon as gs

    taken = {id(tensor) for tensor in inputs}
    inputs = inputs + [tensor for tensor in _variables(nodes) if id(tensor) not in taken]
    if any(tensor.dtype is None for tensor in inputs):
        return None
    return gs.Graph(
        nodes=list(nodes),
        inputs=inputs,
        outputs=list(outputs),
        name="part",
        opset=graph.opset,
        import_domains=graph.import_domains,
        functions=graph.functions,
    )


def _take_out(graph: gs.Graph, nodes: list[gs.Node]) -> list[str]:
    """Takes nodes out of the main graph: what they make becomes inputs, what they read becomes outputs.

    Nodes that read what cannot be an input (a sequence, or something of unknown type) go too; returns their names.
    """
    from passes.ir import bodies, detach

    gone = {id(node): node for node in nodes}
    waiting = list(nodes)
    while waiting:
        for tensor in waiting.pop().outputs:
            for place in _readers(tensor, graph) if tensor.dtype is None else ():
                if id(place) not in gone:
                    gone[id(place)] = place
                    waiting.append(place)
    made = [tensor for node in gone.values() for tensor in node.outputs if tensor.name]
    _keep_alive(graph, gone.values())
    for node in gone.values():
        for body in bodies(node):
            detach(body)
        node.inputs.clear()
        node.outputs.clear()
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]
    graph.outputs = [tensor for tensor in graph.outputs if tensor.inputs]
    graph.inputs = [tensor for tensor in (*graph.inputs, *made) if tensor.outputs]
    return [node.name for node in gone.values() if not any(node is item for item in nodes)]


def _readers(tensor: gs.Tensor, graph: gs.Graph) -> list[gs.Node]:
    """The nodes of the main graph that read the tensor, in their bodies too."""
    inner = {id(node) for node in tensor.outputs}
    return [top for top in graph.nodes if any(id(node) in inner for node, _ in _with_bodies(top))]


def _variables(nodes: Iterable[gs.Node]) -> list[gs.Variable]:
    """What the nodes and their bodies read of what others make."""
    import onnx_graphsurgeon as gs

    from passes.matches import taken_tensors

    return [tensor for tensor in taken_tensors(nodes) if isinstance(tensor, gs.Variable)]
