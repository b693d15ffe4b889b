"""Run by torchrun on two ranks: what callers do to an engine that they should not, or may, as JSON."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forked import in_a_fork
from parallel_parnet import Engine, ParNetError, Placement, Program, fold
from parallel_parnet.commands.ranks import Ranks
from parallel_parnet.executors.distributed import STOP
from parallel_parnet.executors.lane import Request, Slot
from parallel_parnet.transport import join_ranks, leave_ranks
from parallel_parnet.transport.shared_memory import SharedMemory
from ranks.started import CPU, started
from small import SMALL, lively

IDLE_S = 0.3  # between two requests


def told(call: Callable[[], object]) -> str:
    """What a call is refused with."""
    try:
        call()
    except ParNetError as error:
        return str(error)
    return "nothing"


def interrupted(engine: Engine, x: Tensor) -> None:
    """Leave a request between its announcement and its answer, as a signal's handler or a lack of memory may."""
    assert engine._distributed is not None
    finish = engine._distributed.work.finish

    def fails(request: object) -> None:
        raise TimeoutError

    engine._distributed.work.finish = fails  # type: ignore[method-assign,assignment]
    try:
        engine(x)
    except TimeoutError:
        engine._distributed.work.finish = finish  # type: ignore[method-assign]


def slots() -> int:
    """What engines keep for their requests, a graph of NCCL's transfers among it, where there is NCCL."""
    return sum(type(found) is Slot for found in gc.get_objects())


def in_one_buffer(pictures: list[Tensor]) -> Iterator[Tensor]:
    """As a camera gives them, in the format in which torch's convolutions want them, so that nothing copies them."""
    buffer = torch.empty_like(pictures[0], memory_format=torch.channels_last)
    for picture in pictures:
        yield buffer.copy_(picture)


def coordinate(program: Program, transport: str, pictures: list[Tensor], expected: list[Tensor]) -> dict:
    """On rank 0, beside `serve`."""
    engine = Engine(program, device=CPU, executor="eager", transport=transport)
    row: dict = {"transport": transport, "serving": told(engine.serve)}
    row["forked"] = closed_in_a_fork(engine)
    time.sleep(IDLE_S)
    row["reused"] = all(map(torch.equal, engine.map(in_one_buffer(pictures)), expected))
    large = torch.zeros(1).expand(1 << 22, 3, 1024, 1024)
    row["too large"] = [told(lambda: engine(large)), told(lambda: list(engine.map([pictures[0], large])))]
    row["ordinary"] = not any(answer.is_inference() for answer in engine.map(pictures[:2]))  # type: ignore[union-attr]
    first = engine.map(pictures)
    row["one map"] = torch.equal(next(first), expected[0])
    calls = [lambda: next(engine.map(pictures)), lambda: engine(pictures[0]), engine.clocks]
    row["mapping"] = [told(call) for call in calls]
    row["the rest"] = all(map(torch.equal, first, expected[1:]))
    interrupted(engine, pictures[0])
    row["interrupted"] = [told(lambda: engine(pictures[1])), told(lambda: next(engine.map(pictures)))]
    engine.close()
    engine.close()
    row["closed"] = told(lambda: engine(pictures[0]))
    held = slots()
    with Engine(program, device=CPU, executor="eager", transport=transport) as again:
        row["again"] = torch.equal(again(pictures[1]), expected[1])
    row["let go"] = slots() == held <= 1  # of the request that was interrupted, and what it sends
    row["from a thread"] = closed_from_a_thread(
        Engine(program, device=CPU, executor="eager", transport=transport), pictures[0]
    )
    return row


def closed_in_a_fork(engine: Engine) -> bool:
    """Whether a child is refused what would speak to the other ranks; that they go on, later calls show."""

    def close() -> str:
        engine.close()
        return told(engine.clocks)

    return "made before a fork" in in_a_fork(close)


def closed_from_a_thread(engine: Engine, x: Tensor) -> bool:
    """Whether a call goes on to its end though another thread closes the engine in the middle of it."""
    assert engine._distributed is not None
    finish, began = engine._distributed.work.finish, Event()

    def slowly(request: Request) -> object:
        began.set()
        time.sleep(0.2)
        return finish(request)

    engine._distributed.work.finish = slowly  # type: ignore[method-assign,assignment]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(engine, x)
        began.wait(20)
        engine.close()
        return isinstance(call.result(), Tensor) and "is closed" in told(lambda: engine(x))


def serve(program: Program, transport: str, x: Tensor) -> None:
    engine = Engine(program, device=CPU, executor="eager", transport=transport)
    for call in (lambda: engine(x), lambda: next(engine.map([x])), lambda: engine.profile(x), engine.clocks):
        assert told(call) == "rank 1 serves: call serve on it, and the engine on rank 0"
    if transport == "shared":  # an operation of a request would be over time; for the next one there is no limit
        assert engine._distributed is not None and isinstance(engine._distributed.transport, SharedMemory)
        engine._distributed.transport._routes[engine._distributed._header[1]]._timeout_s = IDLE_S / 3
    engine.serve()
    assert "is closed" in told(engine.serve) and slots() == 0
    for _ in range(2):
        Engine(program, device=CPU, executor="eager", transport=transport).serve()


def side_by_side(program: Program, other: Program, rank: int, x: Tensor) -> Tensor | None:
    """Two engines over gloo: the second one is told to stop while the first one serves."""
    first, second = (Engine(p, device=CPU, executor="eager", transport="gloo") for p in (program, other))
    if rank:
        assert (first.serve(), second.serve()) == (0, 7)
        return None
    assert second._distributed is not None
    sends = second._distributed._announce(STOP, 7, 0, 0, 0)
    answer = first(x)
    first.close()
    for work, tag in sends:
        second._distributed.transport.finish(work, tag)
    return answer if isinstance(answer, Tensor) else None


def work(seed: int, ranks: Ranks) -> dict | None:
    program, other = fold(lively(SMALL, seed)), fold(lively(SMALL, seed + 1))
    torch.manual_seed(seed)
    pictures = [torch.randn(1, 3, 32, 32) for _ in range(5)]
    alone = Engine(program, Placement.single(program), CPU, executor="eager")
    expected = [alone(x) for x in pictures]
    for _ in range(2):
        leave_ranks()
        join_ranks(CPU, 30)
    links = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert links.count("anon_inode:[pidfd]") <= ranks.world - 1, "ranks that left are held"
    rows: list[dict] = []
    for transport in ("gloo", "shared"):
        if ranks.rank:
            serve(program, transport, pictures[1])
        else:
            rows.append(coordinate(program, transport, pictures, expected))
    answer = side_by_side(program, other, ranks.rank, pictures[0])
    return None if answer is None else {"rows": rows, "beside": torch.equal(answer, expected[0])}


if __name__ == "__main__":
    started(work)
