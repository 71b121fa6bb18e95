"""Resize, GridSample and pooling in forms that came after a parser's time: ``F.interpolate`` and ``F.grid_sample``."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lowering

SINCE_18 = {"antialias": 0, "keep_aspect_ratio_policy": "stretch"}
"""What Resize does where it is not told, and before opset 18 always."""


@lowering("Resize", since=18)
def resize_without_newer_attributes(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 18, Resize changes every axis, stretches, and has no antialiasing; other rules do what it lacks."""
    attrs = {name: value for name, value in node.attrs.items() if SINCE_18.get(name) != value}
    rank = len(g.shape(node.inputs[0]))
    if "axes" in attrs and [int(axis) % rank for axis in attrs["axes"]] in ([], list(range(rank))):
        del attrs["axes"]
    newer = [name for name in (*SINCE_18, "axes") if name in attrs]
    if newer or attrs.get("coordinate_transformation_mode") == "half_pixel_symmetric":
        g.decline(f"Resize with {', '.join(newer) or 'half_pixel_symmetric coordinates'}")
    return g.op.Resize(*node.inputs, **attrs) if attrs != node.attrs else None


@resize_without_newer_attributes.example
def stretched_without_antialiasing() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        scales = g.constant(np.array([1, 1, 2, 1.5], np.float32))
        attrs = {"antialias": 0, "keep_aspect_ratio_policy": "stretch", "axes": [0, 1, 2, 3]}
        made: gs.Tensor = g.op.Resize(x, None, scales, mode="linear", **attrs)
        return made

    return example({"x": ("float32", ["n", 3, 5, 6])}, build, 19)


SAMPLE_MODES = {"linear": "bilinear", "cubic": "bicubic", "nearest": "nearest"}


@lowering("GridSample", since=20)
def grid_sample_by_its_older_names(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 20, GridSample's modes are called bilinear and bicubic, and images have two axes."""
    if len(g.shape(node.inputs[0])) != 4:
        g.decline("GridSample of a volume came with opset 20")
    attrs = {**node.attrs, "mode": SAMPLE_MODES[node.attrs.get("mode", "linear")]}
    return g.op.GridSample(*node.inputs, **attrs)


def _grid_sample(mode: str | None, padding: str, aligned: int) -> gs.Graph:
    attrs = {"mode": mode, "padding_mode": padding, "align_corners": aligned}
    return example(
        {"x": ("float32", ["n", 2, 5, 6]), "grid": ("float32", ["n", 3, 4, 2])},
        lambda g, x, grid: g.op.GridSample(x, grid, **attrs),
        20,
    )


@grid_sample_by_its_older_names.example
def linear_and_outside_is_zero() -> gs.Graph:
    return _grid_sample("linear", "zeros", 0)


@grid_sample_by_its_older_names.example
def cubic_and_outside_is_the_edge() -> gs.Graph:
    return _grid_sample("cubic", "border", 1)


@grid_sample_by_its_older_names.example
def of_the_default_mode() -> gs.Graph:
    return _grid_sample(None, "reflection", 0)


POOLING_SINCE = {"AveragePool": ("dilations",), "LpPool": ("ceil_mode", "dilations")}


@lowering("AveragePool", "LpPool", since=18)
def pool_without_newer_attributes(node: gs.Node, g: Builder) -> Replacement:
    """Before opset 19, AveragePool has no dilations; before 18, LpPool neither these nor a ceil_mode."""
    attrs = dict(node.attrs)
    dropped = {name: attrs.pop(name) for name in POOLING_SINCE[node.op] if name in attrs}
    if not dropped:
        return None
    if any(step != 1 for step in dropped.get("dilations", ())):
        g.decline(f"{node.op} with dilations {dropped['dilations']}")
    if dropped.get("ceil_mode", 0) and not _same_rounded_down(node, g):
        g.decline(f"{node.op} whose last window is not full (ceil_mode)")
    return g.node(node.op, node.inputs, attrs)


def _same_rounded_down(node: gs.Node, g: Builder) -> bool:
    """Whether every window of the pooling is full."""
    kernel = list(node.attrs["kernel_shape"])
    count = len(kernel)
    strides = node.attrs.get("strides") or [1] * count
    pads = node.attrs.get("pads") or [0] * (2 * count)
    lengths = [g.static_dim(node.inputs[0], 2 + axis) for axis in range(count)]
    return all(
        (lengths[axis] + pads[axis] + pads[count + axis] - kernel[axis]) % strides[axis] == 0 for axis in range(count)
    )


def _pooled(op: str, opset: int, **attrs: object) -> gs.Graph:
    return example({"x": ("float32", ["n", 2, 6, 6])}, lambda g, x: g.node(op, [x], attrs), opset)


@pool_without_newer_attributes.example
def average_of_neighbours() -> gs.Graph:
    return _pooled("AveragePool", 19, kernel_shape=[2, 2], dilations=[1, 1], strides=[2, 2])


@pool_without_newer_attributes.example
def norm_of_full_windows() -> gs.Graph:
    return _pooled("LpPool", 18, kernel_shape=[2, 2], dilations=[1, 1], strides=[2, 2], ceil_mode=1, p=2)
