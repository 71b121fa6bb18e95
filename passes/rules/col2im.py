"""Col2Im: ``F.fold`` adds overlapping blocks into an image; TensorRT's parsers have no operator for it."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule


@rule("Col2Im", when=lacks("Col2Im"))
def col2im_as_transposed_convolution(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no Col2Im; a transposed convolution with a 0/1 kernel puts and adds the blocks alike."""
    x = node.inputs[0]
    image = [int(item) for item in g.value(node.inputs[1]).reshape(-1)]
    block = [int(item) for item in g.value(node.inputs[2]).reshape(-1)]
    spatial, taps = len(image), math.prod(block)
    strides = node.attrs.get("strides") or [1] * spatial
    dilations = node.attrs.get("dilations") or [1] * spatial
    pads = node.attrs.get("pads") or [0] * (2 * spatial)
    begin, end = pads[:spatial], pads[spatial:]
    channels = g.static_dim(x, 1) // taps
    reach = [(k - 1) * d + 1 for k, d in zip(block, dilations, strict=True)]
    padded = [i + b + e for i, b, e in zip(image, begin, end, strict=True)]
    blocks = [(size - r) // s + 1 for size, r, s in zip(padded, reach, strides, strict=True)]

    if (
        strides == block
        and reach == block
        and not any(pads)
        and [b * k for b, k in zip(blocks, block, strict=True)] == image
    ):
        if spatial > 3:
            g.decline(f"the image has {spatial} axes; its blocks as axes of their own are more than TensorRT's 8")
        y = g.op.Reshape(x, [-1, channels, *block, *blocks])
        order = [axis for i in range(spatial) for axis in (2 + spatial + i, 2 + i)]
        return g.op.Reshape(g.op.Transpose(y, perm=[0, 1, *order]), [-1, channels, *image])

    if g.dtype(x).kind in "iub":
        g.decline(f"blocks that overlap are added by a convolution, and {g.dtype(x)} has none")
    if spatial > 3:
        g.decline(f"the image has {spatial} axes; convolutions have at most 3")
    kernel = np.zeros((taps, 1, *reach), g.dtype(x))
    for tap, place in enumerate(np.ndindex(*block)):
        kernel[tap, 0][tuple(i * d for i, d in zip(place, dilations, strict=True))] = 1  # dilation lies in the zeros
    y = g.op.ConvTranspose(
        g.op.Reshape(x, [-1, taps, *blocks]), g.constant(kernel), kernel_shape=reach, strides=strides
    )  # one image for each channel of each sample
    covered = [(n - 1) * s + r for n, s, r in zip(blocks, strides, reach, strict=True)]
    axes = list(range(2, 2 + spatial))
    missing = [max(b + i - c, 0) for b, i, c in zip(begin, image, covered, strict=True)]
    if any(missing):
        y = g.op.Pad(y, [0] * (2 + spatial) + [0, 0] + missing)
    if any(pads):
        y = g.slice(y, begin, [b + i for b, i in zip(begin, image, strict=True)], axes, [1] * spatial)
    return g.op.Reshape(y, [-1, channels, *image])


def _col2im(
    x: list[int | str], image: list[int], block: list[int], opset: int = 20, dtype: str = "float32", **attrs: list[int]
) -> gs.Graph:
    return example({"x": (dtype, x)}, lambda g, x: g.op.Col2Im(x, g.constant(image), g.constant(block), **attrs), opset)


@col2im_as_transposed_convolution.example
def overlapping_blocks_with_pads() -> gs.Graph:
    return _col2im(["n", 27, 16], [8, 8], [3, 3], strides=[2, 2], pads=[1, 1, 1, 1])


@col2im_as_transposed_convolution.example
def blocks_side_by_side() -> gs.Graph:
    return _col2im(["n", 24, 6], [8, 6], [4, 2], strides=[4, 2])


@col2im_as_transposed_convolution.example
def dilated_blocks_uneven_pads() -> gs.Graph:
    return _col2im([2, 12, 28], [9, 8], [2, 3], dilations=[3, 1], pads=[0, 1, 2, 0], strides=[2, 1], opset=18)


@col2im_as_transposed_convolution.example
def rows_that_no_block_reaches() -> gs.Graph:
    return _col2im([2, 8, 9], [8, 8], [2, 2], strides=[3, 3])


@col2im_as_transposed_convolution.example
def three_axes() -> gs.Graph:
    return _col2im([2, 16, 18], [4, 4, 3], [2, 2, 2], strides=[1, 1, 1], pads=[0] * 6)
