"""The report: its numbers, and the page itself in a headless browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from browser import Browser, chromium

from conftest import ROOT, TracedRun
from parallel_parnet import Program, fold, load_checkpoint
from parallel_parnet.planning.costs import Costs, Link, Measured
from parallel_parnet.planning.planner import schedule
from parallel_parnet.profiling import advice, report, trace_format
from parallel_parnet.profiling.clocks import Clock
from parallel_parnet.profiling.spans import Recorder, Span
from parallel_parnet.profiling.timeline import APART, Operations, Timeline
from parallel_parnet.program.placement import Placement

pytestmark = pytest.mark.ranks
import draw_reports  # noqa: E402

needs_browser = pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt install chromium")


@pytest.fixture(scope="module")
def program() -> Program:
    return fold(load_checkpoint(ROOT / "launch" / "demo" / "parnet_fashion.safetensors"))


@pytest.fixture(scope="module")
def timeline(traced_run: TracedRun) -> Timeline:
    return trace_format.read(traced_run.trace)


@pytest.fixture(scope="module")
def content(timeline: Timeline) -> dict:
    return report.content(timeline)


def test_levels_against_the_floor(content: dict, program: Program, timeline: Timeline) -> None:
    floor, by_level = content["floor"], program.cost().by("level")
    alone = [bar for bar in timeline.bars if bar.row == APART]
    seconds = {name: median(bar.seconds for bar in alone if bar.name == name) for name in program.by_name}
    assert [row["level"] for row in content["levels"]] == list(range(1, 13))
    for row in content["levels"]:
        cost = by_level[row["level"]]
        assert (row["flops"], row["bytes"]) == (cost.flops, cost.bytes)
        assert row["seconds"] == pytest.approx(sum(seconds[op.name] for op in cost.operations))
        at_least = [max(op.flops / floor["flops_per_s"], op.bytes / floor["bytes_per_s"]) for op in cost.operations]
        assert row["floor"] == pytest.approx(sum(at_least))
    assert 1e8 < floor["flops_per_s"] < 1e15
    assert 1e8 < floor["bytes_per_s"] < 1e14


def test_levels_that_are_launched_as_one(program: Program, timeline: Timeline) -> None:
    """As the triton executor runs them: made-up times, on a known program."""
    names = [*(f"level {i}" for i in range(1, 12)), "classifier"]
    spans = [Span(name, float(i), i + (i + 1) * 1e-3) for i, name in enumerate(names)]
    known = Operations.of(program, Placement.single(program))
    rows = report.levels(Timeline.of(known, timeline.about, [Clock()], [Recorder()], [[Recorder(spans=spans)]]))
    assert [row["seconds"] for row in rows] == pytest.approx([(i + 1) * 1e-3 for i in range(12)])
    assert sum(row["flops"] for row in rows) == program.cost().flops
    assert rows[-1]["names"] == ["head.fc"]


def test_the_prediction_is_the_planners(content: dict, timeline: Timeline, program: Program) -> None:
    fastest = {
        name: min(bar.seconds for bar in timeline.bars if bar.row == APART and bar.name == name)
        for name in program.by_name
    }
    link = Link.read(ROOT / "results" / "links-gloo-loopback.json")
    costs = Costs.of(program, Measured("", fastest, ""), link)
    placement = Placement.by_streams(program, 3)
    expected = schedule(program, placement, costs, timeline.about["cores"])
    assert content["panels"][1]["predicted"]["makespan"] == pytest.approx(expected.makespan, rel=1e-3)
    assert len(content["panels"][1]["predicted"]["runs"]) == len(expected.runs)


def test_shares_add_up_and_stand_in_the_headline(content: dict, traced_run: TracedRun) -> None:
    total = sum(share["seconds"] for share in content["shares"])
    assert total == pytest.approx(content["total"])
    computing = sum(share["seconds"] for share in content["shares"] if share["kind"] == "computing")
    assert f"{computing / total:.0%} computing on the critical path" in content["headline"]
    assert re.match(r"\d+\.\d ms: ", content["headline"])
    assert content["headline"] in " ".join(traced_run.output.split()), "infer.py says it as well"
    for lane in content["lanes"]:
        parts = [lane[kind] for kind in ("computing", "waiting", "sending", "idle")]
        assert sum(parts) == pytest.approx(content["total"])
        assert min(parts) > -1e-9
    assert 0 <= content["overlap"] <= 1
    assert len(content["fixes"]) == 3


def test_words_for_people(timeline: Timeline) -> None:
    lines = advice.explain(timeline).splitlines()
    assert lines[0] == advice.Story.of(timeline).headline + "."
    assert sum(line.startswith("  lane ") for line in lines) == 3
    assert [line[:4] for line in lines[-3:]] == ["  1.", "  2.", "  3."]
    parts = [float(re.match(r"  \d\. (\d+)%", line)[1]) for line in lines[-3:]]  # type: ignore[index]
    assert parts == sorted(parts, reverse=True)


@pytest.mark.parametrize(("executor", "end"), [("eager", "one by one."), ("openvino", "of openvino it says nothing.")])
def test_a_prediction_says_whose_operations_it_is_from(
    executor: str, end: str, timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(timeline.about, "executor", executor)
    (said,) = (line for line in advice.explain(timeline).splitlines() if line.startswith("The planner predicts"))
    assert "as torch in eager mode ran them" in said and said.endswith(end)


def test_the_documentation_says_what_its_traces_say() -> None:
    page = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
    assert page.count("<!-- explain") == 2
    assert draw_reports.with_words(page) == page, "python docs/draw_reports.py renews it"


def test_nothing_in_the_data_ends_the_script(timeline: Timeline) -> None:
    for text in ("</script><script>alert(1)</script>", "<!--<script "):
        about = timeline.about | {"torch": text}
        assert text not in report.page(replace(timeline, about=about))


@needs_browser
def test_nothing_in_the_data_is_run(timeline: Timeline, tmp_path: Path) -> None:
    """A trace may be somebody else's."""
    evil = '<img src="data:," onerror="window.ran = 1"><!--<script '
    about = timeline.about | dict.fromkeys(
        ("executor", "device", "dtype", "size", "batch", "date", "torch", "cores", "load_average"), evil
    )
    about["cores"] = timeline.about["cores"]  # which is counted with
    bars = tuple(replace(bar, label=evil) for bar in timeline.bars)
    report.write(replace(timeline, about=about, bars=bars), tmp_path / "page.html")
    with Browser(tmp_path / "page.html", 1280) as page:
        page.hover(".bar.segment, .bar.operation")
        assert page.evaluate("document.querySelector('#card').innerText.includes('<img')")
        assert page.evaluate("window.ran === undefined && document.images.length === 0")
        assert page.complaints == []


@pytest.fixture(scope="module", params=[1280, 400])
def page(request: pytest.FixtureRequest, traced_run: TracedRun) -> Iterator[Browser]:
    """What --report wrote, at a width, light and dark."""
    with Browser(traced_run.folder / "report.html", request.param, dark=request.param == 400) as browser:
        yield browser
        assert browser.complaints == []
        assert len(browser.requests) == 1, "the page fetches nothing"


@needs_browser
def test_it_renders_and_fits(page: Browser, content: dict) -> None:
    assert page.evaluate("document.querySelector('h1').textContent") == content["headline"]
    assert page.evaluate("document.documentElement.scrollWidth") <= page.width
    drawn = page.evaluate("[...document.querySelectorAll('svg')].map((s) => s.querySelectorAll('.bar').length)")
    assert drawn == [sum(len(lane["bars"]) for lane in panel["lanes"]) for panel in content["panels"]]
    arrows = page.evaluate("[...document.querySelectorAll('svg')].map((s) => s.querySelectorAll('.arrow').length)")
    assert arrows == [len(panel["arrows"]) for panel in content["panels"]]
    outside = "[...document.querySelectorAll('.bar rect, svg text')].map((e) => e.getBoundingClientRect())"
    assert page.evaluate(f"{outside}.filter((r) => r.left < -0.5 || r.right > innerWidth + 0.5).length") == 0
    sizes = "[...document.querySelectorAll('svg text, td, p, li')].map((e) => parseFloat(getComputedStyle(e).fontSize))"
    assert page.evaluate(f"Math.min(...{sizes})") >= 11, "readable without zooming"


@needs_browser
def test_text_stands_out_from_its_background(page: Browser) -> None:
    pairs = page.evaluate(
        """[...document.querySelectorAll('h1, h2, td, li, .soft')].filter((e) => e.closest('svg') === null).map((e) => {
            let back = e;
            while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(back).backgroundColor];
        })"""
    )
    assert min(contrast(*pair) for pair in pairs) >= 4.5, "the Web Content Accessibility Guidelines' level AA"


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two CSS colours, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_pointing_at_an_operation_shows_its_numbers(page: Browser, content: dict, program: Program) -> None:
    bar = next(bar for bar in content["panels"][0]["lanes"][2]["bars"] if bar["name"] == "streams.2.4")
    cost = next(op for op in program.cost().operations if op.name == "streams.2.4")
    assert page.evaluate("document.getElementById('card').hidden")
    page.hover('.bar[aria-label^="streams.2.4"]')
    text = str(page.evaluate("document.getElementById('card').innerText"))
    assert page.evaluate("document.getElementById('card').hidden") is False
    assert "lane 2, stream 2, level 9" in text
    rate = cost.flops / (bar["end"] - bar["start"])
    shown = re.search(r"FLOP, ([\d.]+) ([GM])FLOP/s", text)
    assert shown, text
    assert float(shown[1]) * {"G": 1e9, "M": 1e6}[shown[2]] == pytest.approx(rate, rel=0.01)
    box = json.loads(str(page.evaluate("JSON.stringify(document.getElementById('card').getBoundingClientRect())")))
    assert box["left"] >= 0
    assert box["right"] <= page.width
    page.press("Escape")


@needs_browser
def test_the_keyboard_walks_the_bars(page: Browser) -> None:
    page.evaluate("document.querySelectorAll('svg')[1].querySelector('.bar').focus()")
    names = []
    for _ in range(3):
        names.append(page.evaluate("document.getElementById('card').querySelector('b').textContent"))
        page.press("ArrowRight")
    expected = "[...document.querySelectorAll('svg')[1].querySelectorAll('.bar')].slice(0, 3)"
    assert names == page.evaluate(f"{expected}.map((b) => b.getAttribute('aria-label').split(',')[0])")
    page.press("Escape")
    assert page.evaluate("document.getElementById('card').hidden")
