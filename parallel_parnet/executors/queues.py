"""Where lanes of one process run: one after another, or each in a CUDA stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch

from ..profiling.spans import NOTHING
from ..program.placement import Segment


class Queues:
    """Queues of work, one for each lane, with the events between them that `schedule` describes.

    This base class has one queue for all lanes: what is handed out is done at once, or in the current CUDA stream, so
    that what came before is done before.
    """

    def start(self) -> None:
        """Let the coordinator's queue be the one in which its caller works."""

    def run(self, lane: int, work: Callable[[], None]) -> None:
        """Hand work to the lane's queue."""
        work()

    def record(self, lane: int, event: int) -> None:
        """Let the event be reached once the lane has done what it was handed before."""

    def wait(self, lane: int, event: int) -> None:
        """Let the lane go on once the event is reached."""

    def between(self, source: int, target: int) -> AbstractContextManager[object]:
        """A context for a copy from the source lane's device, within what the target lane's queue runs."""
        return NOTHING

    def end(self) -> None:
        """Hear that all has been handed out. Queues that defer work, so that a test may choose its order, do it now."""


class CudaQueues(Queues):
    """CUDA streams of one GPU or of several; the coordinator's is the current one, which is the one under capture."""

    def __init__(self, devices: Sequence[torch.device], coordinator: int, events: Iterable[int]) -> None:
        self.devices, self.coordinator = devices, coordinator
        self.streams = [torch.cuda.Stream(device) for device in devices]
        self.events = {event: torch.cuda.Event() for event in events}

    def start(self) -> None:
        self.streams[self.coordinator] = torch.cuda.current_stream(self.devices[self.coordinator])

    def run(self, lane: int, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.streams[lane]):
            work()

    def record(self, lane: int, event: int) -> None:
        self.events[event].record(self.streams[lane])

    def wait(self, lane: int, event: int) -> None:
        self.streams[lane].wait_event(self.events[event])

    def between(self, source: int, target: int) -> AbstractContextManager[object]:
        """torch copies in the current CUDA stream of the source's device, which must be that of the source's lane: a
        capture would not hold another."""
        both = ExitStack()
        for lane in (source, target):
            both.enter_context(torch.cuda.stream(self.streams[lane]))
        return both


def are_peers(writer: torch.device, reader: torch.device) -> bool:
    """Return whether kernels on one GPU may write into the memory of the other; if so, they can from now on."""
    if not torch.cuda.can_device_access_peer(writer, reader):
        return False
    torch.empty(1, device=reader, dtype=torch.uint8).copy_(torch.empty(1, device=writer, dtype=torch.uint8))
    return True  # torch has switched access on, to make that copy


def wait_for_packing(segments: Sequence[Segment], devices: Iterable[torch.device]) -> None:
    """Wait until weights are packed, where lanes of this process read them in CUDA streams of their own: only the
    current ones know of the packing. devices: on which there may be some."""
    if len({segment.lane for segment in segments}) > 1:
        for device in {device for device in devices if device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
