"""Normalisations that came after a parser's time: ``nn.LayerNorm``, ``nn.GroupNorm``, ``nn.RMSNorm``.

ONNX defines them through others too, with the variance as a difference of two means, which loses every digit where the
mean is large, and overflows in half precision. Here the mean is taken off first, as torch does it.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.model import Array, numpy_dtype
from passes.rules.shapes import reshape, size


@rule("LayerNormalization", when=lacks("LayerNormalization"))
def layer_norm_as_reductions(node: gs.Node, g: Builder) -> Replacement:
    """Before TensorRT 8.6 there is no LayerNormalization; the mean and the variance are two reductions."""
    x, scale, bias = node.inputs[0], node.inputs[1], g.input(node, 2)
    rank = len(g.shape(x))
    first = int(node.attrs.get("axis", -1)) % rank
    wide = numpy_dtype(node.attrs.get("stash_type", 1))
    normal, mean, deviation = normalised(g, g.cast(x, wide), list(range(first, rank)), epsilon_of(node))
    y = g.op.Mul(g.cast(normal, g.dtype(x)), scale)
    y = y if bias is None else g.op.Add(y, bias)
    results = [y, mean, g.op.Reciprocal(deviation) if len(node.outputs) > 2 else None]
    return results[: len(node.outputs)]


@rule("RMSNormalization", when=lacks("RMSNormalization"))
def rms_norm_as_reduction(node: gs.Node, g: Builder) -> Replacement:
    """Older TensorRTs have no RMSNormalization; the mean of the squares is one reduction."""
    x, scale = node.inputs
    rank = len(g.shape(x))
    first = int(node.attrs.get("axis", -1)) % rank
    wide = g.cast(x, numpy_dtype(node.attrs.get("stash_type", 1)))
    normal, _ = by_root_mean_square(g, wide, list(range(first, rank)), epsilon_of(node))
    return g.op.Mul(g.cast(normal, g.dtype(x)), scale)


@rule("GroupNormalization", when=lacks("GroupNormalization"))
def group_norm_as_reductions(node: gs.Node, g: Builder) -> Replacement:
    """Before TensorRT 8.6 there is no GroupNormalization; each group's mean and variance are two reductions."""
    x, scale, bias = node.inputs
    rank, groups = len(g.shape(x)), int(node.attrs["num_groups"])
    sizes = [size(g, x, axis) for axis in range(rank)]
    grouped = g.op.Reshape(x, g.constant([0, groups, -1]))
    wide = g.cast(grouped, numpy_dtype(node.attrs.get("stash_type", 1)))
    normal = g.cast(normalised(g, wide, [2], epsilon_of(node))[0], g.dtype(x))
    if g.opset < 21:  # a scale and a bias for each group, not for each channel
        normal = g.op.Add(g.op.Mul(normal, g.unsqueeze(scale, [1])), g.unsqueeze(bias, [1]))
        return reshape(g, normal, sizes)
    spread = list(range(1, rank - 1))
    whole = reshape(g, normal, sizes)
    if not spread:
        return g.op.Add(g.op.Mul(whole, scale), bias)
    return g.op.Add(g.op.Mul(whole, g.unsqueeze(scale, spread)), g.unsqueeze(bias, spread))


def epsilon_of(node: gs.Node) -> float:
    return float(node.attrs.get("epsilon", 1e-5))


def normalised(g: Builder, x: gs.Tensor, axes: list[int], epsilon: float) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """``x`` with the mean 0 and the variance 1 over ``axes``; the mean, and the standard deviation."""
    mean = g.reduce("ReduceMean", x, axes, keepdims=True)
    offset = g.op.Sub(x, mean)
    normal, deviation = by_root_mean_square(g, offset, axes, epsilon)
    return normal, mean, deviation


def by_root_mean_square(g: Builder, x: gs.Tensor, axes: list[int], epsilon: float) -> tuple[gs.Tensor, gs.Tensor]:
    """``x`` by the root of the mean of its squares over ``axes``, and that root."""
    square = g.reduce("ReduceMean", g.op.Mul(x, x), axes, keepdims=True)
    root: gs.Tensor = g.op.Sqrt(g.op.Add(square, g.constant(epsilon, g.dtype(x))))
    return g.op.Div(x, root), root


def _scale(*shape: int, dtype: str = "float32") -> Array:
    return np.linspace(0.5, 2, int(np.prod(shape))).reshape(shape).astype(dtype)


@layer_norm_as_reductions.example
def over_the_last_axis() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", "t", 8])},
        lambda g, x: g.op.LayerNormalization(x, g.constant(_scale(8)), g.constant(_scale(8)), epsilon=1e-6),
        17,
    )


@layer_norm_as_reductions.example
def around_a_large_mean_over_two_axes() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        far = g.op.Add(x, g.constant(1e3, np.float32))
        made: gs.Tensor = g.op.LayerNormalization(far, g.constant(_scale(4, 8)), axis=-2)
        return made

    return example({"x": ("float32", ["n", 4, 8])}, build)


@layer_norm_as_reductions.example
def with_mean_and_deviation_in_half_precision() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return list(g.op.LayerNormalization(x, g.constant(_scale(8, dtype="float16")), outputs=3))

    return example({"x": ("float16", ["n", 8])}, build)


@rms_norm_as_reduction.example
def rms_over_the_last_axis() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", "t", 8])}, lambda g, x: g.op.RMSNormalization(x, g.constant(_scale(8)), axis=-1), 23
    )


@group_norm_as_reductions.example
def groups_of_a_dynamic_image() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        y: gs.Tensor = g.op.GroupNormalization(x, g.constant(_scale(6)), g.constant(_scale(6)), num_groups=2)
        y.dtype, y.shape = x.dtype, x.shape  # ONNX infers none
        return y

    return example({"x": ("float32", ["n", 6, "h", 5])}, build, 21)
