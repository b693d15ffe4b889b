#!/usr/bin/env python
"""An hour of requests to a few ranks, some of which are killed: every answer is there, and memory stays as it is.

python tests/faults/soak.py --requests 900000 --kills 10 --ranks 3

Ranks are killed in the first half, and torchrun starts them all again; those of the second half must not grow by
LIMIT_MB, nor must torchrun itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from recording import record
from trial import is_mapped, make_pictures
from worker import ROOT, Fault

from processes import children_of

SAMPLE_S = 0.1
STALL_S = 120.0  # without an answer
LIMIT_MB = 10.0
ORIGINALS = 10  # pictures of the demo, to which all others are links
REPORTED = ("seconds", "pictures_per_s", "latency_ms", "executor", "dtype", "size", "batch_size")
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """Bytes in memory, 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def soak(requests: int, ranks: int, transport: str, work: Path, kills: int = 0, seed: int = 0, leak: int = 0) -> dict:
    """launch/infer.py over so many pictures under torchrun; its report, and how much memory its processes took more.

    leak: bytes that rank 1 keeps of each request, for who wants to see that it is noticed.
    """
    make_pictures(work / "in", requests)
    answers, report, segments = work / "answers.jsonl", work / "report.json", set(os.listdir("/dev/shm"))
    script = Path(__file__).with_name("worker.py") if leak else ROOT / "launch" / "infer.py"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        f"--max-restarts={kills}", str(script), "--device", "cpu", "--executor", "eager", "--transport", transport,
        "--streams-per-gpu", str(-(-3 // ranks)), "--image", str(work / "in"), "--jsonl", str(answers),
        "--json", str(report),
    ]  # fmt: skip
    fault = Fault("leak", "steady", 1, seed, leak, str(work))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "FAULT": fault.dumps()})
    try:
        generations, agent = watch(process, answers, requests, ranks, kills, random.Random(seed))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(STALL_S)
    if process.returncode:
        raise RuntimeError(f"torchrun ended with {process.returncode}")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    images, last = [row["image"] for row in rows], list(generations.values())[-1]
    left = [name for name in sorted(set(os.listdir("/dev/shm")) - segments) if not is_mapped(f"/dev/shm/{name}")]
    return {
        "complete": images == [str(path) for path in sorted((work / "in").iterdir())],
        "right": all(row.get("top5") == rows[i % ORIGINALS]["top5"] for i, row in enumerate(rows)),
        "requests": len(rows), "ranks": ranks, "transport": transport, "kills": len(generations) - 1, "left": left,
        "resident": [growth([(share, memory[rank]) for share, memory in last]) for rank in range(ranks)],
        "resident_torchrun": growth(agent), "last_killed_at": round(last[0][0], 3),
        **{key: value for key, value in json.loads(report.read_text()).items() if key in REPORTED},
    }  # fmt: skip


def watch(
    process: subprocess.Popen, answers: Path, requests: int, ranks: int, kills: int, rng: random.Random
) -> tuple[dict[tuple[int, ...], list[tuple[float, list[int]]]], list[tuple[float, int]]]:
    """Kill ranks, and return samples of (share of the requests done, bytes): of each generation's, and of torchrun."""
    generations: dict[tuple[int, ...], list[tuple[float, list[int]]]] = {}
    agent: list[tuple[float, int]] = []
    due = sorted(0.5 * rng.random() for _ in range(kills))
    whole, size, moved = 0.0, 0, time.monotonic()
    while process.poll() is None:
        before, size = size, answers.stat().st_size if answers.exists() else 0
        moved = time.monotonic() if size != before else moved
        if time.monotonic() - moved > STALL_S:
            raise RuntimeError(f"no answer in {STALL_S:g} s")
        if not whole and size and len(lines := answers.read_bytes().splitlines(keepends=True)) > ORIGINALS:
            whole = sum(map(len, lines[:ORIGINALS])) / ORIGINALS * requests
        pids = tuple(children_of(process.pid))
        memory = [resident(pid) for pid in pids]
        if whole and size > before and len(memory) == ranks and all(memory):
            share = size / whole
            generations.setdefault(pids, []).append((share, memory))
            agent.append((share, resident(process.pid)))
            if due and share >= due[0] and len(generations[pids]) > 1:
                os.kill(rng.choice(pids), signal.SIGKILL)
                due.pop(0)
        time.sleep(SAMPLE_S)
    return generations, agent


def growth(samples: list[tuple[float, int]]) -> dict[str, float]:
    """Of (share of the requests done, bytes), the medians once warm, after a tenth of these, and of the last tenth."""
    first, end = samples[0][0], samples[-1][0]
    warm = median(memory for share, memory in samples if 0.1 <= (share - first) / (end - first) < 0.3)
    last = median(memory for share, memory in samples if (share - first) / (end - first) >= 0.9)
    return {
        "warm_mb": round(warm / 1e6, 2),
        "last_mb": round(last / 1e6, 2),
        "growth_mb": round((last - warm) / 1e6, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=900_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--record", action="store_true", help="write results/soak-<machine>.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        result = soak(args.requests, args.ranks, args.transport, Path(work), args.kills, args.seed)
    print(json.dumps(result))
    if args.record:
        record("soak", result)
    sizes = [*result["resident"], result["resident_torchrun"]]
    well = result["complete"] and result["right"] and not result["left"] and result["kills"] == args.kills
    return 0 if well and all(size["growth_mb"] < LIMIT_MB for size in sizes) else 1


if __name__ == "__main__":
    sys.exit(main())
