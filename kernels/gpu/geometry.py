"""The shape of a fused convolution, and how it is cut into tiles. Numbers only.

Shape letters: N pictures; H, W input height and width; P output pixels of one picture (rows x columns); C input
channels of one tensor; K = kernel^2 cin / groups; O output channels; T spatial tiles of one picture.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ParNetError

GATES = ("identity", "plain", "none")
ACTIVATIONS = ("silu", "relu", "none")
KERNELS = (1, 3, 7)
ALIGNED = 8  # channels: a feature's pixel fills a multiple of so many, so that copies are 16 bytes in half precision
COPY = 16  # bytes, of the widest copy
COLOURS = 4  # channels of a picture, at most
PICTURE_PART = 2048  # pixels of a picture, of each channel, that one program sums up
MOST_LEADERS = 128  # programs of a launch that make gates, so that the others start beside them and not after them
GATE_PART = 64  # channels of an input from which one program computes its part of the gates


@dataclass(frozen=True)
class Geometry:
    """A convolution with kernel x kernel taps and padding kernel // 2 of pictures of h x w pixels.

    cin: input channels over all `inputs` tensors, one or two of cin / inputs channels each.
    stride, groups, shuffle, gate, activation, kernel and residual as in `program.Operation`.
    planar: the input is the picture, [N, C, H, W], and comes without sums; any other input is [N, H, W, C].
    sums: whether the output comes with its channel sums, which gates and classifiers read.
    """

    h: int
    w: int
    cin: int
    cout: int
    stride: int = 1
    groups: int = 1
    shuffle: int = 1
    gate: str = "plain"
    activation: str = "silu"
    inputs: int = 1
    planar: bool = False
    kernel: int = 3
    residual: bool = False
    sums: bool = True

    def __post_init__(self) -> None:
        if min(self.h, self.w, self.cin, self.cout) < 1 or self.stride not in (1, 2) or self.groups < 1:
            raise ParNetError(f"{self}: sizes and groups must be positive, stride 1 or 2")
        if self.kernel not in KERNELS:
            raise ParNetError(f"kernel {self.kernel}: choose of {KERNELS}")
        if self.inputs not in (1, 2) or self.cin % (self.inputs * self.groups):
            raise ParNetError(f"cin {self.cin}: must divide into {self.inputs} inputs x {self.groups} groups")
        if self.shuffle < 1 or self.cout % (self.groups * self.shuffle):
            raise ParNetError(f"cout {self.cout}: must divide into {self.groups} groups x {self.shuffle} chunks")
        if self.gate not in GATES or self.activation not in ACTIVATIONS:
            raise ParNetError(f"gate {self.gate!r}, activation {self.activation!r}: choose of {GATES}, {ACTIVATIONS}")
        if self.gate != "none" and (self.kernel != 3 or self.residual or self.activation == "none"):
            raise ParNetError(f"gate {self.gate!r}: needs a 3x3 kernel, an activation and no residual")
        if self.residual and (self.planar or self.shuffle > 1):
            raise ParNetError("a residual needs an input that is no picture, and an output that is not shuffled")
        if self.gate == "identity" and (self.cin != self.cout or self.stride + self.groups + self.inputs > 3):
            raise ParNetError("gate 'identity': needs one input of cout channels, stride 1 and no groups")
        if self.planar and (self.inputs * self.groups > 1 or self.cin > COLOURS):
            raise ParNetError(f"a planar picture is the only input, without groups, of up to {COLOURS} channels")
        pixels = max(self.h * self.w * padded_channels(self.cin), self.pixels * padded_channels(self.cout))
        if max(pixels, self.taps * self.cin * self.cout) >= 2**30:
            raise ParNetError(f"{self}: one picture, or the weights, are too large for 32-bit offsets")

    @property
    def hout(self) -> int:
        return (self.h + self.stride - 1) // self.stride

    @property
    def wout(self) -> int:
        return (self.w + self.stride - 1) // self.stride

    @property
    def pixels(self) -> int:
        """P, the output pixels of a picture."""
        return self.hout * self.wout

    @property
    def taps(self) -> int:
        """Pixels that an output value's sum reads, of each channel."""
        return self.kernel**2

    @property
    def k(self) -> int:
        """K, the terms of each output value's sum."""
        return self.taps * self.cin // self.groups

    @property
    def part(self) -> int:
        """Channels of one input that one group reads."""
        return self.cin // self.inputs // self.groups


@dataclass(frozen=True)
class Tile:
    """What one program computes: `bm` pixels x `bn` output channels, in steps of `bk` of K, a `split_k`-th of K."""

    bm: int = 64
    bn: int = 64
    bk: int = 64
    split_k: int = 1

    def __post_init__(self) -> None:
        if any(b < 16 or b & (b - 1) for b in (self.bm, self.bn, self.bk)) or self.split_k < 1:
            raise ParNetError(f"{self}: bm, bn and bk must be powers of two from 16, split_k positive")

    def pitch(self, shape: Geometry) -> int:
        """Numbers of a row of output pixels, as tiles count them."""
        return shape.wout

    def spatial(self, shape: Geometry) -> int:
        """T: no tile crosses from one picture to the next, so that each channel sum belongs to one picture."""
        return -(-shape.pixels // self.bm)

    def channels(self, shape: Geometry) -> int:
        """Tiles over the output channels of all groups; none crosses from one group to the next."""
        return shape.groups * -(-(shape.cout // shape.groups) // self.bn)

    def programs(self, shape: Geometry) -> int:
        """Programs that convolve one picture."""
        return self.spatial(shape) * self.channels(shape) * self.split_k

    def parts(self, shape: Geometry) -> int:
        """Parts in which the gates of one picture are made, or, where the input is a picture, its sums."""
        if shape.planar:
            return -(-shape.h * shape.w // PICTURE_PART)
        return shape.inputs * -(-shape.part // GATE_PART)

    def units(self, shape: Geometry) -> int:
        """Units of gate work: each of those parts, for each channel tile; none without a gate."""
        if shape.gate == "none":
            return 0
        return self.parts(shape) * (1 if shape.planar else self.channels(shape))

    def steps(self, shape: Geometry) -> int:
        """Steps over all of K. A step is one tap of `bk` channels; of a picture, `bk` of all its taps and channels."""
        return -(-shape.k // self.bk) if shape.planar else shape.taps * shape.inputs * -(-shape.part // self.bk)


@dataclass(frozen=True)
class WarpTile:
    """What a cluster of a Hopper's blocks computes: `bm` pixels, 64 to a warpgroup, x `bn` channels. `split_k` blocks
    share K, and finish `bn` / `split_k` channels each.

    chunk: channels that a step multiplies, at most, for each of its `taps`. stages: steps whose weights may be on their
    way. All operations of a launch have the same bm.
    """

    bm: int
    bn: int
    chunk: int
    split_k: int
    stages: int
    taps: int = 1

    def __post_init__(self) -> None:
        if self.bm % 64 or self.bn % (8 * self.split_k) or self.chunk % 16 or self.split_k not in (1, 2, 4, 8):
            raise ParNetError(f"{self}: bm in steps of 64, chunk of 16, split_k 1, 2, 4 or 8, bn of 8 split_k")
        if not (8 <= self.bn <= 256 and 0 <= self.stages <= 15):
            raise ParNetError(f"{self}: bn from 8 to 256, stages at most 15")
        if self.taps not in (1, 3, 9):
            raise ParNetError(f"{self}: taps 1, 3 or 9")

    def pitch(self, shape: Geometry) -> int:
        """Numbers of a row of output pixels: one more than pixels, so that no tap steps into a row's other end."""
        return shape.wout + 1

    def rows(self, shape: Geometry) -> int:
        """Pixels of the input that a tile of outputs reads; with stride 2 in four planes."""
        return (self.bm if shape.stride == 1 else 4 * self.bm) + 2 * self.pitch(shape) + 2

    def spatial(self, shape: Geometry) -> int:
        """T: no tile crosses from one picture to the next."""
        return -(-(shape.hout * self.pitch(shape) - 1) // self.bm)

    def channels(self, shape: Geometry) -> int:
        """Tiles over the output channels of all groups; none crosses from one group to the next."""
        return shape.groups * -(-(shape.cout // shape.groups) // self.bn)

    def chunks(self, shape: Geometry) -> int:
        """Chunks of one input's channels."""
        return -(-shape.part // self.chunk)

    def kk(self, shape: Geometry) -> int:
        """A chunk's channels, in sixteens; chunks are as even as that allows."""
        sixteens = -(-shape.part // 16)
        return -(-sixteens // self.chunks(shape))

    def steps(self, shape: Geometry) -> int:
        """The steps of all blocks that share a tile, together."""
        return shape.taps * shape.inputs * self.chunks(shape) // self.taps

    def buffers(self, shape: Geometry) -> int:
        """Places for blocks of inputs."""
        return min(2, shape.inputs * self.chunks(shape))

    def work(self, shape: Geometry) -> int:
        """Multiplications of one block."""
        return shape.taps * shape.inputs * self.chunks(shape) * self.kk(shape) * 16 * self.bm * self.bn // self.split_k


def padded_channels(channels: int, itemsize: int = 2) -> int:
    """How many channels, of `itemsize` bytes each, a pixel has places for: the next multiple of 16 bytes, and of 8."""
    of_each = max(ALIGNED, COPY // itemsize)
    return -(-channels // of_each) * of_each


def power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()
