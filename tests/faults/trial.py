"""One trial: torchrun on the demo network, one fault, and everything that must hold afterwards."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from agents import start_torchrun
from worker import ROOT, Fault

from forked import POLL_S, Forked
from processes import children_of, free_port

PICTURES = {"eager": 40, "triton": 3}  # Triton's kernels are interpreted, a second or more for each
LIMIT_S = {"eager": 60.0, "triton": 180.0}  # of a trial; torchrun alone takes 30 s to end a rank that is stopped
TIMEOUT_S = {"eager": 5.0, "triton": 30.0}  # --timeout of the ranks
DEATH_S, STOP_S = 1.0, 3.0  # in which a death and a stopped rank must be noticed
START_S = 2.0  # in which every rank has come to where it waits for the others
TEARDOWN_S = 5.0
POLLING_S = 0.1  # torchrun's own polling of its ranks, which ends the others after a death on the same machine
SLOW_POLLING_S = 1.3  # so that the ranks must notice for themselves, as on other machines
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Case:
    """What a trial does; `number` and `seed` make its name."""

    number: int
    kind: str
    phase: str
    rank: int
    ranks: int
    transport: str
    batch: int
    after: int
    seed: int
    slow_polling: bool
    executor: str = "eager"


@dataclass
class Seen:
    """What was seen of the processes: the fault, and when each rank of the first generation ended."""

    injected: float | None
    ended: dict[int, float]
    status: int


def run_trial(case: Case, pictures: Path, expected: bytes | None, folder: Path) -> dict:
    """Run it in a new folder, which stays where there are problems or nothing is expected.

    Returns the case, "problems" (empty where all is well), "detection_s" where ranks had to notice, and "seconds".
    """
    folder.mkdir(parents=True)
    output, log, port, start = folder / "answers.jsonl", folder / "log", free_port(), time.monotonic()
    fault = Fault(case.kind, case.phase, case.rank, case.seed, case.after, str(folder))
    polling = SLOW_POLLING_S if case.slow_polling else POLLING_S
    arguments = [
        f"--nproc-per-node={case.ranks}", f"--master-port={port}", "--max-restarts=1", f"--monitor-interval={polling}",
        str(Path(__file__).with_name("worker.py")), "--streams-per-gpu", str(-(-3 // case.ranks)),
        "--device", "cpu", "--executor", case.executor, "--transport", case.transport,
        "--timeout", str(TIMEOUT_S[case.executor]),
        "-b", str(case.batch), "--image", str(pictures), "--jsonl", str(output),
    ]  # fmt: skip
    segments = set(os.listdir("/dev/shm"))
    agent = start_torchrun(arguments, {"FAULT": fault.dumps()}, log)
    try:
        seen = watch(agent, case, folder, start + LIMIT_S[case.executor])
        problems = check_end(seen, output, expected) + check_left(port, segments)
    finally:
        kill_all(agent, folder)
    text = log.read_text(errors="replace")
    detection, found = check_detection(case, seen, text)
    problems += found
    result = asdict(case) | {"problems": problems, "seconds": round(time.monotonic() - start, 2)} | detection
    if problems:
        result["log"] = text[-4000:]
    elif expected is not None:
        shutil.rmtree(folder)
    return result


def watch(agent: Forked, case: Case, folder: Path, deadline: float) -> Seen:
    """Wait for torchrun, and note when ranks end; a stopped rank that the others have left goes on, or is killed."""
    ended: dict[int, float] = {}
    others = {rank for rank in range(case.ranks) if rank != case.rank}
    while agent.poll() is None and time.monotonic() < deadline:
        pids = {rank: pid_of(folder, rank) for rank in range(case.ranks)}
        for rank, pid in pids.items():
            if rank not in ended and pid and state(pid) in "ZX?":
                ended[rank] = time.monotonic()
        victim = pids[case.rank]
        if case.kind == "SIGSTOP" and victim and others <= ended.keys() and state(victim) == "T":
            os.kill(victim, signal.SIGCONT if case.seed % 2 else signal.SIGKILL)
        time.sleep(POLL_S)
    note = folder / "injected"
    injected = float(note.read_text()) if note.exists() else None
    return Seen(injected, ended, agent.returncode if agent.returncode is not None else -1)


def check_end(seen: Seen, output: Path, expected: bytes | None) -> list[str]:
    """torchrun succeeded after its restart, and the file is that of a run without a fault, byte for byte."""
    problems = [] if seen.status == 0 else [f"torchrun ended with {seen.status}"]
    found = output.read_bytes() if output.exists() else b""
    if expected is not None and found != expected:
        problems.append(f"{len(found.splitlines())} lines, not those of a run without a fault")
    return problems


def check_left(port: int, segments: set[str]) -> list[str]:
    """No process, no listener and no shared memory is left, after TEARDOWN_S at most."""
    deadline = time.monotonic() + TEARDOWN_S
    while left := _left(port, segments):
        if time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)
    return []


def _left(port: int, segments: set[str]) -> list[str]:
    left = [f"process {pid} is left" for pid in children_of(os.getpid()) if state(pid) not in "ZX?"]
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            left.append(f"port {port} still listens")
    names = sorted(set(os.listdir("/dev/shm")) - segments)
    return left + [f"/dev/shm/{name} is left" for name in names if not is_mapped(f"/dev/shm/{name}")]


def check_detection(case: Case, seen: Seen, log: str) -> tuple[dict, list[str]]:
    """How long the other ranks took to end, and whether each said which rank was lost and what it was doing."""
    if case.kind == "none":
        return {}, []
    if seen.injected is None:
        return {}, ["the fault did not happen"]
    if "error on rank" not in log and "failed (exitcode" not in log:  # nobody depended on it any more
        harmless = case.kind == "dropped socket" or case.phase == "shutdown"
        return {"noticed": False}, [] if harmless else ["nobody noticed"]
    others = {rank for rank in range(case.ranks) if rank != case.rank}
    since = seen.ended.get(case.rank, seen.injected) if case.kind == "SIGTERM" else seen.injected
    detection = max(seen.ended.get(rank, float("inf")) - since for rank in others)
    told = told_by(case, log) & others
    problems = [] if detection <= limit(case) else [f"noticed after {detection:.2f} s, not {limit(case):g}"]
    ended_by_torchrun = {int(rank) for rank in re.findall(r"rank (\d+) was stopped by SIGTERM", log)}
    if case.phase not in ("start", "shutdown") and not others <= told | ended_by_torchrun:
        problems.append(f"ranks {sorted(others - told - ended_by_torchrun)} did not say what was lost")
    if not told and f"local_rank: {case.rank} " not in log and case.phase != "shutdown":
        problems.append("nobody named the rank that was lost")
    return {"noticed": True, "detection_s": round(detection, 3), "told_by": sorted(told)}, problems


def limit(case: Case) -> float:
    """Seconds in which the other ranks must have ended."""
    if case.phase == "start":  # the ranks have not met: torchrun notices a death, --timeout a rank that does not come
        return TIMEOUT_S[case.executor] + START_S if case.kind == "SIGSTOP" else DEATH_S
    return DEATH_S if case.kind in ("SIGKILL", "SIGSEGV", "SIGTERM", "exception") else STOP_S


def told_by(case: Case, log: str) -> set[int]:
    """Ranks that named the lost one, and what they were doing; of a lost connection, either end may be named."""
    name = r"\d+" if case.kind == "dropped socket" else str(case.rank)
    lost = rf"(?:rank {name} (?:died|stopped answering)|no answer from rank {name})"
    late = rf"rank \1 waited \d+ s for rank {name} to start"
    return {int(rank) for rank in re.findall(rf"error on rank (\d+): (?:{lost} while rank \1 was \w|{late})", log)}


def pid_of(folder: Path, rank: int) -> int | None:
    """The process of a rank of the first generation, once it has noted itself."""
    note = folder / f"pid.0.{rank}"
    return int(note.read_text()) if note.exists() else None


def state(pid: int) -> str:
    """The letter in /proc; "?" for no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def is_mapped(path: str) -> bool:
    """Whether some process uses the shared memory: that of others comes and goes while a trial runs."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if path in maps.read_text():
                return True
        except OSError:
            continue  # the process has ended, or is another user's
    return False


def adopt_orphans() -> None:
    """From now on what torchrun leaves behind becomes a child of this process, and is seen."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def kill_all(agent: Forked, folder: Path) -> None:
    """Leave nothing of this trial, and reap what it adopted."""
    if agent.poll() is None:
        os.kill(agent.pid, signal.SIGKILL)
    for note in folder.glob("pid.*"):
        pid = int(note.read_text())
        if state(pid) not in "ZX?":
            os.kill(pid, signal.SIGKILL)
    agent.wait(TEARDOWN_S)
    while children_of(os.getpid()):
        os.waitpid(-1, 0)


def make_pictures(folder: Path, count: int) -> None:
    """A folder of so many links to the demo's pictures, in turn."""
    originals = sorted((ROOT / "launch" / "demo" / "pictures").glob("*.png"))
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:06}.png").symlink_to(originals[i % len(originals)])
