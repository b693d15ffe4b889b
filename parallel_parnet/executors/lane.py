"""What a lane of several ranks does for a request: receives, computes its segments, sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..profiling.spans import GATHER, SENDS, Spans, send_name, span, wait_name
from ..program.placement import Placement, Transfer
from ..program.program import INPUT, Program
from ..transport.base import IN_FLIGHT, Inbox, Pending, Transport
from .answers import Answer, answers_from_messages, each
from .binding import Backend, Bindings
from .graph import Capture, CapturedRunner, Replay, capture
from .local import label, synchroniser
from .shapes import Shapes

SPIN_S = 1e-3  # of waiting for a GPU, before the host sleeps in between

Key = tuple[int, int, int, int]  # what decides a request's buffers: N, H, W, and whether the pictures are raw


class Slot:
    """What a lane keeps for one shape of input and one request in flight: inboxes by tag, and segments bound to
    them.

    index: of the slot, below IN_FLIGHT. homes: memory of receivers, by the feature that is written there. replay,
    answer: where a transport enqueues on the GPU, the whole pass as a graph, and what it fills.
    """

    def __init__(self, index: int, bindings: Bindings, inboxes: dict[int, Inbox], homes: dict[str, Tensor]) -> None:
        self.index, self.bindings, self.inboxes, self.homes = index, bindings, inboxes, homes
        self.replay: Replay | None = None
        self.answer: Answer | None = None


@dataclass
class Request:
    """A request that was announced. sends: under way, with their tags.

    spans: what marks its work, if anything. stepwise: step by step, each in a span of its own. launched: as a graph;
    reached: what the GPU reaches when it is done.
    """

    slot: Slot
    features: dict[str, Tensor] = field(default_factory=dict)
    sends: list[tuple[Pending | None, int]] = field(default_factory=list)
    spans: Spans | None = None
    stepwise: bool = False
    launched: bool = False
    reached: torch.cuda.Event | None = None

    def span(self, name: str) -> AbstractContextManager[object]:
        """A context that marks the span of this name, where the request has spans."""
        return span(self.spans, name)


class LaneBackends:
    """The backends that compute a lane's segments, for raw pictures and for others, each made when first asked for.

    make: makes a backend of the segments; its argument `raw` says for which pictures.
    """

    def __init__(self, program: Program, placement: Placement, lane: int, make: Callable[..., Backend]) -> None:
        self.segments = [segment for segment in placement.segments(program) if segment.lane == lane]
        self._make, self._made = make, Shapes[bool, Backend]()

    def __call__(self, raw: bool) -> Backend:
        return self._made(raw, lambda raw: self._make(self.segments, raw=raw))


class Lane:
    """One lane's part of requests, two of which may be in flight, with a set of buffers each.

    transfers: all lanes', by tag. captured: whether CUDA graphs, which `capture` makes, are replayed: of a whole pass,
    transfers included, where the transport can be captured, else of each segment.
    """

    def __init__(
        self,
        program: Program,
        placement: Placement,
        lane: int,
        device: torch.device,
        backends: LaneBackends,
        transfers: Sequence[Transfer],
        transport: Transport,
        captured: bool,
        capture: Capture = capture,
    ) -> None:
        self.program, self.device, self.lane, self.transfers = program, device, lane, transfers
        self.backends, self.segments, self.transport = backends, backends.segments, transport
        self.coordinates = lane == placement.coordinator
        self._captured, self._capture, self._in_graph = captured, capture, captured and transport.in_graph
        self._labels = [label(program, segment) for segment in self.segments]
        self._routes: dict[str, list[int]] = {}  # on which this lane sends a feature
        for tag, transfer in enumerate(transfers):
            if transfer.source == lane:
                self._routes.setdefault(transfer.feature, []).append(tag)
        self._slots: Shapes[Key, list[Slot]] = Shapes(synchroniser(device))
        self._begun = 0
        self._reached: torch.cuda.Event | None = None  # by the GPU, when it is done with the last graph

    def __contains__(self, key: Key) -> bool:
        """Return whether there are buffers for such pictures."""
        return key in self._slots

    def sizes(self, key: Key) -> list[int]:
        """Return the size in bytes of each transfer of such a request, by tag."""
        n, h, w, raw = key
        return [self.backends(bool(raw)).layout(t.feature, n, h, w).bytes for t in self.transfers]

    def prepare(self, key: Key, spans: Spans | None, stepwise: bool) -> Request:
        """Announce a request to this lane, so that it is ready for what arrives.

        stepwise: it runs step by step, each step in one of the spans.
        """
        slot = self._slots(key, self._make_slots)[self._begun % IN_FLIGHT]
        self._begun += 1
        if not self._in_graph:
            self._post(slot)
        return Request(slot, spans=spans, stepwise=stepwise)

    @torch.inference_mode()
    def give(self, request: Request, x_nchw: Tensor, lasting: bool) -> None:
        """Give the coordinator's pictures [N, 3, H, W] to the lanes that read them.

        lasting: they stay as they are until `finish`, and need not be copied.
        """
        bindings = request.slot.bindings
        entered = bindings.enter(x_nchw)
        if not lasting and entered.untyped_storage().data_ptr() == x_nchw.untyped_storage().data_ptr():
            entered = entered.clone()
        request.features[INPUT] = entered.view(bindings.backend.layout(INPUT, *bindings.nhw).shape)
        if not self._in_graph:
            self._send(request, INPUT)
        elif not request.stepwise:
            self._launch(request)

    @torch.inference_mode()
    def finish(self, request: Request) -> Answer | None:
        """Do this lane's part of a request, and return the answer, fp32, on the coordinator, None elsewhere."""
        if not self._in_graph:
            return self._compute(request)
        if request.stepwise:
            return self._pass(request)
        if not request.launched:
            self._launch(request)
        answer = request.slot.answer
        if answer is None:
            return None
        self._await(request.reached)
        for work, tag in request.sends:
            self.transport.finish(work, tag)
        return each(answer, Tensor.clone)

    def close(self) -> None:
        """Let go of what requests used, once the GPU is done with it: the ranks cannot leave NCCL before the graphs are
        gone that hold its transfers."""
        self._await(self._reached)
        self._slots.clear()

    def _post(self, slot: Slot) -> None:
        for tag, inbox in slot.inboxes.items():
            self.transport.post(inbox, tag)

    def _launch(self, request: Request) -> None:
        """Enqueue the whole pass on the GPU, as a graph that the first request of this shape and slot captures."""
        slot = request.slot
        if slot.replay is None:
            given = dict(request.features)
            slot.answer, slot.replay = self._capture(lambda: self._pass(Request(slot, dict(given))), self.device)
        with request.span("graph"):
            slot.replay()
        request.launched = True
        if self.device.type == "cuda":
            request.reached = torch.cuda.Event()
            request.reached.record(torch.cuda.current_stream(self.device))  # which need not be that of the current GPU
            self._reached = request.reached

    def _pass(self, request: Request) -> Answer | None:
        """A pass with all its transfers, none of which the host waits for."""
        self._post(request.slot)
        if INPUT in request.features:
            self._send(request, INPUT)
        return self._compute(request)

    def _await(self, reached: torch.cuda.Event | None) -> None:
        """Until the GPU has done a request; LaneError where it takes too long, as where it waits for a lost rank."""
        with self.transport.waiting("waiting for the GPU"):
            start = time.monotonic()
            while reached is not None and not reached.query():
                waited = time.monotonic() - start
                if waited > self.transport.monitor.timeout_s or self.transport.monitor.has_lost:
                    raise RuntimeError(f"{waited:.1f} s")
                if waited > SPIN_S:
                    time.sleep(SPIN_S / 20)

    def _compute(self, request: Request) -> Answer | None:
        slot, arriving = request.slot, request.slot.inboxes
        for segment, stages in zip(self.segments, self._labels, strict=True):
            awaited = {self.transfers[tag].feature for tag in arriving} - request.features.keys()
            gathers = self.coordinates and not awaited.isdisjoint(segment.reads)
            with span(request.spans if gathers else None, GATHER):
                for name in segment.reads:
                    self._receive(request, name)
            reads = tuple(request.features[name] for name in segment.reads)
            homes = {name: home for name, home in slot.homes.items() if name in segment.writes}
            runner = slot.bindings.runner(segment, reads, homes)
            for name in homes:
                self.transport.ready(self._routes[name][0], slot.index)
            if request.stepwise:
                assert request.spans is not None
                outputs = runner.run_stepwise(reads, request.spans)
            else:
                with request.span(stages):
                    outputs = runner(reads, request.spans)
            request.features.update(zip(segment.writes, outputs, strict=True))
            for name in segment.writes:
                self._send(request, name)
        answer = None
        if self.coordinates:
            for name in self.program.answers.values():
                self._receive(request, name)
            bindings = slot.bindings
            answer = answers_from_messages(bindings.backend, bindings.nhw, request.features.__getitem__)
            answer = each(answer, lambda tensor: tensor.to(torch.float32, copy=True))
        with request.span(SENDS):
            for work, tag in request.sends:
                self.transport.finish(work, tag)
        for inbox in arriving.values():
            inbox.release()
        return answer

    def _receive(self, request: Request, name: str) -> None:
        for tag, inbox in request.slot.inboxes.items():
            if self.transfers[tag].feature == name and name not in request.features:
                with request.span(wait_name(name)):
                    request.features[name] = self.transport.wait(inbox, tag)

    def _send(self, request: Request, name: str) -> None:
        feature, index = request.features[name], request.slot.index
        if tags := self._routes.get(name):
            with request.span(send_name(name)):
                request.sends += [(self.transport.send(feature, tag, index), tag) for tag in tags]

    def _make_slots(self, key: Key) -> list[Slot]:
        if self.transport.reserve(self.sizes(key), self.device):
            self._slots.clear()  # whose inboxes lay in memory that is gone
        n, h, w, raw = key
        backend = self.backends(bool(raw))
        # which knows nothing of the lane: memory goes with the last reference to one
        captured = partial(CapturedRunner, device=self.device, capture=self._capture)
        wrap = captured if self._captured and not self._in_graph else None
        fixed = backend.in_place or self._captured
        shared = None if fixed else Bindings(backend, (n, h, w), self.device)
        slots = []
        for index in range(IN_FLIGHT):
            inboxes: dict[int, Inbox] = {}
            homes: dict[str, Tensor] = {}
            for tag, transfer in enumerate(self.transfers):
                layout = backend.layout(transfer.feature, n, h, w)
                if transfer.target == self.lane:
                    inboxes[tag] = self.transport.inbox(tag, index, *layout, self.device)
                elif backend.in_place and self._is_read_there_alone(tag):
                    home = self.transport.outbox(tag, index, *layout)
                    homes |= {} if home is None else {transfer.feature: home}
            bindings = shared or Bindings(backend, (n, h, w), self.device, fixed, wrap)
            slots.append(Slot(index, bindings, inboxes, homes))
        return slots

    def _is_read_there_alone(self, tag: int) -> bool:
        """Whether a transfer's feature is one of this lane's that no other transfer carries, and that it reads not."""
        name = self.transfers[tag].feature
        answers = self.coordinates and name in self.program.answers.values()
        read_here = answers or any(name in segment.reads for segment in self.segments)
        return self._routes.get(name) == [tag] and not read_here
