"""Operators on quantised tensors: QLinearConv, MatMulInteger, ONNX Runtime's QLinearAdd, … TensorRT lacks them.

Those that give quantised tensors become their float operator between DequantizeLinear and QuantizeLinear, the form that
TensorRT makes int8 kernels of. Those that give int32 sums are computed in float32, in pieces small enough to be exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.ir import Node
from passes.rules.integers import limits
from passes.rules.quantize import clipped_to, to_nearest

EXACT = 1 << 24
"""Up to here, float32 holds every integer."""


@rule("QLinearConv", when=lacks("QLinearConv"))
def qlinear_conv_as_conv(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no QLinearConv; it is a Conv between DequantizeLinear and QuantizeLinear."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = node.inputs[:8]
    inputs = [dequantised(g, x, x_scale, x_zero, 1), dequantised(g, w, w_scale, w_zero, 0)]
    bias = g.input(node, 8)
    if bias is not None:
        steps = g.op.Mul(_as_vector(g, x_scale), _as_vector(g, w_scale))
        inputs.append(g.op.Mul(g.cast(bias, g.dtype(x_scale)), steps))
    return quantised(g, g.node("Conv", inputs, node.attrs), y_scale, y_zero)


@rule("QLinearMatMul", when=lacks("QLinearMatMul"))
def qlinear_matmul_as_matmul(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no QLinearMatMul; it is a MatMul between DequantizeLinear and QuantizeLinear."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.inputs
    left, right = dequantised(g, a, a_scale, a_zero, -2), dequantised(g, b, b_scale, b_zero, -1)
    return quantised(g, g.op.MatMul(left, right), y_scale, y_zero, -2)


@rule("DynamicQuantizeLinear", when=lacks("DynamicQuantizeLinear"))
def dynamic_quantize_in_float(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no DynamicQuantizeLinear; the range is that of the tensor and 0, of which uint8 has 255 steps."""
    x = node.inputs[0]
    axes, zero = list(range(len(g.shape(x)))), g.constant(0, np.float32)
    highest, lowest = (g.reduce(op, x, axes) if axes else x for op in ("ReduceMax", "ReduceMin"))
    most, least = g.op.Max(highest, zero), g.op.Min(lowest, zero)
    steps = g.op.Div(g.op.Sub(most, least), g.constant(255, np.float32))
    scale = g.op.Where(g.op.Equal(steps, zero), g.constant(1, np.float32), steps)
    offset = to_nearest(g, clipped_to(g, g.op.Neg(g.op.Div(least, scale)), 0, 255))
    stored = clipped_to(g, g.op.Add(to_nearest(g, g.op.Div(x, scale)), offset), 0, 255)
    return [g.cast(g.cast(stored, np.int32), np.uint8), scale, g.cast(g.cast(offset, np.int32), np.uint8)]


@rule("MatMulInteger", when=lacks("MatMulInteger"))
def matmul_integer_in_exact_pieces(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no MatMulInteger; float32 is exact where the left factor is taken a few bits at a time."""
    a, b = node.inputs[:2]
    depth = _depth(g, a, -1, b, 0 if len(g.shape(b)) == 1 else -2)
    left = _centred(g, a, g.input(node, 2), -2)
    right = g.cast(_centred(g, b, g.input(node, 3), -1), np.float32)
    return exact_product(g, left, depth, lambda piece: g.op.MatMul(piece, right))


@rule("ConvInteger", when=lacks("ConvInteger"))
def conv_integer_in_exact_pieces(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no ConvInteger; float32 is exact where the image is taken a few bits at a time."""
    x, w = node.inputs[:2]
    depth = int(np.prod(g.static_shape(w)[1:]))
    left = _centred(g, x, g.input(node, 2), 1)
    right = g.cast(_centred(g, w, g.input(node, 3), 0), np.float32)
    return exact_product(g, left, depth, lambda piece: g.node("Conv", [piece, right], node.attrs))


def exact_product(g: Builder, x: gs.Tensor, depth: int, product: Callable[[gs.Tensor], gs.Tensor]) -> gs.Tensor:
    """int32: ``product``, linear, of integers ``x`` from -255 to 255; it sums ``depth`` products by at most 255."""
    most = (EXACT - 1) // (255 * max(depth, 1))
    if most >= 255:
        return g.cast(product(g.cast(x, np.float32)), np.int32)
    width = (most + 1).bit_length() - 1
    if width < 1:
        g.decline(f"sums of {depth:,} products are more than float32 holds exactly")
    total: gs.Tensor | None = None
    base = g.constant(1 << width, np.int32)
    for place in range(0, 9, width):
        last = place + width >= 9
        low = x if last else g.op.Mod(x, base)
        y = g.cast(product(g.cast(low, np.float32)), np.int32)
        y = y if place == 0 else g.op.Mul(y, g.constant(1 << place, np.int32))
        total = y if total is None else g.op.Add(total, y)
        x = x if last else g.op.Div(g.op.Sub(x, low), base)
    assert total is not None
    return total


def _depth(g: Builder, a: gs.Tensor, axis_a: int, b: gs.Tensor, axis_b: int) -> int:
    """How many products are summed."""
    known = [size for size in (g.shape(a)[axis_a], g.shape(b)[axis_b]) if isinstance(size, int)]
    if not known:
        g.decline(f"the number of products that are summed is dynamic: {g.shape(a)} times {g.shape(b)}")
    return known[0]


def _centred(g: Builder, x: gs.Tensor, zero: gs.Tensor | None, axis: int) -> gs.Tensor:
    """int32: ``x`` less its zero point, which may be one an index of ``axis``."""
    wide = _wide(g, x)
    return wide if zero is None else g.op.Sub(wide, _along(g, _wide(g, zero), x, axis))


def _wide(g: Builder, x: gs.Tensor) -> gs.Tensor:
    return g.constant(np.asarray(x.values).astype(np.int32)) if isinstance(x, gs.Constant) else g.cast(x, np.int32)


def _along(g: Builder, item: gs.Tensor, x: gs.Tensor, axis: int) -> gs.Tensor:
    """A scale or zero point in a shape that broadcasts with ``x``."""
    rank, shape = len(g.shape(x)), g.shape(item)
    if len(shape) != 1 or rank <= 1 or axis % rank == rank - 1:
        return item
    shaped: gs.Tensor = g.op.Reshape(item, [-1 if i == axis % rank else 1 for i in range(rank)])
    return shaped


def _as_vector(g: Builder, scale: gs.Tensor) -> gs.Tensor:
    vector: gs.Tensor = g.op.Reshape(scale, [-1])
    return vector


def dequantised(g: Builder, x: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor | None, axis: int) -> gs.Tensor:
    """The numbers that ``x`` stands for, with one scale or one an index of ``axis``."""
    rank, shape = len(g.shape(x)), g.shape(scale)
    if shape in ([], [1]) or (len(shape) == 1 and g.opset >= 13):
        scalar = shape in ([], [1])
        scale, zero = (_scalar(g, item) if scalar and item is not None else item for item in (scale, zero))
        result: gs.Tensor = g.node(
            "DequantizeLinear", [x, scale, zero], {} if scalar or rank == 0 else {"axis": axis % rank}
        )
        return result
    steps = _along(g, scale, x, axis)
    centred = g.cast(_centred(g, x, zero, axis), g.dtype(scale))
    result = g.op.Mul(centred, steps)
    return result


def quantised(g: Builder, y: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor | None, axis: int = 1) -> gs.Tensor:
    """``y`` on the grid of this scale and zero point, in the type of the latter (uint8 where there is none)."""
    shape = g.shape(scale)
    if shape in ([], [1]):
        scale, zero = (_scalar(g, item) if item is not None else None for item in (scale, zero))
        result: gs.Tensor = g.node("QuantizeLinear", [y, scale, zero], {})
        return result
    kind = np.dtype(np.uint8) if zero is None else g.dtype(zero)
    steps = to_nearest(g, g.op.Div(y, _along(g, scale, y, axis)))
    if zero is not None:
        steps = g.op.Add(steps, g.cast(_along(g, _wide(g, zero), y, axis), g.dtype(y)))
    low, high = limits(kind)
    result = g.cast(g.cast(clipped_to(g, steps, low, high), np.int32), kind)
    return result


def _scalar(g: Builder, item: gs.Tensor) -> gs.Tensor:
    if g.shape(item) == []:
        return item
    if isinstance(item, gs.Constant):
        return g.constant(np.asarray(item.values).reshape(()))
    scalar: gs.Tensor = g.squeeze(item, [0])
    return scalar


# --- ONNX Runtime's own ------------------------------------------------------------------------------------------

MICROSOFT = "com.microsoft"

Floats = Callable[[Builder, gs.Node, list[gs.Tensor]], gs.Tensor]


def _like(op: str) -> Floats:
    return lambda g, node, x: g.node(op, x, node.attrs)


def _pooled(op: str) -> Floats:
    def build(g: Builder, node: gs.Node, x: list[gs.Tensor]) -> gs.Tensor:
        attrs = {name: value for name, value in node.attrs.items() if name != "channels_last"}
        if not node.attrs.get("channels_last", 0):
            result: gs.Tensor = g.node(op, x, attrs)
            return result
        return g.moveaxis(g.node(op, [g.moveaxis(x[0], -1, 1)], attrs), 1, -1)

    return build


def _mean(g: Builder, node: gs.Node, x: list[gs.Tensor]) -> gs.Tensor:
    axes = node.attrs.get("axes") or list(range(len(g.shape(x[0]))))
    return g.reduce("ReduceMean", x[0], axes, bool(node.attrs.get("keepdims", 1)))


ON_GRIDS: dict[str, tuple[int, Floats]] = {
    "QLinearAdd": (2, _like("Add")),
    "QLinearAveragePool": (1, _pooled("AveragePool")),
    "QLinearGlobalAveragePool": (1, _pooled("GlobalAveragePool")),
    "QLinearLeakyRelu": (1, _like("LeakyRelu")),
    "QLinearMul": (2, _like("Mul")),
    "QLinearReduceMean": (1, _mean),
    "QLinearSigmoid": (1, _like("Sigmoid")),
}
"""How many quantised inputs (each with scale and zero point) there are before scale and zero point of the output."""


@rule(*ON_GRIDS, domain=MICROSOFT)
def qlinear_operator_in_float(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has this operator; it is a float operator between DequantizeLinear and QuantizeLinear."""
    count, build = ON_GRIDS[node.op]
    given = [g.input(node, index) for index in range(3 * count + 2)]
    floats = []
    for index in range(0, 3 * count, 3):
        x, scale, zero = given[index : index + 3]
        assert x is not None and scale is not None
        floats.append(dequantised(g, x, scale, zero, 1))
    scale, zero = given[3 * count :]
    assert scale is not None
    return _on_grid_of(g, build(g, node, floats), scale, zero, given[0])


def _on_grid_of(g: Builder, y: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor | None, x: gs.Tensor | None) -> gs.Tensor:
    if zero is None and x is not None:
        zero = g.constant(0, g.dtype(x))
    return quantised(g, y, scale, zero)


@rule("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax_in_float(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has QLinearSoftmax; it is a Softmax between DequantizeLinear and QuantizeLinear."""
    x, x_scale, scale = node.inputs[0], node.inputs[1], node.inputs[3]
    floats = dequantised(g, x, x_scale, g.input(node, 2), 1)
    rank = len(g.shape(x))
    axis = int(node.attrs.get("axis", -1)) % rank
    over_the_rest = int(node.attrs["opset"]) < 13 and axis != rank - 1  # all axes from this one on are one
    if over_the_rest and g.opset < 13:
        y = g.op.Softmax(floats, axis=axis)
    elif over_the_rest:
        axes = list(range(axis, rank))
        powers = g.op.Exp(g.op.Sub(floats, g.reduce("ReduceMax", floats, axes, True)))
        y = g.op.Div(powers, g.reduce("ReduceSum", powers, axes, True))
    elif g.opset < 13:
        y = g.moveaxis(g.op.Softmax(g.moveaxis(floats, axis, rank - 1), axis=rank - 1), rank - 1, axis)
    else:
        y = g.op.Softmax(floats, axis=axis)
    return _on_grid_of(g, y, scale, g.input(node, 4), x)


@rule("QLinearWhere", domain=MICROSOFT)
def qlinear_where_in_float(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has QLinearWhere; it is a Where between DequantizeLinear and QuantizeLinear."""
    condition, x, x_scale, x_zero, y, y_scale, y_zero, scale, zero = node.inputs
    floats = [dequantised(g, x, x_scale, x_zero, 1), dequantised(g, y, y_scale, y_zero, 1)]
    return quantised(g, g.op.Where(condition, *floats), scale, zero)


@rule("QLinearConcat", domain=MICROSOFT)
def qlinear_concat_in_float(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has QLinearConcat; it is a Concat between DequantizeLinear and QuantizeLinear."""
    scale, zero, *rest = node.inputs
    floats = [dequantised(g, x, step, offset, 1) for x, step, offset in zip(*[iter(rest)] * 3, strict=True)]
    return quantised(g, g.op.Concat(*floats, axis=int(node.attrs["axis"])), scale, zero)


@rule("QGemm", domain=MICROSOFT)
def qgemm_as_gemm(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has QGemm; it is a Gemm between DequantizeLinear and QuantizeLinear."""
    a, a_scale, a_zero, b, b_scale, b_zero = node.inputs[:6]
    inputs = [
        dequantised(g, a, a_scale, a_zero, 0),
        dequantised(g, b, b_scale, b_zero, 0 if node.attrs.get("transB", 0) else 1),
    ]
    alpha = float(node.attrs.get("alpha", 1.0))
    bias = g.input(node, 6)
    if bias is not None:
        steps = g.op.Mul(g.op.Mul(_as_vector(g, a_scale), _as_vector(g, b_scale)), g.constant(alpha, np.float32))
        inputs.append(g.op.Mul(g.cast(bias, np.float32), steps))
    attrs = {name: value for name, value in node.attrs.items() if name in ("alpha", "transA", "transB")}
    y = g.node("Gemm", inputs, attrs)
    scale = g.input(node, 7)
    return y if scale is None else _on_grid_of(g, y, scale, g.input(node, 8), a)


@rule("MatMulIntegerToFloat", "DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_matmul_in_float(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has this operator; it is a MatMul of what DequantizeLinear gives."""
    if node.op == "DynamicQuantizeMatMul":
        a, b, b_scale = node.inputs[:3]
        b_zero, bias = g.input(node, 3), g.input(node, 4)
        stored, scale, zero = g.op.DynamicQuantizeLinear(a, outputs=3)
        left = g.op.DequantizeLinear(stored, scale, zero)
    else:
        a, b, a_scale, b_scale = node.inputs[:4]
        b_zero, bias = g.input(node, 5), g.input(node, 6)
        left = dequantised(g, a, a_scale, g.input(node, 4), -2)
    y = g.op.MatMul(left, dequantised(g, b, b_scale, b_zero, -1))
    return y if bias is None else g.op.Add(y, bias)


@rule("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
def quantisation_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """ONNX Runtime's own QuantizeLinear and DequantizeLinear became ONNX's, which TensorRT knows."""
    attrs = dict(node.attrs)
    if g.opset < 13:
        attrs.pop("axis", None)
    return g.node(node.op, [_widened(g, node, item) for item in node.inputs], attrs)


def _widened(g: Builder, node: gs.Node, item: gs.Tensor) -> gs.Tensor:
    """Weights of four bits as the same numbers in eight, where ONNX's own operator does not take them yet."""
    kind = np.dtype(g.dtype(item)).name
    if g.opset >= 21 or kind not in ("int4", "uint4"):
        return item
    if node.op != "DequantizeLinear" or not isinstance(node.inputs[0], gs.Constant):
        g.decline(f"ONNX quantises to {kind} from opset 21 on")
    values = np.asarray(item.values)
    return g.constant(values.astype(np.int8 if kind == "int4" else np.uint8))


# --- examples ----------------------------------------------------------------------------------------------------


def foreign(g: Builder, op: str, inputs: list[Any], kind: Any, shape: list[Any], **attrs: Any) -> gs.Tensor:
    """A node of ONNX Runtime's domain, with the type of its output."""
    y = gs.Variable(g.names.new(f"{g.stem}/{op}"), np.dtype(kind), shape)
    g.made.append(Node(op, g.names.new(op), attrs, [g.tensor(item) for item in inputs], [y], domain=MICROSOFT))
    return y


def _grid(scale: float, zero: int, kind: Any = np.uint8) -> tuple[Any, Any]:
    return np.array(scale, np.float32), np.array(zero, kind)


def _weights(shape: list[int], kind: Any = np.int8) -> Any:
    return np.random.default_rng(0).integers(-9 if kind == np.int8 else 0, 99, shape).astype(kind)


@qlinear_conv_as_conv.example
def conv_of_uint8_with_a_scale_for_each_channel() -> gs.Graph:
    steps, zeros = np.array([0.1, 0.013, 0.2], np.float32), np.zeros(3, np.int8)
    return example(
        {"x": ("uint8", ["n", 2, 6, 6])},
        lambda g, x: g.op.QLinearConv(
            x, *_grid(0.071, 2), _weights([3, 2, 3, 3]), steps, zeros, *_grid(3.17, 60), np.array([9, -5, 70], np.int32)
        ),
    )


@qlinear_matmul_as_matmul.example
def matmul_of_int8_with_a_scale_for_each_column() -> gs.Graph:
    steps, zeros = np.array([0.1, 0.013, 0.2], np.float32), np.zeros(3, np.int8)
    return example(
        {"x": ("int8", ["n", 2, 4])},
        lambda g, x: g.op.QLinearMatMul(
            x, *_grid(0.071, 2, np.int8), _weights([4, 3]), steps, zeros, *_grid(1.37, 6, np.int8)
        ),
    )


@dynamic_quantize_in_float.example
def quantised_as_it_comes() -> gs.Graph:
    return example({"x": ("float32", ["n", 4])}, lambda g, x: g.op.DynamicQuantizeLinear(x, outputs=3), opset=18)


@matmul_integer_in_exact_pieces.example
def matmul_of_uint8_with_many_products() -> gs.Graph:
    weights = _weights([1000, 5], np.uint8)
    return example(
        {"x": ("uint8", ["n", 3, 1000])},
        lambda g, x: g.op.MatMulInteger(x, g.constant(weights), g.constant(250, np.uint8), g.constant(3, np.uint8)),
    )


@conv_integer_in_exact_pieces.example
def conv_of_uint8_with_many_products() -> gs.Graph:
    weights = _weights([4, 30, 3, 3], np.uint8)
    return example(
        {"x": ("uint8", ["n", 30, 6, 6])},
        lambda g, x: g.op.ConvInteger(x, g.constant(weights), g.constant(200, np.uint8), pads=[1, 1, 1, 1]),
    )


@qlinear_operator_in_float.example
def sum_and_activations_of_onnx_runtime() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        shape: list[Any] = ["n", 4]
        total = foreign(g, "QLinearAdd", [x, *_grid(0.3, 1), x, *_grid(0.7, 0), *_grid(0.11, 9)], np.uint8, shape)
        bent = foreign(g, "QLinearLeakyRelu", [x, *_grid(0.3, 1), *_grid(0.017, 9)], np.uint8, shape, alpha=0.1)
        return [total, bent]

    return example({"x": ("uint8", ["n", 4])}, build)


@qlinear_softmax_in_float.example
def softmax_of_onnx_runtime() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        grids = [x, *_grid(0.031, 3), *_grid(1 / 256, 0)]
        return [
            foreign(g, "QLinearSoftmax", grids, np.uint8, ["n", 3, 5], axis=-1, opset=18),
            foreign(g, "QLinearSoftmax", grids, np.uint8, ["n", 3, 5], axis=1, opset=11),
            foreign(g, "QLinearSoftmax", grids, np.uint8, ["n", 3, 5], axis=1, opset=18),
        ]

    return example({"x": ("uint8", ["n", 3, 5])}, build)


@qlinear_where_in_float.example
def choice_of_onnx_runtime() -> gs.Graph:
    def build(g: Builder, c: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
        grids = [c, x, *_grid(0.3, 1), x, *_grid(0.17, 100), *_grid(0.4, 50)]
        return foreign(g, "QLinearWhere", grids, np.uint8, ["n", 4])

    return example({"c": ("bool", ["n", 1]), "x": ("uint8", ["n", 4])}, build)


@qlinear_concat_in_float.example
def parts_on_one_grid() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        parts = [*_grid(0.3, 1), x, *_grid(0.17, 1), x, *_grid(0.7, 0)]
        return foreign(g, "QLinearConcat", parts, np.uint8, ["n", 8], axis=1)

    return example({"x": ("uint8", ["n", 4])}, build)


@qgemm_as_gemm.example
def quantised_layer_of_onnx_runtime() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        bias = np.array([5, -7, 11], np.int32)
        inputs = [x, *_grid(0.31, 1), _weights([3, 4]), *_grid(0.013, 0, np.int8), bias, *_grid(0.7, 20)]
        return foreign(g, "QGemm", inputs, np.uint8, ["n", 3], transB=1)

    return example({"x": ("uint8", ["n", 4])}, build)


@dynamic_matmul_in_float.example
def weights_of_int8_and_inputs_quantised_as_they_come() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> list[gs.Tensor]:
        weights = [_weights([4, 3]), np.array(0.013, np.float32), np.array(0, np.int8)]
        b, scale, zero = weights
        stored = [y, b, np.array(0.1, np.float32), scale, np.array(1, np.uint8), zero]
        return [
            foreign(g, "DynamicQuantizeMatMul", [x, *weights], np.float32, ["n", 3]),
            foreign(g, "MatMulIntegerToFloat", stored, np.float32, ["n", 3]),
        ]

    return example({"x": ("float32", ["n", 4]), "y": ("uint8", ["n", 4])}, build)


@quantisation_of_the_standard.example
def pair_of_onnx_runtime() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        stored = foreign(g, "QuantizeLinear", [x, *_grid(0.05, 3)], np.uint8, ["n", 4])
        return foreign(g, "DequantizeLinear", [stored, *_grid(0.05, 3)], np.float32, ["n", 4])

    return example({"x": ("float32", ["n", 4])}, build)


@quantisation_of_the_standard.example
def weights_of_four_bits_before_opset_21() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        stored = (_weights([4, 3]) % 16 - 8).astype(ml_dtypes.int4)
        weights = foreign(g, "DequantizeLinear", [stored, *_grid(0.05, 0, ml_dtypes.int4)], np.float32, [4, 3])
        return g.op.MatMul(x, weights)

    return example({"x": ("float32", ["n", 4])}, build, 18)
