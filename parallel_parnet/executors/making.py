"""The backend of an executor, for some segments of a program."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ParNetError
from ..program.pixels import fold_pixels
from ..program.placement import Segment
from ..program.program import Program
from .available import METHODS
from .binding import Answering, Backend
from .torch_backend import TorchBackend


def make_backend(
    executor: str,
    program: Program,
    segments: Sequence[Segment],
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    threads: int | None = None,
    raw: bool = False,
) -> Backend:
    """devices: of each lane. threads: of each segment, on the CPU. raw: for pictures in uint8.

    ParNetError where the program has outputs that this executor cannot give.
    """
    name = METHODS[executor].backend
    backend = _backend(name, program, segments, devices, dtype, threads, raw)
    if program.outputs and not isinstance(backend, Answering):
        raise ParNetError(f"executor {executor} gives logits alone, not {', '.join(program.outputs)}: choose eager")
    return backend


def _backend(
    name: str,
    program: Program,
    segments: Sequence[Segment],
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    threads: int | None,
    raw: bool,
) -> Backend:
    program = fold_pixels(program, dtype) if raw else program
    if name == "triton":
        from .triton_backend import TritonBackend  # here, since triton is only installed on Linux

        return TritonBackend(program, segments, devices, dtype, raw)
    return TorchBackend(name, program, segments, devices, dtype, threads)
