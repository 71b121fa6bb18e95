"""64-bit inputs in the 32 bits that TensorRT before 10 has for them: a kernel for all inputs of a call.

What torch does before it launches its own takes longer than all else in a call. This one is launched by CUDA's driver
itself, whose code is in the processor's caches after the launch of an engine.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

MOST = 8
"""Inputs that one launch converts."""

THREADS = 256
"""Of a block; each converts one element. Block (x, y) is the x-th of input y."""

Kernel = tuple[int, int]
"""The addresses of the driver's ``cuLaunchKernel``, and of the kernel on a GPU."""

# Of each input it is given where to write, where to read, the number of elements, and whether they are floats: four
# times 8 bytes. As torch does, integers keep their lower half, and floats are rounded to the nearest.
PTX = f"""
.version 6.0
.target sm_50
.address_size 64

.visible .entry narrow(.param .align 8 .b8 inputs[{32 * MOST}])
{{
    .reg .pred %past, %float;
    .reg .b32  %x, %y, %thread, %threads, %integer;
    .reg .b64  %input, %offset, %to, %from, %count, %kind, %place, %wide;
    .reg .f32  %single;
    .reg .f64  %double;

    mov.u32         %y, %ctaid.y;
    mul.wide.u32    %offset, %y, 32;
    mov.b64         %input, inputs;
    add.u64         %input, %input, %offset;
    ld.param.u64    %to, [%input];
    ld.param.u64    %from, [%input+8];
    ld.param.u64    %count, [%input+16];
    ld.param.u64    %kind, [%input+24];

    mov.u32         %x, %ctaid.x;
    mov.u32         %threads, %ntid.x;
    mov.u32         %thread, %tid.x;
    cvt.u64.u32     %place, %thread;
    mad.wide.u32    %place, %x, %threads, %place;
    setp.ge.u64     %past, %place, %count;
    @%past ret;

    cvta.to.global.u64  %to, %to;
    cvta.to.global.u64  %from, %from;
    mad.lo.u64      %to, %place, 4, %to;
    mad.lo.u64      %from, %place, 8, %from;
    ld.global.b64   %wide, [%from];
    setp.ne.u64     %float, %kind, 0;
    @%float bra     FLOAT;
    cvt.u32.u64     %integer, %wide;
    st.global.b32   [%to], %integer;
    ret;
FLOAT:
    mov.b64         %double, %wide;
    cvt.rn.f32.f64  %single, %double;
    st.global.f32   [%to], %single;
    ret;
}}
"""


@functools.cache
def kernel(device: int) -> Kernel | None:
    """Loads the kernel on the current GPU, which has this number; None where CUDA's driver does not: torch converts
    then."""
    if torch.version.cuda is None:
        return None
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    if driver.cuModuleLoadData(ctypes.byref(module), PTX.encode()) != 0:
        return None
    if driver.cuModuleGetFunction(ctypes.byref(function), module, b"narrow") != 0:
        return None
    launch = ctypes.cast(driver.cuLaunchKernel, ctypes.c_void_p).value
    return (launch, function.value) if launch and function.value else None
