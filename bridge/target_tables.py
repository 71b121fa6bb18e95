"""What single TensorRTs lack, as tables. ``Target`` alone reads them, and compares their versions with its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

RTX_PLUGIN_ONLY = ("NonZero", "NonMaxSuppression", "LinearAttention", "CausalConvWithState", "RoiAlign")
"""Operators that its parser knows and looks for a plugin of that name to do."""

QUANTISATIONS: Mapping[str, tuple[str, tuple[int, int]]] = {
    "int8": ("int8", (0, 0)),
    "fp8": ("float8_e4m3fn", (8, 9)),
    "int4": ("int4", (8, 0)),
}
"""The type of each, and the first compute capability that has kernels for it; TensorRT-RTX 1.7.1's builder refuses fp8
for 7.5, 8.0 and 8.6, and int4 for 7.5 (measured)."""


@dataclass(frozen=True)
class Setting:
    """Which TensorRT have a setting of the builder."""

    since: tuple[int, ...] = ()
    """The first TensorRT that has it."""
    strongly_typed: bool = False
    """Whether it is for strongly typed networks alone."""
    rtx: str = ""
    """What TensorRT-RTX makes of it, where that is nothing."""
    rtx_needs_gpu: bool = False


_NO_TIMING = "builds the same engine whatever this is: it times no kernels"
_NO_DLA = "builds for GPUs alone"
SETTINGS: Mapping[str, Setting] = {
    "optimization_level": Setting((8, 6), rtx="builds the same engine at every level"),
    "sparsity": Setting(rtx="builds the same engine with and without"),
    "version_compatible": Setting((8, 6), rtx="has no lean runtime, which such engines need"),
    "hardware_compatibility": Setting((8, 6), rtx="has compute_capabilities for this"),
    "refittable": Setting(rtx_needs_gpu=True),
    "strip_weights": Setting((10,), rtx_needs_gpu=True),
    "weight_streaming": Setting((10,), strongly_typed=True),
    "max_aux_streams": Setting((8, 6)),
    "avg_timing_iterations": Setting(rtx=_NO_TIMING),
    "default_device": Setting(rtx=_NO_DLA),
    "dla_core": Setting(rtx=_NO_DLA),
    "gpu_fallback": Setting(rtx=_NO_DLA),
    "device_types": Setting(rtx=_NO_DLA),
}
"""Of TensorRT-RTX as measured of 1.7.1, by the engines that came out; what is not here every TensorRT has."""


def _extra_outputs(node: gs.Node) -> bool:
    return any(tensor.name for tensor in node.outputs[1:])


def _reads_16_bit(node: gs.Node) -> bool:
    """Whether it computes in float16 or bfloat16."""
    return any(tensor.dtype is not None and np.dtype(tensor.dtype).itemsize == 2 for tensor in node.inputs)


def _reads_bfloat16(node: gs.Node) -> bool:
    return any(tensor.dtype is not None and np.dtype(tensor.dtype).name == "bfloat16" for tensor in node.inputs)


RESTRICTED: dict[str, Callable[[gs.Node], bool]] = {
    "Attention": lambda node: True,  # few forms build, and equal Q, K and V crash the builder
    "Celu": _reads_16_bit,
    "GroupNormalization": _extra_outputs,
    "HardSwish": _reads_bfloat16,
    "LayerNormalization": _extra_outputs,
    "Mish": _reads_bfloat16,
    "RMSNormalization": _extra_outputs,
}
"""Forms of operators with a function body that every parser measured refuses."""


def _in_16_bits(node: gs.Node, dtype: str) -> bool:
    return dtype in ("float16", "bfloat16")


def _in_bfloat16(node: gs.Node, dtype: str) -> bool:
    return dtype == "bfloat16"


def _of_lengths(node: gs.Node, dtype: str) -> bool:
    """Whether it is a recurrent network that is given the lengths of its sequences, in 16 bits."""
    return _in_16_bits(node, dtype) and len(node.inputs) > 4 and not node.inputs[4].is_empty()


NOT_IN: Mapping[str, Callable[[gs.Node, str], bool]] = {
    **dict.fromkeys(("Celu", "MeanVarianceNormalization"), _in_16_bits),
    **dict.fromkeys(("ConvTranspose", "GlobalLpPool", "HardSwish", "LpNormalization", "LpPool", "Mish"), _in_bfloat16),
    "GRU": lambda node, dtype: _in_bfloat16(node, dtype) or _of_lengths(node, dtype),
    "LSTM": _of_lengths,
    "RNN": _of_lengths,
    "Shrink": _in_bfloat16,
}
"""Operators that are refused in a type, though not in float32; measured of TensorRT-RTX 1.7.1, and assumed of others.
Its builder refuses ConvTranspose in bfloat16, its parser all else."""
