"""The ranks as a group: joining and leaving it, and what all of them must agree on before the first request.

Nothing is pickled: what crosses are fixed vectors of int64 and of bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import LaneError, ParNetError
from . import health

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"  # variables that name interfaces
LOOPBACK = "127.0.0.1"
FIELD = 64  # bytes of each setting that the ranks compare


def join_ranks(device: torch.device, timeout_s: float) -> None:
    """Join the ranks that torchrun started, and watch over them until `leave_ranks`.

    Connections go over the first interface in GLOO_SOCKET_IFNAME; without it over loopback where torchrun started all
    ranks on this host, else over the interface that leads to torchrun's master. NCCL_SOCKET_IFNAME overrules that for
    NCCL. Each operation of a running request ends after `timeout_s`. LaneError where a rank does not come within that
    time; ParNetError where the others cannot reach this host so.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        raise LaneError(f"no rendezvous ({error})") from error
    # torchrun keeps its store while ranks leave and join again, and by static rendezvous over restarts, with the
    # addresses of ranks that are gone
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    store = dist.PrefixStore(str(store.add(f"joined by {rank}", 1)), store)
    address = local_address()
    for variable in (GLOO, NCCL) if device.type == "cuda" else (GLOO,):
        if not os.environ.get(variable):
            os.environ[variable] = interface_of(address)
    monitor = health.start(rank, world, dist.PrefixStore("parallel_parnet", store), address, timeout_s)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    with health.Watched(monitor, "joining the ranks"):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    gather([rank])  # a rank that finds its input at fault must not leave while another still makes its connections


def leave_ranks() -> None:
    """End what `join_ranks` began: a process that exits with the group's threads alive may be aborted by them."""
    if monitor := health.current():
        monitor.leave()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def local_address() -> str:
    """Return the address at which the other ranks reach this host; ParNetError where none is found."""
    if (named := os.environ.get(GLOO)) and sys.platform == "linux":  # elsewhere `addresses_of` finds none
        if found := addresses_of(named.split(",")[0]):  # gloo takes a list
            return found[0]
        raise ParNetError(f"{GLOO}={named}: no interface of that name has an address: {_name_one()}")
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # other launchers than torchrun do not set it
        return LOOPBACK
    host, reason = os.environ["MASTER_ADDR"], OSError("no address")
    try:
        ways = socket.getaddrinfo(host, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM)
    except OSError as error:
        ways, reason = [], error
    ways.sort(key=lambda way: way[0])  # IPv4 before IPv6, as gloo takes an interface's addresses
    for family, _, _, _, master in ways:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(master)  # sends nothing, but chooses the interface
                return probe.getsockname()[0]
            except OSError as error:
                reason = error
    raise ParNetError(f"MASTER_ADDR={host}: no way there ({reason}): give another, or {_name_one()}")


def addresses_of(interface: str) -> list[str]:
    """List a network interface's IPv4 address, then those of IPv6 except link-local ones, which mean nothing on other
    hosts. Empty where there is no such interface."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        reply = fcntl.ioctl(probe, 0x8915, struct.pack("256s", os.fsencode(interface)))  # SIOCGIFADDR
        found.append(socket.inet_ntoa(reply[20:24]))
    with suppress(OSError):  # a kernel without IPv6, or a sandbox that does not tell
        for line in os.fsdecode(Path("/proc/net/if_inet6").read_bytes()).splitlines():
            digits, _, _, scope, _, name = line.split()
            if name == interface and scope != "20":
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def interface_of(address: str) -> str:
    """Return the name of the network interface that has this address; ParNetError where none has it."""
    for _, name in socket.if_nameindex():
        if address in addresses_of(name):
            return name
    raise ParNetError(f"no interface has the address {address}: {_name_one()}")


def _name_one() -> str:
    names = [name for _, name in socket.if_nameindex() if addresses_of(name)]
    return f"name {' or '.join(names) or 'one'} in {GLOO}"


def joined() -> health.Monitor:
    """Return the monitor of the ranks that were joined; ParNetError where none were."""
    if monitor := health.current():
        return monitor
    raise ParNetError("this process has not joined the others: call join_ranks first")


def announce(numbers: list[int], source: int) -> list[int]:
    """Return the numbers of rank `source`, on every rank; all give as many."""
    monitor, mine = joined(), torch.tensor(numbers, dtype=torch.int64, device="cpu")
    with health.Watched(monitor, f"waiting for numbers from rank {source}", source):
        dist.broadcast(mine, source)
    return mine.tolist()


def gather(numbers: list[int]) -> list[list[int]]:
    """Return each rank's numbers, on every rank; all give as many.

    Rank by rank rather than by a collective, whose failure would not tell which rank is lost.
    """
    monitor, mine = joined(), torch.tensor(numbers, dtype=torch.int64, device="cpu")
    parts = [mine if rank == monitor.rank else torch.empty_like(mine) for rank in range(monitor.world)]
    under_way: list[tuple[int, dist.Work | None]] = []
    for start in (
        lambda rank: dist.isend(mine, rank, tag=health.GATHER),
        lambda rank: dist.irecv(parts[rank], rank, tag=health.GATHER),
    ):
        for rank in range(monitor.world):
            if rank != monitor.rank:
                with health.Watched(monitor, f"comparing settings with rank {rank}", rank):
                    under_way.append((rank, start(rank)))
    for rank, work in under_way:
        with health.Watched(monitor, f"comparing settings with rank {rank}", rank):
            assert work is not None, "this rank is in the group"
            work.wait()
    return [part.tolist() for part in parts]


def agree(settings: Mapping[str, str]) -> None:
    """Raise ParNetError, on every rank, where a rank's settings differ from rank 0's, with the rank and the setting."""
    texts = [text.encode()[:FIELD].ljust(FIELD) for text in settings.values()]
    everyone = gather([byte for text in texts for byte in text])
    for i, name in enumerate(settings):
        answers = [bytes(b & 255 for b in row[i * FIELD : (i + 1) * FIELD]) for row in everyone]
        for rank, answer in enumerate(answers):
            if answer != answers[0]:
                theirs, first = (text.decode(errors="replace").strip() for text in (answer, answers[0]))
                raise ParNetError(
                    f"rank {rank} differs from rank 0 in {name} ({theirs}, not {first}): start all with the same"
                )


def share_a_host(device: torch.device) -> tuple[bool, bool, bool]:
    """Return whether all ranks run on one host, each has a GPU of its own, and each can make memory to share."""
    on_gpu = device.type == "cuda"
    gpu = str(torch.cuda.get_device_properties(device).uuid) if on_gpu else "none"
    everyone = gather([_number(health.host_identity()), _number(gpu), _has_memfd()])
    hosts, gpus, memory = (set(column) for column in zip(*everyone))
    return len(hosts) == 1, on_gpu and len(gpus) == len(everyone), memory == {1}


def _has_memfd() -> int:
    try:
        os.close(os.memfd_create("parallel_parnet"))
    except (AttributeError, OSError):  # no Linux, or a sandbox that refuses it
        return 0
    return 1


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
