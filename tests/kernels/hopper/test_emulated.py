"""A level's kernel for Hoppers, run on a CPU by the definitions of what it asks of one, against the twins."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import emulated
from cases import drawn
from guarded import guard, touches_a_guard
from parallel_parnet.commands.gpu.level_tuning import Level, levels_of, operands
from parallel_parnet.commands.gpu.parity import deviation, poison
from parallel_parnet.commands.gpu.precompile import shapes_of
from parallel_parnet.kernels.gpu.config import HOPPER, Table
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.gpu.geometry import WarpTile
from parallel_parnet.kernels.gpu.samples import GATED, convolution, geometry
from parallel_parnet.kernels.hopper.plan import takes
from parallel_parnet.kernels.hopper.source import FOLDER

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
KINDS = [kind for kind in GATED if kind not in ("picture", "grouped")]  # of which the kernel takes none
HALVES = (torch.float16, torch.bfloat16)
TILES = (
    WarpTile(64, 48, 32, 2, 2), WarpTile(64, 32, 96, 2, 3, taps=3), WarpTile(128, 104, 48, 1, 2),
    WarpTile(64, 64, 16, 8, 5), WarpTile(64, 32, 16, 2, 2, taps=9),
)  # fmt: skip
SIZES = ((1, 1), (7, 5), (13, 11))
TABLE = Table.load(HOPPER, "NVIDIA H200", warpgroups=True)


def sample(kind: str, tile: WarpTile, seed: int, size=(9, 7), channels: int = 40, n: int = 1, **options) -> Convolution:
    activation = random.Random(seed).choice(["silu", "relu"])
    shape = geometry(kind, *size, channels, activation)
    conv = convolution(shape, tile, n, options.pop("dtype", torch.bfloat16), seed, **options)
    poison(conv)
    return conv


def assert_right(convolutions: list[Convolution]) -> None:
    for conv in convolutions:
        assert deviation(conv) <= 1
        assert not conv.x.y[..., conv.shape.cout :].any(), "the places behind the last channel are not zero"
        assert not conv.x.sums[..., conv.shape.cout :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, seed, tmp_path):
    draw = random.Random(seed)
    tile, size, dtype = draw.choice(TILES), draw.choice(SIZES), draw.choice(HALVES)
    channels = draw.choice((32, 96) if "fusion" in kind else (20, 40, 92))
    conv = sample(
        kind, tile, seed, size, channels, n=draw.choice((1, 2)), dtype=dtype, border=draw.choice((True, None))
    )
    assert takes(conv.shape)
    emulated.level([conv], tmp_path)
    assert_right([conv])


def mixed(seed: int) -> list[Convolution]:
    """A cluster of four holds one tile, two or four of these, and has blocks left over."""
    return [
        sample("identity", WarpTile(64, 40, 16, 1, 2), seed),
        sample("fusion_down", WarpTile(64, 32, 32, 4, 3), seed + 1, (10, 12), 64, border=True),
        sample("down", WarpTile(64, 32, 32, 2, 2), seed + 2, (13, 9), 44, n=1),
    ]


def test_a_level_of_three_operations_and_the_same_bits_alone(seed, tmp_path):
    together, alone = mixed(seed), mixed(seed)
    emulated.level(together, tmp_path)
    assert_right(together)
    for conv, same in zip(alone, together, strict=True):
        emulated.level([conv], tmp_path)
        assert torch.equal(conv.x.y, same.x.y) and torch.equal(conv.x.sums, same.x.sums)


def test_what_is_sent_for_ahead(seed, tmp_path):
    """Of every piece as much as blocks have tiles, in sixteens, nothing twice and nothing beyond."""
    sizes = [16, 16 * 5, 16 * 1001, 16 * random.Random(seed).randrange(1, 5000), 16 * 7]
    pieces = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    found = emulated.level(mixed(seed), tmp_path, ahead=pieces)
    for piece in pieces[: emulated.AHEAD]:
        start, end = piece.data_ptr(), piece.data_ptr() + piece.nbytes
        of_it = sorted(each for each in found if start <= each[0] < end)
        assert all(at + size <= then for (at, size), (then, _) in pairwise([*of_it, (end, 0)]))
        assert all(size > 0 and size % 16 == 0 for _, size in of_it)
        assert sum(size for _, size in of_it) > 0.7 * piece.nbytes or piece.nbytes < 100
        found = [each for each in found if each not in of_it]
    assert not found and not emulated.level(mixed(seed), tmp_path)


def test_a_timed_level_touches_nothing_beyond_its_operands(tmp_path):
    """Any of ParNet-S, whole, with the tiles that it has."""
    wanted = random.choice([level for level in levels_of(shapes_of("parnet_s"), 1, torch.bfloat16) if timed(level)])
    made = [guard(conv, random.choice((True, False))) for conv in operands(wanted, timed(wanted), 0, "cpu")]
    for conv in made:
        poison(conv)
    assert not touches_a_guard(lambda: emulated.level(made, tmp_path))
    assert max(map(deviation, made)) <= 1


def test_what_touches_more_is_noticed(seed, tmp_path):
    conv = guard(sample("identity", TILES[0], seed, (9, 7)), at_its_end=True)
    assert touches_a_guard(lambda: emulated.level([conv], tmp_path, lambda text: text.replace("y < s.h &&", "")))
    assert not touches_a_guard(lambda: emulated.level([conv], tmp_path))


def timed(level: Level) -> tuple[WarpTile, ...] | None:
    return TABLE.of_warpgroups(level.shapes, 1, level.dtype)


class Bug(NamedTuple):
    """In level.cu: what stands there, what a mistake would put there, and a kind of operation that shows it."""

    name: str
    right: str
    wrong: str
    kind: str = "identity"


BUGS = (
    Bug("a pixel to the left", "p0 - s.pitch - 1 + row", "p0 - s.pitch + row"),
    Bug("a row's end read as the next row's beginning", "y < s.h && x < s.w ?", "y < s.h ?"),
    Bug("every plane of stride 2 with the first one's rows", "odd_row = row < two", "odd_row = 1", "down"),
    Bug("weights of the first splits", "(long long)i_o * steps + begin", "(long long)i_o * steps"),
    Bug("one block of inputs for all chunks", "s.buffers == 2 && next == inputs", "false"),
    Bug("another slice of the channels", "split * P::slice + at) * 4", "at) * 4"),
    Bug("sums of the cluster's first tile", "read_of(sums, leader + k)", "read_of(sums, k)"),
    Bug("half of a plain gate", "1 : 2 * gate", "1 : gate", "plain"),
    Bug("averages of the first input alone", "(second ? o.b_sums : o.a_sums)", "(o.a_sums)", "fusion"),
    Bug("the border's taps outside left in", "v[e] -= o.border", "v[e] -= 0 * o.border", "fusion"),
    Bug("sums of what was not rounded", "            unpack(v, rounded);\n", ""),
    Bug("channels that are not shuffled", "(channel / s.rest * s.groups + group) * s.rest + channel % s.rest",
        "group * s.group + channel", "fusion_down"),
)  # fmt: skip


RACES = (
    Bug("inputs sent for before they are written", "launch_before_done();\n            multiply", "multiply"),
    Bug("sums read before they are written", "launch_before_done();\n            if (THREAD", "if (THREAD"),
    Bug("weights sent for before their place is free", "if (i >= s.stages) barrier_wait(", "if (0) barrier_wait("),
    Bug("places for weights that nobody gives back", "if (THREAD % 32 == 0) barrier_arrive(", "if (0) barrier_arrive("),
    Bug("weights given back while products read them", "products_done<1>();", ""),
    Bug("weights read before they came", "barrier_wait(full + 8 * stage, parity);", ""),
    Bug("inputs read before they came", "copies_done();", ""),
    Bug("inputs read before other threads' came", "copies_done();\n            sync_some<1, CONSUMERS>", "copies_done"),
    Bug("inputs sent for while others multiply what lay there",
        "sync_some<1, CONSUMERS>();\n            fetch_inputs", "fetch_inputs", "fusion"),
    Bug("sums written over inputs that are still multiplied", "products_done<0>();", ""),
    Bug("sums written over inputs that others multiply",
        "launch_after_may_start();\n            sync_some<1, CONSUMERS>", "launch_after_may_start"),
    Bug("the cluster's sums read before they are there",
        "if (CLUSTER > 1) sync_cluster();\n    if (here) finish", "if (here) finish"),
    Bug("blocks that leave while others read their sums", "if (CLUSTER > 1) cluster_is_read();", ""),
    Bug("blocks without a tile that hold the next launch back", "if (!here) launch_after_may_start();", ""),
)  # fmt: skip


def wrong(bug: Bug, seed: int, folder: Path) -> bool:
    """Whether a level with it has other answers, or none: three tiles of pixels, two tiles to a cluster, of which one
    has no second, three chunks."""

    tile, channels = WarpTile(64, 16, 16, 2, 2), 96 if "fusion" in bug.kind else 40
    tile = replace(tile, taps=random.Random(seed).choice((1, 3)))
    beside = sample("identity", replace(tile, bn=32, split_k=4), seed + 1, (5, 5), 32)
    conv = sample(bug.kind, tile, seed, (13, 9), channels, border=True)
    try:
        emulated.level([conv, beside], folder, lambda text: text.replace(bug.right, bug.wrong))
    except emulated.WaitedInVainError:
        return True
    return max(deviation(conv), deviation(beside)) > 1


def test_each_bug_has_its_place():
    """Once in level.cu; also those that another run plants."""
    text = (FOLDER / "level.cu").read_text()
    assert [bug.name for bug in (*BUGS, *RACES) if text.count(bug.right) != 1] == []


@pytest.mark.parametrize("bug", drawn(BUGS, 1 / 2), ids=lambda bug: bug.name)
def test_planted_bugs_are_caught(bug, seed, tmp_path):
    assert wrong(bug, seed, tmp_path)


@pytest.mark.parametrize("bug", drawn(RACES, 1 / 2), ids=lambda bug: bug.name)
def test_threads_that_do_not_wait_are_caught(bug, seed, tmp_path):
    """Whoever is first: in nearly every run, and in one of sixteen for certain."""
    assert any(wrong(bug, seed + 2 * i, tmp_path) for i in range(16))
