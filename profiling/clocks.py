"""The lanes' clocks against the coordinator's: offsets by ping-pong, with their uncertainty."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    """Return a number that two processes have in common where they read the same monotonic clock; 0 where it is
    unknown."""
    return int.from_bytes(hashlib.sha256(BOOT.read_bytes()).digest()[:6], "big") if BOOT.exists() else 0


def reading() -> list[float]:
    """Answer a `ping` of another lane: the time on its clock, and which clock that is."""
    return [time.perf_counter(), boot()]


def ask(ping: Callable[[], list[float]]) -> Clock:
    """Measure another lane's clock. `ping` asks it for a `reading`; the quickest round trip bounds the error best."""
    trips = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        theirs, which = ping()
        end = time.perf_counter()
        trips.append(((end - start) / 2, theirs - (start + end) / 2, which))
    uncertainty, offset, which = min(trips)
    return Clock(offset, uncertainty, shared=boot() != 0 and which == boot())
