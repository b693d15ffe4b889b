#!/usr/bin/env python
"""Many requests to a few ranks, and whether their memory grows: under 2% between the second tenth and the last.

python tests/faults/soak.py --requests 20000 --ranks 3
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from recording import record
from trial import children_of, make_pictures
from worker import ROOT

SAMPLE_S = 0.2
LIMIT = 0.02
REPORTED = ("seconds", "pictures_per_s", "latency_ms", "executor", "dtype", "size", "batch_size")
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """Bytes in memory, 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def soak(requests: int, ranks: int, transport: str, work: Path) -> dict:
    """launch/infer.py over so many pictures under torchrun; its report, and the memory of each rank over time."""
    make_pictures(work / "in", requests)
    answers, report = work / "answers.jsonl", work / "report.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        str(ROOT / "launch" / "infer.py"), "--device", "cpu", "--executor", "eager", "--transport", transport,
        "--streams-per-gpu", str(-(-3 // ranks)), "--image", str(work / "in"), "--jsonl", str(answers),
        "--json", str(report),
    ]  # fmt: skip
    samples: list[tuple[float, list[int]]] = []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            size = answers.stat().st_size if answers.exists() else 0
            memory = [resident(pid) for pid in children_of(process.pid)]
            if size and len(memory) == ranks and all(memory):
                samples.append((size, memory))
            time.sleep(SAMPLE_S)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if process.returncode:
        raise RuntimeError(f"torchrun ended with {process.returncode}")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    whole = answers.stat().st_size
    return {
        "complete": [row["image"] for row in rows] == [str(path) for path in sorted((work / "in").iterdir())],
        "requests": len(rows), "ranks": ranks, "transport": transport,
        "resident": [growth([(size / whole, memory[rank]) for size, memory in samples]) for rank in range(ranks)],
        **{key: value for key, value in json.loads(report.read_text()).items() if key in REPORTED},
    }  # fmt: skip


def growth(samples: list[tuple[float, int]]) -> dict[str, float]:
    """Of (share of the requests done, bytes): medians of the second tenth and of the last, in MB, and their ratio."""
    warm = median(memory for share, memory in samples if 0.1 <= share < 0.2)
    last = median(memory for share, memory in samples if share >= 0.9)
    return {"warm_mb": round(warm / 1e6, 2), "last_mb": round(last / 1e6, 2), "growth": round(last / warm - 1, 5)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--record", action="store_true", help="write results/soak-<machine>.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        result = soak(args.requests, args.ranks, args.transport, Path(work))
    print(json.dumps(result))
    if args.record:
        record("soak", result)
    return 0 if result["complete"] and all(rank["growth"] < LIMIT for rank in result["resident"]) else 1


if __name__ == "__main__":
    sys.exit(main())
