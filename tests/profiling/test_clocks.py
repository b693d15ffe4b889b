"""Clocks of lanes: measured against each other, and taken out of what is shown."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest

from parallel_parnet import Placement, fold
from parallel_parnet.profiling import clocks
from parallel_parnet.profiling.spans import REQUEST, Recorder, Span
from parallel_parnet.profiling.timeline import APART, REAL, Operations, Timeline
from small import SMALL, lively

PROGRAM = fold(lively(SMALL, 1))
KNOWN = Operations.of(PROGRAM, Placement.by_streams(PROGRAM, 2))


def test_a_skewed_clock_is_measured_and_taken_out() -> None:
    ahead = random.uniform(-1e4, 1e4)

    def ping() -> list[float]:
        time.sleep(random.uniform(0, 2e-4))
        theirs = time.perf_counter() + ahead
        time.sleep(random.uniform(0, 2e-4))
        return [theirs, -1.0]

    clock = clocks.ask(ping)
    assert abs(clock.offset - ahead) <= clock.uncertainty < 5e-3
    assert not clock.shared
    spans = [Recorder(spans=[Span(REQUEST, 1.0, 2.0)]), Recorder(spans=[Span(REQUEST, 1.2 + ahead, 1.7 + ahead)])]
    merged = Timeline.of(KNOWN, {}, [clocks.Clock(), clock], spans, [spans])
    starts = {bar.row: bar.start for bar in merged.bars if bar.lane == 1}
    assert starts == {row: pytest.approx(1.2, abs=clock.uncertainty + 1e-9) for row in (REAL, APART)}


def test_the_quickest_answer_tells_how_far_a_clock_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which nine tenths of the time were spent on the way there."""
    now, trips = 0.0, iter([0.5, 0.001, *[0.2] * clocks.ROUNDS])

    def ping() -> list[float]:
        nonlocal now
        trip = next(trips)
        theirs = now + 0.9 * trip + 3
        now += trip
        return [theirs, -1.0]

    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = clocks.ask(ping)
    assert (clock.uncertainty, clock.offset) == (pytest.approx(0.0005), pytest.approx(3.0004))
