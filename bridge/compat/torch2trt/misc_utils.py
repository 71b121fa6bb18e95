"""``torch2trt.misc_utils``: torch's types and devices as TensorRT's, and back."""

from __future__ import annotations

from typing import Any

import torch

from .gone import CONVERTERS, gone
from .version_utils import tensorrt

_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
_LOCATIONS = {"DEVICE": "cuda", "HOST": "cpu"}

trt_int_dtype = gone("trt_int_dtype", CONVERTERS)


def torch_dtype_to_trt(dtype: torch.dtype) -> Any:
    trt = tensorrt()
    for name, own in _TYPES.items():
        if own == dtype and hasattr(trt.DataType, name):
            return getattr(trt.DataType, name)
    raise TypeError(f"{dtype} is not supported by tensorrt")


def torch_dtype_from_trt(dtype: Any) -> torch.dtype:
    name = str(dtype).rsplit(".", 1)[-1]
    if name not in _TYPES:
        raise TypeError(f"{dtype} is not supported by torch")
    return _TYPES[name]


def torch_device_to_trt(device: torch.device) -> Any:
    for name, kind in _LOCATIONS.items():
        if device.type == kind:
            return getattr(tensorrt().TensorLocation, name)
    raise TypeError(f"{device} is not supported by tensorrt")


def torch_device_from_trt(device: Any) -> torch.device:
    name = str(device).rsplit(".", 1)[-1]
    if name not in _LOCATIONS:
        raise TypeError(f"{device} is not supported by torch")
    return torch.device(_LOCATIONS[name])


__all__ = [
    "torch_device_from_trt",
    "torch_device_to_trt",
    "torch_dtype_from_trt",
    "torch_dtype_to_trt",
    "trt_int_dtype",
]
