"""What every transport is: numbered routes between lanes, each with messages that arrive in the order of sending."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..program.placement import Transfer
from .group import joined
from .health import Watched

IN_FLIGHT = 2  # messages of a route that may be on their way: one being read while the next arrives


class Pending(Protocol):
    """A send under way."""

    def wait(self) -> object:
        """Wait until the tensor may be changed."""


class Inbox(ABC):
    """Where the messages of one route arrive, all of one shape."""

    @abstractmethod
    def post(self) -> None:
        """Announce that a message may arrive, as early as possible: before other work, and before it is waited for."""

    @abstractmethod
    def wait(self, idle: bool) -> Tensor:
        """Return the oldest message, once it is here; it stays as it is until `release`. idle: without a time limit."""

    @abstractmethod
    def release(self) -> None:
        """Declare that the message has been read, so that its slot may be written again."""


class Transport(ABC):
    """Sends and receives between the ranks that `join_ranks` joined; a rank is a lane.

    A tag is the index of a route: what travels, from which lane to which. A slot is a number below IN_FLIGHT, the same
    at both ends of a message: where it arrives, which for some transports is memory that both know.

    in_graph: sends and receives of tensors on GPUs are enqueued, so that a CUDA graph can hold them.
    """

    in_graph = False

    def __init__(self, routes: Sequence[Transfer]) -> None:
        self.monitor, self.routes = joined(), tuple(routes)
        self._sending = [
            Watched(self.monitor, f"sending {route.feature} to rank {route.target}", route.target) for route in routes
        ]
        self._waiting = [Watched(self.monitor, f"waiting for {route.feature}", route.source) for route in routes]

    @property
    def lane(self) -> int:
        """This rank's number, which is that of its lane."""
        return self.monitor.rank

    def reserve(self, sizes: Sequence[int], device: torch.device) -> bool:
        """Prepare for messages of so many bytes, by tag, on `device`; return whether inboxes made before are void now.

        Every rank calls it, with the same arguments, while no message is under way.
        """
        return False

    @abstractmethod
    def inbox(self, tag: int, slot: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Inbox:
        """Make an inbox on `device` for messages of this shape, which others of the same route may take turns with."""

    def outbox(self, tag: int, slot: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Return memory of the receiver, if any, into which kernels may write a message, once it is `ready`."""
        return None

    def ready(self, tag: int, slot: int) -> None:
        """Make the current CUDA stream wait until an outbox may be written."""
        raise NotImplementedError("there are no outboxes")

    @abstractmethod
    def _send(self, feature: Tensor, tag: int, slot: int) -> Pending | None:
        """Start to send a feature; None where nothing is left to do."""

    def send(self, feature: Tensor, tag: int, slot: int = 0) -> Pending | None:
        """Start to send a feature, which must stay unchanged until `finish`. Ranks send a route's messages in order."""
        with self._sending[tag]:
            return self._send(feature, tag, slot)

    def finish(self, work: Pending | None, tag: int) -> None:
        """Wait for a send; LaneError where the other rank is lost or the time is over."""
        if work is not None:
            with self._sending[tag]:
                work.wait()

    def post(self, inbox: Inbox, tag: int) -> None:
        """Post the inbox; LaneError where the other rank is lost already."""
        with self._waiting[tag]:
            inbox.post()

    def waiting(self, action: str) -> Watched:
        """A context for waiting by other means; a RuntimeError in it becomes a LaneError."""
        return Watched(self.monitor, action)

    def wait(self, inbox: Inbox, tag: int, idle: bool = False) -> Tensor:
        """Return the inbox's next message; LaneError where the other rank is lost, or, unless `idle`, time is over."""
        with self._waiting[tag]:
            return inbox.wait(idle)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, pinned: bool = False) -> Tensor:
    """Allocate memory for what crosses lanes: features [N, C, H, W] in channels_last, everything else contiguous."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=memory_format, pin_memory=pinned)


def memory_order(feature: Tensor) -> Tensor:
    """Return a feature in the order in which it crosses lanes, contiguous: [N, C, H, W] as [N, H, W, C].

    It is the same memory, where that has this order already.
    """
    return (feature.movedim(1, -1) if feature.ndim == 4 else feature).contiguous()
