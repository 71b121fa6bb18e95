"""What a low-precision model computes, with nothing hidden: ONNX Runtime runs a copy in which every value is rounded.

``evaluate`` gives its tensors; ``layer_errors`` says of each layer how far its output is off, and how much of that the
layer itself does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from .errors import RunError, UsageError
from .layers import LayerError, Total
from .pairs import APART, Pairs
from .rounded import LOW_TYPES, Rounded, captured, make, plain, rounded

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


class Evaluator:
    """A model, made ready to be run with whatever tensors of its main graph as outputs."""

    def __init__(self, model: ModelProto, folder: Path, name: str) -> None:
        """``model`` is ``plain``; its external weights lie in ``folder``; ``name`` is what errors call it."""
        self.folder, self.name = folder, name
        self.outputs = [item.name for item in model.graph.output]
        self.input_types = {item.name: item.type.tensor_type.elem_type for item in model.graph.input}
        self.copy: Rounded = rounded(model)
        self.made = {output for node in self.copy.model.graph.node for output in node.output}

    @classmethod
    def of(cls, path: Path) -> Evaluator:
        return cls(load(path), path.parent, path.name)

    def open(self, names: Sequence[str] | None = None, *, shapes: bool = False) -> Run:
        """A function that runs the model, and returns the tensors ``names`` of the main graph in their types.

        Only the nodes that these need are run. ``shapes``: return the tensors' shapes in their stead, which takes the
        memory of a usual run. Raises UsageError for a name that is no such tensor.
        """
        wanted = list(dict.fromkeys(self.outputs if names is None else names))
        unknown = [name for name in wanted if name not in self.copy.types]
        if unknown:
            raise UsageError(
                f"{self.name}: has no tensor {unknown[0]!r} that could be read; what the bodies of control flow make "
                "is not seen from outside."
            )
        if not wanted:
            return lambda feeds: {}
        kinds = {name: _dtype(self.copy.types[name]) for name in wanted}
        if shapes:
            kinds = dict.fromkeys(wanted, np.dtype(np.int64))
        session, fetched = self._session(wanted, kinds, shapes)
        inputs = [item.name for item in session.get_inputs()]

        def run(feeds: Feeds) -> dict[str, Array]:
            given = {self.copy.inputs[name]: value for name, value in self._given(feeds).items()}
            try:
                arrays = session.run(fetched, {name: value for name, value in given.items() if name in inputs})
            except refusals() as error:
                raise RunError(f"{self.name} does not run: {_words(error)}") from error
            with np.errstate(invalid="ignore", over="ignore"):
                return {
                    name: np.asarray(value).astype(kinds[name], copy=False)
                    for name, value in zip(wanted, arrays, strict=True)
                }

        return run

    def _session(
        self, wanted: Sequence[str], kinds: Mapping[str, np.dtype[Any]], shapes: bool
    ) -> tuple[Any, list[str]]:
        """An ONNX Runtime session, and the names under which it gives the tensors ``wanted``."""
        import onnxruntime as ort

        part, fetched = self._part(wanted, kinds, shapes)
        ready = ModelProto(ir_version=self.copy.model.ir_version, graph=part)
        ready.opset_import.extend(self.copy.model.opset_import)
        ready.functions.extend(self.copy.model.functions)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        try:
            return ort.InferenceSession(ready.SerializeToString(), options, providers=["CPUExecutionProvider"]), fetched
        except refusals() as error:
            raise RunError(f"{self.name} does not run: {_words(error)}") from error

    def _part(
        self, wanted: Sequence[str], kinds: Mapping[str, np.dtype[Any]], shapes: bool
    ) -> tuple[GraphProto, list[str]]:
        """What of the copy makes the tensors ``wanted``, and the names of its outputs."""
        whole, last = self.copy.model.graph, []
        part = GraphProto(name=whole.name)
        fetched, sources = [], []
        for name in wanted:
            # Neither types that NumPy lacks go to Python, nor tensors that no node makes.
            op, kind, source = "Identity", self.copy.types[name], name
            if shapes:
                op, kind = "Shape", TensorProto.INT64
            elif name in self.copy.wide:
                op, kind, source = "", TensorProto.FLOAT, self.copy.wide[name]
            elif kinds[name].isbuiltin != 1:
                op, kind = "Cast", TensorProto.FLOAT
            elif name in self.made:
                op = ""
            sources.append(source)
            fetched.append(f"{source}/fetched" if op else source)
            if op:
                last.append(make(op, source, fetched[-1], kind if op == "Cast" else None))
            part.output.append(onnx.helper.make_tensor_value_info(fetched[-1], kind, None))
        needed = needed_nodes(whole, sources)
        read = captured(needed) | set(sources)
        part.node.extend((*needed, *last))
        part.input.extend(item for item in whole.input if item.name in read)
        part.initializer.extend(item for item in whole.initializer if item.name in read)
        part.sparse_initializer.extend(item for item in whole.sparse_initializer if item.values.name in read)
        return part, fetched

    def _given(self, feeds: Feeds) -> dict[str, Array]:
        """The inputs in the types that the copy takes."""
        given = {}
        for name in self.copy.inputs:
            if name not in feeds:
                raise UsageError(f"{self.name}: the input {name!r} is not given; given are {', '.join(feeds)}.")
            kind = self.input_types[name]
            wanted = np.dtype(np.float32) if kind in LOW_TYPES else _dtype(kind)
            array = np.asarray(feeds[name])
            if _is_float(array.dtype) != _is_float(wanted):
                raise UsageError(f"{self.name}: the input {name!r} is {wanted}, and {array.dtype} is given.")
            given[name] = array.astype(wanted, copy=False)
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


def layer_errors(reference: Path, low: Path, samples: Iterable[Feeds]) -> list[LayerError]:
    """The error of each floating-point tensor that nodes of the main graphs of both models make, in the graph's order.

    Nodes of the two models belong together by their names or, where these differ, by what their outputs are called;
    what stands between them in ``low`` (casts, quantisation) counts with the node that reads it. What happens inside
    of If, Loop and Scan shows in their outputs. Both models are run by the rules of ``evaluate``, as often as it takes
    to hold no more than CHUNK_BYTES of tensors at a time. Raises RunError where a model does not run.
    """
    feeds = list(samples)
    if not feeds:
        raise UsageError("samples: there are none; errors are measured with at least one.")
    pairs = Pairs(load(reference), load(low))
    exact = Evaluator(pairs.reference.model, reference.parent, reference.name)
    whole = Evaluator(pairs.low.model, low.parent, low.name)
    totals = {pair.tensor: (Total(), Total()) for pair in pairs.found}
    for chunk in pairs.chunks(_sizes(exact, pairs.tensors, feeds), CHUNK_BYTES):
        parts = pairs.parts(chunk)
        known = exact.open([*(pair.tensor for pair in chunk), *parts.given.values(), *parts.read])
        end_to_end = whole.open([pair.low_tensor for pair in chunk])
        alone = [
            Evaluator(parts.reference, reference.parent, reference.name).open(),
            Evaluator(parts.low, low.parent, low.name).open(),
        ]
        for item in feeds:
            values, carried = known(item), end_to_end(item)
            for pair in chunk:
                totals[pair.tensor][0].add(values[pair.tensor], carried[pair.low_tensor])
            carried.clear()
            for name, dtype in parts.kept_as.items():
                values[name] = _through(values[name], dtype)
            of_reference = alone[0]({name: values[name] for name in parts.read})
            of_low = alone[1]({name: values[tensor] for name, tensor in parts.given.items()})
            for pair in parts.pairs:
                totals[pair.tensor][1].add(of_reference[pair.tensor + APART], of_low[pair.low_tensor + APART])
    return [pair.error(*totals[pair.tensor]) for pair in pairs.found]


@np.errstate(over="ignore")
def _through(array: Array, dtype: np.dtype[Any]) -> Array:
    """The values, rounded to a low type."""
    return array.astype(dtype).astype(array.dtype)


def _sizes(model: Evaluator, names: Sequence[str], feeds: Sequence[Feeds]) -> dict[str, int]:
    """Bytes of each tensor in float32, for the largest of the samples."""
    largest = max(feeds, key=lambda item: sum(np.asarray(array).size for array in item.values()))
    shapes = model.open(names, shapes=True)(largest)
    return {name: 4 * math.prod(map(int, shape)) for name, shape in shapes.items()}
