"""Latencies of a group of networks, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from parallel_parnet import Engine, Program

from .points import Point

WARM_UP = 3
FEWEST, MOST = 7, 60  # rounds


@dataclass(frozen=True)
class Subject:
    """A network ready to run: `once` runs it on its input."""

    point: Point
    once: Callable[[], object]
    program: Program

    @classmethod
    def prepare(
        cls, point: Point, executor: str, device: torch.device, dtype: torch.dtype, threads: int | None = None
    ) -> Subject:
        """Build the network and compile it, outside of any timing. threads: fewer than there are."""
        torch.manual_seed(0)
        program = point.build()
        x = torch.randn(point.batch, 3, point.size, point.size, device=device)
        engine = Engine(program, device=device, dtype=dtype, executor=executor, threads=threads)
        subject = cls(point, lambda: engine(x), program)
        for _ in range(WARM_UP):
            subject.timed(device)
        return subject

    def timed(self, device: torch.device) -> float:
        """Milliseconds of one run: from call to answer, on a GPU between two CUDA events."""
        if device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            self.once()
            marks[1].record()
            torch.cuda.synchronize(device)
            return marks[0].elapsed_time(marks[1])
        start = time.perf_counter()
        self.once()
        return (time.perf_counter() - start) * 1e3


def interleaved(subjects: Sequence[Subject], device: torch.device, seconds: float) -> list[list[float]]:
    """Milliseconds of many runs of each, in rounds A B C A B C, so that a slow spell of the machine hits all alike."""
    first = [s.timed(device) for s in subjects]
    rounds = int(np.clip(seconds * 1e3 / sum(first), FEWEST, MOST))
    times: list[list[float]] = [[] for _ in subjects]
    for _ in range(rounds):
        for subject, own in zip(subjects, times, strict=True):
            own.append(subject.timed(device))
    return times


def operation_seconds(program: Program, point: Point, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Each operation's median seconds in eager mode, one after another: what a simulation of lanes starts from."""
    engine = Engine(program, device=device, dtype=dtype, executor="eager")
    x = torch.randn(point.batch, 3, point.size, point.size, device=device)
    engine(x)
    passes = [engine.profile(x)[0].totals(str) for _ in range(FEWEST)]
    return {name: statistics.median(run[name] for run in passes) for name in passes[0]}
