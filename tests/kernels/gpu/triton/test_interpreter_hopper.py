"""The narrow golden network with the kernel for a Hopper's warpgroups, emulated, between Triton's, interpreted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import emulated
from conftest import ALL
from parallel_parnet import Placement, Program, load_checkpoint
from parallel_parnet.executors import triton_backend
from parallel_parnet.executors.local import LocalExecutor
from parallel_parnet.executors.triton_backend import TritonBackend, geometry
from parallel_parnet.kernels.gpu.config import Table, key
from parallel_parnet.kernels.hopper.plan import takes
from parallel_parnet.program.fold import fold

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
GOLDEN = Path(__file__).parents[3] / "golden"
CPU = torch.device("cpu")


class Started(NamedTuple):
    """In the place of a `launch.WarpLaunch`."""

    name: str
    start: Callable[[], None]

    def __call__(self) -> None:
        self.start()


def table_for(program: Program, side: int) -> Table:
    """Every level that the kernel takes, on clusters of one and of two blocks in turns."""
    levels = {}
    for i, group in enumerate(program.groups):
        if group[0].kind == "conv":
            shapes = [geometry(program, op, side, side) for op in group]
            if all(map(takes, shapes)):
                levels[key(shapes, 1, torch.bfloat16)] = {"tiles": [[64, 32, 32, 1 + i % 2, 3]] * len(shapes)}
    return replace(Table.load((9, 0)), warpgroups=levels)


@pytest.mark.parametrize(("dtype", "lanes"), [(torch.bfloat16, 3), (torch.float16, 1)][: 2 if ALL else 1], ids=str)
def test_the_narrow_network(dtype, lanes, monkeypatch, tmp_path):
    early = []

    def level(convolutions, name, **options):
        early.append(options["early"])
        return Started(name, lambda: emulated.level(convolutions, tmp_path))

    monkeypatch.setattr(triton_backend, "hopper", lambda: SimpleNamespace(level=level))
    program = fold(load_checkpoint(GOLDEN / "official_narrow_silu.pth.tar", activation="silu"))
    golden = torch.load(GOLDEN / "official_narrow_silu.golden.pt", weights_only=True)["cases"][0]
    placement = Placement.from_streams_per_gpu(program, -(-3 // lanes), lanes)
    segments, devices = placement.segments(program), [CPU] * lanes
    backend = TritonBackend(program, segments, devices, dtype, table=table_for(program, golden["input"].shape[-1]))
    executor = LocalExecutor(placement, devices, backend)
    logits, expected = executor(golden["input"][:1]), golden["logits"][:1]
    assert len(early) >= 10 and set(early) == {lanes == 1}
    assert ((logits - expected).abs().max() / expected.abs().max()).item() < 1e-2
