"""What ONNX Runtime's optimizer fuses, in the operators of the standard: models that were saved after it.

Nobody else has these operators: BiasGelu, SkipLayerNormalization, FusedMatMul, FusedConv, …; those of attention are in
``onnx_runtime_attention``, quantised ones in ``quantised_operators`` and ``four_bits``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.ir import Node
from passes.rules.layer_norms import by_root_mean_square, normalised
from passes.rules.quantised_operators import MICROSOFT, foreign
from passes.rules.shapes import iota, size

Tensors = list["gs.Tensor | None"]


@rule("Gelu", "BiasGelu", domain=MICROSOFT)
def gelu_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has BiasGelu, and had Gelu before ONNX; it is a product with an Erf."""
    x = _plus(g, node.inputs[0], g.input(node, 1))
    if g.opset >= 20:
        return g.op.Gelu(x)
    kind = g.dtype(x)
    risen = g.op.Add(g.op.Erf(g.op.Mul(x, g.constant(math.sqrt(0.5), kind))), g.constant(1, kind))
    return g.op.Mul(g.op.Mul(x, risen), g.constant(0.5, kind))


@rule("FastGelu", domain=MICROSOFT)
def fast_gelu_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has FastGelu; it is a product with a Tanh."""
    x = _plus(g, node.inputs[0], g.input(node, 1))
    if g.opset >= 20:
        return g.op.Gelu(x, approximate="tanh")
    kind = g.dtype(x)
    slope = math.sqrt(2 / math.pi)
    inner = g.op.Add(g.op.Mul(g.op.Mul(x, x), g.constant(0.044715 * slope, kind)), g.constant(slope, kind))
    risen = g.op.Add(g.op.Tanh(g.op.Mul(x, inner)), g.constant(1, kind))
    return g.op.Mul(g.op.Mul(x, risen), g.constant(0.5, kind))


@rule("QuickGelu", domain=MICROSOFT)
def quick_gelu_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has QuickGelu; it is a product with a Sigmoid."""
    x = node.inputs[0]
    steepness = g.constant(float(node.attrs.get("alpha", 1.702)), g.dtype(x))
    return g.op.Mul(x, g.op.Sigmoid(g.op.Mul(x, steepness)))


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_norm_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has this operator; it is the normalisation of a sum."""
    _no_statistics(node, g)
    plain = node.op == "SkipLayerNormalization"
    x, skip, gamma = node.inputs[:3]
    beta = g.input(node, 3) if plain else None
    total = _plus(g, _plus(g, x, g.input(node, 4 if plain else 3)), skip)
    epsilon = float(node.attrs.get("epsilon", 1e-12))
    y = _layer_norm(g, total, gamma, beta, epsilon) if plain else _rms_norm(g, total, gamma, -1, epsilon)
    return [y, None, None, total][: len(node.outputs)]


@rule("SimplifiedLayerNormalization")
def simplified_layer_norm_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has SimplifiedLayerNormalization; it is ONNX's RMSNormalization, by another name and older."""
    if len(node.outputs) > 1 and g.used(node.outputs[1]):
        g.decline("something reads its second output")
    x, gamma = node.inputs
    return _rms_norm(g, x, gamma, int(node.attrs.get("axis", -1)), float(node.attrs.get("epsilon", 1e-5)))


@rule("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_norm_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has EmbedLayerNormalization; it is the normalisation of a sum of rows of tables."""
    ids, segments, words, places, kinds, gamma, beta, mask, given = (g.input(node, index) for index in range(9))
    assert ids is not None and words is not None and places is not None and gamma is not None and beta is not None
    if given is None:
        given = g.unsqueeze(iota(g, size(g, ids, 1)), [0])
    total = g.op.Add(g.op.Gather(words, ids, axis=0), g.op.Gather(places, given, axis=0))
    if segments is not None and kinds is not None:
        total = g.op.Add(total, g.op.Gather(kinds, segments, axis=0))
    results: Tensors = [_layer_norm(g, total, gamma, beta, float(node.attrs.get("epsilon", 1e-12)))]
    if len(node.outputs) > 1:
        count = None
        if g.used(node.outputs[1]):
            if mask is None:
                g.decline("something reads how many tokens its mask leaves, and it has none")
            chosen = g.cast(g.op.Equal(mask, g.constant(1, g.dtype(mask))), np.int32)
            count = g.reduce("ReduceSum", chosen, [1])
        results.append(count)
    return [*results, total][: len(node.outputs)]


@rule("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has this operator; it is a MatMul of transposed tensors, and a factor."""
    sides = [_turned(node, g, node.inputs[index], "AB"[index]) for index in (0, 1)]
    y, factor = g.op.MatMul(*sides), float(node.attrs.get("alpha", 1))
    return y if factor == 1 else g.op.Mul(y, g.constant(factor, g.dtype(node.inputs[0])))


def _turned(node: gs.Node, g: Builder, x: gs.Tensor, side: str) -> gs.Tensor:
    rank = len(g.shape(x))
    order = list(range(rank))
    if rank > 2 and node.attrs.get(f"transBatch{side}", 0):
        order = [*order[1:-1], 0, rank - 1]
    if rank > 1 and node.attrs.get(f"trans{side}", 0):
        order[-2:] = order[:-3:-1]
    return x if order == list(range(rank)) else g.op.Transpose(x, perm=order)


@rule("FusedGemm", domain=MICROSOFT)
def fused_gemm_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has FusedGemm; it is a Gemm and an activation."""
    own = {name: value for name, value in node.attrs.items() if name in ("alpha", "beta", "transA", "transB")}
    more = {name: node.attrs.get(f"activation_{name}") for name in ("alpha", "beta", "gamma")}
    return _activated(g, g.node("Gemm", node.inputs, own), node, more)


@rule("FusedConv", domain=MICROSOFT)
def fused_conv_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """Only ONNX Runtime has FusedConv; it is a Conv, a sum and an activation."""
    own = {name: value for name, value in node.attrs.items() if name not in ("activation", "activation_params")}
    y = g.node("Conv", [node.inputs[0], node.inputs[1], g.input(node, 2)], own)
    added, given = g.input(node, 3), list(node.attrs.get("activation_params") or [])
    names = ("min", "max") if node.attrs.get("activation") == "Clip" else ("alpha", "beta")
    return _activated(g, _plus(g, y, added), node, dict(zip(names, given, strict=False)))


def _activated(g: Builder, y: gs.Tensor, node: gs.Node, attrs: dict[str, Any]) -> gs.Tensor:
    op = node.attrs.get("activation")
    if not op:
        return y
    if op == "Clip":
        return g.node("Clip", [y, *(g.constant(attrs[name], g.dtype(y)) for name in ("min", "max"))], {})
    schema_attrs = _ACTIVATIONS.get(op)
    if schema_attrs is None:
        g.decline(f"its activation is {op}")
    return g.node(op, [y], {name: attrs.get(name) for name in schema_attrs})


_ACTIVATIONS = {
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "Relu": (),
    "Selu": ("alpha", "gamma"),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "Tanh": (),
    "ThresholdedRelu": ("alpha",),
}
"""What ONNX Runtime fuses into others, with its attributes."""


@rule("Trilu", "GridSample", "ExpandDims", domain=MICROSOFT)
def older_operator_of_the_standard(node: gs.Node, g: Builder) -> Replacement:
    """ONNX Runtime's own operator, from before ONNX had it, became ONNX's."""
    if node.op == "ExpandDims":
        return g.unsqueeze(node.inputs[0], [int(g.value(node.inputs[1]).item())])
    if not onnx.defs.has(node.op, g.opset, ""):
        g.decline(
            f"ONNX has no {node.op} at opset {g.opset}: let onnx.version_converter bring the model to 16 or newer"
        )
    attrs = dict(node.attrs)
    if node.op == "GridSample" and g.opset >= 20:
        mode = str(attrs.get("mode", "bilinear"))
        attrs["mode"] = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    return g.node(node.op, [g.input(node, index) for index in range(len(node.inputs))], attrs)


def _plus(g: Builder, x: gs.Tensor, other: gs.Tensor | None) -> gs.Tensor:
    if other is None:
        return x
    total: gs.Tensor = g.op.Add(x, other)
    return total


def _no_statistics(node: gs.Node, g: Builder) -> None:
    if any(g.used(output) for output in node.outputs[1:3]):
        g.decline("something reads its mean or its deviation")


def _layer_norm(g: Builder, x: gs.Tensor, gamma: gs.Tensor, beta: gs.Tensor | None, epsilon: float) -> gs.Tensor:
    if g.opset >= 17:
        result: gs.Tensor = g.op.LayerNormalization(x, gamma, beta, axis=-1, epsilon=epsilon)
        return result
    last = [len(g.shape(x)) - 1]
    normal = g.cast(normalised(g, _widened(g, x), last, epsilon)[0], g.dtype(x))
    return _plus(g, g.op.Mul(normal, gamma), beta)


def _rms_norm(g: Builder, x: gs.Tensor, gamma: gs.Tensor, axis: int, epsilon: float) -> gs.Tensor:
    rank = len(g.shape(x))
    axes = list(range(axis % rank, rank))
    normal, _ = by_root_mean_square(g, _widened(g, x), axes, epsilon)
    result: gs.Tensor = g.op.Mul(g.cast(normal, g.dtype(x)), gamma)
    return result


def _widened(g: Builder, x: gs.Tensor) -> gs.Tensor:
    return x if g.dtype(x) == np.float64 else g.cast(x, np.float32)


# --- examples ----------------------------------------------------------------------------------------------------


def several(g: Builder, op: str, inputs: list[Any], shapes: list[list[Any] | None], **attrs: Any) -> list[gs.Tensor]:
    """As ``foreign``, of a node with several outputs in float32; None: one that is left out."""
    made = [
        gs.Variable("") if shape is None else gs.Variable(g.names.new(f"{g.stem}/{op}"), np.dtype(np.float32), shape)
        for shape in shapes
    ]
    g.made.append(Node(op, g.names.new(op), attrs, [g.tensor(item) for item in inputs], made, domain=MICROSOFT))
    return [item for item in made if item.name]


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _gelus(opset: int) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        shape = ["n", 5, 8]
        inputs: list[tuple[str, list[Any]]] = [
            ("Gelu", [x]),
            ("BiasGelu", [x, numbers(8)]),
            ("FastGelu", [x]),
            ("FastGelu", [x, numbers(8)]),
        ]
        return [foreign(g, op, given, np.float32, shape) for op, given in inputs]

    return example({"x": ("float32", ["n", 5, 8])}, build, opset)


@gelu_of_the_standard.example
@fast_gelu_of_the_standard.example
def gelus_with_and_without_a_bias() -> gs.Graph:
    return _gelus(20)


@gelu_of_the_standard.example
@fast_gelu_of_the_standard.example
def gelus_before_onnx_had_one() -> gs.Graph:
    return _gelus(14)


@quick_gelu_of_the_standard.example
def quick_gelu() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 8])}, lambda g, x: foreign(g, "QuickGelu", [x], np.float32, ["n", 8], alpha=1.5), 17
    )


def _skips(opset: int) -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, skip: gs.Tensor) -> list[gs.Tensor]:
        shape, gamma, beta, bias = ["n", 5, 8], numbers(8), numbers(8, seed=1), numbers(8, seed=2)
        norm, simple = "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"
        return [
            *several(g, norm, [x, skip, gamma, beta, bias], [shape, None, None, shape], epsilon=1e-6),
            *several(g, norm, [x, skip, gamma], [shape], epsilon=1e-3),
            *several(g, norm, [x, numbers(1, 5, 8), gamma, beta], [shape], epsilon=1e-3),
            *several(g, simple, [x, skip, gamma, bias], [shape, None, None, shape], epsilon=1e-6),
            *several(g, simple, [x, skip, gamma], [shape], epsilon=1e-6),
        ]

    return example({"x": ("float32", ["n", 5, 8]), "skip": ("float32", ["n", 5, 8])}, build, opset)


@skip_norm_of_the_standard.example
def sums_that_are_normalised() -> gs.Graph:
    return _skips(18)


@skip_norm_of_the_standard.example
def sums_before_onnx_had_layer_normalization() -> gs.Graph:
    return _skips(14)


def _tables(opset: int, **left_out: bool) -> gs.Graph:
    def build(g: Builder, ids: gs.Tensor, segments: gs.Tensor, mask: gs.Tensor) -> list[gs.Tensor]:
        ids, segments = (g.op.Clip(item, *np.array([0, most], np.int32)) for item, most in ((ids, 19), (segments, 1)))
        words, places, kinds = numbers(20, 8), numbers(16, 8, seed=1), numbers(2, 8, seed=2)
        some = left_out.get("segments")
        inputs = [ids, None if some else segments, words, places, None if some else kinds, numbers(8), numbers(8)]
        count = gs.Variable(g.names.new("count"), np.dtype(np.int32), ["n"])
        y, total = (gs.Variable(g.names.new("y"), np.dtype(np.float32), ["n", "t", 8]) for _ in range(2))
        given = [g.tensor(item) for item in [*inputs, mask]]
        attrs = {"epsilon": 1e-6, "mask_index_type": 1}
        op = "EmbedLayerNormalization"
        g.made.append(Node(op, g.names.new(op), attrs, given, [y, count, total], domain=MICROSOFT))
        return [y, count, total]

    sizes: list[int | str] = ["n", "t"]
    return example({"ids": ("int32", sizes), "segments": ("int32", sizes), "mask": ("int32", sizes)}, build, opset)


@embed_layer_norm_of_the_standard.example
def embeddings_with_segments() -> gs.Graph:
    return _tables(17)


@embed_layer_norm_of_the_standard.example
def embeddings_without() -> gs.Graph:
    return _tables(14, segments=True)


@simplified_layer_norm_of_the_standard.example
def of_onnxs_own_domain() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        y = foreign(g, "SimplifiedLayerNormalization", [x, numbers(8)], np.float32, ["n", 5, 8], axis=-1, epsilon=1e-6)
        g.made[-1].domain = ""
        return y

    return example({"x": ("float32", ["n", 5, 8])}, build, 17)


@fused_matmul_of_the_standard.example
def products_of_transposed_tensors() -> gs.Graph:
    def build(g: Builder, a: gs.Tensor, b: gs.Tensor) -> list[gs.Tensor]:
        scaled = foreign(g, "FusedMatMul", [a, b], np.float32, ["n", 3, 5, 7], transB=1, alpha=0.125)
        turned = foreign(g, "FusedMatMul", [a, a], np.float32, ["n", 3, 4, 4], transA=1)
        batches = {"transBatchA": 1, "transA": 1, "alpha": 2.0}
        joined = foreign(
            g, "FusedMatMul", [numbers(5, 2, 3, 4), numbers(2, 3, 5, 6)], np.float32, [2, 3, 4, 6], **batches
        )
        older = foreign(g, "TransposeMatMul", [a, b], np.float32, ["n", 3, 5, 7], transB=1, alpha=0.5)
        return [scaled, turned, joined, older]

    return example({"a": ("float32", ["n", 3, 5, 4]), "b": ("float32", ["n", 3, 7, 4])}, build, 17)


@fused_gemm_of_the_standard.example
def gemms_with_activations() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        given = [x, numbers(6, 4), numbers(6)]
        return [
            foreign(g, "FusedGemm", given, np.float32, ["n", 6], transB=1, alpha=0.5, activation="Relu"),
            foreign(
                g, "FusedGemm", given, np.float32, ["n", 6], transB=1, activation="LeakyRelu", activation_alpha=0.2
            ),
        ]

    return example({"x": ("float32", ["n", 4])}, build, 17)


@fused_conv_of_the_standard.example
def convolutions_with_sums_and_activations() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor, z: gs.Tensor) -> list[gs.Tensor]:
        given = [x, numbers(4, 3, 3, 3), numbers(4)]
        attrs = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3], "strides": [1, 1], "dilations": [1, 1], "group": 1}
        shape = ["n", 4, 6, 6]
        more: list[tuple[list[Any], dict[str, Any]]] = [
            ([z], {"activation": "Relu"}),
            ([], {"activation": "LeakyRelu", "activation_params": [0.2]}),
            ([], {"activation": "Clip", "activation_params": [-0.5, 1.5]}),
            ([], {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]}),
            ([z], {}),
        ]
        return [foreign(g, "FusedConv", [*given, *extra], np.float32, shape, **attrs, **own) for extra, own in more]

    return example({"x": ("float32", ["n", 3, 6, 6]), "z": ("float32", ["n", 4, 6, 6])}, build, 17)


@older_operator_of_the_standard.example
def operators_that_onnx_has_now() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        grid = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 2)).astype(np.float32)
        return [
            foreign(g, "Trilu", [x, np.array(1)], np.float32, [2, 3, 5, 5], upper=0),
            foreign(
                g,
                "GridSample",
                [x, grid],
                np.float32,
                [2, 3, 3, 4],
                mode="bilinear",
                padding_mode="zeros",
                align_corners=0,
            ),
            foreign(g, "ExpandDims", [x, np.array(1, np.int32)], np.float32, [2, 1, 3, 5, 5]),
        ]

    return example({"x": ("float32", [2, 3, 5, 5])}, build, 20)
