#!/usr/bin/env python
"""Faults by seed: every kind, in every phase, on every rank, over every transport, in turn and in random order.

    python tests/faults/campaign.py --trials 1000 --seed 0 --out results/faults.jsonl

Each trial is a line of --out, and a run that is started again continues it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}  # before torch, for none to be lost in a fork
if "triton" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton, which trials inherit as it is
sys.path[:0] = [str(Path(__file__).parent)]

import numpy as np  # noqa: E402
from recording import record  # noqa: E402
from trial import PICTURES, Case, adopt_orphans, make_pictures, run_trial  # noqa: E402

KINDS = ("SIGKILL", "SIGSEGV", "SIGTERM", "SIGSTOP", "exception", "dropped socket")
PHASES = ("start", "handshake", "steady", "write", "shutdown")
TRANSPORTS = ("gloo", "shared")


def cases(trials: int, seed: int, executor: str = "eager") -> list[Case]:
    """As many cases: all combinations, shuffled, again and again; the rest of a case is random."""
    rng, found = random.Random(seed), []
    everything = [
        case
        for case in product(KINDS, PHASES, (2, 3), TRANSPORTS, (0, 1, 2))
        if case[4] < case[2] and case[:2] != ("dropped socket", "start")  # there is none yet
    ]
    while len(found) < trials:
        for kind, phase, ranks, transport, rank in rng.sample(everything, len(everything)):
            batch, slow = rng.choice((1, 4)), phase != "start" and rng.random() < 0.5
            batch = batch if executor == "eager" else 1
            number, after = len(found), rng.randint(1, PICTURES[executor] // 2)
            case_seed = rng.getrandbits(32)
            found.append(Case(number, kind, phase, rank, ranks, transport, batch, after, case_seed, slow, executor))
    return found[:trials]


def unfaulted(case: Case, work: Path) -> bytes:
    """What the case writes without its fault."""
    folder = work / f"unfaulted-{case.number}"
    row = run_trial(replace(case, kind="none", slow_polling=False), work / "pictures", None, folder)
    if row["problems"]:
        raise RuntimeError(f"without a fault: {row}")
    return (folder / "answers.jsonl").read_bytes()


def summary(rows: list[dict]) -> dict:
    """Counts, failures, and percentiles of the time until the others had ended; apart where they had not met yet."""
    counts = Counter((row["kind"], row["phase"], row["rank"]) for row in rows)
    noticed = [row for row in rows if row.get("noticed")]
    return {
        "trials": len(rows),
        "failures": [row for row in rows if row["problems"]],
        "by_kind_phase_and_rank": {
            kind: {phase: [counts[kind, phase, rank] for rank in range(3)] for phase in PHASES} for kind in KINDS
        },
        **{name: dict(Counter(str(row[name]) for row in rows)) for name in ("ranks", "transport", "batch")},
        "unnoticed_and_harmless": sum(row.get("noticed") is False for row in rows),
        "survivors": sum(row["ranks"] - 1 for row in noticed),
        "survivors_that_told_before_torchrun_ended_them": sum(len(row["told_by"]) for row in noticed),
        "detection_s": {kind: spread(noticed, kind, at_start=False) for kind in KINDS},
        "detection_at_start_s": {kind: spread(noticed, kind, at_start=True) for kind in KINDS},
        "seconds_per_trial": round(float(np.mean([row["seconds"] for row in rows])), 2),
    }


def spread(rows: list[dict], kind: str, at_start: bool) -> dict[str, float]:
    """Percentiles of the detection times, or nothing where there are none."""
    times = [row["detection_s"] for row in rows if row["kind"] == kind and (row["phase"] == "start") == at_start]
    found = np.percentile(times, [50, 90, 99, 100]).round(3).tolist() if times else []
    return dict(zip(("p50", "p90", "p99", "max"), found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", choices=PICTURES, default="eager", help="triton: by its interpreter, slowly")
    parser.add_argument("--only", type=int, help="the trial of this number alone")
    parser.add_argument("--out", type=Path, required=True, help="a line for each trial")
    parser.add_argument("--record", action="store_true", help="write the counts to results/faults-<machine>.json")
    args = parser.parse_args()
    todo = cases(args.trials, args.seed, args.executor)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {row["number"] for row in rows}
    adopt_orphans()
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    expected: dict[tuple, bytes] = {}
    make_pictures(work / "pictures", PICTURES[args.executor])
    with args.out.open("a") as out:
        for case in todo:
            if case.number in done or args.only not in (None, case.number):
                continue
            setting = case.ranks, case.transport, case.batch
            if setting not in expected:
                expected[setting] = unfaulted(case, work)
            row = run_trial(case, work / "pictures", expected[setting], work / str(case.number))
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            verdict = "; ".join(row["problems"]) or "well"
            print(
                f"{case.number}: {case.kind} on rank {case.rank} of {case.ranks} ({case.transport}), {case.phase}: "
                f"{verdict}, {row['seconds']} s",
                flush=True,
            )
    result = summary(rows)
    if args.record:
        record("faults" if args.executor == "eager" else f"faults-{args.executor}", result)
    if not result["failures"]:
        shutil.rmtree(work)
    print(f"{result['trials']} trials, {len(result['failures'])} failures")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
