"""Threads of the CPU kernels that wait leave their core to whoever needs it."""

from __future__ import annotations

import os

import pytest
import waits

from small import OPTIONAL

pytestmark = [
    pytest.mark.ranks,  # which have the machine to themselves
    pytest.mark.skipif("native" not in OPTIONAL, reason="the CPU kernels were not compiled"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has nobody to wait for"),
]
ATTEMPTS = 5  # of which one is enough: what else this machine does would slow any down


def test_a_busy_process_costs_its_share() -> None:
    """With waits that keep the core, a pass beside it took 13 to 40 times as long."""
    ratios = []
    for _ in range(ATTEMPTS):
        alone = waits.times(waits.demo(), 2, 300)["median"]
        with waits.a_busy_process():
            ratios.append(waits.times(waits.demo(), 2, 300)["median"] / alone)
        if ratios[-1] < 4:
            return
    pytest.fail(f"{ratios} times as long beside a busy process")


def test_more_threads_than_cores_take_turns() -> None:
    """With waits that sleep for a set time, a pass by 64 threads on two cores took a hundred times as long."""
    few, many = (waits.times(waits.demo(), threads, 100)["median"] for threads in (2, 64))
    assert many < 20 * few
