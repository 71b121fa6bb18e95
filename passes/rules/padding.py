"""Pads below zero, which cut: ``F.pad(x, (-1, 2))``."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule

INT64 = np.iinfo(np.int64)


@rule("Pad", when=lambda target: target.of_tensorrt_8)
def cut_before_padding(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT 8 takes no pads below zero along with others; a Slice cuts, and the Pad is left with the rest."""
    if len(node.inputs) < 2 or node.attrs.get("mode", "constant") != "constant":
        return None
    x, pads = node.inputs[0], node.inputs[1]
    if not isinstance(pads, gs.Constant) or (np.asarray(pads.values) >= 0).all():
        return None
    axes, rank = g.input(node, 3), len(g.shape(x))
    chosen = list(range(rank)) if axes is None else [int(axis) % rank for axis in g.value(axes).reshape(-1)]
    before, after = g.value(pads).reshape(2, -1)
    cut = [index for index in range(len(chosen)) if before[index] < 0 or after[index] < 0]
    starts = [max(0, -int(before[index])) for index in cut]
    ends = [int(after[index]) if after[index] < 0 else INT64.max for index in cut]
    kept = g.slice(x, starts, ends, [chosen[index] for index in cut], [1] * len(cut))
    left = np.maximum(np.concatenate([before, after]), 0)
    if not left.any():
        return kept
    padded: gs.Tensor = g.op.Pad(kept, left, g.input(node, 2), axes)
    return padded


@cut_before_padding.example
def cut_on_one_side_and_padded_on_the_other() -> gs.Graph:
    return example({"x": ("float32", ["n", 3, 8])}, lambda g, x: g.op.Pad(x, [0, 1, -2, 0, -1, 3], np.float32(1.5)), 17)


@cut_before_padding.example
def chosen_axes_are_cut() -> gs.Graph:
    return example({"x": ("float32", [2, 6, "t"])}, lambda g, x: g.op.Pad(x, [-1, 0, -1, -1], None, [-1, 1]), 18)
