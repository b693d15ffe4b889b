"""The text of a level's kernel: what the compiler is to know of its operations, then level.cu."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ParNetError
from ..gpu.convolution import Convolution
from ..gpu.geometry import WarpTile, padded_channels
from . import plan

FOLDER = Path(__file__).parent


class Numbers(NamedTuple):
    """The numbers of an operation, as level.cu reads them.

    first, blocks: its first block in the launch, and how many it has. all: its tiles, over all pictures. h, w: input.
    hout, wout, stride. pitch: numbers of a row of output pixels. rows: of a block of inputs. c_padded: places for
    the channels of one input. part, part_padded: channels of one input that a group reads, and places for them. kk: 16
    channels each, of a chunk. chunks: of one input. inputs, groups. columns: channel tiles of a group. tiles: T,
    spatial tiles. split: blocks that share a tile. bn. buffers, stages: places for blocks of inputs, and of weights.
    cout, cout_padded: output channels, and places for them. group, rest: of a group, and of one of its chunks that the
    shuffle moves. taps: of a step. a_tiles, b_tiles: T of the inputs' sums. identity, bordered, silu, summed: 0 or 1.
    """

    first: int
    blocks: int
    all: int
    h: int
    w: int
    hout: int
    wout: int
    stride: int
    pitch: int
    rows: int
    c_padded: int
    part: int
    part_padded: int
    kk: int
    chunks: int
    inputs: int
    groups: int
    columns: int
    tiles: int
    split: int
    bn: int
    buffers: int
    stages: int
    cout: int
    cout_padded: int
    group: int
    rest: int
    taps: int
    a_tiles: int
    b_tiles: int
    identity: int
    bordered: int
    silu: int
    summed: int


class Source(NamedTuple):
    """text: of a kernel named "level". blocks: of a launch, `cluster` of which make a cluster. threads: of a block.
    shared: bytes of a block's shared memory, `room` of which are for what gates or sums are made from."""

    text: str
    blocks: int
    cluster: int
    threads: int
    shared: int
    room: int


OPERANDS = (
    "const u16 *a, *b; const float *a_sums, *b_sums; const u16* weight; const float *bias, *border; "
    "const u16* gate_weight; const float *gate_bias, *scale, *shift; u16* y; float* sums;"
)
POINTERS = tuple(re.findall(r"(\w+)[,;]", OPERANDS))
AHEAD = 4  # pieces of memory that a launch may send for
ENTRY = """
extern "C" __global__ void __launch_bounds__(THREADS, 1) level(const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(1024) char shared[];
    dispatch<0>(arguments, blockIdx.x, shared);
}
"""


def source(convolutions: Sequence[Convolution]) -> Source:
    """The source of the kernel that computes convolutions, in program order; it takes their operands in that order."""
    made, cluster = numbers(convolutions), clusters(convolutions)
    shapes, tiles = [conv.shape for conv in convolutions], [tile_of(conv) for conv in convolutions]
    if len({tile.bm for tile in tiles}) > 1:
        raise ParNetError("a launch for warpgroups has tiles of one bm")
    dtype = convolutions[0].dtype
    room = max(plan.room(shape, tiles[0].bm) for shape in shapes)
    shared = max(plan.shared(shape, tile, room) for shape, tile in zip(shapes, tiles, strict=True))
    text = "\n".join(
        [
            constants(made, cluster, tiles[0].bm, room, dtype),
            (FOLDER / "hopper.cuh").read_text(),
            products({s.bn for s in made}, dtype),
            (FOLDER / "level.cu").read_text() + ENTRY,
        ]
    )
    return Source(text, sum(s.blocks for s in made), cluster, plan.threads(tiles[0].bm), shared, room)


def arguments(convolutions: Sequence[Convolution], ahead: Sequence[Tensor], blocks: int) -> list[int]:
    """The kernel's `Arguments`, as words of 64 bits: addresses, and what is sent for ahead, of which each of so many
    blocks has its share, in whole pieces of 16 bytes."""
    tensors = [getattr(conv.x, pointer) for conv in convolutions for pointer in POINTERS]
    words = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    for tensor in ahead[:AHEAD]:
        size = tensor.nbytes // 16
        words += [tensor.data_ptr(), 16 * size | 16 * -(-size // blocks) << 32]
    return words + [0, 0] * (AHEAD - len(ahead[:AHEAD]))


def clusters(convolutions: Sequence[Convolution]) -> int:
    """Blocks of a cluster: of all operations of a launch the same."""
    return max(conv.tile.split_k for conv in convolutions)


def tile_of(conv: Convolution) -> WarpTile:
    """How it is cut; ParNetError where that is not for warpgroups, or the kernel does not compute such an operation."""
    if not isinstance(conv.tile, WarpTile) or not plan.takes(conv.shape):
        raise ParNetError(f"{conv.shape} in {conv.tile}: not for warpgroups")
    if conv.tile.steps(conv.shape) < conv.tile.split_k:
        raise ParNetError(f"{conv.shape} in {conv.tile}: fewer steps than blocks that share them")
    return conv.tile


def numbers(convolutions: Sequence[Convolution]) -> list[Numbers]:
    """The numbers of a level's operations, in program order. Those that take longest start first."""
    cluster, made = clusters(convolutions), {}
    first = 0
    for conv in sorted(convolutions, key=lambda conv: -tile_of(conv).work(conv.shape)):
        s, tile = conv.shape, tile_of(conv)
        every = conv.n * tile.spatial(s) * tile.channels(s)
        blocks = -(-every // (cluster // tile.split_k)) * cluster
        group = s.cout // s.groups
        a_tiles, b_tiles = (0 if sums is None else sums.shape[1] for sums in (conv.x.a_sums, conv.x.b_sums))
        made[id(conv)] = Numbers(
            first=first, blocks=blocks, all=every, h=s.h, w=s.w, hout=s.hout, wout=s.wout, stride=s.stride,
            pitch=tile.pitch(s), rows=tile.rows(s), c_padded=padded_channels(s.cin // s.inputs), part=s.part,
            part_padded=padded_channels(s.part), kk=tile.kk(s), chunks=tile.chunks(s), inputs=s.inputs, groups=s.groups,
            columns=tile.channels(s) // s.groups, tiles=tile.spatial(s), split=tile.split_k, bn=tile.bn,
            buffers=tile.buffers(s), stages=tile.stages, cout=s.cout, cout_padded=padded_channels(s.cout), group=group,
            rest=group // s.shuffle if s.groups > 1 else padded_channels(group), taps=tile.taps, a_tiles=a_tiles,
            b_tiles=b_tiles, identity=int(s.gate == "identity"), bordered=int(conv.x.border is not None),
            silu=int(s.activation == "silu"), summed=int(s.sums),
        )  # fmt: skip
        first += blocks
    return [made[id(conv)] for conv in convolutions]


def constants(made: Sequence[Numbers], cluster: int, bm: int, room: int, dtype: torch.dtype) -> str:
    """Everything before hopper.cuh."""
    half = "#define IN_HALF\n" if dtype == torch.float16 else ""
    rows = ",\n    ".join("{" + ", ".join(map(str, s)) + "}" for s in made)
    return f"""{half}typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
constexpr int COUNT = {len(made)}, WGS = {bm // 64}, CLUSTER = {cluster}, ROOM = {room};
constexpr int BARRIERS = {plan.BARRIERS}, GATERS = {plan.GATERS};
struct Numbers {{ int {", ".join(Numbers._fields)}; }};
struct Operands {{ {OPERANDS} }};
struct Ahead {{ const char* from; u32 bytes, share; }};
struct Arguments {{ Operands of[COUNT]; Ahead ahead[{AHEAD}]; }};
__device__ constexpr Numbers NUMBERS[COUNT] = {{
    {rows}
}};
"""


def products(widths: set[int], dtype: torch.dtype) -> str:
    """`multiply<N>`: sums [64, N] of a warpgroup += a [64, 16] b [16, N], where both lie in shared memory in columns of
    eight channels, as the lower halves of their descriptors say; without `keep` the sums are made anew."""
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    text = "template <int N> DEVICE void multiply(float (&sums)[N / 2], u32 a, u32 b, bool keep);\n"
    for n in sorted(widths):
        of_sums = ", ".join(f"%{i}" for i in range(n // 2))
        outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(n // 2))
        a, b, keep = (f"%{n // 2 + i}" for i in range(3))
        text += f"""template <> DEVICE void multiply<{n}>(float (&sums)[{n // 2}], u32 a, u32 b, bool keep) {{
    asm volatile("{{\\n.reg .pred p;\\n.reg .b32 rows_apart;\\n.reg .b64 a, b;\\nsetp.ne.b32 p, {keep}, 0;\\n"
        "mov.b32 rows_apart, {128 >> 4};\\nmov.b64 a, {{{a}, rows_apart}};\\nmov.b64 b, {{{b}, rows_apart}};\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{of_sums}}}, a, b, p, 1, 1, 0, 0;\\n}}"
        : {outputs} : "r"(a), "r"(b), "r"((int)keep));
}}
"""
    return text
