"""What an executor's name stands for: its backend, for some segments of a program, and all of it in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..profiling.spans import Recorder
from ..program.pixels import fold_pixels
from ..program.placement import Placement, Segment
from ..program.program import Program
from .answers import Answer
from .available import METHODS, facts
from .binding import Backend
from .graph import GraphExecutor
from .local import LocalExecutor
from .torch_backend import TorchBackend
from .whole import WholeExecutor


class Executor(Protocol):
    """Runs a program under a placement; one call at a time."""

    def __call__(self, x_nchw: Tensor) -> Answer:
        """Return logits [N, classes], or outputs by name, fp32, for pictures [N, 3, H, W]."""

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, operation by operation, and return a recorder of spans for each lane."""


def make_backend(
    executor: str,
    program: Program,
    segments: Sequence[Segment],
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    threads: int | None = None,
    raw: bool = False,
) -> Backend:
    """Make the backend of an executor for some segments of a program.

    devices: of each lane. threads: of each segment, for native and OpenVINO. raw: for pictures in uint8.
    """
    name = METHODS[executor].backend
    program = fold_pixels(program, dtype) if raw else program
    if name == "triton":
        from .triton_backend import TritonBackend  # here, since triton is only installed on Linux

        return TritonBackend(program, segments, devices, dtype, raw)
    return TorchBackend(name, program, segments, devices, dtype, threads)


def make_executor(
    executor: str,
    program: Program,
    placement: Placement,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    threads: int | None = None,
    raw: bool = False,
) -> Executor:
    """Make the executor that runs all lanes of a placement in this process; arguments as for `make_backend`."""
    backend = make_backend(executor, program, placement.segments(program), devices, dtype, threads, raw)
    kind = WholeExecutor if facts(executor).only_on == "cpu" and placement.lanes == 1 else LocalExecutor
    local = kind(placement, devices, backend)
    return GraphExecutor(executor, local) if METHODS[executor].captured else local
