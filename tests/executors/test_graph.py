"""What surrounds a CUDA graph, with a stand-in for the graph: it repeats what the pass did, over the same buffers."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel_parnet import Engine, ParNetError, fold
from parallel_parnet.executors.binding import Reads
from parallel_parnet.executors.graph import Capture, CapturedRunner, GraphExecutor, capture
from parallel_parnet.executors.local import WHOLE_GPU, LocalExecutor
from parallel_parnet.executors.shapes import MAX_SHAPES, Shapes
from parallel_parnet.executors.torch_backend import TorchBackend
from parallel_parnet.program.placement import Placement
from small import SMALL, lively, relative
from standins import Streams, graph

PROGRAM = fold(lively(SMALL, 8))
CPU = torch.device("cpu")
REFERENCE = Engine(PROGRAM, device="cpu", executor="reference")


def executor_of(capture: Capture = graph) -> GraphExecutor:
    """What a GPU's executor of one lane is, on the CPU."""
    single = Placement.single(PROGRAM)
    backend = TorchBackend("eager", PROGRAM, single.segments(PROGRAM), [CPU], torch.float32)
    return GraphExecutor("cuda_graph", LocalExecutor(single, [CPU], backend), capture)


def engine_of(executor: GraphExecutor) -> Engine:
    """An engine that runs the stand-in in place of a GPU's graph."""
    engine = Engine(PROGRAM, device="cpu", executor="eager")
    engine._executors[False] = executor
    return engine


def behind(first: Callable[[], object]) -> Capture:
    """Graphs before whose replay something happens, once their pictures have been copied."""

    def capture(work: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], object]]:
        result, replay = graph(work, device)
        return result, lambda: (first(), replay())

    return capture


def test_answers_are_copies_and_inputs_stay() -> None:
    engine, x = engine_of(executor_of()), torch.randn(2, 3, 32, 64)
    untouched = x.clone()
    first = engine(x)
    kept = first.clone()
    assert relative(first, REFERENCE(x)) < 1e-5
    engine(torch.randn(2, 3, 32, 64))
    assert torch.equal(first, kept)
    assert torch.equal(x, untouched)


def test_a_graph_for_each_shape_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, shapes = executor_of(), []
    make = executor.source.make
    monkeypatch.setattr(executor.source, "make", lambda shape: (shapes.append(tuple(shape)), make(shape))[1])
    engine = engine_of(executor)
    for _ in range(2):
        for x in (torch.randn(1, 3, 32, 32), torch.randn(2, 3, 32, 32).bfloat16(), torch.randn(1, 3, 64, 32)):
            assert relative(engine(x), REFERENCE(x.float())) < 1e-5
    assert shapes == [(1, 3, 32, 32), (2, 3, 32, 32), (1, 3, 64, 32)]


def test_what_a_graph_reads_and_writes_lives_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which nothing but the executor holds: a graph itself knows addresses alone."""

    def once(work: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], object]]:
        return work(), lambda: None

    executor, made = executor_of(once), []
    make = executor.source.make

    def watched(shape: torch.Size) -> object:
        made.append(weakref.ref(kept := make(shape)))
        return kept

    monkeypatch.setattr(executor.source, "make", watched)
    executor(torch.randn(1, 3, 32, 32))
    gc.collect()
    (reference,) = made
    assert reference() is not None


@pytest.mark.parametrize("x", [torch.randn(1, 3, 32, 128)[..., ::2], torch.randn(1, 64, 32, 3).permute(0, 3, 2, 1)])
def test_any_strides(x: Tensor) -> None:
    assert relative(engine_of(executor_of())(x), REFERENCE(x)) < 1e-5


def test_pictures_that_need_gradients() -> None:
    engine, x = engine_of(executor_of()), torch.randn(1, 3, 32, 32, requires_grad=True)
    for _ in range(2):
        assert relative(engine(x), REFERENCE(x.detach())) < 1e-5


def test_pictures_without_memory_are_refused() -> None:
    x = torch.empty(1, 3, 32, 32, device="meta")
    with pytest.raises(ParNetError, match="a picture on meta, which has no memory"):
        engine_of(executor_of())(x)


@pytest.mark.parametrize("executor", ["graph", "eager"])
def test_an_output_of_ones_own(executor: str) -> None:
    engine = engine_of(executor_of()) if executor == "graph" else Engine(PROGRAM, None, CPU, executor=executor)
    x, out = torch.randn(2, 3, 32, 32), torch.full((2, 10), float("nan"))
    assert engine(x, out=out) is out
    assert relative(out, REFERENCE(x)) < 1e-5
    for wrong in (torch.empty(1, 10), torch.empty(2, 10).double(), torch.empty(2, 10, device="meta")):
        with pytest.raises(ParNetError, match=r"expected \[2, 10\] of float32 on cpu"):
            engine(x, out=wrong)
    with pytest.raises(ParNetError, match=r"give its detach\(\)"):
        engine(x, out=torch.zeros(2, 10, requires_grad=True))
    with torch.inference_mode():
        made_there = torch.zeros(2, 10)
        engine(x, out=made_there)
    assert torch.equal(made_there, out)


def test_shared_buffers_are_not_copied() -> None:
    engine, x = engine_of(executor_of()), torch.randn(1, 3, 32, 32)
    pictures, logits = engine.buffers(x)
    pictures.copy_(x)
    assert engine(pictures, out=logits) is logits
    assert relative(logits, REFERENCE(x)) < 1e-5
    other = torch.randn(1, 3, 32, 32)
    engine(other)
    assert relative(logits, REFERENCE(other)) < 1e-5, "the buffers are the graph's own"
    with pytest.raises(ParNetError, match="eager has no buffers"):
        Engine(PROGRAM, device="cpu", executor="eager").buffers(x)


def test_threads_take_turns() -> None:
    engine = engine_of(executor_of(behind(lambda: time.sleep(0.002))))
    pictures = [torch.randn(1, 3, 32, 32) for _ in range(40)]
    expected = [REFERENCE(x) for x in pictures]
    with ThreadPoolExecutor(8) as threads:
        for got, right in zip(threads.map(engine, pictures), expected, strict=True):
            assert relative(got, right) < 1e-5
        with engine._turn():
            shared = threads.submit(engine.buffers, pictures[0])
            assert not wait([shared], 0.05).done, "what makes a graph takes turns as well"
        assert len(shared.result()) == 2


def test_without_turns_threads_would_mix_their_pictures() -> None:
    """The test above would see a missing lock: two threads have both copied their pictures before either is run."""
    both = Barrier(2)

    executor = executor_of(behind(lambda: both.wait(30)))
    pictures = [torch.randn(1, 3, 32, 32) for _ in range(2)]
    executor.buffers(pictures[0].shape)
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(executor, pictures))
    assert any(relative(got, REFERENCE(x)) > 1e-3 for got, x in zip(answers, pictures, strict=True))


def test_the_oldest_of_too_many_shapes_goes() -> None:
    made: list[int] = []
    events: list[str] = []

    def make(key: int) -> int:
        made.append(key)
        return key * key

    shapes: Shapes[int, int] = Shapes(lambda: events.append("dropping"))
    for key in (*range(MAX_SHAPES), 3):
        assert shapes(key, make) == key * key
    assert made == list(range(MAX_SHAPES)) and not events
    assert shapes(100, make) == 10000 and events == ["dropping"] and len(shapes) == MAX_SHAPES
    shapes(1, make), shapes(0, make)
    assert made == [*range(MAX_SHAPES), 100, 0], "the first was dropped, the second kept"


class Alternating:
    """A segment whose host chooses one of two buffers, which a graph does once for all."""

    def __init__(self) -> None:
        self.runs, self.buffers = 0, [torch.zeros(2), torch.zeros(2)]

    def __call__(self, reads: Reads, spans: object = None) -> tuple[Tensor, ...]:
        self.runs += 1
        return (self.buffers[self.runs % 2].copy_(reads[0] + self.runs),)


def test_a_graph_freezes_what_the_host_decides() -> None:
    """So the stand-in would show a count, or a choice between buffers, that a pass makes while it is captured."""
    x = torch.tensor([1.0, 2.0])
    runner = CapturedRunner(Alternating(), (x,), CPU, graph)  # type: ignore[arg-type]
    for value in (10.0, 20.0):
        x.fill_(value)
        (y,) = runner((x,))
        assert torch.equal(y, torch.full((2,), value + 3)), "of the third run, which was captured"
    assert runner.fits((x,)) and not runner.fits((x.clone(),)), "a graph reads where it was captured"


@pytest.mark.parametrize("fails", [None, RuntimeError("cudaErrorStreamCaptureInvalidated")])
def test_a_capture_is_ordered_and_bears_other_threads(fails: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs on a CUDA stream of its own GPU, behind what came before, and the third, which is captured there. torch
    leaves its own for captures to the GPU that came first, and does not leave one whose capture has failed. No other
    thread waits for a whole GPU meanwhile."""
    streams, alone = Streams(monkeypatch), []

    def another_may_wait() -> bool:
        if taken := WHOLE_GPU.acquire(blocking=False):
            WHOLE_GPU.release()
        return taken

    def work() -> None:
        streams.said.append(f"runs in {streams.inside[-1]}")
        with ThreadPoolExecutor(1) as thread:
            alone.append(not thread.submit(another_may_wait).result())

    @contextmanager
    def captured(graph: SimpleNamespace, stream: str, capture_error_mode: str) -> Iterator[None]:
        streams.said.append(f"captures in {stream}, {capture_error_mode}")
        streams.inside.append(stream)
        yield
        if fails:
            raise fails
        streams.inside.pop()

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replayed"))
    monkeypatch.setattr(torch.cuda, "graph", captured)
    with pytest.raises(RuntimeError, match="Invalidated") if fails else nullcontext():
        result, replay = capture(work, torch.device("cuda", 1))
        assert result is None and replay() == "replayed"
    expected = ["A waits for current of None", "runs in A", "runs in A", "captures in A, thread_local", "runs in A"]
    assert streams.said == expected + ["current of None waits for A"] * (fails is None)
    assert streams.inside == [] and alone == [True] * 3
