"""Memory in large pages, where the system has them.

A pass reads every weight once, and what fetches memory ahead, in a CPU, stops at the end of a page.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes of a large one
FLAG = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux's


def zeros(size: int) -> Tensor:
    """So many bytes, or MemoryError. In large pages where they fill at least half of one, and otherwise as torch
    allocates."""
    if FLAG is None or size < PAGE // 2:
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    try:
        pages = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError(f"{size} bytes cannot be had") from None
    with suppress(OSError):  # a kernel without them: what is mapped is as good, in small ones
        pages.madvise(FLAG)
    memory = torch.frombuffer(pages, dtype=torch.uint8)  # which keeps it mapped
    start = -memory.data_ptr() % PAGE
    return memory[start : start + size]
