"""PyTorch modules and ONNX models become TensorRT engines, with the error of every step measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .as_torch2trt import torch2trt
    from .build_settings import BuildSettings
    from .diff.bisection import bisect
    from .diff.evidence import verify
    from .diff.runs import compare_runs
    from .errors import BridgeError, BuildError, CompareError, ExportError, RewriteError, RunError, UsageError
    from .explanation import Explanation, explain
    from .pipeline import convert
    from .plugins.register import register_plugin
    from .precision import Precision
    from .result import ConversionResult, Tolerance
    from .runtime.dataset import Dataset, FolderDataset, ListDataset, TensorBatchDataset
    from .runtime.flattener import Flattener
    from .runtime.module import TRTModule
    from .target import Target
    from .trade_off import TradeOff

_HOME = {
    "BridgeError": "errors",
    "BuildSettings": "build_settings",
    "BuildError": "errors",
    "CompareError": "errors",
    "ConversionResult": "result",
    "Dataset": "runtime.dataset",
    "Explanation": "explanation",
    "ExportError": "errors",
    "Flattener": "runtime.flattener",
    "FolderDataset": "runtime.dataset",
    "ListDataset": "runtime.dataset",
    "Precision": "precision",
    "RewriteError": "errors",
    "RunError": "errors",
    "TRTModule": "runtime.module",
    "TensorBatchDataset": "runtime.dataset",
    "Target": "target",
    "Tolerance": "result",
    "TradeOff": "trade_off",
    "UsageError": "errors",
    "bisect": "diff.bisection",
    "compare_runs": "diff.runs",
    "convert": "pipeline",
    "explain": "explanation",
    "register_plugin": "plugins.register",
    "torch2trt": "as_torch2trt",
    "verify": "diff.evidence",
}

__all__ = [
    "BridgeError",
    "BuildError",
    "BuildSettings",
    "CompareError",
    "ConversionResult",
    "Dataset",
    "Explanation",
    "ExportError",
    "Flattener",
    "FolderDataset",
    "ListDataset",
    "Precision",
    "RewriteError",
    "RunError",
    "TRTModule",
    "Target",
    "TensorBatchDataset",
    "Tolerance",
    "TradeOff",
    "UsageError",
    "bisect",
    "compare_runs",
    "convert",
    "explain",
    "register_plugin",
    "torch2trt",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that ``import bridge`` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
