"""The cores that this process may use, and the threads that are right for them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def cores() -> int:
    """Count the cores that this process may use: those it is bound to, or fewer where a control group grants less
    time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *(math.floor(quota) for quota in quotas())]))


def usual_threads() -> int:
    """Return torch's number of threads, at most `cores`: torch knows of no control group, and with more threads than
    cores all stand still for the rest of each period once their time is used up. It reads /sys, so it is not called per
    request."""
    return min(torch.get_num_threads(), cores())


def quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Yield how many cores' worth of time each control group, version 2 or 1, grants: this process's own and those
    above."""
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        for folder in {top, *(top / path.strip("/")).parents, top / path.strip("/")}:
            if (file := folder / "cpu.max").is_file():
                quota, period = file.read_text().split()
            elif (file := folder / "cpu.cfs_quota_us").is_file():
                quota, period = file.read_text().strip(), (folder / "cpu.cfs_period_us").read_text().strip()
            else:
                continue
            if quota.isdecimal():  # neither "max" nor -1
                yield int(quota) / int(period)
