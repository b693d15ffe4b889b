"""The search against every assignment of operations to lanes, and on ParNet."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parallel_parnet import Config, ParNetError, Placement, Program, create_model, fold
from parallel_parnet.commands.gpu.precompile import shapes_of
from parallel_parnet.planning.costs import H200, LINKS, Costs, Link
from parallel_parnet.planning.planner import schedule
from parallel_parnet.planning.search import search
from parallel_parnet.program.program import INPUT, Operation
from small import SMALL, conv, weightless

CONFIG = Config((8, 16, 32), blocks=(1, 1))
TWO_STREAMS = fold(create_model(CONFIG))
TWO_FEATURES = fold(create_model(CONFIG), outputs=("streams.0", "streams.1"))
BACKWARDS = replace(  # whose last operation is not on its deepest level
    TWO_FEATURES,
    operations=tuple(sorted(TWO_FEATURES.operations, key=lambda op: (op.stage == "stream", -(op.stream or 0)))),
)
XL = shapes_of("parnet_xl")
seconds = st.floats(0.1, 10)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Three to five operations: a stem, random inputs, and a last operation that reads all that nobody read."""
    names = [f"op{i}" for i in range(draw(st.integers(2, 4)))]
    levels = {INPUT: 0}
    operations = []
    for i, name in enumerate(names):
        known = [INPUT] if i == 0 else names[:i]
        inputs = tuple(sorted(draw(st.sets(st.sampled_from(known), min_size=1, max_size=2))))
        levels[name] = 1 + max(levels[x] for x in inputs)
        stage, stream = ("stem", None) if i < 2 else ("stream", i - 2)
        operations.append(conv(name, stage, stream, levels[name], inputs))
    read = {name for op in operations for name in op.inputs}
    inputs = tuple(name for name in names if name not in read)
    last = 1 + max(levels[x] for x in inputs)
    assume(last > max(levels[name] for name in names))
    operations.sort(key=lambda op: op.level)
    head = Operation("last", "classifier", "head", None, last, inputs, 8 * len(inputs), 10)
    return weightless(*operations, head)


def costs_of(program: Program, data: st.DataObject) -> Costs:
    work = {op.name: data.draw(seconds) for op in program.operations}
    transfer = {name: data.draw(st.floats(0, 5)) for name in (INPUT, *work)}
    taking = {name: data.draw(st.floats(0, 2)) for name in transfer} if data.draw(st.booleans()) else {}
    grouped, by_lanes = data.draw(st.booleans()), data.draw(st.booleans())
    return Costs(work, transfer, data.draw(st.floats(0, 1)), grouped, by_lanes=by_lanes, taking=taking)


def everything(program: Program, lanes: int) -> list[Placement]:
    """Every operation on every lane, those of the stem on every set of lanes that each read what they compute."""
    sets = list(chain.from_iterable(combinations(range(lanes), n) for n in range(1, lanes + 1)))
    options = [sets if op.stage == "stem" else sets[:lanes] for op in program.operations]
    placements = []
    for choice in product(*options):
        where = dict(zip(program.by_name, choice, strict=True))
        readers = {
            name: {lane for op in program.operations if name in op.inputs for lane in where[op.name]} for name in where
        }
        if all(len(on) == 1 or {*on} <= readers[name] for name, on in where.items()):
            placements.append(Placement(lanes, where))
    return placements


def used(placement: Placement) -> int:
    """Lanes in use; the coordinator always is, since it holds the picture and the answer."""
    return len({0, *(lane for on in placement.where.values() for lane in on)})


def partition(program: Program, placement: Placement) -> list[list[bool]]:
    """Which streams end on the same lane, the coordinator standing for one more stream."""
    readers = {name: [op for op in program.operations if name in op.inputs] for name in program.by_name}
    ends = [
        placement.where[op.name][0]
        for op in program.operations
        if op.stage == "stream" and all(reader.stream != op.stream for reader in readers[op.name])
    ]
    return [[a == b for b in (0, *ends)] for a in (0, *ends)]


@settings(max_examples=40, deadline=None)
@given(st.data(), programs(), st.integers(1, 3), st.booleans())
def test_search_finds_what_trying_everything_finds(
    data: st.DataObject, program: Program, lanes: int, exactly: bool
) -> None:
    costs = costs_of(program, data)
    tried = [(schedule(program, p, costs).makespan, p) for p in everything(program, lanes)]
    if exactly:
        tried = [(t, p) for t, p in tried if used(p) == lanes]
    if not tried:
        with pytest.raises(ParNetError, match="uses exactly"):
            search(program, costs, lanes, exactly)
        return
    answer = search(program, costs, lanes, exactly)
    assert answer.best.makespan == pytest.approx(min(t for t, _ in tried))
    assert answer.best.placement.lanes == used(answer.best.placement) <= lanes
    best = partition(program, answer.best.placement)
    others = [t for t, p in tried if partition(program, p) != best]
    assert (answer.runner_up is None) == (not others)
    if answer.runner_up:
        assert answer.runner_up.makespan == pytest.approx(min(others))


@settings(max_examples=3, deadline=None)
@given(st.data(), st.sampled_from([TWO_STREAMS, TWO_FEATURES, BACKWARDS]))
def test_two_streams_on_two_lanes(data: st.DataObject, program: Program) -> None:
    costs = costs_of(program, data)
    tried = min(schedule(program, p, costs).makespan for p in everything(program, 2))
    assert search(program, costs, 2).best.makespan == pytest.approx(tried)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_parnet_is_never_slower_than_by_streams(lanes: int) -> None:
    for link in LINKS.values():
        costs = Costs.of(XL, H200, link, itemsize=2)
        by_streams = Placement.by_streams(XL, lanes)
        answer = search(XL, costs, lanes, exactly=True)
        answer.best.placement.check(XL)
        assert answer.best.placement.lanes == lanes
        assert answer.best.makespan <= schedule(XL, by_streams, costs).makespan * (1 + 1e-9)
        assert search(XL, costs, lanes, runner_up=False).best.makespan <= answer.best.makespan * (1 + 1e-9)


def test_with_free_transfers_three_lanes_take_the_longest_path() -> None:
    best = search(XL, Costs.of(XL, H200, Link("free", 0, float("inf"), ""), itemsize=2), 3).best
    assert best.makespan == pytest.approx(best.bounds.span)


def test_a_link_that_costs_too_much_leaves_one_lane() -> None:
    answer = search(XL, Costs.of(XL, H200, Link("slow", 1, 1e6, ""), itemsize=2), 3)
    assert answer.best.placement == Placement.single(XL)
    assert answer.runner_up is not None
    assert answer.runner_up.makespan > answer.best.makespan


def test_the_same_costs_give_the_same_placement() -> None:
    costs = Costs.of(XL, H200, LINKS["peer"], itemsize=2)
    first, second = (search(program, costs, 3, runner_up=False) for program in (XL, shapes_of.__wrapped__("parnet_xl")))
    assert first.best.placement == second.best.placement


def test_impossible_requests() -> None:
    program = fold(create_model(SMALL))
    costs = Costs.of(program, H200, LINKS["peer"], 64, itemsize=2)
    for lanes, message in ((0, "at least 1"), (-1, "at least 1"), (9, "at most 4")):
        with pytest.raises(ParNetError, match=message):
            search(program, costs, lanes)
