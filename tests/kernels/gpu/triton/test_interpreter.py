"""Kernels against their twins, in Triton's interpreter: every kind of operation at awkward sizes."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from triton.runtime.errors import InterpreterError

from cases import ALL, SEED
from parallel_parnet import ParNetError
from parallel_parnet.kernels.gpu import level as level_module
from parallel_parnet.kernels.gpu import twins
from parallel_parnet.kernels.gpu.classifier import Averaged, classifier
from parallel_parnet.kernels.gpu.convolution import E4M3, Convolution
from parallel_parnet.kernels.gpu.geometry import ALIGNED, Geometry, Tile
from parallel_parnet.kernels.gpu.interpreter import run_order
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.samples import GATED, convolution, geometry, in_fp32

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((1, 1), (7, 5))
CHANNELS = (3, 20, 92, 200)
BATCHES = (1, 2, 5)
TILES = (Tile(64, 128, 64), Tile(16, 64, 256, split_k=2))
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place

CASES = list(itertools.product(SIZES, CHANNELS, BATCHES, TILES))


def cases() -> list[tuple]:
    """Every kind and type with every awkward size, or with two of them."""
    draw = random.Random(SEED)
    kinds = itertools.product(GATED, DTYPES)
    return [(*kind, *case) for kind in kinds for case in (CASES if ALL else draw.sample(CASES, 2))]


def assert_matches_twin(conv: Convolution) -> None:
    """y within its one rounding of the exact answer, and sums those of y, and nothing left unwritten."""
    exact = in_fp32(conv)
    twins.fused_conv(exact)
    channels = conv.shape.cout
    y, reference = conv.x.y.float(), exact.x.y[..., :channels]
    assert not y[..., channels:].any(), "the places behind the last channel are not zero"
    y = y[..., :channels]
    assert conv.x.arrived is None or conv.x.arrived.eq(0).all(), "not set back"
    slack = 1e-5 * reference.abs().max() + 1e-7  # the order of additions
    rounding, least = (2.0**-4, 2.0**-10) if conv.x.y.dtype == E4M3 else (ROUNDING[conv.x.y.dtype], 0.0)
    allowed = 1.01 * rounding * reference.abs() + least + slack
    assert not y.isnan().any(), "an output was not written"
    assert ((y - reference).abs() <= allowed).all(), f"off by {(y - reference).abs().max():.2e}"
    if conv.x.sums is None:
        return
    assert not conv.x.sums[..., channels:].any(), "the sums behind the last channel are not zero"
    y = y if conv.x.step is None else y * conv.x.step
    p = conv.shape.pixels
    tiles = [y.flatten(1, 2)[:, i : min(i + conv.tile.bm, p)] for i in range(0, p, conv.tile.bm)]
    sums = torch.stack([tile.double().sum(1) for tile in tiles], 1)
    magnitude = torch.stack([tile.double().abs().sum(1) for tile in tiles], 1)
    off = (conv.x.sums[..., :channels] - sums).abs()
    assert (off <= 1e-6 * magnitude + 1e-9).all(), "the sums are not those of the output"


@pytest.mark.parametrize(("kind", "dtype", "size", "channels", "n", "tile"), cases(), ids=str)
def test_operation(kind, dtype, size, channels, n, tile, seed):
    shape = geometry(kind, *size, channels, activation=random.Random(seed).choice(["silu", "relu"]))
    conv = convolution(shape, tile, n, dtype, seed, border=None if kind != "grouped" else True)
    level([conv])()
    assert_matches_twin(conv)


@pytest.mark.parametrize("kind", GATED)
def test_several_tiles_of_pixels_and_channels(kind, seed):
    conv = convolution(geometry(kind, 9, 5, 36), Tile(16, 16, 64, split_k=2), 2, torch.float16, seed)
    level([conv])()
    assert_matches_twin(conv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_picture_in_uint8(dtype, seed):
    """Raw values, and a border on every side, as `pixels.fold_pixels` makes it."""
    conv = convolution(geometry("picture", 7, 5, 20), Tile(16, 32, 32), 2, dtype, seed, border=True)
    pixels = torch.randint(0, 256, conv.x.a.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    weight, gate_weight = conv.x.weight / 255, conv.x.gate_weight / 255
    conv = Convolution(conv.x._replace(a=pixels, weight=weight, gate_weight=gate_weight), conv.shape, conv.tile)
    level([conv])()
    assert_matches_twin(conv)


@pytest.mark.parametrize("dtype", DTYPES if ALL else DTYPES[1:2], ids=str)
def test_level_of_five_operations(dtype, seed):
    """Different shapes and splits side by side; the same bits whatever the order of programs."""
    operations = [
        convolution(geometry("identity", 7, 5, 20), Tile(16, 32, 32), 2, dtype, seed),
        convolution(geometry("identity", 4, 3, 40), Tile(16, 32, 32, split_k=3), 2, dtype, seed + 1),
        convolution(geometry("fusion_down", 8, 6, 24), Tile(16, 32, 32, split_k=2), 2, dtype, seed + 2),
        convolution(geometry("down", 9, 9, 12), Tile(16, 32, 32), 2, dtype, seed + 3),
        convolution(geometry("plain", 3, 3, 8), Tile(16, 32, 32, split_k=5), 2, dtype, seed + 4),
    ]
    launch = level(operations)
    launch()
    for conv in operations:
        assert_matches_twin(conv)
    first = [(conv.x.y.clone(), conv.x.sums.clone()) for conv in operations]
    for order in range(2):
        for conv in operations:
            conv.x.y.fill_(float("nan"))
            conv.x.sums.fill_(float("nan"))
            conv.x.gate.fill_(float("nan"))
            conv.x.products.fill_(float("nan"))
            if conv.x.workspace is not None:
                conv.x.workspace.fill_(float("nan"))
        with run_order(seed + order):
            launch()
        for conv, (y, sums) in zip(operations, first, strict=True):
            assert torch.equal(conv.x.y, y) and torch.equal(conv.x.sums, sums)


def test_more_gate_work_than_leaders(seed, monkeypatch):
    """A few programs make all gates, in turns; the others wait for them, in whatever order they run."""
    monkeypatch.setattr(level_module, "MOST_LEADERS", 3)
    operations = [convolution(geometry(kind, 5, 3, 92), Tile(16, 16, 64), 2, torch.float16, seed) for kind in
                  ("fusion", "identity")]  # fmt: skip
    for order in range(3):
        with run_order(seed + order):
            level(operations)()
        for conv in operations:
            assert_matches_twin(conv)


@pytest.mark.parametrize(
    "shape", [geometry("plain", 3, 3, 20), Geometry(1, 2100, 3, 8, stride=2, planar=True)], ids=["feature", "picture"]
)
def test_counts_of_launches_wrap_around(shape, seed):
    """After 2^31 launches, and where flags count a picture's two parts, 2^30: at ten thousand a second, a day."""
    conv = convolution(shape, Tile(64, 16, 32), 2, torch.float16, seed)
    parts = conv.tile.parts(shape) if shape.planar else 1
    launches = 2**31 // parts - 1
    conv.x.flags.fill_(launches * parts)
    conv.x.passes.fill_(launches)
    launch = level([conv])
    for order in range(3):
        conv.x.gate.fill_(float("nan"))
        conv.x.products.fill_(float("nan"))
        with run_order(seed + order):
            launch()
        assert_matches_twin(conv)


def test_operations_of_a_level_share_their_tile(seed):
    operations = [convolution(geometry("plain", 3, 3, 8), Tile(16, bn, 16), 1, torch.float16, seed) for bn in (16, 32)]
    with pytest.raises(ParNetError, match="must share tile"):
        level(operations)


def test_a_wait_for_a_program_that_has_not_run_is_seen(seed, monkeypatch):
    """The interpreter runs leaders first; a kernel that needs another order would never end on a GPU."""
    conv = convolution(geometry("plain", 3, 3, 8), Tile(16, 16, 16), 1, torch.float16, seed)
    launch = level([conv])
    tensors, numbers, leaders, _, *rest = launch.arguments
    lost = dataclasses.replace(launch, arguments=(tensors, numbers, leaders, 0, *rest))
    with pytest.raises(InterpreterError, match="deadlock"):
        lost()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "tiles", "channels", "classes"), [(1, 1, 3, 1), (2, 5, 92, 10), (5, 3, 200, 37), (1, 2, 1280, 9)]
)
def test_classifier(n, tiles, channels, classes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    sums = F.pad(torch.randn(n, tiles, channels, generator=generator), (0, -channels % ALIGNED))
    weight = torch.randn(classes, channels, generator=generator).to(dtype)
    bias = torch.randn(classes, generator=generator)
    logits, expected = torch.empty(n, classes), torch.empty(n, classes)
    classifier([Averaged(sums, channels, 49)], weight, bias, logits)()
    twins.classifier(sums, 49, weight, bias, expected)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


def test_a_classifier_of_several_features(seed):
    """Of different widths, sizes and tiles; each has its own columns of the weights."""
    generator = torch.Generator().manual_seed(seed)
    given = [
        (torch.randn(2, t, c, generator=generator), pixels) for t, c, pixels in ((3, 20, 49), (1, 8, 4), (70, 92, 9))
    ]
    padded = [Averaged(F.pad(sums, (0, -sums.shape[2] % ALIGNED)), sums.shape[2], pixels) for sums, pixels in given]
    weight, bias = torch.randn(11, 120, generator=generator), torch.randn(11, generator=generator)
    logits = torch.full((2, 11), float("nan"))
    classifier(padded, weight, bias, logits)()
    averages = torch.cat([sums.double().sum(1) / pixels for sums, pixels in given], 1)
    torch.testing.assert_close(
        logits.double(), F.linear(averages, weight.double(), bias.double()), atol=1e-5, rtol=1e-5
    )
