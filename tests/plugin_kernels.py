"""TensorRT's stock plugins in NumPy, as their kernels compute, oddities included: what reference bodies are held to.

Written from what the plugins of TensorRT 8.5 document and do; a GPU test shows the same of the plugins themselves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

F32 = np.float32


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs with the plugins' kernels in place of their reference bodies."""
    kernels = {
        kernel.__name__: kernel for kernel in (EfficientNMS_TRT, ROIAlign_TRT, MultiscaleDeformableAttnPlugin_TRT)
    }
    kernels["DisentangledAttention_TRT"] = DisentangledAttention_TRT
    used = onnx.ModelProto()
    used.CopyFrom(model)
    del used.functions[:]
    called = {(node.op_type, node.domain) for node in used.graph.node if node.op_type in kernels}
    ops = [type(name, (kernels[name],), {"op_domain": domain}) for name, domain in called]
    assert ops, "no plugin is called"
    results: list[np.ndarray] = ReferenceEvaluator(used, new_ops=[*ops, GatherElements]).run(None, feeds)
    return results


class GatherElements(OpRun):
    """The operator: onnx's own gathers from 64 elements at most."""

    op_domain = ""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray, ...]:
        return (np.take_along_axis(data, indices, axis),)


def demand(plugin: str, **demands: bool) -> None:
    """What the creator validates: with anything else TensorRT makes no plugin."""
    broken = [name for name, holds in demands.items() if not holds]
    if broken:
        raise ValueError(f"{plugin} is not created with this {broken[0]}")


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes, whose corners come in any order."""
    low_a, high_a = np.minimum(a[:2], a[2:]), np.maximum(a[:2], a[2:])
    low_b, high_b = np.minimum(b[:2], b[2:]), np.maximum(b[:2], b[2:])
    shared = F32(np.prod(np.maximum(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0)))
    whole = F32(np.prod(high_a - low_a)) + F32(np.prod(high_b - low_b)) - shared
    return float(shared / whole) if shared > 0 and whole > 0 else 0.0


class EfficientNMS_TRT(OpRun):
    """One list of all classes, best first; below a threshold of 0.007 nothing is left out, but comes last."""

    op_domain = ""

    def _run(self, boxes: np.ndarray, scores: np.ndarray, **attrs: Any) -> tuple[np.ndarray, ...]:
        most, threshold, iou = attrs["max_output_boxes"], F32(attrs["score_threshold"]), F32(attrs["iou_threshold"])
        demand("EfficientNMS_TRT", score_threshold=threshold >= 0, iou_threshold=iou > 0, max_output_boxes=most > 0)
        assert attrs["background_class"] < 0 and not attrs["score_activation"] and not attrs["box_coding"]
        count = np.zeros((len(boxes), 1), np.int32)
        kept, values = np.zeros((len(boxes), most, 4), F32), np.zeros((len(boxes), most), F32)
        labels = np.zeros((len(boxes), most), np.int32)
        for image, (corners, score) in enumerate(zip(boxes, scores, strict=True)):
            flat = score.reshape(-1).copy()
            candidates = np.arange(len(flat))
            if threshold < F32(0.007):
                flat[flat < threshold] = -(1 << 15)
            else:
                candidates = candidates[flat >= threshold]
            candidates = candidates[np.argsort(-flat[candidates], kind="stable")][:4096]
            chosen: list[int] = []
            for candidate in candidates:
                box, label = divmod(int(candidate), score.shape[1])
                others = [divmod(item, score.shape[1]) for item in chosen]
                if len(chosen) < most and not any(
                    label == other and F32(overlap(corners[box], corners[place])) >= iou for place, other in others
                ):
                    chosen.append(int(candidate))
            count[image] = len(chosen)
            for index, candidate in enumerate(chosen):
                box, labels[image, index] = divmod(candidate, score.shape[1])
                kept[image, index], values[image, index] = corners[box], flat[candidate]
        return count, kept, values, labels


class ROIAlign_TRT(OpRun):
    """Where a bin has no point, its mean is no number."""

    op_domain = ""

    def _run(self, x: np.ndarray, boxes: np.ndarray, images: np.ndarray, **attrs: Any) -> tuple[np.ndarray, ...]:
        rows, columns, sampling = attrs["output_height"], attrs["output_width"], attrs["sampling_ratio"]
        aligned, average = attrs["coordinate_transformation_mode"], attrs["mode"]
        demand(
            "ROIAlign_TRT",
            output_height=rows > 0,
            output_width=columns > 0,
            sampling_ratio=sampling >= 0,
            spatial_scale=F32(attrs["spatial_scale"]) > 0,
            mode=average in (0, 1),
            coordinate_transformation_mode=aligned in (0, 1),
        )
        assert images.dtype == np.int32 and boxes.shape == (len(images), 4)
        out = np.zeros((len(boxes), x.shape[1], rows, columns), F32)
        for index, (box, image) in enumerate(zip(boxes, images, strict=True)):
            left, top, right, bottom = box * F32(attrs["spatial_scale"]) - F32(0.5 if aligned else 0)
            width, height = right - left, bottom - top
            if not aligned:
                width, height = max(width, F32(1)), max(height, F32(1))
            down = sampling or math.ceil(height / rows)
            across = sampling or math.ceil(width / columns)
            for row, column in np.ndindex(rows, columns):
                ys = [top + height / rows * (row + (step + 0.5) / down) for step in range(down)]
                xs = [left + width / columns * (column + (step + 0.5) / across) for step in range(across)]
                points = [self._sampled(x[image], y_, x_, average) for y_ in ys for x_ in xs]
                if average:
                    out[index, :, row, column] = np.sum(points, 0) / len(points) if points else np.nan
                else:
                    out[index, :, row, column] = np.max(points, 0) if points else 0
        return (out,)

    def _sampled(self, image: np.ndarray, y: float, x: float, average: int) -> np.ndarray:
        _, height, width = image.shape
        if y < -1 or y > height or x < -1 or x > width:
            return np.zeros(len(image), F32)
        y, x = max(y, 0), max(x, 0)
        low_y, low_x = min(int(y), height - 1), min(int(x), width - 1)
        high_y, high_x = min(low_y + 1, height - 1), min(low_x + 1, width - 1)
        part_y, part_x = (0 if low_y == height - 1 else y - low_y), (0 if low_x == width - 1 else x - low_x)
        weighted = [
            image[:, low_y, low_x] * (1 - part_y) * (1 - part_x),
            image[:, low_y, high_x] * (1 - part_y) * part_x,
            image[:, high_y, low_x] * part_y * (1 - part_x),
            image[:, high_y, high_x] * part_y * part_x,
        ]
        return np.sum(weighted, 0) if average else np.max(weighted, 0)


class MultiscaleDeformableAttnPlugin_TRT(OpRun):
    """Points outside of a map by a pixel or more add nothing."""

    op_domain = ""

    def _run(
        self,
        value: np.ndarray,
        shapes: np.ndarray,
        starts: np.ndarray,
        places: np.ndarray,
        weights: np.ndarray,
        **attrs: Any,
    ) -> tuple[np.ndarray, ...]:
        assert shapes.dtype == starts.dtype == np.int32 and starts.shape == shapes.shape[:1]
        batch, queries, heads, levels, points, _ = places.shape
        assert weights.shape == places.shape[:-1] and levels == len(shapes)
        out = np.zeros((batch, queries, heads, value.shape[3]), F32)
        for image, query, head_, level, point in np.ndindex(batch, queries, heads, levels, points):
            height, width = shapes[level]
            x, y = places[image, query, head_, level, point] * F32([width, height]) - F32(0.5)
            if not (-1 < y < height and -1 < x < width):
                continue
            low_y, low_x = math.floor(y), math.floor(x)
            for row, column in ((low_y, low_x), (low_y, low_x + 1), (low_y + 1, low_x), (low_y + 1, low_x + 1)):
                if 0 <= row < height and 0 <= column < width:
                    part = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[image, query, head_, level, point]
                    out[image, query, head_] += part * value[image, starts[level] + row * width + column, head_]
        return (out,)


class DisentangledAttention_TRT(OpRun):
    """Distances in DeBERTa-V2's buckets, place by place."""

    op_domain = ""

    def _run(self, content: np.ndarray, first: np.ndarray, second: np.ndarray, **attrs: Any) -> tuple[np.ndarray, ...]:
        span, length = attrs["span"], content.shape[1]
        demand("DisentangledAttention_TRT", span=span >= 0, factor=0 < F32(attrs["factor"]) < 1)
        assert length % 64 == 0 and first.shape[2] == second.shape[2] == 2 * span
        middle = span // 2
        log = math.log(middle)
        slope = (middle - 1) / (math.log(first.shape[2] - 1) - log) * (1 - 1e-7)

        def column(far: int) -> int:
            if -middle <= far <= middle:
                return min(max(far + span, 0), 2 * span - 1)
            bucket = math.ceil((math.log(abs(far)) - log) * slope) + middle
            return min(max(math.copysign(bucket, far) + span, 0), 2 * span - 1)

        table = np.array([[int(column(i - j)) for j in range(length)] for i in range(length)])
        i, j = np.indices((length, length))
        total = content + first[:, i, table] + second[:, j, table]
        return ((total * F32(attrs["factor"])).astype(F32),)
