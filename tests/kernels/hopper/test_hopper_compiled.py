"""What NVIDIA's compiler makes of the timed levels, where it is at hand: products side by side, and nothing spilled."""

from __future__ import annotations

import random

import pytest
import torch

from parallel_parnet.commands.gpu.level_tuning import levels_of, operands
from parallel_parnet.commands.gpu.precompile import shapes_of
from parallel_parnet.kernels.gpu.config import HOPPER, Table
from parallel_parnet.kernels.gpu.geometry import WarpTile
from parallel_parnet.kernels.gpu.samples import convolution, geometry, without_values
from parallel_parnet.kernels.hopper.offline import at_hand, resources
from parallel_parnet.kernels.hopper.plan import TAPS, candidates
from parallel_parnet.kernels.hopper.source import source

pytestmark = pytest.mark.skipif(not at_hand(), reason="needs nvcc")
DTYPES = (torch.float16, torch.bfloat16)
TABLE = Table.load(HOPPER, "NVIDIA H200").with_warpgroups(HOPPER, "NVIDIA H200")


@pytest.mark.parametrize("variant", ["parnet_s", "parnet_m", "parnet_l", "parnet_xl"])
def test_a_timed_level(variant):
    dtype = random.choice(DTYPES)
    known = [level for level in levels_of(shapes_of(variant), 1, dtype) if level.key in TABLE.warpgroups]
    wanted = random.choice(known)
    tiles = TABLE.of_warpgroups(wanted.shapes, 1, dtype)
    used = resources(source([without_values(conv) for conv in operands(wanted, tiles, 0, "cpu")]))
    assert not used.complaints(HOPPER) and not used.spilled, (wanted.key, dtype)
    assert used.counts["HGMMA"] >= len(wanted.shapes)


def test_steps_of_several_taps():
    """The most promising, for any level: nothing spilled."""
    taps, variant = random.choice(TAPS), random.choice(("parnet_s", "parnet_m"))
    levels = [level for level in levels_of(shapes_of(variant), 1, DTYPES[0]) if level.key in TABLE.warpgroups]
    wanted = random.choice(levels)
    tiles = next(tiles for _, tiles in candidates(wanted.shapes, 1) if tiles[0].taps == taps)
    used = resources(source([without_values(conv) for conv in operands(wanted, tiles, 0, "cpu")]))
    assert not used.complaints(HOPPER) and not used.spilled, (wanted.key, taps)


def test_products_one_after_the_other_are_seen():
    """Sums that somebody looks at between two products."""
    made = source([convolution(geometry("plain", 9, 9, 32), WarpTile(64, 32, 32, 1, 2), 1, DTYPES[0], 0)])
    looked_at = made.text.replace("products_end();", "products_end(); if (sums[0] > 1e30f) sums[1] = 0;")
    assert looked_at != made.text
    assert "multiplies one product after the other" in resources(made._replace(text=looked_at)).complaints(HOPPER)
