"""A lane per rank: each rank runs its segments, sends what others read and receives what it reads."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import RLock

import torch
from torch import Tensor

from ..errors import LaneError, ParNetError
from ..profiling.clocks import Clock, ask, reading
from ..profiling.lanes import from_bytes, to_bytes
from ..profiling.ranges import Ranges
from ..profiling.spans import REQUEST, Recorder, Spans, send_name, span, wait_name
from ..profiling.traced import traced
from ..program.inputs import check_input
from ..program.placement import Placement, Transfer
from ..program.program import Program
from ..settings import with_own_settings
from ..transport import agree, choose_transport, open_as
from ..transport.base import IN_FLIGHT, Inbox, Pending
from .answers import Answer, each
from .binding import Backend
from .lane import Key, Lane, LaneBackends, Request
from .local import synchroniser

STOP, RUN, PROFILE, TRACE, CLOCK = range(5)
SOURCES = (".py", ".c", ".h", ".cu", ".cuh")
HEADER = 5  # int64s: the command, then N, H, W and whether the pictures are raw, or the exit status
MAX_FEATURE_BYTES = 1 << 32
CPU = torch.device("cpu")
CLOSED = "this engine is closed: make another, on all ranks"
INTERRUPTED = (
    "a request of this engine was interrupted, and what it left would mix with the next: close it, make another"
)
MAPPING = "a map of this engine is still running: take all its answers, or close it, first"


class DistributedExecutor:
    """The executor of one rank: on the coordinator's it is called, on all others it serves.

    The ranks compare their settings first: ParNetError, on all of them, where one differs. transport: one of
    `TRANSPORTS`. backend: makes a backend of segments, as for `LaneBackends`. captured: see `Lane`. The engine has
    compared the executors that make them.
    """

    def __init__(
        self,
        program: Program,
        placement: Placement,
        lane: int,
        transport: str,
        device: torch.device,
        backend: Callable[..., Backend],
        captured: bool = False,
    ) -> None:
        self.program, self.placement, self.lane, self.device = program, placement, lane, device
        self.transfers = placement.transfers(program)
        backends = LaneBackends(program, placement, lane, backend)
        agree(
            {
                "program and weights": program.digest,
                "placement": hashlib.sha256(repr(placement).encode()).hexdigest(),
                "kernels' tiles": backends(False).tiles,
                "transport": transport,
                "sources of parallel_parnet": sources_digest(),
                "torch": torch.__version__,
            }
        )
        others = [lane for lane in range(placement.lanes) if lane != placement.coordinator]
        headers = [Transfer("the next request", placement.coordinator, lane) for lane in others]
        told = [Transfer("spans", lane, placement.coordinator) for lane in others]
        self._header = {lane: len(self.transfers) + i for i, lane in enumerate(others)}
        self._told = {lane: len(self.transfers) + len(headers) + i for i, lane in enumerate(others)}
        self.transport = open_as(choose_transport(transport, device), [*self.transfers, *headers, *told])
        self.work = Lane(program, placement, lane, device, backends, self.transfers, self.transport, captured)
        self.ranges = Ranges.of(program)
        self._pending: deque[tuple[Request, torch.device]] = deque()
        self._speaking, self._mapping, self._ended = RLock(), False, ""

    def __call__(self, x_nchw: Tensor, spans: Spans | None = None) -> Answer:
        """Return logits [N, classes], or outputs by name, fp32, on the pictures' device. On the coordinator only."""
        self._check_bytes(x_nchw)
        with self._exclusive_conversation():
            self._begin(RUN, x_nchw, self.ranges if spans is None else spans)
            return self._answer()

    def map(self, pictures: Iterable[Tensor]) -> Generator[Answer]:
        """Yield the answer to each input in turn; the next request is announced before the last is answered."""
        with self._exclusive_conversation():
            self._mapping = True
        try:
            for x_nchw in pictures:
                self._check_bytes(x_nchw)
                while self._pending and _key(x_nchw) not in self.work:
                    yield self._next_answer()  # a new shape comes alone: its compiling need not hold an answer back
                with self._exclusive_conversation(mapping=True):
                    self._begin(RUN, x_nchw, self.ranges)
                if len(self._pending) == IN_FLIGHT:
                    yield self._next_answer()
            while self._pending:
                yield self._next_answer()
        finally:
            self._drain()
            self._mapping = False

    @contextmanager
    def _exclusive_conversation(self, mapping: bool = False) -> Iterator[None]:
        """A context in which one thread at a time talks, on the coordinator, with the other lanes.

        After an exception in the middle nothing more is said: what arrives next would be taken for another's. mapping:
        it belongs to the map that is running.
        """
        if not self.work.coordinates:
            raise ParNetError(
                f"rank {self.lane} serves: call serve on it, and the engine on rank {self.placement.coordinator}"
            )
        with self._speaking:
            if self._ended or (self._mapping and not mapping):
                raise ParNetError(self._ended or MAPPING)
            try:
                yield
            except BaseException:
                self._ended = INTERRUPTED
                raise

    def serve(self) -> int:
        """Do this lane's part of every request until the coordinator closes; returns the status it closed with."""
        if self.work.coordinates:
            raise ParNetError(f"rank {self.lane} coordinates: call the engine on it, and serve on the others")
        if self._ended:
            raise ParNetError(self._ended)
        tag = self._header[self.lane]
        header = self.transport.inbox(tag, 0, (HEADER,), torch.int64, CPU)
        self.transport.post(header, tag)
        while True:
            command, *numbers = self._next(header)
            if command == STOP:
                self._ended = CLOSED
                self.work.close()
                return numbers[0]
            if command == CLOCK:
                self._tell(torch.tensor(reading(), dtype=torch.float64, device=CPU))
            elif command == TRACE:
                self._tell_spans(self._traced(lambda spans: self._serve_traced(header, spans)))
            else:
                recorder = self._recorder() if command == PROFILE else None
                try:
                    with span(self.ranges, REQUEST):
                        self.work.finish(self._prepare(command, numbers, recorder or self.ranges))
                except ParNetError as error:
                    raise LaneError(str(error)) from error  # this rank alone knows it, so it must say it
                if recorder:
                    self._tell_spans(recorder)

    def _next(self, header: Inbox) -> list[int]:
        """Wait for the next announcement, and check it: its command and numbers."""
        tag = self._header[self.lane]
        command, *numbers = self.transport.wait(header, tag, idle=True).tolist()
        header.release()
        if command != STOP:
            self.transport.post(header, tag)
        if command not in (STOP, TRACE, CLOCK):
            self._check_header(command, numbers)
        return [command, *numbers]

    def _serve_traced(self, header: Inbox, spans: Spans) -> None:
        with span(spans, wait_name(REQUEST)):
            command, *numbers = self._next(header)
        if command != RUN:
            raise LaneError(f"rank {self.placement.coordinator} gave up in the middle of its traced requests")
        self.work.finish(self._prepare(command, numbers, spans))

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, operation by operation, transfers included: a recorder of spans for each lane. See
        `Engine.profile`."""
        own = self._recorder()
        self._check_bytes(x_nchw)
        with self._exclusive_conversation():
            self._begin(PROFILE, x_nchw, own)
            self._answer()
            return self._with_others(own)

    def trace(self, x_nchw: Tensor) -> list[Recorder]:
        """Run a few requests as calls run them: a recorder of spans for each lane."""
        self._check_bytes(x_nchw)
        with self._exclusive_conversation():
            for work, tag in self._announce(TRACE, 0, 0, 0, 0):
                self.transport.finish(work, tag)
            return self._with_others(self._traced(lambda spans: self(x_nchw, spans)))

    def clocks(self) -> list[Clock]:
        """Measure each lane's clock against the coordinator's."""
        lanes = range(self.placement.lanes)
        with self._exclusive_conversation():
            return [Clock() if lane == self.lane else ask(partial(self._ping, lane)) for lane in lanes]

    def _ping(self, lane: int) -> list[float]:
        tag = self._header[lane]
        self.transport.finish(self.transport.send(_numbers(CLOCK, 0, 0, 0, 0), tag), tag)
        return self._hear(lane, (2,), torch.float64).tolist()

    def _traced(self, request: Callable[[Spans], object]) -> Recorder:
        return traced(request, self.device, synchroniser(self.device), self.ranges)

    def _recorder(self) -> Recorder:
        return Recorder(synchroniser(self.device))

    def close(self, status: int = 0) -> None:
        """End the other lanes' `serve`, once. On the coordinator only."""
        with self._speaking:
            self._drain()
            if self._ended == CLOSED:
                return
            self._ended = CLOSED
            for work, tag in self._announce(STOP, status, 0, 0, 0):
                self.transport.finish(work, tag)
            self.work.close()

    def _announce(self, command: int, *numbers: int) -> list[tuple[Pending | None, int]]:
        header = _numbers(command, *numbers)
        return [(self.transport.send(header, tag), tag) for tag in self._header.values()]

    def _check_header(self, command: int, numbers: list[int]) -> None:
        """Raise LaneError for an announcement that no coordinator of this program makes."""
        n, h, w, raw = numbers
        try:
            if command not in (RUN, PROFILE):
                raise ParNetError(f"command {command}")
            if not all(0 < number <= MAX_FEATURE_BYTES for number in (n, h, w)) or raw not in (0, 1):
                raise ParNetError(f"shape {[n, h, w]}, raw {raw}")
            check_input(
                self.program, torch.empty(n, 3, h, w, dtype=torch.uint8 if raw else torch.float32, device="meta")
            )
            if self._most_bytes((n, h, w, raw)) > MAX_FEATURE_BYTES:
                raise ParNetError(f"{n} pictures of {h} x {w} pixels")
        except ParNetError as error:
            raise LaneError(f"refused what rank {self.placement.coordinator} announced: {error}") from None

    def _check_bytes(self, x_nchw: Tensor) -> None:
        n, h, w, _ = key = _key(x_nchw)
        if (most := self._most_bytes(key)) > MAX_FEATURE_BYTES:
            raise ParNetError(
                f"{n} pictures of {h} x {w} pixels: a feature would take {most} bytes; give a smaller batch"
            )

    @with_own_settings
    def _begin(self, command: int, x_nchw: Tensor, spans: Spans | None) -> None:
        """Announce a request to the other lanes, and send the picture."""
        key = _key(x_nchw)
        with span(spans, send_name(REQUEST)):
            announcements = self._announce(command, *key)
        request = self._prepare(command, key, spans)
        request.sends += announcements
        self.work.give(request, x_nchw, lasting=not self._mapping)
        self._pending.append((request, x_nchw.device))

    def _prepare(self, command: int, numbers: Sequence[int], spans: Spans | None) -> Request:
        n, h, w, raw = numbers
        return self.work.prepare((n, h, w, raw), spans, stepwise=command == PROFILE)

    def _most_bytes(self, key: Key) -> int:
        """Return the size in bytes of the largest transfer of such a request."""
        return max(self.work.sizes(key), default=0)

    @with_own_settings
    def _answer(self) -> Answer:
        """Finish the oldest request."""
        request, device = self._pending[0]  # which stays there where it is interrupted: what it sends must live on
        answer = self.work.finish(request)
        self._pending.popleft()
        assert answer is not None, "the coordinator has the answer"
        return each(answer, lambda tensor: tensor.to(device))

    @with_own_settings
    def _next_answer(self) -> Answer:
        """The oldest request's, a tensor as any other and not one of inference mode."""
        with self._exclusive_conversation(mapping=True):
            return each(self._answer(), Tensor.clone)

    def _drain(self) -> None:
        """Finish what nobody asks for any more, since the other lanes are at work on it; not where one is lost."""
        while self._pending and not self._ended and not self.transport.monitor.has_lost:
            self._next_answer()

    def _tell(self, numbers: Tensor) -> None:
        """Send something else than features to the coordinator, which has to `_hear` it."""
        tag = self._told[self.lane]
        self.transport.finish(self.transport.send(numbers, tag), tag)

    def _hear(self, lane: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tag = self._told[lane]
        inbox = self.transport.inbox(tag, 0, shape, dtype, CPU)
        self.transport.post(inbox, tag)
        numbers = self.transport.wait(inbox, tag).clone()
        inbox.release()
        return numbers

    def _tell_spans(self, recorder: Recorder) -> None:
        text = to_bytes(recorder)
        self._tell(_numbers(len(text)))
        self._tell(text)

    def _with_others(self, own: Recorder) -> list[Recorder]:
        def heard(lane: int) -> Recorder:
            length = int(self._hear(lane, (1,), torch.int64))
            return from_bytes(self._hear(lane, (length,), torch.uint8), lane)

        return [own if lane == self.lane else heard(lane) for lane in range(self.placement.lanes)]


def _key(x_nchw: Tensor) -> Key:
    n, _, h, w = x_nchw.shape
    return n, h, w, int(x_nchw.dtype == torch.uint8)


def _numbers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=CPU)


def sources_digest() -> str:
    """Return a SHA-256 of the package's code that decides what a lane computes, which any edit of it changes."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("executors", "kernels", "network", "program", "transport"):
        for path in sorted(path for path in (root / folder).rglob("*") if path.suffix in SOURCES):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
