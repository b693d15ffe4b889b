"""POSIX semaphores in memory that several processes map: they order memory, and a waiting process sleeps."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable

SEMAPHORE_BYTES = 64  # a cache line: more than sem_t takes anywhere, and what another core writes lies on another
NAP_S = 0.1

LIBC = ctypes.CDLL(None, use_errno=True)
QUICK = ctypes.PyDLL(None)  # keeps the interpreter's lock, for calls that return at once
BY_ANY_CLOCK = hasattr(LIBC, "sem_clockwait")  # of glibc 2.30; else naps are long where the wall clock is set back


class Timespec(ctypes.Structure):
    """A point in time as C has it: seconds and nanoseconds."""

    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class Semaphore:
    """Counts up with `post` and down with `wait`, at an offset of mapped memory.

    A rank that waits sleeps at once: looking again and again for 20 us before it slept, a rank took the core from the
    one that it waited for, wherever the two shared one.
    """

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._cell = (ctypes.c_char * SEMAPHORE_BYTES).from_buffer(memory, offset)
        self._address = ctypes.c_void_p(ctypes.addressof(self._cell))

    def start(self, value: int) -> None:
        """Initialise the semaphore, once, before any other process uses it."""
        _check(LIBC.sem_init(self._address, 1, value))

    def post(self) -> None:
        """Count up, and wake a process that waits."""
        _check(LIBC.sem_post(self._address))

    def wait(self, timeout_s: float | None, is_over: Callable[[], bool]) -> None:
        """Count down, once it is above zero; TimeoutError after `timeout_s`, BrokenPipeError once nobody will post."""
        start = time.perf_counter()
        while timeout_s is None or time.perf_counter() - start < timeout_s:
            over = is_over()  # asked first, since the last post may come just before the end
            if QUICK.sem_trywait(self._address) == 0:
                return
            if over:
                raise BrokenPipeError("it is gone")
            if self._nap() == 0:
                return
            if ctypes.get_errno() not in (errno.ETIMEDOUT, errno.EINTR):
                _check(-1)
        raise TimeoutError(f"nothing for {timeout_s:g} s")

    def _nap(self) -> int:
        """Count down, once it is above zero: 0; -1 after NAP_S."""
        now = time.monotonic_ns() if BY_ANY_CLOCK else time.time_ns()
        until = ctypes.byref(Timespec(*divmod(now + int(NAP_S * 1e9), 10**9)))
        if BY_ANY_CLOCK:
            return LIBC.sem_clockwait(self._address, time.CLOCK_MONOTONIC, until)
        return LIBC.sem_timedwait(self._address, until)


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
