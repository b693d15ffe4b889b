"""The GPU check's step that tunes the kernel for warpgroups, with an emulated one."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

import emulated
from parallel_parnet.commands.gpu import warpgroups
from parallel_parnet.commands.gpu.journal import Journal
from parallel_parnet.commands.gpu.scope import IN_A_DRY_RUN
from parallel_parnet.commands.gpu.work import Work
from parallel_parnet.kernels import hopper


def at_hand(monkeypatch: pytest.MonkeyPatch, level: Callable, prepare: Callable) -> None:
    """A GPU whose launches are these."""
    stand_in = SimpleNamespace(level=level, prepare=prepare)
    monkeypatch.setitem(sys.modules, "parallel_parnet.kernels.hopper.launch", stand_in)
    monkeypatch.setattr(hopper, "launch", stand_in, raising=False)  # where other tests have imported it
    monkeypatch.setattr(warpgroups, "is_at_hand", lambda work: True)
    monkeypatch.setattr(warpgroups, "machine_of", lambda work: {"gpu": "some", "l2_bytes": 2**30, "capability": [9, 0]})


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_level_is_tuned_and_wrong_answers_do_not_win(right, tmp_path, monkeypatch):
    def edit(text: str) -> str:
        return text if right else text.replace("1 : 2 * gate", "1 : gate")

    def level(convolutions):
        return lambda: emulated.level(convolutions, tmp_path, edit)

    at_hand(monkeypatch, level, prepare=lambda launches: None)
    scope = replace(IN_A_DRY_RUN, levels=2, candidates=2)
    work = Work("warpgroups", Journal(tmp_path / "rows.jsonl"), scope, tmp_path, time.monotonic() + 200)
    result = warpgroups.check_warpgroups(work)
    assert result["passed"] == right and result["left_out"] == 0
    levels = json.loads((tmp_path / "warpgroups.some.json").read_text())["levels"]
    if right:
        assert len(levels) == 2, "the second of which is compiled while the first is timed"
        for name, row in levels.items():
            assert name.startswith("16-bit n1 ") and row["us"] > 0
            assert len(row["tiles"]) == name.count("+") + 1
            measured = work.journal.rows("warpgroups")[name]
            assert measured["timed"] == 2 and not measured["refused"]
            assert [row["tiles"], row["us"]] == min(measured["all"], key=lambda each: each[1])
    else:
        assert not levels and "no candidate passed" in result["faults"][0]
    assert "skipped" not in result


@pytest.mark.parametrize("out_of_time", [True, False], ids=["out of time", "measured before"])
def test_what_nobody_wants_is_not_compiled_and_not_waited_for(out_of_time, tmp_path, monkeypatch):
    compiled, wanted = [], threading.Event()

    def prepare(launches):
        compiled.append(launches)
        assert len(compiled) == 1 or wanted.wait(20)

    def timed(work, *_):
        time.sleep(max(0.0, work.left if out_of_time else 0.0))
        return {"p50": 1.0}

    at_hand(monkeypatch, lambda convolutions: None, prepare)
    monkeypatch.setattr(warpgroups, "_timed", timed)
    scope = replace(IN_A_DRY_RUN, levels=2, candidates=1)
    work = Work("warpgroups", Journal(tmp_path / "rows.jsonl"), scope, tmp_path, time.monotonic() + 5)
    _, second = warpgroups._levels(work, scope.timed[0], 2**30)
    if not out_of_time:
        work.journal.add("warpgroups", second.key, {"tiles": [], "us": {"p50": 2.0}, "l2": "warm"})
    started = time.monotonic()
    result = warpgroups.check_warpgroups(work)
    ended = time.monotonic()
    wanted.set()
    assert ended - started < 15 and result["passed"] and result["left_out"] == out_of_time
    assert len(compiled) == 1 + out_of_time
    assert len(json.loads((tmp_path / "warpgroups.some.json").read_text())["levels"]) == 2 - out_of_time


def test_nothing_to_do_without_a_hopper(tmp_path):
    work = Work("warpgroups", Journal(tmp_path / "rows.jsonl"), IN_A_DRY_RUN, tmp_path, time.monotonic() + 9)
    for step in (warpgroups.check_warpgroups, warpgroups.check_passes):
        assert step(work) == {"passed": True, "left_out": 0, "skipped": warpgroups.NEEDED}
