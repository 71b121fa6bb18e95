"""DeBERTa's disentangled attention by TensorRT's plugin DisentangledAttention_TRT.

Attention scores there are the sum of three: content to content, content to position gathered by the distance of two
tokens, and position to content gathered likewise and transposed. The plugin gathers as it adds; the distances that it
counts, by DeBERTa-V2's logarithmic buckets, are its own, so that the model's have to be known and the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, has_plugin, rule
from passes.ir import Array
from passes.plugins import Plugin, register
from passes.rules.shapes import reshape, size, times

DEEPEST_SUM = 8
"""Additions and scalings that are looked through, one after the other."""

TILE = 64
"""The kernel works on tiles of this size and does not look where the sequence ends."""


def buckets(length: int, span: int) -> Array:
    """[length, length]: the column that the plugin takes for tokens ``i`` and ``j``, computed in float32 as there.

    That of TensorRT 8.5.3 takes others for distances beyond ``span // 2`` (measured), but not of ``2 * span`` tokens.
    """
    far = np.arange(length)[:, None] - np.arange(length)[None, :]
    middle = span // 2
    log = np.log(np.float32(max(middle, 1)))
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.float32(middle - 1) / (np.log(np.float32(2 * span - 1)) - log) * (np.float32(1) - np.float32(1e-7))
        distance = np.abs(far).astype(np.float32)
        bucket = np.ceil((np.log(np.maximum(distance, np.float32(1))) - log) * scale) + middle
    found = np.where(np.abs(far) <= middle, far, np.sign(far) * np.nan_to_num(bucket)).astype(np.int64)
    return np.clip(found + span, 0, 2 * span - 1)


def _disentangled(
    g: Builder, content: gs.Tensor, to_position: gs.Tensor, to_content: gs.Tensor, span: int, factor: float
) -> gs.Tensor:
    index = buckets(g.static_dim(content, 1), span)
    whole = g.op.Shape(content)
    first = g.op.GatherElements(to_position, g.op.Expand(g.constant(index[None]), whole), axis=2)
    second = g.op.GatherElements(to_content, g.op.Expand(g.constant(index.T[None]), whole), axis=2)
    total = g.op.Add(g.op.Add(content, first), g.op.Transpose(second, perm=[0, 2, 1]))
    return g.op.Mul(total, np.array(factor, g.dtype(content)))


DISENTANGLED = register(
    Plugin(
        "DisentangledAttention_TRT",
        attributes={"span": int, "factor": float},
        limits={"span": lambda value: value >= 0, "factor": lambda value: 0 < np.float32(value) < 1},
        reference=_disentangled,
    )
)


@dataclass(frozen=True)
class _Term:
    """``factor`` times ``tensor``, one of those that are added."""

    tensor: gs.Tensor
    factor: float


@dataclass(frozen=True)
class _Gathered:
    """``scores`` by ``index`` along the last axis, the last two axes then exchanged where ``transposed``."""

    scores: gs.Tensor
    index: gs.Tensor
    transposed: bool


@rule("Add", when=has_plugin("DisentangledAttention_TRT", "1"))
def disentangled_attention_by_plugin(node: gs.Node, g: Builder) -> Replacement:
    """The three scores of DeBERTa's attention are gathered and added by one plugin."""
    users, sizes = node.outputs[0].outputs, node.outputs[0].shape
    if sizes is not None and (len(sizes) not in (3, 4) or (sizes[-1] != sizes[-2] and None not in sizes[-2:])):
        return None
    if users and all(user.op == "Add" for user in users):
        return None  # a part of a sum
    terms = _terms(g, node.outputs[0], 1.0, 0)
    found = {id(term): gathered for term in terms if (gathered := _gathered(term.tensor)) is not None}
    plain = [term for term in terms if id(term) in found and not found[id(term)].transposed]
    turned = [term for term in terms if id(term) in found and found[id(term)].transposed]
    if len(plain) != 1 or len(turned) != 1:
        return None
    (first,), (second,) = plain, turned
    rest = [term for term in terms if id(term) not in found]
    to_position, to_content = found[id(first)], found[id(second)]
    shape = _shape(g, to_position)
    content = next((term for term in rest if list(term.tensor.shape or ()) == shape), None)
    if content is None or None in shape or len(shape) not in (3, 4):
        return None
    span = _checked(g, first, second, to_position, to_content)
    scores = [_content(g, content, first.factor), to_position.scores, to_content.scores]
    scores = [_three_axes(g, item) for item in scores]
    result = g.plugin(DISENTANGLED, scores, {"span": span, "factor": first.factor})
    if len(shape) == 4:
        result = reshape(g, result, [size(g, content.tensor, axis) for axis in range(4)])
    for term in rest:
        if term is not content:
            more = term.tensor if term.factor == 1 else g.op.Mul(term.tensor, _number(g, term.tensor, term.factor))
            result = g.op.Add(result, more)
    return result


def _checked(g: Builder, first: _Term, second: _Term, to_position: _Gathered, to_content: _Gathered) -> int:
    """The span; declines where the plugin computes something else."""
    length, columns = g.static_dim(to_position.scores, -2), g.static_dim(to_position.scores, -1)
    sizes = [[*_shape(g, item)[:-1], columns] for item in (to_position, to_content)]
    sizes += [g.shape(item.scores) for item in (to_position, to_content)]
    if any(item != sizes[0] for item in sizes) or _shape(g, to_position)[-1] != length or columns % 2:
        g.decline("the plugin wants equal sizes of both gathered scores")
    if length % TILE:
        g.decline(f"the plugin wants a sequence length that is a multiple of {TILE}: it is {length}")
    if not math.isclose(first.factor, second.factor, rel_tol=1e-6) or not DISENTANGLED.limits["factor"](first.factor):
        g.decline("the plugin wants one scale between 0 and 1 for all scores")
    if g.dtype(first.tensor) not in (np.float32, np.float16):
        g.decline("the plugin computes with floats")
    if length - 1 > columns // 4 and length != columns:
        g.decline("versions of the plugin differ in how they count distances unless there are as many places as tokens")
    wanted = buckets(length, columns // 2)
    for gathered, expected in ((to_position, wanted), (to_content, wanted.T)):
        index = g.value(_unexpanded(gathered.index))
        places = np.where(index < 0, index + columns, index)
        if places.ndim < 2 or places.shape[-2:] != (length, length) or (places != expected).any():
            g.decline("the plugin counts the distances of tokens in another way (DeBERTa-V2's buckets)")
    return columns // 2


def _maker(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and node.op in ops and not node.domain else None


def _scaled(g: Builder, tensor: gs.Tensor) -> tuple[gs.Tensor, float] | None:
    """``tensor`` as a product with a number."""
    node = _maker(tensor, "Mul", "Div")
    if node is None:
        return None
    for other, number in ((0, 1), (1, 0)):
        given = node.inputs[number]
        if isinstance(given, gs.Constant) and math.prod(given.shape) == 1 and (node.op == "Mul" or number == 1):
            value = float(g.value(given).reshape(-1)[0])
            return (node.inputs[other], value if node.op == "Mul" else 1 / value) if value else None
    return None


def _terms(g: Builder, tensor: gs.Tensor, factor: float, depth: int) -> list[_Term]:
    """What is added to make ``tensor``; sums that something else reads too stay whole, and those of many terms."""
    read = len(tensor.outputs) > 1 or any(tensor is item for item in _results(g))
    whole = depth > DEEPEST_SUM or (depth > 0 and read)
    if isinstance(tensor, gs.Constant) and not g.value(tensor).any():
        return []
    node = _maker(tensor, "Add")
    if node is not None and not whole:
        return [term for item in node.inputs for term in _terms(g, item, factor, depth + 1)]
    scaled = _scaled(g, tensor)
    if scaled is not None and not whole:
        return _terms(g, scaled[0], factor * scaled[1], depth + 1)
    return [_Term(tensor, factor)]


def _results(g: Builder) -> list[gs.Tensor]:
    return list(g.scope.outputs) if g.scope is not None else []


def _gathered(tensor: gs.Tensor) -> _Gathered | None:
    turned = _maker(tensor, "Transpose")
    if turned is not None:
        rank = len(tensor.shape or ())
        if list(turned.attrs.get("perm", ())) != [*range(rank - 2), rank - 1, rank - 2]:
            return None
        tensor = turned.inputs[0]
    node = _maker(tensor, "GatherElements")
    rank = len(tensor.shape or ())
    if node is None or not rank or int(node.attrs.get("axis", 0)) % rank != rank - 1:
        return None
    return _Gathered(node.inputs[0], node.inputs[1], turned is not None)


def _shape(g: Builder, gathered: _Gathered) -> list[int | str | None]:
    """Of what is gathered: of the index, which may be expanded to the shape of another tensor."""
    expanded = _maker(gathered.index, "Expand")
    like = _maker(expanded.inputs[1], "Shape") if expanded is not None else None
    own = g.shape(gathered.index)
    if like is None or like.attrs:
        return own
    other = g.shape(like.inputs[0])
    return other if len(other) == len(own) and other[-2:] == own[-2:] else own


def _unexpanded(index: gs.Tensor) -> gs.Tensor:
    while (node := _maker(index, "Expand", "Unsqueeze", "Identity", "Cast")) is not None:
        index = node.inputs[0]
    return index


def _content(g: Builder, term: _Term, factor: float) -> gs.Tensor:
    """The content scores, not yet scaled by ``factor``."""
    product = _maker(term.tensor, "MatMul")
    if product is not None:
        for place, operand in enumerate(product.inputs):
            scaled = _scaled(g, operand)
            if scaled is not None and math.isclose(scaled[1] * term.factor, factor, rel_tol=1e-6):
                operands = list(product.inputs)
                operands[place] = scaled[0]
                result: gs.Tensor = g.op.MatMul(*operands)
                return result
    if math.isclose(term.factor, factor, rel_tol=1e-6):
        return term.tensor
    return g.op.Mul(term.tensor, _number(g, term.tensor, term.factor / factor))


def _number(g: Builder, like: gs.Tensor, value: float) -> Array:
    return np.array(value, g.dtype(like))


def _three_axes(g: Builder, x: gs.Tensor) -> gs.Tensor:
    """``x`` with images and heads in one axis."""
    if len(g.shape(x)) == 3:
        return x
    return reshape(g, x, [times(g, size(g, x, 0), size(g, x, 1)), size(g, x, 2), size(g, x, 3)])


# --- examples ----------------------------------------------------------------------------------------------------


def scores_model(index: Array, columns: int, batch: int | str = 6, heads: int | None = None) -> gs.Graph:
    """The scores of DeBERTa-V2's attention: both gathers by ``index`` [length, length] and its transpose."""
    length, depth = index.shape[0], 8
    lead: list[int | str] = [batch] if heads is None else [batch, heads]
    scale = np.float32(math.sqrt(depth * 3))
    turn = [*range(len(lead)), len(lead) + 1, len(lead)]

    def build(g: Builder, query: gs.Tensor, key: gs.Tensor, places: gs.Tensor) -> gs.Tensor:
        content = g.op.MatMul(query, g.op.Div(g.op.Transpose(key, perm=turn), scale))
        whole = g.op.Shape(content)
        first = g.op.GatherElements(
            g.op.MatMul(query, places), g.op.Expand(g.constant(index[None]), whole), axis=len(lead) + 1
        )
        second = g.op.GatherElements(
            g.op.MatMul(key, places), g.op.Expand(g.constant(index.T[None]), whole), axis=len(lead) + 1
        )
        both = g.op.Add(g.op.Div(first, scale), g.op.Div(g.op.Transpose(second, perm=turn), scale))
        return g.op.Softmax(g.op.Add(content, both), axis=-1)

    inputs = {name: ("float32", [*lead, length, depth]) for name in ("query", "key")}
    return example({**inputs, "places": ("float32", [depth, columns])}, build)


@disentangled_attention_by_plugin.example
def logarithmic_buckets() -> gs.Graph:
    return scores_model(buckets(64, 32), 64)


@disentangled_attention_by_plugin.example
def distances_that_are_all_near() -> gs.Graph:
    """As in the first DeBERTa, whose distances are not put into buckets."""
    far = np.arange(64)[:, None] - np.arange(64)[None, :]
    return scores_model(far + 128, 256, "n", heads=2)
