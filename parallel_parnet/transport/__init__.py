"""Features between ranks: one interface, and a way for each kind of machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ParNetError
from ..program.placement import Transfer
from .base import Transport
from .group import agree, announce, gather, join_ranks, leave_ranks, share_a_host

__all__ = [
    "TRANSPORTS",
    "Transport",
    "agree",
    "announce",
    "choose_transport",
    "gather",
    "join_ranks",
    "leave_ranks",
    "open_as",
]

TRANSPORTS = ("auto", "shared", "symmetric", "nccl", "gloo")


def choose_transport(name: str, device: torch.device) -> str:
    """Return the transport that "auto" stands for on these ranks, the same on all; ParNetError where `name` cannot run.

    Every rank calls it. On CPUs shared memory where all ranks share a host, and can make it, else gloo; on GPUs NCCL
    where each rank has a GPU of its own, else gloo, through the host.
    """
    if name not in TRANSPORTS:
        raise ParNetError(f"unknown transport {name!r}: choose one of {', '.join(TRANSPORTS)}")
    one_host, own_gpu, memory = share_a_host(device)
    on_gpu = device.type == "cuda"
    if name == "auto":
        return ("nccl" if own_gpu else "gloo") if on_gpu else ("shared" if one_host and memory else "gloo")
    if name == "shared" and (on_gpu or not one_host):
        raise ParNetError("transport shared: for tensors on the CPU of one Linux host; choose gloo")
    if name == "shared" and not memory:
        raise ParNetError("transport shared: a rank's system refuses memory without a name (memfd); choose gloo")
    if name in ("nccl", "symmetric") and not own_gpu:
        raise ParNetError(f"transport {name}: each rank needs an NVIDIA GPU of its own; choose gloo")
    if name == "symmetric" and not one_host:
        raise ParNetError("transport symmetric: the GPUs must be peers on one host; choose nccl")
    return name


def open_as(name: str, routes: Sequence[Transfer]) -> Transport:
    """Open the transport that `choose_transport` named, for these routes; every rank calls it, with equal arguments."""
    if name == "shared":
        from .shared_memory import SharedMemory  # here, since only Linux has what it needs

        return SharedMemory(routes)
    if name == "symmetric":
        from .symmetric import Symmetric  # here, since torch may be built without it

        return Symmetric(routes)
    from .torch_distributed import Gloo, Nccl

    return Nccl(routes) if name == "nccl" else Gloo(routes)
