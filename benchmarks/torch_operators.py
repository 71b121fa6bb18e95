"""torch's operators, by its own samples of them, as models for ``benchmarks.torch_models``:

    pip install expecttest
    python -m benchmarks.torch_models benchmarks/torch_operators.py

Of each operator (and variant of it) in torch's ``op_db`` the first sample is taken that has tensors to give and to
return, all of them dense, real at the input and not empty, and that returns the same twice.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch.backends

torch.backends.disable_global_flags = lambda: None  # torch's tests forbid to set flags, in all of the process

from torch import nn  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten  # noqa: E402

SAMPLES = 12
"""Of an operator that are looked at."""


class Operator(nn.Module):
    """An operator's call, of which some leaves are the inputs."""

    def __init__(self, call: Callable[..., Any], leaves: Sequence[Any], places: Sequence[int], spec: TreeSpec) -> None:
        super().__init__()
        self.call, self.leaves, self.places, self.spec = call, list(leaves), places, spec

    def forward(self, *t: torch.Tensor) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, t, strict=True):
            leaves[place] = tensor
        first, args, kwargs = tree_unflatten(leaves, self.spec)
        return self.call(first, *args, **kwargs)


def _dense(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.layout == torch.strided and item.numel() > 0


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    one, other = (torch.view_as_real(item.resolve_conj()) if item.is_complex() else item for item in (a, b))
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def _tensors(result: Any) -> list[torch.Tensor]:
    return [item for item in tree_leaves(result) if isinstance(item, torch.Tensor)]


def _model(sample: Any, call: Callable[..., Any]) -> tuple[Any, ...] | None:
    """As ``benchmarks.torch_models`` wants it; None of a sample that cannot be one."""
    leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [place for place, item in enumerate(leaves) if _dense(item) and not item.is_complex()]
    tensors = tuple(leaves[place].detach().clone() for place in places)
    rest = [None if place in places else item for place, item in enumerate(leaves)]

    def make() -> nn.Module:
        return Operator(call, rest, places, spec)

    try:
        once, again = (_tensors(make()(*(item.clone() for item in tensors))) for _ in range(2))
    except Exception:  # noqa: BLE001 - a sample may be one that the operator refuses, with whatever it raises
        return None
    if not places or not once or not all(map(_dense, once)) or not all(map(_same, once, again)):
        return None
    return make, tensors, None, {}


M: dict[str, Any] = {}
for _op in op_db:
    _types = [kind for kind in (torch.float32, torch.int64) if kind in _op.dtypes]
    if not _types:
        continue
    torch.manual_seed(0)
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _sample in list(_op.sample_inputs("cpu", _types[0]))[:SAMPLES]:
            _found = _model(_sample, _op.op)
            if _found is not None:
                M["_".join(filter(None, (_op.name, _op.variant_test_name))).replace(".", "_")] = _found
                break
