"""Transports over torch.distributed: gloo, through the host's memory and sockets, and NCCL between GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..program.placement import Transfer
from .base import Inbox, Pending, Transport, empty, memory_order

FOREVER = timedelta(days=365)


class Gloo(Transport):
    """A transport over sockets. Tensors on GPUs go through the host, so several ranks may share a GPU."""

    def __init__(self, routes: Sequence[Transfer]) -> None:
        super().__init__(routes)
        self._first = self.monitor.take_tags(len(routes))  # gloo's own: messages for another engine must not match

    def inbox(self, tag: int, slot: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Inbox:
        on_gpu = device.type == "cuda"
        arriving = empty(shape, dtype, torch.device("cpu"), pinned=on_gpu)
        feature = empty(shape, dtype, device) if on_gpu else arriving
        return ReceivingInbox(arriving, self.routes[tag].source, self._first + tag, feature)

    def _send(self, feature: Tensor, tag: int, slot: int) -> Pending | None:
        return _started(dist.isend(memory_order(feature.cpu()), self.routes[tag].target, tag=self._first + tag))


class ReceivingInbox(Inbox):
    """Messages that torch.distributed receives. Waiting for NCCL makes the current CUDA stream wait, and not the host.

    arriving: the buffer that is received into, by gloo on the host. feature: where it is read, on a GPU or the same
    buffer.
    """

    def __init__(
        self, arriving: Tensor, source: int, tag: int, feature: Tensor, group: dist.ProcessGroup | None = None
    ) -> None:
        assert memory_order(arriving).data_ptr() == arriving.data_ptr(), "received where it is read"
        self.arriving, self.source, self.tag, self.feature, self.group = arriving, source, tag, feature, group
        self._work: dist.Work | None = None

    def post(self) -> None:
        self._work = _started(dist.irecv(memory_order(self.arriving), self.source, self.group, self.tag))

    def wait(self, idle: bool) -> Tensor:
        assert self._work is not None
        if idle:
            self._work.wait(FOREVER)  # gloo breaks all connections when one wait is over time
        else:
            self._work.wait()
        return self.feature if self.feature is self.arriving else self.feature.copy_(self.arriving)

    def release(self) -> None:
        """Nothing to do: the next receive, once posted, writes, NCCL's after what the current CUDA stream was given."""


class Nccl(Gloo):
    """A transport between GPUs, enqueued on CUDA streams, or in a CUDA graph once they have run. Headers go by gloo.

    NCCL matches the messages of a communicator by order and not by tag, and a receive blocks what is behind it. So
    every route has a communicator of its own. torch makes it when the route is first used, and that call holds the host
    up until the other end makes its first: lanes that post their receives first would wait for each other in a circle.
    So `reserve` uses every route once, in an order that is the same on all ranks.
    """

    in_graph = True
    kind = "cuda"  # of devices between which it sends

    def __init__(self, routes: Sequence[Transfer]) -> None:
        super().__init__(routes)
        self._groups: list[Any] = [dist.new_group([route.source, route.target], backend="nccl") for route in routes]
        self._connected = False

    def reserve(self, sizes: Sequence[int], device: torch.device) -> bool:
        if device.type == self.kind and not self._connected:
            for tag, route in enumerate(self.routes[: len(sizes)]):
                if route.source == self.lane:
                    self.finish(self.send(torch.zeros(1, dtype=torch.float32, device=device), tag), tag)
                elif route.target == self.lane:
                    inbox = self.inbox(tag, 0, (1,), torch.float32, device)
                    self.post(inbox, tag)
                    self.wait(inbox, tag)
            self._connected = True
        return False

    def inbox(self, tag: int, slot: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Inbox:
        if device.type != self.kind:
            return super().inbox(tag, slot, shape, dtype, device)
        feature = empty(shape, dtype, device)
        return ReceivingInbox(feature, self.routes[tag].source, 0, feature, self._groups[tag])

    def _send(self, feature: Tensor, tag: int, slot: int) -> Pending | None:
        if feature.device.type != self.kind:
            return super()._send(feature, tag, slot)
        return _started(dist.isend(memory_order(feature), self.routes[tag].target, self._groups[tag]))


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank takes part in the transfer"
    return work
