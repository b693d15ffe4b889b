"""Everything about an operation that the compiler should know, so that it can divide, bound and vectorise."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from .convolution import Convolution
from .geometry import power_of_two

CHANNELS_AT_ONCE = 128  # rows of gate weights that a program holds at once: 64 registers a thread of 4 warps
SUMS_AT_ONCE = 8192  # channel sums, likewise
PIXELS_AT_ONCE = 2048  # pixels of each channel of a picture, likewise


class Constants(NamedTuple):
    """One operation's constants.

    H, W: input. WOUT: output width. PIXELS: P, output pixels. C: channels of one input; PART: a group's of them.
    CIN: a group's channels over all inputs. TILES: T, spatial tiles. PROGRAMS: for one picture. A_TILES, B_TILES: T of
    the inputs' sums. BC, A_BT, B_BT, BP: channels, tiles and picture pixels that the gate takes at once.
    """

    H: tl.constexpr
    W: tl.constexpr
    WOUT: tl.constexpr
    PIXELS: tl.constexpr
    C: tl.constexpr
    PART: tl.constexpr
    CIN: tl.constexpr
    COUT: tl.constexpr
    STRIDE: tl.constexpr
    GROUPS: tl.constexpr
    SHUFFLE: tl.constexpr
    INPUTS: tl.constexpr
    PLANAR: tl.constexpr
    GATE: tl.constexpr
    ACTIVATION: tl.constexpr
    PRECISION: tl.constexpr
    BM: tl.constexpr
    BN: tl.constexpr
    BK: tl.constexpr
    SPLIT_K: tl.constexpr
    TILES: tl.constexpr
    PROGRAMS: tl.constexpr
    A_TILES: tl.constexpr
    B_TILES: tl.constexpr
    BC: tl.constexpr
    A_BT: tl.constexpr
    B_BT: tl.constexpr
    BP: tl.constexpr


def constants(conv: Convolution) -> Constants:
    """The constants of a convolution whose tensors have been checked."""
    s, tile = conv.shape, conv.tile
    a_tiles, b_tiles = (0 if sums is None else sums.shape[1] for sums in (conv.x.a_sums, conv.x.b_sums))
    c = s.cin // s.inputs
    part = c // s.groups
    bc = min(CHANNELS_AT_ONCE, power_of_two(part))
    values = {
        "H": s.h, "W": s.w, "WOUT": s.wout, "PIXELS": s.pixels,
        "C": c, "PART": part, "CIN": s.cin // s.groups, "COUT": s.cout,
        "STRIDE": s.stride, "GROUPS": s.groups, "SHUFFLE": s.shuffle, "INPUTS": s.inputs, "PLANAR": s.planar,
        "GATE": s.gate, "ACTIVATION": s.activation, "PRECISION": conv.precision,
        "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "SPLIT_K": tile.split_k,
        "TILES": tile.spatial(s), "PROGRAMS": tile.programs(s), "A_TILES": a_tiles, "B_TILES": b_tiles,
        "BC": bc, "A_BT": _at_once(a_tiles, bc), "B_BT": _at_once(b_tiles, bc), "BP": PIXELS_AT_ONCE,
    }  # fmt: skip
    return Constants(**{name: tl.constexpr(value) for name, value in values.items()})


def _at_once(tiles: int, bc: int) -> int:
    return min(SUMS_AT_ONCE // bc, power_of_two(tiles))
