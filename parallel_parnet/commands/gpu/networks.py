"""Networks that a GPU check runs: lively random weights, their reference on the device, and their kernels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from parallel_parnet import Engine, Placement, Program, fold
from parallel_parnet.executors.triton_backend import TritonSegment, whole
from parallel_parnet.kernels.gpu.config import Table

from ..common import fit_norms
from .scope import model


@lru_cache(maxsize=1)
def network(name: str, device: torch.device) -> tuple[Program, Engine]:
    """The program and its reference on the device; of the last name alone, for the sake of memory."""
    program = fold(fit_norms(model(name)))
    return program, Engine(program, Placement.single(program), device, executor="reference")


def picture(program: Program, device: torch.device, n: int = 1) -> Tensor:
    """Noise, at the network's own size."""
    side = program.config.image_size
    return torch.randn(n, 3, side, side, device=device)


def planned(
    program: Program, dtype: torch.dtype, device: torch.device, n: int = 1, table: Table | None = None
) -> TritonSegment:
    """All of a program as launches, at its own picture size."""
    side = program.config.image_size
    return whole(program, (n, side, side), dtype, device, table)


def run(plan: TritonSegment, x: Tensor) -> Tensor:
    """Logits of a whole program, from a picture that must be copied to its place."""
    plan.reads[0].copy_(x)
    return plan(plan.reads)[0]
