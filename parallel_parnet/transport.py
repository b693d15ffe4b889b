"""Features between ranks, over torch.distributed: gloo for tensors on the CPU, NCCL for tensors on GPUs.

Nothing is pickled: headers are fixed int64 vectors, and every receiver knows shape and type beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import LaneError, ParNetError


class Pending(Protocol):
    """A send or receive under way."""

    def wait(self) -> object: ...


def join_ranks(device: torch.device, timeout_s: float) -> None:
    """Join the ranks that torchrun started, at the address it was given; every wait ends after `timeout_s`."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def leave_ranks() -> None:
    """End what `join_ranks` began: a process that exits with the group's threads alive may be aborted by them."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Transport:
    """Point-to-point sends and receives between lanes; a rank is a lane."""

    lane: int
    lanes: int

    @classmethod
    def of_ranks(cls) -> Transport:
        """The transport of the default process group."""
        return cls(dist.get_rank(), dist.get_world_size())

    def send(self, feature: Tensor, lane: int, tag: int, name: str) -> Pending:
        """Start to send a dense tensor; keep it unchanged until the send has been waited for."""
        with _named(f"sending {name} to lane {lane}"):
            work = dist.isend(_memory_order(feature), lane, tag=tag)
            assert work is not None
            return work

    def receive(self, buffer: Tensor, lane: int, tag: int, name: str) -> Pending:
        """Start to receive into a dense tensor of the sender's shape, type and memory format."""
        with _named(f"receiving {name} from lane {lane}"):
            work = dist.irecv(_memory_order(buffer), lane, tag=tag)
            assert work is not None
            return work

    def wait(self, work: Pending, name: str) -> None:
        """Wait for a send or receive; LaneError where the other lane is gone or the time is over."""
        with _named(f"waiting for {name}"):
            work.wait()

    def announce(self, header: list[int], coordinator: int) -> list[int]:
        """The coordinator's header, on every lane."""
        vector = torch.tensor(header, dtype=torch.int64)
        with _named(f"waiting for the next request from lane {coordinator}"):
            dist.broadcast(vector, coordinator)
        return vector.tolist()

    def gather(self, numbers: list[int]) -> list[list[int]]:
        """Each lane's numbers, on every lane."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.lanes)]
        with _named("gathering the lanes' settings"):
            dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]

    def agree(self, digest: str) -> None:
        """ParNetError, on every lane, where some lane runs another program."""
        words = [int(digest[i : i + 8], 16) for i in range(0, 64, 8)]
        everyone = self.gather(words)
        if other := [lane for lane, theirs in enumerate(everyone) if theirs != everyone[0]]:
            raise ParNetError(f"lane {other[0]} has another program or other weights than lane 0: give all the same")


def _memory_order(feature: Tensor) -> Tensor:
    """The same memory as a contiguous tensor: a channels_last feature seen as [N, H, W, C]."""
    if feature.is_contiguous():
        return feature
    view = feature.movedim(1, -1)
    assert view.is_contiguous(), "features cross lanes in a dense memory format"
    return view


@contextmanager
def _named(action: str) -> Iterator[None]:
    """Turn a failure of torch.distributed into a LaneError that says what was under way."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError and gloo's own are RuntimeErrors
        reason = str(error).splitlines()[0]
        raise LaneError(f"lost another lane while {action} ({reason})") from error
