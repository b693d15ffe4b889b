"""What a batch costs: words held to numbers, what is refused, and a small run of it all with a planted peer."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, is_installed
from contenders import HEADER as RATES
from contenders import QUIET, planted, subject
from parallel_parnet import ParNetError
from parallel_parnet.commands.bench.measure import contenders
from parallel_parnet.commands.bench.subject import Contender, Runner, Subject
from parallel_parnet.commands.sections import placed
from parallel_parnet.commands.throughput import command
from parallel_parnet.commands.throughput import measure as measuring
from parallel_parnet.commands.throughput.words import NEXT, TITLE, cells, number, section, sentences

POSSIBLE = RATES["possible"]
SUBJECT = subject()
HEADER = {
    "model": "parnet_s", "size": 224, "dtype": "float32", "machine": "2-core", "cpu": "a CPU", "threads": 2,
    "date": "2026-01-01T00:00:00", "parameters_m": 8.0,
}  # fmt: skip
MEASURED = sorted(ROOT.glob("results/throughput-*.json"))
GROWTH = re.compile(
    r"from batch (\d+) to (\d+), throughput goes from ([\d.]+) to ([\d.]+) pictures/s \(([\d.]+)x\) and latency from "
    r"([\d.]+) to ([\d.]+) ms \(([\d.]+)x\); the peak is ([\d.]+) pictures/s at batch (\d+), of which batch \1 reaches "
    r"(\d+)%"
)
RATIOS = {"ours faster": (0.8, 0.7, 0.9), "ours slower": (1.2, 1.1, 1.3), "no difference shown": (1.0, 0.9, 1.1)}


@pytest.fixture(autouse=True)
def _no_golden_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which take seconds, and have tests of their own."""
    monkeypatch.setattr(measuring, "prove_golden", lambda: None)


def row(name: str, batch: int, ms: float, **more: object) -> dict:
    return {
        "contender": name, "ours": name.startswith("ours"), "infer_batch_size": batch, "infer_step_time": ms,
        "infer_samples_per_sec": round(1e3 * batch / ms, 3), "n": 20, "unstable": [], **more,
    }  # fmt: skip


@st.composite
def results(draw: st.DrawFn) -> dict:
    """Made-up times and verdicts; two batches at least."""
    found = []
    for batch in sorted(draw(st.sets(st.integers(1, 64), min_size=2, max_size=6))):
        mine, *peers = (draw(st.floats(0.5, 5000).map(lambda ms: round(ms, 3))) for _ in range(3))
        told = RATIOS[draw(st.sampled_from(sorted(RATIOS)))]
        rows = [
            row("ours: native", batch, mine),
            *(row(f"peer {i}", batch, ms, ratio=told) for i, ms in enumerate(peers)),
        ]
        found.append({"batch": batch, "rows": rows})
    return {"header": HEADER, "batches": found}


@given(results())
def test_words_follow_numbers(made: dict) -> None:
    said = sentences(json.loads(json.dumps(made)))
    for ours, text in zip((True, False), said[:2], strict=True):
        rows = [min((r for r in b["rows"] if r["ours"] == ours), key=lambda r: r["infer_step_time"])
                for b in made["batches"]]  # fmt: skip
        speeds, times = ([r[key] for r in rows] for key in ("infer_samples_per_sec", "infer_step_time"))
        most = speeds.index(max(speeds))
        (found,) = GROWTH.findall(text)
        assert found == (
            str(rows[0]["infer_batch_size"]), str(rows[-1]["infer_batch_size"]), number(speeds[0]), number(speeds[-1]),
            f"{speeds[-1] / speeds[0]:.2f}", number(times[0]), number(times[-1]), f"{times[-1] / times[0]:.2f}",
            number(speeds[most]), str(rows[most]["infer_batch_size"]), f"{speeds[0] / speeds[most]:.0%}"[:-1],
        )  # fmt: skip
    verdict = said[2].removeprefix("ParNet-S against the best peer: ").removesuffix(".")
    told = {
        batch: part.split(" at batch ")[0]
        for part in verdict.split("; ")
        for batch in re.findall(r"\d+", part.split(" at batch ")[1])
    }
    names = {ratio: name for name, ratio in RATIOS.items()}
    assert told == {str(b["batch"]): names[b["rows"][1]["ratio"]] for b in made["batches"]}


@given(results())
def test_the_section_has_every_row_and_sentence(made: dict) -> None:
    text = section([made], ["made.json"], "made.svg")
    assert all(f"| {' | '.join(row)} |" in text for row in cells(made))
    assert all(sentence in " ".join(text.split()) for sentence in sentences(made))
    assert "[ParNet-S](made.json)" in text and "](made.svg)" in text


def test_few_runs_and_no_peer_claim_nothing() -> None:
    few = row("a peer", 4, 20.0, ratio=RATIOS["ours faster"]) | {"n": 7}
    batches = [
        {"batch": 2, "rows": [row("ours: native", 2, 8.0)]},
        {"batch": 4, "rows": [row("ours: native", 4, 15.0), few]},
    ]
    said = sentences({"header": HEADER, "batches": batches})
    assert said[-1] == "ParNet-S against the best peer: no peer ran at batch 2; too few runs to say at batch 4."
    assert "the best peer at each batch: 200.0 pictures/s at batch 4." in said[1]


def test_a_section_is_put_in_its_place_and_replaced() -> None:
    page = "# Page\n\n## Other\ntext\n\n## Log\nentries\n"
    once = placed(page, TITLE, f"{TITLE}\n\nfirst \\1\n", NEXT)
    assert once == "# Page\n\n## Other\ntext\n\n## What a batch costs\n\nfirst \\1\n\n## Log\nentries\n"
    assert placed(once, TITLE, f"{TITLE}\n\nsecond\n", NEXT) == once.replace("first \\1", "second")
    with pytest.raises(ParNetError, match="neither a section"):
        placed("# Page\n", TITLE, "text", NEXT)


SECONDS = {"ours: eager": 1.0, "ours: x": 1.0, "right": 0.5, "near": 0.62, "slow": 0.63, "mixed": 0.5, "either": 0.5}


def mixed(name: str, is_ours: bool = False) -> Contender:
    """The network itself, with pictures of a batch in another's place."""

    def build(subject: Subject) -> Runner:
        return Runner(lambda x: subject.network(x).roll(1, 0), "planted", "float32")

    return Contender(name, is_ours, build)


def test_who_is_raced_and_who_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    far_alone = {("either", 1): 0.7}  # at one batch
    seconds = lambda entry: far_alone.get((entry.name, entry.subject.batch), SECONDS[entry.name])  # noqa: E731
    monkeypatch.setattr(measuring, "_seconds", seconds)
    (eager,) = contenders(["ours: eager"])
    chosen = [eager, *(planted(name, 0) for name in ("right", "near", "slow", "either")), mixed("mixed")]
    found = measuring.measure(SUBJECT, [1, 2, 3], chosen, 1e3, POSSIBLE, QUIET)
    assert [one["batch"] for one in found] == [1, 2, 3]
    assert found[1]["missing"].pop("slow") == "not set up: over 1.25 times the fastest peer's time at batch 3 and 1"
    assert "over 1.25 times the fastest peer's" in found[0]["missing"]["slow"]
    assert "over 1.25 times the fastest peer's" in found[2]["missing"]["slow"]
    for one in found:
        names = {r["contender"] for r in one["rows"]}
        assert {"ours: eager", "right", "near"} == names - {"mixed", "either"}
        assert ("either" in names) == (one["batch"] > 1), "who is near at one of the first two is set up for the others"
        for r in one["rows"]:
            assert r["n"] == measuring.MOST and r["infer_batch_size"] == one["batch"]
    assert found[0]["disagree"] == {} and "logits off by" in found[2]["disagree"]["mixed"]
    (tight,) = measuring.measure(SUBJECT, [3], chosen, 1.0, POSSIBLE, QUIET)
    assert {r["contender"]: r["n"] for r in tight["rows"]} == dict.fromkeys(("ours: eager", "right"), measuring.LEAST)
    assert "620.0 ms a pass; the fastest peer's took 500.0, and the budget is not enough" in tight["missing"]["near"]
    with pytest.raises(ParNetError, match="nothing of ours runs: none was chosen"):
        measuring.measure(SUBJECT, [1], [planted("right", 0)], 0.01, POSSIBLE, QUIET)
    with pytest.raises(ParNetError, match="parity fails"):
        measuring.measure(SUBJECT, [2], [mixed("ours: x", is_ours=True)], 0.01, POSSIBLE, QUIET)


def test_a_budget_is_spent_by_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, float]] = []
    monkeypatch.setattr(measuring, "_race", lambda subject, _, share, *rest: given.append((subject.batch, share)) or [])
    measuring.measure(SUBJECT, [1, 3], [], 8.0, POSSIBLE, QUIET)
    assert given == [(3, 6.0), (1, 8.0)], "what one leaves, the next may use"


@pytest.mark.skipif(not is_installed("matplotlib"), reason="matplotlib is not installed")
def test_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the measurement to the page."""
    monkeypatch.setattr(command, "subject_from", lambda args, *_: replace(SUBJECT, batch=args.batch_size))
    monkeypatch.setattr(command, "possible", lambda device, dtype: POSSIBLE)
    arguments = ["--batches", "2", "1", "--budget", "0.01", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments, "--only", "ours: eager", "eager, fused"])
    assert command.main() == 0
    (file,) = tmp_path.glob("throughput-small-64-fp32-*.json")
    out, written = capsys.readouterr().out, command.read(file)
    assert written["sentences"] == sentences(written) and all(text in out for text in written["sentences"])
    assert [one["batch"] for one in written["batches"]] == [1, 2]
    last = json.loads(out.splitlines()[-1])
    assert last["results"] == str(file) and last["failed"] == []
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Log\n")
    monkeypatch.setattr(sys, "argv", ["throughput", "--out", str(tmp_path), "--device", "cpu", "--page", str(page)])
    assert command.main() == 0
    figure = next(tmp_path.glob("throughput-*.svg"))
    assert figure.with_suffix(".png").is_file() and "batch 1" in figure.read_text()
    assert section([written], [file.name], figure.name) in page.read_text()


def test_the_status_tells_that_one_of_ours_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At one batch of several."""
    found = [
        {"batch": batch, "rows": [row("ours: eager", batch, 5.0)], "missing": {}, "disagree": {}, "failed": failed}
        for batch, failed in ((1, []), (2, ["ours: native"]))
    ]
    monkeypatch.setattr(command, "subject_from", lambda args, *_: replace(SUBJECT, batch=args.batch_size))
    monkeypatch.setattr(command, "possible", lambda device, dtype: POSSIBLE)
    monkeypatch.setattr(command, "measure", lambda *_: found)
    words = ("--batches", "1", "2", "--device", "cpu", "--out", str(tmp_path), "--only", "ours: eager")
    monkeypatch.setattr(sys, "argv", ["throughput", *words])
    assert command.main() == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["ours: native"]


def test_no_results_to_write(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("## Log\n")
    with pytest.raises(ParNetError, match="run make throughput first"):
        command.write_page(page, tmp_path, "here")
    (tmp_path / "throughput-x-here.json").write_text("{}")
    with pytest.raises(ParNetError, match=r"no result of launch/throughput.py \('header'\)"):
        command.write_page(page, tmp_path, "here")


def test_the_page_says_what_was_measured() -> None:
    """The section is that of the results of one machine, and theirs alone; there is none without results."""
    page = (ROOT / "docs" / "performance.md").read_text()
    found = re.findall(r"\]\(\.\./(results/throughput-[^)]*\.json)\)", page)
    assert bool(MEASURED) == bool(found)
    for path in MEASURED:
        assert command.read(path)["sentences"] == sentences(command.read(path))
    if found:
        (figure,) = re.findall(r"\]\((\.\./results/throughput-[^)]*\.svg)\)", page)
        made = [command.read(ROOT / file) for file in found]
        assert section(made, [f"../{file}" for file in found], figure) in page
        assert all((ROOT / "docs" / figure).with_suffix(suffix).is_file() for suffix in (".svg", ".png"))
