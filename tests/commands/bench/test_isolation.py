"""launch/bench.py --isolate: every contender in a process of its own, and one result of all."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from contenders import result
from parallel_parnet import ParNetError
from parallel_parnet.commands.bench import command as bench
from parallel_parnet.commands.bench import isolation


@pytest.mark.usefixtures("_one_core")
def test_a_process_of_its_own() -> None:
    arguments = ["--runs", "3", "--warmup", "1", "--device", "cpu"]
    found = isolation.isolated(arguments, ["eager, fused"])
    assert [row["contender"] for row in found["rows"]] == ["eager, fused"]


def test_a_process_that_writes_nothing_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = "import sys; sys.exit(f'a line of before\\nerror: argument {sys.argv[1]}')"
    monkeypatch.setattr(isolation, "command", lambda name: [sys.executable, "-c", refuses])
    with pytest.raises(ParNetError, match=r"^--isolate: eager, fused: argument --dtype$"):
        isolation.isolated(["--dtype"], ["eager, fused"])


@pytest.mark.parametrize("word", ["--isolate", "--isol", "--is"])
def test_a_process_of_its_own_starts_no_others(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However --isolate was shortened."""

    def refused(arguments: list[str], names: list[str]) -> dict:
        assert (arguments, names) == (["--only", "ours: eager", "--device", "cpu"], ["ours: eager"])
        raise ParNetError("as planted")

    monkeypatch.setattr(bench, "isolated", refused)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "ours: eager", word, "--device", "cpu"])
    with pytest.raises(ParNetError, match="as planted"):
        bench.main()


def test_processes_become_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    times = {"ours: eager": rng.normal(8, 0.1, 50), "a peer": rng.normal(10, 0.1, 30)}
    monkeypatch.setattr(
        isolation, "_one", lambda arguments, name: result({name: times[name]}) | {"failed": [f"{name} b"]}
    )
    found = isolation.isolated([], list(times))
    mine, peer = found["rows"]
    assert "ratio" not in mine
    assert peer["ratio"][1] < 0.8 < peer["ratio"][2] < 0.85
    assert found["missing"] == {"absent": "not installed"} and found["failed"] == ["ours: eager b", "a peer b"]
