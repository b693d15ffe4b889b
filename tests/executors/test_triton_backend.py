"""Launches of a forward pass, counted from the prepared launches themselves. Nothing is compiled or run."""

from __future__ import annotations

import pytest
import torch

from parallel_parnet import VARIANTS, ParNet, Placement
from parallel_parnet.network.variants import Config
from parallel_parnet.program.fold import fold
from parallel_parnet.program.program import Program

pytest.importorskip("triton")

from parallel_parnet.executors.triton_backend import TritonBackend, whole
from parallel_parnet.kernels.gpu.config import Table

META = torch.device("meta")
TABLE = Table.load((9, 0))
FOUR_STREAMS = Config((8, 16, 32, 64, 96), blocks=(4, 5, 5, 5), num_classes=10)
CONFIGS = {**VARIANTS, "four streams": FOUR_STREAMS}


def program_of(config: Config) -> Program:
    """Without values: only shapes matter here."""
    with torch.device("meta"):
        return fold(ParNet(config).eval())


@pytest.mark.parametrize("name", CONFIGS)
def test_one_launch_per_level(name):
    program = program_of(CONFIGS[name])
    side = max(CONFIGS[name].image_size, program.size_multiple)
    launches = whole(program, (1, side, side), torch.float16, META, TABLE).launches
    assert len(launches) == program.launches == program.depth
    assert [len(group) for group in program.launch_groups[:-1]] == [
        len(launch.arguments[0]) for launch in launches[:-1]
    ]
    if name in ("parnet_s", "parnet_m", "parnet_l", "parnet_xl"):
        assert program.launches == 12


@pytest.mark.parametrize(("name", "lanes"), [("parnet_s", 2), ("parnet_s", 3), ("parnet_xl", 3)])
def test_a_lane_launches_once_a_level(name, lanes):
    """A lane's launches are its levels, each with the tiles that one lane alone would have."""
    program = program_of(CONFIGS[name])
    side = program.config.image_size
    alone = whole(program, (1, side, side), torch.float16, META, TABLE)
    tiles = {op: cut.tile for op, cut in alone.cuts.items()}
    placement = Placement.by_streams(program, lanes)
    segments = placement.segments(program)
    backend = TritonBackend(program, segments, [META] * lanes, torch.float16, table=TABLE)
    launched = []
    for segment in segments:
        layouts = [backend.layout(name, 1, side, side) for name in segment.reads]
        reads = tuple(torch.empty(layout.shape, dtype=layout.dtype, device=META) for layout in layouts)
        runner = backend.bind(segment, (1, side, side), reads, {})
        assert len(runner.launches) == len({program.by_name[name].level for name in segment.operations})
        assert [tuple(y.shape) for y in runner.outputs] == [
            backend.layout(n, 1, side, side).shape for n in segment.writes
        ]
        launched += [
            operation for launch in runner.launches if launch.name != "classifier" for operation in launch.arguments[0]
        ]
        assert all(runner.cuts[name].tile == tiles[name] for name in segment.operations if name in tiles)
    assert len(launched) == sum(len(segment.operations) for segment in segments) - 1


def test_a_feature_crosses_with_its_sums():
    """In one tensor: the pixels, then, aligned, the sums of each tile."""
    program = program_of(VARIANTS["parnet_s"])
    (segment,) = Placement.single(program).segments(program)
    backend = TritonBackend(program, [segment], [META], torch.bfloat16, table=TABLE)
    name = "streams.1.4"
    n, c, h, w = program.shape(name, 2, 224, 224)
    runner = whole(program, (2, 224, 224), torch.bfloat16, META, TABLE)
    tiles = runner.cuts[name].tile.spatial(runner.cuts[name].shape)
    shape, dtype = backend.layout(name, 2, 224, 224)
    assert (shape, dtype) == ((n * c * h * w * 2 + n * tiles * c * 4,), torch.uint8)
    feature = backend.opened(name, torch.empty(shape, dtype=dtype), runner.cuts, (2, 224, 224))
    assert (feature.y.shape, feature.sums.shape) == ((n, h, w, c), (n, tiles, c))
    assert feature.sums.data_ptr() % 16 == feature.y.data_ptr() % 16
    assert feature.y.data_ptr() == feature.message.data_ptr()
