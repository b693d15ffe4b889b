"""The cores that this process may use, and the threads that are right for them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import ParNetError
from .forking import is_forked

MOST_THREADS = 1024  # that the CPU kernels have room for


def cores() -> int:
    """Count the cores that this process may use: those it is bound to, or fewer where a control group grants less
    time."""
    try:
        bound = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # no Linux, or a sandbox that does not tell
        bound = os.cpu_count() or 1
    return max(1, min([bound, *(math.floor(quota) for quota in quotas())]))


def usual_threads() -> int:
    """Return torch's number of threads, at most `cores`: torch knows of no control group, and with more threads than
    cores all stand still for the rest of each period once their time is used up. It reads /sys, so it is not called per
    request."""
    return min(torch.get_num_threads(), cores())


def check_threads(threads: int | None, device: torch.device) -> None:
    """Raise ParNetError for a number of an engine's threads that cannot be had on `device`; None: the usual one."""
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
        raise ParNetError(f"{threads!r} threads: there must be at least 1, and at most {MOST_THREADS}")
    if is_forked() and device.type == "cpu" and (several := threads or torch.get_num_threads()) > 1:
        raise ParNetError(
            f"{several} compute threads in a forked process, where its parent's are gone: leave them at 1, or "
            "start the process by spawn"
        )


def quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Yield how many cores' worth of time each control group, version 2 or 1, grants: this process's own and those
    above; those that may not be read are passed over."""
    lines = os.fsdecode(content).split("\n") if (content := _content(own)) else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        for folder in {top, *(top / path.strip("/")).parents, top / path.strip("/")}:
            granted = _content(folder / "cpu.max") or b" ".join(
                _content(folder / f"cpu.cfs_{which}_us") for which in ("quota", "period")
            )
            quota, _, period = granted.decode().strip().partition(" ")
            if quota.isdecimal() and period.isdecimal():  # neither "max" nor -1
                yield int(quota) / int(period)


def _content(file: Path) -> bytes:
    """Nothing where it is missing, or may not be read."""
    try:
        return file.read_bytes().strip()
    except OSError:
        return b""
