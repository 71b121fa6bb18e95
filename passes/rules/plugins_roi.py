"""RoiAlign by TensorRT's plugin ROIAlign_TRT, for parsers that lack the operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, has_plugin, lacks, rule
from passes.plugins import Plugin, register

MODES = {"max": 0, "avg": 1}
ALIGNMENTS = {"output_half_pixel": 0, "half_pixel": 1}


def _roi_align(g: Builder, x: gs.Tensor, boxes: gs.Tensor, images: gs.Tensor, **attrs: Any) -> gs.Tensor:
    options = {name: attrs[name] for name in ("output_height", "output_width", "sampling_ratio", "spatial_scale")}
    for name, words in (("mode", MODES), ("coordinate_transformation_mode", ALIGNMENTS)):
        options[name] = next(word for word, number in words.items() if number == attrs[name])
    if g.opset < 16 and options.pop("coordinate_transformation_mode") == "half_pixel":
        raise ValueError("RoiAlign has half_pixel from opset 16 on")
    result: gs.Tensor = g.node("RoiAlign", [x, boxes, g.cast(images, np.int64)], options)
    return result


ROI_ALIGN = register(
    Plugin(
        "ROIAlign_TRT",
        attributes={
            "coordinate_transformation_mode": 1,
            "mode": 1,
            "output_height": 1,
            "output_width": 1,
            "sampling_ratio": 0,
            "spatial_scale": 1.0,
        },
        limits={
            "coordinate_transformation_mode": lambda value: value in (0, 1),
            "mode": lambda value: value in (0, 1),
            "output_height": lambda value: value > 0,
            "output_width": lambda value: value > 0,
            "sampling_ratio": lambda value: value >= 0,
            "spatial_scale": lambda value: value > 0,
        },
        reference=_roi_align,
    )
)


@rule("RoiAlign", when=lacks("RoiAlign") & has_plugin("ROIAlign_TRT", "1"))
def roi_align_by_plugin(node: gs.Node, g: Builder) -> Replacement:
    """The parser lacks RoiAlign; the plugin ROIAlign_TRT is the same, in both modes and alignments."""
    x, boxes, images = node.inputs
    mode = node.attrs.get("mode", "avg")
    aligned = node.attrs.get("coordinate_transformation_mode", "half_pixel" if g.opset >= 16 else "output_half_pixel")
    attrs = {name: node.attrs.get(name, 1) for name in ("output_height", "output_width", "spatial_scale")}
    attrs |= {"mode": MODES[mode], "coordinate_transformation_mode": ALIGNMENTS[aligned]}
    attrs["sampling_ratio"] = int(node.attrs.get("sampling_ratio", 0))
    if not all(holds(attrs[name]) for name, holds in ROI_ALIGN.limits.items()):
        g.decline("the plugin wants a positive scale and size, and a sampling ratio that is not negative")
    kept = g.dtype(x)
    x, boxes = g.cast(x, np.float32), g.cast(boxes, np.float32)  # places in half precision are off by pixels
    number, places = g.shape(boxes)[0], g.shape(images)[0]
    images = g.cast(images, np.int32)
    if isinstance(number, int) != isinstance(places, int):  # the plugin compares them before they are known
        boxes = g.op.Reshape(boxes, np.array([places if isinstance(places, int) else number, 4]))
        images = g.op.Reshape(images, np.array([places if isinstance(places, int) else number]))
    result = g.plugin(ROI_ALIGN, [x, boxes, images], attrs)
    if aligned == "half_pixel" and attrs["sampling_ratio"] == 0:
        result = g.op.Where(_not_empty(g, boxes), result, np.float32(0))
    return g.cast(result, kept)


def _not_empty(g: Builder, boxes: gs.Tensor) -> gs.Tensor:
    """Of each box whether it has an area; the mean over no point at all is no number in the plugin."""
    sides = g.op.Sub(g.slice(boxes, [2], [4], [1], [1]), g.slice(boxes, [0], [2], [1], [1]))
    shorter = g.unsqueeze(g.reduce("ReduceMin", sides, [1], keepdims=True), [2, 3])
    result: gs.Tensor = g.op.Greater(shorter, np.float32(0))
    return result


def _model(dtype: str, boxes: int | str, opset: int = 20, **attrs: Any) -> gs.Graph:
    """Boxes that are partly outside of the image; the first has no area."""

    def build(g: Builder, x: gs.Tensor, boxes: gs.Tensor, images: gs.Tensor) -> gs.Tensor:
        corner, size = g.slice(boxes, [0], [2], [1], [1]), g.slice(boxes, [2], [4], [1], [1])
        boxes = g.op.Concat(corner, g.op.Add(corner, g.op.Floor(g.op.Abs(size))), axis=1)
        result: gs.Tensor = g.node("RoiAlign", [x, g.op.Mul(boxes, np.array(4, dtype)), images], attrs)
        return result

    inputs: dict[str, Any] = {"x": (dtype, [3, 2, 9, 11]), "boxes": (dtype, [boxes, 4]), "images": ("int64", [boxes])}
    return example(inputs, build, opset)


@roi_align_by_plugin.example
def average_over_points_as_many_as_pixels() -> gs.Graph:
    return _model("float32", 7, output_height=3, output_width=2, spatial_scale=0.5)


@roi_align_by_plugin.example
def maximum_over_given_points() -> gs.Graph:
    return _model("float32", 7, output_height=2, output_width=4, sampling_ratio=2, mode="max")


@roi_align_by_plugin.example
def the_older_alignment_and_any_number_of_boxes() -> gs.Graph:
    return _model("float32", "n", opset=15, output_height=3, output_width=3, sampling_ratio=2)
