"""The comparison's words held to its numbers, what it refuses, and a small run of it all."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, is_installed
from contenders import planted, subject
from parallel_parnet import fold
from parallel_parnet.commands.bench import poster
from parallel_parnet.commands.bench.poster import QUOTED
from parallel_parnet.commands.bench.running import Entry
from parallel_parnet.commands.bench.subject import Contender, Subject
from parallel_parnet.commands.versus import command, measure
from parallel_parnet.commands.versus.page import TITLE, cells, section
from parallel_parnet.commands.versus.simulated import WHAT
from parallel_parnet.commands.versus.verdict import (
    SAME,
    crossover,
    pairs,
    relation,
    sentences,
    summary,
)
from small import OPTIONAL, SMALL, lively

MEASURED = sorted(ROOT.glob("results/versus-*.json"))
TIMES = st.floats(1.0, 1000.0).map(lambda t: round(t, 1))
PATTERN = re.compile(r"([\d.]+) [mu]s against ([\d.]+) \(([\d.]+)x, (faster|slower|about as fast)\)")


@st.composite
def rows(draw: st.DrawFn) -> dict:
    """Networks with made-up accuracies and times."""

    def row(i: int, ours: bool) -> dict:
        lanes, gpus = ({k: draw(TIMES) for k in "123"} for _ in range(2))
        threads = {"1": {"ms": lanes["1"]}, "2": {"ms": draw(TIMES)}}
        name, top1 = f"{'ParNet' if ours else 'Other'}-{i}", round(draw(st.floats(70, 80)), 2)
        return {
            "network": name, "ours": ours, "top1": top1, "threads": threads, "lanes_ms": lanes, "gpus_us": gpus,
        }  # fmt: skip

    return [row(i, True) for i in range(draw(st.integers(1, 4)))] + [row(i, False) for i in range(3)]


def says(mine: float, other: float) -> str:
    """By hand."""
    if mine > other * (1 + SAME):
        return "slower"
    return "faster" if other > mine * (1 + SAME) else "about as fast"


def first(mine: dict, other: dict) -> str | None:
    """By hand: the fewest lanes on which, and on all more, a ParNet is the faster one."""
    lanes = sorted(mine)
    return next((k for k in lanes if all(says(mine[m], other[m]) == "faster" for m in lanes if m >= k)), None)


@given(rows())
def test_words_follow_numbers(made: list[dict]) -> None:
    """Also of a file."""
    read = json.loads(json.dumps(made))
    assert sentences(read, 2) == sentences(made, 2)
    *texts, whole = sentences(made, 2)
    assert whole == summary(pairs(made))
    for (p, r), text in zip(pairs(made), texts, strict=True):
        times = [(p["threads"][k]["ms"], r["threads"][k]["ms"]) for k in ("1", "2")]
        times += [(p[key]["3"], r[key]["3"]) for key in ("lanes_ms", "gpus_us")]
        said = PATTERN.findall(text)
        assert [(float(a), float(b)) for a, b, *_ in said] == times
        assert [word for *_, word in said] == [says(*two) for two in times]
        for key, what in (("lanes_ms", "lanes"), ("gpus_us", "GPUs")):
            lanes = first(p[key], r[key])
            assert crossover(p[key], r[key]) == lanes
            when = "never faster on up to 3" if lanes is None else f"faster from {lanes} on"
            assert when in text.split(f"Simulated on 3 {what}")[1].split(". ")[0]
        assert ("No ParNet is as accurate" in text) == (max(q["top1"] for q in made if q["ours"]) < r["top1"])


@given(rows())
def test_who_is_held_against_whom(made: list[dict]) -> None:
    ours = [row for row in made if row["ours"]]
    for parnet, rival in pairs(made):
        able = [row["top1"] for row in ours if row["top1"] >= rival["top1"]]
        assert parnet["top1"] == (min(able) if able else max(row["top1"] for row in ours))


@given(rows())
def test_the_summary_follows_numbers(made: list[dict]) -> None:
    said = summary(pairs(made)).split(" On ")[1:]
    for key, what, text in zip(
        ("threads", "lanes_ms", "gpus_us"), ("threads", "simulated lanes", "simulated GPUs"), said, strict=True
    ):
        assert text.startswith(what)
        for p, r in pairs(made):
            mine, other = ({k: t["ms"] if key == "threads" else t for k, t in row[key].items()} for row in (p, r))
            lanes = first(mine, other)
            short = ", which is less accurate" if p["top1"] < r["top1"] else ""
            when = f"never (up to {max(mine)})" if lanes is None else f"from {lanes} on"
            assert f"{when} against {r['network']} ({p['network']}{short})" in text


def test_what_simulated_gpus_are_names_the_launch() -> None:
    """Which is added to the floor."""
    assert "and 1.3 us for the launch that a GPU's operations of one level share" in WHAT


def test_a_tie_is_no_victory() -> None:
    assert relation(100.0, 104.9).endswith("about as fast")
    assert relation(104.9, 100.0).endswith("about as fast")
    assert crossover({"1": 9.0, "2": 5.0, "3": 9.0}, {"1": 10.0, "2": 10.0, "3": 9.0}) is None, "no longer on three"
    assert crossover({"2": 9.0, "10": 5.0}, {"2": 10.0, "10": 10.0}) == "2", "ten are more than two"


def test_a_row_has_medians_and_the_fastest_peer() -> None:
    def entry(contender: Contender, *ms: float) -> Entry:
        return Entry(contender, subject(), latency=[t / 1e3 for t in ms])

    ours = [entry(measure.by_native(1), 4.0, 6.0, 20.0), entry(measure.by_native(2), 2.0, 3.0, 10.0)]
    peers = [entry(planted(name, 0), ms, ms, ms) for name, ms in (("slow", 9.0), ("quick", 5.0), ("fair", 7.0))]
    found = measure.row_of(QUOTED[4], [*ours, *peers])
    assert {threads: row["ms"] for threads, row in found["threads"].items()} == {"1": 6.0, "2": 3.0}
    assert found["peer"] == "quick" and found["peers"]["fair"]["ms"] == 7.0 and found["lanes_ms"]["1"] == 6.0


def test_groups_hold_every_network_once_with_its_rival() -> None:
    groups = [[q.name for q in own] for own in measure.group(QUOTED)]
    assert sorted(name for own in groups for name in own) == sorted(q.name for q in QUOTED)
    assert ["parnet_l", "resnet50", "repvgg_b1g4"] in groups and ["parnet_xl", "repvgg_b2g4"] in groups


@pytest.mark.skipif("native" not in OPTIONAL, reason="the CPU kernels were not compiled")
@pytest.mark.skipif(not is_installed("matplotlib"), reason="matplotlib is not installed")
def test_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the networks, on small pictures."""
    table = [quoted for quoted in QUOTED if quoted.name in ("parnet_s", "resnet34")]
    monkeypatch.setattr(command, "QUOTED", table)
    monkeypatch.setattr(poster, "SIZE", 64)
    monkeypatch.setattr(measure, "PEERS", measure.PEERS[:1])
    files = tmp_path / "versus.json", tmp_path / "versus.svg"
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Log\nWhat was tried.\n")
    arguments = ["--json", str(files[0]), "--figure", str(files[1]), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["versus", "--budget", "0.1", *arguments])
    assert command.main() == 0
    written, out = json.loads(files[0].read_text()), capsys.readouterr().out
    assert [row["network"] for row in written["rows"]] == ["ResNet-34", "ParNet-S"]
    cores = written["header"]["threads"]
    assert written["sentences"] == sentences(written["rows"], cores)
    assert all(sentence in out for sentence in written["sentences"])
    for row in written["rows"]:
        assert row["threads"].keys() == {"1", str(cores)}
        assert row["lanes_ms"]["1"] == row["threads"]["1"]["ms"] >= row["lanes_ms"]["3"] > 0
        assert row["peers"][row["peer"]]["ms"] == min(peer["ms"] for peer in row["peers"].values())
    assert json.loads(out.splitlines()[-1])["compared"] == {"ResNet-34": "ParNet-S"}
    assert "ResNet-34" in files[1].read_text()
    text = page.read_text()
    assert text.index(TITLE) < text.index("## Log") and all(s in " ".join(text.split()) for s in written["sentences"])
    assert section(written["header"], written["rows"], written["sentences"], "versus.json", "versus.svg") in text


def test_no_other_library_at_hand(tmp_path: Path) -> None:
    network = lively(SMALL, 0)
    subject = Subject("small", network, network, fold(network), 64, 1, measure.CPU, torch.float32, 2)
    ours = [Entry(measure.by_native(threads), subject, latency=[0.1, 0.1, 0.1]) for threads in (1, 2)]
    row = measure.row_of(QUOTED[0], ours)
    assert (row["peer"], row["peers"]) == (None, {}) and "none" in cells(row)
    if is_installed("matplotlib"):
        from parallel_parnet.commands.versus.picture import draw

        draw([row], {"threads": 2, "machine": "a machine"}, tmp_path / "a.svg")


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_what_was_measured_and_the_page_that_quotes_it(path: Path) -> None:
    """The page says what the numbers say."""
    found = json.loads(path.read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    assert found["sentences"] == sentences(found["rows"], found["header"]["threads"])
    assert found["header"]["isa"] and found["header"]["load_before"] < 1
    files = f"../results/{path.name}", f"../results/{path.stem}.svg"
    assert section(found["header"], found["rows"], found["sentences"], *files) in page
