"""Ranks that die, hang or disagree, and what is left of them. Many more by seed: make test-faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_many import ORIGINALS, folder_of

from conftest import ROOT
from forked import start_script
from processes import descendants, free_port
from small import GOLDEN

pytestmark = pytest.mark.ranks
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
INFER = (str(ROOT / "launch" / "infer.py"), "--device", "cpu", "--executor", "eager")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
A, B = "10.207.83.1", "10.207.83.2"  # addresses that exist in the two namespaces alone
A6, B6 = "fd10:207:83::1", "fd10:207:83::2"


def start(*command: object) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end_of(process: subprocess.Popen) -> str:
    """What it prints until it ends, with its ranks, within 90 seconds."""
    try:
        return process.communicate(timeout=90)[0]
    finally:
        for pid in [process.pid, *descendants(process.pid)] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)


def kill_when_answering(torchrun: int, file: Path) -> None:
    """Kill its last rank once a few answers are there."""
    until = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size > 5_000):
        assert time.monotonic() < until, f"no answers in {file}"
        time.sleep(0.01)
    os.kill(descendants(torchrun)[-1], signal.SIGKILL)


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("executor", "trials"), [("eager", 3), pytest.param("triton", 1, marks=pytest.mark.long)])
def test_a_sample_of_faults(executor: str, trials: int, tmp_path: Path) -> None:
    """Each trial checks detection, the output and what is left; the seed is fresh."""
    seed = int.from_bytes(os.urandom(3), "big")
    command = [sys.executable, str(ROOT / "tests" / "faults" / "campaign.py"), "--executor", executor]
    command += ["--trials", str(trials), "--seed", str(seed), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    failed = [row for row in rows_of(tmp_path / "out") if row["problems"]]
    assert run.returncode == 0 and not failed, f"seed {seed}: {failed}\n{run.stderr}"
    assert len(rows_of(tmp_path / "out")) == trials


LEAKY = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from soak import soak
print(json.dumps(soak(500, 3, "auto", Path(sys.argv[2]), leak=60_000)))
"""


@pytest.mark.long
def test_a_leak_is_noticed(tmp_path: Path) -> None:
    """Of 60 kB a request, in one of three ranks."""
    command = [sys.executable, "-c", LEAKY, ROOT / "tests" / "faults", tmp_path]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["complete"] and found["right"] and found["left"] == []
    grown = [rank["growth_mb"] for rank in [*found["resident"], found["resident_torchrun"]]]
    assert [mb > 10 for mb in grown] == [False, True, False, False], grown


def test_torchrun_restarts_and_every_picture_is_answered_once(tmp_path: Path) -> None:
    """The README's command; a rank is killed from outside, as soon as there are answers."""
    file, pictures = tmp_path / "a.jsonl", folder_of(tmp_path / "in", 400)
    torchrun, said = ("--standalone", "--nproc-per-node=2", "--max-restarts=1"), (tmp_path / "out", tmp_path / "err")
    script, *words = (*INFER, "--streams-per-gpu", "2", "--image", str(pictures), "--jsonl", str(file))
    process = start_script(Path(script), words, torchrun, ROOT, ENVIRONMENT, said)
    assert process.pid is not None
    kill_when_answering(process.pid, file)
    process.join(90)
    output = said[0].read_text()
    assert process.exitcode == 0, said[1].read_text()
    already = re.search(r"(\d+) of 400 pictures are there already", output)
    assert already and 10 < int(already[1]) < 400
    rows = rows_of(file)
    assert [row["image"] for row in rows] == [str(path) for path in sorted(pictures.iterdir())]
    answers = {json.dumps(row["top5"]) for row in rows}
    assert len(answers) == len(ORIGINALS), "the same picture has the same answer, to the last bit, before and after"


def test_a_rank_with_other_weights_is_refused(tmp_path: Path) -> None:
    """bash gives each rank a checkpoint of its own."""
    checkpoints = f"({GOLDEN}/official_narrow_silu.pth.tar {GOLDEN}/official_narrow_relu.pth.tar)"
    script = f"c={checkpoints}; exec {sys.executable} {' '.join(INFER)} --streams-per-gpu 2 --checkpoint ${{c[$RANK]}}"
    command = [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", "--no-python", "bash", "-c", script]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    errors = [line for line in run.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "rank 1 differs from rank 0 in" in errors[0], run.stderr
    assert "exitcode  : 2" in run.stderr


@pytest.fixture
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    names = f"parnet-a-{os.getpid()}", f"parnet-b-{os.getpid()}"
    ends = f"pna{os.getpid()}"[:15], f"pnb{os.getpid()}"[:15]
    steps = [
        ["netns", "add", names[0]], ["netns", "add", names[1]],
        ["link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1]],
    ]  # fmt: skip
    for name, end, address, address6 in zip(names, ends, (A, B), (A6, B6)):
        steps += [["-n", name, "address", "add", f"{address}/24", "dev", end]]
        steps += [["-n", name, "address", "add", f"{address6}/64", "dev", end, "nodad"]]
        steps += [["-n", name, "link", "set", device, "up"] for device in (end, "lo")]
    try:
        for step in steps:
            try:
                subprocess.run(["ip", *step], check=True, capture_output=True, text=True)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_machines(two_machines: tuple[str, str], tmp_path: Path) -> None:
    """A rank on a core in each of two network namespaces; one is killed, and all answers are those of one process."""
    infer = [*INFER, "--streams-per-gpu", "2", "--image", folder_of(tmp_path / "in", 300), "--jsonl"]
    meet = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={A}", "--master-port=29400", "--max-restarts=1"]
    cores = sorted(os.sched_getaffinity(0))
    pinned = [["taskset", "--cpu-list", str(core)] for core in (cores[0], cores[-1])]
    file = tmp_path / "two.jsonl"
    processes = [
        start(*pinned[i], "ip", "netns", "exec", name, *TORCHRUN, *meet, f"--node-rank={i}", *infer, file)
        for i, name in enumerate(two_machines)
    ]
    kill_when_answering(processes[1].pid, file)
    outputs = [end_of(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "error on rank 0: rank 1 died while rank 0 was" in outputs[0] and "are there already" in outputs[0]
    assert "300 pictures" in end_of(start(*pinned[0], sys.executable, *infer, tmp_path / "one.jsonl"))
    two, one = rows_of(tmp_path / "two.jsonl"), rows_of(tmp_path / "one.jsonl")
    assert [row["image"] for row in two] == [row["image"] for row in one]
    for got, expected in zip(two, one, strict=True):
        for t, e in zip(got["top5"], expected["top5"], strict=True):
            assert t["label"] == e["label"] and t["probability"] == pytest.approx(e["probability"], rel=1e-5)


JOINING = """
import os, torch
from parallel_parnet.transport import gather, health, join_ranks, leave_ranks
join_ranks(torch.device("cpu"), 30)
peer, = health.current()._peers.values()
print(peer.connection.getpeername()[0], gather([7]), "NCCL_SOCKET_IFNAME" in os.environ)
leave_ranks()
"""


@pytest.mark.parametrize(("master", "at_home", "reached"), [(A6, A6, [B6, A6]), (A, "127.0.0.1", [B, A])])
def test_how_two_machines_meet(two_machines: tuple[str, str], master: str, at_home: str, reached: list[str]) -> None:
    """By IPv6; and though the first machine calls itself loopback, where its interface is named."""
    processes = []
    for rank, (name, host) in enumerate(zip(two_machines, (at_home, master))):
        setting = [f"RANK={rank}", "WORLD_SIZE=2", f"MASTER_ADDR={host}", "MASTER_PORT=29400"]
        setting += [f"GLOO_SOCKET_IFNAME=pna{os.getpid()}"] if host != master else []
        processes.append(start("ip", "netns", "exec", name, "env", *setting, sys.executable, "-c", JOINING))
    outputs = [end_of(process) for process in processes]
    for address, output in zip(reached, outputs):
        assert f"{address} [[7], [7]] False" in output, outputs
