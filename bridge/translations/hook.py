"""Where torch.onnx.export takes decompositions of ours: it has a parameter for translations, and none for these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload

from .complex_pairs import lower_complex
from .embedding import of_rows
from .masks import of_any_values
from .optimiser import exact
from .registry import AT_CAPTURE, DECOMPOSITIONS
from .sizes import of_any_size


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """torch.onnx.export decomposes with its own table and ours on top, and leaves no complex arithmetic."""
    from torch.onnx._internal.exporter import _decomp, _fx_passes

    def decompose(program: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
        registered = set(_decomp.get_onnx_implemented_overloads(registry))
        table: dict[Any, Callable[..., Any]] = dict(_decomp.create_onnx_friendly_decomposition_table(registered))
        table.update(DECOMPOSITIONS)
        return lower_complex(program.run_decompositions(table))

    decomposing = mock.patch.object(_fx_passes, "decompose_with_registry", decompose)
    with decomposing, _kernels(AT_CAPTURE), of_rows(), of_any_values(), of_any_size(), exact():
        yield


@contextlib.contextmanager
def _kernels(replaced: dict[OpOverload, Callable[..., Any]]) -> Iterator[None]:
    """While tracing, these composite operators are computed by functions of ours."""
    key = DispatchKey.CompositeImplicitAutograd
    before = {op: (op.py_kernels.get(key), dict(op._dispatch_cache)) for op in replaced}
    try:
        for op, function in replaced.items():
            op.py_kernels[key] = function
            op._dispatch_cache.clear()
        yield
    finally:
        for op, (kernel, _) in before.items():
            if kernel is None:
                op.py_kernels.pop(key, None)
            else:
                op.py_kernels[key] = kernel
            op._dispatch_cache.clear()
