"""A torch module as the operators that ran in it, for what torch.export does not trace: derivatives, scripted parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import traceback
from torch.fx.experimental import _config
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as hooks

from . import translations


class Recorded(torch.nn.Module):
    """Runs a record; who traces it sees of each operator in which module and line it ran."""

    def __init__(self, record: torch.fx.Graph, constants: dict[str, Any]) -> None:
        super().__init__()
        self.record = record
        holder = torch.fx.GraphModule(constants, record)
        self._modules, self._parameters, self._buffers = holder._modules, holder._parameters, holder._buffers
        self.training = False

    def forward(self, *tensors: torch.Tensor) -> Any:
        with traceback.preserve_node_meta():
            return torch.fx.Interpreter(self, graph=self.record).run(*tensors)


def recorded(module: torch.nn.Module, tensors: Sequence[torch.Tensor], dynamic: bool) -> Recorded:
    """What torch dispatched in a run with ``tensors``, those of autograd's backward included; parameters and buffers
    keep their names. ``dynamic``: sizes are symbols, but for those that became numbers on the way into a scripted part.

    Where the code decides by sizes, the record has one way alone; where it decides by values, torch raises.
    """
    trace = make_fx(
        module,
        decomposition_table=translations.of_backward(),
        tracing_mode="symbolic" if dynamic else "fake",
        _allow_non_fake_inputs=True,
        record_stack_traces=True,
    )
    sizes = _config.patch(use_duck_shape=False)  # type: ignore[attr-defined] # else axes that are as long are one
    # of the backward of attention ONNX has the operators of this way alone
    with sizes, sdpa_kernel(SDPBackend.MATH), _scopes(module):
        found = trace(*tensors)
    names = {_place(item): name for name, item in (*module.named_parameters(), *module.named_buffers())}
    constants = {}
    for node in found.graph.find_nodes(op="get_attr"):
        value = getattr(found, node.target)
        node.target = names.get(_place(value), node.target)
        constants[node.target] = value
    return Recorded(found.graph, constants)


@contextlib.contextmanager
def _scopes(module: torch.nn.Module) -> Iterator[None]:
    """Within it, nodes that are traced are told of the modules that they run in, as torch.export tells its own."""
    names = {item: name for name, item in module.named_modules()}
    under_way: list[tuple[torch.nn.Module, int]] = []

    def nodes() -> list[torch.fx.Node]:
        mode = get_proxy_mode()
        return list(mode.tracer.graph.nodes) if mode is not None else []

    def entered(item: torch.nn.Module, _: Any) -> None:
        under_way.append((item, len(nodes())))

    def left(item: torch.nn.Module, _: Any, __: Any) -> None:
        path = {names[one]: (names[one], _kind(one)) for one, _ in under_way if one in names}
        _, first = under_way.pop()
        for node in nodes()[first:]:
            node.meta.setdefault("nn_module_stack", path)

    handles = (
        hooks.register_module_forward_pre_hook(entered),
        hooks.register_module_forward_hook(left, always_call=True),  # code may go on where a module raises
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kind(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Tells tensors apart by their memory: a scripted module makes new Python objects of its parameters."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
