"""The benchmark's intervals, verdicts, shares of the budget and waits, on data with a known answer."""

from __future__ import annotations

import hashlib
import itertools
import sys
import threading
import time

import numpy as np
import pytest

from parallel_parnet.commands.bench import running
from parallel_parnet.commands.bench.rows import Row, add_ratios
from parallel_parnet.commands.bench.running import let_threads_sleep, shares
from parallel_parnet.commands.bench.statistics import median_interval, ratio, summary, verdicts


def test_intervals_cover_a_known_ratio() -> None:
    covered, widths = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        spell = rng.lognormal(0, 0.3, 50)  # what slows the machine slows both
        a, b = (base * spell * rng.lognormal(0, 0.01, 50) for base in (0.8, 1.0))
        value, low, high = ratio(a, b, paired=True)
        covered += low <= 0.8 <= high
        assert low <= value <= high
        unpaired = ratio(a, b, paired=False)
        widths.append((high - low) / (unpaired[2] - unpaired[1]))
    assert covered >= 52  # 95% of 60, less four standard deviations
    assert np.median(widths) < 0.3


def test_percentiles_and_the_interval_of_a_median() -> None:
    """Of 1 to 101 ms: of the medians of such numbers 95% lie between 41 and 61, and 90% between 43 and 59."""
    times = np.arange(1, 102) / 1e3
    assert summary(times) == {"min": 1, "mean": 51, "median": 51, "p90": 91, "p95": 96, "p99": 100}
    low, high = median_interval(times)
    assert low < 0.051 < high and 0.0185 < high - low < 0.0215
    assert median_interval([0.001] * 80 + [1.0] * 20) == (0.001, 0.001)


def test_ratios_compare_times_of_the_same_round() -> None:
    """Where a peer was timed in fewer rounds, too."""
    spell = np.random.default_rng(0).lognormal(0, 0.5, 40)

    def row(ours: bool, ms: float, rounds: range) -> Row:
        samples = [ms * spell[i] for i in rounds]
        named = {"contender": "ours: auto" if ours else "a peer", "ours": ours}
        return {**named, "n": len(rounds), "infer_step_time": ms, "rounds": rounds, "samples_ms": samples}

    rows = [row(True, 0.8, range(40)), row(False, 1.0, range(1, 40, 2))]
    add_ratios(rows, paired=True)
    assert rows[1]["ratio"] == pytest.approx([0.8] * 3, abs=1e-4)


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    calm, wild = rng.normal(1, 0.005, 50), rng.normal(1, 0.1, 50)
    unknown = [float("nan")] * 50
    assert verdicts(calm, calm, unknown, []) == []
    assert verdicts(calm, calm, unknown, [2000, 2001]) == []
    assert "times vary by" in verdicts(wild, wild, unknown, [])[0]
    assert "clocks moved by 20.0%" in verdicts(calm, calm, unknown, [2000, 1600])
    assert verdicts(wild, 0.1 * calm, calm, []) == []  # the GPU's own time decides where it is known
    assert "enqueue takes 90%" in verdicts(calm, 0.9 * calm, calm, [])[0]


def test_the_budget_goes_to_the_fastest_first() -> None:
    assert shares([1.0, 0.1, 0.5], runs=50, least=5, budget=float("inf")) == [50, 50, 50]
    counts = shares([1.0, 0.1, 0.5], runs=50, least=5, budget=20)
    assert counts == [5, 50, 20]
    assert shares([1.0, 2.0], runs=50, least=5, budget=1) == [5, 5]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell which threads run")
def test_waits_for_spinning_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, though the system adds up their CPU time later."""
    monkeypatch.setattr(running, "LONGEST_PAUSE", 60)
    begun, ended, data = threading.Event(), threading.Event(), bytes(1 << 27)

    def spin() -> None:
        begun.set()
        hashlib.sha256(data)  # without Python's lock
        ended.set()

    thread = threading.Thread(target=spin)
    thread.start()
    begun.wait()
    time.sleep(0.02)
    let_threads_sleep()
    assert ended.is_set()
    thread.join()


@pytest.mark.parametrize(("busy_for", "waits"), [(0, 1), (5, 11)])
def test_waits_for_spinning_threads_elsewhere(busy_for: int, waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, sleeps = itertools.count(), []
    monkeypatch.setattr(running.sys, "platform", "darwin")
    monkeypatch.setattr(time, "process_time", lambda: min(next(reads), 2 * busy_for) * 1.0)
    monkeypatch.setattr(time, "sleep", sleeps.append)
    let_threads_sleep()
    assert len(sleeps) == waits


def test_waits_no_longer_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_others_run", lambda: True)
    start = time.perf_counter()
    let_threads_sleep()
    assert 0.1 <= time.perf_counter() - start < 5
