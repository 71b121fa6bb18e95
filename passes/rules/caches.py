"""Key-value caches of language models: TensorScatter (opset 24), which writes new steps into a cache of full length."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.rules.shapes import as_tensor, iota, shape_tensor, size


@rule("TensorScatter")
def cache_update_as_scatter(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's TensorScatter, if it has one, takes four axes and no circle; ScatterElements takes any."""
    cache, update, starts = node.inputs[0], node.inputs[1], g.input(node, 2)
    rank = len(g.shape(cache))
    circular = node.attrs.get("mode", "linear") == "circular"
    if g.target is not None and g.target.takes("TensorScatter") and rank == 4 and not circular:
        return None
    axis = int(node.attrs.get("axis", -2)) % rank
    places = iota(g, size(g, update, axis))
    if starts is not None:
        places = g.op.Add(g.unsqueeze(starts, [1]), places)  # [batch, steps]
        if circular:
            places = g.op.Mod(places, as_tensor(g, size(g, cache, axis)))
    others = [other for other in range(0 if starts is None else 1, rank) if other != axis]
    places = g.unsqueeze(places, others) if others else places
    spread = g.op.Expand(places, shape_tensor(g, [size(g, update, other) for other in range(rank)]))
    return g.op.ScatterElements(cache, spread, update, axis=axis)


def _update(cache: list[int | str], update: list[int | str], **attrs: object) -> gs.Graph:
    def build(g: Builder, cache: gs.Tensor, update: gs.Tensor, start: gs.Tensor) -> gs.Tensor:
        made: gs.Tensor = g.op.TensorScatter(cache, update, g.op.Cast(g.op.Abs(start), to=7), **attrs)
        return made

    inputs = {"cache": ("float32", cache), "update": ("float32", update), "start": ("float32", cache[:1])}
    return example(inputs, build, 24)


@cache_update_as_scatter.example
def steps_of_a_cache_with_three_axes() -> gs.Graph:
    return _update(["n", 9, 4], ["n", 2, 4])


@cache_update_as_scatter.example
def steps_around_a_circle() -> gs.Graph:
    return _update(["n", 2, 5, 4], ["n", 2, 3, 4], mode="circular", axis=2)


@cache_update_as_scatter.example
def from_the_beginning() -> gs.Graph:
    return example(
        {"cache": ("float32", ["n", 6, 4]), "update": ("float32", ["n", 3, 4])},
        lambda g, cache, update: g.op.TensorScatter(cache, update, axis=1),
        24,
    )
