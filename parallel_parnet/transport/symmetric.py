"""Features written straight into the memory of a peer GPU, by torch's symmetric memory. Not run on hardware yet.

Each rank has one symmetric buffer with IN_FLIGHT places for every route. The sender copies a feature into the buffer of
the receiver and raises the signal `filled` of its place; the receiver reads it there and raises `free` at the sender. A
signal is raised by one side and taken down by the other: `put_signal` waits for 0 and writes 1, `wait_signal` the
reverse.
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
    """Between GPUs that are peers, on the current CUDA stream; headers go by gloo."""

    name = "symmetric"

    def __init__(self, routes: Sequence[Transfer]) -> None:
        super().__init__(routes)
        self._capacities = [0] * len(self.routes)
        self._passed = [0] * len(self.routes)  # messages, sent or received
        signals = 2 * IN_FLIGHT * len(self.routes) * self.monitor.world
        symm_mem.set_signal_pad_size(max(symm_mem.get_signal_pad_size(), 4 * signals))

    def reserve(self, sizes: Sequence[int], device: torch.device) -> None:
        if device.type != "cuda" or all(size <= c for size, c in zip(sizes, self._capacities)):
            return
        group = dist.group.WORLD
        assert group is not None, "the ranks have joined"
        torch.cuda.synchronize(device)
        gather([0])  # nobody writes into the old buffer any more
        rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self._capacities = [max(pair) for pair in zip(rounded, self._capacities)]
        self._buffer = symm_mem.empty(IN_FLIGHT * sum(self._capacities), dtype=torch.uint8, device=device)
        self._handle = symm_mem.rendezvous(self._buffer, group)
        self._passed = [0] * len(self.routes)

    def inbox(self, tag: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Inbox:
        if device.type != "cuda":
            return super().inbox(tag, shape, dtype, device)
        return SymmetricInbox(self, tag, shape, dtype)

    def _send(self, feature: Tensor, tag: int) -> Pending | None:
        if feature.device.type != "cuda":
            return super()._send(feature, tag)
        flat, target = memory_order(feature).view(-1), self.routes[tag].target
        used_before = self._passed[tag] >= IN_FLIGHT
        place = self.next_place(tag)
        if used_before:
            self.take(target, tag, place, FREE)
        self.place(target, tag, place, flat.shape, feature.dtype).copy_(flat)
        self.raise_(target, tag, place, FILLED)
        return None

    def next_place(self, tag: int) -> int:
        """Where the next message of a route goes, or comes from."""
        self._passed[tag] += 1
        return (self._passed[tag] - 1) % IN_FLIGHT

    def place(self, rank: int, tag: int, place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A place of a route in the buffer of a rank, as a tensor."""
        start = IN_FLIGHT * sum(self._capacities[:tag]) + place * self._capacities[tag]
        return self._handle.get_buffer(rank, list(shape), dtype, start // dtype.itemsize)

    def raise_(self, rank: int, tag: int, place: int, kind: int) -> None:
        """Raise a signal at another rank, after what the current CUDA stream did before."""
        self._handle.put_signal(rank, channel(tag, place, kind), int(self.monitor.timeout_s * 1e3))

    def take(self, rank: int, tag: int, place: int, kind: int) -> None:
        """Make the current CUDA stream wait for another rank's signal."""
        self._handle.wait_signal(rank, channel(tag, place, kind), int(self.monitor.timeout_s * 1e3))


class SymmetricInbox(Inbox):
    """The messages of a route where its sender wrote them. Waiting makes the current CUDA stream wait, not the host."""

    def __init__(self, transport: Symmetric, tag: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.transport, self.tag, self.shape, self.dtype = transport, tag, tuple(shape), dtype

    def post(self) -> None:
        """Nothing to do: the sender knows the place."""

    def wait(self, idle: bool) -> Tensor:
        transport, tag = self.transport, self.tag
        self._place = transport.next_place(tag)
        transport.take(transport.routes[tag].source, tag, self._place, FILLED)
        if len(self.shape) != 4:
            return transport.place(transport.lane, tag, self._place, self.shape, self.dtype)
        n, c, h, w = self.shape
        return transport.place(transport.lane, tag, self._place, (n, h, w, c), self.dtype).movedim(-1, 1)

    def release(self) -> None:
        self.transport.raise_(self.transport.routes[self.tag].source, self.tag, self._place, FREE)


def channel(tag: int, place: int, kind: int) -> int:
    """The number of a signal."""
    return 2 * (tag * IN_FLIGHT + place) + kind
