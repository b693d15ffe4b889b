"""Which algorithm of the CPU kernels computes a convolution."""

from __future__ import annotations

from torch import Tensor

from ..kernels.cpu import native
from ..program.program import INPUT, Operation

READ = 10  # products in the time that reading a weight takes: 58 thousand million against 24 GB a second, of a core
WORTH = 0.8  # share of a direct convolution's time that may be left, transforms aside
LARGEST = 1e30  # of weights for Winograd: sums of larger ones may leave fp32's range
# powers of 2 in what 8 bits' pixels are multiplied by
TWOS = {native.F2: 2, native.F4: 6, native.S2: 0, native.S4: 2}


def algorithm(op: Operation, w: dict[str, Tensor], kind: int, h: int, width: int) -> int:
    """How to compute a convolution to features of h x width pixels, in the kernels' numbers. kind: of its products.

    In the least time by products and weights to read, of which small features have the more, where that is worth its
    transforms. Larger tiles would lose too many of bf16's digits; of int8's, sums must not leave 32 bits for good.
    """
    library = native.library()
    cheap = {native.U8: library.has_dot_u8(), native.BF16: library.has_tiles()}.get(kind, 0)  # products
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
    time = {how: products(how, h, width) + READ * native.ALGORITHMS[how].weights for how in (native.DIRECT, *others)}
    best = min(time, key=time.__getitem__)
    return best if time[best] < WORTH * time[native.DIRECT] else native.DIRECT


def tiles(how: int, h: int, width: int) -> int:
    """That features of h x width pixels take; those at the edge may reach over it."""
    algorithm = native.ALGORITHMS[how]
    return algorithm.sides(h)[0] * algorithm.sides(width)[0]


def products(how: int, h: int, width: int) -> int:
    """For each channel of input and output, of features of h x width pixels."""
    algorithm = native.ALGORITHMS[how]
    return algorithm.sides(h)[1] * algorithm.sides(width)[1]
