"""One network against every contender: set up, prove, time, and report as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from parallel_parnet import ParNetError
from parallel_parnet.profiling.sampler import Sampler

from .machine import clock_mhz
from .ours import ours
from .overhead import host_overhead
from .peer_int8 import int8_peers
from .peer_libraries import library_peers
from .peer_mnn import mnn_peer
from .peer_ncnn import ncnn_peer
from .peer_torch import torch_peers
from .peer_xnnpack import xnnpack_int8_peer, xnnpack_peers
from .proof import agrees, expected_logits, left_out, prove_golden, prove_ours
from .rows import Result, add_ratios, row_of
from .running import Entry, interleave, set_up, shares
from .subject import Contender, Subject

COMPARED = 2  # pictures whose logits are compared
COMPARED_IN_INT8 = 32  # whose errors differ more: of one picture of the demo by a factor of four
TOO_SLOW, SLOW_S = 10.0, 1.0  # times the fastest's pass, and seconds: above both, listed and not timed further


@dataclass(frozen=True)
class Settings:
    """runs: timed ones; least: of contenders for whom `budget`, the seconds of all timed runs together, allows no
    more. warm_up: runs before them."""

    runs: int = 50
    least: int = 7
    warm_up: int = 3
    budget: float = float("inf")


def contenders(only: Sequence[str] = (), dtype: torch.dtype = torch.float32) -> list[Contender]:
    """All of them for this type, or those that one of these texts names or, where it names none, is part of."""
    in_floats = [*torch_peers(), *library_peers(), ncnn_peer(), mnn_peer(), *xnnpack_peers()]
    in_int8 = [*int8_peers(), xnnpack_int8_peer()]
    found = [*ours(dtype), *(in_int8 if dtype == torch.int8 else in_floats)]
    names = [c.name for c in found]
    chosen = set() if only else set(names)
    for text in only:
        fit = [text] if text in names else [name for name in names if text in name]
        if not fit:
            raise ParNetError(f"--only {text!r}: choose one of, or a part of: {'; '.join(names)}")
        chosen.update(fit)
    return [c for c in found if c.name in chosen]


def measure(
    subject: Subject, header: dict, chosen: Sequence[Contender], settings: Settings, console: Console
) -> Result:
    """The result as it is written to a file. Raises ParNetError where parity fails."""
    prove_golden()
    compared = subject.pictures(COMPARED_IN_INT8 if subject.dtype == torch.int8 else COMPARED)
    expected = expected_logits(subject, compared)
    with bars(console) as progress:
        entries = set_up_all(chosen, subject, compared, expected, progress)
        running = worth_timing(entries)
        task = progress.add_task("timing", total=settings.runs)
        with Sampler() as sampler:
            clocks = time_all(running, settings, lambda: progress.advance(task))
    sampler.tell(console.print)
    passes = sum(len(entry.latency) + settings.warm_up for entry in running)
    rows = [row_of(entry, header["possible"], clocks) for entry in running]
    for entry, row in zip(running, rows, strict=True):
        if entry.contender.ours:
            overhead = host_overhead(entry.runner.call, entry.runner.wait, subject.in_turn, settings.least)
            row["overhead_us"] = None if overhead is None else round(overhead * 1e6, 2)
    add_ratios(rows, paired=True)
    return {
        "header": {**header, "clock_mhz": [min(clocks), max(clocks)] if clocks else None},
        "rows": rows,
        "sampled": sampler.summary(passes * subject.batch),  # over all contenders, which take turns
        **left_out(entries),
    }


def bars(console: Console) -> Progress:
    """A line for each task, while it lasts."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True)


def set_up_all(
    chosen: Sequence[Contender], subject: Subject, pictures: Sequence[Tensor], expected: Sequence[Tensor],
    progress: Progress, title: str = "",
) -> list[Entry]:  # fmt: skip
    """Each contender as `set_up` gives it. ParNetError where one of ours gives other logits than the reference."""
    entries, task = [], progress.add_task("", total=len(chosen))
    for contender in chosen:
        progress.update(task, description=f"{title}set up {contender.name}")
        entries.append(set_up(contender, subject, pictures, expected))
        progress.advance(task)
    prove_ours(entries)
    return entries


def worth_timing(entries: Sequence[Entry]) -> list[Entry]:
    """Those that run, agree, and are not too slow; of a slow one, its entry says how slow."""
    running = [entry for entry in entries if agrees(entry)]
    fastest = min((entry.second_call for entry in running), default=0.0)
    for entry in running:
        if entry.second_call > max(TOO_SLOW * fastest, SLOW_S):
            entry.missing = f"too slow here: {entry.second_call:.2f} s a pass, over {TOO_SLOW:.0f} x the fastest"
    return [entry for entry in running if not entry.missing]


def time_all(entries: Sequence[Entry], settings: Settings, tick: Callable[[], object]) -> list[float]:
    """Warm up, share the budget, take turns; the clocks in MHz as read after every round, where they can be."""
    warm = [min(entry.once(i).latency for i in range(settings.warm_up)) for entry in entries]
    counts = shares(warm, settings.runs, settings.least, settings.budget)
    device = entries[0].subject.device if entries else torch.device("cpu")
    clocks = []

    def after_round() -> None:
        tick()
        if (clock := clock_mhz(device)) is not None:
            clocks.append(clock)

    interleave(entries, counts, after_round)
    return clocks
