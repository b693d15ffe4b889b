"""Launches of a forward pass, counted from the prepared launches themselves. Nothing is compiled or run."""

from __future__ import annotations

import pytest
import torch

from parallel_parnet import VARIANTS, ParNet, ParNetError
from parallel_parnet.network.variants import Config
from parallel_parnet.program.fold import fold
from parallel_parnet.program.program import Program

pytest.importorskip("triton")

from parallel_parnet.executors.grouped import GroupedExecutor, Plan, pack
from parallel_parnet.kernels.gpu.config import Table

FOUR_STREAMS = Config((8, 16, 32, 64, 96), blocks=(4, 5, 5, 5), num_classes=10)
CONFIGS = {**VARIANTS, "four streams": FOUR_STREAMS}


def program_of(config: Config) -> Program:
    """With weights of zero: only shapes matter here."""
    with torch.device("meta"):
        model = ParNet(config).eval()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    return fold(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_launch_per_level(name):
    program = program_of(CONFIGS[name])
    side = max(CONFIGS[name].image_size, program.size_multiple)
    weights = pack(program, torch.float16, torch.device("meta"))
    launches = Plan(program, weights, 1, side, side, Table.load((9, 0))).launches
    assert len(launches) == program.launches == program.depth
    assert [len(group) for group in program.groups[:-1]] == [len(launch.arguments[0]) for launch in launches[:-1]]
    if name in ("parnet_s", "parnet_m", "parnet_l", "parnet_xl"):
        assert program.launches == 12


def test_without_a_gpu_the_executor_says_so():
    with pytest.raises(ParNetError, match="runs on NVIDIA GPUs, not on cpu"):
        GroupedExecutor(program_of(FOUR_STREAMS), torch.device("cpu"), torch.float32)
