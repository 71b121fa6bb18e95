"""Transforms back to signals, and their frequencies; the other transforms torch.onnx writes as DFT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .registry import decomposes, translates

_LIBRARY = torch.library.Library("bridge", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("irfft(Tensor bins, int axis, int normalization, SymInt size) -> Tensor")  # type: ignore[no-untyped-call]


def _shape(bins: Tensor, axis: int, normalization: int, size: int) -> Tensor:
    shape = list(bins.shape[:-1])
    shape[axis] = size
    return bins.new_empty(shape)


torch.library.register_fake("bridge::irfft", _shape, lib=_LIBRARY)

_BY_ROOT, _BY_SIZE = 1, 2
"""torch's normalizations; by nothing is 0."""


@translates("bridge::irfft")
def onnx_irfft(bins, axis: int, normalization: int, size):  # type: ignore[no-untyped-def]
    """The real part of the inverse transform of one half, in which each bin that has a mirror stands for it too.

    ONNX's own inverse of a half, which torch.onnx writes, is one that ONNX Runtime 1.23 refuses.
    """
    from onnxscript import opset18

    op: Any = opset18  # which takes numbers too
    axes = len(bins.shape) - 1
    axis %= axes
    place = op.Range(0, op.Squeeze(op.Shape(bins, start=axis, end=axis + 1)), 1)
    alone = op.Or(op.Equal(place, 0), op.Equal(op.Mul(place, 2), size))
    stands_for = op.Reshape(op.Where(alone, 1.0, 2.0), [-1] + [1] * (axes - axis))
    bins = op.Mul(bins, op.CastLike(stands_for, bins))
    if axis:
        x = op.Gather(op.DFT(bins, size, axis=axis, inverse=1), 0, axis=-1)
    else:  # which DFT takes for the batch
        x = op.Gather(op.DFT(op.Unsqueeze(bins, [0]), size, axis=1, inverse=1), 0, axis=-1)
        x = op.Squeeze(x, [0])
    if normalization == _BY_SIZE:  # as DFT's inverse is
        return x
    factor = op.CastLike(size, x)
    return op.Mul(x, op.Sqrt(factor) if normalization == _BY_ROOT else factor)


@decomposes("istft")
def istft(
    self: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> Tensor:
    """Frames by the inverse transform, added where they overlap by a transposed convolution with an identity."""
    hop = hop_length or n_fft // 4
    size = win_length or n_fft
    batched = (self if self.dim() == 3 else self.unsqueeze(0)).transpose(1, 2)
    real = torch.view_as_real(batched).dtype
    if window is None:
        window = torch.ones(size, dtype=real, device=self.device)
    left = (n_fft - size) // 2
    window = torch.nn.functional.pad(window, (left, n_fft - size - left))
    norm = "ortho" if normalized else "backward"
    if return_complex or onesided is False:
        frames = torch.fft.ifft(batched, n_fft, -1, norm)
        parts = [torch.real(frames), torch.imag(frames)] if return_complex else [torch.real(frames)]
    else:
        parts = [torch.fft.irfft(batched, n_fft, -1, norm)]
    kernel = torch.eye(n_fft, dtype=real, device=self.device).unsqueeze(1)
    count = self.shape[-1]
    square = (window * window).reshape(1, n_fft, 1).expand(1, n_fft, count)
    envelope = torch.nn.functional.conv_transpose1d(square, kernel, stride=hop).squeeze(1)
    total = n_fft + hop * (count - 1)
    start = n_fft // 2 if center else 0
    end = start + length if length is not None else total - start
    signals = []
    for part in parts:
        frames = (part * window).transpose(1, 2)
        added = torch.nn.functional.conv_transpose1d(frames, kernel, stride=hop).squeeze(1)
        if length is not None:
            added = torch.nn.functional.pad(added, (0, length))
        signals.append(added[..., start:end])
    if length is not None:
        envelope = torch.nn.functional.pad(envelope, (0, length), value=1.0)
    envelope = envelope[..., start:end]
    signals = [signal / envelope for signal in signals]
    found = torch.complex(signals[0], signals[1]) if return_complex else signals[0]
    return found if self.dim() == 3 else found.squeeze(0)


@decomposes("fft_fftfreq")
def fftfreq(n: int, d: float = 1.0, *, dtype: torch.dtype | None = None, device: object = None, **_: object) -> Tensor:
    positive = (n + 1) // 2
    place = torch.arange(n, dtype=torch.get_default_dtype() if dtype is None else dtype)
    return torch.where(place < positive, place, place - n) / (n * d)


@decomposes("fft_rfftfreq")
def rfftfreq(n: int, d: float = 1.0, *, dtype: torch.dtype | None = None, device: object = None, **_: object) -> Tensor:
    return torch.arange(n // 2 + 1, dtype=torch.get_default_dtype() if dtype is None else dtype) / (n * d)


@decomposes(*(f"hamming_window{which}" for which in ("", ".periodic", ".periodic_alpha", ".periodic_alpha_beta")))
def hamming_window(
    window_length: int,
    periodic: bool = True,
    alpha: float = 0.54,
    beta: float = 0.46,
    *,
    dtype: torch.dtype | None = None,
    device: object = None,
    **_: object,
) -> Tensor:
    """torch.onnx writes ONNX's HammingWindow, whose coefficients are 25 / 46 and 21 / 46."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    period = window_length if periodic else window_length - 1
    places = torch.arange(window_length, dtype=dtype)
    return alpha - beta * torch.cos(2 * math.pi / period * places) if period else torch.ones_like(places)
