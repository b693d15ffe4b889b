"""The poster's table: its rows, and what it leaves out; and results compared, those of several networks too."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from contenders import HEADER, QUIET, planted, result, subject
from parallel_parnet import ParNetError
from parallel_parnet.commands.bench import command as bench
from parallel_parnet.commands.bench import poster
from parallel_parnet.commands.bench.comparison import changes, differences
from parallel_parnet.commands.bench.measure import Settings
from parallel_parnet.commands.bench.rows import read, write
from parallel_parnet.commands.bench.subject import Contender, Runner, Subject


@pytest.mark.usefixtures("_one_core")
def test_poster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(poster.WAYS, "cpu", ("eager, channels_last", "CUDA graph"))
    rows = (poster.Quoted("tiny", 2, 50.0, 1000), poster.Quoted("parnet_fashion", 12, 60.0, 500))
    monkeypatch.setattr(poster, "SIZE", 64)

    def make(name: str) -> Subject:
        tiny = replace(subject(), name="tiny")
        return tiny if name == "tiny" else poster.subject_of(name, torch.device("cpu"), torch.float32, 1)

    header = result({})["header"] | HEADER
    found = poster.measure_poster(header, make, Settings(runs=3, least=3, warm_up=1), QUIET, table=rows)
    assert [row["model"] for row in found["rows"]] == ["tiny", "parnet_fashion"]
    assert found["missing"].keys() == {"tiny, CUDA graph of eager, fused"}
    assert found["failed"] == []
    text = poster.markdown(found)
    assert "| tiny | 2 | 0.1 |" in text
    assert "| 60.00 | 500 |" in text
    for row, program in zip(found["rows"], (subject().program, make("parnet_fashion").program), strict=True):
        assert f"| {row['param_count']:.1f} | {program.cost(64).flops / 1e9:.1f} |" in text


@pytest.mark.usefixtures("_one_core")
def test_the_poster_tells_every_network_on_which_a_way_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(seconds: float, subject: Subject) -> Runner:
        runner = planted("", 0).build(subject)
        return replace(runner, call=lambda x: time.sleep(seconds) or runner.call(x))

    fair, slow = (Contender(name, False, partial(late, s)) for name, s in (("right", 0.02), ("slow", 0.06)))
    ways = [slow, fair, planted("wrong", 1.0)]
    monkeypatch.setattr(poster, "contenders", lambda names: ways)
    rows = (poster.Quoted("a", 12, 50.0, 1000), poster.Quoted("b", 12, 60.0, 500))
    header = result({})["header"] | HEADER
    found = poster.measure_poster(
        header, lambda name: replace(subject(), name=name), Settings(runs=3, least=3, warm_up=1), QUIET, table=rows
    )
    assert [(row["model"], row["contender"]) for row in found["rows"]] == [("a", "right"), ("b", "right")]
    assert found["disagree"].keys() == {"a, wrong", "b, wrong"}
    assert all(f"Not compared: {name} (logits off by" in poster.markdown(found) for name in found["disagree"])


def test_a_poster_on_which_one_of_ours_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = {"rows": [], "missing": {"a, ours: bad": "failed: as planted"}, "disagree": {}, "failed": ["a, ours: bad"]}
    monkeypatch.setattr(bench, "measure_poster", lambda header, *_: {"header": header, **made})
    monkeypatch.setattr(bench, "possible", lambda *_: HEADER["possible"])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--poster", "--device", "cpu", "--out", str(tmp_path)])
    assert bench.main() == 1
    said = capsys.readouterr().out
    assert "a, ours: bad" in said and json.loads(said.splitlines()[-1])["failed"] == ["a, ours: bad"]


def test_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(1)
    base = {name: 10 * rng.lognormal(0, 0.01, 50) for name in ("ours: eager", "same", "quicker", "worse", "gone")}
    now = {"ours: eager": 10 * rng.lognormal(0, 0.01, 50), "same": base["same"] * 1.01}
    now |= {"quicker": base["quicker"] * 0.8, "worse": base["worse"] * 1.2}
    old, new = result(base), result(now, torch="2.14.0")
    verdict = {change.contender: change.verdict for change in changes(old, new)}
    assert verdict == {"ours: eager": "no change", "same": "no change", "quicker": "faster", "worse": "slower"}
    once = result({name: times[:1] for name, times in now.items()})
    assert {change.verdict for change in changes(old, once)} == {"no change"}, "one run has no interval"
    other = {key for key, *_ in differences(old, new)}
    assert other == {"torch", "settings of gone"}
    paths = [write(r, tmp_path, name) for r, name in ((old, "old"), (new, "new"), (result(now, size=32), "small"))]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--compare", *map(str, paths[:2])])
    assert bench.main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["quicker"]["verdict"] == "faster"
    monkeypatch.setattr(sys, "argv", ["bench.py", "--compare", str(paths[0]), str(paths[2])])
    with pytest.raises(ParNetError, match=r"size is 64 in old\.json and 32 in small\.json"):
        bench.main()
    paths[0].write_text("{}")
    with pytest.raises(ParNetError, match=r"no result of launch/bench.py"):
        read(paths[0])


def test_posters_are_compared_network_by_network() -> None:
    """Whose fastest contender is mostly the same."""

    def of_poster(times: dict[str, float]) -> dict:
        made = [result({"ours: eager": np.full(30, ms)})["rows"][0] | {"model": name} for name, ms in times.items()]
        return {"header": {"model": "poster"}, "rows": made}

    old, new = of_poster({"resnet34": 9.0, "parnet_s": 5.0}), of_poster({"resnet34": 9.0, "parnet_s": 4.0, "b": 1.0})
    verdicts = {change.contender: change.verdict for change in changes(old, new)}
    assert verdicts == {"resnet34, ours: eager": "no change", "parnet_s, ours: eager": "faster"}
    assert [key for key, *_ in differences(old, new)] == ["settings of b, ours: eager"]
