"""Models for the rules of passes/rules/normalization.py."""

from __future__ import annotations

import numpy as np

from . import Arrays, Case, Sketch, strategy


@strategy("batchnorm_of_the_batch")
def batchnorms(s: Sketch) -> Case:
    sizes = [s.integer(2, 5), *s.sizes(1, 4)]  # of one sample, the variance is rounding
    attrs = {"training_mode": 1, "epsilon": s.pick(None, 0.1), "momentum": s.pick(None, 0.0, 0.3)}
    dtype = s.pick("float32", "float32", "float64")
    s.input("x", dtype, sizes)
    names = ("scale", "bias", "mean", "variance")
    for name in names:
        s.operand(name, s.values(dtype, sizes[1:2]))
    return s.model(
        lambda g, t: list(g.node("BatchNormalization", [t["x"], *(t[n] for n in names)], attrs, 3)), opset=15
    )


@strategy("instancenorm_without_spatial_axes")
def instancenorms(s: Sketch) -> Case:
    sizes = s.sizes(2, 3)
    s.input("x", "float32", sizes)
    for name in ("scale", "bias"):
        s.operand(name, s.values("float32", sizes[1:2]))
    return s.model(lambda g, t: g.op.InstanceNormalization(t["x"], t["scale"], t["bias"]), opset=s.pick(13, 20))


@strategy("lrn_by_average_pooling")
def lrns(s: Sketch) -> Case:
    count = s.integer(1, 20)
    attrs = {"size": count, "alpha": s.pick(None, 0.3), "beta": s.pick(None, 0.5), "bias": s.pick(None, 2.0)}
    sizes = [*s.sizes(1, 1), s.integer(1, 24), *s.sizes(1, 3)]
    s.input("x", "float32", sizes)

    def reference(feeds: Arrays) -> list[np.ndarray]:
        """The windows reach one channel further on than back, where they are even; ONNX Runtime has odd ones only."""
        x = feeds["x"].astype(np.float64)
        around = [(0, 0)] * x.ndim
        around[1] = ((count - 1) // 2, count // 2)
        squares = np.pad(x * x, around)
        total = sum(squares[:, i : i + x.shape[1]] for i in range(count))
        scaled = (attrs["bias"] or 1.0) + (attrs["alpha"] or 1e-4) / count * total
        return [(x / scaled ** (attrs["beta"] or 0.75)).astype(np.float32)]

    return s.model(lambda g, t: g.node("LRN", [t["x"]], attrs), opset=s.pick(13, 20), reference=reference)
