"""One process: its lanes are queues, on one device or several, by any backend."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from typing import cast

import torch
from torch import Tensor

from ..profiling.ranges import Ranges
from ..profiling.spans import Recorder, Spans, span
from ..program.placement import Placement, Segment
from ..program.program import INPUT, Program
from .answers import Answer, answers_from_messages, each
from .binding import Backend, Bindings
from .queues import CudaQueues, Queues, are_peers
from .schedule import START, Record, RunSegment, Wait, fork_and_join, sources
from .shapes import Shapes

WHOLE_GPU = RLock()  # of captures and of waits for a whole GPU, which no capture of another thread survives
Key = tuple[str, int]  # a feature, and the segment that writes it


class LocalExecutor:
    """Runs a placement's segments, each in the queue of its lane.

    A GPU's kernels write a feature that another GPU alone reads into that one's memory, where it lets them; other
    features are copied when they are needed. queues, peers: stand-ins for those of CUDA.
    """

    def __init__(
        self,
        placement: Placement,
        devices: Sequence[torch.device],
        backend: Backend,
        queues: Queues | None = None,
        peers: Callable[[torch.device, torch.device], bool] = are_peers,
    ) -> None:
        self.placement, self.devices, self.backend = placement, devices, backend
        self.program: Program = backend.program
        self.segments = placement.segments(self.program)
        self.sources = sources(self.segments)
        self.device = devices[placement.coordinator]
        self.steps = fork_and_join(self.segments, placement.coordinator)
        on_gpus = placement.lanes > 1 and self.device.type == "cuda"
        events = [step.event for step in self.steps if isinstance(step, Record)]
        self.queues = queues or (CudaQueues(devices, placement.coordinator, events) if on_gpus else Queues())
        self.answers = {name: self._writer(name) for name in self.program.answers.values()}
        self.homes = self._homes(peers) if backend.in_place else {}
        self.ranges = Ranges.of(self.program)
        self.synchronise = partial(synchronise, devices)
        self._passes: Shapes[tuple[int, ...], Pass] = Shapes(self.synchronise)

    def __call__(self, x_nchw: Tensor) -> Answer:
        """Return logits [N, classes], or outputs by name, fp32, on the pictures' device, until the next call."""
        return self.run(x_nchw, self.ranges)

    @torch.inference_mode()
    def run(self, x_nchw: Tensor, spans: Spans | None) -> Answer:
        """Return what a call returns. spans: in which each segment is marked, and each step that runs by itself."""
        found = self.kept(x_nchw.shape)
        answer = found.run(found.bindings.enter(x_nchw), spans)
        return each(answer, lambda tensor: tensor.to(x_nchw.device, torch.float32))

    def kept(self, shape: tuple[int, ...]) -> Pass:
        """Return the pass for pictures [N, 3, H, W] of this shape, made when it is first asked for."""
        return self._passes(shape, self.make)

    def make(self, shape: Sequence[int]) -> Pass:
        """Make a pass for pictures [N, 3, H, W] of this shape, with buffers of its own."""
        return Pass(self, shape)

    @torch.inference_mode()
    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, one lane after another, step by step: a recorder of spans for each lane, each on its device."""
        found, recorders = self.kept(x_nchw.shape), [Recorder(synchroniser(device)) for device in self.devices]
        features: dict[Key, Tensor] = {(INPUT, START): found.bindings.enter(x_nchw)}
        for i in range(len(self.segments)):
            found.segment(i, features, Queues(), recorders[self.segments[i].lane], stepwise=True)
        return recorders

    def _homes(self, peers: Callable[[torch.device, torch.device], bool]) -> dict[Key, torch.device]:
        """Features that may be written where they are read, on another device than their maker's."""
        readers: dict[Key, set[torch.device]] = {key: {self.device} for key in self.answers.items()}
        for segment, writers in zip(self.segments, self.sources, strict=True):
            for key in zip(segment.reads, writers, strict=True):
                readers.setdefault(key, set()).add(self.devices[segment.lane])
        homes = {}
        for (name, writer), devices in readers.items():
            maker = self.maker(writer)
            if len(devices) == 1 and maker not in devices and name != INPUT and peers(maker, min(devices, key=str)):
                (homes[name, writer],) = devices
        return homes

    def _writer(self, name: str) -> int:
        """The segment from which an answer is read: the coordinator's own, if it has one."""
        writers = [i for i, segment in enumerate(self.segments) if name in segment.writes]
        return next((i for i in writers if self.segments[i].lane == self.placement.coordinator), writers[0])

    def maker(self, writer: int) -> torch.device:
        """Return the device on which a segment, or START for the picture, leaves its features."""
        return self.device if writer == START else self.devices[self.segments[writer].lane]


class Pass:
    """A forward pass over pictures of one shape, which `picture` holds.

    Features stay until the lanes have joined, so that no lane's memory is given away while another reads it.
    """

    def __init__(self, lanes: LocalExecutor, shape: Sequence[int]) -> None:
        n, _, h, w = shape
        self.lanes = cast("LocalExecutor", weakref.proxy(lanes))  # which keeps passes
        self.bindings = Bindings(lanes.backend, (n, h, w), lanes.device)
        self._homes: list[dict[str, Tensor]] = [{} for _ in lanes.segments]
        for (name, writer), device in lanes.homes.items():
            layout = lanes.backend.layout(name, n, h, w)
            self._homes[writer][name] = torch.empty(layout.shape, dtype=layout.dtype, device=device)
        self._copies: dict[tuple[str, int, torch.device], Tensor] = {}
        self._labels = [label(lanes.program, segment) for segment in lanes.segments]

    @property
    def picture(self) -> Tensor:
        return self.bindings.picture

    def launch(self) -> Answer:
        """Return the answer to what is in `picture`.

        It allocates nothing that outlives it and never waits for the device, so that a CUDA graph can hold it.
        """
        return self.run(self.picture, None)

    def run(self, picture: Tensor, spans: Spans | None) -> Answer:
        """Hand all segments out to the lanes' queues, and return the answer, on the coordinator's device."""
        lanes, queues = self.lanes, self.lanes.queues
        features: dict[Key, Tensor] = {(INPUT, START): picture}
        answer: list[Answer] = []
        queues.start()
        for step in lanes.steps:
            match step:
                case RunSegment(lane, i):
                    queues.run(lane, partial(self.segment, i, features, queues, spans))
                case Record(lane, event):
                    queues.record(lane, event)
                case Wait(lane, event):
                    queues.wait(lane, event)
        home = lanes.placement.coordinator

        def read(name: str) -> Tensor:
            return self._read((name, lanes.answers[name]), home, features, queues)

        queues.run(home, lambda: answer.append(answers_from_messages(lanes.backend, self.bindings.nhw, read)))
        queues.end()
        return answer[0]

    def segment(
        self, i: int, features: dict[Key, Tensor], queues: Queues, spans: Spans | None, stepwise: bool = False
    ) -> None:
        """Run segment number i on `features`, to which its own are added. stepwise: step by step, each in a span."""
        segment: Segment = self.lanes.segments[i]
        keys = zip(segment.reads, self.lanes.sources[i], strict=True)
        reads = tuple(self._read(key, segment.lane, features, queues) for key in keys)
        runner = self.bindings.runner(segment, reads, self._homes[i])
        if stepwise:
            assert spans is not None
            outputs = runner.run_stepwise(reads, spans)
        else:
            with span(spans, self._labels[i]):
                outputs = runner(reads, spans)
        features.update(zip(((name, i) for name in segment.writes), outputs, strict=True))

    def _read(self, key: Key, lane: int, features: dict[Key, Tensor], queues: Queues) -> Tensor:
        """A feature on the lane's device, where it is copied to unless it was written there."""
        feature, device, lanes = features[key], self.lanes.devices[lane], self.lanes
        if lanes.maker(key[1]) == device or lanes.homes.get(key) == device:
            return feature
        copied = (*key, device)
        place = self._copies.get(copied)
        if place is None:
            place = self._copies[copied] = torch.empty_like(feature, device=device)
        source = lanes.placement.coordinator if key[1] == START else lanes.segments[key[1]].lane
        with queues.between(source, lane):
            return place.copy_(feature, non_blocking=True)


def label(program: Program, segment: Segment) -> str:
    """Return the names of a segment's stages, such as "stem, stream 0"."""
    return ", ".join(dict.fromkeys(program.by_name[name].label for name in segment.operations))


def synchronise(devices: Sequence[torch.device]) -> None:
    """Wait until the devices have done their work."""
    for device in dict.fromkeys(devices):
        synchroniser(device)()


def synchroniser(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until `device` has done its work, while no thread captures a CUDA graph."""

    def wait() -> None:
        with WHOLE_GPU:
            torch.cuda.synchronize(device)

    return wait if device.type == "cuda" else lambda: None
