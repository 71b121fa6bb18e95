"""ConvTranspose that is strided and dilated at once: ``nn.ConvTranspose1d(..., stride=2, dilation=2)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule


@rule("ConvTranspose")
def conv_transpose_with_zeros_between_the_taps(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT does not dilate a strided ConvTranspose; the kernel with zeros between its taps is the same one."""
    weight = node.inputs[1]
    spatial = len(g.shape(weight)) - 2
    dilations = node.attrs.get("dilations") or [1] * spatial
    strides = node.attrs.get("strides") or [1] * spatial
    if all(item == 1 for item in dilations) or all(item == 1 for item in strides):
        return None
    kernel = g.static_shape(weight)[2:]
    for axis, (taps, dilation) in enumerate(zip(kernel, dilations, strict=True)):
        weight = _spread(g, weight, 2 + axis, taps, dilation)
    reach = [(taps - 1) * dilation + 1 for taps, dilation in zip(kernel, dilations, strict=True)]
    attrs = {**node.attrs, "kernel_shape": reach, "dilations": None}
    return g.node("ConvTranspose", [node.inputs[0], weight, *node.inputs[2:]], attrs)


def _spread(g: Builder, weight: gs.Tensor, axis: int, taps: int, dilation: int) -> gs.Tensor:
    """``weight`` with zeros between the taps along one axis."""
    if dilation == 1 or taps == 1:
        return weight
    shape = g.static_shape(weight)
    apart = g.op.Reshape(weight, [*shape[: axis + 1], 1, *shape[axis + 1 :]])
    pads = [0] * (2 * len(shape) + 2)
    pads[len(shape) + 1 + axis + 1] = dilation - 1
    joined = g.op.Reshape(g.op.Pad(apart, pads), [*shape[:axis], taps * dilation, *shape[axis + 1 :]])
    return g.slice(joined, [0], [(taps - 1) * dilation + 1], [axis], [1])


# --- examples ----------------------------------------------------------------------------------------------------


def _conv_transpose(shape: list[int | str], weight: list[int], bias: bool = False, **attrs: Any) -> gs.Graph:
    values = np.random.default_rng(0).standard_normal(weight).astype(np.float32)
    extra = [np.arange(weight[1] * attrs.get("group", 1), dtype=np.float32)] if bias else []
    return example({"x": ("float32", shape)}, lambda g, x: g.op.ConvTranspose(x, values, *extra, **attrs))


@conv_transpose_with_zeros_between_the_taps.example
def sequences_strided_and_dilated() -> gs.Graph:
    return _conv_transpose(["n", 4, 7], [4, 5, 3], True, strides=[2], dilations=[2], output_padding=[1])


@conv_transpose_with_zeros_between_the_taps.example
def images_strided_and_dilated_in_groups() -> gs.Graph:
    return _conv_transpose(
        ["n", 4, "h", 6],
        [4, 3, 3, 2],
        strides=[1, 2],
        dilations=[2, 3],
        group=2,
        pads=[1, 0, 0, 2],
        kernel_shape=[3, 2],
    )
