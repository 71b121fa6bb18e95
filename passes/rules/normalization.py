"""Normalisations in forms that TensorRT's parsers refuse: of the batch's own statistics, without spatial axes, LRN.

``nn.BatchNorm*d`` that is exported in training mode, ``F.local_response_norm`` over an even number of channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.model import Array

LARGEST_LRN = 15
"""Channels of the widest window of TensorRT's LRN; it has to be odd."""


@rule("BatchNormalization")
def batchnorm_of_the_batch(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's BatchNormalization has no training mode; the batch's mean and variance are two reductions."""
    if not node.attrs.get("training_mode", 0):
        return None
    x, scale, bias, mean, variance = node.inputs
    rank, kept = len(g.shape(x)), g.dtype(x)
    wide = np.dtype(np.float64) if kept == np.float64 else np.dtype(np.float32)
    axes = [axis for axis in range(rank) if axis != 1]
    x = g.cast(x, wide)
    centre = g.reduce("ReduceMean", x, axes, keepdims=True)
    offset = g.op.Sub(x, centre)
    spread = g.reduce("ReduceMean", g.op.Mul(offset, offset), axes, keepdims=True)
    epsilon = g.constant(node.attrs.get("epsilon", 1e-5), wide)
    whitened = g.op.Div(offset, g.op.Sqrt(g.op.Add(spread, epsilon)))
    scale, bias = (_over_channels(g, g.cast(item, wide), rank) for item in (scale, bias))
    y = g.cast(g.op.Add(g.op.Mul(whitened, scale), bias), kept)
    if len(node.outputs) == 1:
        return y
    return [y, _running(node, g, mean, centre, axes), _running(node, g, variance, spread, axes)]


def _over_channels(g: Builder, x: gs.Tensor, rank: int) -> gs.Tensor:
    """[C] as [C, 1, …], to go with a tensor of so many axes whose second one is the channels."""
    return g.unsqueeze(x, list(range(1, rank - 1))) if rank > 2 else x


def _running(node: gs.Node, g: Builder, old: gs.Tensor, new: gs.Tensor, axes: list[int]) -> gs.Tensor:
    """The statistic of all batches so far and this one."""
    kept, wide = g.dtype(old), g.dtype(new)
    momentum = float(node.attrs.get("momentum", 0.9))
    before = g.op.Mul(g.cast(old, wide), g.constant(momentum, wide))
    now = g.op.Mul(g.squeeze(new, axes), g.constant(1 - momentum, wide))
    return g.cast(g.op.Add(before, now), kept)


def _training(shape: list[int | str], dtype: str = "float32", opset: int = 15, **attrs: float) -> gs.Graph:
    channels = int(shape[1])

    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        values = [g.constant(np.linspace(0.5, 2, channels).astype(dtype)) for _ in range(4)]
        return list(g.node("BatchNormalization", [x, *values], {"training_mode": 1, **attrs}, 3))

    return example({"x": (dtype, shape)}, build, opset)


@batchnorm_of_the_batch.example
def batchnorm_in_training_mode() -> gs.Graph:
    return _training(["n", 3, 4, 5])


@batchnorm_of_the_batch.example
def batchnorm_of_vectors_with_its_own_momentum() -> gs.Graph:
    return _training([6, 3], opset=20, momentum=0.7, epsilon=0.01)


@rule("InstanceNormalization")
def instancenorm_without_spatial_axes(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's InstanceNormalization wants three axes; of two, each element is its own mean: the bias is left."""
    x, _, bias = node.inputs
    if x.shape is None or len(x.shape) != 2:
        return None
    return g.op.Expand(g.unsqueeze(bias, [0]), g.op.Shape(x))


def _bias(feeds: Mapping[str, Array]) -> list[Array]:
    """ONNX Runtime wants three axes too."""
    return [np.broadcast_to(feeds["bias"], feeds["x"].shape)]


@instancenorm_without_spatial_axes.example_against(_bias)
def instancenorm_of_vectors() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 3]), "scale": ("float32", [3]), "bias": ("float32", [3])},
        lambda g, *xs: g.op.InstanceNormalization(*xs),
    )


@rule("LRN")
def lrn_by_average_pooling(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's LRN has odd windows of at most 15 channels; the mean of squares over any is an AveragePool."""
    count = int(node.attrs["size"])
    x = node.inputs[0]
    if count % 2 and count <= LARGEST_LRN and len(g.shape(x)) == 4:
        return None
    rows = g.op.Reshape(g.op.Mul(x, x), [0, 0, -1])
    pads = [(count - 1) // 2, 0, count // 2, 0]
    mean = g.op.AveragePool(g.unsqueeze(rows, [1]), kernel_shape=[count, 1], pads=pads, count_include_pad=1)
    mean = g.op.Reshape(g.squeeze(mean, [1]), g.op.Shape(x))
    dtype = g.dtype(x)
    alpha, beta, bias = (
        node.attrs.get(name, value) for name, value in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    base = g.op.Add(g.op.Mul(mean, g.constant(alpha, dtype)), g.constant(bias, dtype))
    return g.op.Div(x, g.op.Pow(base, g.constant(beta, dtype)))


def _four_channels(feeds: Mapping[str, Array]) -> list[Array]:
    """One channel before and two after, as ONNX says; ONNX Runtime has odd windows only."""
    x = feeds["x"]
    padded = np.pad(x * x, ((0, 0), (1, 2), (0, 0), (0, 0)))
    total = sum(padded[:, i : i + x.shape[1]] for i in range(4))
    return [x / (2.0 + 0.1 / 4 * total) ** 0.5]


@lrn_by_average_pooling.example_against(_four_channels)
def lrn_over_an_even_number_of_channels() -> gs.Graph:
    return example({"x": ("float32", ["n", 5, 4, 3])}, lambda g, x: g.op.LRN(x, size=4, alpha=0.1, beta=0.5, bias=2.0))


@lrn_by_average_pooling.example
def lrn_over_many_channels() -> gs.Graph:
    return example({"x": ("float32", ["n", 20, 4, 3])}, lambda g, x: g.op.LRN(x, size=17, alpha=0.1))
