"""``torch2trt.torch2trt``: the function, and what else torch2trt's users import from here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bridge import Dataset, Flattener, ListDataset, TRTModule, torch2trt

from .dataset_calibrator import DEFAULT_CALIBRATION_ALGORITHM, DatasetCalibrator
from .gone import CONVERTERS as _NO_CONVERTERS
from .gone import PLUGINS as _NO_PLUGINS
from .gone import gone as _gone
from .misc_utils import torch_device_from_trt, torch_device_to_trt, torch_dtype_from_trt, torch_dtype_to_trt
from .version_utils import module_of_tensorrt as _module_of_tensorrt
from .version_utils import torch_version, trt_version

_Converter = TypeVar("_Converter", bound=Callable[..., Any])

ConversionContext = _gone("ConversionContext", _NO_CONVERTERS)
ConversionHook = _gone("ConversionHook", _NO_CONVERTERS)
add_missing_trt_tensors = _gone("add_missing_trt_tensors", _NO_CONVERTERS)
add_trt_constant = _gone("add_trt_constant", _NO_CONVERTERS)
attach_converter = _gone("attach_converter", _NO_CONVERTERS)
broadcast_trt_tensors = _gone("broadcast_trt_tensors", _NO_CONVERTERS)
check_torch_dtype = _gone("check_torch_dtype", _NO_CONVERTERS)
get_arg = _gone("get_arg", _NO_CONVERTERS)
get_conversion_context = _gone("get_conversion_context", _NO_CONVERTERS)
load_plugins = _gone("load_plugins", _NO_PLUGINS)
make_int_wrapper = _gone("make_int_wrapper", _NO_CONVERTERS)
make_size_wrapper = _gone("make_size_wrapper", _NO_CONVERTERS)
set_layer_precision = _gone("set_layer_precision", _NO_CONVERTERS)
torch_dim_resolve_negative = _gone("torch_dim_resolve_negative", _NO_CONVERTERS)
torch_dim_to_trt_axes = _gone("torch_dim_to_trt_axes", _NO_CONVERTERS)
trt_ = _gone("trt_", _NO_CONVERTERS)

__all__ = [
    "DEFAULT_CALIBRATION_ALGORITHM",
    "ConversionContext",
    "ConversionHook",
    "Dataset",
    "DatasetCalibrator",
    "Flattener",
    "ListDataset",
    "TRTModule",
    "add_missing_trt_tensors",
    "add_trt_constant",
    "attach_converter",
    "broadcast_trt_tensors",
    "check_torch_dtype",
    "default_input_names",
    "default_output_names",
    "get_arg",
    "get_conversion_context",
    "load_plugins",
    "make_int_wrapper",
    "make_size_wrapper",
    "set_layer_precision",
    "tensorrt_converter",
    "torch2trt",
    "torch_device_from_trt",
    "torch_device_to_trt",
    "torch_dim_resolve_negative",
    "torch_dim_to_trt_axes",
    "torch_dtype_from_trt",
    "torch_dtype_to_trt",
    "torch_version",
    "trt_",
    "trt_version",
]


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


__getattr__ = _module_of_tensorrt  # for ``from torch2trt.torch2trt import trt``
