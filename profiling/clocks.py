"""The lanes' clocks against the coordinator's: offsets by ping-pong, with their uncertainty."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..transport import Transport

ROUNDS = 40
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Clock:
    """A lane's monotonic clock. offset: seconds that it is ahead of the coordinator's, to within `uncertainty`.

    shared: both lanes read the clock of one running kernel, so the true offset is 0 and `offset` only shows the error.
    """

    offset: float = 0.0
    uncertainty: float = 0.0
    shared: bool = True

    @property
    def applied(self) -> float:
        """What is subtracted from the lane's times."""
        return 0.0 if self.shared else self.offset


def boot() -> int:
    """A number that two processes have in common where they read the same monotonic clock; 0 where it is unknown."""
    return int.from_bytes(hashlib.sha256(BOOT.read_bytes()).digest()[:6], "big") if BOOT.exists() else 0


def ask(transport: Transport, lane: int, tag: int) -> Clock:
    """Measure a lane's clock, which has to `answer`: the round trip that took least bounds the error best."""
    trips = []
    reply = torch.zeros(2, dtype=torch.float64)
    for _ in range(ROUNDS):
        start = time.perf_counter()
        transport.wait(transport.send(torch.zeros(1), lane, tag, "a clock"), "a clock")
        transport.wait(transport.receive(reply, lane, tag, "a clock"), "a clock")
        end = time.perf_counter()
        trips.append(((end - start) / 2, reply[0].item() - (start + end) / 2))
    uncertainty, offset = min(trips)
    return Clock(offset, uncertainty, shared=boot() != 0 and reply[1].item() == boot())


def answer(transport: Transport, coordinator: int, tag: int) -> None:
    """Let the coordinator measure this lane's clock."""
    ping = torch.zeros(1)
    for _ in range(ROUNDS):
        transport.wait(transport.receive(ping, coordinator, tag, "a clock"), "a clock")
        now = torch.tensor([time.perf_counter(), boot()], dtype=torch.float64)
        transport.wait(transport.send(now, coordinator, tag, "a clock"), "a clock")
