"""What the ranks of one training run do together; alone, a process does it by itself."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_parnet.transport import gather, health


def waiting(action: str) -> AbstractContextManager:
    """While one rank waits for another: a failure then names the rank that was lost."""
    monitor = health.current()
    return nullcontext() if monitor is None else health.Watched(monitor, action)


def parallel(model: nn.Module, device: torch.device, x_nchw: Tensor) -> nn.Module:
    """The model, its gradients averaged over all ranks wherever there are several. x_nchw: pictures of any content."""
    if health.current() is None:
        return model
    with waiting("comparing weights"):
        ids = [device] if device.type == "cuda" else None
        together = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        # after its first step it groups gradients anew, and sums them in another order: were that a step of training,
        # the first after a restart would differ in its last bits
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.random.fork_rng(devices=ids or []):
            together(x_nchw).sum().backward()
        model.load_state_dict(before)
    return together


def same(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, in place on all ranks."""
    if health.current() is not None:
        with waiting("waiting for rank 0"):
            dist.broadcast(tensor, 0)
    return tensor


def totals(numbers: list[int]) -> list[int]:
    """Sums over all ranks."""
    return numbers if health.current() is None else [sum(column) for column in zip(*gather(numbers), strict=True)]


def everyones(tensor: Tensor) -> list[Tensor]:
    """Each rank's tensor, which all have the same shape, on every rank; on the CPU."""
    if (monitor := health.current()) is None:
        return [tensor]
    parts = [torch.zeros_like(tensor) for _ in range(monitor.world)]
    with waiting("gathering states"):
        dist.all_gather(parts, tensor)
    return parts


def everyones_words(words: dict[str, str]) -> dict[str, str]:
    """What all ranks have to say, on every rank."""
    if health.current() is None:
        return words
    mine, found = json.dumps(words).encode(), {}
    longest = max(length for [length] in gather([len(mine)]))
    for theirs in gather(list(mine.ljust(longest))):
        found |= json.loads(bytes(theirs))
    return found
