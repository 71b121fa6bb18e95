"""The GPU that engines are built for here, as the CUDA driver describes it."""

from __future__ import annotations

import ctypes

from . import target


def gpu_here() -> str:
    """Name and compute capability of the GPU that TensorRT uses by default; empty where there is none."""
    capabilities = target.gpu_compute_capabilities()
    if not capabilities:
        return ""
    driver = ctypes.CDLL("libcuda.so.1")
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0 or driver.cuDeviceGetName(name, len(name), device) != 0:
        return ""
    return f"{name.value.decode(errors='replace')} {'.'.join(map(str, capabilities[0]))}"


def error_words(number: int) -> str:
    """What CUDA's error of this number is; empty where there is no driver, or it knows none."""
    words = ctypes.c_char_p()
    try:
        known = ctypes.CDLL("libcuda.so.1").cuGetErrorString(number, ctypes.byref(words)) == 0
    except OSError:
        return ""
    return words.value.decode() if known and words.value else ""
