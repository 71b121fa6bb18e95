"""Models for the rules of passes/rules/roi.py."""

from __future__ import annotations

import numpy as np

from . import Case, Sketch, strategy


@strategy("roi_align_as_matmul")
def regions(s: Sketch) -> Case:
    opset = s.pick(10, 16, 20)
    sizes = [s.integer(1, 3), s.integer(1, 3), s.integer(1, 9), s.integer(1, 9)]
    count = s.integer(1, 4)
    attrs = {
        "output_height": s.integer(1, 4),
        "output_width": s.integer(1, 4),
        "sampling_ratio": s.pick(None, 0, 1, 2, 3),
        "spatial_scale": s.pick(None, 0.5, 2.0),
        "mode": s.pick(None, "avg", "max"),
        "coordinate_transformation_mode": s.pick(None, "half_pixel", "output_half_pixel") if opset >= 16 else None,
    }
    starts = s.random.uniform(-3, 9, (count, 2))  # beyond the image now and then, or of no extent
    extents = s.random.uniform(-1 if s.rarely() else 0, 12, (count, 2))
    s.input("x", "float32", sizes)
    s.operand("rois", np.concatenate([starts, starts + extents], 1).astype(np.float32))
    s.operand("images", np.asarray(s.random.integers(0, sizes[0], count), np.int64))
    return s.model(lambda g, t: g.node("RoiAlign", [t["x"], t["rois"], t["images"]], attrs), opset=opset)


@strategy("max_roi_pool_by_masks")
def pooled_regions(s: Sketch) -> Case:
    sizes = [s.integer(1, 3), s.integer(1, 3), s.integer(1, 9), s.integer(1, 9)]
    count = s.integer(1, 4)
    attrs = {"pooled_shape": [s.integer(1, 4), s.integer(1, 4)], "spatial_scale": s.pick(None, 0.5, 2.0)}
    starts = s.random.integers(-6, 18, (count, 2)) / 2  # halves round, and regions lie beyond the image now and then
    images = s.random.integers(0, sizes[0], (count, 1))
    corners = np.concatenate([images, starts, starts + s.random.integers(0, 24, (count, 2)) / 2], 1)
    s.input("x", "float32", sizes)
    s.operand("rois", corners.astype(np.float32))
    return s.model(lambda g, t: g.node("MaxRoiPool", [t["x"], t["rois"]], attrs), opset=s.pick(13, 20))
