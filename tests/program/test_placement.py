"""Placements: which lane runs what, and what crosses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_parnet import Config, Engine, ParNetError, Placement, create_model, fold
from parallel_parnet.choice import on_gpus
from small import SMALL, lively
from ungated import random_placement

PROGRAM = fold(lively(SMALL, 5))
INPUT = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EXPECTED = Engine(PROGRAM, executor="reference")(INPUT)


def test_a_stream_per_lane() -> None:
    placement = Placement.by_streams(PROGRAM, 3)
    assert placement.describe(PROGRAM) == ["stem, stream 0, fusion, head", "stem, stream 1", "stem, stream 2"]
    crossing = {(t.feature, t.source, t.target) for t in placement.transfers(PROGRAM)}
    assert crossing == {("input", 0, 1), ("input", 0, 2), ("streams.1.4", 1, 0), ("streams.2.4", 2, 0)}
    assert placement.where["inits.1"] == (1, 2)
    assert placement.where["inits.2"] == (2,)


def test_the_coordinator_gets_the_fewest_streams() -> None:
    placement = Placement.by_streams(PROGRAM, 2)
    assert placement.describe(PROGRAM) == ["stem, stream 0, fusion, head", "stem, stream 1, stream 2"]


def test_one_lane_has_no_transfers() -> None:
    placement = Placement.by_streams(PROGRAM, 1)
    assert placement.transfers(PROGRAM) == []
    assert len(placement.segments(PROGRAM)) == 1


@pytest.mark.parametrize(("lanes", "message"), [(4, "at most 3 ranks"), (0, "at least 1"), (-1, "at least 1")])
def test_impossible_requests(lanes: int, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        Placement.by_streams(PROGRAM, lanes)


def test_no_streams() -> None:
    where = {op.name: replace(op, stage="stem", stream=None) for op in PROGRAM.operations if op.stage == "stream"}
    program = replace(PROGRAM, operations=tuple(where.get(op.name, op) for op in PROGRAM.operations))
    with pytest.raises(ParNetError, match=r"a program without streams: Placement\.single"):
        Placement.by_streams(program, 1)
    assert {choice.placement.lanes for choice in on_gpus(program, None)} == {1}


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_any_number_of_streams(streams: int) -> None:
    program = fold(create_model(Config((8,) * streams + (16,), blocks=(2,) * streams)))
    for lanes in range(1, streams + 1):
        placement = Placement.by_streams(program, lanes)
        placement.check(program)
        on = [[op for op in program.operations if lane in placement.where[op.name]] for lane in range(lanes)]
        counts = [len({op.stream for op in ops} - {None}) for ops in on]
        assert counts == sorted(counts) and 1 <= counts[0] <= counts[-1] == -(-streams // lanes)


def test_faulty_placements() -> None:
    good = Placement.single(PROGRAM)
    for where, message in (
        ({k: v for k, v in good.where.items() if k != "combine.2"}, "leaves out operation combine.2"),
        ({**good.where, "combine.2": (1,)}, "on lanes"),
        ({**good.where, "combine.2": (0, 0)}, "once at most"),
        ({**good.where, "other": (0,)}, "does not have"),
    ):
        with pytest.raises(ParNetError, match=message):
            Engine(PROGRAM, replace(good, where=where))
    with pytest.raises(ParNetError, match="coordinator"):
        Engine(PROGRAM, replace(good, coordinator=1))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_any_placement_gives_the_same_bits(data: st.DataObject, lanes: int) -> None:
    """Operations anywhere, on several lanes at once, fusion and classifier away from the coordinator."""
    placement = random_placement(PROGRAM, lanes, data.draw)
    placement.check(PROGRAM)
    got = Engine(PROGRAM, placement, "cpu", executor="reference")(INPUT)
    assert torch.equal(got, EXPECTED)
    received = {(t.feature, t.target) for t in placement.transfers(PROGRAM)}
    arrived: set[tuple[str, int]] = set()
    for segment in placement.segments(PROGRAM):
        for i, name in enumerate(segment.operations):
            reads = {(feature, segment.lane) for feature in PROGRAM.by_name[name].inputs} & received
            assert i == 0 or reads <= arrived, "a segment waits in its middle"
            arrived |= reads
