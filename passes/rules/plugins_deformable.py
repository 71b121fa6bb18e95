"""Deformable attention over several feature maps (Deformable DETR and its kin) by TensorRT's own plugin.

In PyTorch: for each level ``grid_sample`` of the values there, then
``(stack(sampled, -2).flatten(-2) * weights).sum(-1)``. Written so, each sampled value of each point goes to memory
before the sum; the plugin adds as it samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, has_plugin, rule
from passes.ir import Array
from passes.plugins import Plugin, register
from passes.rules.shapes import reshape, size, times

LARGEST_TRACED = 1 << 25
"""Elements of the values up to which it is followed where each of them goes."""


def _attention(
    g: Builder,
    value: gs.Tensor,
    shapes: gs.Tensor,
    starts: gs.Tensor,
    places: gs.Tensor,
    weights: gs.Tensor,
    levels: Sequence[int],
) -> gs.Tensor:
    """value [b, s, heads, d], shapes [l, 2], starts [l], places [b, q, heads, l, p, 2] within 0 … 1 and weights
    [b, q, heads, l, p] give [b, q, heads, d]."""
    heads, depth, points = g.static_dim(value, 2), g.static_dim(value, 3), g.static_dim(places, 4)
    batch, queries = size(g, value, 0), size(g, places, 1)
    lists = times(g, batch, heads)
    start, total = 0, None
    for level, (height, width) in enumerate(zip(levels[::2], levels[1::2], strict=True)):
        here = g.slice(value, [start], [start + height * width], [1], [1])
        start += height * width
        image = g.op.Reshape(g.op.Transpose(here, perm=[0, 2, 3, 1]), np.array([-1, depth, height, width]))
        grid = g.op.Gather(places, np.array(level), axis=3)  # [b, q, heads, p, 2]
        grid = g.op.Sub(g.op.Mul(grid, np.array(2, g.dtype(grid))), np.array(1, g.dtype(grid)))
        grid = reshape(g, g.op.Transpose(grid, perm=[0, 2, 1, 3, 4]), [lists, queries, points, 2])
        share = g.op.Transpose(g.op.Gather(weights, np.array(level), axis=3), perm=[0, 2, 1, 3])
        share = reshape(g, share, [lists, 1, queries, points])
        summed = g.reduce("ReduceSum", g.op.Mul(g.op.GridSample(image, grid), share), [3])  # [b * heads, d, q]
        total = summed if total is None else g.op.Add(total, summed)
    result = reshape(g, total, [batch, heads, depth, queries])
    return g.op.Transpose(result, perm=[0, 3, 1, 2])


DEFORMABLE = register(
    Plugin("MultiscaleDeformableAttnPlugin_TRT", attributes={"levels": list}, reference=_attention),
)
"""``levels``, height and width of each, is for the reference body; the plugin reads them from its second input."""


@rule("ReduceSum", when=has_plugin("MultiscaleDeformableAttnPlugin_TRT", "1"))
def deformable_attention_by_plugin(node: gs.Node, g: Builder) -> Replacement:
    """What deformable attention samples from several feature maps is added up by a plugin while it is sampled."""
    found = _matched(node, g)
    if found is None:
        return None
    samplers, weights = found
    maps = [sampler.inputs[0] for sampler in samplers]
    levels = [[g.static_dim(item, 2), g.static_dim(item, 3)] for item in maps]
    points = g.static_dim(samplers[0].inputs[1], 2)
    starts = np.cumsum([0, *(height * width for height, width in levels[:-1])])
    traced = _traced(g, maps)
    places = g.op.Concat(*(g.unsqueeze(sampler.inputs[1], [1, 3]) for sampler in samplers), axis=3)
    places = g.op.Mul(g.op.Add(places, np.array(1, g.dtype(places))), np.array(0.5, g.dtype(places)))
    shares = g.unsqueeze(weights, [3])  # [lists, 1, q, 1, l * p]
    lists, queries = size(g, weights, 0), size(g, weights, 2)
    if traced is None:  # every list is an image of one head
        value = g.op.Concat(*(g.op.Reshape(item, np.array([0, 0, -1])) for item in maps), axis=2)
        value = g.unsqueeze(g.op.Transpose(value, perm=[0, 2, 1]), [2])
        batch, heads = lists, 1
    else:
        value = traced
        batch, heads = g.static_shape(value)[0], g.static_shape(value)[2]
    places = reshape(g, places, [batch, heads, queries, len(levels), points, 2])
    shares = reshape(g, shares, [batch, heads, queries, len(levels), points])
    inputs = [
        value,
        np.array(levels, np.int32),
        starts.astype(np.int32),
        g.op.Transpose(places, perm=[0, 2, 1, 3, 4, 5]),
        g.op.Transpose(shares, perm=[0, 2, 1, 3, 4]),
    ]
    result = g.plugin(DEFORMABLE, inputs, {"levels": [number for level in levels for number in level]})
    result = g.op.Transpose(result, perm=[0, 2, 3, 1])  # [b, heads, d, q]
    if traced is not None or not _is_one(heads):
        result = reshape(g, result, [lists, g.static_dim(maps[0], 1), queries])
    else:
        result = g.squeeze(result, [1])
    return g.unsqueeze(result, [3]) if node.attrs.get("keepdims", 1) else result


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


# --- the pattern -------------------------------------------------------------------------------------------------


def _matched(node: gs.Node, g: Builder) -> tuple[list[gs.Node], gs.Tensor] | None:
    """The GridSample nodes of all levels and the weights [lists, 1, q, l * p] of what they sample."""
    product = _maker(node.inputs[0], "Mul")
    if product is None or len(product.outputs[0].outputs) > 1:
        return None
    stacked, weights = product.inputs
    samplers = _levels(stacked, g)
    if samplers is None:
        stacked, weights = weights, stacked
        samplers = _levels(stacked, g)
    if samplers is None:
        return None
    whole, shares = g.shape(stacked), g.shape(weights)
    axes = node.attrs.get("axes")
    if axes is None:
        given = g.input(node, 1)
        axes = None if given is None or not isinstance(given, gs.Constant) else g.value(given).ravel().tolist()
    if axes is None or [int(item) % 4 for item in axes] != [3] or len(whole) != 4 or len(shares) != 4:
        return None
    if shares[1] != 1 or shares[3] != whole[3] or not isinstance(whole[3], int):
        return None
    for one, other in zip((shares[0], shares[2]), (whole[0], whole[2]), strict=True):
        if one == 1 and other != 1:
            return None
    return samplers, weights


def _maker(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and node.op in ops and not node.domain else None


def _levels(tensor: gs.Tensor, g: Builder) -> list[gs.Node] | None:
    """The GridSample nodes whose results [lists, d, q, p] are beside each other in ``tensor`` [lists, d, q, l * p]."""
    if len(tensor.shape or ()) != 4:
        return None
    points = tensor.shape[3]
    reshaped = _maker(tensor, "Reshape")
    joined = _maker(reshaped.inputs[0] if reshaped is not None else tensor, "Concat", "Unsqueeze", "GridSample")
    if joined is None:
        return None
    rank = len(joined.outputs[0].shape or ())
    if joined.op == "Concat" and int(joined.attrs["axis"]) % max(rank, 1) != 3:
        return None
    parts = list(joined.inputs) if joined.op == "Concat" else [joined.outputs[0]]
    if rank == 5:  # [lists, d, q, l, p]
        stacked = [_maker(item, "Unsqueeze") for item in parts]
        if any(item is None or _unsqueezed(item, g) not in (3, -2) for item in stacked):
            return None
        parts = [item.inputs[0] for item in stacked if item is not None]
    elif rank != 4:
        return None
    samplers = [_maker(item, "GridSample") for item in parts]
    if any(item is None or not _plain_sampling(item, g) for item in samplers):
        return None
    nodes = [item for item in samplers if item is not None]
    kinds = {(tuple(g.shape(item.inputs[0])[:2]), tuple(g.shape(item.inputs[1]))) for item in nodes}
    each = g.shape(nodes[0].inputs[1])[2]
    return nodes if len(kinds) == 1 and isinstance(each, int) and points == each * len(nodes) else None


def _unsqueezed(node: gs.Node, g: Builder) -> int | None:
    axes = node.attrs.get("axes")
    if axes is None:
        given = node.inputs[1]
        axes = g.value(given).ravel().tolist() if isinstance(given, gs.Constant) else []
    return int(axes[0]) if len(axes) == 1 else None


def _plain_sampling(node: gs.Node, g: Builder) -> bool:
    attrs = node.attrs
    return (
        attrs.get("mode", "linear") in ("linear", "bilinear")
        and attrs.get("padding_mode", "zeros") == "zeros"
        and not attrs.get("align_corners", 0)
        and len(g.shape(node.inputs[0])) == 4
        and g.dtype(node.inputs[0]) in (np.float32, np.float16)
    )


# --- where the values come from ----------------------------------------------------------------------------------


def _traced(g: Builder, maps: Sequence[gs.Tensor]) -> gs.Tensor | None:
    """The tensor [b, s, heads, d] that all maps [b * heads, d, h, w] are parts of, as the plugin wants it."""
    if any(not all(isinstance(item, int) for item in g.shape(tensor)) for tensor in maps):
        return None
    total = sum(math.prod(g.static_shape(tensor)) for tensor in maps)
    origin = _origin(maps)
    if origin is None or total > LARGEST_TRACED or not all(isinstance(item, int) for item in g.shape(origin)):
        return None
    shape = g.static_shape(origin)
    if len(shape) != 4 or math.prod(shape) != total:
        return None
    length, depth = shape[1], shape[3]
    numbers = np.arange(total, dtype=np.int32).reshape(shape)
    known: dict[int, Array] = {id(origin): numbers}
    start = 0
    for tensor in maps:
        height, width = g.static_shape(tensor)[2:]
        wanted = numbers[:, start : start + height * width].transpose(0, 2, 3, 1)
        found = _moved(g, tensor, known)
        if found is None or depth != found.shape[1] or not np.array_equal(found.ravel(), wanted.ravel()):
            return None
        start += height * width
    return origin if start == length else None


MOVING = ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Identity")


def _origin(maps: Sequence[gs.Tensor]) -> gs.Tensor | None:
    """The last tensor of four axes that all of these are cut from."""
    chains: list[list[gs.Tensor]] = []
    for tensor in maps:
        chain = [tensor]
        while (node := _maker(chain[-1], *MOVING)) is not None:
            chain.append(node.inputs[0])
        chains.append(chain)
    shared = [item for item in chains[0] if all(any(item is other for other in chain) for chain in chains)]
    return next((item for item in shared if len(item.shape or ()) == 4 and item is not maps[0]), None)


def _moved(g: Builder, tensor: gs.Tensor, known: dict[int, Array]) -> Array | None:
    """Where each element of ``tensor`` comes from; None where that takes more than moving."""
    if id(tensor) in known:
        return known[id(tensor)]
    node = _maker(tensor, *MOVING)
    source = _moved(g, node.inputs[0], known) if node is not None else None
    if node is None or source is None:
        return None
    result: Array
    if node.op == "Transpose":
        result = source.transpose(node.attrs.get("perm"))
    elif node.op == "Split":
        axis = int(node.attrs.get("axis", 0))
        sizes = [length for item in node.outputs if isinstance(length := g.shape(item)[axis], int)]
        if len(sizes) != len(node.outputs):
            return None
        for output, part in zip(node.outputs, np.split(source, np.cumsum(sizes)[:-1], axis), strict=True):
            known[id(output)] = part
        result = known[id(tensor)]
    elif node.op == "Slice":
        if not all(isinstance(item, gs.Constant) for item in node.inputs[1:]):
            return None
        starts, ends, *rest = (g.value(item).tolist() for item in node.inputs[1:])
        axes = rest[0] if rest else range(len(starts))
        steps = rest[1] if len(rest) > 1 else [1] * len(starts)
        cut = [slice(None)] * source.ndim
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            cut[axis] = slice(start, end, step)
        result = source[tuple(cut)]
    else:  # the order stays
        shape = g.shape(tensor)
        if not all(isinstance(item, int) for item in shape):
            return None
        result = source.reshape(shape)
    known[id(tensor)] = result
    return result


# --- examples ----------------------------------------------------------------------------------------------------


def attention_model(levels: Sequence[tuple[int, int]], batch: int | str, stack: bool, opset: int = 20) -> gs.Graph:
    """As Deformable DETR has it: three heads of four numbers, two points, five queries."""
    heads, depth, points = 3, 4, 2
    length = sum(height * width for height, width in levels)

    def build(g: Builder, value: gs.Tensor, places: gs.Tensor, weights: gs.Tensor) -> gs.Tensor:
        parts = g.op.Split(value, np.array([h * w for h, w in levels]), axis=1, outputs=len(levels))
        grids = g.op.Sub(g.op.Mul(places, np.float32(2)), np.float32(1))
        sampled = []
        for level, (height, width) in enumerate(levels):
            part = g.op.Reshape(parts[level] if len(levels) > 1 else parts, np.array([0, 0, heads * depth]))
            image = g.op.Reshape(g.op.Transpose(part, perm=[0, 2, 1]), np.array([-1, depth, height, width]))
            grid = g.op.Transpose(g.op.Gather(grids, np.array(level), axis=3), perm=[0, 2, 1, 3, 4])
            grid = g.op.Reshape(grid, np.array([-1, 5, points, 2]))
            one = g.op.GridSample(image, grid)
            sampled.append(g.unsqueeze(one, [3]) if stack else one)
        joined = g.op.Concat(*sampled, axis=3)
        if stack:
            joined = g.op.Reshape(joined, np.array([0, 0, 0, -1]))
        shares = g.op.Reshape(g.op.Transpose(weights, perm=[0, 2, 1, 3, 4]), np.array([-1, 1, 5, len(levels) * points]))
        summed = g.reduce("ReduceSum", g.op.Mul(joined, shares), [-1])
        return g.op.Transpose(g.op.Reshape(summed, np.array([-1, heads * depth, 5])), perm=[0, 2, 1])

    inputs: dict[str, Any] = {
        "value": ("float32", [batch, length, heads, depth]),
        "places": ("float32", [batch, 5, heads, len(levels), points, 2]),
        "weights": ("float32", [batch, 5, heads, len(levels), points]),
    }
    return example(inputs, build, opset)


@deformable_attention_by_plugin.example
def levels_that_are_stacked() -> gs.Graph:
    return attention_model([(4, 5), (2, 3), (1, 2)], 2, stack=True)


@deformable_attention_by_plugin.example
def levels_beside_each_other_and_any_number_of_images() -> gs.Graph:
    return attention_model([(4, 5), (2, 3)], "n", stack=False)


@deformable_attention_by_plugin.example
def one_level() -> gs.Graph:
    return attention_model([(3, 4)], 2, stack=True, opset=17)
