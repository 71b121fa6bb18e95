"""torch tensors as NumPy arrays and back, bfloat16 included; and the leaves of nested values with their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A copy-free view where torch allows it; bfloat16 becomes that of ml_dtypes."""
    import torch

    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def to_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    import torch

    array = np.array(array, order="C", copy=True)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def named_leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each leaf of a value that torch's pytree takes apart, in its order, with the keys, places or fields to it.

    torch's own ``tree_flatten_with_path`` refuses classes that were registered without names for their children, as
    those of transformers' outputs are; these are asked for their keys.
    """
    parts = children_of(tree)
    if parts is None:
        yield path, tree
        return
    for key, child in zip(*parts[:2], strict=True):
        yield from named_leaves(child, (*path, key))


def children_of(tree: Any) -> tuple[list[Any], list[Any], Any] | None:
    """Keys, places or fields of a value that torch's pytree takes apart, what they hold, and pytree's context."""
    from torch.utils import _pytree as pytree

    node = pytree.SUPPORTED_NODES.get(pytree._get_node_type(tree))
    if node is None:
        return None
    children, context = node.flatten_fn(tree)
    if node.flatten_with_keys_fn is not None:
        keys = [_plain_key(key) for key, _ in node.flatten_with_keys_fn(tree)[0]]
    else:
        keys = list(tree) if isinstance(tree, Mapping) and len(tree) == len(children) else list(range(len(children)))
    return keys, list(children), context


def _plain_key(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))
