"""The values that a model's tensors take on typical inputs: what quantisation scales by, and what has to stay in fp32.

Each tensor is reduced to its lowest and highest value inside the model, where it is made, so that none of them is kept;
those of an If's branches, or of a Loop's or Scan's rounds, come out of the body as further outputs.
"""

from __future__ import annotations

import itertools
import math
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from .compare import first_lines
from .errors import RunError, UsageError
from .inputs import Array
from .rounded import has_bfloat16, plain, rounded

Method = Literal["max", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("max", "entropy", "percentile")
PERCENTILE = 99.99
BINS = 2048
"""Of a histogram of magnitudes."""
STEPS = 128
"""Of int8, for magnitudes."""
STRIDE = 4
"""Bins between two thresholds that entropy compares."""
MOST_CUT = 1e-3
"""Share of the values that entropy may cut off: none of few, and of many what can be called outliers."""
MOST_LOST = 1e-2
"""Share of the squares that entropy may cut off: rare values may be what a product is made of."""
BATCH_BYTES = 256 << 20
"""Bytes of tensors that are taken out of the model at a time for histograms."""
UNKNOWN_DIM = 64
"""What an axis of unknown size counts for in that sum."""
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)

LOW = ("float16", "bfloat16")

Sample = Mapping[str, Array]


@dataclass(frozen=True)
class Range:
    """What one tensor was seen to hold; of the values that are finite."""

    low: float
    high: float
    finite: bool = True
    """Whether none of the values was infinite or NaN."""

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))

    def __or__(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high), self.finite and other.finite)


Ranges = Mapping[str, Range]
"""By the tensor's name; what was never computed, or is no tensor of floating-point numbers, is absent."""


def measure(
    model: Path, samples: Iterable[Sample], method: Method = "max", names: Collection[str] | None = None
) -> dict[str, Range]:
    """The range of each tensor of the ONNX file ``model``, or of those in ``names`` alone, over all ``samples``.

    ``max`` gives what was seen, tensors inside bodies included (a model's inputs too, constants not). ``entropy`` and
    ``percentile`` cut off rare large values, of the tensors outside of bodies; a tensor of a body keeps what was seen.
    Samples are read one after the other, may differ in shape, and come to the types of the model's inputs, which may be
    narrower than the source's; the methods that need histograms read them twice, and keep those of an iterator in files
    meanwhile. Raises UsageError where there are none, and RunError where ONNX
    Runtime does not run the model.
    """
    if method not in METHODS:
        raise UsageError(f"calibration method {method!r}: not one of {', '.join(map(repr, METHODS))}.")
    proto = _typed(onnx.load(str(model), load_external_data=False))
    wanted = None if names is None else set(names)
    if has_bfloat16(proto.graph):  # of which ONNX Runtime's CPU has few kernels
        copy = rounded(plain(proto))
        proto, samples = copy.model, _renamed(samples, copy.inputs)
        for name in copy.inputs:
            proto.graph.value_info.append(helper.make_tensor_value_info(name, copy.types[name], None))
    if method == "max":
        return _seen(proto, model.parent, samples, wanted)
    with tempfile.TemporaryDirectory(prefix="bridge-ranges-") as folder:
        again = _Spool(samples, Path(folder))
        seen = _seen(proto, model.parent, again.first(), wanted)
        return {**seen, **_cut(proto, model.parent, again, seen, method)}


def _typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types of its tensors stated."""
    return model if _is_typed(model.graph) else onnx.shape_inference.infer_shapes(model)


def _is_typed(graph: onnx.GraphProto) -> bool:
    known = {info.name for info in (*graph.input, *graph.output, *graph.value_info)}
    return all(
        all(name in known for name in node.output if name)
        and all(_is_typed(item.g) for item in node.attribute if item.type == onnx.AttributeProto.GRAPH)
        for node in graph.node
    )


# --- what was seen -----------------------------------------------------------------------------------------------


def _seen(model: onnx.ModelProto, folder: Path, samples: Iterable[Sample], wanted: set[str] | None) -> dict[str, Range]:
    observe = _observer(model, folder, wanted)
    doubtful: set[str] = set()
    ranges: dict[str, Range] = {}
    count = 0
    for count, sample in enumerate(samples, 1):  # noqa: B007
        seen = observe(sample)
        doubts = {name for name, _, _, total in seen if not math.isfinite(total)}
        examined: list[tuple[str, float, float, float]] = []
        if doubts:
            if not doubts <= doubtful:
                doubtful |= doubts
                examine = _observer(model, folder, doubtful, careful=True)
            examined = examine(sample)
        again = {item[0] for item in examined}
        plain = [(name, low, high, 0.0) for name, low, high, _ in seen if name not in again]
        for name, low, high, odd in plain + examined:
            if low > high and not odd:
                continue  # no values: a branch not taken, a loop without a round, an empty tensor
            one = Range(low, high, not odd) if low <= high else Range(0.0, 0.0, finite=False)
            ranges[name] = ranges[name] | one if name in ranges else one
    if not count:
        raise UsageError("calibration: holds no inputs.")
    return ranges


def _observer(
    model: onnx.ModelProto, folder: Path, wanted: set[str] | None, *, careful: bool = False
) -> Callable[[Sample], list[tuple[str, float, float, float]]]:
    """From a sample to names with lowest and highest values, and the third number of the probes."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    found = _Probes(wanted, careful).into(probed.graph)
    if not found.names:
        return lambda sample: []
    del probed.graph.output[:]
    for name in found.vectors:
        probed.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(found.names)]))
    run = _session(probed, folder)
    return lambda sample: list(zip(found.names, *(vector.tolist() for vector in run(sample, None)), strict=True))


@dataclass(frozen=True)
class _Found:
    """What a graph was made to observe: the tensors, and the names of three vectors with a number for each."""

    names: list[str] = field(default_factory=list)
    vectors: tuple[str, ...] = ()
    """The lowest values, the highest, and what tells whether all are finite."""


NEUTRAL = (math.inf, -math.inf, 0.0)
"""What stands for a tensor that has not been computed."""
MERGED_BY = ("Min", "Max", "Add")


@dataclass
class _Probes:
    """Adds to a graph, and to the bodies in it, what reduces each tensor to three numbers.

    The third is the sum of magnitudes, which is not finite where a value is not. Where it is, or they are so large that
    their sum overflows, a ``careful`` second look takes the finite values alone, and counts 1 if there are others.
    """

    wanted: set[str] | None
    careful: bool
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def name(self) -> str:
        return f"bridge.ranges/{next(self.numbers)}"

    def into(self, graph: onnx.GraphProto) -> _Found:
        """Changes ``graph``, which keeps its outputs as they are."""
        types = {info.name: info.type.tensor_type.elem_type for info in graph.value_info}
        types |= {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.output)}
        fixed = {tensor.name for tensor in graph.initializer}
        nodes: list[onnx.NodeProto] = []
        found: list[_Found] = []
        for info in graph.input:
            if info.name not in fixed and self._observed(info.name, types):
                found.append(self._reduced(info.name, types[info.name], nodes))
        for node in graph.node:
            inner = self._bodies(node, nodes)
            nodes.append(node)
            found += [inner] if inner.names else []
            found += [self._reduced(name, types[name], nodes) for name in node.output if self._observed(name, types)]
        together = _Found()
        if found:
            columns = zip(*(item.vectors for item in found), strict=True)
            vectors = tuple(self._node("Concat", column, nodes, axis=0) for column in columns)
            together = _Found([name for item in found for name in item.names], vectors)
        del graph.node[:]
        graph.node.extend(nodes)
        return together

    def _observed(self, name: str, types: Mapping[str, int]) -> bool:
        return bool(name) and types.get(name) in FLOATS and (self.wanted is None or name in self.wanted)

    def _node(self, op: str, inputs: Sequence[str], nodes: list[onnx.NodeProto], **attributes: Any) -> str:
        name = self.name()
        nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def _constant(self, values: Any, nodes: list[onnx.NodeProto]) -> str:
        return self._node("Constant", [], nodes, value=onnx.numpy_helper.from_array(np.asarray(values)))

    def _reduced(self, name: str, kind: int, nodes: list[onnx.NodeProto]) -> _Found:
        x = self._node("Reshape", [name, self._constant(np.array([-1]), nodes)], nodes)
        if kind != TensorProto.FLOAT:
            x = self._node("Cast", [x], nodes, to=TensorProto.FLOAT)
        if not self.careful:
            ops = ("ReduceMin", "ReduceMax", "ReduceL1")
            return _Found([name], tuple(self._node(op, [x], nodes, keepdims=1) for op in ops))
        zero = self._constant(np.float32(0), nodes)
        zeros = self._node("Mul", [x, zero], nodes)  # but NaN where x is infinite or NaN
        finite = self._node("Equal", [zeros, zero], nodes)
        reduced = []
        for op, neutral in (("ReduceMin", np.inf), ("ReduceMax", -np.inf)):
            values = self._node("Where", [finite, x, self._constant(np.float32(neutral), nodes)], nodes)
            reduced.append(self._node(op, [values], nodes, keepdims=1))
        clean = self._node("Equal", [self._node("ReduceSum", [zeros], nodes, keepdims=1), zero], nodes)
        odd = self._node("Cast", [self._node("Not", [clean], nodes)], nodes, to=TensorProto.FLOAT)
        return _Found([name], (*reduced, odd))

    # bodies

    def _bodies(self, node: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> _Found:
        """Makes the node give what was observed in its bodies; what it needs for that goes to ``nodes``."""
        graphs = {item.name: item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH}
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("If", "Loop", "Scan"):
            return _Found()
        if node.op_type == "If":
            return self._branches(node, graphs["then_branch"], graphs["else_branch"])
        body = graphs["body"]
        found = self.into(body)
        if not found.names:
            return found
        if node.op_type == "Loop":
            states = len(node.input) - 2
            given, taken, returned, results = len(node.input), len(body.input), states + 1, states
        else:
            scanned = next(item.i for item in node.attribute if item.name == "num_scan_inputs")
            states = len(node.input) - scanned
            given = taken = returned = results = states
        outer: list[str] = []
        for place, op in enumerate(MERGED_BY):
            start = self._constant(np.full(len(found.names), NEUTRAL[place], np.float32), nodes)
            state, out, result = self.name(), self.name(), self.name()
            body.node.append(helper.make_node(op, [state, found.vectors[place]], [out], out))
            _insert(node.input, given + place, start)
            _insert(body.input, taken + place, self._info(state, found))
            _insert(body.output, returned + place, self._info(out, found))
            _insert(node.output, results + place, result)
            outer.append(result)
        return _Found(found.names, tuple(outer))

    def _branches(self, node: onnx.NodeProto, then: onnx.GraphProto, other: onnx.GraphProto) -> _Found:
        sides = [self.into(then), self.into(other)]
        both = _Found([name for side in sides for name in side.names])
        if not both.names:
            return both
        results = []
        for place in range(3):
            for index, (branch, side) in enumerate(zip((then, other), sides, strict=True)):
                nodes: list[onnx.NodeProto] = []
                absent = np.full(len(sides[1 - index].names), NEUTRAL[place], np.float32)
                parts = [side.vectors[place]] if side.names else []
                parts.insert(len(parts) * (1 - index), self._constant(absent, nodes))
                out = self._node("Concat", parts, nodes, axis=0)
                branch.node.extend(nodes)
                branch.output.append(self._info(out, both))
            results.append(self.name())
        node.output.extend(results)
        return _Found(both.names, tuple(results))

    @staticmethod
    def _info(name: str, found: _Found) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(found.names)])


def _insert(items: Any, place: int, item: Any) -> None:
    """Into a repeated field, which has no such method for messages of every protobuf."""
    values = list(items)
    values.insert(place, item)
    del items[:]
    items.extend(values)


# --- running -----------------------------------------------------------------------------------------------------

Run = Callable[[Sample, "list[str] | None"], "list[Array]"]


def _session(model: onnx.ModelProto, folder: Path) -> Run:
    """Runs ``model`` as it is, whose weights may lie in files of ``folder``."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    refusals = (state.NotImplemented, state.InvalidGraph, state.Fail, state.RuntimeException, state.InvalidArgument)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    # Each reduction right after what it reduces, so that what nothing else reads is freed.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights are copies
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except refusals as error:
        raise RunError(f"the model to be calibrated does not run in ONNX Runtime: {first_lines(error)}") from error
    inputs = [item.name for item in session.get_inputs()]
    kinds = {info.name: info.type.tensor_type.elem_type for info in model.graph.input}
    dtypes = {name: helper.tensor_dtype_to_np_dtype(kinds[name]) for name in inputs}

    def run(sample: Sample, outputs: list[str] | None) -> list[Array]:
        missing = [name for name in inputs if name not in sample]
        if missing:
            raise UsageError(f"calibration: a sample lacks the input {', '.join(map(repr, missing))}.")
        try:
            given = {name: sample[name].astype(dtype, copy=False) for name, dtype in dtypes.items()}
            arrays: list[Array] = session.run(outputs, given)
        except refusals as error:
            raise RunError(f"a calibration sample does not run in ONNX Runtime: {first_lines(error)}") from error
        return arrays

    return run


def _renamed(samples: Iterable[Sample], names: Mapping[str, str]) -> Iterator[Sample]:
    """The samples under other names, low types as float32."""
    for sample in samples:
        given = {names[key]: array for key, array in sample.items() if key in names}
        low = {key: array.astype(np.float32) for key, array in given.items() if array.dtype.name in LOW}
        yield {**given, **low}


# --- histograms --------------------------------------------------------------------------------------------------


class _Spool:
    """Samples to be read again and again; those of an iterator are kept in files of ``folder`` the first time."""

    def __init__(self, samples: Iterable[Sample], folder: Path) -> None:
        self.samples, self.folder = samples, folder
        self.passing = iter(samples) is samples
        self.files: list[Path] = []

    def first(self) -> Iterator[Sample]:
        for sample in self.samples:
            if self.passing:
                self.files.append(self.folder / f"{len(self.files)}.pickle")
                self.files[-1].write_bytes(pickle.dumps(dict(sample), pickle.HIGHEST_PROTOCOL))
            yield sample

    def __iter__(self) -> Iterator[Sample]:
        if not self.passing:
            return iter(self.samples)
        return (pickle.loads(file.read_bytes()) for file in self.files)  # written above, by this very process


def _cut(
    model: onnx.ModelProto, folder: Path, samples: Iterable[Sample], seen: Ranges, method: Method
) -> dict[str, Range]:
    """The ranges that ``method`` finds for those tensors of the main graph whose values are all finite."""
    own = {info.name for info in model.graph.input} | {name for node in model.graph.node for name in node.output}
    names = [name for name, found in seen.items() if name in own and found.finite and found.largest > 0]
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    for chunk in _chunks(names, _sizes(model, next(iter(samples)))):
        run = _session(_showing(model, chunk), folder)
        for sample in samples:
            for name, values in zip(chunk, run(sample, None), strict=True):
                shares = np.abs(values).astype(np.float64) / seen[name].largest  # which may be next to nothing
                counts[name] += np.histogram(shares, BINS, (0, 1))[0]
    ranges = {}
    for name in names:
        one = seen[name]
        share = (_entropy(counts[name]) if method == "entropy" else _percentile(counts[name])) / BINS
        ranges[name] = Range(max(one.low, -share * one.largest), min(one.high, share * one.largest))
    return ranges


def _chunks(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in groups whose tensors are in memory together."""
    chunk: list[str] = []
    total = 0
    for name in names:
        if chunk and total + sizes.get(name, 0) > BATCH_BYTES:
            yield chunk
            chunk, total = [], 0
        chunk.append(name)
        total += sizes.get(name, 0)
    if chunk:
        yield chunk


def _sizes(model: onnx.ModelProto, sample: Sample) -> dict[str, int]:
    """Bytes of each tensor at the sample's shapes, as far as they can be told."""
    pinned = onnx.ModelProto()
    pinned.CopyFrom(model)
    del pinned.graph.value_info[:]
    for info in pinned.graph.input:
        if info.name in sample:
            kind = info.type.tensor_type.elem_type
            info.CopyFrom(helper.make_tensor_value_info(info.name, kind, sample[info.name].shape))
    graph = onnx.shape_inference.infer_shapes(pinned, data_prop=True).graph
    return {
        info.name: 4 * math.prod(dim.dim_value or UNKNOWN_DIM for dim in info.type.tensor_type.shape.dim)
        for info in (*graph.input, *graph.value_info, *graph.output)
    }


def _showing(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with the tensors ``names``, in float32, as its outputs."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    for place, name in enumerate(names):
        output = f"bridge.ranges/{place}"
        shown.graph.node.append(helper.make_node("Cast", [name], [output], output, to=TensorProto.FLOAT))
        shown.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return shown


def _percentile(counts: Array) -> int:
    """In how many of the lowest bins PERCENTILE of the values lie."""
    return 1 + int(np.searchsorted(np.cumsum(counts), counts.sum() * PERCENTILE / 100))


def _entropy(counts: Array) -> int:
    """How many of the lowest bins to keep, so that what int8 makes of them tells most about all of them.

    Values above are put into the last bin that is kept; each of STEPS groups of bins becomes its mean. The number is
    that of the smallest Kullback-Leibler divergence (S. Migacz, 8-bit Inference with TensorRT, 2017), of those that cut
    off no more than MOST_CUT, and MOST_LOST: where nearly all that is kept lies in the last bin, there are few values,
    or the few largest are what counts, the divergence is small whatever is lost.
    """
    counts = counts.astype(np.float64)
    squares = float(counts @ _magnitudes(counts) ** 2)
    counts[0] = counts[1]  # zeros are exact at any scale: a ReLU's would outweigh everything
    best, kept = math.inf, len(counts)
    least = 1 + int(np.searchsorted(np.cumsum(counts), counts.sum() * (1 - MOST_CUT)))
    for size in range(STEPS, len(counts) + 1, STRIDE):
        if size < least:
            continue
        given = counts[:size].copy()
        occupied = given > 0
        groups = np.arange(size) * STEPS // size
        full = np.bincount(groups, occupied, STEPS)
        means = np.bincount(groups, given, STEPS) / np.maximum(full, 1)
        given[-1] += counts[size:].sum()
        rounded = means[groups] * occupied
        used = given > 0
        if not used.any() or (rounded[used] == 0).any():
            continue
        p, q = given[used] / given.sum(), rounded[used] / rounded.sum()
        divergence = float(np.sum(p * np.log(p / q)))
        if divergence < best and _cut_squares(counts, size) <= MOST_LOST * squares:
            best, kept = divergence, size
    return kept


def _magnitudes(counts: Array) -> Array:
    return np.arange(len(counts)) + 0.5


def _cut_squares(counts: Array, size: int) -> float:
    """The squares of what is cut off of values beyond the lowest ``size`` bins."""
    return float(counts[size:] @ (_magnitudes(counts)[size:] - size) ** 2)
