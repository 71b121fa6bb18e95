"""What TensorRT's compiler takes as a whole ("ForeignNode"), and how its layers are made to keep to their precisions.

The builder is offered each such subgraph with inputs and outputs in float32 and, where 16 bits are allowed, with ones
in these, and takes the faster. Measured of TensorRT 8.5.3: the first computes each layer in the precision that it was
given, and those without one in float32; the second computes everything in 16 bits, whatever was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .network_layers import LOW_FLOATS

_FOREIGN = re.compile(r"ForeignNode\[(?P<first>.*?)\.\.\.(?P<last>.*)\]")


def ends(name: str) -> tuple[str, str] | None:
    """The first and the last of the layers that a subgraph was made of; None for the name of anything else."""
    found = _FOREIGN.search(name)
    return (found["first"], found["last"]) if found is not None else None


def is_inside(index: int, span: tuple[str, str], order: Mapping[str, int]) -> bool:
    """Whether the network's layer ``index`` may be one of the subgraph; ``order``: the places of layers by name."""
    first, last = (_place(end, order) for end in span)
    return (first is None or first <= index) and (last is None or index <= last)


def _place(name: str, order: Mapping[str, int]) -> int | None:
    places = [order[part] for part in (name, *name.split(" + ")) if part and part in order]
    return min(places) if places else None


class Selection:
    """Whether the subgraphs of one build are to take and give float32: where a layer is to be in it, of TensorRT 8.

    It may be in any of them: the names of their ends do not tell it, since the compiler sorts layers its own way, and
    constants among them.
    """

    def __init__(self, of_tensorrt_8: bool) -> None:
        self.of_tensorrt_8 = of_tensorrt_8
        self.wide = False
        self.low_alone: set[tuple[str, str]] = set()
        """The subgraphs that are offered in 16 bits alone."""

    def selector(self, trt: Any, network: Any) -> Any:
        """TensorRT's selector of algorithms for it; None where there is nothing to be selected."""
        layers = (network.get_layer(index) for index in range(network.num_layers))
        wide = any(layer.precision_is_set and layer.precision == trt.float32 for layer in layers)
        self.wide = self.of_tensorrt_8 and wide
        if not self.wide:
            return None
        selection = self

        class Selector(trt.IAlgorithmSelector):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IAlgorithmSelector.__init__(self)

            def select_algorithms(self, context: Any, choices: Sequence[Any]) -> list[int]:
                return selection._select(context, choices)

            def report_algorithms(self, contexts: Sequence[Any], choices: Sequence[Any]) -> None:
                """TensorRT demands the method."""

        return Selector()

    def _select(self, context: Any, choices: Sequence[Any]) -> list[int]:
        every = list(range(len(choices)))
        span = ends(context.name)
        if span is None:
            return every
        count = context.num_inputs + context.num_outputs
        found = [index for index in every if not _is_low(choices[index], count)]
        if not found:
            self.low_alone.add(span)
        return found or every

    def missed(self, low: Iterable[tuple[str, str]]) -> bool:
        """Whether any of the subgraphs that came out ``low`` was to be in float32, and is offered so for all one knows.

        TensorRT need not ask for what it knows the timings of.
        """
        return self.wide and not self.low_alone.issuperset(low)


def _is_low(choice: Any, count: int) -> bool:
    """Whether any of the first ``count`` inputs and outputs are in 16 bits."""
    return any(choice.get_algorithm_io_info(index).dtype.name in LOW_FLOATS for index in range(count))
