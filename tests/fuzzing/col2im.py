"""Models for the rules of passes/rules/col2im.py."""

from __future__ import annotations

import math

import numpy as np

from . import Arrays, Case, Sketch, strategy


@strategy("col2im_as_transposed_convolution")
def folds(s: Sketch) -> Case:
    spatial = s.pick(1, 2, 2, 2, 3, 3, 4)
    block = [s.integer(1, 3) for _ in range(spatial)]
    strides = [s.integer(1, 3) for _ in range(spatial)]
    dilations = [s.integer(1, 2) for _ in range(spatial)]
    pads = [s.integer(0, 2) for _ in range(2 * spatial)]
    if s.rarely():
        strides, dilations, pads = block, [1] * spatial, [0] * (2 * spatial)
    image, blocks = [], []
    for i in range(spatial):
        reach = (block[i] - 1) * dilations[i] + 1
        least = max(1, reach - pads[i] - pads[spatial + i])
        image.append(s.integer(least, least + 4))
        blocks.append((image[-1] + pads[i] + pads[spatial + i] - reach) // strides[i] + 1)
    dtype = s.pick("float32", "float32", "float16", "float64", "int32", "int64")
    sizes = [s.integer(1, 3), s.integer(1, 3) * math.prod(block), math.prod(blocks)]
    s.input("x", dtype, sizes)
    attrs = {
        "strides": strides if s.flag() or strides != [1] * spatial else None,
        "dilations": dilations if s.flag() or dilations != [1] * spatial else None,
        "pads": pads if s.flag() or any(pads) else None,
    }
    s.constants |= {"image": np.array(image, np.int64), "block": np.array(block, np.int64)}

    def true(feeds: Arrays) -> list[np.ndarray]:
        """ONNX Runtime 1.31 ignores the dilation of an image of one axis, or of three."""
        x = feeds["x"].reshape([sizes[0], -1, math.prod(block), *blocks])
        ends = [size + pads[i] + pads[spatial + i] for i, size in enumerate(image)]
        padded = np.zeros([*x.shape[:2], *ends], dtype)
        for tap, place in enumerate(np.ndindex(*block)):
            starts = [p * d for p, d in zip(place, dilations, strict=True)]
            steps = zip(starts, blocks, strides, strict=True)
            padded[(..., *(slice(start, start + (n - 1) * step + 1, step) for start, n, step in steps))] += x[:, :, tap]
        return [padded[(..., *(slice(pads[i], pads[i] + size) for i, size in enumerate(image)))]]

    return s.model(
        lambda g, t: g.op.Col2Im(t["x"], t["image"], t["block"], **attrs), opset=s.pick(18, 20), reference=true
    )
