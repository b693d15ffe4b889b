"""Latencies of a group of networks, measured side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from parallel_parnet import Engine, Program

from ..bench.running import let_threads_sleep
from ..plan.measured import timed
from .points import Point

WARM_UP = 3
FEWEST, MOST = 7, 60  # rounds


class Subject(NamedTuple):
    """A network ready to run: `once` runs it on its input."""

    point: Point
    once: Callable[[], object]
    program: Program


def prepare(
    point: Point, executor: str, device: torch.device, dtype: torch.dtype, threads: int | None = None
) -> Subject:
    """Build a network and compile it, outside of any timing. threads: fewer than there are."""
    torch.manual_seed(0)
    program = point.build()
    x = torch.randn(point.batch, 3, point.size, point.size, device=device)
    engine = Engine(program, device=device, dtype=dtype, executor=executor, threads=threads)
    subject = Subject(point, partial(engine, x), program)
    for _ in range(WARM_UP):
        timed(subject.once, device)
    return subject


def interleaved(subjects: Sequence[Subject], device: torch.device, seconds: float) -> list[list[float]]:
    """Milliseconds of many runs of each, in rounds, so that a slow spell of the machine hits all alike, of which each
    has an order of its own. Before each there is a run that is not timed, when the threads of the last one sleep: its
    own are awake then."""
    first = [timed(subject.once, device) for subject in subjects]
    rounds = int(np.clip(seconds / (2 * sum(first)), FEWEST, MOST))
    times: list[list[float]] = [[] for _ in subjects]
    draw = np.random.default_rng()
    for _ in range(rounds):
        for i in draw.permutation(len(subjects)):
            if device.type == "cpu":
                let_threads_sleep()
            subjects[i].once()
            times[i].append(timed(subjects[i].once, device) * 1e3)
    return times


def operation_seconds(program: Program, point: Point, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Each operation's median seconds in eager mode, one after another: what a simulation of lanes starts from."""
    engine = Engine(program, device=device, dtype=dtype, executor="eager")
    x = torch.randn(point.batch, 3, point.size, point.size, device=device)
    engine(x)
    passes = [engine.profile(x)[0].totals(str) for _ in range(FEWEST)]
    return {name: statistics.median(run[name] for run in passes) for name in passes[0]}
