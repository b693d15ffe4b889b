"""Features written straight into the memory of a peer GPU, by torch's symmetric memory. Not run on hardware yet.

Each rank has one symmetric buffer with IN_FLIGHT slots for every route. The sender's kernels write a feature into the
buffer of the receiver, or a copy does, and the signal `filled` of its slot is raised; the receiver reads it there and
raises `free` at the sender, as it does for every slot at the start. A signal is raised by one side and taken down by
the other: `put_signal` waits for 0 and writes 1, `wait_signal` the reverse. Which slot a message takes is told, and
not counted: a CUDA graph would repeat a count as it was when it was captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from ..program.placement import Transfer
from .base import IN_FLIGHT, Inbox, Pending, memory_order
from .group import gather
from .torch_distributed import Gloo

ALIGNMENT = 256  # bytes
FILLED, FREE = range(2)


class Symmetric(Gloo):
    """A transport between GPUs that are peers, on the current CUDA stream; headers go by gloo."""

    in_graph = True
    kind = "cuda"  # of devices whose memory it can share

    def __init__(self, routes: Sequence[Transfer]) -> None:
        super().__init__(routes)
        self._capacities = [0] * len(self.routes)
        signals = 2 * IN_FLIGHT * len(self.routes) * self.monitor.world
        symm_mem.set_signal_pad_size(max(symm_mem.get_signal_pad_size(), 4 * signals))

    def reserve(self, sizes: Sequence[int], device: torch.device) -> bool:
        if device.type != self.kind or all(size <= c for size, c in zip(sizes, self._capacities)):
            return False
        group = dist.group.WORLD
        assert group is not None, "the ranks have joined"
        torch.cuda.synchronize(device)
        gather([0])  # nobody writes into the old buffer any more
        rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self._capacities = [max(pair) for pair in zip(rounded, self._capacities)]
        self._buffer = symm_mem.empty(IN_FLIGHT * sum(self._capacities), dtype=torch.uint8, device=device)
        self._handle = symm_mem.rendezvous(self._buffer, group)
        for tag, route in enumerate(self.routes[: len(sizes)]):
            if route.target == self.lane:
                for slot in range(IN_FLIGHT):
                    self.raise_(route.source, tag, slot, FREE)
        return True

    def inbox(self, tag: int, slot: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Inbox:
        if device.type != self.kind:
            return super().inbox(tag, slot, shape, dtype, device)
        return SymmetricInbox(self, tag, slot, shape, dtype)

    def outbox(self, tag: int, slot: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        return self.buffer_at(self.routes[tag].target, tag, slot, shape, dtype)

    def ready(self, tag: int, slot: int) -> None:
        self.take(self.routes[tag].target, tag, slot, FREE)

    def _send(self, feature: Tensor, tag: int, slot: int) -> Pending | None:
        if feature.device.type != self.kind:
            return super()._send(feature, tag, slot)
        flat = memory_order(feature).view(-1)
        there = self.buffer_at(self.routes[tag].target, tag, slot, flat.shape, feature.dtype)
        if there.data_ptr() != flat.data_ptr():
            self.ready(tag, slot)
            there.copy_(flat)
        self.raise_(self.routes[tag].target, tag, slot, FILLED)
        return None

    def buffer_at(self, rank: int, tag: int, slot: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a slot of a route in the buffer of a rank, as a tensor of this shape and type."""
        start = IN_FLIGHT * sum(self._capacities[:tag]) + slot * self._capacities[tag]
        return self._handle.get_buffer(rank, list(shape), dtype, start // dtype.itemsize)

    def raise_(self, rank: int, tag: int, slot: int, kind: int) -> None:
        """Raise a signal at another rank, after what the current CUDA stream did before."""
        self._handle.put_signal(rank, channel(tag, slot, kind), int(self.monitor.timeout_s * 1e3))

    def take(self, rank: int, tag: int, slot: int, kind: int) -> None:
        """Make the current CUDA stream wait for another rank's signal."""
        self._handle.wait_signal(rank, channel(tag, slot, kind), int(self.monitor.timeout_s * 1e3))


class SymmetricInbox(Inbox):
    """A message where its sender wrote it. Waiting makes the current CUDA stream wait, not the host."""

    def __init__(self, transport: Symmetric, tag: int, slot: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.transport, self.tag, self.slot = transport, tag, slot
        self.source = transport.routes[tag].source
        order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
        there = transport.buffer_at(transport.lane, tag, slot, [shape[i] for i in order], dtype)
        self.message = there.movedim(-1, 1) if len(shape) == 4 else there

    def post(self) -> None:
        """Nothing to do: the sender knows the slot."""

    def wait(self, idle: bool) -> Tensor:
        self.transport.take(self.source, self.tag, self.slot, FILLED)
        return self.message

    def release(self) -> None:
        self.transport.raise_(self.source, self.tag, self.slot, FREE)


def channel(tag: int, slot: int, kind: int) -> int:
    """Return the number of a signal. kind: FILLED or FREE."""
    return 2 * (tag * IN_FLIGHT + slot) + kind
