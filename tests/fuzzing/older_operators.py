"""Models for rules that write operators which older parsers lack: norms, sequences, sums over indices, samples."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Case, Sketch, Tensors, strategy


@strategy("layer_norm_as_reductions")
def layer_norm(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    axis = s.axis(len(sizes))
    dtype = s.pick("float32", "float32", "float64", "float16")
    s.input("x", dtype, sizes)
    inner = sizes[axis % len(sizes) :]
    s.operand("scale", s.values(dtype, inner), static=True)
    if s.flag():
        s.operand("bias", s.values(dtype, inner), static=True)
    outputs = s.pick(1, 1, 3)
    attrs = {"axis": axis, "epsilon": s.pick(None, 1e-3)}

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        made = g.op.LayerNormalization(t["x"], t["scale"], t.get("bias"), outputs=outputs, **attrs)
        return list(made) if outputs > 1 else [made]

    return s.model(build, opset=s.pick(17, 20), tolerance=2e-2 if dtype == "float16" else 1e-4)


@strategy("rms_norm_as_reduction")
def rms_norm(s: Sketch) -> Case:
    sizes = s.sizes(1, 4)
    axis = s.axis(len(sizes))
    s.input("x", "float32", sizes)
    s.operand("scale", s.values("float32", sizes[axis % len(sizes) :]), static=True)
    attrs = {"axis": axis, "epsilon": s.pick(None, 1e-3)}
    return s.model(lambda g, t: g.op.RMSNormalization(t["x"], t["scale"], **attrs), opset=23, tolerance=1e-4)


@strategy("group_norm_as_reductions")
def group_norm(s: Sketch) -> Case:
    groups = s.integer(1, 3)
    channels = groups * s.integer(1, 3)
    s.input("x", "float32", [s.integer(1, 3), channels, *s.sizes(0, 3)])
    for name in ("scale", "bias"):
        s.operand(name, s.values("float32", [channels]), static=True)
    attrs = {"num_groups": groups, "epsilon": s.pick(None, 1e-3)}

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        y: gs.Tensor = g.op.GroupNormalization(t["x"], t["scale"], t["bias"], **attrs)
        y.dtype, y.shape = t["x"].dtype, t["x"].shape  # ONNX infers none
        return y

    return s.model(build, opset=21, tolerance=1e-4)


@strategy("einsum_as_products")
def einsum(s: Sketch) -> Case:
    sizes = {letter: s.integer(1, 4) for letter in "abcd"}
    hidden = s.sizes(0, 2)
    terms = []
    for index in range(s.integer(1, 3)):
        term = [s.pick(*sizes) for _ in range(s.integer(0, 3))]
        shape = [sizes[letter] for letter in term]
        if hidden and s.flag():
            place = s.integer(0, len(term))
            shape[place:place] = [s.pick(1, size) for size in hidden]
            term.insert(place, "...")
        terms.append("".join(term))
        s.input(f"x{index}", s.pick("float32", "float32", "int32") if index == 0 else s.inputs["x0"][0], shape)
    for name, array in s.feeds.items():
        if array.dtype.kind == "i":
            s.feeds[name] = np.asarray(np.clip(array, -9, 9))
    equation = ",".join(terms)
    used = sorted(set(equation) - set(".,"))
    if s.flag() or "..." in equation:
        result = [letter for letter in used if s.flag()]
        if "..." in equation:
            result.insert(s.integer(0, len(result)), "...")
        equation += "->" + "".join(result)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        made: gs.Tensor = g.op.Einsum(*t.values(), equation=equation)
        return made

    def reference(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [np.einsum(equation, *feeds.values(), dtype=next(iter(feeds.values())).dtype)]

    return s.model(build, opset=s.pick(12, 18), reference=reference, tolerance=1e-4)


@strategy("member_of_a_sequence", "length_of_a_sequence", "members_joined")
def sequences(s: Sketch) -> Case:
    sizes = s.sizes(1, 3, low=2)
    axis = s.axis(len(sizes))
    length = sizes[axis]
    kind = s.pick("ones", "each", "list", "construct")
    s.input("x", s.pick("float32", "int64"), sizes)
    each = s.integer(1, length)
    keeps = s.flag()
    count = {"ones": length, "each": -(-length // each), "list": 2, "construct": 3}[kind]
    place = s.integer(-count, count - 1)
    grown, stacked = s.flag(), s.flag()

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        x = t["x"]
        if kind == "construct":
            members = g.op.SequenceConstruct(x, g.op.Neg(x), g.op.Add(x, x))
        elif kind == "ones":
            members = g.op.SplitToSequence(x, axis=axis, keepdims=int(keeps))
        else:
            parts = g.constant(np.array(each)) if kind == "each" else g.constant([1, length - 1])
            members = g.op.SplitToSequence(x, parts, axis=axis)
        if grown:
            members = g.op.SequenceInsert(members, g.op.SequenceAt(members, g.constant(0)), g.constant(1))
        chosen = g.op.SequenceAt(members, g.constant(place))
        flat = g.op.Reshape(chosen, [-1])  # of known rank
        results = [flat, g.op.SequenceLength(members)]
        same = kind in ("construct", "ones") or (kind == "each" and length % each == 0)
        if (same and stacked) or (kind == "construct" or not (kind == "ones" and not keeps)):
            joined = g.op.ConcatFromSequence(members, axis=axis, new_axis=int(same and stacked))
            results.append(g.op.Reshape(joined, [-1]))
        else:
            results.append(g.op.Reshape(g.op.ConcatFromSequence(members, axis=0, new_axis=1), [-1]))
        return results

    return s.model(build, opset=s.pick(11, 18, 20) if s.inputs["x"][0] == "float32" else 20)


@strategy("volume_sampled_by_gathers")
def volume(s: Sketch) -> Case:
    s.input(
        "x", "float32", s.values("float32", [2, s.integer(1, 3), *(s.integer(1, 4) for _ in range(3))]), static=True
    )
    shape = [2, s.integer(1, 2), s.integer(1, 3), s.integer(1, 3), 3]
    s.input("grid", "float32", s.random.uniform(-1.6, 1.6, shape).astype(np.float32))
    attrs = {
        "mode": s.pick(None, "linear", "nearest"),
        "padding_mode": s.pick(None, "zeros", "border", "reflection"),
        "align_corners": s.pick(None, 0, 1),
    }
    return s.model(lambda g, t: g.op.GridSample(t["x"], t["grid"], **attrs), opset=20, tolerance=1e-4)


@strategy("is_inf_as_comparison")
def is_inf(s: Sketch) -> Case:
    dtype = s.pick("float32", "float32", "float64", "float16")
    values = s.values(dtype, s.sizes(0, 3))
    odd = s.random.choice([np.inf, -np.inf, np.nan, 0.0], values.shape)
    s.input("x", dtype, np.where(s.random.random(values.shape) < 0.5, odd, values).astype(dtype))
    attrs = {"detect_negative": s.pick(None, 0, 1), "detect_positive": s.pick(None, 0, 1)}
    return s.model(lambda g, t: g.op.IsInf(t["x"], **attrs), opset=20)


@strategy("presence_of_a_value", "value_of_an_optional")
def optionals(s: Sketch) -> Case:
    s.input("x", s.pick("float32", "int32"), s.sizes(1, 3))

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        held = g.op.Optional(t["x"]) if s.flag() else t["x"]
        return [g.op.OptionalHasElement(held), g.op.OptionalGetElement(held)]

    return s.model(build, opset=18)


@strategy("place_of_the_extreme_integer")
def extremes(s: Sketch) -> Case:
    sizes = s.sizes(1, 3)
    s.input("x", s.pick("int32", "int8"), sizes)
    attrs = {"axis": s.axis(len(sizes)), "keepdims": s.pick(None, 0, 1), "select_last_index": s.pick(None, 0, 1)}
    op = s.pick("ArgMax", "ArgMin")
    return s.model(lambda g, t: g.node(op, [t["x"]], attrs), opset=s.pick(13, 18))


@strategy("topk_of_integers")
def topk(s: Sketch) -> Case:
    sizes = s.sizes(1, 3)
    axis = s.axis(len(sizes))
    kind = s.pick("int32", "int64")
    s.input("x", kind, s.values("int32", sizes).astype(kind))
    s.constants["k"] = np.array([s.integer(1, sizes[axis])], np.int64)
    attrs = {"axis": axis, "largest": s.pick(None, 0, 1)}

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        return list(g.op.TopK(t["x"], t["k"], outputs=2, **attrs))

    return s.model(build, opset=s.pick(11, 18))
