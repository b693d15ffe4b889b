"""Shared memory and its semaphores between real processes, and what a rank hears of others, without torchrun."""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing
import os
import random
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from parallel_parnet import LaneError, ParNetError
from parallel_parnet.commands.common import process_age
from parallel_parnet.executors import distributed
from parallel_parnet.executors.distributed import HEADER, sources_digest
from parallel_parnet.program.placement import Transfer
from parallel_parnet.transport import base
from parallel_parnet.transport import semaphore as semaphores
from parallel_parnet.transport.base import IN_FLIGHT
from parallel_parnet.transport.group import (
    interface_of,
)
from parallel_parnet.transport.health import (
    DIED,
    LEAVING,
    MAX_RANKS,
    SILENCE_S,
    SILENT,
    STOPPED_S,
    Monitor,
    Peer,
    Watched,
    host_identity,
    process_state,
)
from parallel_parnet.transport.semaphore import BY_ANY_CLOCK, LIBC, SEMAPHORE_BYTES, Semaphore
from parallel_parnet.transport.shared_memory import ROUTE_BYTES, SMALL_BYTES, Memory, Route, SharedInbox
from parallel_parnet.transport.torch_distributed import FOREVER, Gloo, ReceivingInbox

FORK = multiprocessing.get_context("fork")


def lonely(timeout_s: float = 20) -> Monitor:
    """A monitor of one rank, which never starts."""
    return Monitor(0, [], timeout_s)


def route(control: Memory, sender: int, timeout_s: float = 20) -> Route:
    return Route(control.mapped, 0, sender, lonely(timeout_s), 1)


def test_a_header_lies_beside_its_semaphores() -> None:
    """So that its reader finds it when the sender, and the memory that it made for larger messages, is gone."""
    assert HEADER * torch.int64.itemsize <= SMALL_BYTES


def test_any_edit_of_what_computes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its language, and though kernels/ is linked into the package."""
    root = tmp_path / "parallel_parnet"
    (tmp_path / "kernels").mkdir()
    root.mkdir()
    (root / "kernels").symlink_to("../kernels")
    monkeypatch.setattr(distributed, "__file__", str(root / "executors" / "distributed.py"))
    digests = [sources_digest()]
    for name in ("executors/lane.py", "kernels/cpu/native.c", "kernels/cpu/vector.h", "kernels/hopper/level.cu",
                 "kernels/hopper/fp8.cuh", "network/blocks.py", "program/fold.py", "transport/base.py"):  # fmt: skip
        for edit in ("a", "b"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(edit)
            digests.append(sources_digest())
    assert len(set(digests)) == len(digests)


@pytest.fixture
def control() -> Memory:
    memory = Memory.create(ROUTE_BYTES)
    Semaphore(memory.mapped, 0).start(0)
    Semaphore(memory.mapped, SEMAPHORE_BYTES).start(IN_FLIGHT)
    return memory


def in_child(work: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    child = FORK.Process(target=work, daemon=True)
    child.start()
    return child


def test_messages_arrive_as_they_were_sent(control: Memory) -> None:
    seed = random.randrange(1 << 30)
    shapes = [(1, 3, 8, 8), (4, 24, 64, 64), (1, 8), (2, 24, 8, 16), (300, 2)]  # slots grow, and are used again
    shapes = [shapes[i] for i in torch.randint(len(shapes), (40,), generator=torch.Generator().manual_seed(seed))]

    def messages() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=generator) for shape in shapes]
        return [m.contiguous(memory_format=torch.channels_last) if m.ndim == 4 else m for m in made]

    def send() -> None:
        torch.set_num_threads(1)  # a forked process has none of its parent's
        sender = route(control, 0)
        for message in messages():
            sender.write(message)
        for _ in range(IN_FLIGHT):  # the receiver opens memory of this process until it has read all
            sender.free.wait(20, lambda: False)

    child = in_child(send)
    assert child.pid is not None
    receiver = route(control, child.pid)
    inboxes = {shape: SharedInbox(receiver, shape, torch.float32) for shape in shapes}
    for message in messages():
        inbox = inboxes[tuple(message.shape)]
        arrived = inbox.wait(idle=False)
        assert torch.equal(arrived, message), f"seed {seed}"
        assert arrived.stride() == message.stride(), "channels_last stays so"
        inbox.release()
    child.join(20)
    assert child.exitcode == 0


def test_a_sender_waits_for_a_free_place(control: Memory) -> None:
    sender = route(control, os.getpid(), timeout_s=0.3)
    for _ in range(IN_FLIGHT):
        sender.write(torch.zeros(8))
    with pytest.raises(TimeoutError, match=r"0\.3 s"):
        sender.write(torch.zeros(8))


def test_a_receiver_refuses_another_size(control: Memory) -> None:
    route(control, 0).write(torch.zeros(8))
    with pytest.raises(RuntimeError, match="32 bytes came where 36 were due"):
        SharedInbox(route(control, os.getpid()), (9,), torch.float32).wait(idle=False)


def test_memory_is_private_and_keeps_its_size() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    memory = Memory.create(5000)
    descriptor = memory.descriptor
    status = os.fstat(descriptor)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0, "no name that a crash could leave behind"
    for size in (100, 9000):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    with pytest.raises(RuntimeError, match="5000 bytes where 6000 were due"):
        Memory.of_other(os.getpid(), descriptor, 6000)
    other = Memory.of_other(os.getpid(), descriptor, 5000)
    memory.view((2, 3, 4, 4), torch.float32).fill_(2.5)
    assert torch.equal(other.view((2, 3, 4, 4), torch.float32), torch.full((2, 3, 4, 4), 2.5))
    del memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    del other
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("idle", "limits"), [(True, (FOREVER,)), (False, ())])
def test_gloo_waits_for_the_next_request_without_a_limit(idle: bool, limits: tuple) -> None:
    """Where a wait is over time, it breaks all connections."""
    arriving, waits = torch.zeros(3), []
    inbox = ReceivingInbox(arriving, 0, 0, arriving)
    inbox._work = SimpleNamespace(wait=lambda *limits: waits.append(limits))  # type: ignore[assignment]
    assert inbox.wait(idle) is arriving and waits == [limits]


def test_messages_of_two_transports_over_gloo_have_tags_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share its connections."""
    monitor, routes = lonely(), [Transfer(name, 1, 0) for name in ("input", "stem", "spans")]
    monkeypatch.setattr(base, "joined", lambda: monitor)
    tags = []
    for transport in (Gloo(routes), Gloo(routes)):
        for tag in range(len(routes)):
            inbox = transport.inbox(tag, 0, (1,), torch.float32, torch.device("cpu"))
            assert isinstance(inbox, ReceivingInbox)
            tags.append(inbox.tag)
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("with_any", sorted({BY_ANY_CLOCK, False}))
def test_a_semaphore_is_not_waited_for_longer(with_any: bool, control: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the C library has a wait by any clock, a wall clock that is set back in the middle changes nothing."""
    if with_any:
        set_back = time.time_ns() + 20 * 10**9
        monkeypatch.setattr(time, "time_ns", lambda: set_back)
    monkeypatch.setattr(semaphores, "BY_ANY_CLOCK", with_any)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nothing for 0\.3 s"):
        Semaphore(control.mapped, 0).wait(0.3, lambda: False)
    assert 0.3 <= time.monotonic() - start < 5


def test_a_semaphore_wakes_a_sleeper(control: Memory) -> None:
    semaphore, asked = Semaphore(control.mapped, 0), []

    def post() -> None:
        time.sleep(0.5)
        Semaphore(control.mapped, 0).post()

    child = in_child(post)
    semaphore.wait(20, lambda: bool(asked.append(1)))
    assert len(asked) >= 2, "a lost rank is noticed while waiting"
    child.join(20)
    with pytest.raises(BrokenPipeError):
        semaphore.wait(20, lambda: True)
    semaphore.post()
    semaphore.wait(20, lambda: True)  # what was posted before the end counts


def test_a_signal_ends_no_wait(control: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    semaphore, interrupted = Semaphore(control.mapped, 0), []

    def interrupt(*arguments: object) -> int:
        interrupted.append(arguments)
        semaphore.post()
        ctypes.set_errno(errno.EINTR)
        return -1

    monkeypatch.setattr(LIBC, "sem_clockwait" if BY_ANY_CLOCK else "sem_timedwait", interrupt)
    semaphore.wait(20, lambda: False)
    assert len(interrupted) == 1


def test_a_failure_names_the_operation_and_the_rank() -> None:
    monitor = lonely()
    message = r"no answer from rank 2 while rank 0 was waiting for x \(after 3 s\)"
    with pytest.raises(LaneError, match=message), Watched(monitor, "waiting for x", culprit=2):
        raise TimeoutError("after 3 s")
    monitor = lonely()
    with pytest.raises(ParNetError, match="mine"), Watched(monitor, "waiting for x"):
        raise ParNetError("mine")


def heard(end: socket.socket, kind: int, rank: int) -> bool:
    """Whether this message comes within five seconds, whatever comes before."""
    end.settimeout(5)
    return bytes([kind * MAX_RANKS + rank]) in iter(lambda: end.recv(1), b"")


def test_what_one_rank_loses_all_hear_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that died, and one that lives but did not answer."""
    monkeypatch.setattr(Monitor, "_end", lambda monitor: None)
    near, far = zip(*(socket.socketpair() for _ in range(3)), strict=True)
    for end in near:
        end.setblocking(False)
    monitor = Monitor(0, [Peer(rank, end, 0) for rank, end in enumerate(near, start=1)], 20)
    monitor.start()
    try:
        with pytest.raises(LaneError, match="no answer from rank 3"), Watched(monitor, "waiting for x", culprit=3):
            raise TimeoutError
        assert all(heard(end, SILENT, 3) for end in far)
        far[1].send(bytes([LEAVING * MAX_RANKS + 2]))
        deadline = time.monotonic() + 5
        while not monitor.is_gone(2):
            assert time.monotonic() < deadline
        assert not monitor.is_gone(1) and not monitor._lost, "who left in order is no loss"
        monitor._told.release()  # which lets a rank tell of one loss alone
        far[0].close()
        assert heard(far[1], DIED, 1)
        with (
            pytest.raises(LaneError, match="rank 1 died while rank 0 was waiting for y"),
            Watched(monitor, "waiting for y"),
        ):
            raise ConnectionResetError
    finally:
        monitor.leave()
        for end in far:
            end.close()


def test_silence_of_another_host() -> None:
    """Which alone tells that a rank there is stopped or cut off."""
    with socket.socket() as connection:
        peer = Peer(1, connection, pid=0)
        assert peer.is_lost(SILENCE_S + 0.1) and not peer.is_lost(STOPPED_S + 0.1)
        assert not Peer(1, connection, os.getpid()).is_lost(SILENCE_S + 0.1), "busy, and not stopped"


def test_a_rank_that_lacks_memory_blames_no_other(control: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def on_a_gpu(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(Monitor, "explain", lambda *_: pytest.fail("another rank is blamed"))
    operation, message = Watched(lonely(), "sending x", culprit=2), torch.zeros(SMALL_BYTES)
    sender, descriptors = route(control, os.getpid()), len(os.listdir("/proc/self/fd"))
    for write, lack in ((sender.write, MemoryError), (on_a_gpu, torch.OutOfMemoryError)):
        with pytest.raises(lack), operation:
            write(message)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_what_a_host_tells() -> None:
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(ParNetError, match=r"no interface has the address 192\.0\.2\.1: name .*lo"):
        interface_of("192.0.2.1")
    assert host_identity() == host_identity()
    assert process_state(os.getpid()) == "R"
    child = in_child(lambda: time.sleep(20))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while process_state(child.pid) != "T":
        assert time.monotonic() < deadline
    child.kill()
    child.join()
    assert process_state(child.pid) == "?"


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="only Linux keeps a process's name there")
def test_a_process_whose_name_is_no_text() -> None:
    """As the system cuts it, after 15 bytes."""
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    try:
        comm.write_bytes(b"fifteen letter" + b"\xc3")
        assert process_state(os.getpid()) == "R" and (process_age() or 0) > 0
    finally:
        comm.write_bytes(before)
