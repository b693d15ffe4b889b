"""Placements: which lane runs what, and what crosses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_parnet import Config, Engine, ParNetError, Placement, create_model, fold
from small import SMALL, lively
from ungated import random_placement

PROGRAM = fold(lively(SMALL, 5))
INPUT = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EXPECTED = Engine(PROGRAM, executor="reference")(INPUT)


def test_a_stream_per_lane() -> None:
    placement = Placement.from_streams_per_gpu(PROGRAM, 1, 3)
    assert placement.describe(PROGRAM) == ["stem, stream 0, fusion, head", "stem, stream 1", "stem, stream 2"]
    crossing = {(t.feature, t.source, t.target) for t in placement.transfers(PROGRAM)}
    assert crossing == {("input", 0, 1), ("input", 0, 2), ("streams.1.4", 1, 0), ("streams.2.4", 2, 0)}
    assert placement.where["inits.1"] == (1, 2)
    assert placement.where["inits.2"] == (2,)


def test_the_coordinator_gets_the_fewest_streams() -> None:
    placement = Placement.from_streams_per_gpu(PROGRAM, 2, 2)
    assert placement.describe(PROGRAM) == ["stem, stream 0, fusion, head", "stem, stream 1, stream 2"]


def test_one_lane_has_no_transfers() -> None:
    placement = Placement.from_streams_per_gpu(PROGRAM, 3, 1)
    assert placement.transfers(PROGRAM) == []
    assert len(placement.segments(PROGRAM)) == 1


@pytest.mark.parametrize(
    ("k", "lanes", "message"),
    [
        (1, 2, "do not cover 3 streams: give 3 lanes or --streams-per-gpu 2"),
        (2, 1, "do not cover"),
        (1, 4, "at most 3 ranks"),
        (0, 3, "at least 1"),
        (1, 0, "at least 1"),
    ],
)
def test_impossible_requests(k: int, lanes: int, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        Placement.from_streams_per_gpu(PROGRAM, k, lanes)


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_any_number_of_streams(streams: int) -> None:
    program = fold(create_model(Config((8,) * streams + (16,), blocks=(2,) * streams)))
    for lanes in range(1, streams + 1):
        for k in range(-(-streams // lanes), streams + 1):
            placement = Placement.from_streams_per_gpu(program, k, lanes)
            placement.check(program)
            on = [[op for op in program.operations if lane in placement.where[op.name]] for lane in range(lanes)]
            assert all(1 <= len({op.stream for op in ops} - {None}) <= k for ops in on)


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
