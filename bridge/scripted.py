"""ScriptModules, whole or as parts of a module, as Python modules that torch.export traces."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class Scripted(torch.nn.Module):
    """A ScriptModule with the signature that ``inspect`` finds for Python's alone."""

    def __init__(self, inner: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.inner = inner
        self.training = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

        forward.__signature__ = _signature(inner)  # type: ignore[attr-defined]
        self.forward = forward


def _signature(module: torch.jit.ScriptModule) -> inspect.Signature:
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter(
                item.name,
                kinds[item.kwarg_only],
                default=item.default_value if item.has_default_value() else inspect.Parameter.empty,
            )
            for item in getattr(module.forward, "schema").arguments[1:]  # noqa: B009 - typed as any function
        ]
    )


class _Watched(torch.nn.Module):
    """Keeps what a part was called with."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.call = self.call or (args, kwargs)
        return self.inner(*args, **kwargs)


@contextlib.contextmanager
def unscripted(module: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within it, the ScriptModules inside of ``module``, which takes ``tensors``, are graphs of their operators, as far
    as torch converts them; those that it does not stay what they are."""
    parts = [
        (parent, name, child)
        for parent in module.modules()
        if not isinstance(parent, torch.jit.ScriptModule)
        for name, child in parent.named_children()
        if isinstance(child, torch.jit.ScriptModule)
    ]
    if not parts:
        yield
        return
    try:
        for parent, name, part in parts:
            setattr(parent, name, _Watched(part))
        with contextlib.suppress(AttributeError):  # code that asks a part for more than a call has to keep it
            module(*tensors)
        for parent, name, part in parts:
            setattr(parent, name, _converted(part, getattr(parent, name).call))
        yield
    finally:
        for parent, name, part in parts:
            setattr(parent, name, part)


def _converted(part: torch.jit.ScriptModule, call: tuple[tuple[Any, ...], dict[str, Any]] | None) -> torch.nn.Module:
    from torch._export.converter import TS2EPConverter

    if call is None:
        return part
    try:
        return TS2EPConverter(part, *call).convert().module()
    except Exception:  # noqa: BLE001 - of whatever it does not know; what a ScriptModule lacks the exporter says
        return part
