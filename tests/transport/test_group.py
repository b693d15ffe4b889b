"""How ranks find each other: addresses, hosts, transports that fit, and strangers who do not belong."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel_parnet import LaneError, ParNetError, transport
from parallel_parnet.transport import group, health, join_ranks
from parallel_parnet.transport.group import (
    _number,
    addresses_of,
    agree,
    interface_of,
    local_address,
    share_a_host,
)
from parallel_parnet.transport.health import (
    MAX_RANKS,
    Monitor,
    Peer,
    host_identity,
)

FORK = multiprocessing.get_context("fork")


def test_the_address_for_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A named interface overrules whatever the master's address says; without one, that may be of either family."""
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    for variable in ("LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    if "::1" in addresses_of("lo"):
        assert local_address() == "::1" and interface_of("::1") == "lo"
    for host in ("::1", "nowhere.invalid", "127.0.0.1"):
        monkeypatch.setenv("MASTER_ADDR", host)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth0")
        assert local_address() == "127.0.0.1"
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
        with pytest.raises(ParNetError, match=r"^GLOO_SOCKET_IFNAME=eth99: no interface .*: name .*lo"):
            local_address()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror(-2, "unknown")))
    with pytest.raises(ParNetError, match=r"^MASTER_ADDR=127\.0\.0\.1: no way there \(.*unknown\)"):
        local_address()


def test_the_transport_that_fits_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whether they share a host, and whether each has a GPU of its own."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def chosen(name: str, device: torch.device, one_host: bool, own_gpu: bool = False, memory: bool = True) -> str:
        monkeypatch.setattr(transport, "share_a_host", lambda device: (one_host, own_gpu, memory))
        return transport.choose_transport(name, device)

    assert [chosen("auto", cpu, one_host) for one_host in (True, False)] == ["shared", "gloo"]
    assert [chosen("auto", gpu, True, own_gpu) for own_gpu in (True, False)] == ["nccl", "gloo"]
    assert chosen("auto", cpu, True, memory=False) == "gloo"
    with pytest.raises(ParNetError, match=r"transport shared: .* \(memfd\); choose gloo"):
        chosen("shared", cpu, True, memory=False)
    assert chosen("symmetric", gpu, True, True) == "symmetric" and chosen("nccl", gpu, False, True) == "nccl"
    for name, device, one_host, own_gpu, message in (
        ("shared", cpu, False, False, "of one Linux host; choose gloo"),
        ("shared", gpu, True, True, "on the CPU of one Linux host; choose gloo"),
        ("nccl", gpu, True, False, "transport nccl: each rank needs an NVIDIA GPU of its own"),
        ("nccl", cpu, True, False, "transport nccl: each rank needs an NVIDIA GPU of its own"),
        ("symmetric", gpu, True, False, "transport symmetric: each rank needs an NVIDIA GPU of its own"),
        ("symmetric", gpu, False, True, "must be peers on one host; choose nccl"),
    ):
        with pytest.raises(ParNetError, match=message):
            chosen(name, device, one_host, own_gpu)


@pytest.mark.parametrize("other_gpu", ["A", "B"])
def test_who_shares_a_host_and_a_gpu(other_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers that share a network, and see no process of each other's, are hosts of their own."""
    monkeypatch.setattr(health, "host_identity", lambda space="pid": space)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="A"))
    for host, one in (("net", False), ("pid", True)):
        monkeypatch.setattr(group, "gather", lambda own, host=host: [own, [_number(host), _number(other_gpu), 1]])
        assert share_a_host(torch.device("cuda")) == (one, other_gpu == "B", True)


@pytest.mark.parametrize("lacks", ["this rank", "another"])
def test_memory_that_a_rank_cannot_make(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if lacks == "this rank":
        monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr(group, "gather", lambda own: [own, [*own[:2], int(lacks != "another")]])
    assert share_a_host(torch.device("cpu")) == (True, False, False)


def test_a_system_that_does_not_tell_its_hosts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one without /proc/self/ns."""

    def absent(path: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", absent)
    assert host_identity() != host_identity() and host_identity("net") == "unknown"


def test_interfaces_that_are_named_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's own as well; gloo's is that of the address."""
    for name, value in {
        "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "ib0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(health, "start", lambda *_: Monitor(0, [], 20))
    monkeypatch.setattr(group, "gather", lambda numbers: [numbers])
    join_ranks(torch.device("cuda"), 1)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "ib0")


@pytest.mark.parametrize("address", ["127.0.1.1", "::1"])
def test_no_loopback_between_hosts(address: str) -> None:
    store = dist.HashStore()
    store.set("health/0", f"{address} 1 elsewhere 1 00 elsewhere")
    with pytest.raises(ParNetError, match=f"rank 0 gives its address as {address}, .* in its GLOO_SOCKET_IFNAME"):
        health.start(1, 2, store, "127.0.0.1", 1)
    with pytest.raises(ParNetError, match=r"rank 1 cannot listen at 192\.0\.2\.1 .* in GLOO_SOCKET_IFNAME"):
        health.start(1, 2, store, "192.0.2.1", 1)
    with pytest.raises(ParNetError, match="65 ranks: at most 64"):
        health.start(0, MAX_RANKS + 1, store, "127.0.0.1", 1)


def test_strangers_extend_no_start() -> None:
    store, over = dist.HashStore(), threading.Event()

    def knock() -> None:
        address, port, *_ = store.get("health/0").decode().split()
        while not over.is_set():
            with suppress(OSError), socket.create_connection((address, int(port)), 1) as stranger:
                stranger.recv(1)  # silent itself, as another waits behind it

    store.set("health/1", f"127.0.0.1 1 elsewhere 1 00 {host_identity('net')}")
    strangers = [threading.Thread(target=knock, daemon=True) for _ in range(2)]
    for stranger in strangers:
        stranger.start()
    started = time.monotonic()
    try:
        with pytest.raises(LaneError, match=r"rank 0 waited 0\.5 s for the other ranks to start"):
            health.start(0, 2, store, "127.0.0.1", 0.5)
    finally:
        over.set()
        for stranger in strangers:
            stranger.join()
    assert time.monotonic() - started < 4


def test_who_knows_the_token_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of a number that this rank does not wait for."""
    monkeypatch.setattr(Monitor, "_end", lambda monitor: None)
    store, over = dist.HashStore(), threading.Event()

    def knock() -> None:
        address, port, _, _, token, _ = store.get("health/0").decode().split()
        known = bytes.fromhex(token)
        with socket.create_connection((address, int(port)), 20) as rank:
            rank.sendall(known + b"\1")
            for hello in (bytes(len(known)) + b"\2", known + b"\1", known + b"\0", known + b"\3"):
                with suppress(OSError), socket.create_connection((address, int(port)), 1) as other:
                    other.sendall(hello)
                    other.recv(1)  # until it is refused
            over.wait(20)

    for rank in (1, 2):
        store.set(f"health/{rank}", f"127.0.0.1 1 elsewhere 1 00 {host_identity('net')}")
    knocking = threading.Thread(target=knock, daemon=True)
    knocking.start()
    try:
        with pytest.raises(LaneError, match=r"rank 0 waited 1 s for the other ranks to start"):
            health.start(0, 3, store, "127.0.0.1", 1).leave()
    finally:
        over.set()
        knocking.join()
    gc.collect()  # the connection that was taken goes with the error


def test_a_greeting_may_come_in_parts() -> None:
    store, over = dist.HashStore(), threading.Event()

    def greet() -> None:
        address, port, _, _, token, _ = store.get("health/0").decode().split()
        hello = bytes.fromhex(token) + b"\1"
        with socket.create_connection((address, int(port)), 20) as rank:
            for part in (hello[:3], hello[3:]):
                rank.sendall(part)
                time.sleep(0.1)
            over.wait(20)

    store.set("health/1", f"127.0.0.1 1 elsewhere 1 00 {host_identity('net')}")
    greeting = threading.Thread(target=greet, daemon=True)
    greeting.start()
    try:
        health.start(0, 2, store, "127.0.0.1", 2).leave()
    finally:
        over.set()
        greeting.join()


def test_ranks_meet_where_no_process_can_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pidfd_open, which old kernels and strict containers refuse. Then a rank that was stopped is not killed."""

    def refused(*_: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", refused)
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        monitors = list(threads.map(lambda rank: health.start(rank, 2, store, "127.0.0.1", 20), range(2)))
    try:
        (peer,) = monitors[0]._peers.values()
        assert (peer.pid, peer.pidfd) == (os.getpid(), -1)
        monitors[0]._stopped = peer
        monitors[0].fence()
    finally:
        for monitor in monitors:
            monitor.leave()


def test_a_rank_that_cannot_be_killed_ends_no_other() -> None:
    monitor = Monitor(0, [], 20)
    monitor._stopped = Peer(1, socket.socket(), 1, os.open("/", os.O_RDONLY))  # which is no process
    monitor.fence()
    os.close(monitor._stopped.pidfd)
    monitor._stopped.connection.close()


def test_ranks_must_have_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParNetError, match="call join_ranks first"):
        agree({"torch": "1"})
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = str(nobody.getsockname()[1])
        environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LaneError, match="no rendezvous"):
            join_ranks(torch.device("cpu"), 1)
