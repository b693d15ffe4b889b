"""One GPU with a CUDA stream for each lane: torch's own operations, forked and joined by events.

What other engines do with parallel branches, kept for comparison with the grouped launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from ..profiling.spans import Recorder
from ..program.placement import Placement
from ..program.program import INPUT, Program
from .local import profile
from .schedule import START, Record, Run, Step, Wait, fork_and_join, sources
from .segment import SegmentModule


class Queues(Protocol):
    """Queues of work that run side by side, one for each lane."""

    def start(self) -> None:
        """Let the coordinator's queue be the one in which its caller works."""

    def run(self, lane: int, work: Callable[[], None]) -> None: ...
    def record(self, lane: int, event: int) -> None: ...
    def wait(self, lane: int, event: int) -> None: ...


class CudaQueues:
    """CUDA streams of one GPU; the coordinator's is the current one, which is the one under capture."""

    def __init__(self, lanes: int, coordinator: int, events: Iterable[int], device: torch.device) -> None:
        self.device, self.coordinator = device, coordinator
        self.streams = [torch.cuda.Stream(device) for _ in range(lanes)]
        self.events = {event: torch.cuda.Event() for event in events}

    def start(self) -> None:
        self.streams[self.coordinator] = torch.cuda.current_stream(self.device)

    def run(self, lane: int, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.streams[lane]):
            work()

    def record(self, lane: int, event: int) -> None:
        self.events[event].record(self.streams[lane])

    def wait(self, lane: int, event: int) -> None:
        self.streams[lane].wait_event(self.events[event])


class StreamsPass:
    """A forward pass over pictures of one shape; see `graph.Pass`.

    Features stay until the lanes have joined, so that no lane's memory is given away while another reads it.
    """

    def __init__(
        self,
        program: Program,
        placement: Placement,
        modules: list[SegmentModule],
        steps: tuple[Step, ...],
        queues: Queues,
        picture: Tensor,
    ) -> None:
        self.modules, self.steps, self.queues, self.picture = modules, steps, queues, picture
        self.coordinator = placement.coordinator
        self.sources = sources([module.segment for module in modules])
        self.output = program.output
        self.writer = next(i for i, module in enumerate(modules) if program.output in module.segment.writes)
        shape = program.shape(program.output, picture.shape[0], *picture.shape[2:])
        self.logits = torch.empty(shape, dtype=torch.float32, device=picture.device)

    def launch(self) -> None:
        """Hand all segments out to the lanes' queues; fill the logits in the coordinator's."""
        features: dict[tuple[str, int], Tensor] = {(INPUT, START): self.picture}
        self.queues.start()
        for step in self.steps:
            match step:
                case Run(lane, i):
                    self.queues.run(lane, lambda i=i: self._segment(i, features))  # type: ignore[misc]
                case Record(lane, event):
                    self.queues.record(lane, event)
                case Wait(lane, event):
                    self.queues.wait(lane, event)
        self.queues.run(self.coordinator, lambda: self._answer(features))

    def _segment(self, i: int, features: dict[tuple[str, int], Tensor]) -> None:
        module = self.modules[i]
        names = zip(module.segment.reads, self.sources[i], strict=True)
        outputs = module(*(features[key] for key in names))
        features.update(zip(((name, i) for name in module.segment.writes), outputs, strict=True))

    def _answer(self, features: dict[tuple[str, int], Tensor]) -> None:
        self.logits.copy_(features[self.output, self.writer])


class StreamsSource:
    """Makes passes of a placement whose lanes are CUDA streams of one GPU; see `graph.Source`."""

    def __init__(
        self,
        program: Program,
        placement: Placement,
        device: torch.device,
        dtype: torch.dtype,
        queues: Queues | None = None,
    ) -> None:
        self.program, self.placement, self.device, self.dtype = program, placement, device, dtype
        segments = placement.segments(program)
        self.modules = [SegmentModule(program, segment, dtype, device) for segment in segments]
        self.steps = fork_and_join(segments, placement.coordinator)
        events = (step.event for step in self.steps if isinstance(step, Record))
        self.queues = queues or CudaQueues(placement.lanes, placement.coordinator, events, device)

    def make(self, shape: torch.Size) -> StreamsPass:
        """The pass for pictures of this shape, in channels_last."""
        picture = torch.empty(shape, dtype=self.dtype, device=self.device)
        picture = picture.contiguous(memory_format=torch.channels_last)
        return StreamsPass(self.program, self.placement, self.modules, self.steps, self.queues, picture)

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, one lane after another, operation by operation: a recorder of spans for each lane."""
        return profile(self.modules, [self.device] * self.placement.lanes, {INPUT: x_nchw.to(self.dtype)})
