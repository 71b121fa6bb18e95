"""What a low-precision model computes, with nothing hidden: ONNX Runtime runs a copy in which every value is rounded.

``evaluate`` gives its tensors; ``layer_errors`` says of each layer how far its output is off, and how much of that the
layer itself does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from .errors import RunError, UsageError
from .layers import LayerError, Total
from .pairs import APART, FLOATS, MOST, Pair, Pairs
from .rounded import LOW_TYPES, Rounded, captured, make, plain, rounded
from .walk import Piece, Walk

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Run = Callable[[Feeds], dict[str, Array]]

CHUNK_BYTES = 1 << 30
"""Bytes of tensors that ``layer_errors`` holds at a time."""


def evaluate(model: Path, feeds: Iterable[Feeds], names: Sequence[str] | None = None) -> list[dict[str, Array]]:
    """The tensors ``names`` (by default the outputs) of the model, for each of ``feeds``, in the model's own types.

    Each node is computed in float32 from inputs in its type, and what it makes is rounded to its type, in the bodies of
    If, Loop and Scan too. Inputs of low types may be given in any floating-point type. Raises RunError where ONNX
    Runtime does not run the model, UsageError where ``names`` or ``feeds`` do not fit it.
    """
    run = Evaluator.of(model).open(names)
    return [run(item) for item in feeds]


@dataclass(frozen=True)
class Fetch:
    """How one tensor of the main graph comes out of the copy."""

    name: str
    source: str
    """The copy's tensor with its values."""
    op: str
    """What has to follow that tensor; empty for nothing."""
    kind: int
    """Element type in which it comes."""
    dtype: np.dtype[Any]
    """The type that it has in the model."""
    wide: bool = False
    """Whether it is left as it comes."""

    @property
    def output(self) -> str:
        return f"{self.source}/fetched" if self.op else self.source

    def read(self, value: Any) -> Array:
        with np.errstate(invalid="ignore", over="ignore"):
            array = np.asarray(value)
            return array if self.wide else array.astype(self.dtype, copy=False)


class Evaluator:
    """A model, made ready to be run with whatever tensors of its main graph as outputs."""

    def __init__(self, model: ModelProto, folder: Path, name: str) -> None:
        """``model`` is ``plain``; its external weights lie in ``folder``; ``name`` is what errors call it."""
        self.folder, self.name = folder, name
        self.outputs = [item.name for item in model.graph.output]
        self.input_types = {item.name: item.type.tensor_type.elem_type for item in model.graph.input}
        self.copy: Rounded = rounded(model)
        self.counts = _counts(model.graph)
        """Elements of tensors that have the same shape whatever the inputs are."""
        self.untyped = {name for node in model.graph.node for name in node.output} - self.copy.types.keys()
        """What is no tensor, or of an unknown type."""
        self.made = {output for node in self.copy.model.graph.node for output in node.output}

    @classmethod
    def of(cls, path: Path) -> Evaluator:
        return cls(load(path), path.parent, path.name)

    def open(self, names: Sequence[str] | None = None, *, shapes: bool = False, wide: bool = False) -> Run:
        """A function that runs the model, and returns the tensors ``names`` of the main graph in their types.

        Only the nodes that these need are run. ``shapes``: return the tensors' shapes in their stead, which takes the
        memory of a usual run. ``wide``: low types come as float32. Raises UsageError for a name that is no such tensor.
        """
        fetches = self.fetches(self.outputs if names is None else names, shapes, wide)
        if not fetches:
            return lambda feeds: {}
        sources = [fetch.source for fetch in fetches]
        session = self.session(self.part(needed_nodes(self.copy.model.graph, sources), fetches))
        inputs = [item.name for item in session.get_inputs()]

        def run(feeds: Feeds) -> dict[str, Array]:
            given = self.given(feeds)
            with self.running():
                arrays = session.run([fetch.output for fetch in fetches], {name: given[name] for name in inputs})
            return {fetch.name: fetch.read(value) for fetch, value in zip(fetches, arrays, strict=True)}

        return run

    def fetches(self, names: Sequence[str], shapes: bool = False, wide: bool = False) -> list[Fetch]:
        """How the tensors ``names`` come out of the copy; ``wide``: low types as they are there, in float32.

        Neither types that NumPy lacks go to Python, nor tensors that no node makes.
        """
        wanted = list(dict.fromkeys(names))
        unknown = [name for name in wanted if name not in self.copy.types]
        if unknown:
            raise UsageError(
                f"{self.name}: has no tensor {unknown[0]!r} that could be read; what the bodies of control flow make "
                "is not seen from outside."
            )
        found = []
        for name in wanted:
            kind, dtype = self.copy.types[name], _dtype(self.copy.types[name])
            if shapes:
                found.append(Fetch(name, name, "Shape", TensorProto.INT64, np.dtype(np.int64)))
            elif name in self.copy.wide:
                found.append(Fetch(name, self.copy.wide[name], "", TensorProto.FLOAT, dtype, wide))
            elif dtype.isbuiltin != 1:
                found.append(Fetch(name, name, "Cast", TensorProto.FLOAT, dtype, wide))
            else:
                found.append(Fetch(name, name, "" if name in self.made else "Identity", kind, dtype))
        return found

    def session(self, part: GraphProto) -> Any:
        """An ONNX Runtime session of a part of the copy."""
        import onnxruntime as ort

        ready = ModelProto(ir_version=self.copy.model.ir_version, graph=part)
        ready.opset_import.extend(self.copy.model.opset_import)
        ready.functions.extend(self.copy.model.functions)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        with self.running():
            return ort.InferenceSession(ready.SerializeToString(), options, providers=["CPUExecutionProvider"])

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Raises RunError for what ONNX Runtime raises in the block."""
        try:
            yield
        except refusals() as error:
            raise RunError(f"{self.name} does not run: {_words(error)}") from error

    def part(
        self,
        nodes: Iterable[NodeProto],
        fetches: Sequence[Fetch],
        given: Sequence[ValueInfoProto] = (),
        also: Sequence[str] = (),
    ) -> GraphProto:
        """The graph of some of the copy's nodes; it is ``given`` what others have made, and gives ``also`` these."""
        whole = self.copy.model.graph
        part = GraphProto(name=whole.name)
        part.node.extend(nodes)
        read = captured(part.node) | {fetch.source for fetch in fetches} | set(also)
        part.node.extend(
            make(fetch.op, fetch.source, fetch.output, fetch.kind if fetch.op == "Cast" else None)
            for fetch in fetches
            if fetch.op
        )
        part.output.extend(onnx.helper.make_tensor_value_info(fetch.output, fetch.kind, None) for fetch in fetches)
        fetched = {fetch.output for fetch in fetches}
        part.output.extend(ValueInfoProto(name=name) for name in also if name not in fetched)
        part.input.extend(item for item in whole.input if item.name in read)
        part.input.extend(given)
        part.initializer.extend(item for item in whole.initializer if item.name in read)
        part.sparse_initializer.extend(item for item in whole.sparse_initializer if item.values.name in read)
        return part

    def given(self, feeds: Feeds) -> dict[str, Array]:
        """The inputs by the names, and in the types, that the copy takes."""
        given = {}
        for name in self.copy.inputs:
            if name not in feeds:
                raise UsageError(f"{self.name}: the input {name!r} is not given; given are {', '.join(feeds)}.")
            kind = self.input_types[name]
            wanted = np.dtype(np.float32) if kind in LOW_TYPES else _dtype(kind)
            array = np.asarray(feeds[name])
            if _is_float(array.dtype) != _is_float(wanted):
                raise UsageError(f"{self.name}: the input {name!r} is {wanted}, and {array.dtype} is given.")
            given[self.copy.inputs[name]] = array.astype(wanted, copy=False)
        return given


def load(path: Path) -> ModelProto:
    """The model at ``path``, ``plain``, its external weights left where they are."""
    from passes import ModelError
    from passes.reading import read_proto

    try:
        return plain(read_proto(path))
    except ModelError as error:
        raise RunError(str(error)) from error


def needed_nodes(graph: GraphProto, wanted: Iterable[str]) -> list[NodeProto]:
    """The nodes that the tensors ``wanted`` depend on, in their order."""
    read = set(wanted)
    needed = []
    for node in reversed(graph.node):
        if not read.isdisjoint(node.output):
            needed.append(node)
            read |= captured([node])
    return needed[::-1]


def refusals() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises of a model that it cannot run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.EPFail,
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
        state.RuntimeException,
        MemoryError,
    )


def _words(error: BaseException) -> str:
    from .compare import first_lines

    return first_lines(error)


def _dtype(kind: int) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or "float" in dtype.name


def layer_errors(
    reference: Path, low: Path, samples: Iterable[Feeds], kinds: frozenset[int] = FLOATS
) -> list[LayerError]:
    """The error of each tensor of ``kinds`` that nodes of the main graphs of both models make, in the graph's order.

    Nodes of the two models belong together by what their outputs are called or, where these differ, by their names;
    what stands between them in ``low`` (casts, quantisation) counts with the node that reads it. What happens inside
    of If, Loop and Scan shows in their outputs. Both models are run by the rules of ``evaluate``, as often as it takes
    to hold no more than CHUNK_BYTES of tensors at a time. Raises RunError where a model does not run.
    """
    feeds = list(samples)
    if not feeds:
        raise UsageError("samples: there are none; errors are measured with at least one.")
    pairs = Pairs(load(reference), load(low), kinds)
    exact = Evaluator(pairs.reference.model, reference.parent, reference.name)
    whole = Evaluator(pairs.low.model, low.parent, low.name)
    totals = {pair.tensor: (Total(), Total()) for pair in pairs.found}
    parts = list(pairs.chunks(sizes_of(exact, pairs.tensors, feeds), CHUNK_BYTES))
    for start in range(0, len(feeds), TOGETHER):
        some = feeds[start : start + TOGETHER]
        known = Walk(exact, [pairs.known(chunk) for chunk in parts], some)
        end_to_end = Walk(whole, [[pair.low_tensor for pair in chunk] for chunk in parts], some, wide=True)
        for chunk in parts:
            _measure(pairs, chunk, (reference, low), (known.next(), end_to_end.next()), len(some), totals)
    return [pair.error(*totals[pair.tensor]) for pair in pairs.found]


TOGETHER = 8
"""Samples that go through the model piece by piece together."""


def _measure(
    pairs: Pairs,
    chunk: Sequence[Pair],
    paths: tuple[Path, Path],
    runs: tuple[Piece, Piece],
    count: int,
    totals: Mapping[str, tuple[Total, Total]],
) -> None:
    """Adds the errors of the pairs of ``chunk``, for ``count`` samples, to ``totals``."""
    parts = pairs.parts(chunk)
    alone = [
        Evaluator(model, path.parent, path.name).open(wide=True)
        for model, path in zip((parts.reference, parts.low), paths, strict=True)
    ]
    for sample in range(count):
        values, carried = runs[0](sample), runs[1](sample)
        for pair in chunk:
            totals[pair.tensor][0].add(values[pair.tensor], carried[pair.low_tensor], pair.limit)
        carried.clear()
        for name, dtype in parts.kept_as.items():
            values[name] = _through(values[name], dtype)
        of_reference = alone[0]({name: values[name] for name in parts.read})
        of_low = alone[1]({name: values[tensor] for name, tensor in parts.given.items()})
        for pair in parts.pairs:
            result = of_low[pair.low_tensor + APART]
            totals[pair.tensor][1].add(of_reference[pair.tensor + APART], result, pair.limit)


@np.errstate(over="ignore")
def _through(array: Array, dtype: np.dtype[Any]) -> Array:
    """The values, rounded to a low type."""
    return array.astype(dtype).astype(array.dtype)


def chunks(names: Iterable[str], size: Callable[[str], int], most: int = MOST) -> Iterator[list[str]]:
    """The names in their order, so many at a time that what has these sizes is no more than CHUNK_BYTES."""
    chunk: list[str] = []
    total = 0
    for name in names:
        more = size(name)
        if chunk and (len(chunk) == most or total + more > CHUNK_BYTES):
            yield chunk
            chunk, total = [], 0
        chunk.append(name)
        total += more
    if chunk:
        yield chunk


def sizes_of(model: Evaluator, names: Sequence[str], feeds: Sequence[Feeds]) -> dict[str, int]:
    """Bytes of each tensor in float32, for the largest of the samples; the model is run only where it does not say."""
    sizes = {name: 4 * model.counts[name] for name in names if name in model.counts}
    unknown = [name for name in names if name not in sizes]
    if unknown:
        largest = max(feeds, key=lambda item: sum(np.asarray(array).size for array in item.values()))
        shapes = model.open(unknown, shapes=True)(largest)
        sizes.update({name: 4 * math.prod(map(int, shape)) for name, shape in shapes.items()})
    return sizes


def _counts(graph: GraphProto) -> dict[str, int]:
    """The elements of each tensor whose shape is stated."""
    found = {}
    for info in (*graph.value_info, *graph.input, *graph.output):
        kind = info.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found[info.name] = math.prod(dim.dim_value for dim in kind.shape.dim)
    return found
