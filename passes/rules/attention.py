"""FlexAttention (ai.onnx.preview): ``torch.nn.attention.flex_attention`` with its score_mod and prob_mod as bodies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.engine import redirect
from passes.framework import Builder, Replacement, example, rule
from passes.ir import Array, Node, numpy_dtype, scopes
from passes.rules.shapes import reshape, size, times

PREVIEW = "ai.onnx.preview"


@rule("FlexAttention", domain=PREVIEW)
def flex_attention_as_matmuls(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no FlexAttention; it is two products around a Softmax, with the model's own steps in between."""
    query, key, value = node.inputs
    kept = g.dtype(query)
    exact = node.attrs.get("softmax_precision")
    wide = numpy_dtype(exact) if exact else np.dtype(np.float64 if kept == np.float64 else np.float32)
    heads, shared = g.static_dim(query, 1), g.static_dim(key, 1)
    batch, length = size(g, query, 0), size(g, query, 2)
    if heads != shared:  # those that share a key are rows of one matrix
        rows = times(g, heads // shared, length)
        query = reshape(g, query, [batch, shared, rows, size(g, query, 3)])
    scale = node.attrs.get("scale")
    factor = float(scale) if scale is not None else 1 / math.sqrt(g.static_dim(node.inputs[0], 3))
    scores = g.op.MatMul(query, g.op.Transpose(key, perm=[0, 1, 3, 2]))
    scores = g.op.Mul(g.cast(scores, wide), g.constant(factor, wide))
    everyone = [batch, heads, length, size(g, key, 2)]
    if heads != shared:
        scores = reshape(g, scores, everyone)
    scores = _modified(node, g, "score_mod", scores)
    shares = _modified(node, g, "prob_mod", g.op.Softmax(scores, axis=-1))
    if heads != shared:
        shares = reshape(g, shares, [batch, shared, times(g, heads // shared, length), size(g, key, 2)])
    result = g.op.MatMul(g.cast(shares, kept), value)
    return result if heads == shared else reshape(g, result, [batch, heads, length, size(g, value, 3)])


def _modified(node: gs.Node, g: Builder, name: str, x: gs.Tensor) -> gs.Tensor:
    """What the body of this name makes of ``x``; ``x`` where there is none."""
    body = node.attrs.get(name)
    if body is None:
        return x
    for scope in scopes(body, functions=False):
        for item in scope.nodes:
            item.name = g.names.new(f"{g.stem}/{item.name or item.op}")
            for tensor in [*item.outputs, *(given for given in item.inputs if isinstance(given, gs.Constant))]:
                if tensor.name:
                    tensor.name = g.names.new(f"{g.stem}/{tensor.name}")
            for tensor in item.outputs:
                tensor.shape = None  # in letters that mean nothing outside
        for tensor in scope.inputs:
            tensor.name = g.names.new(f"{g.stem}/{tensor.name}")
    (formal,), (result,) = body.inputs, body.outputs
    redirect(formal, x)
    g.made.extend(body.nodes)
    if result is formal:
        return x
    result.dtype, result.shape = x.dtype, list(x.shape) if x.shape is not None else None
    return result


# --- examples ----------------------------------------------------------------------------------------------------


def _flex(
    query: list[int | str],
    key: list[int | str],
    value: list[int | str],
    bodies: Any = None,
    dtype: str = "float32",
    **attrs: Any,
) -> gs.Graph:
    """``bodies``: by attribute, a function of a builder and the scores that builds the body."""

    def build(g: Builder, *tensors: gs.Tensor) -> gs.Tensor:
        given = dict(attrs)
        for name, body in (bodies or {}).items():
            inner = Builder(g.names, g.opset, name)
            scores = gs.Variable(g.names.new("scores"), np.dtype(np.float32), ["B", "H", "L", "S"])
            made = body(inner, scores)
            made.shape = ["B", "H", "L", "S"]
            given[name] = gs.Graph(inner.made, [scores], [made], name=name, opset=g.opset)
        shape = [*query[:3], value[3]]
        result = gs.Variable(g.names.new("attended"), np.dtype(dtype), shape)
        call = Node("FlexAttention", g.names.new("FlexAttention"), given, list(tensors), [result], domain=PREVIEW)
        g.made.append(call)
        return result

    shapes = {"query": query, "key": key, "value": value}
    return example({name: (dtype, shape) for name, shape in shapes.items()}, build, 23)


def _attended(
    change: Callable[[Array], Array] = lambda scores: scores, scale: float | None = None, late: bool = False
) -> Callable[[Mapping[str, Array]], list[Array]]:
    """What attention is, with ``change`` on the scores or (``late``) on their shares."""

    def reference(feeds: Mapping[str, Array]) -> list[Array]:
        query, key, value = (feeds[name].astype(np.float64) for name in ("query", "key", "value"))
        key, value = (np.repeat(item, query.shape[1] // item.shape[1], axis=1) for item in (key, value))
        scores = query @ key.swapaxes(2, 3) * (scale or query.shape[3] ** -0.5)
        scores = scores if late else change(scores)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return [((change(shares) if late else shares) @ value).astype(np.float32)]

    return reference


@flex_attention_as_matmuls.example_against(_attended(scale=0.3))
def attention_of_a_dynamic_batch() -> gs.Graph:
    return _flex(["n", 3, "l", 8], ["n", 3, "s", 8], ["n", 3, "s", 4], scale=0.3)


@flex_attention_as_matmuls.example_against(_attended(lambda scores: 5 * np.tanh(scores / 5)))
def capped_scores_of_shared_keys() -> gs.Graph:
    def cap(g: Builder, scores: gs.Tensor) -> gs.Tensor:
        limit = g.constant(5.0)
        capped: gs.Tensor = g.op.Mul(g.op.Tanh(g.op.Div(scores, limit)), limit)
        return capped

    return _flex(["n", 6, 4, 8], ["n", 2, "s", 8], ["n", 2, "s", 4], {"score_mod": cap})


@flex_attention_as_matmuls.example_against(_attended(lambda scores: scores + np.log(np.tri(*scores.shape[2:]) + 1e-30)))
def causal_mask() -> gs.Graph:
    def mask(g: Builder, scores: gs.Tensor) -> gs.Tensor:
        lengths = [g.op.Range(0, g.op.Gather(g.op.Shape(scores), axis, axis=0), 1) for axis in (2, 3)]
        seen = g.op.GreaterOrEqual(g.op.Unsqueeze(lengths[0], [1]), lengths[1])
        masked: gs.Tensor = g.op.Where(seen, scores, g.constant(-np.inf, np.float32))
        return masked

    return _flex([2, 3, "l", 8], [2, 3, "l", 8], [2, 3, "l", 8], {"score_mod": mask})


@flex_attention_as_matmuls.example_against(_attended(lambda shares: shares * 2, late=True))
def scaled_shares() -> gs.Graph:
    def double(g: Builder, shares: gs.Tensor) -> gs.Tensor:
        doubled: gs.Tensor = g.op.Mul(shares, g.constant(2.0))
        return doubled

    return _flex([2, 3, 4, 8], [2, 3, 5, 8], [2, 3, 5, 8], {"prob_mod": double})
