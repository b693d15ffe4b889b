"""The simulation against schedules worked out by hand, and Brent's bounds as properties."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_parnet import ParNetError, Placement, Program, create_model, fold
from parallel_parnet.planning.costs import H200, LINKS, NVLINK_POINTS, Costs, Device, Link, Measured, Roofline
from parallel_parnet.planning.explain import explain
from parallel_parnet.planning.planner import Bounds, Launched, Schedule, schedule
from parallel_parnet.planning.search import Plans
from parallel_parnet.program.program import INPUT, Operation
from small import SMALL, conv, weightless

PARNET = fold(create_model(SMALL))


def program(*operations: tuple[str, int, tuple[str, ...]]) -> Program:
    """Convolutions and, last, a classifier from (name, level, inputs)."""
    *before, (head, level, reads) = operations
    convolutions = [conv(name, "stream", 0, at, inputs) for name, at, inputs in before]
    return weightless(*convolutions, Operation(head, "classifier", "head", None, level, reads, 8 * len(reads), 10))


# a picture goes to a; b and c read a; d reads both
DIAMOND = program(("a", 1, (INPUT,)), ("b", 2, ("a",)), ("c", 2, ("a",)), ("d", 3, ("b", "c")))
WORK = {"a": 2.0, "b": 3.0, "c": 4.0, "d": 1.0}


def costs(transfer: float = 1.0, **settings: float) -> Costs:
    return Costs(WORK, dict.fromkeys([INPUT, *WORK], transfer), **settings)  # type: ignore[arg-type]


def place(lanes: int, coordinator: int = 0, **where: int | tuple[int, ...]) -> Placement:
    tuples = {name: on if isinstance(on, tuple) else (on,) for name, on in where.items()}
    return Placement(lanes, tuples, coordinator)


def spans(result: Schedule) -> dict[tuple[str, int], tuple[float, float]]:
    return {(" + ".join(run.operations), run.lane): (run.start, run.end) for run in result.runs}


def sent(result: Schedule) -> dict[str, tuple[float, float]]:
    return {f"{s.transfer.feature}>{s.transfer.target}": (s.start, s.end) for s in result.transfers}


def path(result: Schedule) -> list[str]:
    return [
        "+".join(x.operations) if isinstance(x, Launched) else f"send {x.transfer.feature}"
        for x in result.critical_path
    ]


def test_one_lane() -> None:
    """lane 0: a a b b b c c c c d"""
    result = schedule(DIAMOND, Placement.single(DIAMOND), costs())
    assert spans(result) == {("a", 0): (0, 2), ("b", 0): (2, 5), ("c", 0): (5, 9), ("d", 0): (9, 10)}
    assert (result.makespan, result.speed_up, result.idle(0)) == (10, 1, 0)
    assert path(result) == ["a", "b", "c", "d"]


def test_two_lanes_and_what_the_answer_waits_for() -> None:
    """
    lane 0: a a b b b . . . d       the path: a, its transfer, c, its transfer, d
            \\>            />
    lane 1: . . . c c c c
    """
    result = schedule(DIAMOND, place(2, a=0, b=0, c=1, d=0), costs())
    assert spans(result) == {("a", 0): (0, 2), ("b", 0): (2, 5), ("c", 1): (3, 7), ("d", 0): (8, 9)}
    assert sent(result) == {"a>1": (2, 3), "c>0": (7, 8)}
    assert (result.makespan, result.idle(0), result.idle(1)) == (9, 3, 5)
    assert path(result) == ["a", "send a", "c", "send c", "d"]
    assert explain(Plans(result, None), "air").splitlines() == [
        "2 lanes over air: 9.0 s, 1.11x over one lane; transferring a and c is on the critical path (22% of it).",
        "No placement on 2 lane(s) can beat 7.0 s, the longest path through the network.",
    ]


def test_recomputing_saves_a_transfer_of_the_feature_but_needs_the_picture() -> None:
    """
    lane 0: a a b b b . . . d
             >             />       the picture takes 1, a is recomputed, c ends at 7
    lane 1: . a a c c c c
    """
    result = schedule(DIAMOND, place(2, a=(0, 1), b=0, c=1, d=0), costs())
    assert spans(result)["a", 1] == (1, 3)
    assert result.makespan == 9
    assert path(result) == ["send input", "a", "c", "send c", "d"]


def test_what_is_read_of_a_level_is_sent_when_the_lane_has_run_all_of_it() -> None:
    """lane 1: . a a b b b c c c c, and at 10 b and c leave, one after the other"""
    result = schedule(DIAMOND, place(2, a=1, b=1, c=1, d=0), costs())
    assert sent(result) == {"input>1": (0, 1), "b>0": (10, 11), "c>0": (11, 12)}
    assert path(result) == ["send input", "a", "b", "c", "send b", "send c", "d"]
    assert [s.operations for s in place(2, a=1, b=1, c=1, d=0).segments(DIAMOND)] == [("a", "b", "c"), ("d",)]


def test_answer_and_picture_travel_where_the_coordinator_computes_nothing() -> None:
    """lane 1: . a a b b b c c c c d, then the logits take 1"""
    result = schedule(DIAMOND, place(2, a=1, b=1, c=1, d=1), costs())
    assert (result.makespan, result.idle(0)) == (12, 12)
    assert path(result) == ["send input", "a", "b", "c", "d", "send d"]


def test_transfers_of_one_lane_follow_one_another() -> None:
    """a's two transfers take 3 each: lane 1 has a at 5, lane 2 at 8; lanes 1 and 2 send side by side."""
    result = schedule(DIAMOND, place(3, a=0, b=1, c=2, d=0), costs(3.0))
    assert sent(result) == {"a>1": (2, 5), "a>2": (5, 8), "b>0": (8, 11), "c>0": (12, 15)}
    assert path(result) == ["a", "send a", "send a", "c", "send c", "d"]
    assert result.makespan == 16


def test_lanes_that_copy_do_nothing_else_meanwhile() -> None:
    """
    lane 0: a a > b b b . . < d     what comes from another lane is copied once more, in half a second, where it is read
    lane 1: . . . < c c c c >
    """
    copying = costs(by_lanes=True, taking={"a": 0.5, "c": 0.5})
    result = schedule(DIAMOND, place(2, a=0, b=0, c=1, d=0), copying)
    assert spans(result) == {("a", 0): (0, 2), ("b", 0): (3, 6), ("c", 1): (3, 7.5), ("d", 0): (8.5, 10)}
    assert sent(result) == {"a>1": (2, 3), "c>0": (7.5, 8.5)}
    assert path(result) == ["a", "send a", "c", "send c", "d"]
    # b waits for a's copy, and then the answer for b
    assert path(schedule(DIAMOND, place(2, a=0, b=0, c=1, d=0), replace(copying, work={**WORK, "b": 9.0}))) == [
        "a", "send a", "b", "d"
    ]  # fmt: skip
    # both on lane 1 read a, which is copied for b alone
    result = schedule(DIAMOND, place(2, a=0, b=1, c=1, d=1), copying)
    assert spans(result) == {("a", 0): (0, 2), ("b", 1): (3, 6.5), ("c", 1): (6.5, 10.5), ("d", 1): (10.5, 11.5)}
    # lanes share one processor also where they copy: b has 2 of 3 seconds left at 5, c 2 of 4 at 9 and 1 at 11
    result = schedule(DIAMOND, place(3, a=0, b=1, c=2, d=0), costs(by_lanes=True), processors=1)
    assert spans(result) == {("a", 0): (0, 2), ("b", 1): (3, 9), ("c", 2): (5, 12), ("d", 0): (13, 14)}
    assert sent(result) == {"a>1": (2, 3), "a>2": (3, 5), "b>0": (9, 11), "c>0": (12, 13)}


def test_a_lane_of_a_gpu_launches_a_level_at_once() -> None:
    """Launches cost 0.5: a 2.5, then b and c together 7.5, then d 1.5; apart it would be 12."""
    together = schedule(DIAMOND, Placement.single(DIAMOND), costs(launch_s=0.5, grouped=True))
    assert spans(together) == {("a", 0): (0, 2.5), ("b + c", 0): (2.5, 10), ("d", 0): (10, 11.5)}
    assert schedule(DIAMOND, Placement.single(DIAMOND), costs(launch_s=0.5)).makespan == 12


def test_lanes_that_share_one_processor() -> None:
    """
    Transfers are free. From 2 on b and c run at half speed: b ends at 8 with c's 4 seconds down to 1, c ends at 9.
    """
    result = schedule(DIAMOND, place(2, a=0, b=0, c=1, d=0), costs(0.0), processors=1)
    assert spans(result) == {("a", 0): (0, 2), ("b", 0): (2, 8), ("c", 1): (2, 9), ("d", 0): (9, 10)}
    assert result.makespan == 10
    assert schedule(DIAMOND, place(2, a=0, b=0, c=1, d=0), costs(0.0), processors=2).makespan == 7
    # transfers that take 1 need no processor: b has it for itself until c starts at 3, and d once c's is over
    result = schedule(DIAMOND, place(2, a=0, b=0, c=1, d=0), costs(), processors=1)
    assert spans(result) == {("a", 0): (0, 2), ("b", 0): (2, 7), ("c", 1): (3, 9), ("d", 0): (10, 11)}


def test_the_first_level_of_parnet_on_three_lanes() -> None:
    """Each lane recomputes its stem; all operations take 1, all transfers 10; pictures leave one after the other."""
    ones = Costs(dict.fromkeys(PARNET.by_name, 1.0), dict.fromkeys([INPUT, *PARNET.by_name], 10.0))
    result = schedule(PARNET, Placement.by_streams(PARNET, 3), ones)
    # lane 2 has the picture at 20, four of stem and five blocks end at 29, the feature arrives at 39, then three more
    assert result.makespan == 42
    assert path(result)[:2] == ["send input", "send input"]
    # lane 1 has the picture at 10, three of stem and five blocks end at 18
    assert sent(result)["streams.1.4>0"] == (18, 28)


ASSIGNMENTS = [place(2, a=a, b=b, c=c, d=d) for a, b, c, d in product((0, 1), repeat=4)]
seconds = st.floats(0.1, 10)


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[seconds] * 4), seconds, st.floats(0, 2), st.booleans())
def test_bounds(work: tuple[float, ...], transfer: float, launch: float, grouped: bool) -> None:
    numbers = dict(zip(WORK, work, strict=True))
    linked = Costs(numbers, dict.fromkeys([INPUT, *WORK], transfer), launch, grouped)
    free = Costs(numbers, dict.fromkeys([INPUT, *WORK], 0.0), launch, grouped)
    bounds = Bounds.of(DIAMOND, linked, 2)
    longest = [max(free.seconds([op]) for op in level) for level in DIAMOND.launch_groups]
    assert bounds.span >= DIAMOND.depth * (min(work) + launch) * (1 - 1e-9), "depth x step"
    for placement in ASSIGNMENTS:
        assert schedule(DIAMOND, placement, linked).makespan >= bounds.lower * (1 - 1e-9)
    best = min(schedule(DIAMOND, placement, free).makespan for placement in ASSIGNMENTS)
    assert best <= (bounds.work / 2 + sum(longest)) * (1 + 1e-9), "a greedy one, level by level, reaches it"


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 4), st.none() | st.integers(1, 4))
def test_any_schedule_is_sound(data: st.DataObject, lanes: int, processors: int | None) -> None:
    subsets = st.sets(st.integers(0, lanes - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    where = {name: data.draw(subsets) for name in PARNET.by_name}
    placement = Placement(lanes, where, data.draw(st.integers(0, lanes - 1)))
    numbers = {name: data.draw(seconds) for name in PARNET.by_name}
    link = dict.fromkeys([INPUT, *numbers], data.draw(st.floats(0, 3)))
    grouped, by_lanes = data.draw(st.booleans()), data.draw(st.booleans())
    taking = dict.fromkeys(link, data.draw(st.floats(0, 3)))
    costs = Costs(numbers, link, 0.1, grouped, by_lanes=by_lanes, taking=taking)
    result = schedule(PARNET, placement, costs, processors)
    arrived = {(s.transfer.feature, s.transfer.target): s.end for s in result.transfers}
    for lane in range(lanes):
        mine = result.lane(lane)
        sends = [s for s in result.transfers if s.transfer.source == lane]
        both = sorted([*mine, *sends], key=lambda item: (item.start, item.end))
        for items in [both] if by_lanes else [mine, sends]:
            assert all(a.end <= b.start for a, b in pairwise(items)), "a lane does one thing at a time"
        assert {name for run in mine for name in run.operations} == {n for n, on in where.items() if lane in on}
        made = {name: run.end for run in mine for name in run.operations}
        if lane == placement.coordinator:
            made[INPUT] = 0.0
        for run in mine:
            for name in (n for op in run.operations for n in PARNET.by_name[op].inputs):
                assert run.start >= (made[name] if name in made else arrived[name, lane])
    chain = result.critical_path
    assert chain[0].start == 0
    assert all(a.end == b.start for a, b in pairwise(chain)), "nothing unexplained in between"
    work = result.bounds.work / min(lanes, processors or lanes)
    assert result.makespan >= max(work, result.bounds.span) * (1 - 1e-9)


def test_links() -> None:
    for size, measured in NVLINK_POINTS:
        assert LINKS["nvlink"].seconds(size) == pytest.approx(measured, rel=0.12)
    assert LINKS["peer"].seconds(370_000) == pytest.approx(3e-6)
    assert LINKS["pcie"].latency_s == LINKS["nvlink"].latency_s
    assert not any(link.by_lanes for link in LINKS.values())
    own = Link.parse("5us,20GB/s")
    assert (own.latency_s, own.bytes_per_s) == (pytest.approx(5e-6), 20e9)
    exact = Link.fit("line", [(0, 1.0), (10, 2.0), (20, 3.0)], "")
    assert (exact.latency_s, exact.bytes_per_s) == (pytest.approx(1), pytest.approx(10))
    points = [(1000, 1e-5), (2000, 1.3e-5), (1_000_000, 1e-3), (2_000_000, 3e-3)]  # on no line
    rows = np.array([[1 / seconds, size / seconds] for size, seconds in points])
    latency, per_byte = np.linalg.lstsq(rows, np.ones(4), rcond=None)[0]
    near = Link.fit("relative", points, "")
    assert (near.latency_s, near.bytes_per_s) == (pytest.approx(latency), pytest.approx(1 / per_byte))
    assert Link.fit("below zero", [(1, 1e-6), (2, 3e-6)], "").latency_s == 0


def test_features_as_answers_are_waited_for_to_the_last() -> None:
    features = fold(create_model(SMALL), outputs=("streams.0", "streams.1", "streams.2"))
    numbers = dict.fromkeys([INPUT, *features.by_name], 1.0)
    first = features.answers["streams.0"]
    late = Costs({**numbers, first: 90.0}, numbers)
    result = schedule(features, Placement.by_streams(features, 3), late)
    assert result.makespan == max(run.end for run in (*result.runs, *result.transfers)) > 90


def test_operations_that_are_nothing_beside_a_transfer() -> None:
    """In the sum of seconds they take no time: each ends when it starts."""
    result = schedule(DIAMOND, place(2, a=0, b=1, c=0, d=0), costs(1e300))
    assert path(result) == ["a", "send a", "b", "send b", "d"]
    assert result.makespan == 2e300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5us,-20GB/s", "bandwidth -2e.10 bytes/s; it must be at least 1"),
        ("-5us,20GB/s", "must be from 0 to 1000 s"),
        ("1e15s,20GB/s", "must be from 0 to 1000 s"),
        ("5us,1e-311GB/s", "must be at least 1"),
        ("infiniband", "choose one of nvlink, peer, pcie, loopback"),
        ("5us", "give latency and bandwidth as"),
        ("1.2.3us,20GB/s", "give latency and bandwidth as"),
    ],
)
def test_impossible_links(text: str, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        Link.parse(text)


def test_a_measured_link_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "link.json"
    content = {"link": "loopback", "transport": "gloo", "cpu": "2-core", "date": "2026-01-01"}
    points = [{"bytes": size, "median_s": 1e-4 + size / 1e9} for size in (1000, 50_000, 1_000_000)]
    file.write_text(json.dumps({**content, "messages": points}))
    link = Link.read(file)
    assert (link.latency_s, link.bytes_per_s) == (pytest.approx(1e-4), pytest.approx(1e9))
    assert "2-core" in link.source
    several = {**content, "links": [{"link": name, "messages": points} for name in ("shared", "gloo")]}
    file.write_text(json.dumps(several))
    assert [(link.name, link.by_lanes) for link in (Link.read(file), Link.read(file, "gloo"))] == [
        ("shared", True), ("gloo", False)
    ]  # fmt: skip
    with pytest.raises(ParNetError, match="no measured link nccl"):
        Link.read(file, "nccl")
    huge = {**content, "messages": [{"bytes": 10**400, "median_s": 1.0}]}
    for text in ("{}", "no json", "[" * 100_000, json.dumps(huge)):
        file.write_text(text)
        with pytest.raises(ParNetError, match="no measured link"):
            Link.read(file)
    for seconds in (0, -1e-6, 1e-200, 1e300, math.nan):
        file.write_text(json.dumps({**content, "messages": [points[0], {"bytes": 2000, "median_s": seconds}]}))
        with pytest.raises(ParNetError, match=r"give messages of up to 1e\+15 bytes, each of 1e-09 to 1000 s"):
            Link.read(file)
    for size in (-1, 1e16, 1e200):
        file.write_text(json.dumps({**content, "messages": [points[0], {"bytes": size, "median_s": 1.0}]}))
        with pytest.raises(ParNetError, match="give messages of up to"):
            Link.read(file)
    file.write_text(json.dumps({**content, "messages": []}))
    with pytest.raises(ParNetError, match="give messages"):
        Link.read(file)


def test_devices() -> None:
    cost = {row.name: row for row in PARNET.cost(64, 2, 2).operations}
    work = H200.work(PARNET, 64, 2, 2)
    assert work["streams.0.0"] == max(cost["streams.0.0"].flops / 790e12, cost["streams.0.0"].bytes / 4.3e12)
    assert H200.at(0.5).work(PARNET, 64, 2, 2)["streams.0.0"] == pytest.approx(2 * work["streams.0.0"])
    measured = Costs.of(PARNET, Measured("cpu", dict.fromkeys(PARNET.by_name, 0.5), ""), LINKS["peer"], 64)
    assert measured.work["head.fc"] == 0.5
    assert measured.transfer[INPUT] == pytest.approx(2e-6 + 3 * 64 * 64 * 4 / 370e9)
    assert (measured.by_lanes, measured.taking) == (False, {})
    copying = Costs.of(
        PARNET, Measured("cpu", dict.fromkeys(PARNET.by_name, 0.5), "", own_layout=True),
        replace(LINKS["peer"], by_lanes=True), 64,
    )  # fmt: skip
    assert copying.by_lanes and copying.taking[INPUT] == pytest.approx(3 * 64 * 64 * 4 / 370e9)
    launches = [[op.name for op in launch] for launch in Costs.of(PARNET, H200, LINKS["peer"], 64, 1, 2).launches(
        PARNET.operations
    )]  # fmt: skip
    assert len(launches) == PARNET.launches == 12


def simulate(
    program: Program, placement: Placement, device: Device, *sizes: int, processors: int | None = None
) -> Schedule:
    return schedule(program, placement, Costs.of(program, device, LINKS["peer"], *sizes), processors)


def test_impossible_requests() -> None:
    single = Placement.single(PARNET)
    for call, message in (
        (lambda: Bounds.of(PARNET, Costs.of(PARNET, H200, LINKS["peer"], 64, 1, 2), 0), "0 lanes"),
        (lambda: simulate(PARNET, single, H200, 64, 1, 2, processors=0), "0 processors"),
        (lambda: simulate(PARNET, single, H200, 64, 0, 2), "batch 0"),
        (lambda: simulate(PARNET, single, H200, 64), "give --dtype bfloat16"),
        (lambda: simulate(PARNET, single, H200, 50, 1, 2), "multiples of 32"),
        (lambda: simulate(PARNET, Placement(1, {}), H200, 64, 1, 2), "leaves out operation inits.0.0"),
        (lambda: simulate(PARNET, single, Measured("m", {"inits.0.0": 1.0}, ""), 64), "no time for"),
        (
            lambda: simulate(PARNET, single, Measured("m", dict.fromkeys(PARNET.by_name, math.nan), ""), 64),
            "not positive",
        ),
        (lambda: H200.at(0), "above 0 and at most 1"),
        (lambda: Roofline("none", 0, 1, 0, True, 2, ""), "must be positive"),
        (lambda: Link("backwards", 0, -1, ""), "must be at least 1"),
    ):
        with pytest.raises(ParNetError, match=message):
            call()  # type: ignore[no-untyped-call]
