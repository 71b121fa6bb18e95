"""Models for the rules of passes/rules/fourier.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder

from . import Arrays, Case, Sketch, Tensors, strategy


def as_complex(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide[..., 0] + (1j * wide[..., 1] if x.shape[-1] == 2 else 0)


def as_pairs(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.stack([x.real, x.imag], -1).astype(dtype)


@strategy("dft_as_matmul")
def transforms(s: Sketch) -> Case:
    return transform(s, real=False)


@strategy("real_part_of_dft_as_matmul")
def transforms_whose_real_part_is_read(s: Sketch) -> Case:
    return transform(s, real=True)


def transform(s: Sketch, real: bool) -> Case:
    """NumPy says what is right: ONNX Runtime 1.31 has errors in inverse one-sided transforms."""
    sizes = s.sizes(2, 4, high=9)
    inverse, onesided = s.pick(None, 0, 1), s.pick(None, 0, 1)
    backward_half = bool(inverse and onesided)
    parts = 2 if backward_half else 1 if onesided else s.pick(1, 2)
    dtype = s.pick("float32", "float32", "float64", "float16")
    opset = s.pick(17, 19, 20) if not backward_half else 20
    axis = s.integer(0, len(sizes) - 1)
    spelt = s.pick(axis, axis - len(sizes) - 1)
    length = s.pick(None, s.integer(1, 12))
    last = s.pick(-1, len(sizes)) if real else -1
    if backward_half and length is None and sizes[axis] == 1:
        length = 2
    s.input("x", dtype, [*sizes, parts])
    if length is not None:
        s.constants["length"] = np.array(length, s.pick(np.int64, np.int32))

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        ways = {"inverse": inverse, "onesided": onesided}
        if opset < 20:
            y = g.op.DFT(t["x"], t.get("length"), axis=spelt, **ways)
        else:
            y = g.op.DFT(t["x"], t.get("length"), g.constant(spelt), **ways)
        return g.op.Gather(y, g.constant(0), axis=last) if real else y

    def true(feeds: Arrays) -> list[np.ndarray]:
        x = as_complex(feeds["x"])
        if backward_half:
            y = np.fft.irfft(x, length, axis)
        else:
            y = (np.fft.ifft if inverse else np.fft.fft)(x, length, axis)
        if onesided and not inverse:
            y = np.take(y, range(y.shape[axis] // 2 + 1), axis)
        if real or backward_half:
            return [(y.real if real else y.real[..., None]).astype(dtype)]
        return [as_pairs(y, dtype)]

    return s.model(build, opset=opset, reference=true)


@strategy("stft_as_convolution", "stft_of_other_forms")
def spectrograms(s: Sketch) -> Case:
    batch, parts = s.integer(1, 3), s.pick(1, 1, 2)
    frame, step = s.integer(2, 9), s.integer(1, 5)
    length = frame + s.integer(0, 20)
    onesided = s.pick(None, 1, 0) if parts == 1 else 0
    dtype = s.pick("float32", "float32", "float64")
    window = s.values(dtype, [frame]) if s.flag() else None
    s.input("x", dtype, [batch, length, parts] if parts == 2 or s.flag() else [batch, length, 1])
    s.constants["step"] = np.array(step, np.int64)
    if window is not None:
        s.operand("window", window)
    if window is None or s.flag():
        s.constants["length"] = np.array(frame, np.int64)

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        return g.op.STFT(t["x"], t["step"], t.get("window"), t.get("length"), onesided=onesided)

    def true(feeds: Arrays) -> list[np.ndarray]:
        x = as_complex(feeds["x"])
        frames = np.stack([x[:, i : i + frame] for i in range(0, length - frame + 1, step)], 1)
        y = np.fft.fft(frames * (1 if window is None else window.astype(np.float64)), axis=-1)
        return [as_pairs(y if onesided == 0 else y[..., : frame // 2 + 1], dtype)]

    return s.model(build, opset=s.pick(17, 20), reference=true)
