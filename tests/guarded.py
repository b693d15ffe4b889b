"""Tensors with pages around them that nobody may touch, so that a kernel that reads or writes beyond them is ended."""

from __future__ import annotations

import ctypes
import mmap
import signal
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, frombuffer

from forked import Forked
from parallel_parnet.kernels.gpu.convolution import Convolution, Operands

FORBIDDEN, LIMIT_S = 0, 200
WIDEST = 16  # bytes that a kernel reads at once, and to which its operands are aligned
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(tensor: Tensor, at_its_end: bool) -> Tensor:
    """The same values, ending where such a page begins, or beginning where one ends."""
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // page) * page
    room = mmap.mmap(-1, size + 2 * page)  # which forks share
    base = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for start in (base, base + page + size):
        assert LIBC.mprotect(start, page, FORBIDDEN) == 0
    first = page + (size - -(-tensor.nbytes // WIDEST) * WIDEST if at_its_end else 0)
    return frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=first).view(tensor.shape).copy_(tensor)


def guard(conv: Convolution, at_its_end: bool) -> Convolution:
    """With guarded operands."""
    x = {name: None if t is None else guarded(t, at_its_end) for name, t in conv.x._asdict().items()}
    return replace(conv, x=Operands(**x))


def touches_a_guard(work: Callable[[], object]) -> bool:
    """Whether a fork of this process that does the work is ended by what it touches. Guarded tensors have afterwards
    what it wrote to them."""

    def unreported() -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's handler says where
        work()

    ended = Forked(unreported).wait(LIMIT_S)
    assert ended in (0, -signal.SIGSEGV, -signal.SIGBUS), f"exit status {ended}"
    return ended != 0
