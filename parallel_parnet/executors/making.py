"""The backend of an executor, for some segments of a program."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ParNetError
from ..program.pixels import fold_pixels
from ..program.placement import Segment
from ..program.program import Program
from .available import METHODS
from .backends import broken_openvino
from .binding import Backend
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
    """devices: of each lane. threads: of each segment, on the CPU. raw: for pictures in uint8. ParNetError where what
    is installed cannot be loaded."""
    name = METHODS[executor].backend
    if name == "openvino" and (reason := broken_openvino()):
        raise ParNetError(f"{reason}: choose native")
    program = fold_pixels(program, dtype) if raw else program
    if name == "triton":
        from .triton_backend import TritonBackend  # here, since triton is only installed on Linux

        return TritonBackend(program, segments, devices, dtype, raw)
    return TorchBackend(name, program, segments, devices, dtype, threads)
