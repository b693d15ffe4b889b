"""Which pictures fit a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ParNetError
from ..settings import is_wrapped

if TYPE_CHECKING:
    from .program import Program


def picture_side(program: Program, size: int | None = None) -> int:
    """Return `size` pixels, or the network's own where None. ParNetError where such pictures do not fit the program."""
    side = program.config.image_size if size is None else size
    check_size(program, side, side)
    return side


def check_batch(batch: int, itemsize: int) -> None:
    """Raise ParNetError for less than one picture, or less than a byte a value."""
    if batch < 1 or itemsize < 1:
        raise ParNetError(f"batch {batch} of {itemsize}-byte values: both must be at least 1")


def check_size(program: Program, h: int, w: int) -> None:
    """Raise ParNetError where pictures of h x w pixels do not fit the program."""
    m = program.size_multiple
    if h < m or w < m or h % m or w % m:
        raise ParNetError(f"picture size {h} x {w}: height and width must be positive multiples of {m}")


def check_input(program: Program, x: Tensor) -> None:
    """Raise ParNetError where `x` is no batch of pictures that fit, floating point or uint8 [N, 3, H, W]."""
    if isinstance(x, Tensor) and x.is_nested:  # and has no shape to ask for
        raise ParNetError("a nested tensor: give pictures of one size at a time, [N, 3, H, W]")
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3 or x.shape[0] < 1:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ParNetError(f"input {got}: expected a tensor [N, 3, H, W] with N of 1 or more")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.uint8) or x.layout != torch.strided:
        raise ParNetError(
            f"input of type {x.dtype}, {x.layout}: expected float32, bfloat16 or float16, normalised, or uint8; dense"
        )
    if x.is_neg():  # kernels read memory as it is
        raise ParNetError("input that torch is to negate when it is read: give its resolve_neg()")
    if is_wrapped(x):  # computed apart from its transforms, derivatives would be zeros
        raise ParNetError("input that torch.func has wrapped, whose transforms no engine passes on: leave them out")
    check_size(program, *x.shape[2:])


def kind_of(x: Tensor) -> tuple[object, ...]:
    """Return what `check_input` depends on, but for a lazy negation."""
    return x.shape, x.dtype, x.layout, x.is_meta, is_wrapped(x)
