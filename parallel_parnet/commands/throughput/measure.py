"""One network at several batches: at each, contenders are set up, proven and timed in turns, as by the benchmark."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from parallel_parnet import ParNetError

from ..bench.measure import Settings, bars, set_up_all, time_all, worth_timing
from ..bench.proof import expected_logits, left_out, prove_golden
from ..bench.rows import TELLING, add_ratios, row_of
from ..bench.running import Entry
from ..bench.subject import Contender, Subject

LEAST, MOST = 5, 30  # timed runs of each contender at a batch
FIRST_S = 0.4  # of passes before it is decided who is near
NEAR = 1.25  # times the fastest peer's pass; slower ones are listed: the time goes to those that may be the best
FAR = f"over {NEAR} times the fastest peer's time"
# beside our executor: on CPUs the libraries from the file of launch/export.py, and torch
PEERS = {
    "cpu": ("OpenVINO, exported", "ONNX Runtime, exported", "ncnn, exported", "MNN, exported", "torch.compile, fused"),
    "cuda": ("TensorRT, fused", "ONNX Runtime, fused", "CUDA graph of eager, fused", "torch.compile, fused"),
}


def measure(
    subject: Subject, batches: Sequence[int], chosen: Sequence[Contender], budget: float,
    possible: Mapping[str, Mapping[str, float]], console: Console,
) -> list[dict]:  # fmt: skip
    """For each batch, the smallest first, its size, the rows of those that were timed, and why others were not.

    budget: seconds of all timed runs together; a batch gets of what is left as much as it has of the pictures that are
    left, and at least LEAST runs of each contender. Largest and smallest batch come first: who is far from the fastest
    peer at both is not set up for those in between, since compiling can take longer than all else.

    Raises ParNetError where our logits are not the reference's, or where nothing of ours runs.
    """
    prove_golden()
    (drawn,) = replace(subject, batch=max(batches)).pictures(1)
    with bars(console) as progress:
        progress.add_task("the reference's logits", total=None)
        (expected,) = expected_logits(subject, [drawn])
        found: dict[int, dict] = {}
        left, far = budget, []
        order = list(dict.fromkeys([max(batches), min(batches), *batches]))
        for i, batch in enumerate(order):
            skipped = far[0] & far[1] if i > 1 else set()
            own = [contender for contender in chosen if contender.name not in skipped]
            share = left * batch / sum(order[i:])
            entries = _race(replace(subject, batch=batch), own, share, drawn, expected, progress)
            far.append(
                {entry.name for entry in entries if entry.missing.startswith("too slow") or FAR in entry.missing}
            )
            left -= sum(sum(entry.latency) for entry in entries)
            found[batch] = _result(batch, entries, possible)
            reason = f"not set up: {FAR} at batch {' and '.join(map(str, order[:2]))}"
            found[batch]["missing"] |= dict.fromkeys(skipped, reason)
    return [found[batch] for batch in sorted(found)]


def _race(
    subject: Subject, chosen: Sequence[Contender], budget: float, drawn: Tensor, expected: Tensor, progress: Progress
) -> list[Entry]:
    """All contenders at one batch; those that were timed have times.

    Each gives the logits of the drawn pictures twice, in their order and backwards, so that pictures of a batch that
    were mixed up would show.
    """
    if "torch._dynamo" in sys.modules:  # which takes seconds to import, and is only where somebody compiled
        torch.compiler.reset()  # else it keeps what it compiled for other batches, and counts it against a limit
    n = subject.batch
    compared, wanted = ([tensor[:n], tensor.flip(0)[:n]] for tensor in (drawn, expected))
    entries = set_up_all(chosen, subject, compared, wanted, progress, f"batch {n}: ")
    running = worth_timing(entries)
    seconds = {entry.name: _seconds(entry) for entry in running}
    running = _near(running, seconds, budget)
    if not any(entry.contender.ours for entry in running):
        reasons = [entry.missing for entry in entries if entry.contender.ours]
        raise ParNetError(f"batch {n}: nothing of ours runs: {'; '.join(reasons) or 'none was chosen'}")
    runs = round(min(max(budget / sum(seconds[entry.name] for entry in running), LEAST), MOST))
    task = progress.add_task(f"batch {n}: timing", total=runs)
    time_all(running, Settings(runs, runs, warm_up=1), lambda: progress.advance(task))
    return entries


def _seconds(entry: Entry) -> float:
    """Of a pass, the shortest of as many as fit in FIRST_S: a single one of a millisecond would tell nothing."""
    times = [entry.second_call]
    while sum(times) < FIRST_S:
        times.append(entry.once(len(times)).latency)
    return min(times)


def _near(running: Sequence[Entry], seconds: Mapping[str, float], budget: float) -> list[Entry]:
    """Ours, the fastest peer, and as many more, the faster first, as are near it and leave all of them runs enough to
    tell something; of the others, their entries say how slow. seconds: of a pass, and the budget."""
    taken = [entry for entry in running if entry.contender.ours]
    peers = sorted((entry for entry in running if not entry.contender.ours), key=lambda entry: seconds[entry.name])
    for entry in peers:
        own, fastest = seconds[entry.name], seconds[peers[0].name]
        round_s = sum(seconds[other.name] for other in (*taken, entry))
        if own > NEAR * fastest:
            why = f"{FAR}, {1e3 * fastest:.1f}"
        elif entry is not peers[0] and round_s * TELLING > budget:
            why = f"the fastest peer's took {1e3 * fastest:.1f}, and the budget is not enough for both"
        else:
            taken.append(entry)
            continue
        entry.missing = f"not raced: {1e3 * own:.1f} ms a pass; {why}"
    return taken


def _result(batch: int, entries: Sequence[Entry], possible: Mapping[str, Mapping[str, float]]) -> dict:
    rows = [row_of(entry, possible, []) for entry in entries if entry.latency]
    add_ratios(rows, paired=True)
    return {"batch": batch, "rows": rows, **left_out(entries)}
