"""Setting contenders up and timing them in turns, so that a slow spell of the machine hits all alike."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel_parnet import ParNetError
from parallel_parnet.parity import relative
from parallel_parnet.transport.health import process_state

from .subject import PICTURES, Contender, Runner, Subject

PAUSE, LONGEST_PAUSE = 0.002, 0.1  # seconds
TICKS = 0.02  # seconds, longer than any of the ticks at which a system counts what its threads have used


@dataclass
class Entry:
    """A contender on one subject: how it was set up, and its times in seconds, each with the round it was taken in.

    missing: why it does not run here; failed: that it should, as one of ours. second_call: the first
    that compiles nothing. error: of its logits against the fp32 reference, relative, of all compared pictures together.
    """

    contender: Contender
    subject: Subject
    runner: Runner | None = None
    missing: str = ""
    failed: bool = False
    setup: float = 0.0
    first_call: float = 0.0
    second_call: float = 0.0
    error: float = float("inf")
    rounds: list[int] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    enqueue: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.contender.name

    def once(self, number: int) -> Run:
        """One run, with the subject's picture whose turn it is."""
        return once(self.runner, self.subject.in_turn[number % PICTURES])


@dataclass(frozen=True)
class Run:
    """Seconds from call to answer, from call to return, and on the GPU between two CUDA events (else NaN)."""

    answer: Any
    latency: float
    enqueue: float
    device: float


def once(runner: Runner, picture: Tensor) -> Run:
    """One run, timed."""
    taken, marks = runner.take(picture), []
    if picture.is_cuda and runner.events:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
    start = time.perf_counter()
    answer = runner.call(taken)
    returned = time.perf_counter()
    if marks:
        marks[1].record()
    runner.wait(answer)
    latency = time.perf_counter() - start
    device = marks[0].elapsed_time(marks[1]) / 1e3 if marks else float("nan")
    return Run(answer, latency, returned - start, device)


def set_up(contender: Contender, subject: Subject, pictures: Sequence[Tensor], expected: Sequence[Tensor]) -> Entry:
    """Build a contender, run it on two or more pictures, and compare its logits with the expected ones.

    One that fails in any way is an entry that says how; one of ours may only say that this machine cannot run it, and
    has failed else.
    """
    entry, times, logits = Entry(contender, subject), [], []
    try:
        start = time.perf_counter()
        runner = contender.build(subject)
        entry.setup = time.perf_counter() - start
        for picture in pictures:
            done = once(runner, picture)
            times.append(done.latency)
            logits.append(runner.logits(done.answer).cpu().clone())
        once(runner, subject.in_turn[0])  # for which one that compiles may do so again, and fail
        error = relative(torch.cat(logits), torch.cat(list(expected)))
    except ParNetError as error:
        entry.missing = str(error)
    except Exception as error:
        entry.failed = contender.ours
        entry.missing = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    else:
        entry.runner, entry.error = runner, error
        entry.first_call, entry.second_call = times[:2]
    return entry


def let_threads_sleep() -> None:
    """Wait until no other thread of this process runs: thread pools spin after a run, on the cores of whoever runs
    next."""
    end = time.perf_counter() + LONGEST_PAUSE
    while _others_run() and time.perf_counter() < end:
        time.sleep(PAUSE)


def _others_run() -> bool:
    if sys.platform == "linux":
        threads = {int(name) for name in os.listdir("/proc/self/task")} - {threading.get_native_id()}
        return any(process_state(thread) == "R" for thread in threads)
    before = time.process_time()
    time.sleep(TICKS)
    return time.process_time() - before > TICKS / 4


def shares(seconds: Sequence[float], runs: int, least: int, budget: float) -> list[int]:
    """Timed runs for contenders that take so many seconds: `least` each, and up to `runs`, fastest first, while the
    whole stays within the budget."""
    counts = [min(least, runs)] * len(seconds)
    left = budget - sum(n * s for n, s in zip(counts, seconds, strict=True))
    for i in np.argsort(seconds, kind="stable"):
        more = int(np.clip(left / seconds[i], 0, runs - counts[i]))
        counts[i] += more
        left -= more * seconds[i]
    return counts


def spread(rounds: int) -> list[int]:
    """For each round its place among them, by which the first few are always spread over all: by its bits, reversed."""
    bits = max(1, (rounds - 1).bit_length())
    order = sorted(range(rounds), key=lambda r: f"{r:0{bits}b}"[::-1])
    return np.argsort(order).tolist()


def interleave(entries: Sequence[Entry], counts: Sequence[int], tick: Callable[[], object]) -> None:
    """Time each entry so many times, in turns, on its subject's pictures in turn. Every round has an order of its own,
    so that nobody always comes after the same one. Those with fewer runs than others are spread over the rounds, and
    run where all with more do, so that their times can be compared round by round. `tick` is called after every
    round."""
    rounds, draw = max(counts, default=0), np.random.default_rng()
    for r, turn in enumerate(spread(rounds)):
        for i in draw.permutation(len(entries)):
            entry = entries[i]
            if turn >= counts[i]:
                continue
            if entry.subject.device.type == "cpu":
                let_threads_sleep()
            done = entry.once(r)
            entry.rounds.append(r)
            entry.latency.append(done.latency)
            entry.enqueue.append(done.enqueue)
            entry.device.append(done.device)
        tick()
