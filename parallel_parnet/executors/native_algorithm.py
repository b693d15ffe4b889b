"""Which algorithm of the CPU kernels computes a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.cpu import native
from ..program.program import INPUT, Operation

# products of fp32 in the time that reading a weight takes, where it is sent for beforehand: on CPUs that have tiles, of
# which one was measured, whose third cache is slow, and on others
READ_BESIDE_TILES, READ = 20, 5
# by stride: products of fp32 in the time that a point of a channel takes to be transformed, on the way in or back; with
# stride 2 most points are inputs as they are
TRANSFORM = {1: 6.5, 2: 3}
WORTH = 0.9  # share of a direct convolution's time that an algorithm of Winograd's may take, to be chosen
MOST_WEIGHT = 1e30  # for Winograd's algorithms, which add up weights: sums of larger ones may leave fp32's range
# of the factor by which they multiply pixels of 8 bits, the power of 2; what else it has is divided out modulo 2^32
TWOS = {native.F2: 2, native.F4: 6, native.S2: 0, native.S4: 2}


def algorithm_of(op: Operation, w: dict[str, Tensor], dtype: torch.dtype, h: int, width: int) -> int:
    """Return the fastest of `native.ALGORITHMS` for a convolution that makes features of h x width pixels.

    dtype: of the features that it reads. The time is that of its products, its transforms, and of reading its weights,
    which weighs most where features are small. bf16 has too few digits for F4 and S4. For uint8 all are exact
    (intermediate sums may wrap modulo 2^32; the final pixel, times a power of 2, must fit).
    """
    library = native.library()
    cheap = dtype != torch.float32 and library.has_tiles()
    words = op.cin // op.groups % (1 if dtype == torch.float32 else 2) == 0
    if cheap or INPUT in op.inputs or op.kernel != 3 or not words:
        return native.DIRECT
    others = [native.F2, native.F4] if op.stride == 1 else [native.S2, native.S4]
    if dtype == torch.uint8:
        most = 255 * max(float((sign * w["weight"]).clamp(min=0).sum((1, 2, 3)).max()) for sign in (1, -1))
        others = [algorithm for algorithm in others if most < 2 ** (31 - TWOS[algorithm])]
    elif float(w["weight"].abs().max()) >= MOST_WEIGHT:
        others = []
    elif dtype == torch.bfloat16:
        others = others[:1]
    point = TRANSFORM[op.stride] * (1 if dtype == torch.float32 else 2)  # of 16 bits twice as many products
    around = 1 + point * (op.groups / op.cin + op.groups / op.cout)
    read = READ_BESIDE_TILES if library.has_tiles() else READ
    time = {each: around * products(each, h, width) + read * native.ALGORITHMS[each].weights for each in others}
    directly: float = products(native.DIRECT, h, width) + read * native.ALGORITHMS[native.DIRECT].weights
    if dtype == torch.uint8 and library.has_dot_u8():
        directly /= 2  # an instruction makes twice as many, of half the bytes
    time[native.DIRECT] = WORTH * directly
    return min(time, key=time.__getitem__)


def tiles(algorithm: int, h: int, width: int) -> int:
    """Return how many tiles cover a feature of h x width pixels; those at the edge may reach over it."""
    along = native.ALGORITHMS[algorithm]
    return along.sides(h)[0] * along.sides(width)[0]


def products(algorithm: int, h: int, width: int) -> int:
    """Return how many products an algorithm takes for a feature of h x width pixels, for each pair of an input and an
    output channel."""
    along = native.ALGORITHMS[algorithm]
    return along.sides(h)[1] * along.sides(width)[1]
