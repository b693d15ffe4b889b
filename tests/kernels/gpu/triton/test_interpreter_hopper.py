"""Narrow networks with the kernel for a Hopper's warpgroups, emulated, between Triton's, interpreted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import emulated
from cases import ALL
from parallel_parnet import ParNet, Placement, Program, load_checkpoint
from parallel_parnet.commands.gpu import warpgroups
from parallel_parnet.commands.gpu.journal import Journal
from parallel_parnet.commands.gpu.scope import CONFIGS, IN_A_DRY_RUN, NARROW
from parallel_parnet.commands.gpu.work import Work
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
    for i, group in enumerate(program.launch_groups):
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
    placement = Placement.by_streams(program, lanes)
    segments, devices = placement.segments(program), [CPU] * lanes
    backend = TritonBackend(program, segments, devices, dtype, table=table_for(program, golden["input"].shape[-1]))
    executor = LocalExecutor(placement, devices, backend)
    logits, expected = executor(golden["input"][:1]), golden["logits"][:1]
    assert len(early) >= 10 and set(early) == {lanes == 1}
    assert ((logits - expected).abs().max() / expected.abs().max()).item() < 1e-2


def test_the_weights_of_the_next_launch_are_sent_for(monkeypatch):
    sent = {}

    def level(convolutions, name, **options):
        sent[name] = [tensor.data_ptr() for tensor in options["ahead"]]
        return Started(name, lambda: None)

    monkeypatch.setattr(triton_backend, "hopper", lambda: SimpleNamespace(level=level))
    program = fold(ParNet(CONFIGS[NARROW]))
    for ahead in (True, False):
        table = replace(table_for(program, 32), ahead=ahead)
        plan = triton_backend.whole(program, (1, 32, 32), torch.bfloat16, CPU, table)
        read = {op.name: plan._weight(op).data_ptr() for op in program.operations}
        for name, addresses in sent.items():
            after = [op for op in program.operations if f"level {op.level - 1}" == name]
            assert addresses == ([read[op.name] for op in after] if ahead else [])
    assert len(sent) == 5


def test_the_check_looks_at_what_a_graph_computes(monkeypatch, tmp_path):
    """In the networks of a GPU check, two levels by this kernel: launches that are right once alone do not pass."""

    def level(convolutions, name, **options):
        run = count()

        def start() -> None:
            if next(run) < runs:
                emulated.level(convolutions, tmp_path)

        return Started(name, start)

    monkeypatch.setattr(triton_backend, "hopper", lambda: SimpleNamespace(level=level))
    table = table_for(fold(ParNet(CONFIGS[NARROW])), CONFIGS[NARROW].image_size)
    tables = {"warpgroups": replace(table, warpgroups=dict(list(table.warpgroups.items())[:2]))}
    work = Work("passes", Journal(tmp_path / "rows.jsonl"), IN_A_DRY_RUN, tmp_path, time.monotonic() + 200)
    for runs in (1, 100):
        row = warpgroups.pass_of(work, NARROW, tables)
        right = row["deviation"] <= 1, row["error"] < 0.1, not row["different"]
        assert set(right) == {runs == 100}, row
