"""InstanceNormalization where TensorRT's parser makes the plugin InstanceNormalization_TRT of it, before TensorRT 10.

That plugin has its scale and bias as fields, so that the parser refuses computed ones; and it takes three to five axes.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, has_plugin, rule
from passes.rules.shapes import product, reshape, size


@rule("InstanceNormalization", when=has_plugin("InstanceNormalization_TRT", "1"))
def instance_normalization_for_the_plugin(node: gs.Node, g: Builder) -> Replacement:
    """The plugin behind InstanceNormalization has constant scales and at most five axes; the rest is done around it."""
    x, scale, bias = node.inputs
    rank = len(g.shape(x))
    constant = isinstance(scale, gs.Constant) and isinstance(bias, gs.Constant)
    if rank < 3 or (constant and rank <= 5):
        return None
    channels, dtype = g.static_dim(x, 1), g.dtype(x)
    one, zero = np.ones(channels, dtype), np.zeros(channels, dtype)
    sizes = [size(g, x, axis) for axis in range(rank)] if rank > 5 else []
    flat = reshape(g, x, [sizes[0], channels, product(g, x, 2, rank)]) if sizes else x
    result = g.op.InstanceNormalization(flat, one, zero, epsilon=node.attrs.get("epsilon", 1e-5))
    places = list(range(1, len(g.shape(flat)) - 1))
    result = g.op.Add(g.op.Mul(result, g.unsqueeze(scale, places)), g.unsqueeze(bias, places))
    return reshape(g, result, sizes) if sizes else result


@instance_normalization_for_the_plugin.example
def scales_that_are_computed() -> gs.Graph:
    """As in networks that transfer style."""
    inputs: dict[str, tuple[str, list[int | str]]] = {"x": ("float32", ["n", 3, 4, 5]), "style": ("float32", [6])}

    def build(g: Builder, x: gs.Tensor, style: gs.Tensor) -> gs.Tensor:
        parts = (g.slice(style, [start], [start + 3], [0], [1]) for start in (0, 3))
        result: gs.Tensor = g.op.InstanceNormalization(x, *parts, epsilon=1e-3)
        return result

    return example(inputs, build)


@instance_normalization_for_the_plugin.example
def four_spatial_axes() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 3, 2, 3, 2, 4])},
        lambda g, x: g.op.InstanceNormalization(x, np.array([1, 2, 3], np.float32), np.array([0, 1, -1], np.float32)),
    )
