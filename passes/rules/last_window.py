"""Pooling with ``ceil_mode=True`` whose last window would lie in the padding alone.

torch and ONNX leave that window out. TensorRT 8.5 was seen to count it: its result is one place longer.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule


@rule("AveragePool", "MaxPool", "LpPool")
def pooling_without_an_empty_window(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT counts a last window that lies in the padding alone; with less padding there is none."""
    explicit = node.attrs.get("auto_pad", "NOTSET") == "NOTSET"
    if not node.attrs.get("ceil_mode", 0) or not explicit or node.inputs[0].shape is None:
        return None
    sizes = node.inputs[0].shape[2:]
    if not all(isinstance(size, int) for size in sizes):
        return None
    count = len(sizes)
    kernel = list(node.attrs["kernel_shape"])
    strides = list(node.attrs.get("strides") or [1] * count)
    steps = list(node.attrs.get("dilations") or [1] * count)
    pads = list(node.attrs.get("pads") or [0] * (2 * count))
    full, found = True, False
    for axis, size in enumerate(sizes):
        before, after, stride = pads[axis], pads[count + axis], strides[axis]
        reach = steps[axis] * (kernel[axis] - 1) + 1
        windows = -(-(size + before + after - reach) // stride) + 1
        if (windows - 1) * stride >= size + before:
            end = (windows - 2) * stride + reach  # of the last window that is counted
            pads[count + axis] = max(end - size - before, 0)
            found = True
        elif (size + before + after - reach) % stride:
            full = False
    if not found:
        return None
    if not full:
        g.decline("along another axis, the last window is not full and has to be counted")
    return g.node(node.op, node.inputs, {**node.attrs, "ceil_mode": 0, "pads": pads}, len(node.outputs))


def _pooled(op: str, size: int, **attrs: object) -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 2, size, size])}, lambda g, x: g.node(op, [x], {"ceil_mode": 1, **attrs}), 22
    )


@pooling_without_an_empty_window.example
def average_of_a_single_place() -> gs.Graph:
    return _pooled("AveragePool", 2, kernel_shape=[3, 3], strides=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)


@pooling_without_an_empty_window.example
def maximum_of_pairs() -> gs.Graph:
    return _pooled("MaxPool", 3, kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1])
