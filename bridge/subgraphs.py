"""What TensorRT's compiler takes as a whole ("ForeignNode"), and how its layers are made to keep to their precisions.

The builder is offered each such subgraph with inputs and outputs in float32 and, where 16 bits are allowed, with ones
in these, and takes the faster. Measured of TensorRT 8.5.3: the first computes each layer in the precision that it was
given, and those without one in float32; the second computes everything in 16 bits, whatever was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


def float32_around_mixed(trt: Any, network: Any) -> Any:
    """A selector of algorithms that has the subgraphs with a layer to be in float32 take and give float32, where they
    are offered so; None where no layer is, or TensorRT has no such selector."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    order: dict[str, int] = {}
    for index, layer in enumerate(layers):
        order.setdefault(layer.name, index)
    wide = [index for index, layer in enumerate(layers) if layer.precision_is_set and layer.precision == trt.float32]
    if not wide or not hasattr(trt, "IAlgorithmSelector"):
        return None

    class Selector(trt.IAlgorithmSelector):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IAlgorithmSelector.__init__(self)

        def select_algorithms(self, context: Any, choices: Sequence[Any]) -> list[int]:
            every = list(range(len(choices)))
            span = ends(context.name)
            if span is None or not any(is_inside(index, span, order) for index in wide):
                return every
            count = context.num_inputs + context.num_outputs
            return [index for index in every if not _is_low(choices[index], count)] or every

        def report_algorithms(self, contexts: Sequence[Any], choices: Sequence[Any]) -> None:
            """TensorRT demands the method."""

    return Selector()


def _is_low(choice: Any, count: int) -> bool:
    """Whether any of the first ``count`` inputs and outputs are in 16 bits."""
    return any(choice.get_algorithm_io_info(index).dtype.name in LOW_FLOATS for index in range(count))
