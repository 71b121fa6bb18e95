"""Going through a model piece by piece, each node run once, with few of its tensors in memory at a time.

To see thousands of tensors of a model in sessions of some each, one would run it from its inputs again for each. Here a
piece begins with what earlier ones have left in ONNX Runtime's own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, ValueInfoProto

from .rounded import captured

if TYPE_CHECKING:
    from .evaluator import Evaluator

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Piece = Callable[[int], dict[str, Array]]
"""The tensors of one piece, for a sample by its number."""

KINDS = {
    "float": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "double": TensorProto.DOUBLE,
    "bool": TensorProto.BOOL,
    "string": TensorProto.STRING,
    **{name: getattr(TensorProto, name.upper()) for name in ("int8", "int16", "int32", "int64")},
    **{f"u{name}": getattr(TensorProto, f"U{name.upper()}") for name in ("int8", "int16", "int32", "int64")},
    **{name: getattr(TensorProto, name.upper()) for name in ("float8e4m3fn", "float8e5m2", "int4", "uint4")},
}
"""ONNX's element types, by ONNX Runtime's names."""


@dataclass
class _Part:
    nodes: list[int]
    """By their places in the copy."""
    kept: set[str] = field(default_factory=set)
    """What is kept of the parts so far for those that follow."""
    begun: set[str] = field(default_factory=set)
    """What it reads of earlier parts."""


class Walk:
    """One way through ``model`` for some samples; each piece makes the tensors of one of ``pieces``, in their order."""

    def __init__(
        self, model: Evaluator, pieces: Sequence[Sequence[str]], samples: Sequence[Feeds], *, wide: bool = False
    ) -> None:
        """``wide``: tensors of low types come as float32."""
        self.model, self.samples = model, samples
        self.nodes = list(model.copy.model.graph.node)
        self.fetches = [model.fetches(names, wide=wide) for names in pieces]
        self.parts = self._planned()
        self.held: list[dict[str, Any]] = [{} for _ in samples]
        """Of each sample, what parts that are done have left."""
        self.place = 0

    def next(self) -> Piece:
        """The next piece, to be run once for each sample."""
        part, fetches = self.parts[self.place], self.fetches[self.place]
        self.place += 1
        if not fetches:
            return lambda number: {}
        made = {name for index in part.nodes for name in self.nodes[index].output}
        new = sorted(part.kept & made)
        given = [_info(name, self.held[0][name]) for name in sorted(part.begun)]
        nodes = [self.nodes[index] for index in part.nodes]
        session = self.model.session(self.model.part(nodes, fetches, given, new))
        inputs = [item.name for item in session.get_inputs()]
        outputs = [*(fetch.output for fetch in fetches), *new]

        def run(number: int) -> dict[str, Array]:
            held = self.held[number]
            values = {
                name: held[name] if name in held else _value(array) for name, array in self._given(number).items()
            }
            values.update(held)
            with self.model.running():
                found = session.run_with_ort_values(outputs, {name: values[name] for name in inputs})
            held.update(zip(new, found[len(fetches) :], strict=True))
            for name in held.keys() - part.kept:
                del held[name]
            return {
                fetch.name: fetch.read(value.numpy())
                for fetch, value in zip(fetches, found[: len(fetches)], strict=True)
            }

        return run

    def _given(self, number: int) -> dict[str, Array]:
        return self.model.given(self.samples[number])

    def _planned(self) -> list[_Part]:
        """Which nodes run in which part, and what is handed on between them."""
        reads = [captured([node]) for node in self.nodes]
        maker = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        done: set[int] = set()
        parts, wanted = [], []
        for fetches in self.fetches:
            sources = {fetch.source for fetch in fetches}
            missing, chosen = set(sources), []
            for index in range(len(self.nodes) - 1, -1, -1):
                if index not in done and not missing.isdisjoint(self.nodes[index].output):
                    chosen.append(index)
                    missing |= reads[index]
            begun = {name for name in missing if maker.get(name) in done}
            parts.append(_Part(chosen[::-1], begun=begun))
            wanted.append(missing)
            done.update(index for index in chosen if self.model.untyped.isdisjoint(self.nodes[index].output))
            parts[-1].kept = {name for name in maker if maker[name] in done}
        later: set[str] = set()
        for part, names in zip(reversed(parts), reversed(wanted), strict=True):
            part.kept &= later
            later |= names
        return parts


def _value(array: Array) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _info(name: str, value: Any) -> ValueInfoProto:
    """What ONNX Runtime has to be told of a tensor that it is given."""
    kind = value.data_type().removeprefix("tensor(").removesuffix(")")
    return onnx.helper.make_tensor_value_info(name, KINDS[kind], None)
