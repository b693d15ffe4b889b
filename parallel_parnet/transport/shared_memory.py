"""Features through memory that two ranks of one host map: the sender writes them once, the receiver reads in place.

The memory has no name (memfd), so that no crash can leave any behind: a rank opens another's through /proc, which the
kernel allows to the same user alone. It is sealed: no rank can shrink what another has mapped. A route is a ring of
IN_FLIGHT slots, guarded by two semaphores: `filled` counts messages that were not yet read, `free` slots to write to.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..program.placement import Transfer
from .base import IN_FLIGHT, Inbox, Transport
from .group import gather
from .health import Monitor
from .semaphore import SEMAPHORE_BYTES, Semaphore

SLOT_WORDS = 4  # int64s: generation, file descriptor at the sender, its size, bytes of the message
SMALL_BYTES = 64  # of a message that fits beside them: a header, which its reader may find when the sender has ended
SLOT_BYTES = SLOT_WORDS * 8 + SMALL_BYTES
ROUTE_BYTES = 2 * SEMAPHORE_BYTES + IN_FLIGHT * SLOT_BYTES


class SharedMemory(Transport):
    """A transport of CPU tensors between ranks on one Linux host. Every rank opens it with the same routes."""

    def __init__(self, routes: Sequence[Transfer]) -> None:
        super().__init__(routes)
        size = len(self.routes) * ROUTE_BYTES
        if self.lane == 0:
            control = Memory.create(size)
            for offset in range(0, size, ROUTE_BYTES):
                Semaphore(control.mapped, offset).start(0)
                Semaphore(control.mapped, offset + SEMAPHORE_BYTES).start(IN_FLIGHT)
        everyone = gather([os.getpid(), -1 if self.lane else control.descriptor])
        if self.lane:
            control = Memory.of_other(everyone[0][0], everyone[0][1], size)
        gather([0])  # now all have it, and its descriptor may go
        self._routes: list[Route] = []
        for tag, route in enumerate(self.routes):
            other = route.target if route.source == self.lane else route.source
            sender = everyone[route.source][0]
            self._routes.append(Route(control.mapped, tag * ROUTE_BYTES, sender, self.monitor, other))

    def inbox(self, tag: int, slot: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Inbox:
        return SharedInbox(self._routes[tag], shape, dtype)

    def _send(self, feature: Tensor, tag: int, slot: int) -> None:
        self._routes[tag].write(feature)


class Route:
    """One route's ring, at the sender or at the receiver. sender: the sending process. other: the rank opposite."""

    def __init__(self, control: mmap.mmap, offset: int, sender: int, monitor: Monitor, other: int) -> None:
        self.filled = Semaphore(control, offset)
        self.free = Semaphore(control, offset + SEMAPHORE_BYTES)
        starts = [offset + 2 * SEMAPHORE_BYTES + slot * SLOT_BYTES for slot in range(IN_FLIGHT)]
        self._words = [memoryview(control)[start : start + SLOT_WORDS * 8].cast("q") for start in starts]
        self._memories = [Memory(control, SMALL_BYTES, start + SLOT_WORDS * 8) for start in starts]
        self._generations = [0] * IN_FLIGHT
        self._count, self._sender, self._timeout_s = 0, sender, monitor.timeout_s
        self._is_over = partial(monitor.is_gone, other)

    def write(self, feature: Tensor) -> None:
        """Copy a tensor into the next slot, once that is free."""
        self.free.wait(self._timeout_s, self._is_over)
        slot = self._next()
        memory = self._memories[slot]
        if memory.size < feature.nbytes:
            memory = self._replace(slot, feature.nbytes)
        memory.view(feature.shape, feature.dtype).copy_(feature)
        self._words[slot][3] = feature.nbytes
        self.filled.post()

    def read(self, due: int, idle: bool) -> Memory:
        """Wait for the next message, of `due` bytes, and return its memory; give it back by `free`."""
        self.filled.wait(None if idle else self._timeout_s, self._is_over)
        slot = self._next()
        generation, descriptor, size, sent = self._words[slot]
        if sent != due:
            raise RuntimeError(f"{sent} bytes came where {due} were due")
        if generation != self._generations[slot]:
            self._memories[slot] = Memory.of_other(self._sender, descriptor, size)
            self._generations[slot] = generation
        if self._memories[slot].size < due:
            raise RuntimeError(f"memory of {self._memories[slot].size} bytes came where {due} were due")
        return self._memories[slot]

    def _next(self) -> int:
        slot = self._count % IN_FLIGHT
        self._count += 1
        return slot

    def _replace(self, slot: int, size: int) -> Memory:
        """New memory for a slot, which nobody reads just now."""
        memory = self._memories[slot] = Memory.create(size)
        words = self._words[slot]
        words[0], words[1], words[2] = words[0] + 1, memory.descriptor, size
        return memory


class SharedInbox(Inbox):
    """Messages of one shape, read where the sender wrote them."""

    def __init__(self, route: Route, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.route, self.shape, self.dtype = route, tuple(shape), dtype
        self.due = math.prod(shape) * dtype.itemsize

    def post(self) -> None:
        """Nothing to do: the ring has a slot."""

    def wait(self, idle: bool) -> Tensor:
        return self.route.read(self.due, idle).view(self.shape, self.dtype)

    def release(self) -> None:
        self.route.free.post()


class Memory:
    """A part of mapped memory.

    descriptor: by which other processes of this user can map it as well, while this object lives.
    """

    def __init__(self, mapped: mmap.mmap, size: int, offset: int = 0, descriptor: int = -1) -> None:
        self.mapped, self.size, self.offset, self.descriptor = mapped, size, offset, descriptor
        self._view: Tensor | None = None  # as it was last asked for

    @classmethod
    def create(cls, size: int) -> Memory:
        """Allocate memory without a name, of a fixed size in bytes; MemoryError where the system has not so much."""
        descriptor = os.memfd_create("parallel_parnet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(descriptor, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:  # which would be taken for another rank's that is gone
            os.close(descriptor)
            raise MemoryError(f"{size} bytes to share with other ranks ({error.strerror})") from error
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        memory = cls(mmap.mmap(descriptor, size), size, descriptor=descriptor)
        weakref.finalize(memory, os.close, descriptor)
        return memory

    @classmethod
    def of_other(cls, process: int, descriptor: int, size: int) -> Memory:
        """Map what another process created; RuntimeError where it is not of this size in bytes."""
        own = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(own).st_size != size:
                raise RuntimeError(f"shared memory of {os.fstat(own).st_size} bytes where {size} were due")
            return cls(mmap.mmap(own, size), size)
        finally:
            os.close(own)

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor at its start, in the memory format in which features cross lanes."""
        if self._view is None or (self._view.shape, self._view.dtype) != (shape, dtype):
            with torch.inference_mode(False):  # so that it can be written outside as well
                flat = torch.frombuffer(self.mapped, dtype=dtype, count=math.prod(shape), offset=self.offset)
                if len(shape) == 4:
                    n, c, h, w = shape
                    self._view = flat.view(n, h, w, c).movedim(-1, 1)
                else:
                    self._view = flat.view(shape)
        return self._view
