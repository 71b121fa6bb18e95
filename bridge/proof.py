"""Each match of the passes, run before and after on the tensors that really flow through it.

The tensors come from the exported model, run once more with those that a match reads as outputs; what an earlier match
made comes from its own nodes. So every match is judged by itself, whatever the others did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from .compare import compare_stages, first_lines
from .inputs import Array, Case
from .result import Comparison, Proof

if TYPE_CHECKING:
    from passes.matches import Match, Part, Recorder

BATCH_BYTES = 512 << 20
"""Bytes of tensors that are taken out of the exported model at a time."""
UNKNOWN_DIM = 64
"""What a dynamic axis counts for in that sum."""
INLINE_BYTES = 1 << 20
"""A larger constant is given to the nodes as an input, which does not copy it."""
RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
)

BROKEN = "what took its place does not run by itself"

Values = dict[str, Any]
"""By the tensor's name: an array, or what else ONNX Runtime gives (a list, for a sequence)."""


class NotRunnable(Exception):
    """Nodes that neither ONNX Runtime nor onnx's reference evaluator runs, with the reason."""


def prove(recorder: Recorder, exported: Path, rewritten: Path, cases: Sequence[Case]) -> list[Proof]:
    """One Proof for each match, in their order: the worst of what was found at the shapes of ``cases``.

    The files are read, and nothing is written.
    """
    matches = recorder.matches
    if not matches:
        return []
    source = onnx.load(str(exported), load_external_data=False)
    made = onnx.load(str(rewritten), load_external_data=False)
    found: list[list[Proof]] = [[] for _ in matches]
    for case in cases:
        replay = _Replay(source, exported.parent, made, case.feeds, case.name, recorder.renamed)
        for index, proof in enumerate(replay.proofs(matches)):
            found[index].append(proof)
    return [max(proofs, key=_badness) for proofs in found]


def culprit(proofs: Sequence[Proof], passes: Sequence[str] = ()) -> str:
    """What the proofs say of a model that computes something else than before, or does not run; in a sentence.

    ``passes`` names all that changed the model: those without a match to check are told where no match is to blame.
    """
    for proof in proofs:
        if proof.status == "moved":
            return f"the first match that moved its outputs is {proof}"
    broken = next((proof for proof in proofs if proof.reason.startswith(BROKEN)), None)
    if broken is not None:
        return f"no match is seen to move its outputs, but one does not run: {broken}"
    missing = sum(proof.status == "not checked" for proof in proofs)
    words = f"of {len(proofs)} matches, {len(proofs) - missing} were checked, and none of them moved its own outputs"
    words += f"; {missing} could not be checked" if missing else ""
    rest = [name for name in passes if name not in {proof.rule for proof in proofs}]
    return f"{words}; what is not checked by match: {', '.join(rest)}" if rest else words


def _badness(proof: Proof) -> tuple[int, float]:
    return (("proved", "not checked", "moved").index(proof.status), proof.max_abs_error or 0.0)


@dataclass
class _Replay:
    """The matches of one rewrite, run again on one set of inputs."""

    source: onnx.ModelProto
    folder: Path
    rewritten: onnx.ModelProto
    feeds: Mapping[str, Array]
    case: str
    renamed: Mapping[str, str]
    made: Values = field(default_factory=dict)
    """Tensors that matches made and later ones read."""

    def __post_init__(self) -> None:
        graph = self.source.graph
        self.available = {name for node in graph.node for name in node.output if name} | set(self.feeds)
        self.available |= set(self.renamed)
        imports = (*self.rewritten.opset_import, *self.source.opset_import)
        self.domains = {item.domain: item.version for item in imports if item.domain not in ("", "ai.onnx")}

    def proofs(self, matches: Sequence[Match]) -> Iterator[Proof]:
        last = {name: index for index, match in enumerate(matches) for name in _needs(match)}
        for start, end in self._batches(matches):
            wanted = {name for match in matches[start:end] for name in _needs(match) if name in self.available}
            values: Values = {}
            refusal = ""
            try:
                values = self._values(wanted)
            except NotRunnable as error:
                refusal = f"the exported model does not run with the tensors inside of it as outputs: {error}"
            for index in range(start, end):
                match = matches[index]
                if refusal:
                    yield _unchecked(match, refusal)
                    continue
                later = {name for name in match.after.made if last.get(name, -1) > index}
                yield self._proof(match, {**self.made, **values}, later - self.available)
                self.made = {name: value for name, value in self.made.items() if last[name] > index}

    def _values(self, wanted: set[str]) -> Values:
        """Tensors of the exported model, under the names that they have after the passes."""
        source = {name: self.renamed.get(name, name) for name in wanted}
        inner = sorted(set(source.values()) - set(self.feeds))
        values = {**self.feeds, **_run_whole(self.source, self.folder, self.feeds, inner)}
        return {**values, **{name: values[old] for name, old in source.items()}}

    def _batches(self, matches: Sequence[Match]) -> Iterator[tuple[int, int]]:
        """Ranges of matches whose tensors are in memory together."""
        start, total = 0, 0
        seen: set[str] = set()
        for index, match in enumerate(matches):
            new = {name for name in _needs(match) if name in self.available and name not in seen}
            more = sum(_bytes(match, name) for name in new)
            if start < index and total + more > BATCH_BYTES:
                yield start, index
                start, total, seen = index, 0, set()
            seen |= new
            total += more
        yield start, len(matches)

    def _proof(self, match: Match, values: Values, later: set[str]) -> Proof:
        reason = _why_not(match, values)
        if reason:
            return _unchecked(match, reason)
        given = {name: _fitted(values[name], match, name) for name in _needs(match)}
        inner, outer = list(self.source.functions), list(self.rewritten.functions)
        before_wanted, after_wanted = set(match.outputs) & match.before.made, set(match.outputs.values()) | later
        try:
            before = {**given, **_evaluate(match.before, given, before_wanted, [*inner, *outer], self.domains)}
        except NotRunnable as error:
            return _unchecked(match, f"what was there does not run by itself: {error}")
        try:
            made = _evaluate(match.after, given, after_wanted & match.after.made, [*outer, *inner], self.domains)
        except NotRunnable as error:
            return _unchecked(match, f"{BROKEN}: {error}")
        constants = {name: match.after.constants[name].values for name in after_wanted & set(match.after.constants)}
        after = {**given, **constants, **made}
        self.made.update({name: after[name] for name in later})
        before.update({old: values[old] for old in match.outputs if old not in match.before.made})
        pairs = {old: (before[old], after[new]) for old, new in match.outputs.items()}
        return _judge(match, pairs, self.case)


def _needs(match: Match) -> set[str]:
    """The tensors that have to be known to run the match."""
    outer = {old for old in match.outputs if old not in match.before.made}  # of a fold, the tensor itself
    return {*match.before.reads, *match.after.reads, *outer}


def _why_not(match: Match, values: Values) -> str:
    for node in (*match.before.nodes, *match.after.nodes):
        if node.op_type in RANDOM:
            return f"{node.op_type} draws other numbers each time"
    if match.inside.startswith("the local function"):
        return f"inside {match.inside}, which may be called from many places"
    missing = sorted(name for name in _needs(match) if name not in values)
    if missing and match.inside:
        return f"inside the body of {match.inside}: {missing[0]!r} exists only while that runs"
    if missing:
        return f"the value of {missing[0]!r} is not known: what made it could not be run"
    return ""


def _bytes(match: Match, name: str) -> int:
    kind = match.before.types.get(name) or match.after.types.get(name)
    if kind is None or kind.WhichOneof("value") != "tensor_type":
        return UNKNOWN_DIM
    sizes = [dim.dim_value or UNKNOWN_DIM for dim in kind.tensor_type.shape.dim]
    return 4 * math.prod(sizes)


def _fitted(value: Any, match: Match, name: str) -> Any:
    """The value in the type that the match has there: the passes may have narrowed it."""
    kind = match.before.types.get(name) or match.after.types.get(name)
    if not isinstance(value, np.ndarray) or kind is None or not kind.tensor_type.elem_type:
        return value
    return value.astype(onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type), copy=False)


def _unchecked(match: Match, reason: str) -> Proof:
    return Proof(match.rule, match.where, "not checked", reason)


def _judge(match: Match, pairs: Mapping[str, tuple[Any, Any]], case: str) -> Proof:
    arrays = {name: (a, b) for name, (a, b) in pairs.items() if _numeric(a) and _numeric(b)}
    if not arrays:
        return _unchecked(match, "its outputs are no tensors of numbers" if pairs else "nothing reads its outputs")
    stages = ("before", "after")
    before, after = ({name: pair[side] for name, pair in arrays.items()} for side in (0, 1))
    comparisons = compare_stages(stages, [case], [before], [after], None)
    worst = max(comparisons, key=_distance)
    reason = "" if worst.agreed else worst.note or _words(worst)
    return Proof(
        match.rule,
        match.where,
        "proved" if worst.agreed else "moved",
        reason,
        worst.max_abs_error,
        worst.output,
        case,
    )


def _words(worst: Comparison) -> str:
    if worst.max_abs_error is None or (worst.reference_nan, worst.reference_inf) != (
        worst.candidate_nan,
        worst.candidate_inf,
    ):
        return f"output {worst.output!r} is not finite in the same places, at the {worst.inputs} shapes"
    return f"output {worst.output!r} is off by {worst.max_abs_error:.3g} at most, at the {worst.inputs} shapes"


def _distance(item: Comparison) -> tuple[bool, float, float]:
    error = item.max_abs_error if item.max_abs_error is not None else math.inf
    return (not item.agreed, error if not item.agreed else item.tolerance_used or 0.0, item.max_abs_error or 0.0)


def _numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind not in "OUSc"


# --- running -----------------------------------------------------------------------------------------------------


def _run_whole(model: onnx.ModelProto, folder: Path, feeds: Mapping[str, Array], wanted: list[str]) -> Values:
    """Tensors inside of a model whose weights may lie in files of ``folder``."""
    if not wanted:
        return {}
    opened = onnx.ModelProto()
    opened.CopyFrom(model)  # without its external weights
    types = {info.name: info.type for info in (*opened.graph.value_info, *opened.graph.output)}
    del opened.graph.output[:]
    return _run(opened, dict(feeds), wanted, types, folder, threads=0)


def _evaluate(
    part: Part,
    given: Values,
    wanted: set[str],
    functions: Sequence[onnx.FunctionProto],
    domains: Mapping[str, int],
) -> Values:
    """The tensors ``wanted`` of those that ``part`` makes. Raises NotRunnable."""
    if not wanted:
        return {}
    from passes.ir import constant_bytes, tensor_proto

    values = {name: given[name] for name in part.reads}
    graph = onnx.GraphProto(name="part", node=part.nodes)
    for name, constant in part.constants.items():
        if constant_bytes(constant) > INLINE_BYTES and np.dtype(constant.dtype).isbuiltin == 1:
            values[name] = np.asarray(constant.values)
        else:
            graph.initializer.append(tensor_proto(constant))
    for name, value in list(values.items()):
        if isinstance(value, np.ndarray) and value.dtype.isbuiltin != 1:  # what Python cannot give to ONNX Runtime
            graph.initializer.append(onnx.numpy_helper.from_array(values.pop(name), name))
        elif isinstance(value, np.ndarray):
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
        else:
            graph.input.append(onnx.ValueInfoProto(name=name, type=part.types[name]))
    model = onnx.ModelProto(graph=graph, ir_version=_ir_version(part.opset))
    used = _called(part.nodes, functions)
    model.functions.extend(used)
    imports = {"": part.opset, **{item.domain: item.version for f in used for item in f.opset_import if item.domain}}
    for domain in {node.domain for node in _nodes(part.nodes)} | {function.domain for function in used}:
        imports.setdefault(domain, domains.get(domain, 1))
    model.opset_import.extend(onnx.helper.make_opsetid(*item) for item in imports.items())
    return _run(model, values, sorted(wanted), part.types, None, threads=1)


def _ir_version(opset: int) -> int:
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)], ignore_unknown=True)
    return max(10, needed)


def _nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)


def _called(nodes: Sequence[onnx.NodeProto], functions: Sequence[onnx.FunctionProto]) -> list[onnx.FunctionProto]:
    """The functions that ``nodes`` call, directly or not; of two with the same key, the one that comes first."""
    known: dict[tuple[str, str, str], onnx.FunctionProto] = {}
    for function in functions:
        known.setdefault((function.domain, function.name, function.overload), function)
    found: dict[tuple[str, str, str], onnx.FunctionProto] = {}
    waiting = list(_nodes(nodes))
    while waiting:
        node = waiting.pop()
        key = (node.domain, node.op_type, node.overload)
        if key in known and key not in found:
            found[key] = known[key]
            waiting.extend(_nodes(known[key].node))
    return list(found.values())


def _run(
    model: onnx.ModelProto,
    feeds: Values,
    wanted: list[str],
    types: Mapping[str, onnx.TypeProto],
    folder: Path | None,
    *,
    threads: int,
) -> Values:
    """Runs ``model``, which has no outputs yet, in ONNX Runtime or, where that refuses, in onnx's evaluator.

    ``threads`` is 0 for as many as there are cores.
    """
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if any(isinstance(value, np.ndarray) and value.dtype.isbuiltin != 1 for value in feeds.values()):
        return _run_slowly(model, feeds, wanted, folder, "ONNX Runtime takes no such type from Python")
    exotic = {name: _exotic(types[name]) for name in wanted if name in types}
    kinds = {name: dtype for name, dtype in exotic.items() if dtype is not None}
    for name in wanted:
        output = f"{name}/wide" if name in kinds else name
        if name in kinds:
            model.graph.node.add(op_type="Cast", input=[name], output=[output]).attribute.append(
                onnx.helper.make_attribute("to", onnx.TensorProto.FLOAT)
            )
        model.graph.output.add(name=output)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    refusals = (state.NotImplemented, state.InvalidGraph, state.Fail, state.RuntimeException, state.InvalidArgument)
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        arrays = session.run(None, feeds)
    except refusals as error:
        return _run_slowly(model, feeds, wanted, folder, first_lines(error))
    return {
        name: array.astype(kinds[name]) if name in kinds else array for name, array in zip(wanted, arrays, strict=True)
    }


def _exotic(kind: onnx.TypeProto) -> np.dtype[Any] | None:
    """The dtype, if it is one of those that NumPy itself does not have."""
    if not kind.tensor_type.elem_type or kind.tensor_type.elem_type == onnx.TensorProto.STRING:
        return None
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))
    return None if dtype.isbuiltin == 1 else dtype


def _run_slowly(model: onnx.ModelProto, feeds: Values, wanted: list[str], folder: Path | None, refusal: str) -> Values:
    from onnx.reference import ReferenceEvaluator

    del model.graph.output[:]
    for name in wanted:
        model.graph.output.add(name=name)
    try:
        if folder is not None:
            onnx.load_external_data_for_model(model, str(folder))
        arrays = ReferenceEvaluator(model).run(wanted, feeds)
    except Exception as error:  # its kernels are Python, and raise whatever NumPy does
        raise NotRunnable(f"{refusal}; onnx's evaluator: {type(error).__name__}: {first_lines(error)}") from error
    return dict(zip(wanted, map(_array, arrays), strict=True))


def _array(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, np.generic) else value
