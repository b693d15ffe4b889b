"""Which executor: on a CPU with how many threads, on a GPU on one lane or on CUDA streams; before, a default."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from .executors.answers import Answer
from .executors.available import ON_GPUS
from .program.placement import Placement
from .program.program import Program

LEAST_ROUNDS, MOST_ROUNDS, ENOUGH = 5, 100, 0.3  # seconds of measuring, once there were LEAST_ROUNDS
FIRST_ROUNDS, HOPELESS = 3, 1.5  # after so many, what was never within this factor of the fastest is left out


@dataclass(frozen=True)
class Choice:
    """An executor, a placement in one process, and the compute threads of each of its lanes, where they are chosen."""

    executor: str
    placement: Placement
    threads: int | None
    name: str

    def __str__(self) -> str:
        of_threads = f" of {self.threads} thread(s)" if self.threads else ""
        return f"{self.executor}, {self.name}, {self.placement.lanes} lane(s){of_threads}"


Forward = Callable[[Tensor], Answer]  # a forward pass: pictures to their answer
Make = Callable[[Choice, torch.dtype | None], Forward]  # with the type of the engine that chooses, or another


def default_placement(program: Program, executor: str, ranks: int) -> Placement:
    """Return the placement of an engine that was given none: a lane per rank, or per CUDA stream; else one lane."""
    lanes = program.streams if executor == "cuda_streams" else ranks
    if lanes == 1:
        return Placement.single(program)
    return Placement.by_streams(program, lanes)


def on_one_lane(program: Program, cores: int, executors: Sequence[str]) -> list[Choice]:
    """List each executor on one lane, with a thread per core, and with one thread."""
    single = Placement.single(program)
    return [Choice(e, single, threads, "whole") for e in executors for threads in dict.fromkeys((cores, 1))]


def on_gpus(program: Program, placement: Placement | None) -> list[Choice]:
    """List the executors of GPUs, under a placement that was given, or else on one lane and, where there are several
    streams, with a CUDA stream for each."""
    if placement is not None:
        return [Choice(e, placement, None, "as placed") for e in (*ON_GPUS, "eager")]
    single = Placement.single(program)
    choices = [Choice(e, single, None, "whole") for e in ("cuda_graph", "triton", "eager")]
    if program.streams > 1:
        streams = Placement.by_streams(program, program.streams)
        choices += (Choice(e, streams, None, "by stream") for e in ("cuda_graph", "cuda_streams"))
    return choices


def timed(choices: Sequence[Choice], make: Make, x_nchw: Tensor) -> list[tuple[float, Choice, Forward]]:
    """Time the choices: median seconds of each, the choice, and what runs it, the fastest first."""
    runs = [make(choice, None) for choice in choices]
    for run in runs:
        run(x_nchw)
    seconds = measure([partial(run, x_nchw) for run in runs])
    return sorted(zip(seconds, choices, runs, strict=True), key=lambda row: row[0])


def measure(runs: Sequence[Callable[[], object]], enough: float = ENOUGH) -> list[float]:
    """Measure the median seconds of each; they take turns, so that what else the machine does meets all of them.

    Every round has an order of its own: threads that spin after a run slow down whoever comes next. enough: seconds of
    measuring. What is far slower than the fastest after some rounds is not run again.
    """
    if not runs:
        return []
    times: list[list[float]] = [[] for _ in runs]
    racing, began = list(range(len(runs))), time.perf_counter()
    order = random.Random()  # the caller's own sequence stays where it is
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > enough:
            break
        for i in order.sample(racing, len(racing)):
            start = time.perf_counter()
            runs[i]()
            times[i].append(time.perf_counter() - start)
        if done + 1 == FIRST_ROUNDS:
            best = min(map(min, times))
            racing = [i for i in racing if min(times[i]) <= HOPELESS * best]
    return [median(row) for row in times]
