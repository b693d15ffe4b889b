"""Stand-ins for what a GPU does: queues that run side by side, and graphs that repeat what was captured."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from parallel_parnet.executors.queues import Queues

Result = TypeVar("Result")


@dataclass
class RandomQueues(Queues):
    """Queues whose work is done when the last lane has been handed out, in a random order that the events allow.

    broken: events are ignored. ran: lanes, in the order in which their work was done.
    """

    seed: int
    broken: bool = False
    items: list[tuple[int, str, Any]] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)

    def start(self) -> None:
        self.items.clear()

    def run(self, lane: int, work: Callable[[], None]) -> None:
        self.items.append((lane, "run", work))

    def record(self, lane: int, event: int) -> None:
        self.items.append((lane, "record", event))

    def wait(self, lane: int, event: int) -> None:
        self.items.append((lane, "wait", event))

    def between(self, source: int, target: int) -> AbstractContextManager[object]:
        return nullcontext()

    def end(self) -> None:
        draw, reached = random.Random(self.seed), set()
        queues: dict[int, list[tuple[str, Any]]] = {}
        for lane, kind, what in self.items:
            queues.setdefault(lane, []).append((kind, what))
        while queues:
            ready = [
                lane for lane, (head, *_) in queues.items() if self.broken or head[0] != "wait" or head[1] in reached
            ]
            lane = draw.choice(ready)
            kind, what = queues[lane].pop(0)
            if kind == "run":
                what()
                self.ran.append(lane)
            elif kind == "record":
                reached.add(what)
            if not queues[lane]:
                del queues[lane]


class Recording(TorchDispatchMode):
    """What torch's operations did to which memory, and what was enqueued beside them; `replay` does it again."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)

        def again() -> None:
            for place, value in zip(_tensors(outputs), _tensors(func(*args, **kwargs)), strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)

        if "empty" not in func.__name__:
            self.steps.append(again)
        return outputs

    def replay(self) -> None:
        for step in self.steps:
            step()


def graph(work: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
    """A capture as on a GPU: two runs before, and what the third decided on the host is decided for ever.

    Launches have to be told of by `enqueue`. The results hold NaN until the first replay.
    """
    work()
    work()
    recording = Recording()
    with recording:
        result = work()
    for tensor in _tensors(result):
        tensor.fill_(float("nan"))
    return result, recording.replay


def enqueue(step: Callable[[], object]) -> None:
    """Do what a device would do that is no operation of torch's, a launch or a signal; while a graph is captured, in
    its replays alone."""
    modes = _get_current_dispatch_mode_stack()
    recordings = [mode for mode in modes if isinstance(mode, Recording)]
    if recordings:
        recordings[-1].steps.append(step)
    else:
        step()


class Streams:
    """CUDA streams in torch.cuda's place: what they are told, in words. The current one of a GPU is its "current"."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.inside: list[str] = []
        says, made = self.said.append, iter("ABCDEF")

        class Stream(str):
            def wait_stream(self, other: str) -> None:
                says(f"{self} waits for {other}")

            def wait_event(self, event: SimpleNamespace) -> None:
                says(f"{self} waits for {event.at}")

        def event() -> SimpleNamespace:
            found = SimpleNamespace(at=None)
            found.record = lambda stream: setattr(found, "at", f"an event of {stream}")
            return found

        @contextmanager
        def stream(which: str) -> Iterator[None]:
            before = [*self.inside]
            self.inside.append(which)
            try:
                yield
            finally:
                self.inside[:] = before

        patch.setattr(torch.cuda, "Stream", lambda device=None: Stream(next(made)))
        patch.setattr(torch.cuda, "Event", event)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(f"current of {device}"))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, tuple | list) else []
