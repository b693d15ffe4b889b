"""What a GPU ran meanwhile, as torch.profiler tells it, on the clock of the lane's own spans."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from .spans import Recorder, Span

ANCHOR = "parallel_parnet anchor"
ANCHORS = 5  # the first costs milliseconds; the shortest counts


@contextmanager
def kernels_into(recorder: Recorder, device: torch.device) -> Iterator[None]:
    """Add the kernels and copies that the GPU runs meanwhile, a row for each CUDA stream. On the CPU, add nothing.

    A profiler that fails costs its spans and one line of warning, never the request.
    """
    if device.type != "cuda":
        yield
        return
    profiler = None
    try:
        started = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        started.start()
        profiler = started
    except Exception as error:  # whatever CUPTI and kineto raise: another profiler at work, no permission, no library
        _warn(error)
    anchors = drop_anchors()
    try:
        yield
    finally:
        try:
            recorder.spans += _ended(profiler, anchors, device) if profiler else []
        except Exception as error:
            _warn(error)


def _ended(profiler: profile, anchors: Sequence[float], device: torch.device) -> list[Span]:
    try:
        torch.cuda.synchronize(device)
    finally:
        profiler.stop()  # whatever failed: one that still records when the process ends crashes it
    return device_spans(profiler.events(), anchors)


def drop_anchors() -> list[float]:
    """Make events that the profiler will know, and return the times on this lane's clock at which they lay."""
    times = []
    for _ in range(ANCHORS):
        with record_function(ANCHOR):
            times.append(time.perf_counter())
    return times


def device_spans(
    events: Sequence[FunctionEvent], anchors: Sequence[float], where: DeviceType = DeviceType.CUDA
) -> list[Span]:
    """Make spans of a device's events, on the lane's clock, which the anchors tie to the profiler's."""
    known = [e for e in events if e.name == ANCHOR and e.device_type == DeviceType.CPU]
    _, zero = min(
        (e.time_range.elapsed_us(), at - (e.time_range.start + e.time_range.end) / 2 * 1e-6)
        for e, at in zip(known, anchors, strict=True)
    )
    return [
        Span(
            e.name, zero + e.time_range.start * 1e-6, zero + e.time_range.end * 1e-6,
            f"CUDA stream {e.device_resource_id} of GPU {e.device_index}",
        )
        for e in events if e.device_type == where and e.name != ANCHOR
    ]  # fmt: skip


def _warn(error: Exception) -> None:
    warnings.warn(
        f"no GPU kernels in the trace: {(str(error) or type(error).__name__).splitlines()[0]}",
        RuntimeWarning,
        stacklevel=3,
    )
