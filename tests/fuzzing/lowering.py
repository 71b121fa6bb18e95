"""Models for the rules of passes/rules/lowering_*.py, which write newer forms in older ones."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Case, Sketch, Tensors, strategy

REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


@strategy("reduction_axes_as_attribute")
def reductions(s: Sketch) -> Case:
    op = f"Reduce{s.pick(*REDUCTIONS)}"
    sizes = s.sizes(0, 4)
    dtype = s.pick("float32", "float32", "float16", "float64", "int32", "int64") if op != "ReduceLogSum" else "float32"
    values = s.values(dtype, sizes)
    if np.dtype(dtype).kind == "i":
        values = np.clip(values, -9, 9)
    s.input("x", dtype, np.abs(values) + np.asarray(1, dtype) if op == "ReduceLogSum" else values)
    if s.flag() or s.flag():
        s.constants["axes"] = np.array(s.axes(len(sizes)), np.int64)
    attrs = {"keepdims": s.pick(None, 0, 1), "noop_with_empty_axes": s.pick(None, 0, 1)}
    if attrs["noop_with_empty_axes"] and op not in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"):
        attrs["noop_with_empty_axes"] = 0

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        made: gs.Tensor = g.node(op, [t["x"], t.get("axes")], attrs)
        return made

    return s.model(build, opset=s.pick(18, 20, 22), tolerance=1e-2 if dtype == "float16" else None)


@strategy("split_by_sizes")
def split(s: Sketch) -> Case:
    sizes = s.sizes(1, 4, high=7)
    axis = s.axis(len(sizes))
    parts = s.integer(1, 4)
    s.input("x", s.pick("float32", "int32", "bool", "int64"), sizes)

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        made = g.op.Split(t["x"], outputs=parts, axis=axis, num_outputs=parts)
        return list(made) if parts > 1 else [made]

    return s.model(build, opset=s.pick(18, 20))


@strategy("pad_every_axis")
def pad(s: Sketch) -> Case:
    sizes = s.sizes(1, 4, low=2, high=5)
    mode = s.pick("constant", "edge", "wrap", "wrap")
    axes = s.axes(len(sizes)) if s.flag() or mode == "constant" else None
    count = len(sizes) if axes is None else len(axes)
    pads = np.array([s.integer(-1 if s.rarely() else 0, 2) for _ in range(2 * count)], np.int64)
    s.input("x", s.pick("float32", "int32"), sizes)
    if mode == "wrap":
        s.constants["pads"] = pads
    else:
        s.operand("pads", pads, static=True)
    if axes is not None:
        s.constants["axes"] = np.array(axes, np.int64)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        value = g.constant(2, g.dtype(t["x"])) if mode == "constant" and s.inputs["x"][0] == "float32" else None
        made: gs.Tensor = g.op.Pad(t["x"], t["pads"], value, t.get("axes"), mode=mode)
        return made

    return s.model(build, opset=19 if mode == "wrap" else s.pick(18, 19, 21))


@strategy("part_of_a_shape_as_slice")
def shape(s: Sketch) -> Case:
    sizes = s.sizes(1, 4, empty=True)
    s.input("x", "float32", sizes)
    s.inputs["x"] = ("float32", [f"x_{axis}" for axis in range(len(sizes))])
    attrs = {"start": s.pick(1, None, *range(-5, 5)), "end": s.pick(2, None, *range(-5, 6))}
    return s.model(lambda g, t: g.op.Shape(t["x"], **attrs), opset=s.pick(15, 20))


@strategy("resize_without_newer_attributes")
def resize(s: Sketch) -> Case:
    sizes = [s.integer(1, 3), s.integer(1, 3), s.integer(2, 6), s.integer(2, 6)]
    attrs = {
        "axes": s.pick(None, None, [0, 1, 2, 3], [2, 3]),
        "mode": s.pick("nearest", "linear"),
        "antialias": 0,
        "coordinate_transformation_mode": s.pick(None, "asymmetric", "align_corners", "half_pixel_symmetric"),
        "keep_aspect_ratio_policy": s.pick(None, "stretch"),
    }
    chosen = attrs["axes"] or [0, 1, 2, 3]
    s.input("x", "float32", sizes)
    if s.flag():
        wanted = [s.integer(1, 9) if axis > 1 else sizes[axis] for axis in chosen]
        s.constants["sizes"] = np.array(wanted, np.int64)
    else:
        scales = [s.pick(0.5, 1.0, 1.5, 2.0, 3.0) if axis > 1 else 1.0 for axis in chosen]
        s.constants["scales"] = np.array(scales, np.float32)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        made: gs.Tensor = g.op.Resize(t["x"], None, t.get("scales"), t.get("sizes"), **attrs)
        return made

    return s.model(build, opset=19, tolerance=1e-4)


@strategy("grid_sample_by_its_older_names")
def grid_sample(s: Sketch) -> Case:
    s.input("x", "float32", s.values("float32", [2, s.integer(1, 3), s.integer(2, 5), s.integer(2, 5)]))
    s.input("grid", "float32", s.random.uniform(-1.4, 1.4, [2, s.integer(1, 4), s.integer(1, 4), 2]).astype(np.float32))
    attrs = {
        "mode": s.pick(None, "linear", "nearest", "cubic"),
        "padding_mode": s.pick(None, "zeros", "border", "reflection"),
        "align_corners": s.pick(None, 0, 1),
    }
    return s.model(lambda g, t: g.op.GridSample(t["x"], t["grid"], **attrs), opset=s.pick(20, 22), tolerance=1e-4)


@strategy("pool_without_newer_attributes")
def pool(s: Sketch) -> Case:
    op = s.pick("AveragePool", "LpPool")
    kernel = [s.integer(1, 3), s.integer(1, 3)]
    attrs = {
        "kernel_shape": kernel,
        "dilations": s.pick([1, 1], [1, 1], [1, 1], [2, 1]),
        "strides": s.pick(None, [1, 1], [2, 2]),
        "p": s.pick(1, 2) if op == "LpPool" else None,
    }
    s.input("x", "float32", [s.integer(1, 2), s.integer(1, 3), s.integer(5, 8), s.integer(5, 8)])
    return s.model(lambda g, t: g.node(op, [t["x"]], attrs), opset=s.pick(19, 22), tolerance=1e-4)


@strategy("space_to_depth_in_either_order")
def space_to_depth(s: Sketch) -> Case:
    block = s.integer(1, 3)
    rows = [s.integer(1, 2), s.integer(1, 3), block * s.integer(1, 3), block * s.integer(1, 3)]
    mode = s.pick(None, "DCR", "CRD")
    s.input("x", "float32", rows)

    def reference(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        n, c, h, w = rows
        apart = feeds["x"].reshape(n, c, h // block, block, w // block, block)
        order = (0, 1, 3, 5, 2, 4) if mode == "CRD" else (0, 3, 5, 1, 2, 4)
        return [apart.transpose(order).reshape(n, c * block * block, h // block, w // block)]

    return s.model(lambda g, t: g.op.SpaceToDepth(t["x"], blocksize=block, mode=mode), 28, reference)


@strategy("cast_without_newer_attributes")
def cast(s: Sketch) -> Case:
    numbers = ("FLOAT", "FLOAT16", "DOUBLE", "INT32", "INT64", "BOOL")
    to = onnx.TensorProto.DataType.Value(s.pick(*numbers))
    kind = s.pick("float32", "int32", "bool", "float16")
    s.input("x", kind, np.clip(s.values(kind, s.sizes(0, 3)), 0, 99) if kind != "bool" else s.values(kind, [3]))
    saturate = s.pick(0, 1)
    return s.model(lambda g, t: g.op.Cast(g.op.Identity(t["x"]), to=to, saturate=saturate), opset=s.pick(19, 21))


@strategy("quantisation_of_int8")
def quantisation(s: Sketch) -> Case:
    opset = s.pick(19, 21, 23)
    sizes = s.sizes(2, 3, low=2)
    axis = s.axis(len(sizes)) if s.flag() else None
    dtype = s.pick("float32", "float16")
    shape = [] if axis is None else [sizes[axis]]
    scale = (s.random.uniform(0.05, 0.5, shape)).astype(dtype)
    s.input("x", dtype, sizes)
    s.constants["scale"] = scale
    typed = opset >= 21 and s.flag()
    if not typed:
        s.constants["zero"] = np.zeros(shape, np.int8)
    attrs = {"axis": axis, "output_dtype": onnx.TensorProto.INT8 if typed else None, "saturate": s.pick(None, 1)}

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        low = g.op.QuantizeLinear(t["x"], t["scale"], t.get("zero"), **attrs)
        made: gs.Tensor = g.op.DequantizeLinear(low, t["scale"], t.get("zero"), axis=axis)
        return made

    return s.model(build, opset, tolerance=2e-2 if dtype == "float16" else None)


@strategy("pooling_without_an_empty_window")
def pool_with_ceil_mode(s: Sketch) -> Case:
    op = s.pick("AveragePool", "MaxPool")
    stride = s.integer(2, 4)
    attrs = {
        "kernel_shape": [s.integer(2, stride)] * 2,
        "strides": [stride] * 2,
        "pads": [1, 1, s.pick(1, 1, 1, 0), 1],
        "ceil_mode": 1,
        "count_include_pad": s.pick(None, 0, 1) if op == "AveragePool" else None,
    }
    size = stride * s.integer(1, 3) - s.pick(1, 1, 1, 0)  # where a window begins with the padding at the end
    s.input("x", "float32", [s.integer(1, 2), s.integer(1, 3), size, size], static=True)
    return s.model(lambda g, t: g.node(op, [t["x"]], attrs), opset=s.pick(10, 16, 22), tolerance=1e-4)
