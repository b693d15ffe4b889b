"""NVTX ranges as a tool hears them through the real package, and what they cost when none listens."""

from __future__ import annotations

import time
import timeit
from statistics import median

import pytest
import torch

from conftest import ROOT, TracedRun
from parallel_parnet import Engine, fold, load_checkpoint
from parallel_parnet.commands.drawing import HATCHES
from parallel_parnet.network.variants import MAX_STREAMS
from parallel_parnet.profiling.colours import COLOURS, PALE
from parallel_parnet.profiling.ranges import CAPTURED, DOMAIN, Ranges, category
from parallel_parnet.profiling.spans import REQUEST, SENDS, kind_of, span
from parallel_parnet.profiling.traced import PASSES

PROGRAM = fold(load_checkpoint(ROOT / "launch" / "demo" / "parnet_fashion.safetensors"))


class Heard:
    """One range: category, colour, and the names of the ranges around it, outermost first."""

    def __init__(self, line: str, around: list[str]) -> None:
        _, self.domain, self.name, self.category, self.colour = line.split("|")
        self.around = tuple(around)


def heard(lines: list[str]) -> list[Heard]:
    """A rank's ranges; AssertionError where a pop has no push, or a push no pop."""
    found, stack = [], []
    for line in lines:
        if line.startswith("push|"):
            found.append(Heard(line, stack))
            stack.append(found[-1].name)
        else:
            stack.pop()
    assert not stack
    return found


@pytest.mark.ranks
def test_what_a_tool_hears(traced_run: TracedRun) -> None:
    if traced_run.ranges is None:
        pytest.skip("needs a C compiler for the listener: apt install gcc")
    lanes = [heard(lines) for lines in traced_run.ranges]
    for lane, ranges in enumerate(lanes):
        assert {r.domain for r in ranges} == {DOMAIN}
        traced = [r for r in ranges if CAPTURED in r.around]
        assert [r.name for r in ranges].count(CAPTURED) == 1
        assert [r.name for r in traced].count(REQUEST) == PASSES
        assert len([r for r in ranges if r.name == REQUEST]) > PASSES, "ordinary requests are ranges too"
        for r in (r for r in ranges if r.category == "operation"):
            op = PROGRAM.by_name[r.name]
            assert int(r.colour, 16) == int("ff" + COLOURS[op.label][1:], 16)
            assert r.around[-1] == f"level {op.level}"
            assert op.label in r.around[-2].split(", "), "within its segment"
        ran = {r.name for r in ranges if r.category == "operation"}
        assert any(PROGRAM.by_name[name].label == f"stream {lane}" for name in ran)
    categories = {r.category for ranges in lanes for r in ranges}
    assert categories == {"request", "level", "operation", "stream", "send", "wait", "gather", "fusion", "capture"}
    waits = {(r.name, r.around[-1]) for r in lanes[0] if r.category == "wait"}
    assert {("wait streams.1.4", "gather"), ("wait streams.2.4", "gather")} <= waits
    assert {r.name for r in lanes[0] if r.category == "send"} == {"send input", "send request", SENDS}
    assert {r.name for r in lanes[1] if r.category == "send"} == {"send streams.1.4", SENDS}


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [
        ("classifier", "level", "head"), ("level 7", "level", ""), ("streams.1.4", "operation", "stream 1"),
        ("stem, stream 0, stream 1, stream 2, fusion, head", "stream", "all streams"),
        ("stem, stream 2", "stream", "stream 2"), ("fusion, head", "fusion", "fusion"),
        ("wait streams.1.4", "wait", ""), (SENDS, "send", ""),
        (REQUEST, "request", ""), (CAPTURED, "capture", ""),
    ],
)  # fmt: skip
def test_nsight_has_the_reports_colours(name: str, kind: str, label: str) -> None:
    labels = {op.name: op.label for op in PROGRAM.operations}
    assert category(name, labels) == (kind, label)
    if kind in ("operation", "level", "stream", "fusion"):  # which the report colours by their label
        assert kind_of(name, labels)[1] == label


def test_every_stage_and_stream_has_a_colour() -> None:
    streams = {f"stream {i}" for i in range(MAX_STREAMS)}
    assert COLOURS.keys() == PALE.keys() == HATCHES.keys() == {"stem", *streams, "fusion", "head"}


@pytest.mark.parametrize("lacking", ["nvtx.get_domain", "nvtx._lib.DummyDomain"])
def test_an_nvtx_that_lacks_names_is_none(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those before 0.2.12."""
    pytest.importorskip("nvtx")
    monkeypatch.delattr(lacking)
    assert Ranges.of(PROGRAM) is None


def test_when_no_tool_listens_a_range_is_a_branch() -> None:
    assert Ranges.of(PROGRAM) is None

    def marked() -> None:
        with span(None, "x"):
            pass

    engine = Engine(PROGRAM, device="cpu", executor="eager")
    x = torch.randn(1, 3, 32, 32)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        engine(x)
        times.append(time.perf_counter() - start)
    # as many spans as the eager executor's real path has, each operation's included
    spans = len(engine.trace(x)[0].spans) / PASSES
    assert spans == len(PROGRAM.operations) + 2
    off = min(timeit.repeat(marked, number=2000, repeat=20)) / 2000
    assert spans * off < 0.01 * median(times)
