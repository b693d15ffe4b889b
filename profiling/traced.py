"""Record a few requests as they really run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .device import kernels_into
from .ranges import CAPTURED, Ranges
from .spans import REQUEST, Recorder, Spans, span

PASSES = 5


def traced(
    request: Callable[[Spans], object], device: torch.device, synchronise: Callable[[], None], ranges: Ranges | None
) -> Recorder:
    """Record one lane's spans of `PASSES` requests; the device is waited for at the end of each, and not in between.

    A profiler that listens from outside is told which requests to capture, and torch's, which would need the same
    hardware counters, stays off.
    """
    recorder = Recorder(synchronise, each=False)
    spans = ranges.around(recorder) if ranges else recorder
    with _captured(device, ranges) if ranges else kernels_into(recorder, device):
        for _ in range(PASSES):
            with spans.span(REQUEST):
                request(spans)
    return recorder


@contextmanager
def _captured(device: torch.device, ranges: Ranges) -> Iterator[None]:
    """The capture range of Nsight Systems, by NVTX and by cudaProfilerApi."""
    with span(ranges, CAPTURED):
        if device.type == "cuda":
            torch.cuda.profiler.start()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()
