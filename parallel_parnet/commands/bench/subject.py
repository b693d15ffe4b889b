"""What a benchmark runs, and how a contender runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from parallel_parnet import Program

PICTURES = 8  # fresh ones, in turn, so that no cache holds the answer
CALIBRATING, SEED = 32, 0  # pictures by which contenders in int8 find their ranges, and what draws them


@dataclass(frozen=True)
class Subject:
    """One network at one size, batch, type and device, the same for all contenders.

    network: in training form and evaluation mode, fp32, on the CPU; program: the same, folded. fused: the network as
    its users deploy it, each block's branches in one convolution. dtype: what is asked for; int8 stands for a network
    that each contender quantises by itself.
    """

    name: str
    network: nn.Module
    fused: nn.Module
    program: Program
    size: int
    batch: int
    device: torch.device
    dtype: torch.dtype
    threads: int

    @property
    def flops(self) -> int:
        """Of one pass, 2 per multiply-accumulate."""
        return self.program.cost(self.size, self.batch).flops

    @cached_property
    def in_turn(self) -> list[Tensor]:
        """The pictures that all contenders are timed with."""
        return self.pictures(PICTURES)

    @cached_property
    def calibration(self) -> Tensor:
        """Random pictures by which contenders in int8 find their ranges, fp32 [N, 3, H, W] on the CPU: the same for all
        of them, also where each has a process of its own."""
        drawn = torch.Generator().manual_seed(SEED)
        return torch.randn(CALIBRATING, 3, self.size, self.size, generator=drawn)

    def pictures(self, count: int) -> list[Tensor]:
        """Fresh random pictures, fp32 [N, 3, H, W], on the device."""
        return [torch.randn(self.batch, 3, self.size, self.size, device=self.device) for _ in range(count)]


@dataclass(frozen=True)
class Runner:
    """A contender that is set up. `logits(call(take(picture)))` are the logits; only `call`, then `wait`, is timed.

    take: hands the picture over without copying it. wait: until the answer is there. events: whether the work runs on
    torch's current CUDA stream, so that CUDA events can time it. settings, arithmetic: in words, for the report.
    """

    call: Callable[[Any], Any]
    settings: str
    arithmetic: str
    take: Callable[[Tensor], Any] = lambda picture: picture
    logits: Callable[[Any], Tensor] = lambda answer: answer
    wait: Callable[[Any], object] = lambda answer: None
    events: bool = True


@dataclass(frozen=True)
class Contender:
    """A way to run a network. `build` raises ParNetError, saying why, where this machine cannot.

    margin: times the limit of the type that its logits may be off, where its products are known to round more.
    """

    name: str
    ours: bool
    build: Callable[[Subject], Runner]
    margin: float = 1.0


def on_device(subject: Subject) -> Callable[[Any], object]:
    """What waits until the device has done torch's work."""
    if subject.device.type == "cpu":
        return lambda answer: None
    return lambda answer: torch.cuda.synchronize(subject.device)
