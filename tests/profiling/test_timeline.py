"""Traces: the rules of the Trace Event Format, what stands on which row, clocks, and the critical path."""

from __future__ import annotations

import copy
import gzip
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from conftest import ROOT, TracedRun
from parallel_parnet import Engine, Placement, Program, fold, quantize
from parallel_parnet.commands import tracing
from parallel_parnet.commands.plan.measured import find_link
from parallel_parnet.planning.costs import Costs
from parallel_parnet.planning.planner import Launched, Schedule, schedule
from parallel_parnet.profiling import clocks, trace_format
from parallel_parnet.profiling.critical import COMPUTING, IMMEDIATE, critical_path, lane_times, overlap
from parallel_parnet.profiling.device import ANCHOR, device_spans, drop_anchors, kernels_into
from parallel_parnet.profiling.spans import REQUEST, Recorder, Span
from parallel_parnet.profiling.timeline import APART, REAL, Arrow, Bar, Operations, Pass, Timeline
from parallel_parnet.profiling.traced import PASSES, traced
from parallel_parnet.program.contract import dtype_name
from parallel_parnet.program.program import INPUT
from small import SMALL, lively

PROGRAM = fold(lively(SMALL, 1))
KNOWN = Operations.of(PROGRAM, Placement.by_streams(PROGRAM, 2))
PHASES = {"X", "M", "s", "f"}
PASSES_APART = 5


def broken_rules(content: dict) -> list[str]:
    """Every rule of the Trace Event Format that a trace breaks, for the phases that ours consist of."""
    found, events = [], content["traceEvents"]
    slices: dict[tuple, list[tuple[float, float]]] = {}
    for e in events:
        if e["ph"] not in PHASES:
            found.append(f"phase {e['ph']}")
        if not (type(e["pid"]) is int and type(e["tid"]) is int and isinstance(e["name"], str) and e["name"]):
            found.append(f"pid, tid or name of {e}")
        if e["ph"] != "M" and not (isinstance(e["ts"], int | float) and e["ts"] >= 0 and e.get("dur", 0) >= 0):
            found.append(f"negative time: {e}")
        if e["ph"] == "X":
            slices.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    processes = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name" and e["args"]["name"]}
    rows = [(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name" and e["args"]["name"]]
    found += [f"row {row} has no name" for row in slices if row not in rows or row[0] not in processes]
    found += [f"row {row} is named twice" for row in set(rows) if rows.count(row) > 1]
    for row, on_row in slices.items():
        open_: list[float] = []
        for start, end in sorted(on_row, key=lambda pair: (pair[0], -pair[1])):
            while open_ and open_[-1] <= start + 1e-6:
                open_.pop()
            if open_ and end > open_[-1] + 1e-6:
                found.append(f"row {row}: a slice from {start} to {end} ends outside of the one that it starts in")
            open_.append(end)
    flows: dict[object, list[dict]] = {}
    for e in events:
        if e["ph"] in "sf":
            flows.setdefault((e["cat"], e["name"], e["id"]), []).append(e)
            if not any(a <= e["ts"] <= b + 1e-6 for a, b in slices.get((e["pid"], e["tid"]), ())):
                found.append(f"an arrow's end lies on no slice: {e}")
            if e["ph"] == "f" and e.get("bp") != "e":
                found.append(f"an arrow would bind to the next slice, not to the enclosing one: {e}")
    for key, ends in flows.items():
        if sorted(e["ph"] for e in ends) != ["f", "s"]:
            found.append(f"arrow {key} has not one start and one end")
        elif next(e["ts"] for e in ends if e["ph"] == "s") > next(e["ts"] for e in ends if e["ph"] == "f"):
            found.append(f"arrow {key} ends before it starts")
    return found


@pytest.fixture(scope="module")
def content(traced_run: TracedRun) -> dict:
    return json.loads(gzip.decompress(traced_run.trace.read_bytes()))


@pytest.fixture(scope="module")
def timeline(traced_run: TracedRun) -> Timeline:
    return trace_format.read(traced_run.trace)


@pytest.mark.ranks
def test_the_rules_of_the_format(content: dict) -> None:
    assert content["displayTimeUnit"] == "ms"
    assert broken_rules(content) == []


@pytest.mark.ranks
@pytest.mark.skipif(shutil.which("trace_processor_shell") is None, reason="needs Perfetto's trace_processor_shell")
def test_perfetto_opens_it(traced_run: TracedRun, timeline: Timeline, tmp_path: Path) -> None:
    query = tmp_path / "count.sql"
    query.write_text("select count(*) as slices from slice; select count(*) as flows from flow;")
    command = ["trace_processor_shell", "--query-file", str(query), str(traced_run.trace)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [int(n) for n in re.findall(r"^(\d+)$", run.stdout, re.MULTILINE)] == [
        len(timeline.bars), len(timeline.arrows)
    ]  # fmt: skip


def _first(content: dict, phase: str, name: str = "") -> dict:
    return next(e for e in content["traceEvents"] if e["ph"] == phase and e["name"].startswith(name))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: _first(c, "X").update(ts=-1.0), "negative time"),
        (lambda c: _first(c, "X", "head").update(dur=-0.1), "negative time"),
        (lambda c: _first(c, "X").update(pid="0"), "pid, tid or name"),
        (lambda c: _first(c, "X").update(ph="B!"), "phase"),
        (lambda c: c["traceEvents"].remove(_first(c, "M", "thread_name")), "has no name"),
        (lambda c: _first(c, "X", "inits.1").update(dur=1e9), "ends outside"),
        (lambda c: _first(c, "f").pop("bp"), "would bind to the next"),
        (lambda c: _first(c, "s").update(ts=1e12), "lies on no slice"),
        (lambda c: c["traceEvents"].remove(_first(c, "s")), "not one start and one end"),
    ],
)
def test_the_rules_notice_what_breaks_them(content: dict, spoil: Callable[[dict], object], message: str) -> None:
    spoiled = copy.deepcopy(content)
    spoil(spoiled)
    assert any(message in broken for broken in broken_rules(spoiled))


@pytest.mark.ranks
def test_rows_requests_and_arrows(content: dict, timeline: Timeline) -> None:
    rows = {(e["pid"], e["args"]["name"]) for e in content["traceEvents"] if e["name"] == "thread_name"}
    assert rows == {(lane, row) for lane in range(3) for row in (REAL, APART)}
    assert timeline.passes(REAL) == list(range(PASSES))
    assert timeline.passes(APART) == list(range(PASSES_APART))
    assert content["otherData"]["rows"].keys() == {REAL, APART}
    for lane in range(3):
        requests = [bar for bar in timeline.bars if bar.lane == lane and bar.name == REQUEST]
        assert [bar.number for bar in requests] == list(range(PASSES))
    transfers = sorted((t.feature, t.source, t.target) for t in timeline.known.transfers)
    assert {feature for feature, _, _ in transfers} >= {INPUT, "streams.1.4", "streams.2.4"}
    announced = [(REQUEST, 0, 1), (REQUEST, 0, 2)]
    for row, passes, expected in ((REAL, PASSES, transfers + announced), (APART, PASSES_APART, transfers)):
        for number in range(passes):
            found = [a for a in timeline.arrows if a.target.row == row and a.target.number == number]
            assert sorted((a.feature, a.source.lane, a.target.lane) for a in found) == sorted(expected)
            assert all(a.source.name == f"send {a.feature}" and a.target.name == f"wait {a.feature}" for a in found)
            assert all(a.source.start <= a.target.end for a in found)


@pytest.mark.ranks
def test_what_each_lane_ran(timeline: Timeline) -> None:
    one = timeline.of_pass(APART, 0)
    ran = {lane: {bar.name for bar in one.bars if bar.lane == lane and bar.kind == "operation"} for lane in range(3)}
    assert set.union(*ran.values()) == set(timeline.known.labels)
    assert {timeline.known.labels[name] for name in ran[1]} == {"stem", "stream 1"}
    real = timeline.typical(REAL)
    assert {bar.name for bar in real.bars if bar.lane == 2 and bar.kind == "segment"} == {"stem, stream 2"}
    assert "gather" in {bar.kind for bar in real.bars if bar.lane == 0}


@pytest.mark.ranks
def test_clocks_of_one_machine_agree(content: dict) -> None:
    lanes = content["otherData"]["clocks"]
    assert len(lanes) == 3
    assert lanes[0] == {"offset": 0.0, "uncertainty": 0.0, "shared": True, "applied": 0.0}
    for clock in lanes[1:]:
        assert clock["shared"]
        assert clock["applied"] == 0
        assert 0 < clock["uncertainty"] < 0.1
        assert abs(clock["offset"]) <= clock["uncertainty"], "the true offset is 0, and must lie within the error"


@pytest.mark.ranks
def test_reading_gives_what_was_written(timeline: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "again.json"
    trace_format.write(timeline, path)
    again = trace_format.read(path)
    assert (again.known, again.about) == (timeline.known, timeline.about)
    order = lambda bar: (bar.lane, bar.row, bar.start, bar.name)  # noqa: E731
    for one, other in zip(sorted(timeline.bars, key=order), sorted(again.bars, key=order), strict=True):
        assert replace(one, start=0, end=0) == replace(other, start=0, end=0)
        assert (one.start, one.end) == pytest.approx((other.start, other.end), abs=3e-9)


def planned(seed: int) -> Schedule:
    """The planner's schedule of a random program under a random placement, with random costs."""
    draw = random.Random(seed)
    program: Program = fold(lively(SMALL, seed))
    placement = Placement.by_streams(program, 3)
    work = {op.name: draw.uniform(0.1, 1.0) for op in program.operations}
    transfer = {name: draw.uniform(0.1, 2.0) for name in (INPUT, *work)}
    return schedule(program, placement, Costs(work, transfer))


def as_spans(planned: Schedule) -> list[Recorder]:
    """What the lanes would have recorded, had they kept to the schedule: a wait lasts until the feature is there."""
    lanes: list[list[Span]] = [[] for _ in range(3)]
    for run in planned.runs:
        lanes[run.lane].append(Span(run.operations[0], run.start, run.end))
    for sent in planned.transfers:
        t = sent.transfer
        made = next((run.end for run in planned.lane(t.source) if t.feature in run.operations), 0.0)
        lanes[t.source].append(Span(f"send {t.feature}", made, made))
        reader = min(s.start for s in lanes[t.target] if t.feature in _reads(planned, s.name))
        before = max((span.end for span in lanes[t.target] if span.end <= reader), default=0.0)
        lanes[t.target].append(Span(f"wait {t.feature}", before, max(before, sent.end)))
    return [Recorder(spans=sorted(spans, key=lambda s: (s.start, s.end))) for spans in lanes]


def _reads(planned: Schedule, name: str) -> tuple[str, ...]:
    op = planned.program.by_name.get(name)
    return op.inputs if op else ()


@pytest.mark.parametrize("seed", range(8))
def test_the_critical_path_is_the_planners(seed: int) -> None:
    plan = planned(seed)
    known = Operations.of(plan.program, plan.placement)
    timeline = Timeline.of(known, {}, [clocks.Clock()] * 3, [Recorder()] * 3, [as_spans(plan)])
    one = timeline.of_pass(APART, 0)
    path = critical_path(one)
    assert one.seconds == pytest.approx(plan.makespan)
    assert sum(step.seconds for step in path) == pytest.approx(plan.makespan)
    assert all(a.end == pytest.approx(b.start) for a, b in pairwise(path))
    expected = [run.operations[0] for run in plan.critical_path if isinstance(run, Launched)]
    assert [step.bar.name for step in path if step.kind == COMPUTING and step.bar] == expected
    for lane, times in enumerate(lane_times(one)):
        computing = sum(run.end - run.start for run in plan.lane(lane))
        assert times.computing == pytest.approx(computing)
        assert times.computing + times.waiting + times.sending + times.idle == pytest.approx(one.seconds)
    assert overlap(one) == pytest.approx(sampled_overlap(plan), abs=0.01)


def sampled_overlap(plan: Schedule) -> float:
    """The share of moments at which two lanes or more run, of those at which any does, by looking at many."""
    moments = [plan.makespan * (i + 0.5) / 20000 for i in range(20000)]
    running = [sum(run.start <= at < run.end for run in plan.runs) for at in moments]
    return sum(n >= 2 for n in running) / sum(n >= 1 for n in running)


def bar(lane: int, kind: str, name: str, start: float, end: float, row: str = REAL) -> Bar:
    return Bar(lane, row, kind, name, "", 0, start, end)


def test_kernels_side_by_side_are_one_lane_that_computes_until_the_request_ends() -> None:
    kernels = bar(0, "kernel", "k", 0.1, 0.6, "CUDA stream 7"), bar(0, "kernel", "k", 0.3, 1.4, "CUDA stream 8")
    one = Pass(0.0, 1.0, kernels, (), KNOWN)
    assert overlap(one) == 0
    times = lane_times(one)[0]
    assert (times.computing, times.idle) == (pytest.approx(0.9), pytest.approx(0.1))


@pytest.mark.parametrize(("waited", "lanes"), [(IMMEDIATE / 2, {0}), (2 * IMMEDIATE, {0, 1})])
def test_a_feature_that_is_there_is_not_what_the_answer_waits_for(waited: float, lanes: set[int]) -> None:
    """A wait for it lasts a moment nevertheless."""
    send, wait = bar(1, "send", "send stem", 0.1, 0.2), bar(0, "wait", "wait stem", 0.5, 0.5 + waited)
    computing = bar(0, "segment", "stem", 0.0, wait.start), bar(0, "segment", "stem", wait.end, 1.0)
    one = Pass(0.0, 1.0, (*computing, wait, send), (Arrow("stem", send, wait),), KNOWN)
    assert {step.lane for step in critical_path(one)} == lanes


def test_one_process_is_traced_too() -> None:
    program = fold(lively(SMALL, 3))
    engine = Engine(program, device="cpu", executor="eager")
    (recorder,) = engine.trace(torch.randn(1, 3, 64, 64))
    names = [span.name for span in recorder.spans]
    assert names.count(REQUEST) == PASSES
    assert all(names.count(op.name) == PASSES for op in program.operations)
    assert engine.clocks() == [clocks.Clock()]


def test_the_floor_of_a_quantised_program_is_in_the_type_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is bf16 where Triton's kernels run fp8."""
    x = torch.randn(2, 3, 64, 64)
    program = fold(lively(SMALL, 3))
    engine = Engine(quantize(program, x), device="cpu", executor="eager")
    passes = engine.clocks(), engine.trace(x), [engine.profile(x)]
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(engine, "dtype", dtype)
        floor = tracing.merged(engine, x, *passes).about["floor"]["of"]
        assert floor.endswith(f"whose FLOP/s are those of {dtype_name(dtype)}")


def test_the_profilers_clock_is_tied_to_ours() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        anchors = drop_anchors()
        time.sleep(0.02)
        start = time.perf_counter()
        with record_function("known"):
            time.sleep(0.01)
        end = time.perf_counter()
    events = [e for e in profiler.events() if e.name in (ANCHOR, "known")]
    (span,) = device_spans(events, anchors, DeviceType.CPU)
    assert span.name == "known"
    assert start - 1e-3 < span.start < span.end < end + 1e-3


def test_traced_requests_are_waited_for_before_the_capture_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each at its end, and not in between: a GPU's work belongs to the request that launched it."""
    said: list[str] = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: said.append(name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(f"{device} is done"))
    ranges: Any = SimpleNamespace(span=lambda name: nullcontext(), around=lambda recorder: recorder)

    def request(spans: Any) -> None:
        with spans.span("launch"):
            said.append("request")

    recorder = traced(request, torch.device("cuda"), lambda: said.append("waits"), ranges)
    assert said == ["start", *["request", "waits"] * PASSES, "cuda is done", "stop"]
    assert [span.name for span in recorder.spans] == ["launch", REQUEST] * PASSES


def test_the_shortest_anchor_ties_the_clocks() -> None:
    """The first costs milliseconds. What is no kernel or copy of the device is left out."""

    def event(name: str, kind: DeviceType, start: int, end: int) -> Any:
        time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, device_type=kind, time_range=time_range, device_resource_id=7, device_index=1)

    events = [
        event(ANCHOR, DeviceType.CPU, 0, 5000), event(ANCHOR, DeviceType.CPU, 6000, 6010),
        event(ANCHOR, DeviceType.CUDA, 6000, 6010), event("launch", DeviceType.CPU, 6500, 6600),
        event("kernel", DeviceType.CUDA, 7000, 7100),
    ]  # fmt: skip
    (span,) = device_spans(events, [1.0, 1.004005])
    assert (span.name, span.row) == ("kernel", "CUDA stream 7 of GPU 1")
    assert (span.start, span.end) == pytest.approx((1.005, 1.0051), abs=1e-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a profiler that fails")
def test_a_failed_profiler_does_not_fail_the_request() -> None:
    recorder, ran = Recorder(), []
    with (
        pytest.warns(RuntimeWarning, match="no GPU kernels in the trace"),
        kernels_into(recorder, torch.device("cuda")),
    ):
        ran.append(True)
    assert ran
    assert recorder.spans == []


LEFT = """
import warnings, torch
from parallel_parnet.profiling.device import kernels_into
from parallel_parnet.profiling.spans import Recorder
warnings.simplefilter("ignore")
try:
    with kernels_into(Recorder(), torch.device("cuda")):
        {body}
except KeyError:
    pass
"""


@pytest.mark.parametrize("body", ["pass", "raise KeyError"])
def test_a_profiler_is_stopped_whatever_fails(body: str) -> None:
    """One that records when the process ends is a crash there, which a test that is green does not see."""
    run = subprocess.run(
        [sys.executable, "-c", LEFT.format(body=body)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


def test_the_cores_that_lanes_share_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are fewer than the machine's where a control group says so."""
    monkeypatch.setattr(tracing, "cores", lambda: 7)
    engine, x = Engine(fold(lively(SMALL, 0)), device="cpu", executor="eager"), torch.randn(1, 3, 32, 32)
    found = tracing.predicted(engine, x, [engine.profile(x)], engine.clocks(), None)
    assert found is not None and found["sources"][-1] == "7 cores shared"


def test_a_prediction_is_from_the_fastest_passes_and_the_link_that_was_named() -> None:
    engine, x = Engine(fold(lively(SMALL, 0)), device="cpu", executor="eager"), torch.randn(1, 3, 32, 32)

    def lasting(seconds: float) -> list[SimpleNamespace]:
        return [SimpleNamespace(spans=[Span(name, 1.0, 1.0 + seconds) for name in engine.program.by_name])]

    passes = [lasting(0.001)], [lasting(0.002)], [lasting(0.002), lasting(0.001), lasting(0.004)]
    quick, slow, several = (tracing.predicted(engine, x, alone, engine.clocks(), "3us,7GB/s") for alone in passes)
    assert quick and slow and several and quick["makespan"] == several["makespan"] < slow["makespan"]
    assert find_link("3us,7GB/s").source in several["sources"]
