"""Conv with weights that are computed: ``F.conv2d(image, template)``, as trackers and hypernetworks do."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule


@rule("Conv", when=lambda target: target.of_tensorrt_8)
def conv_with_its_kernel_shape(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT 8.5 takes the size of a kernel from Conv's ``kernel_shape`` where its weights are computed."""
    weight = node.inputs[1]
    if isinstance(weight, gs.Constant) or node.attrs.get("kernel_shape"):
        return None
    return g.node("Conv", node.inputs, {**node.attrs, "kernel_shape": g.static_shape(weight)[2:]})


@conv_with_its_kernel_shape.example
def a_template_that_is_looked_for() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, template: gs.Tensor) -> gs.Tensor:
        made: gs.Tensor = g.op.Conv(x, template, pads=[1, 1, 1, 1])
        return made

    return example({"x": ("float32", ["n", 4, 9, 8]), "template": ("float32", [2, 4, 3, 3])}, build)


@conv_with_its_kernel_shape.example
def sequences_with_their_own_filters() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, filters: gs.Tensor) -> gs.Tensor:
        made: gs.Tensor = g.op.Conv(x, g.op.Mul(filters, g.constant(2, np.float32)), group=4)
        return made

    return example({"x": ("float32", ["n", 4, 9]), "filters": ("float32", [4, 1, 3])}, build)
