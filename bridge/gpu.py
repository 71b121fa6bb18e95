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


def why_it_cannot_be_used() -> str:
    """What CUDA says when the GPU is asked for, such as ``out of memory``; empty where it can be used."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    device, context, words = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_char_p()
    status = driver.cuInit(0)
    status = status or driver.cuDeviceGet(ctypes.byref(device), 0)
    status = status or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if status == 0:
        driver.cuDevicePrimaryCtxRelease_v2(device)
        return ""
    known = driver.cuGetErrorString(status, ctypes.byref(words)) == 0
    return words.value.decode() if known and words.value else f"CUDA error {status}"
