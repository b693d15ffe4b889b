"""The GPU check's steps, each in a fork: recorded however it ends, and nothing of it outlives it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from parallel_parnet import ParNetError
from parallel_parnet.commands.gpu import check as gpu_check
from parallel_parnet.commands.gpu.journal import Journal
from parallel_parnet.commands.gpu.precompile import worker_pool
from parallel_parnet.commands.processes import run_within
from parallel_parnet.kernels.gpu.config import CONFIGS


def leaves(status: int) -> dict:
    print("noise", flush=True)
    os._exit(status)


def works_on_at_its_end() -> dict:
    threading.Thread(target=time.sleep, args=(60,)).start()
    return {"passed": True}


def is_running(pid: int) -> bool:
    """Neither gone nor a dead one that nobody has asked for yet."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    return False


def leaves_compilers() -> dict:
    pool = worker_pool()
    for _ in range(9):
        pool.submit(time.sleep, 60)
    pool.shutdown(wait=False, cancel_futures=True)
    return {"passed": True}


@pytest.mark.parametrize(
    ("check", "passed", "fault"),
    [
        (lambda: {"passed": True, "n": 3}, True, None),
        (lambda: {"passed": False}, False, None),
        (lambda: {}["broken"], False, "exit status 1: KeyError: 'broken'"),
        (partial(leaves, 0), False, "exit status 0: noise"),
        (partial(leaves, 9), False, "exit status 9: noise"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), False, f"exit status {-signal.SIGKILL}: it said nothing"),
        (partial(time.sleep, 60), False, "killed after 2 s: it said nothing"),
        (works_on_at_its_end, True, None),
        (leaves_compilers, True, None),
    ],
)
def test_a_step_is_recorded_however_it_ends(check, passed, fault):
    started = time.monotonic()
    result = gpu_check.run_step(check, 2, required=True)
    assert result["passed"] is passed and result.get("fault") == fault
    assert (2 if "killed" in (fault or "") else 0) <= result["seconds"] <= time.monotonic() - started + 0.1 < 20


@pytest.mark.parametrize(("check", "passed"), [(partial(time.sleep, 60), True), (partial(leaves, 9), False)])
def test_a_step_that_is_not_required_may_be_out_of_time_and_no_more(check, passed):
    assert gpu_check.run_step(check, 1, required=False)["passed"] is passed


def test_a_step_out_of_time_ends_with_its_children(tmp_path):
    file = tmp_path / "pid"

    def hangs() -> None:
        file.write_text(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)

    gpu_check.run_step(hangs, 1, required=True)
    assert not is_running(int(file.read_text()))


LEADER = """
import signal, subprocess, sys
follower = subprocess.Popen(["sleep", "60"], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(follower.kill()))
print(follower.pid, file=open(sys.argv[1], "w", buffering=1))
follower.wait()
"""


@pytest.mark.parametrize("seconds", [1, 60], ids=["itself", "its step"])
def test_a_command_out_of_time_ends_with_what_it_has_started(seconds, tmp_path):
    """Also with what has a session of its own, as torchrun's ranks."""
    file = tmp_path / "pid"
    command = [sys.executable, "-c", LEADER, str(file)]
    gpu_check.run_step(lambda: {"passed": run_within(command, seconds)[0] is None}, 4, required=True)
    end, pid = time.monotonic() + 5, int(file.read_text())
    while is_running(pid):
        assert time.monotonic() < end, "it works on"
        time.sleep(0.05)


def test_the_process_of_the_check_never_asks_the_gpu(monkeypatch, tmp_path):
    """Whose forks could not use it then."""
    asked = tmp_path / "asked"

    def is_available() -> bool:
        with open(asked, "a") as file:
            print(os.getpid(), file=file)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--out", str(tmp_path / "out")])
    with pytest.raises(ParNetError, match="no NVIDIA GPU"):
        gpu_check.main()
    args = argparse.Namespace(out=tmp_path, seconds=600, dry_run=False)
    gpu_check.run_steps(gpu_check.STEPS[:2], Journal(tmp_path / "rows.jsonl"), args, Console(quiet=True))
    pids = asked.read_text().split()
    assert len(set(pids)) == 3 and str(os.getpid()) not in pids


def test_the_check_says_where_its_tables_are_read_from(monkeypatch, tmp_path, capsys):
    Journal(tmp_path / "gpu-check.jsonl").end("tuning", {"passed": True, "seconds": 1.0, "table": "tuned.some.json"})
    monkeypatch.setattr(gpu_check, "found_here", lambda dry: dict.fromkeys(gpu_check.SAME, "some"))
    monkeypatch.setattr(gpu_check, "run_steps", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--out", str(tmp_path), "--step", "tuning"])
    assert gpu_check.main() == 0
    assert capsys.readouterr().out.endswith(f"from {CONFIGS}: put {tmp_path / 'tuned.some.json'} there\n")


def test_all_steps_are_tried_and_recorded(tmp_path):
    """Here each step's process finds no GPU; the next step goes on all the same."""
    steps = [step for step in gpu_check.STEPS if step.name in ("kernels", "inductor")]
    journal = Journal(tmp_path / "rows.jsonl")
    for seconds, faults in ((600, ["no NVIDIA GPU"] * 2), (1, ["the time was over"] * 2)):
        args = argparse.Namespace(out=tmp_path, seconds=seconds, dry_run=False)
        gpu_check.run_steps(steps, journal, args, Console(quiet=True))
        results = json.loads((tmp_path / "gpu-check.json").read_text())["steps"]
        assert results == journal.results()
        assert all(fault in result["fault"] for result, fault in zip(results.values(), faults, strict=True))
    assert [result["passed"] for result in results.values()] == [False, True], "only the last may want for time"
