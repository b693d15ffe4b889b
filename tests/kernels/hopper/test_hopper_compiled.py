"""What NVIDIA's compilers, where at hand, make of the timed levels: products side by side, and nothing spilled."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from parallel_parnet import ParNetError
from parallel_parnet.commands.gpu.level_tuning import Level, levels_of, operands
from parallel_parnet.commands.gpu.precompile import shapes_of
from parallel_parnet.kernels.gpu.config import HOPPER, Table, bindings
from parallel_parnet.kernels.gpu.geometry import WarpTile
from parallel_parnet.kernels.gpu.samples import convolution, geometry, without_values
from parallel_parnet.kernels.hopper.offline import at_hand, resources
from parallel_parnet.kernels.hopper.plan import TAPS, candidates
from parallel_parnet.kernels.hopper.source import Source, source

needs_nvcc = pytest.mark.skipif(not at_hand(), reason="needs nvcc")
DTYPES = (torch.float16, torch.bfloat16)
TABLE = Table.load(HOPPER, "NVIDIA H200", warpgroups=True)


def a_level(*variants: str) -> Level:
    """Any that is timed, of one of these networks, in half precision."""
    levels = levels_of(shapes_of(random.choice(variants)), 1, random.choice(DTYPES))
    return random.choice([level for level in levels if level.key in TABLE.warpgroups])


def source_of(wanted: Level, tiles: Sequence[WarpTile]) -> Source:
    return source([without_values(conv) for conv in operands(wanted, tiles, 0, "cpu")])


@needs_nvcc
@pytest.mark.parametrize("variant", ["parnet_s", "parnet_m", "parnet_l", "parnet_xl"])
def test_a_timed_level(variant):
    wanted = a_level(variant)
    used = resources(source_of(wanted, TABLE.of_warpgroups(wanted.shapes, 1, wanted.dtype)))
    assert not used.complaints(HOPPER) and not used.spilled, (wanted.key, wanted.dtype)
    assert used.counts["HGMMA"] >= len(wanted.shapes)


@pytest.mark.skipif(not bindings(), reason="needs cuda-bindings and NVRTC")
def test_the_compiler_at_run_time_takes_it():
    """Which is stricter than nvcc about functions that say not where they run."""
    from parallel_parnet.kernels.hopper.launch import compiled

    wanted = a_level("parnet_s", "parnet_xl")
    text = source_of(wanted, TABLE.of_warpgroups(wanted.shapes, 1, wanted.dtype)).text
    assert compiled(text).startswith(b"\x7fELF")
    with pytest.raises(ParNetError, match=r"does not compile: .*undefined"):
        compiled(text.replace("constexpr int BARRIERS", "constexpr int OTHERS"))


@needs_nvcc
def test_steps_of_several_taps():
    """The most promising, for any level: nothing spilled."""
    taps, wanted = random.choice(TAPS), a_level("parnet_s", "parnet_m")
    tiles = next(tiles for _, tiles in candidates(wanted.shapes, 1) if tiles[0].taps == taps)
    used = resources(source_of(wanted, tiles))
    assert not used.complaints(HOPPER) and not used.spilled, (wanted.key, taps)


@needs_nvcc
def test_products_one_after_the_other_are_seen():
    """Sums that somebody looks at between two products."""
    made = source([convolution(geometry("plain", 9, 9, 32), WarpTile(64, 32, 32, 1, 2), 1, DTYPES[0], 0)])
    looked_at = made.text.replace("products_end();", "products_end(); if (sums[0] > 1e30f) sums[1] = 0;")
    assert looked_at != made.text
    assert "multiplies one product after the other" in resources(made._replace(text=looked_at)).complaints(HOPPER)
