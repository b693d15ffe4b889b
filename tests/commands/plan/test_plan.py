"""launch/plan.py, --placement auto and the words and bars of a schedule, as users meet them."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from conftest import answered, launch
from parallel_parnet import ParNetError, Placement, create_model, fold
from parallel_parnet.commands import engine_arguments
from parallel_parnet.commands.engine_arguments import place, type_of
from parallel_parnet.commands.infer import links
from parallel_parnet.commands.plan import command, measured
from parallel_parnet.commands.plan.measured import find_link
from parallel_parnet.commands.ranks import Ranks
from parallel_parnet.planning.costs import H200, LINKS, Costs, Measured
from parallel_parnet.planning.explain import duration, gantt
from parallel_parnet.planning.planner import schedule
from parallel_parnet.program.program import INPUT
from small import SMALL

PARNET = fold(create_model(SMALL))


def test_bars() -> None:
    """Operations take 1, transfers 2: a character for each second."""
    costs = Costs(dict.fromkeys(PARNET.by_name, 1.0), dict.fromkeys([INPUT, *PARNET.by_name], 2.0))
    result = schedule(PARNET, Placement.by_streams(PARNET, 3), costs)
    assert result.makespan == 18
    lines = [line[10:] for line in gantt(result, width=36).splitlines()]
    assert lines[1] == "|s|s|0|0|0|0|f" + "." * 10 + "|f....|f|f|h"
    assert lines[2] == ">>>1>>>2"
    assert lines[3] == "...." + "|s|s|s|1|1|1|1|1" + "." * 16
    assert lines[4] == " " * 20 + ">>>0"
    assert lines[5] == "." * 8 + "|s|s|s|s|2|2|2|2|2" + "." * 10
    assert lines[6] == " " * 26 + ">>>0"


def test_a_launch_of_several_operations_shows_them_all() -> None:
    costs = Costs(dict.fromkeys(PARNET.by_name, 1.0), dict.fromkeys([INPUT, *PARNET.by_name], 2.0), grouped=True)
    result = schedule(PARNET, Placement.single(PARNET), costs)
    assert gantt(result, width=92).splitlines()[1][10:].startswith("|sss|sss|s0s0s0s|s01s01s01s0|012012012")


def test_durations() -> None:
    assert [duration(t) for t in (2.5, 0.0314, 71.48e-6, 2e-7)] == ["2.5 s", "31.4 ms", "71.5 us", "0.2 us"]


def test_plan(tmp_path: Path) -> None:
    figure = tmp_path / "plan.svg"
    run = launch("plan.py", "--model", "parnet_xl", "--gpus", 3, "--link", "peer", "--figure", figure, "--json", "-")
    result = json.loads(run.stdout.splitlines()[-1])
    best = result["best"]
    assert best["lanes"] == 3
    assert best["speed_up"] > 1.3
    assert best["bounds_s"]["lower"] <= best["makespan_s"] <= result["runner_up"]["makespan_s"]
    assert best["critical_path"][-1]["end_s"] == best["makespan_s"]
    assert "3 lanes over peer" in run.stderr
    assert "is on the critical path" in run.stderr
    assert "computed, not measured" in run.stderr
    assert figure.read_text().lstrip().startswith("<?xml")


def test_plan_with_times_of_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    run = launch("plan.py", "--device", "measured", "--gpus", 2, "--exactly", "--link", "1us,100GB/s", "--json", out)
    assert "lane 1" in run.stdout
    assert json.loads(out.read_text())["best"]["lanes"] == 2


def test_options_reach_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, asked = command.costs_of, []

    def planted(program: object, costs: object, gpus: int, exactly: bool) -> None:
        asked.append((gpus, exactly))
        raise ParNetError("as planted")

    monkeypatch.setattr(command, "costs_of", lambda *given: asked.append(given[1:]) or costs(*given))
    monkeypatch.setattr(command, "search", planted)
    words = "--gpus 2 --exactly --link 3us,100GB/s --efficiency 0.5 --img-size 64 -b 4 --dtype bf16"
    monkeypatch.setattr(sys, "argv", ["plan.py", *words.split()])
    with pytest.raises(ParNetError, match="as planted"):
        command.main()
    assert asked == [("3us,100GB/s", "h200", 0.5, 64, 4, "bf16", "auto"), (2, True)]


def test_costs_are_of_what_was_asked_for() -> None:
    found, lane = command.costs_of(PARNET, "peer", "h200", 0.5, 64, 4)
    assert lane == H200.at(0.5) and found == Costs.of(PARNET, H200.at(0.5), LINKS["peer"], 64, 4, itemsize=2)


def test_what_rank_0_measured_is_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all ranks, and by the executor that will run."""
    seconds = {name: (1 + i) * 1e-4 for i, name in enumerate(PARNET.by_name)}
    asked, cpu, link = [], torch.device("cpu"), find_link("peer")
    monkeypatch.setattr(measured, "measure", lambda *given: asked.append(given) or Measured("m", seconds, ""))
    monkeypatch.setattr(measured, "announce", lambda numbers, source: numbers)

    def planted(program: object, costs: Costs, lanes: int, **options: bool) -> SimpleNamespace:
        asked.append((costs.work, lanes, options))
        return SimpleNamespace(best=SimpleNamespace(placement="found"))

    monkeypatch.setattr(measured, "search", planted)
    ranks = Ranks(0, 2, 0, 2)
    assert measured.plan_for_ranks(PARNET, ranks, cpu, torch.bfloat16, 64, 3, link, "eager") == "found"
    measured_with, (used, lanes_used, options) = asked
    assert measured_with == (PARNET, cpu, torch.bfloat16, 64, 3, "eager")
    assert used == pytest.approx(seconds) and (lanes_used, options["exactly"]) == (2, True)


def test_a_lane_of_this_machine_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so, since the search gives each lane a core of its own, whatever there is."""
    threads = []

    def timed(*_: object) -> Measured:
        threads.append(torch.get_num_threads())
        return Measured("measured cpu", dict.fromkeys(PARNET.by_name, 1e-3), "by hand")

    monkeypatch.setattr(measured, "measure", timed)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(3)
    costs, _ = command.costs_of(PARNET, "1us,100GB/s", "measured")
    assert torch.get_num_threads() == 3
    assert threads == [1]
    assert any("each lane is taken to have a core, of which" in source for source in costs.sources)


@pytest.mark.parametrize("executor", ["native", "openvino"])
def test_executors_of_cpus_are_measured_there_on_any_machine(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = Measured("measured cpu", dict.fromkeys(PARNET.by_name, 1e-3), "by hand")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "on_a_thread", lambda *_: lane)
    assert command.lane_here(PARNET, torch.float32, None, 1, executor).seconds == lane.seconds


def lane_placement(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> tuple[Placement | None, str]:
    """The placement, and what was said."""
    said = io.StringIO()
    return place(PARNET, args, ranks, device, Console(file=said, width=200)), said.getvalue()


@pytest.mark.parametrize(("k", "lanes"), [(None, 3), (1, 3), (2, 2), (3, 1)])
def test_cuda_streams_are_as_many_as_streams_per_gpu_ask_for(k: int | None, lanes: int) -> None:
    args = argparse.Namespace(placement="streams", streams_per_gpu=k, executor="cuda_streams", strict=False)
    placement, note = lane_placement(args, Ranks(0, 1, 0, 1), torch.device("cuda"))
    assert placement == Placement.by_streams(PARNET, lanes) and not note


def test_one_process_takes_several_gpus_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    args = argparse.Namespace(placement="streams", streams_per_gpu=None, executor="auto", strict=False)
    for asked, expected in (
        ({}, None),
        ({"streams_per_gpu": 1}, Placement.by_streams(PARNET, 3)),
        ({"executor": "cuda_graph"}, Placement.by_streams(PARNET, 3)),
    ):
        chosen = argparse.Namespace(**vars(args) | asked)
        placement, note = lane_placement(chosen, Ranks(0, 1, 0, 1), torch.device("cuda"))
        assert placement == expected and ("one of 3 GPUs" in note) == (expected is None)


def test_fewer_ranks_than_streams_take_as_many_as_they_must() -> None:
    args = argparse.Namespace(placement="streams", streams_per_gpu=None, executor="auto", strict=False)
    placement, _ = lane_placement(args, Ranks(0, 2, 0, 2), torch.device("cpu"))
    assert placement == Placement.by_streams(PARNET, 2)
    for asked in ({"streams_per_gpu": 1}, {"strict": True}):
        with pytest.raises(ParNetError, match="do not cover 3 streams"):
            lane_placement(argparse.Namespace(**vars(args) | asked), Ranks(0, 2, 0, 2), torch.device("cpu"))


def test_ranks_are_planned_for_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(engine_arguments, "plan_for_ranks", lambda *given: asked.append(given))
    given = {"placement": "auto", "streams_per_gpu": None, "executor": "eager", "dtype": "bf16"}
    args = argparse.Namespace(**given, img_size=96, batch_size=4, link="3us,100GB/s")
    lane_placement(args, ranks := Ranks(0, 2, 0, 2), cpu := torch.device("cpu"))
    args.link = None
    lane_placement(args, ranks, cpu)
    wanted, usual = (find_link(text) for text in ("3us,100GB/s", "loopback"))
    assert asked == [(PARNET, ranks, cpu, torch.bfloat16, 96, 4, link, "eager") for link in (wanted, usual)]


def test_fp8_is_beside_bf16_where_kernels_run_it() -> None:
    for executors, dtype in ((("triton", "cuda_graph"), torch.bfloat16), (("eager", "auto"), torch.float32)):
        assert all(type_of("fp8", executor) == dtype for executor in executors)
    assert type_of("int8", "native") == torch.float32


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_infer_places_by_itself(tmp_path: Path, ranks: int) -> None:
    words = ("--placement", "auto", "--iterations", 5, "--verify")
    result, _ = answered(tmp_path / "answer.json", *words, ranks=ranks)
    lanes = {lane for on in result["placement"]["operations"].values() for lane in on}
    assert lanes == set(range(max(lanes) + 1)) and (not ranks or len(lanes) == ranks)
    assert result["relative_difference"] < 1e-5


def test_what_few_messages_took_lies_within_what_was_measured() -> None:
    row, _ = links.describe("link", {1: [1e-5, 2e-5, 9e-3], 10**6: [1e-2, 1e-2, 1e-2]})["messages"]
    assert 1e-5 <= row["p10_s"] <= row["median_s"] <= row["p90_s"] <= 9e-3


def test_a_transfer_is_half_of_a_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second whenever it is read, once before a round trip and once behind it."""

    class Mirror:
        lane = 0

        def inbox(self, *_: object) -> object:
            return SimpleNamespace(post=lambda: None, release=lambda: None)

        send = wait = finish = lambda self, *_: None

    seconds = itertools.count()
    monkeypatch.setattr(links.time, "perf_counter", lambda: float(next(seconds)))
    found = links.transfer_times({"mirror": Mirror()}, [4, 8], 3, torch.device("cpu"))  # type: ignore[dict-item]
    assert found == {"mirror": {4: [0.5] * 3, 8: [0.5] * 3}}


@pytest.mark.ranks
def test_links_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "link.json"
    result, _ = answered(out, "--measure-links", "--device", "cpu", "--iterations", 20, ranks=2)
    found = result["links"]
    assert [link["link"] for link in found] == ["shared", "gloo"]
    assert all(link["bytes_per_s"] > 0 for link in found)
    launch("plan.py", "--gpus", 2, "--link", f"{out}:gloo")
