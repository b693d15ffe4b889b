"""The GPU check as a whole, in a dry run: its rows outlive every interruption, and no row is measured twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, launch
from parallel_parnet import ParNetError
from parallel_parnet.commands.gpu import check, page, peers, precompile
from parallel_parnet.commands.gpu.journal import Journal
from parallel_parnet.commands.gpu.scope import DRY, IN_A_DRY_RUN, NARROW
from parallel_parnet.commands.gpu.work import Work, verdict
from parallel_parnet.commands.processes import environment
from parallel_parnet.files import from_json
from parallel_parnet.kernels.gpu.config import Table

WHOLE = tuple(step.name.replace(" ", "-") for step in check.STEPS)


def lines(out: Path) -> list[dict]:
    """Whole lines of a check's rows so far."""
    file = out / "gpu-check.jsonl"
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1] if line] if file.exists() else []


def measured(out: Path) -> list[tuple[str, str]]:
    return [(line["step"], line["name"]) for line in lines(out) if "name" in line]


def work(out: Path, seconds: float = 60) -> Work:
    return Work("step", Journal(out / "rows.jsonl"), IN_A_DRY_RUN, out, time.monotonic() + seconds)


# --- rows


def test_a_file_that_ends_anywhere_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    journal = Journal(path, "a note")
    journal.begin({"gpu": "some"})
    for i in range(3):
        journal.add("step", f"row {i}", {"value": i, "words": "\u00e9 \n"})
    whole = path.read_bytes()
    assert all(json.loads(line)["note"] == "a note" for line in whole.splitlines())
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        kept = list(journal.rows("step"))
        assert len(kept) >= whole[:end].count(b"\n") - 1
        journal.add("step", "another", {"value": 9})
        assert list(journal.rows("step")) == [*kept, "another"]


def test_rows_of_another_machine_are_not_mixed_in(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    journal.begin({"gpu": "one", "dry_run": False})
    journal.begin({"gpu": "one", "dry_run": False})
    with pytest.raises(ParNetError, match="rows are of gpu one, this is two"):
        journal.begin({"gpu": "two", "dry_run": False})


def test_a_fresh_start_drops_the_rows_of_its_steps_alone(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    journal.begin({"gpu": "one"})
    for step in ("a", "b"):
        journal.add(step, "row", {"value": 1})
        journal.end(step, {"passed": True, "seconds": 1.0})
    journal.forget({"a"})
    assert list(journal.results()) == ["b"] and journal.results()["b"]["rows"] == [{"name": "row", "value": 1}]
    journal.forget({"b"})
    journal.begin({"gpu": "two"})


def test_a_row_is_measured_once(tmp_path):
    step, made = work(tmp_path), []
    for _ in range(2):
        assert step.row("a", lambda: made.append(1) or {"value": len(made)}) == {"value": 1}
    assert work(tmp_path, -1).row("a", dict) == {"value": 1} and work(tmp_path, -1).row("b", dict) is None
    assert work(tmp_path, 5).row("b", dict, seconds=10) is None


def test_a_row_that_fails_is_named_and_tried_again(tmp_path):
    step = work(tmp_path)

    def fails() -> dict:
        raise RuntimeError("no\nmore")

    row = step.row("a", fails)
    assert row == {"fault": "RuntimeError: no"}
    assert step.row("a", lambda: {"value": 1}) == {"value": 1}
    found = verdict([row, None, {"value": 2}], lambda row: row["value"] == 2)
    assert found == {"passed": False, "left_out": 1, "faults": ["RuntimeError: no"]}
    assert verdict([{"value": 2}], lambda row: row["value"] == 2)["passed"]
    assert not verdict([None], lambda row: True)["passed"]


def test_a_fault_of_the_poster_is_measured_again_until_it_has_gone(tmp_path, monkeypatch):
    step = work(tmp_path)
    row = {"model": NARROW, "contender": "ours", "infer_step_time": 1.0, "n": 9, "median_interval_ms": [1.0, 1.0]}
    faults = [{f"{NARROW}, a": "failed: no", f"{NARROW}, b": "not there"}, {f"{NARROW}, c": "failed: no"}, {}]

    def measure_poster(*_):
        return {"rows": [{**row, "device_ms": None}], "missing": faults.pop(0)}

    monkeypatch.setattr(peers, "measure_poster", measure_poster)
    assert [len(peers.check_poster(step).get("faults", ())) for _ in range(2)] == [1, 1]
    assert peers.check_poster(step) == peers.check_poster(step) == {"passed": True, "left_out": 0}
    assert not faults
    step.journal.end("step", {"passed": True})
    assert [row["name"] for row in step.journal.results()["step"]["rows"]] == [NARROW]


# --- steps


def test_the_steps_share_the_time():
    assert sum(step.seconds for step in check.STEPS) == check.SECONDS


def test_what_is_complete_is_left_out_and_what_compiles_for_the_rest_is_not():
    done = {"passed": True, "left_out": 0}
    results = {step.name: done for step in check.STEPS}
    assert check.to_run(check.STEPS, results) == []
    for name, result, expected in (
        ("networks", done | {"left_out": 1}, ["compile", "networks"]),
        ("networks", done | {"fault": "killed"}, ["compile", "networks"]),
        ("tuned", done | {"faults": ["one"]}, ["tuned"]),
        ("first kernels", done | {"failed": {"one": "why"}}, ["first kernels"]),
        ("kernels", {"passed": False, "left_out": 0}, []),  # wrong is an answer
    ):
        steps = check.to_run(check.STEPS, results | {name: result})
        assert [step.name for step in steps] == expected, name


def test_launchers_are_built_where_triton_has_one_for_each_signature(monkeypatch):
    built, compiled = [], SimpleNamespace(src="source", metadata="metadata")
    assert not hasattr(precompile.driver, "make_launcher") or pytest.skip("this Triton builds launchers itself")
    assert not precompile.build_launcher(compiled)
    older = SimpleNamespace(make_launcher=None, CudaLauncher=lambda *given: built.append(given))
    monkeypatch.setattr(precompile, "driver", older)
    assert precompile.build_launcher(compiled) and built == [("source", "metadata")]


def test_raw_pictures_have_a_first_level_of_their_own():
    (case,) = precompile.raw_cases(IN_A_DRY_RUN)
    (launch_of_raw,) = case.offline(precompile.Target((9, 0)))
    assert case.index == 0 and torch.uint8 in {t.dtype for t in launch_of_raw.arguments[0][0][0] if t is not None}


# --- the whole


def dry_run(out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "launch" / "gpu_check.py", "--dry-run", "--out", out, *more]
    surroundings = environment(OMP_NUM_THREADS="1", **check.DRY_RUN)
    return subprocess.Popen(list(map(str, command)), env=surroundings, stdout=subprocess.DEVNULL)


def test_a_dry_run_says_so_everywhere_and_goes_on(tmp_path):
    steps = ["machine", "first-kernels", "first", "tuning"]
    words = ("--dry-run", "--out", tmp_path, "--step")
    launch("gpu_check.py", *words, *steps, environment=check.DRY_RUN)
    before = lines(tmp_path)
    assert all(line["note"] == DRY for line in before)
    assert len(measured(tmp_path)) == len(set(measured(tmp_path))) == 14
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report["note"] == DRY and all(result["passed"] for result in report["steps"].values())
    text = (tmp_path / "gpu-check.md").read_text()
    assert text.startswith(f"# GPU check: {DRY}") and "## Tuning" in text
    (file,) = tmp_path.glob("tuned.*.json")
    table = json.loads(file.read_text())
    assert table["note"] == DRY and Table({}, table["levels"]).levels.keys() == {
        name for step, name in measured(tmp_path) if step == "tuning"
    }
    launch("gpu_check.py", *words, *steps, environment=check.DRY_RUN)
    assert lines(tmp_path) == before, "nothing is left to measure"
    launch("gpu_check.py", *words, "auto", "compile")  # which has Triton interpret, and nothing to compile for
    assert lines(tmp_path)[: len(before)] == before, "another step takes nothing away"


@pytest.mark.parametrize(
    "steps",
    [("poster", "depth"), pytest.param(WHOLE, marks=[pytest.mark.long, pytest.mark.timeout(600)])],
    ids=["two", "all"],
)
def test_steps_pass_in_a_dry_run(steps, tmp_path):
    words = ("--dry-run", "--out", tmp_path, "--step", *steps)
    launch("gpu_check.py", *words, environment=check.DRY_RUN, timeout=590)
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert len(report["steps"]) == len(steps)
    assert all(result["passed"] and not result["left_out"] for result in report["steps"].values())


@pytest.mark.timeout(600)
def test_no_row_is_lost_by_an_end_at_any_moment(tmp_path):
    """Killed again and again, as soon as thirty more rows are there; the rest is measured then, and nothing twice."""
    steps = ("--step", "machine", "first", "probes")
    kept: list[dict] = []
    for _ in range(20):
        process = dry_run(tmp_path, *steps)
        while process.poll() is None and len(measured(tmp_path)) < len(kept) + 30:
            time.sleep(0.02)
        ended = process.poll()
        os.kill(process.pid, signal.SIGKILL) if ended is None else None
        process.wait()
        left = lines(tmp_path)
        time.sleep(0.3)
        assert lines(tmp_path) == left, "an orphan goes on"
        found = [line for line in left if "name" in line]
        assert found[: len(kept)] == kept, "rows of before are still there"
        kept = found
        if ended is not None:
            break
    assert ended == 0
    assert len(measured(tmp_path)) == len(set(measured(tmp_path))), "nothing is measured twice"
    results = Journal(tmp_path / "gpu-check.jsonl").results()
    assert list(results) == ["machine", "first", "probes"] and all(result["passed"] for result in results.values())
    assert "## Probes" in page.markdown(results, DRY)


def test_the_page_of_an_h200_is_that_of_its_rows():
    rows = ROOT / "results" / "gpu-check-nvidia-h200.json"
    assert page.markdown(from_json(rows.read_text())["steps"]) == rows.with_suffix(".md").read_text()


def test_a_row_without_bounds_is_a_number_again_and_has_its_place_on_the_page(tmp_path):
    """A kernel that writes NaN is off by infinity, which JSON has no number for."""
    rows = work(tmp_path)
    rows.journal.begin({"gpu": "some"})
    times = {name: {"p20": 1.0, "p50": 1.0, "p80": 1.0} for name in ("triton", "warpgroups")}
    for step in ("first", "fp8", "passes"):
        wrong = {"deviation": float("inf"), "error": float("nan")}
        rows.journal.add(step, "level 1", wrong | ({"us": times} if step == "passes" else {}))
        rows.journal.end(step, {"passed": False})
    (kept,) = rows.journal.rows("fp8").values()
    assert kept["deviation"] == float("inf") and kept["error"] != kept["error"]
    text = page.markdown(rows.journal.results())
    assert text.count("| level 1 | inf | nan |") == 3
