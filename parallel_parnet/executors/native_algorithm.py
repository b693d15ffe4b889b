"""Which algorithm of the CPU kernels computes a convolution."""

from __future__ import annotations

from torch import Tensor

from ..kernels.cpu import native
from ..program.program import INPUT, Operation

READ = 5  # products in the time that reading a weight takes, where it is sent for beforehand
# by stride: products of fp32 in the time that a point of a channel takes to be transformed, on the way in or back; with
# stride 2 most points are inputs as they are
TRANSFORM = {1: 6.5, 2: 3}
WORTH = 0.9  # share of a direct convolution's time that may be left
LARGEST = 1e30  # of weights for Winograd: sums of larger ones may leave fp32's range
# powers of 2 in what 8 bits' pixels are multiplied by
TWOS = {native.F2: 2, native.F4: 6, native.S2: 0, native.S4: 2}


def algorithm(op: Operation, w: dict[str, Tensor], kind: int, h: int, width: int) -> int:
    """How to compute a convolution to features of h x width pixels, in the kernels' numbers. kind: of its products.

    In the least time by products, transforms and weights to read, of which small features have the more. Larger tiles
    would lose too many of bf16's digits; of int8's, sums must not leave 32 bits for good.
    """
    library = native.library()
    cheap = kind != native.F32 and library.has_tiles()
    words = op.cin // op.groups % (1 if kind == native.F32 else 2) == 0
    if cheap or INPUT in op.inputs or op.kernel != 3 or not words:
        return native.DIRECT
    others = [native.F2, native.F4] if op.stride == 1 else [native.S2, native.S4]
    if kind == native.U8:
        most = 255 * max(float((sign * w["weight"]).clamp(min=0).sum((1, 2, 3)).max()) for sign in (1, -1))
        others = [how for how in others if most < 2 ** (31 - TWOS[how])]
    elif float(w["weight"].abs().max()) >= LARGEST:
        others = []
    elif kind == native.BF16:
        others = others[:1]
    point = TRANSFORM[op.stride] * (1 if kind == native.F32 else 2)  # of 16 bits twice as many products
    around = 1 + point * (op.groups / op.cin + op.groups / op.cout)
    time = {how: around * products(how, h, width) + READ * native.ALGORITHMS[how].weights for how in others}
    directly: float = products(native.DIRECT, h, width) + READ * native.ALGORITHMS[native.DIRECT].weights
    if kind == native.U8 and library.has_dot_u8():
        directly /= 2  # an instruction makes twice as many, of half the bytes
    time[native.DIRECT] = WORTH * directly
    return min(time, key=time.__getitem__)


def tiles(how: int, h: int, width: int) -> int:
    """That features of h x width pixels take; those at the edge may reach over it."""
    algorithm = native.ALGORITHMS[how]
    return algorithm.sides(h)[0] * algorithm.sides(width)[0]


def products(how: int, h: int, width: int) -> int:
    """For each channel of input and output, of features of h x width pixels."""
    algorithm = native.ALGORITHMS[how]
    return algorithm.sides(h)[1] * algorithm.sides(width)[1]
