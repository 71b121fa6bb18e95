"""Models for the rules of passes/rules/affine_grid.py."""

from __future__ import annotations

import numpy as np

from . import Case, Sketch, strategy


@strategy("affine_grid_as_sums")
def grids(s: Sketch) -> Case:
    spatial, corners = s.pick(2, 3), s.pick(None, 0, 1)
    low = 2 if corners else 1  # of one pixel with aligned corners, ONNX and torch think differently
    sizes = [s.integer(1, 3), s.integer(1, 3), *(s.integer(low, 6) for _ in range(spatial))]
    s.input("theta", s.pick("float32", "float32", "float64"), [sizes[0], spatial, spatial + 1])
    s.constants["sizes"] = np.array(sizes, np.int64)
    return s.model(lambda g, t: g.op.AffineGrid(t["theta"], t["sizes"], align_corners=corners))
