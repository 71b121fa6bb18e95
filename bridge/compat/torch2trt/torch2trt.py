"""``torch2trt.torch2trt``: the function, and what else torch2trt's users import from here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bridge import Dataset, Flattener, FolderDataset, ListDataset, TensorBatchDataset, TRTModule, torch2trt
from bridge.runtime.dataset import dynamic_axes

from .dataset_calibrator import DEFAULT_CALIBRATION_ALGORITHM, DatasetCalibrator
from .gone import CONVERTERS as _NO_CONVERTERS
from .gone import PLUGINS as _NO_PLUGINS
from .gone import gone as _gone
from .misc_utils import (
    torch_device_from_trt,
    torch_device_to_trt,
    torch_dtype_from_trt,
    torch_dtype_to_trt,
    trt_int_dtype,
)
from .module_test import add_module_test
from .version_utils import torch_version, trt, trt_version

_Converter = TypeVar("_Converter", bound=Callable[..., Any])

CONVERTERS: dict[Any, Any] = {}
"""None: what ``tensorrt_converter`` is given is not kept."""

_OF_CONVERTERS = (
    "ConversionContext",
    "ConversionHook",
    "IntWrapper",
    "NetworkWrapper",
    "SizeWrapper",
    "add_missing_trt_tensors",
    "add_trt_constant",
    "attach_converter",
    "broadcast_trt_tensors",
    "check_torch_dtype",
    "device_type_str",
    "get_arg",
    "get_conversion_context",
    "get_module_qualname",
    "make_int_wrapper",
    "make_size_wrapper",
    "set_layer_precision",
    "torch_dim_resolve_negative",
    "torch_dim_to_trt_axes",
    "trt_",
    "use_shape_wrapping",
    "wrap_ints",
)
globals().update({_name: _gone(_name, _NO_CONVERTERS) for _name in _OF_CONVERTERS})
load_plugins = _gone("load_plugins", _NO_PLUGINS)

__all__ = [
    *_OF_CONVERTERS,
    "CONVERTERS",
    "DEFAULT_CALIBRATION_ALGORITHM",
    "Dataset",
    "DatasetCalibrator",
    "F",
    "Flattener",
    "FolderDataset",
    "ListDataset",
    "TRTModule",
    "TensorBatchDataset",
    "add_module_test",
    "default_input_names",
    "default_output_names",
    "infer_dynamic_axes",
    "load_plugins",
    "nn",
    "np",
    "tensorrt_converter",
    "torch",
    "torch2trt",
    "torch_device_from_trt",
    "torch_device_to_trt",
    "torch_dtype_from_trt",
    "torch_dtype_to_trt",
    "torch_version",
    "trt",
    "trt_int_dtype",
    "trt_num_inputs",
    "trt_num_outputs",
    "trt_version",
]
"""With the modules that torch2trt's own imports left there: converters use them as ``from torch2trt import *`` does."""


def tensorrt_converter(
    method: Any, is_real: bool = True, enabled: bool = True, imports: Sequence[str] = ()
) -> Callable[[_Converter], _Converter]:
    """A decorator that leaves a converter as it is, and warns that it is not used, as with torch2trt's use_onnx."""
    if enabled:
        warnings.warn(f"{_NO_CONVERTERS.format('tensorrt_converter')} The one of {method} is not used.", stacklevel=2)
    return lambda converter: converter


def default_input_names(num_inputs: int) -> list[str]:
    return [f"input_{index}" for index in range(num_inputs)]


def default_output_names(num_outputs: int) -> list[str]:
    return [f"output_{index}" for index in range(num_outputs)]


def infer_dynamic_axes(
    min_shapes_flat: Sequence[Sequence[int]], max_shapes_flat: Sequence[Sequence[int]]
) -> list[list[int]]:
    return [dynamic_axes(low, high) for low, high in zip(min_shapes_flat, max_shapes_flat, strict=True)]


def trt_num_inputs(engine: Any) -> int:
    modes = [engine.get_tensor_mode(engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]
    return modes.count(trt.TensorIOMode.INPUT)


def trt_num_outputs(engine: Any) -> int:
    return int(engine.num_io_tensors) - trt_num_inputs(engine)
