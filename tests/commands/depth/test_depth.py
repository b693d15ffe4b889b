"""The experiment: its families, its fit on data with a known answer, and a run that is interrupted and resumed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, launch
from parallel_parnet import Engine, ParNetError, Placement, create_model, fold
from parallel_parnet.commands.bench.poster_networks import PEERS
from parallel_parnet.commands.depth import command, measure
from parallel_parnet.commands.depth.busiest import brent, busiest
from parallel_parnet.commands.depth.claims import claims
from parallel_parnet.commands.depth.command import Log
from parallel_parnet.commands.depth.curves import STYLES, draw
from parallel_parnet.commands.depth.fit import fit
from parallel_parnet.commands.depth.page import write_page
from parallel_parnet.commands.depth.points import Point, one_stream, points
from parallel_parnet.commands.plan.measured import find_link
from parallel_parnet.executors.available import METHODS
from parallel_parnet.program.families import parallel_chains
from small import relative

POINT = Point("depth", "4 blocks in 2", lambda: parallel_chains(4, 2, 8, 32), depth=4, streams=2, size=32)


def test_arrangements_differ_in_depth_alone() -> None:
    programs = {k: parallel_chains(24, k, 8, 32) for k in (1, 2, 3, 4, 6, 8, 12, 24)}
    assert {k: p.depth for k, p in programs.items()} == {k: 24 // k + 2 for k in programs}
    flops = [p.cost().flops for p in programs.values()]
    assert max(flops) < 1.001 * min(flops)
    assert all(p.streams == k for k, p in programs.items())
    with pytest.raises(ParNetError, match="must divide"):
        parallel_chains(24, 5, 8, 32)


def test_arrangements_run_on_lanes() -> None:
    program = parallel_chains(12, 4, 8, 32)
    x = torch.randn(2, 3, 32, 32)
    alone = Engine(program, executor="reference", device="cpu")(x)
    lanes = Engine(program, Placement.by_streams(program, 4), "cpu", executor="eager")(x)
    assert relative(lanes, alone) < 1e-5
    assert alone.std() > 0.01


def test_one_stream_matches_three() -> None:
    for name in ("parnet_s", "parnet_xl"):
        with torch.device("meta"):
            one, three = (fold(create_model(config).eval()) for config in (one_stream(name), name))
        assert one.depth == three.depth == 12
        assert one.streams == 1
        assert one.cost().flops == pytest.approx(three.cost().flops, rel=0.02)


def test_points_tell_the_truth() -> None:
    for group in points(quick=True).values():
        for point in group:
            network = point.build()
            if point.network not in PEERS:
                assert network.depth == point.depth
                assert network.streams == point.streams


def test_the_busiest_lane() -> None:
    """One lane has all operations; with a lane for each stream there is one a level; two have half of four chains."""
    program = parallel_chains(24, 4, 8, 32)
    whole = program.cost(32, 1).flops / 1e9
    alone, two, all_of_them = (busiest(program, 32, 1, lanes) for lanes in (1, 2, 99))
    assert (alone.steps, two.steps, all_of_them.steps) == (26, 2 * 6 + 2, program.depth)
    assert alone.gflops == pytest.approx(whole)
    block = next(row.flops / 1e9 for row in program.cost(32, 1).operations if row.name == "streams.0.0")
    assert alone.gflops - two.gflops == pytest.approx(12 * block)
    assert alone.gflops - all_of_them.gflops == pytest.approx(18 * block)


def test_brents_bounds() -> None:
    """Ten milliseconds, of which a tenth is one after another, on two lanes: half, or half and half of that tenth."""
    assert brent(10, 0.1, 2) == pytest.approx((5, 5.5))
    assert brent(10, 0.8, 4) == pytest.approx((8, 2.5 + 6))
    assert brent(10, 1, 1) == pytest.approx((10, 10))


def family(executor: str, lanes: int, times: dict[int, float], one_lane: float | None = None) -> list[dict]:
    return [
        {"group": "depth, width 16", "executor": executor, "lanes": lanes, "streams": k, "depth": 48 // k + 2,
         "median_ms": ms, "one_lane_ms": one_lane} for k, ms in times.items()
    ]  # fmt: skip


def test_words_follow_the_numbers() -> None:
    """The claim holds where two lanes nearly halve the time, in part where they gain less, and not where nothing."""
    (one,) = claims(family("eager", 1, {1: 5, 2: 5, 24: 5.1}))
    assert one.endswith("5.10 ms in 24 of depth 4, speed-up 0.98x: latency follows work, not depth.")
    (two,) = claims(family("native", 2, {1: 2, 2: 1.1, 24: 1.2, 48: 1.3}))
    assert "2.00 ms in one stream of depth 50, 1.10 ms in 2 of depth 26, speed-up 1.82x: latency follows" in two
    assert two.endswith("depth, up to the number of lanes. With more streams than lanes: 1.20 to 1.30 ms.")
    for lanes, times, words in (
        (2, {1: 2, 2: 1.5, 4: 1}, "speed-up 1.33x: latency follows depth in part"),
        (4, {1: 3.8, 2: 3, 3: 2, 4: 2}, "speed-up 1.90x: latency follows depth in part"),
        (2, {1: 2, 2: 1.9, 4: 1}, "speed-up 1.05x: the claim does not hold"),
    ):
        assert words in claims(family("native", lanes, times, one_lane=times[1]))[0]
    assert "one stream already fills the lanes" in claims(family("native", 2, {1: 2, 2: 1.9, 4: 1.9}, one_lane=3.6))[0]


@pytest.mark.parametrize("seed", range(3))
def test_fit_recovers_known_coefficients(seed: int) -> None:
    rng = np.random.default_rng(seed)
    depth, work = rng.uniform(4, 50, 60), rng.uniform(0.1, 5, 60)
    exact = 0.2 * depth + 3.0 * work + 1.0
    found = fit(depth, work, exact)
    assert (found.a, found.b, found.c) == pytest.approx((0.2, 3.0, 1.0), rel=1e-6)
    assert found.r2 == pytest.approx(1)
    assert found.share_steps + found.share_work == pytest.approx(found.r2)
    assert found.crossover == pytest.approx(0.2 / 3.0, rel=1e-6)
    noisy = fit(depth, work, exact * rng.normal(1, 0.05, 60))
    assert noisy.a_interval[0] < noisy.a < noisy.a_interval[1]
    assert noisy.a == pytest.approx(0.2, rel=0.2)
    assert noisy.b == pytest.approx(3.0, rel=0.1)


def test_fit_tells_depth_from_work() -> None:
    rng = np.random.default_rng(0)
    depth, work = rng.uniform(4, 50, 60), rng.uniform(0.1, 5, 60)
    by_depth, by_work = fit(depth, work, depth + 1.0), fit(depth, work, work + 1.0)
    assert by_depth.share_steps > 0.95
    assert by_depth.crossover is None or by_depth.crossover > 1e6
    assert by_work.share_work > 0.9


def test_fits_that_cannot_be() -> None:
    with pytest.raises(ParNetError, match="four or more"):
        fit([1, 2, 3], [1, 2, 3], [1, 2, 3])
    with pytest.raises(ParNetError, match="not together"):
        fit([1, 2, 3, 4, 5], [2, 4, 6, 8, 10], [1, 2, 3, 4, 5])
    for time in (0.0, float("nan"), float("inf")):
        with pytest.raises(ParNetError, match="positive time"):
            fit([1, 2, 3, 4, 5], [2, 3, 9, 8, 10], [1, 2, time, 4, 5])


def test_a_network_runs_as_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []
    monkeypatch.setattr(measure, "Engine", lambda program, **options: asked.append(options) or str)
    options = {"executor": "native", "device": torch.device("cpu"), "dtype": torch.bfloat16, "threads": 1}
    measure.prepare(POINT, **options)
    assert asked == [options]


def test_lanes_of_the_kernels_share_what_one_thread_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the work of a lane that has most of it."""
    program, cpu = POINT.build(), torch.device("cpu")
    monkeypatch.setattr(command, "prepare", lambda point, *_, **__: measure.Subject(point, str, program))
    monkeypatch.setattr(command, "interleaved", lambda *_: [[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])
    (row,) = command.measure_group([POINT], "native", cpu, torch.float32, find_link("peer"), 1.0)
    assert (row["median_ms"], row["one_lane_ms"], row["n"]) == (2.0, 4.0, 3)
    share = busiest(program, 32, 1, lanes=2).gflops / (program.cost(32).flops / 1e9)
    assert share < 0.7 and row["lanes_ms"] == pytest.approx(4.0 * share, abs=1e-4)


def test_a_run_resumes(tmp_path: Path) -> None:
    quick = ("--quick", "--device", "cpu", "--executors", "eager", "--out", tmp_path)
    launch("latency_vs_depth.py", *quick, "--only", "by width")
    (file,) = tmp_path.glob("*.json")
    before = json.loads(file.read_text())["rows"]
    assert len(before) == 5
    again = launch("latency_vs_depth.py", *quick, "--only", "work")  # the same group, and another
    after = json.loads(file.read_text())["rows"]
    assert after[:5] == before
    assert len(after) == 5 + 5
    assert json.loads(again.stdout.splitlines()[-1])["rows"] == len(after)
    page = next(tmp_path.glob("*.md")).read_text()
    assert "not measured" in page
    for figure in tmp_path.glob("*.svg"):
        assert figure.name in page
    assert all(row["median_ms"] > 0 and row["lanes_ms"] <= row["sum_ms"] * 1.001 for row in after)
    file.write_text("{")
    refused = launch("latency_vs_depth.py", *quick, status=2)
    assert "no result of this experiment" in refused.stderr


STORED = ROOT / "results" / "latency-vs-depth-2-core-x86-64-avx512-float32.json"
PAGE = ROOT / "docs" / "latency-vs-depth.md"
HEADER = {"machine": "a", "date": "2026-01-01", "cpu": "fast", "isa": "avx2", "sources_digest": "1", "commit": "c"}
ROW = {"group": "g", "executor": "eager"}


def test_rows_keep_the_day_they_were_measured_on(tmp_path: Path) -> None:
    file, later = tmp_path / "log.json", HEADER | {"date": "2026-01-03", "commit": "d"}
    Log(file, HEADER).add([ROW])
    again = Log(file, later)
    assert again.header == HEADER and again.rows == [ROW] and not again.foreign
    again.add([ROW | {"group": "h"}])
    assert Log(file, later).header == HEADER | {"date": "2026-01-01 to 2026-01-03"}


@pytest.mark.parametrize("key", ["cpu", "isa", "sources_digest"])
def test_what_was_measured_elsewhere_is_read_and_not_added_to(key: str, tmp_path: Path) -> None:
    """Also where an older file does not tell."""
    file = tmp_path / "log.json"
    for old, told in ((HEADER | {key: "slow"}, "slow"), ({k: HEADER[k] for k in HEADER if k != key}, "not told")):
        file.write_text(json.dumps({"header": old, "rows": [ROW]}))
        log = Log(file, HEADER)
        assert log.foreign.startswith(f"its {key} is {told}, and {HEADER[key]} here") and log.rows == [ROW]
        assert log.header == old


def test_a_file_of_before_makes_its_page_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says why it is not continued."""
    stored = json.loads(STORED.read_text())
    header = {**stored["header"], "machine": command.machine(torch.device("cpu")), "torch": torch.__version__}
    rows = [row for row in stored["rows"] if "published" in row["group"]]
    file = tmp_path / f"latency-vs-depth-{command.slug(header['machine'])}-float32.json"
    file.write_text(json.dumps({"header": header, "rows": rows}))
    words = ["latency_vs_depth.py", "--device", "cpu", "--out", str(tmp_path), "--only", "published", "--executors"]
    monkeypatch.setattr(sys, "argv", [*words, "eager"])
    assert command.main() == 0
    said = capsys.readouterr().err
    assert f"all is there already, of {header['date']}: nothing is measured" in said and "note: its " in said
    assert f"Measured on {header['date']} on" in next(tmp_path.glob("*.md")).read_text()
    monkeypatch.setattr(sys, "argv", [*words, "inductor"])
    with pytest.raises(ParNetError, match=r"not continued: its .* here; move it away to measure anew"):
        command.main()


def test_a_page_says_how_to_make_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere too, with other defaults, and where its results are there already; and what it lacks."""
    stored = json.loads(STORED.read_text())
    header = stored["header"] | {"dtype": "bfloat16", "quick": True, "threads": 3}
    rows = [row for row in stored["rows"] if row["executor"] != "openvino" and row["group"] != "published"]
    write_page(tmp_path / "page.md", rows, header, {})
    page = (tmp_path / "page.md").read_text()
    folder, line = page.split("```\n")[1].splitlines()
    threads, _, script, *words = line.split()
    assert (folder, threads, script) == ("mkdir again", "OMP_NUM_THREADS=3", "launch/latency_vs_depth.py")
    monkeypatch.setattr(sys, "argv", [script, *words])
    args = command.parse_arguments()
    assert (args.device, args.dtype, args.quick, args.out) == ("cpu", "bfloat16", True, Path("again"))
    assert args.executors == ["eager", "native"] and "Not measured yet with native: published." in page
    write_page(tmp_path / "page.md", stored["rows"], stored["header"], {})
    command_of = [text.split("```\n")[1] for text in ((tmp_path / "page.md").read_text(), PAGE.read_text())]
    assert command_of[0] == command_of[1]


@pytest.mark.parametrize(
    ("group", "sections", "line"),
    [
        ("batch", ["In numbers"], "batch: 16x the work at depth 10 multiplies latency by: eager 4.9, native 10.7"),
        ("resolution", ["In numbers"], "resolution: 25x the work"),
        ("published", ["The published networks"], "| parnet_s | 12 |"),
        ("depth, width 16", ["The claim"], "- depth, width 16, eager, 1 lane:"),
    ],
)
def test_a_page_shows_what_was_measured_alone(group: str, sections: list[str], line: str, tmp_path: Path) -> None:
    """As after --only."""
    stored = json.loads(STORED.read_text())
    write_page(tmp_path / "page.md", [r for r in stored["rows"] if r["group"] == group], stored["header"], {})
    page = (tmp_path / "page.md").read_text()
    assert re.findall("## (.*)", page) == sections and line in page


def test_every_executor_can_be_drawn(tmp_path: Path) -> None:
    """By a style of its own; also what runs on GPUs by itself, where nothing else was measured."""
    assert STYLES.keys() >= METHODS.keys() and len({(s["color"], s["marker"]) for s in STYLES.values()}) == len(STYLES)
    stored = json.loads(STORED.read_text())
    groups = ("depth, width 16", "work by streams")
    rows = [r for r in stored["rows"] if r["executor"] == "openvino" and r["group"].startswith(groups)]
    rows = [row | {"executor": "cuda_graph", "lanes": row["streams"]} for row in rows]
    figures = draw(rows, stored["header"], tmp_path, "gpu")
    assert figures.keys() == {"depth", "work"}
    write_page(tmp_path / "page.md", rows, stored["header"], figures)
    assert "--executors cuda_graph" in (tmp_path / "page.md").read_text()
