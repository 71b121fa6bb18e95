"""``bridge.explain``: which nodes of a model a target refuses, in its own words, and what would help."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .advice import Advice, advise
from .asking import Asker, Found, everywhere
from .errors import ExportError, RewriteError, UsageError
from .inputs import Case, Profile, known_profiles, make_profiles
from .result import Decline, Rewrite, TargetInfo
from .target import Target, resolve
from .torch_source import class_name

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from passes import Log


@dataclass(frozen=True)
class RefusedNode:
    """One node that the target refuses, where it came from, and what would help."""

    operator: str
    """With its domain, where that is not the standard one."""
    node: str
    words: str
    """The parser's or builder's own."""
    said_by: Literal["parser", "builder", "table"]
    """``table``: the target is not installed, and what is known of it says so."""
    module: str = ""
    source: str = ""
    inside: str = ""
    """The control flow or function that it is in the body of."""
    advice: list[Advice] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return ", ".join(part for part in (self.module, self.source) if part)


@dataclass(frozen=True)
class Explanation:
    """What a target would do with a model, once the passes have done what they can."""

    name: str
    target: TargetInfo
    nodes: int
    """Of the rewritten model, bodies and functions included."""
    refused: list[RefusedNode]
    whole: str
    """Why the model is refused as a whole, where no node is named; empty else."""
    asked: str
    """Who was asked: the parser, the parser and the builder, or a table."""
    rewrites: list[Rewrite]
    declined: list[Decline]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return not self.refused and not self.whole

    @property
    def verdict(self) -> str:
        if self.refused:
            verb = "is" if len(self.refused) == 1 else "are"
            return f"{len(self.refused)} of {_count(self.nodes)} {verb} refused"
        if self.whole:
            return f"none of {_count(self.nodes)} is refused by name, and the model is refused as a whole"
        taken = f"all {_count(self.nodes)} are taken" if self.nodes != 1 else "the only node is taken"
        return taken if self.target.installed else f"{taken}, as far as the table of its operators tells"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the verdict among them."""
        return {"verdict": self.verdict, "ok": self.ok, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        version = f"{self.target.flavour} {self.target.version}"
        lines = [f"{self.name} for {version}: {self.verdict}", f"asked: {self.asked}", _rewritten(self.rewrites)]
        lines += [f"note: {note}" for note in self.notes]
        for group in _alike(self.refused):
            lines += ["", *_told(group)]
        if self.whole:
            lines += ["", "the model as a whole", *_indented("", self.whole)]
        return "\n".join(lines) + "\n"


def explain(
    source: Any,
    inputs: Any = None,
    *,
    target: str | Target = "auto",
    name: str | None = None,
    profiles: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    constants: Mapping[str, Any] | None = None,
    opset: int | None = None,
    build: bool = True,
    build_timeout: float | None = None,
) -> Explanation:
    """Rewrites a model for ``target``, and finds each node that it still refuses.

    The model need not run: what ONNX Runtime lacks is no obstacle. Arguments are those of ``bridge.convert``; an input
    with dynamic axes needs no profile, but without one only the parser is asked. ``build=False`` never asks the
    builder. Raises UsageError for a wrong call, ExportError where a module cannot be exported or a file is no model,
    and RewriteError where a pass breaks.
    """
    from passes import ModelError, PassError, read, rewrite, write

    from .onnx_source import make_constant, pinned_shapes
    from .plugins.loading import needed_plugins
    from .settings import check_constants, source_path

    wanted = target if isinstance(target, Target) else resolve(target)
    path = source_path(source)
    check_constants(path, constants)
    with tempfile.TemporaryDirectory(prefix="bridge-explain-") as place:
        folder = Path(place)
        try:
            if path is None:
                options = (profiles, input_names, output_names, opset)
                file, known, notes = _exported(source, inputs, folder, wanted, *options)
                graph = read(file)
            else:
                graph = read(path)
                make_constant(graph, constants or {})
                known, notes = _profiles_of(graph, inputs, profiles)
            log = rewrite(graph, wanted, pinned_shapes(graph, [known]))
        except ModelError as error:
            raise ExportError(str(error)) from error
        except PassError as error:
            raise RewriteError(str(error)) from error
        write(graph, folder / "rewritten.onnx")
        graph = read(folder / "rewritten.onnx")  # whose weights then lie where every question can refer to them
        nodes = {node.name: _seen(node, inside) for node, _, inside in everywhere(graph)}
        asker = Asker(wanted, folder, known, tuple(needed_plugins(graph, wanted)), build, build_timeout)
        found, whole = asker.refused(graph)
        refused = [_described(item, nodes[item.node], log, wanted) for item in found]
    return Explanation(
        name or (path.stem if path is not None else class_name(source)),
        wanted.info,
        len(nodes),
        refused,
        whole,
        asker.asked,
        [Rewrite(rule, log.reasons[rule], len(items), items[:50]) for rule, items in log.nodes.items()],
        [Decline(rule, where, reason) for (rule, _), (where, reason) in log.declined.items()],
        [*notes, *log.notes, *asker.notes],
    )


# --- the model ---------------------------------------------------------------------------------------------------


def _exported(
    source: Any,
    inputs: Any,
    folder: Path,
    target: Target,
    given: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    opset: int | None,
) -> tuple[Path, dict[str, Profile], list[str]]:
    """The module as an ONNX file, by the first exporter that writes one; it is compared with nothing."""
    from . import export, torch_source
    from .tensors import to_numpy

    made = torch_source.make_source(source, inputs, input_names, output_names)
    example = {name: to_numpy(tensor) for name, tensor in made.call.tensors.items()}
    profiles = make_profiles(given, {name: array.shape for name, array in example.items()})
    torch_source.check_static_axes(made, profiles)
    with torch_source.evaluating(made.module):
        made.run(example)  # which finds the names of the outputs
        done = export.export(
            made,
            profiles,
            Case("example", example),
            folder / "exported.onnx",
            exporters=export.EXPORTERS,
            opset=opset or made.opset,
            accept=lambda path, exporter: None,
        )
    return folder / "exported.onnx", profiles, done.notes


def _profiles_of(graph: gs.Graph, inputs: Any, given: Any) -> tuple[dict[str, Profile], list[str]]:
    """A profile of each input whose shape is known: from a given one, an example, or the file itself."""
    from .onnx_source import check_static_axes, given_inputs, input_names

    listed = known_profiles(given, input_names(graph))
    first = {name: value for item in reversed(listed) for name, value in item.items()}
    shapes: dict[str, Sequence[int]] = {name: array.shape for name, array in given_inputs(graph, inputs).items()}
    for tensor in graph.inputs:
        if tensor.name not in shapes and tensor.name in first:
            shapes[tensor.name] = _usual(tensor.name, first[tensor.name])
        static = tensor.shape is not None and all(isinstance(size, int) and size >= 0 for size in tensor.shape)
        if tensor.name not in shapes and static:
            shapes[tensor.name] = tensor.shape
    profiles = make_profiles(given, shapes)
    unknown = [tensor.name for tensor in graph.inputs if tensor.name not in profiles]
    for tensor in graph.inputs:
        if tensor.name in profiles:
            check_static_axes(tensor, profiles[tensor.name])
    if not unknown:
        return profiles, []
    names = ", ".join(unknown)
    return profiles, [f"no profile says how large the dynamic axes are (--shapes), and the builder needs one: {names}"]


def _usual(name: str, profile: Any) -> Sequence[int]:
    try:
        return tuple(int(size) for size in profile[1])
    except (TypeError, ValueError, LookupError) as error:
        raise UsageError(f"profiles: {name!r}: {profile!r} is not three shapes (min, opt, max).") from error


# --- words -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """A node as it was before any was taken out."""

    node: gs.Node
    inside: str
    types: set[str]
    outputs: int


def _seen(node: gs.Node, inside: str) -> _Seen:
    types = {tensor.dtype.name for tensor in (*node.inputs, *node.outputs) if tensor.dtype is not None}
    return _Seen(node, inside, types, len(node.outputs))


def _described(item: Found, seen: _Seen, log: Log, target: Target) -> RefusedNode:
    from passes.provenance import origin

    node, domain = seen.node, seen.node.domain or ""
    where = origin(node)
    declined = [(rule, reason) for (rule, name), (_, reason) in log.declined.items() if name == node.name]
    advice = advise(
        target, node.op, domain, declined=declined, types=seen.types, attributes=node.attrs, outputs=seen.outputs
    )
    operator = f"{domain}::{node.op}" if domain else node.op
    return RefusedNode(operator, item.node, item.words, item.said_by, where.module, where.source, seen.inside, advice)


def _count(nodes: int) -> str:
    return f"{nodes} node" if nodes == 1 else f"{nodes} nodes"


def _rewritten(rewrites: Sequence[Rewrite]) -> str:
    if not rewrites:
        return "rewritten: nothing"
    return "rewritten: " + ", ".join(f"{rewrite.name} {rewrite.count}" for rewrite in rewrites)


def _alike(refused: Sequence[RefusedNode]) -> list[list[RefusedNode]]:
    """Nodes of which the same is to be said, in the order of the first of each kind."""
    groups: dict[tuple[Any, ...], list[RefusedNode]] = {}
    for node in refused:
        groups.setdefault((node.operator, node.words, *node.advice), []).append(node)
    return list(groups.values())


def _told(group: Sequence[RefusedNode]) -> list[str]:
    first = group[0]
    lines = [f"{first.operator}, {_count(len(group))}"]
    for node in group:
        inside = f", inside {node.inside}" if node.inside else ""
        lines.append(f"  {node.node}{inside}" + (f", from {node.origin}" if node.origin else ""))
    lines += _indented("the table: " if first.said_by == "table" else f"the {first.said_by}: ", first.words)
    for item in first.advice:
        lines += _indented("help: ", item.text)
    return lines


def _indented(start: str, text: str) -> list[str]:
    return [("  " + start if index == 0 else "    ") + line for index, line in enumerate(text.splitlines())]
