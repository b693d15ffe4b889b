"""Real ranks: every transport and placement against the reference; what is refused; and a rank that stops."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, launch
from parallel_parnet.transport.health import STOPPED_S
from processes import free_port

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(200)]
SCRIPTS = ROOT / "tests" / "ranks"
LOOPBACK = "0100007F"


def found(script: str, seed: int, folder: Path, ranks: int, **options: Any) -> list:
    """What each of so many ranks writes that writes anything."""
    launch(SCRIPTS / script, seed, folder / "found", ranks=ranks, **options)
    return [json.loads(file.read_text()) for file in sorted(folder.glob("found.*.json"))]


def shared_names() -> list[str]:
    """Of memory that a crash could leave behind; not of semaphores, which other programs of this machine may make."""
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith("sem."))


def network_results(seed: int, folder: Path, ranks: int, anew: bool) -> list[dict]:
    """What networks.py finds; where Python is executed anew, each rank has an order of its own for text."""
    before = shared_names()
    rows = [row for rows in found("networks.py", seed, folder, ranks, anew=anew) for row in rows]
    assert shared_names() == before
    return rows


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_transport_and_placement(ranks: int, seed: int, tmp_path: Path) -> None:
    rows = network_results(seed, tmp_path, ranks, anew=ranks > 1)
    assert len(rows) == (2 if ranks == 1 else 4)
    for row in rows:
        case = f"{row['placement']}, {row['transport']}"
        assert all(error < 1e-5 for error in row["errors"]), case
        assert row["digest"] == row["repeated"] == row["mapped"] == row["mapped_again"], case
        assert row["first"] and row["kept"], case
        assert row["ahead"] == (ranks > 1), "the next is announced before the last is answered"
        assert row["alone"], "what compiles for a new shape holds no answer back"
        assert set(row["listening"]) <= {LOOPBACK}, case
        if ranks > 1:
            assert {"wait input", "send input", "wait for sends"} <= set(row["spans"]), case
    for name in {row["placement"] for row in rows}:
        assert len({row["digest"] for row in rows if row["placement"] == name}) == 1, "transports change no bit"
    if ranks == 2:
        assert network_results(seed, tmp_path, ranks, anew=False) == rows, "nor does another run"


def test_outputs_on_ranks(seed: int, tmp_path: Path) -> None:
    """Features by name, each from the lane that has it: the bits of one lane."""
    (rows,) = found("outputs.py", seed, tmp_path, 3)
    assert len(rows) == 4 and all(row["equal"] and row["close"] and row["mapped"] for row in rows), rows
    assert all(row["shapes"] == row["said"] and row["threads"] == 1 for row in rows), rows


@pytest.mark.long
def test_triton_segments_on_ranks(seed: int, tmp_path: Path) -> None:
    """By Triton's interpreter, over shared memory and gloo, launched and captured: the bits of one lane. Two ranks or
    three, as it is drawn."""
    ranks = random.choice((2, 3))
    (rows,) = found("triton_lanes.py", seed, tmp_path, ranks, environment={"TRITON_INTERPRET": "1"})
    assert [row["executor"] for row in rows] == ["triton", "cuda_graph"]
    for row in rows:
        assert row["differ"] and row["operations"]
        assert row["single"] and all(row["mapped"]), row


def test_what_is_refused(tmp_path: Path) -> None:
    run = launch(
        SCRIPTS / "refusals.py", tmp_path / "said.json", ranks=2, environment={"TRITON_INTERPRET": "1"}, status=1
    )
    said = [json.loads((tmp_path / f"said.{rank}.json").read_text()) for rank in range(2)]
    assert said[0]["differences"] == said[1]["differences"]
    settings = (
        "program and weights",
        "placement",
        "executor (inductor",
        "executor (eager in torch.bfloat16",
        "executor (triton",
        "executor (auto",
        "transport",
        "kernels' tiles (others",
        "sources of parallel_parnet (edited",
    )
    for message, setting in zip(said[0]["differences"], settings, strict=True):
        assert message.startswith(f"rank 1 differs from rank 0 in {setting}"), message
    reasons = ("shape", "4398046511104|2147483648", "multiples of 32", "shape", "command 7", "raw 2")
    for message, reason in zip(said[1]["refusals"], reasons, strict=True):
        assert re.search(reason, message), message
    assert run.stderr.count("error: rank 1 differs from rank 0 in program and weights") == 1
    assert "exitcode  : 2" in run.stderr and "exitcode  : 1 " not in run.stderr, run.stderr


def test_what_callers_do(seed: int, tmp_path: Path) -> None:
    """Interrupted requests, two maps at once, pictures too large, or whose memory is used again, calls on the wrong
    rank, two engines; and a closed one holds nothing on, as NCCL's graphs, which the ranks could not leave with."""
    (told,) = found("misuse.py", seed, tmp_path, 2)
    assert told["beside"]
    for row in told["rows"]:
        right = [
            row[name]
            for name in ("forked", "reused", "ordinary", "one map", "the rest", "let go", "again", "from a thread")
        ]
        assert all(right), row
        assert all("bytes; give a smaller batch" in said for said in row["too large"]), row
        assert all("a map of this engine is still running" in said for said in row["mapping"]), row
        assert all("was interrupted" in said for said in row["interrupted"]), row
        assert "is closed" in row["closed"] and "rank 0 coordinates" in row["serving"], row


def test_a_rank_that_stops_is_named() -> None:
    """And those that were stopped together, and go on one after the other, are not."""
    options = ["-m", "torch.distributed.run", "--nproc-per-node=3", f"--master-port={free_port()}"]
    command = [sys.executable, *options, str(SCRIPTS / "endless.py")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        pids = dict(sorted(line.split()[1:] for line in (run.stdout.readline() for _ in range(3))))
        time.sleep(0.5)
        for pid in pids.values():
            os.kill(int(pid), signal.SIGSTOP)
        time.sleep(2 * STOPPED_S)
        for pid in pids.values():
            os.kill(int(pid), signal.SIGCONT)
            time.sleep(STOPPED_S / 5)
        time.sleep(2 * STOPPED_S)
        assert all(Path(f"/proc/{pid}").exists() for pid in pids.values())
        start = time.monotonic()
        os.kill(int(pids["1"]), signal.SIGSTOP)
        line = next(line for line in run.stderr if line.startswith("error on rank"))
        assert time.monotonic() - start < 3
        rest = run.stderr.read()
    # of two that know it, torchrun may end the second before it has said so
    said = [line, *(each for each in rest.splitlines() if each.startswith("error on rank"))]
    assert all(re.match(r"error on rank ([02]): rank 1 stopped answering while rank \1 was ", each) for each in said)
    assert not Path(f"/proc/{pids['1']}").exists(), "nothing is left behind"
