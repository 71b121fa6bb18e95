"""A torch module as the operators that ran in it, for what torch.export does not trace: derivatives, scripted parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import translations

if TYPE_CHECKING:
    import torch


def recorded(module: torch.nn.Module, tensors: Sequence[torch.Tensor], dynamic: bool) -> torch.fx.GraphModule:
    """What torch dispatched in a run with ``tensors``, those of autograd's backward included; parameters and buffers
    keep their names. ``dynamic``: sizes are symbols, but for those that became numbers on the way into a scripted part.

    Where the code decides by sizes, the record has one way alone; where it decides by values, torch raises.
    """
    import torch
    from torch.fx.experimental import _config
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.nn.attention import SDPBackend, sdpa_kernel

    trace = make_fx(
        module,
        decomposition_table=translations.of_backward(),
        tracing_mode="symbolic" if dynamic else "fake",
        _allow_non_fake_inputs=True,
    )
    sizes = _config.patch(use_duck_shape=False)  # type: ignore[attr-defined] # else axes that are as long are one
    with sizes, sdpa_kernel(SDPBackend.MATH):  # of which alone the backward is operators that ONNX has
        record = trace(*tensors)
    names = {_place(item): name for name, item in (*module.named_parameters(), *module.named_buffers())}
    constants = {}
    for node in record.graph.find_nodes(op="get_attr"):
        value = getattr(record, node.target)
        node.target = names.get(_place(value), node.target)
        constants[node.target] = value
    return torch.fx.GraphModule(constants, record.graph)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Tells tensors apart by their memory: a scripted module makes new Python objects of its parameters."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
