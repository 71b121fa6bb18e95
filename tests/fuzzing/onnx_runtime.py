"""Models for the rules of passes/rules/onnx_runtime.py and onnx_runtime_attention.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.rules.onnx_runtime import several
from passes.rules.quantised_operators import foreign

from . import Case, Sketch, Tensors, strategy

NOTHING = gs.Variable.empty()
OPSETS = (13, 14, 17, 18, 20, 23)


def given(t: Tensors, *names: str) -> list[gs.Tensor]:
    """The tensors of these names; those that were not drawn are left out."""
    found = [t.get(name, NOTHING) for name in names]
    while found and found[-1] is NOTHING:
        found.pop()
    return found


def floats(s: Sketch, *sizes: int) -> np.ndarray:
    return s.random.standard_normal(sizes).astype(np.float32)


def mask(s: Sketch, *sizes: int) -> np.ndarray:
    """Leaves one key at least: where all are hidden, what is left are the last digits of large numbers."""
    kept = s.random.random(sizes) > 0.3
    kept[..., 0] = True
    return kept.astype(np.int32)


@strategy("gelu_of_the_standard", "fast_gelu_of_the_standard")
def gelus(s: Sketch) -> Case:
    sizes, kind = s.sizes(1, 4, empty=True), s.pick("float32", "float32", "float16")
    s.input("x", kind, sizes)
    s.operand("bias", s.values(kind, sizes[-1:]))
    opset = s.pick(*OPSETS)

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        calls = [("Gelu", ["x"]), ("BiasGelu", ["x", "bias"]), ("FastGelu", ["x"]), ("FastGelu", ["x", "bias"])]
        return [foreign(g, op, given(t, *names), kind, g.shape(t["x"])) for op, names in calls]

    return s.model(build, opset, tolerance=None if kind == "float16" else 1e-4)


@strategy("quick_gelu_of_the_standard")
def quick_gelu(s: Sketch) -> Case:
    s.input("x", "float32", s.sizes(0, 4, empty=True))
    attrs = {"alpha": s.pick(0.5, 1.702, -1.0)} if s.flag() else {}
    return s.model(
        lambda g, t: foreign(g, "QuickGelu", [t["x"]], np.float32, g.shape(t["x"]), **attrs), s.pick(*OPSETS)
    )


@strategy("skip_norm_of_the_standard")
def skips(s: Sketch) -> Case:
    op = s.pick("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
    sizes = s.sizes(2, 3, high=5)
    s.input("x", "float32", sizes)
    shapes = [sizes, [1, *sizes[1:]], sizes[1:]] if len(sizes) == 3 else [sizes]
    s.operand("skip", floats(s, *s.pick(*shapes)))
    for name in ("gamma", "beta", "bias"):
        if name == "gamma" or s.flag():
            s.operand(name, floats(s, sizes[-1]))
    epsilon, total = s.pick(1e-3, 1e-5, 1e-12), s.flag()

    def build(g: Builder, t: Tensors) -> Sequence[gs.Tensor]:
        names = ["x", "skip", "gamma", *(["beta"] if op == "SkipLayerNormalization" else []), "bias"]
        shape = g.shape(t["x"])
        shapes = [shape, None, None, shape] if total else [shape]
        return several(g, op, given(t, *names), shapes, epsilon=epsilon)

    return s.model(build, s.pick(*OPSETS), tolerance=1e-3)  # of few numbers that are alike, by a small deviation


@strategy("simplified_layer_norm_of_the_standard")
def simplified(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    axis = s.axis(len(sizes))
    s.input("x", "float32", sizes)
    s.operand("scale", floats(s, *sizes[axis:]))
    attrs = {"axis": axis, "epsilon": s.pick(1e-3, 1e-6), "stash_type": 1}

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        y = foreign(g, "SimplifiedLayerNormalization", [t["x"], t["scale"]], np.float32, g.shape(t["x"]), **attrs)
        g.made[-1].domain = ""
        return y

    return s.model(build, s.pick(*OPSETS), tolerance=1e-4)


@strategy("embed_layer_norm_of_the_standard")
def embeddings(s: Sketch) -> Case:
    batch, tokens, width = s.integer(1, 3), s.integer(1, 5), s.integer(1, 6)
    draw = s.random.integers
    s.input("ids", np.int32, draw(0, 9, (batch, tokens)).astype(np.int32))
    for name, rows in (("words", 9), ("places", 7), ("gamma", 0), ("beta", 0)):
        s.operand(name, floats(s, rows, width) if rows else floats(s, width))
    if s.flag():
        s.input("segments", np.int32, draw(0, 2, (batch, tokens)).astype(np.int32))
        s.operand("kinds", floats(s, 2, width))
    if s.flag():
        s.input("mask", np.int32, draw(0, 2, (batch, tokens)).astype(np.int32))
    if s.flag():
        s.operand("at", draw(0, 7, (s.pick(1, batch), tokens)).astype(np.int32))
    counts, total = s.flag(), s.flag()

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        names = ("ids", "segments", "words", "places", "kinds", "gamma", "beta", "mask", "at")
        shape = [*g.shape(t["ids"]), width]
        shapes: list[list[Any] | None] = [shape, g.shape(t["ids"])[:1] if counts else None]
        made = several(g, "EmbedLayerNormalization", given(t, *names), [*shapes, *([shape] if total else [])])
        if counts:
            made[1].dtype = np.dtype(np.int32)
        return made

    return s.model(build, s.pick(*OPSETS), tolerance=1e-3)


@strategy("fused_matmul_of_the_standard")
def matmuls(s: Sketch) -> Case:
    op = s.pick("FusedMatMul", "TransposeMatMul")
    rank, m, k, n = s.integer(2, 4), s.integer(1, 4), s.integer(1, 4), s.integer(1, 4)
    batch = [s.integer(1, 3) for _ in range(rank - 2)]
    attrs: dict[str, Any] = {"alpha": s.pick(1.0, 0.25, -2.0)}
    for name, side, shape in (("a", "A", [m, k]), ("b", "B", [k, n])):
        turned = s.flag()
        attrs[f"trans{side}"] = int(turned)
        sizes = [*batch, *(shape[::-1] if turned else shape)]
        if op == "FusedMatMul" and rank > 2 and s.rarely():
            attrs[f"transBatch{side}"] = 1
            sizes = [sizes[-2], *batch, sizes[-1]]
        s.operand(name, floats(s, *sizes))
    if not s.inputs:
        s.input("a", "float32", s.constants.pop("a"))

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return foreign(g, op, [t["a"], t["b"]], np.float32, [None] * rank, **attrs)

    return s.model(build, s.pick(*OPSETS), tolerance=1e-4)


ACTIVATIONS: list[tuple[str, dict[str, float]]] = [
    ("Relu", {}),
    ("Tanh", {}),
    ("Sigmoid", {}),
    ("LeakyRelu", {"alpha": 0.2}),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
]


@strategy("fused_gemm_of_the_standard")
def gemms(s: Sketch) -> Case:
    m, k, n = s.integer(1, 4), s.integer(1, 4), s.integer(1, 4)
    turned = [s.flag(), s.flag()]
    s.input("a", "float32", [k, m] if turned[0] else [m, k])
    s.operand("b", floats(s, *([n, k] if turned[1] else [k, n])))
    if s.flag():
        s.operand("c", floats(s, *s.pick([n], [m, n], [1, n])))
    op, more = s.pick(*ACTIVATIONS)
    attrs = {"transA": int(turned[0]), "transB": int(turned[1]), "alpha": s.pick(1.0, 0.5), "beta": s.pick(1.0, 2.0)}
    attrs |= {"activation": op} | {f"activation_{name}": value for name, value in more.items()}
    return s.model(
        lambda g, t: foreign(g, "FusedGemm", given(t, "a", "b", "c"), np.float32, [None, n], **attrs),
        s.pick(*OPSETS),
        tolerance=1e-4,
    )


@strategy("fused_conv_of_the_standard")
def convolutions(s: Sketch) -> Case:
    group, kernel, stride, dilation = s.pick(1, 2), s.integer(1, 3), s.integer(1, 2), s.integer(1, 2)
    into, out = group * s.integer(1, 2), group * s.integer(1, 2)
    batch, high, wide, pad = s.integer(1, 2), s.integer(5, 7), s.integer(5, 7), s.integer(0, 1)
    s.input("x", "float32", [batch, into, high, wide])
    s.constants["w"] = floats(s, out, into // group, kernel, kernel)
    if s.flag():
        s.constants["b"] = floats(s, out)
    sizes = [(size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size in (high, wide)]
    if s.flag():
        s.operand("z", floats(s, batch, out, *sizes))
    op, more = s.pick(*ACTIVATIONS, ("Clip", {"min": -0.5, "max": 0.7}), ("", {}))
    attrs: dict[str, Any] = {"pads": [pad] * 4, "strides": [stride] * 2, "dilations": [dilation] * 2, "group": group}
    attrs |= {"activation": op} if op else {}
    attrs |= {"activation_params": list(more.values())} if more else {}
    return s.model(
        lambda g, t: foreign(g, "FusedConv", given(t, "x", "w", "b", "z"), np.float32, [None, out, *sizes], **attrs),
        s.pick(*OPSETS),
        tolerance=1e-4,
    )


@strategy("older_operator_of_the_standard")
def older(s: Sketch) -> Case:
    op = s.pick("Trilu", "GridSample", "ExpandDims")
    opset = s.pick(*OPSETS)
    sizes = [s.integer(1, 3), s.integer(1, 3), s.integer(2, 5), s.integer(2, 5)]
    s.input("x", "float32", sizes)
    if op == "Trilu":
        s.constants["k"] = np.array(s.integer(-3, 3))
        attrs, shape = {"upper": int(s.flag())}, sizes
    elif op == "ExpandDims":
        place = s.integer(-5, 4)
        s.constants["k"] = np.array(place, np.int32)
        attrs, shape = {}, [*sizes[: place % 5], 1, *sizes[place % 5 :]]
    else:
        grid = s.random.uniform(-1.3, 1.3, (sizes[0], 3, 4, 2)).astype(np.float32)
        s.operand("k", grid)
        attrs = {
            "mode": s.pick("bilinear", "nearest", "bicubic"),
            "padding_mode": s.pick("zeros", "border", "reflection"),
            "align_corners": int(s.flag()),
        }
        shape = [*sizes[:2], 3, 4]
    return s.model(
        lambda g, t: foreign(g, op, [t["x"], t["k"]], np.float32, [None] * len(shape), **attrs), opset, tolerance=1e-4
    )


@strategy("attention_of_the_standard")
def attention(s: Sketch) -> Case:
    batch, tokens, heads, width = s.integer(1, 3), s.integer(1, 4), s.integer(1, 3), s.pick(2, 4)
    sizes = [heads * width] * 2 + [heads * s.pick(width, 3)]
    equal = len(set(sizes)) == 1
    causal, before = s.flag(), s.pick(0, 0, 2) if equal else 0
    s.input("x", "float32", [batch, tokens, 5])
    s.operand("w", floats(s, 5, sum(sizes)) / 2)
    s.operand("b", floats(s, sum(sizes)))
    form = s.pick("none", "raw", "each", "lengths")
    if form == "raw":
        s.operand("mask", mask(s, batch, tokens + before))
    elif form == "each" and not before:
        s.operand("mask", mask(s, batch, tokens, tokens))
    elif form == "lengths" and not before:
        s.constants["mask"] = s.random.integers(1, tokens + 1, batch).astype(np.int32)
    if before:
        s.operand("past", floats(s, 2, batch, heads, before, width))
    if s.rarely():
        s.operand("bias", floats(s, s.pick(1, batch), heads, tokens, tokens + before))
    attrs: dict[str, Any] = {"num_heads": heads, "unidirectional": int(causal)}
    attrs |= {} if equal else {"qkv_hidden_sizes": sizes}
    attrs |= {"scale": 0.3} if s.flag() else {}

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        shapes: list[list[Any] | None] = [[None, None, sizes[2]]]
        if before:
            shapes.append([2, None, heads, None, width])
        return several(g, "Attention", given(t, "x", "w", "b", "mask", "past", "bias"), shapes, **attrs)

    return s.model(build, s.pick(*OPSETS), tolerance=1e-4)


@strategy("quantised_attention_of_the_standard")
def quantised_attention(s: Sketch) -> Case:
    batch, tokens, heads, width = s.integer(1, 3), s.integer(1, 4), s.integer(1, 3), s.pick(2, 4)
    together = 3 * heads * width
    s.input("x", np.uint8, s.random.integers(0, 256, (batch, tokens, 5)).astype(np.uint8))
    s.constants["w"] = s.random.integers(-99, 99, (5, together)).astype(np.int8)
    s.operand("b", floats(s, together))
    each = together if s.flag() else 1
    s.constants["x_scale"] = np.array(0.02, np.float32)
    s.constants["scale"] = s.random.uniform(0.005, 0.02, each).astype(np.float32).reshape([each] if each > 1 else [])
    if s.flag():
        s.operand("mask", mask(s, batch, tokens))
    s.constants["x_zero"] = np.array(s.integer(0, 255), np.uint8)
    if s.flag():
        s.constants["zero"] = np.zeros(s.constants["scale"].shape, np.int8)
    attrs = {"num_heads": heads, "unidirectional": int(s.flag())}

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        names = ("x", "w", "b", "x_scale", "scale", "mask", "x_zero", "zero")
        return foreign(g, "QAttention", given(t, *names), np.float32, [None, None, heads * width], **attrs)

    return s.model(build, s.pick(*OPSETS), tolerance=1e-3)


@strategy("multi_head_attention_of_the_standard")
def heads_of_several(s: Sketch) -> Case:
    batch, tokens, heads, width = s.integer(1, 3), s.integer(1, 4), s.integer(1, 3), s.pick(2, 4)
    other, apart, before = s.pick(tokens, 3), s.rarely(), 0
    s.input("q", "float32", [batch, tokens, heads * width])
    for name in ("k", "v"):
        s.operand(name, floats(s, *((batch, heads, other, width) if apart else (batch, other, heads * width))))
    if not apart and s.rarely():
        before = 2
        for name in ("past_k", "past_v"):
            s.operand(name, floats(s, batch, heads, before, width))
    if s.flag() and not before:
        s.operand("b", floats(s, 3 * heads * width))
    if s.flag():
        s.operand("mask", mask(s, batch, other + before))
    if s.rarely():
        s.operand("bias", floats(s, s.pick(1, batch), s.pick(1, heads), tokens, other + before))
    attrs: dict[str, Any] = {"num_heads": heads} | ({"scale": 0.4} if s.flag() else {})
    if other == tokens and s.flag():
        attrs["unidirectional"] = 1

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        shapes: list[list[Any] | None] = [[None, None, heads * width]]
        if before:
            shapes += [[None, heads, None, width]] * 2
        names = ("q", "k", "v", "b", "mask", "bias", "past_k", "past_v")
        return several(g, "MultiHeadAttention", given(t, *names), shapes, **attrs)

    return s.model(build, s.pick(*OPSETS), tolerance=1e-4)


@strategy("rotary_embedding_of_the_standard")
def turns(s: Sketch) -> Case:
    batch, tokens, heads, width = s.integer(1, 2), s.integer(1, 4), s.integer(1, 3), s.pick(4, 8, 16)
    whole, part = s.flag(), s.rarely() and width > 4
    half = width // 4 if part else width // 2
    s.input("x", "float32", [batch, tokens, heads * width] if whole else [batch, heads, tokens, width])
    most = 9
    if s.flag():
        s.operand("at", np.array([s.integer(0, most - tokens)]))
    else:
        s.operand("at", s.random.integers(0, most, (batch, tokens)))
    angles = s.random.uniform(-3, 3, (most, half))
    s.operand("cosines", np.cos(angles).astype(np.float32), static=True)
    s.operand("sines", np.sin(angles).astype(np.float32), static=True)
    attrs: dict[str, Any] = {"interleaved": int(s.flag())}
    attrs |= {"num_heads": heads, "rotary_embedding_dim": 2 * half} if part else {}

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return foreign(
            g, "RotaryEmbedding", given(t, "x", "at", "cosines", "sines"), np.float32, g.shape(t["x"]), **attrs
        )

    return s.model(build, s.pick(*OPSETS), tolerance=1e-4)


@strategy("group_query_attention_of_the_standard")
def groups(s: Sketch) -> Case:
    batch, shared, width = s.integer(1, 3), s.integer(1, 2), 16
    heads = shared * s.integer(1, 3)
    room = s.pick(0, 4, 6)
    tokens = s.integer(1, 4) if not room else 1
    total = tokens if not room else s.integer(2, room + 1)
    lengths = s.random.integers(1, total, batch) if room and s.flag() else np.full(batch, total - 1)
    packed = s.flag()
    s.input("q", "float32", [batch, tokens, (heads + 2 * shared if packed else heads) * width])
    if not packed:
        for name in ("k", "v"):
            s.operand(name, floats(s, batch, tokens, shared * width))
    if room:
        for name in ("past_k", "past_v"):
            s.operand(name, floats(s, batch, shared, room, width))
    s.operand("lengths", lengths.astype(np.int32))
    s.operand("total", np.array(total, np.int32))
    attrs: dict[str, Any] = {"num_heads": heads, "kv_num_heads": shared}
    if s.flag():
        angles = s.random.uniform(-3, 3, (12, width // 2))
        s.constants |= {"cosines": np.cos(angles).astype(np.float32), "sines": np.sin(angles).astype(np.float32)}
        attrs |= {"do_rotary": 1, "rotary_interleaved": int(s.flag())}
    attrs |= {"softcap": 3.0} if s.rarely() else {}
    attrs |= {"local_window_size": s.integer(1, 4)} if s.rarely() else {}
    attrs |= {"scale": 0.2} if s.flag() else {}

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        names = ("q", "k", "v", "past_k", "past_v", "lengths", "total", "cosines", "sines")
        cached: list[Any] = [None, shared, None, width]
        shapes: list[list[Any] | None] = [[None, None, heads * width], cached, cached]
        return several(g, "GroupQueryAttention", given(t, *names), shapes, **attrs)

    return s.model(build, s.pick(*OPSETS), tolerance=1e-4)
