"""Fourier transforms: ``torch.fft.*`` and ``torch.stft``/``istft`` export as DFT and STFT. TensorRT lacks DFT.

A transform of known length is a product with a constant matrix of cosines and sines. The matrix of a long transform
would be too large; a length n = p·q is then done in two such steps with a rotation in between (Cooley and Tukey 1965).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule
from passes.model import Array
from passes.rules.shapes import Size, as_tensor, iota, shape_tensor, size

LARGEST_MATRIX = 16 << 20
"""Elements of the largest constant matrix; a complex transform of 2048 samples has exactly as many."""


@rule("DFT", when=lacks("DFT"))
def dft_as_matmul(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no DFT; one of known length is a product with a constant matrix of cosines and sines."""
    readers = node.outputs[0].outputs
    if readers and not g.is_output(node.outputs[0]) and all(_reads_real_part(reader, g) for reader in readers):
        return None
    return _transformed(node, g, real=False)


@rule("Gather", when=lacks("DFT"))
def real_part_of_dft_as_matmul(node: gs.Node, g: Builder) -> Replacement:
    """Of a transform whose real part alone is read, the matrix has no columns for the other."""
    if not _reads_real_part(node, g) or node.inputs[0].inputs[0].op != "DFT":
        return None
    return g.squeeze(_transformed(node.inputs[0].inputs[0], g, real=True), [-1])


def _reads_real_part(node: gs.Node, g: Builder) -> bool:
    """Whether it takes the first element of the last axis, and leaves the axis out."""
    if node.op != "Gather" or not node.inputs[0].inputs or not isinstance(node.inputs[1], gs.Constant):
        return False
    shape, index = node.inputs[0].shape, g.value(node.inputs[1])
    axis = int(node.attrs.get("axis", 0))
    return shape is not None and axis in (-1, len(shape) - 1) and index.ndim == 0 and index == 0


def _transformed(node: gs.Node, g: Builder, real: bool) -> gs.Tensor:
    """What a DFT computes; ``real``: of complex results the first part alone, in an axis of one."""
    x = node.inputs[0]
    rank = len(g.shape(x))
    axis = _dft_axis(node, g, rank)
    parts = g.static_dim(x, -1)
    inverse, onesided = bool(node.attrs.get("inverse", 0)), bool(node.attrs.get("onesided", 0))
    given = g.input(node, 1)
    if given is not None and not isinstance(given, gs.Constant):  # as torch writes it: of the axis' own size
        n = g.op.Reshape(g.cast(given, np.int64), [1])
        pads: list[Size] = [0] * (2 * rank)
        pads[rank + axis] = n
        x = g.op.Pad(x, shape_tensor(g, pads))  # then no shorter than wanted
        x = g.op.Slice(x, [0], n, [axis], [1])
        return _dynamic(g, x, axis, parts, inverse, onesided, real)
    if given is None and not isinstance(g.shape(x)[axis], int):
        return _dynamic(g, x, axis, parts, inverse, onesided, real)
    if given is not None:
        n = int(g.value(given).reshape(-1)[0])
    else:
        n = g.static_dim(x, axis)
        n = 2 * (n - 1) if inverse and onesided else n
    wanted = n // 2 + 1 if inverse and onesided else n
    length = g.shape(x)[axis]
    if not isinstance(length, int):
        x = g.op.Pad(x, [0] * (rank + axis) + [wanted] + [0] * (rank - axis - 1))  # then no shorter than wanted
    if not isinstance(length, int) or length > wanted:
        x = g.slice(x, [0], [wanted], [axis], [1])
    length = min(length, wanted) if isinstance(length, int) else wanted

    x = g.moveaxis(x, axis, -2)
    if inverse and onesided and 2 * length * n <= LARGEST_MATRIX:
        y = _times(g, x, irfft_basis(n, length), length, n, 1)
    elif inverse and onesided:
        y = _in_two_steps(g, _mirrored(g, x, n, length), n, n, 2, inverse)
        y = g.slice(y, [0], [1], [rank - 1], [1])
    else:
        bins = n // 2 + 1 if onesided else n
        if 4 * length * bins <= LARGEST_MATRIX:
            basis = dft_basis(n, length, bins, parts, inverse)
            y = _times(g, x, basis[:, ::2] if real else basis, length, bins, 1 if real else 2)
        else:
            y = _in_two_steps(g, x, n, length, parts, inverse)
            y = g.slice(y, [0], [bins], [rank - 2], [1]) if bins < n else y
            y = g.slice(y, [0], [1], [rank - 1], [1]) if real else y
    return g.moveaxis(y, -2, axis)


def _dynamic(g: Builder, x: gs.Tensor, axis: int, parts: int, inverse: bool, onesided: bool, real: bool) -> gs.Tensor:
    """Over an axis of any length: the matrix is computed from it."""
    if inverse and onesided:
        g.decline(f"the inverse of one side of a spectrum of dynamic length; give the length of axis {axis}")
    dtype, n = g.dtype(x), as_tensor(g, size(g, x, axis))
    bins = g.op.Add(g.op.Div(n, [2]), [1]) if onesided else n
    turns = g.op.Mod(g.op.Mul(g.unsqueeze(iota(g, n), [1]), iota(g, bins)), n)  # whole ones left out, exactly
    angle = g.op.Mul(g.cast(turns, np.float32), g.op.Div(g.constant(2 * np.pi), g.cast(n, np.float32)))
    cos = g.cast(g.op.Cos(angle), dtype)
    sin = g.cast(g.op.Sin(angle) if inverse else g.op.Neg(g.op.Sin(angle)), dtype)
    x = g.moveaxis(x, axis, -2)
    last = len(g.shape(x)) - 1
    first, *rest = (g.squeeze(g.slice(x, [part], [part + 1], [last], [1]), [last]) for part in range(parts))
    y = [g.op.MatMul(first, cos), g.op.MatMul(first, sin)]
    for imaginary in rest:
        y = [
            g.op.Sub(y[0], g.op.MatMul(imaginary, sin)),
            g.op.Add(y[1], g.op.MatMul(imaginary, cos)),
        ]
    if inverse:
        y = [g.op.Div(item, g.cast(n, dtype)) for item in y]
    parted = [g.unsqueeze(item, [last]) for item in (y[:1] if real else y)]
    return g.moveaxis(g.op.Concat(*parted, axis=last), -2, axis)


def _dft_axis(node: gs.Node, g: Builder, rank: int) -> int:
    """The axis, not negative: an attribute (1 by default) up to opset 19, an input (-2 by default) from 20 on."""
    if g.opset < 20:
        return int(node.attrs.get("axis", 1)) % rank
    given = g.input(node, 2)
    return (-2 if given is None else int(g.value(given).reshape(-1)[0])) % rank


def dft_basis(n: int, length: int, bins: int, parts: int, inverse: bool) -> Array:
    """[length·parts, bins·2]: from ``length`` samples of (re, im), or re alone, to ``bins`` of (re, im)."""
    angle = 2 * np.pi * (np.outer(np.arange(length), np.arange(bins)) % n) / n
    cos, sin = np.cos(angle), np.sin(angle) * (1 if inverse else -1)
    of_real, of_imaginary = np.stack([cos, sin], -1), np.stack([-sin, cos], -1)
    basis = np.stack([of_real, of_imaginary][:parts], 1).reshape(length * parts, bins * 2)
    return basis / n if inverse else basis


def irfft_basis(n: int, length: int) -> Array:
    """[length·2, n]: from the first ``length`` of n // 2 + 1 bins (re, im) of a real signal to its n samples."""
    bins = np.arange(length)
    angle = 2 * np.pi * (np.outer(bins, np.arange(n)) % n) / n
    weight = np.where((bins == 0) | (2 * bins == n), 1, 2)[:, None] / n  # bins in between stand for their mirror too
    return np.stack([weight * np.cos(angle), -weight * np.sin(angle)], 1).reshape(length * 2, n)


def _times(g: Builder, x: gs.Tensor, basis: Array, length: int, bins: int, parts: int) -> gs.Tensor:
    """[…, length, c] times ``basis`` as […, bins, parts]."""
    if basis.size > LARGEST_MATRIX:
        g.decline(f"a matrix of {basis.size:,} elements is needed, more than {LARGEST_MATRIX:,}")
    lead = len(g.shape(x)) - 2
    flat = g.op.Reshape(x, [0] * lead + [basis.shape[0]])
    product = g.op.MatMul(flat, g.constant(basis.astype(g.dtype(x))))
    result: gs.Tensor = g.op.Reshape(product, [0] * lead + [bins, parts])
    return result


def _mirrored(g: Builder, x: gs.Tensor, n: int, length: int) -> gs.Tensor:
    """All n bins […, n, 2] of a real signal, of whose one half the first ``length`` are given."""
    axis = len(g.shape(x)) - 2
    half = n // 2 + 1
    if length < half:
        x = g.op.Pad(x, [0] * (2 * axis + 2) + [half - length, 0])
    rest = g.op.Gather(x, g.constant(list(range((n - 1) // 2, 0, -1))), axis=axis)
    conjugate = g.op.Mul(rest, g.constant([1, -1], g.dtype(x)))
    bins: gs.Tensor = g.op.Concat(x, conjugate, axis=axis)
    return bins


def _in_two_steps(g: Builder, x: gs.Tensor, n: int, length: int, parts: int, inverse: bool) -> gs.Tensor:
    """The n bins of a long transform: n = p·q, sample p·j + i and bin q·k + m, over j first, then over i."""
    p = max((d for d in range(1, math.isqrt(n) + 1) if n % d == 0), default=1)
    q = n // p
    if 4 * q * q > LARGEST_MATRIX:
        g.decline(f"the length {n} has no two factors below {math.isqrt(LARGEST_MATRIX) // 2}; pad the signal")
    lead = len(g.shape(x)) - 2
    if length < n:
        x = g.op.Pad(x, [0] * (2 * lead + 2) + [n - length, 0])
    x = g.op.Reshape(x, [0] * lead + [q, p, parts])
    x = g.moveaxis(x, lead, lead + 1)  # […, i, j, part]
    y = _times(g, x, dft_basis(q, q, q, parts, inverse), q, q, 2)  # […, i, m, 2]
    angle = 2 * np.pi * np.outer(np.arange(p), np.arange(q)) / n * (1 if inverse else -1)
    rotation = np.stack([np.cos(angle), np.sin(angle)], -1).astype(g.dtype(x))
    swapped = g.op.Concat(
        g.op.Neg(g.slice(y, [1], [2], [lead + 2], [1])), g.slice(y, [0], [1], [lead + 2], [1]), axis=lead + 2
    )
    y = g.op.Add(
        g.op.Mul(y, g.constant(rotation[..., :1])),
        g.op.Mul(swapped, g.constant(np.ascontiguousarray(rotation[..., 1:]))),
    )
    y = g.moveaxis(y, lead, lead + 1)  # […, m, i, 2]
    y = _times(g, y, dft_basis(p, p, p, 2, inverse), p, p, 2)  # […, m, k, 2]
    y = g.moveaxis(y, lead, lead + 1)
    result: gs.Tensor = g.op.Reshape(y, [0] * lead + [n, 2])
    return result


@dft_as_matmul.example
def rfft_of_a_dynamic_batch() -> gs.Graph:
    return example({"x": ("float32", ["n", 16, 1])}, lambda g, x: g.op.DFT(x, None, g.constant(-2), onesided=1))


@dft_as_matmul.example
def fft_over_the_first_axis() -> gs.Graph:
    return example({"x": ("float32", [12, 3, 5, 2])}, lambda g, x: g.op.DFT(x, None, g.constant(0)))


@dft_as_matmul.example
def inverse_fft_padded_to_a_length() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 6, 9, 2])}, lambda g, x: g.op.DFT(x, g.constant(12), g.constant(1), inverse=1)
    )


@dft_as_matmul.example
def two_sided_fft_of_a_real_signal_cropped() -> gs.Graph:
    return example({"x": ("float32", [3, 20, 1])}, lambda g, x: g.op.DFT(x, g.constant(15), g.constant(1)))


@dft_as_matmul.example
def axis_as_an_attribute() -> gs.Graph:
    return example({"x": ("float32", ["n", 3, 10, 1])}, lambda g, x: g.op.DFT(x, axis=2, onesided=1), opset=17)


@dft_as_matmul.example
def a_dynamic_axis_of_given_length() -> gs.Graph:
    return example({"x": ("float32", [2, "t", 1])}, lambda g, x: g.op.DFT(x, g.constant(8), g.constant(1), onesided=1))


@dft_as_matmul.example
def rfft_of_any_length() -> gs.Graph:
    return example({"x": ("float32", ["n", "t", 1])}, lambda g, x: g.op.DFT(x, None, g.constant(1), onesided=1))


@dft_as_matmul.example
def fft_of_a_length_that_is_computed() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        length = g.op.Gather(g.op.Shape(x), g.constant(1), axis=0)
        result: gs.Tensor = g.op.DFT(x, g.op.Add(length, g.constant(1)), g.constant(1))
        return result

    return example({"x": ("float32", ["n", "t", 1])}, build)


@dft_as_matmul.example
def inverse_fft_of_any_length() -> gs.Graph:
    return example({"x": ("float32", ["t", 4, 2])}, lambda g, x: g.op.DFT(x, None, g.constant(0), inverse=1))


@dft_as_matmul.example
def irfft_of_torch() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        spectrum = g.op.DFT(x, g.constant(15), g.constant(1), onesided=1)
        result: gs.Tensor = g.op.DFT(spectrum, g.constant(15), g.constant(1), inverse=1, onesided=1)
        return result

    return example({"x": ("float32", ["n", 15, 1])}, build)


@dft_as_matmul.example
def a_long_inverse_fft_in_two_steps() -> gs.Graph:
    return example({"x": ("float32", ["n", 4096, 2])}, lambda g, x: g.op.DFT(x, None, g.constant(1), inverse=1))


def _real_part(g: Builder, x: gs.Tensor, **attrs: int) -> gs.Tensor:
    result: gs.Tensor = g.op.Gather(g.op.DFT(x, None, g.constant(1), **attrs), g.constant(0), axis=-1)
    return result


@real_part_of_dft_as_matmul.example
def real_part_of_an_fft() -> gs.Graph:
    return example({"x": ("float32", ["n", 6, 3, 1])}, _real_part)


@real_part_of_dft_as_matmul.example
def real_part_of_an_inverse_fft_of_any_length() -> gs.Graph:
    return example({"x": ("float32", ["n", "t", 2])}, lambda g, x: _real_part(g, x, inverse=1))


@real_part_of_dft_as_matmul.example
def real_part_of_a_long_inverse_fft() -> gs.Graph:
    return example({"x": ("float32", ["n", 4096, 2])}, lambda g, x: _real_part(g, x, inverse=1))


@rule("STFT", when=lacks("STFT"))
def stft_as_convolution(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT before 10 has no STFT; it is a strided convolution with the windowed cosines and sines."""
    return _stft(node, g)


@rule("STFT", when=~lacks("STFT"))
def stft_of_other_forms(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT's STFT is of real signals, with a window that is known; as a convolution it can be of any."""
    window = g.input(node, 2)
    real = len(g.shape(node.inputs[0])) == 2 or g.shape(node.inputs[0])[2] == 1
    return None if real and (window is None or isinstance(window, gs.Constant)) else _stft(node, g)


def _stft(node: gs.Node, g: Builder) -> gs.Tensor:
    signal = node.inputs[0]
    window_input, length_input = g.input(node, 2), g.input(node, 3)
    constant = window_input is None or isinstance(window_input, gs.Constant)
    if len(g.shape(signal)) == 2:
        signal = g.unsqueeze(signal, [2])
    parts = g.static_dim(signal, 2)
    step = int(g.value(node.inputs[1]).reshape(-1)[0])
    window = g.value(window_input).astype(np.float64) if window_input is not None and constant else None
    if length_input is not None:
        frame = int(g.value(length_input).reshape(-1)[0])
    else:
        frame = g.static_dim(window_input, 0) if window_input is not None else g.static_dim(signal, 1)
    bins = frame // 2 + 1 if node.attrs.get("onesided", 1) else frame
    basis = dft_basis(frame, frame, bins, parts, False).reshape(frame, parts, 2 * bins)
    if window is not None:
        basis = basis * window[:, None, None]
    if basis.size > LARGEST_MATRIX:
        g.decline(f"a filter bank of {basis.size:,} elements is needed, more than {LARGEST_MATRIX:,}")
    filters = g.constant(np.ascontiguousarray(basis.transpose(2, 1, 0)).astype(g.dtype(signal)))
    if not constant:
        filters = g.op.Mul(filters, window_input)
    frames = g.op.Conv(g.op.Transpose(signal, perm=[0, 2, 1]), filters, kernel_shape=[frame], strides=[step])
    result: gs.Tensor = g.op.Transpose(g.op.Reshape(frames, [0, bins, 2, -1]), perm=[0, 3, 1, 2])
    return result


@stft_as_convolution.example
def stft_with_a_window() -> gs.Graph:
    window = np.hanning(17)[:-1].astype(np.float32)
    return example(
        {"x": ("float32", ["n", 64, 1])},
        lambda g, x: g.op.STFT(x, g.constant(8), g.constant(window), g.constant(16), onesided=1),
    )


@stft_as_convolution.example
def two_sided_stft_of_a_complex_signal() -> gs.Graph:
    return example(
        {"x": ("float32", [2, 50, 2])},
        lambda g, x: g.op.STFT(x, g.constant(5), None, g.constant(12), onesided=0),
        opset=17,
    )


@stft_of_other_forms.example
def stft_with_a_window_of_run_time() -> gs.Graph:
    return example(
        {"x": ("float32", ["n", 40, 1]), "window": ("float32", [16])},
        lambda g, x, window: g.op.STFT(x, g.constant(8), window, g.constant(16), onesided=1),
    )


@stft_of_other_forms.example
def stft_of_a_complex_signal() -> gs.Graph:
    return example({"x": ("float32", ["n", 50, 2])}, lambda g, x: g.op.STFT(x, 5, None, 12, onesided=0), opset=17)
