"""Whether the other ranks live: a thread in every rank that hears from all others, and ends its rank if one is lost.

Every two ranks hold a TCP connection, over loopback where all ranks are on one host. A rank writes a byte BEAT_S apart.
A closed connection tells a death at once, since the kernel closes it however the process ends; silence tells a rank
that is stopped or cut off. Where two ranks share a host, /proc says whether a silent one is stopped or only busy, and a
stopped one is killed, so that it cannot wake up later and answer a request that was given to another.

The messages are single bytes, kind x 64 + rank; nothing that arrives is looked at beyond that.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import Store

from ..errors import LaneError, ParNetError

BEAT_S = 0.25
SILENCE_S = 2.0  # without a beat from another host; a rank busy compiling held its threads up for 0.4 s at most
STOPPED_S = 0.75  # without a beat from a rank that /proc shows as stopped
GRACE_S = 0.4  # for the main thread to tell the loss itself, since it may have something to save
LAST_S = 2.0  # for the main thread to end after it has told it
MAX_RANKS = 64
ALIVE, LEAVING, DIED, SILENT = range(4)
GATHER = 0  # gloo's tag of what is compared; those of routes follow
HOW = {DIED: "died", SILENT: "stopped answering"}


@dataclass
class Peer:
    """Another rank. pid: its process where it is on this host, else 0; pidfd then stands for that process alone."""

    rank: int
    connection: socket.socket
    pid: int
    pidfd: int = -1
    heard: float = field(default_factory=time.monotonic)

    def is_lost(self, silence: float) -> bool:
        """Return whether so many seconds of silence mean that the rank is stopped or cut off."""
        if not self.pid:
            return silence > SILENCE_S
        return silence > STOPPED_S and process_state(self.pid) in "TtZX?"


class Monitor(threading.Thread):
    """Hears from all other ranks until `leave`. Main threads name what they wait for in `operation`."""

    def __init__(self, rank: int, peers: list[Peer], timeout_s: float) -> None:
        super().__init__(name="health", daemon=True)
        self.rank, self.timeout_s, self.operation = rank, timeout_s, "starting"
        self._peers = {peer.rank: peer for peer in peers}
        self._lost: str | None = None
        self._stopped: Peer | None = None
        self._left: set[int] = set()
        self._tags = GATHER + 1
        self._known = threading.Event()
        self._told = threading.Lock()  # taken by who tells of a loss first, and never released
        self._woken, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        for peer in peers:
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    @property
    def world(self) -> int:
        """The number of ranks, those that left included."""
        return len(self._peers) + 1

    def take_tags(self, count: int) -> int:
        """Return the first of `count` tags that no other transport of these ranks has; all open theirs in one order."""
        first, self._tags = self._tags, self._tags + count
        return first

    @property
    def has_lost(self) -> bool:
        """Whether another rank was lost, so that no request can be finished."""
        return self._known.is_set() or self._told.locked()

    def run(self) -> None:
        beat, before = 0.0, time.monotonic()
        while not self._known.is_set():
            now = time.monotonic()  # before listening: what this thread was too late to hear is no silence
            if now - before > 2 * BEAT_S:  # this rank was stopped itself, and others with it, which may go on later
                for peer in self._peers.values():
                    peer.heard = now
            before = now
            for key, _ in self._selector.select(max(0.0, beat - now)):
                if key.fileobj is self._woken:
                    return
                self._hear(key.data)
            listening = [key.data for key in self._selector.get_map().values() if key.data]
            silent = next((peer for peer in listening if peer.is_lost(now - peer.heard)), None)
            if silent is not None:
                self._stopped = silent
                self._lose(SILENT, silent.rank)
            if now >= beat:
                self._tell(ALIVE, self.rank)
                beat = now + BEAT_S
        self._end()

    def leave(self) -> None:
        """Tell the others that this rank ends in order, and stop listening."""
        self._tell(LEAVING, self.rank)
        self._waker.send(b".")
        self.join()
        self._selector.close()
        for peer in self._peers.values():
            peer.connection.close()
            if peer.pidfd >= 0:
                os.close(peer.pidfd)
        self._woken.close()
        self._waker.close()

    def is_gone(self, rank: int) -> bool:
        """Return whether a rank will send nothing any more, because it left or some rank was lost."""
        return self._known.is_set() or rank in self._left

    def explain(self, reason: str, culprit: int | None = None) -> LaneError:
        """Return the error for an operation that failed: it names the lost rank, or the reason where none is lost.

        culprit: the rank that the operation waited for; where it lives but did not answer, the others hear of it.
        """
        if not self._known.wait(BEAT_S + STOPPED_S) and culprit is not None and culprit not in self._left:
            self._tell(SILENT, culprit)
        if not self._told.acquire(blocking=False):
            time.sleep(LAST_S)  # the monitor has told it already and is about to end this process
        if self._lost is None:
            who = "another rank" if culprit is None else f"rank {culprit}"
            return LaneError(f"no answer from {who} while rank {self.rank} was {self.operation} ({reason})")
        return LaneError(self._line())

    def _line(self) -> str:
        return f"{self._lost} while rank {self.rank} was {self.operation}"

    def _hear(self, peer: Peer) -> None:
        try:
            messages = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:  # reset: its process ended with bytes of ours unread
            messages = b""
        peer.heard = time.monotonic()
        for kind, rank in (divmod(message, MAX_RANKS) for message in messages):
            if kind == LEAVING:
                self._left.add(peer.rank)
                self._selector.unregister(peer.connection)
                return
            if kind != ALIVE:
                self._lose(kind, rank)
        if not messages:
            self._selector.unregister(peer.connection)
            self._lose(DIED, peer.rank)

    def _lose(self, kind: int, rank: int) -> None:
        if self._lost is None:
            self._lost = f"rank {rank} {HOW[kind]}"
            self._tell(kind, rank)
            self._known.set()

    def _end(self) -> None:
        """Give the main thread a moment to report the loss and end; do both for it where it cannot."""
        time.sleep(GRACE_S)
        if self._told.acquire(blocking=False):
            os.write(2, f"error on rank {self.rank}: {self._line()}\n".encode())
        else:
            time.sleep(LAST_S)
        self.fence()
        os._exit(1)

    def _tell(self, kind: int, rank: int) -> None:
        for peer in self._peers.values():
            try:
                peer.connection.send(bytes([kind * MAX_RANKS + rank]))
            except OSError:
                continue  # gone, or too stopped to read: the reading side of the connection tells which

    def fence(self) -> None:
        """Kill a rank that was found stopped. Told first: torchrun ends all ranks as soon as one has died."""
        if self._stopped is not None and self._stopped.pidfd >= 0:
            with suppress(OSError):  # it is gone already, or a container's profile refuses it
                signal.pidfd_send_signal(self._stopped.pidfd, signal.SIGKILL)


class Watched:
    """A context that names what the main thread is about to wait for, and turns its failure into a LaneError, but for a
    lack of memory, which is this rank's own.

    culprit: the rank that it waits for, where that is one.
    """

    def __init__(self, monitor: Monitor, action: str, culprit: int | None = None) -> None:
        self._monitor, self._action, self._culprit = monitor, action, culprit

    def __enter__(self) -> None:
        self._monitor.operation = self._action

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._monitor.operation = "computing"
        elif isinstance(error, (RuntimeError, OSError)) and not isinstance(error, (LaneError, torch.OutOfMemoryError)):
            reason = str(error).splitlines()[0] if str(error) else kind.__name__  # torch's own are RuntimeErrors
            raise self._monitor.explain(reason, self._culprit) from error


def current() -> Monitor | None:
    """Return the monitor of this process's ranks, between `join_ranks` and `leave_ranks`; None elsewhere.

    Its thread is looked for, rather than a variable read: a forked child has no such thread, so this is None there.
    """
    return next((thread for thread in threading.enumerate() if isinstance(thread, Monitor)), None)


def start(rank: int, world: int, store: Store, address: str, timeout_s: float) -> Monitor:
    """Connect this rank with all others, and watch over them from now on.

    store: where ranks find each other. address: this host's, as the others reach it; ParNetError where that cannot be
    so. LaneError where a rank does not come within `timeout_s`.
    """
    if world > MAX_RANKS:
        raise ParNetError(f"{world} ranks: at most {MAX_RANKS}")
    token = secrets.token_hex(16)
    peers: list[Peer] = []
    with _listener(rank, world, address) as listener:
        port = listener.getsockname()[1]
        store.set_timeout(timedelta(seconds=timeout_s))
        store.set(f"health/{rank}", f"{address} {port} {host_identity()} {os.getpid()} {token} {host_identity('net')}")
        cards: list[list[str]] = []
        try:
            for other in range(world):
                missing = f"rank {other}"
                cards.append(store.get(f"health/{other}").decode().split())
            _refuse_loopback(cards)
            missing = "the other ranks"
            deadline = time.monotonic() + timeout_s
            for other in range(rank):
                connection = socket.create_connection((cards[other][0], int(cards[other][1])), timeout_s)
                connection.sendall(bytes.fromhex(cards[other][4]) + bytes([rank]))
                peers.append(_peer(other, connection, cards[other], cards[rank]))
            later = _accepted(listener, bytes.fromhex(token), range(rank + 1, world), deadline)
            peers += (_peer(other, connection, cards[other], cards[rank]) for other, connection in later.items())
        except (OSError, RuntimeError) as error:  # the store's own error is a RuntimeError
            raise LaneError(f"rank {rank} waited {timeout_s:g} s for {missing} to start ({error})") from error
    monitor = Monitor(rank, peers, timeout_s)
    monitor.start()
    return monitor


def _listener(rank: int, world: int, address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.bind((address, 0))
        listener.listen(world)
    except OSError as error:
        listener.close()
        raise ParNetError(
            f"rank {rank} cannot listen at {address} ({error}): name another interface in GLOO_SOCKET_IFNAME"
        ) from error
    return listener


def _accepted(listener: socket.socket, token: bytes, ranks: range, deadline: float) -> dict[int, socket.socket]:
    """The connections of these ranks, which come in any order, and strangers among them."""
    found: dict[int, socket.socket] = {}
    while len(found) < len(ranks):
        if (left := deadline - time.monotonic()) <= 0:  # also where strangers have come all the time
            raise TimeoutError("timed out")
        listener.settimeout(left)
        connection, _ = listener.accept()
        rank = _greeting(connection, token)
        if rank in ranks and rank not in found:
            found[rank] = connection
        else:
            connection.close()
    return found


def _refuse_loopback(cards: list[list[str]]) -> None:
    """ParNetError where a rank told others of an address that leads each host to itself, as /etc/hosts may have it."""
    for rank, card in enumerate(cards):
        if ipaddress.ip_address(card[0]).is_loopback and any(other[5] != card[5] for other in cards):
            raise ParNetError(
                f"rank {rank} gives its address as {card[0]}, where no other host reaches it: "
                "name the interface that leads to the others in its GLOO_SOCKET_IFNAME"
            )


def _greeting(connection: socket.socket, token: bytes) -> int:
    """The rank that has connected, or -1 for a stranger."""
    connection.settimeout(1.0)
    hello, due = b"", len(token) + 1
    try:
        while len(hello) < due and (part := connection.recv(due - len(hello))):  # which may come in parts
            hello += part
    except OSError:
        return -1
    is_rank = len(hello) == due and secrets.compare_digest(hello[:-1], token)
    return hello[-1] if is_rank else -1


def _peer(rank: int, connection: socket.socket, card: list[str], own: list[str]) -> Peer:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pid = int(card[3]) if (card[0], card[2]) == (own[0], own[2]) else 0
    pidfd = -1  # so that a rank that was stopped is left alone
    if pid and hasattr(os, "pidfd_open"):
        with suppress(OSError):  # Linux before 5.3, or a container's profile that refuses what it does not know
            pidfd = os.pidfd_open(pid)
    return Peer(rank, connection, pid, pidfd)


def host_identity(space: str = "pid") -> str:
    """Return an identity that processes share which see each other in /proc, as those of two containers do not.

    space: "net" for processes that share a loopback interface.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(f'/proc/self/ns/{space}')}"
    except OSError:  # no Linux, or a sandbox that does not tell: like no other, so that nobody looks for /proc
        return secrets.token_hex(8) if space == "pid" else "unknown"


def process_state(pid: int) -> str:
    """Return the letter of /proc for a process's state on this host, such as R, S, or T for stopped; "?" for none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()  # with the process's name, cut where a letter may not end
        return stat.rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "?"
