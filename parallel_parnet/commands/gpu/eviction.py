"""A kernel whose only use is its length: it leaves no other kernel's instructions in a multiprocessor's cache.

In a network no level finds its own instructions there, since those of all others have been through it; timed by itself,
over and over, it would. On an H200 that is some microseconds of a level (docs/kernels.md).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from parallel_parnet.kernels.gpu.launch import Launch

LENGTH = 10_000  # instructions, of 16 bytes each
LONG = tl.constexpr("mov.f32 $0, $1;" + "fma.rn.f32 $0, $0, $1, $1;" * LENGTH)


@triton.jit
def long_kernel(out):
    """One value to out fp32 [programs]."""
    pid = tl.program_id(0)
    x = pid.to(tl.float32)
    tl.store(out + pid, tl.inline_asm_elementwise(LONG, "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1))


@cache
def eviction(device: torch.device) -> Launch:
    """On every multiprocessor of a GPU."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    return Launch("eviction", long_kernel, (torch.empty(programs, device=device),), (programs,), 4, 1)
