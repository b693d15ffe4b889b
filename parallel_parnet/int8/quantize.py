"""Quantisation after training: a program in int8 or fp8, from pictures like those that it will see."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from ..errors import ParNetError
from ..program.contract import E4M3
from ..program.program import Program
from ..settings import with_own_settings
from .e4m3 import in_fp8, reach
from .kernels import in_int8, input_features, quantisable_operations
from .ranges import Range, best
from .samples import SEED, sample


@with_own_settings
def quantize(
    program: Program,
    pictures: Iterable[Tensor] | Tensor,
    keep: Collection[str] = (),
    to: torch.dtype = torch.int8,
) -> Program:
    """Make a program in int8 (int8 kernels, uint8 features) or, to torch.float8_e4m3fn, in fp8 (kernels and features).
    `Operation` says what the numbers mean, and what stays in fp32.

    pictures: some hundred like those that it will see, as `Engine` takes them: normalised [N, 3, H, W], one tensor or
    several, which are read once. keep: names of operations that stay in fp32, beside the one that reads the picture and
    the classifier. A feature's range in uint8 is the one of least squared error over ends that clip it, on a random
    sample of its values (`ranges.best`), in fp8 several times what each channel reaches (`e4m3.in_fp8`); a weight's
    is its output channel's largest (`kernels.in_int8`).

    Raises ParNetError for no program, for another type, where there is no picture, for pictures or features with
    non-finite values (NaN or inf), for names that are no operation's, and for a program that is quantised already, or
    has nothing left to quantise.
    """
    if not isinstance(program, Program):
        raise ParNetError(f"quantize takes a program, such as fold(model), and this is a {type(program).__name__}")
    if to == E4M3:
        return in_fp8(program, reach(program, pictures, keep), keep)
    if to != torch.int8:
        raise ParNetError(f"to {to}: choose torch.int8 or torch.float8_e4m3fn")
    return in_int8(program, calibrate(program, pictures, keep), keep)


@with_own_settings
def calibrate(
    program: Program, pictures: Iterable[Tensor] | Tensor, keep: Collection[str] = (), seed: int = SEED
) -> dict[str, Range]:
    """Find the ranges of the features that int8 operations read, by name. Arguments and errors as of `quantize`."""
    found = sample(program, input_features(quantisable_operations(program, keep)), pictures, seed)
    return {name: best(taken.values, taken.low, taken.high) for name, taken in found.items()}
