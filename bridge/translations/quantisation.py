"""Simulated quantisation: torch.onnx knows ranges that fill a type, at static shapes, and none of what QAT leaves.

Those of -127 to 127, as TensorRT's tools train weights, are clipped before they are quantised to int8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .registry import Untranslatable, replaces, translates

TYPES = ((np.int8, -128, 127), (np.uint8, 0, 255))

_LIBRARY = torch.library.Library("bridge", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int? axis, int low, int high) -> Tensor"
)


def _shape(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


torch.library.register_fake("bridge::fake_quantize", _shape, lib=_LIBRARY)


@replaces("fake_quantize_per_tensor_affine")
def per_tensor(self: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    steps, zero = torch.full((), scale), torch.full((), zero_point, dtype=torch.int32)
    return _quantised(self, steps, zero, None, quant_min, quant_max)


@replaces("fake_quantize_per_tensor_affine.tensor_qparams")
def per_tensor_of_tensors(self: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return _quantised(self, scale.reshape(()), zero_point.reshape(()), None, quant_min, quant_max)


@replaces("fake_quantize_per_channel_affine")
def per_channel(self: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> Tensor:
    return _quantised(self, scale, zero_point, axis, quant_min, quant_max)


@replaces("fused_moving_avg_obs_fake_quant")
def trained(
    self: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int,
    per_row_fake_quant: bool = False,
    symmetric_quant: bool = False,
) -> Tensor:
    """Of a module after quantisation-aware training, by the scales that it has: an observer that is still on, and would
    change them, is not followed."""
    if per_row_fake_quant:
        rounded = _quantised(self, scale, zero_point, ch_axis, quant_min, quant_max)
    else:
        rounded = _quantised(self, scale.reshape(()), zero_point.reshape(()), None, quant_min, quant_max)
    return torch.where(fake_quant_on.reshape(()) != 0, rounded, self)


def _quantised(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    found: Tensor = torch.ops.bridge.fake_quantize(x, scale, zero_point, axis, low, high)
    return found


def _type(low: int, high: int) -> Any:
    for kind, first, last in TYPES:
        if first <= low <= high <= last:
            return kind
    raise Untranslatable(f"quantisation to the range {low} to {high}, which neither int8 nor uint8 holds")


@translates("bridge::fake_quantize")
def onnx_pair(x, scale, zero_point, axis: int | None, low: int, high: int):  # type: ignore[no-untyped-def]
    from onnxscript import opset18 as op

    kind = _type(low, high)
    steps: Any = op.Cast(scale, to=1)
    zero: Any = op.Cast(zero_point, to=3 if kind is np.int8 else 2)
    if (low, high) != (np.iinfo(kind).min, np.iinfo(kind).max):
        offset: Any = op.Cast(zero_point, to=1)
        along = steps
        if axis is not None:
            rank = len(x.shape)
            shape = _constant(np.array([-1 if place == axis % rank else 1 for place in range(rank)]))
            offset, along = op.Reshape(offset, shape), op.Reshape(steps, shape)
        ends = [op.Mul(op.Sub(_constant(np.float32(end)), offset), along) for end in (low, high)]
        x = op.Clip(x, *ends) if axis is None else op.Min(op.Max(x, ends[0]), ends[1])
    attrs = {} if axis is None else {"axis": axis}
    return op.DequantizeLinear(op.QuantizeLinear(x, steps, zero, **attrs), steps, zero, **attrs)


def _constant(value: Any) -> Any:
    import onnx
    from onnxscript import opset18 as op

    return op.Constant(value=onnx.numpy_helper.from_array(np.asarray(value)))
