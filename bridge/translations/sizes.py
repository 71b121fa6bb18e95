"""Dynamic sizes that a module computes with: ``index % width``, ``torch.linspace(0, 1, width)``, ``math.sqrt(length)``.

torch.onnx writes a number beside a tensor as a constant, and has none of a size that is known at run time alone; some
functions of torch and of Python take numbers only, and make a constant of the size before any operator is there.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from .fourier import istft
from .registry import decomposes


def varies(*values: Any) -> bool:
    """Whether a number that depends on dynamic sizes is anywhere in these, or in the sequences among them."""
    return any(
        varies(*value) if isinstance(value, Sequence) and not isinstance(value, str) else isinstance(value, _SYMBOLS)
        for value in values
    )


_SYMBOLS = (torch.SymInt, torch.SymFloat)


def as_tensor(number: Any) -> Tensor:
    """Of no axis, so that it counts as a number where types are promoted."""
    whole = isinstance(number, (int, torch.SymInt))
    return torch.scalar_tensor(number, dtype=torch.int64 if whole else torch.get_default_dtype())


# --- operators of a tensor and a number ---------------------------------------------------------------------------

_OF_TENSORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "remainder.Scalar": torch.remainder,
    "fmod.Scalar": torch.fmod,
    "pow.Tensor_Scalar": torch.pow,
    "bitwise_and.Scalar": torch.bitwise_and,
    "bitwise_or.Scalar": torch.bitwise_or,
    "bitwise_xor.Scalar": torch.bitwise_xor,
    "__lshift__.Scalar": torch.bitwise_left_shift,
    "__rshift__.Scalar": torch.bitwise_right_shift,
    "bitwise_left_shift.Tensor_Scalar": torch.bitwise_left_shift,
    "bitwise_right_shift.Tensor_Scalar": torch.bitwise_right_shift,
}


def _by_tensors(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def decomposed(self: Tensor, other: Any) -> Tensor:
        if not varies(other):
            return NotImplemented  # type: ignore[no-any-return]
        return function(self, as_tensor(other))

    return decomposed


for _name, _function in _OF_TENSORS.items():
    decomposes(_name)(_by_tensors(_function))


@decomposes("addcmul")
def addcmul(self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Tensor:
    if not varies(value):
        return NotImplemented  # type: ignore[no-any-return]
    return torch.add(self, tensor1 * tensor2 * value)


@decomposes("addcdiv")
def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Tensor:
    if not varies(value):
        return NotImplemented  # type: ignore[no-any-return]
    return torch.add(self, tensor1 / tensor2 * value)


# --- functions that take numbers alone ------------------------------------------------------------------------------


def linspace(start: Any, end: Any, steps: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """As torch computes it, from both ends, so that the last value is ``end``."""
    options.pop("out", None)
    dtype = dtype or torch.get_default_dtype()
    places = torch.arange(steps, dtype=torch.promote_types(dtype, torch.float32), **options)
    last = torch.full_like(places[:1], steps - 1)
    step = (end - start) / last.clamp(min=1)
    return torch.where(places < steps / 2, start + step * places, end - step * (last - places)).to(dtype)


def logspace(start: Any, end: Any, steps: Any, base: float = 10.0, **options: Any) -> Tensor:
    return torch.pow(base, linspace(start, end, steps, **options))


def one_hot(input: Tensor, num_classes: Any = -1) -> Tensor:
    return (input.unsqueeze(-1) == torch.arange(num_classes, device=input.device)).to(torch.int64)


def new_tensor(self: Tensor, data: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """The numbers one by one: of several types torch makes constants."""
    return _stacked(data, dtype or self.dtype, options.get("device") or self.device)


def tensor_of(data: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
    return _stacked(data, dtype or _type_of(data), device)


def _type_of(data: Any) -> torch.dtype:
    leaves = torch.utils._pytree.tree_leaves(data)
    floats = any(isinstance(leaf, (float, torch.SymFloat)) for leaf in leaves)
    return torch.get_default_dtype() if floats else torch.int64


def _stacked(data: Any, dtype: torch.dtype, device: Any) -> Tensor:
    if isinstance(data, Tensor):
        return data.to(device=device, dtype=dtype)
    if isinstance(data, Sequence):
        return torch.stack([_stacked(item, dtype, device) for item in data])
    return torch.full((), data, dtype=dtype, device=device)


def root(number: Any) -> Any:
    """torch.onnx knows the power, and not ``sym_sqrt``."""
    return number**0.5


_attention = F.scaled_dot_product_attention


def attention(query: Tensor, *args: Any, scale: Any = None, **kwargs: Any) -> Tensor:
    """The scale is a plain number there."""
    if scale is not None:
        query, kwargs = query * scale, {**kwargs, "scale": 1.0}
    return _attention(query, *args, **kwargs)


def of_any_size() -> contextlib.ExitStack:
    """Within it, these functions take numbers that depend on dynamic sizes."""
    stack = contextlib.ExitStack()
    for place, name, function in (
        (torch, "linspace", linspace),
        (torch, "logspace", logspace),
        (torch, "tensor", tensor_of),
        (torch, "as_tensor", tensor_of),
        (torch, "istft", istft),
        (torch.Tensor, "istft", istft),
        (torch.Tensor, "new_tensor", new_tensor),
        (F, "one_hot", one_hot),
        (F, "scaled_dot_product_attention", attention),
        (math, "sqrt", root),
    ):
        stack.enter_context(mock.patch.object(place, name, _where_sizes_vary(getattr(place, name), function)))
    return stack


def _where_sizes_vary(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    of_all = function in (linspace, logspace, root)

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        if of_all and torch.compiler.is_dynamo_compiling():  # where the code is read, sizes pass for integers
            return function(*args, **kwargs)
        return (function if varies(*args, *kwargs.values()) else original)(*args, **kwargs)

    return called
