#!/usr/bin/env python
"""A million inputs by number: python tests/fuzz/campaign.py --inputs 1000000 --state results/fuzz-state.json

Inputs are tried in forked processes, limited in memory, and in the time of each input. One that crashes, hangs, or
breaks what must hold is kept in the state, and the run goes on; --only NUMBER tries one again, in the open. A run that
is started again continues where the state says, if its inputs were made by the same generators.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, for none to be lost in a fork
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import torch  # noqa: E402

from fuzz.inputs import KINDS, Kind  # noqa: E402
from parallel_parnet.commands.common import RESULTS, machine, slug  # noqa: E402
from parallel_parnet.files import write_json  # noqa: E402

BATCH = 2000  # inputs of one process
INPUT_S = 60  # beyond which it hangs
MEMORY = 2 << 30  # bytes beside what a process begins with
KEPT = 100  # failures with all that was said


def kind_of(number: int) -> tuple[Kind, Random]:
    """What an input's number stands for; kinds come as often as in the tests."""
    rng = Random(number)
    return rng.choices(list(KINDS), list(KINDS.values()))[0], rng


def work(numbers: range, answers: Connection) -> None:
    """In a process of its own: try them, and tell each verdict, or what was raised."""
    began = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (began + MEMORY, began + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for number in numbers:
            kind, rng = kind_of(number)
            try:
                answers.send((kind(rng, Path(folder)), ""))
            except Exception:  # whatever it is, it is what was looked for
                said = re.sub(r"/\S*/(?=\S+\.py)", "", traceback.format_exc())  # folders are this machine's own
                answers.send(("failed", said[-3000:]))


def tried(numbers: range) -> list[tuple[str, str]]:
    """Verdicts of as many inputs as one process got through; the last is its end where it did not get through all."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(numbers, sender))
    process.start()
    sender.close()
    found: list[tuple[str, str]] = []
    try:
        while len(found) < len(numbers):
            if not receiver.poll(INPUT_S):
                return [*found, ("hung", f"no answer in {INPUT_S} s")]
            found.append(receiver.recv())
    except EOFError:
        process.join()
        return [*found, ("crashed", f"exit status {process.exitcode}")]
    else:
        process.join(INPUT_S)  # it empties its folder
        return found
    finally:
        process.kill()
        process.join()


def fresh() -> dict:
    made_by = b"".join((HERE / name).read_bytes() for name in ("generators.py", "inputs.py"))
    return {
        "generators": hashlib.sha256(made_by).hexdigest()[:12],
        "next": 0,
        "seconds": 0.0,
        "counts": {},
        "failures": [],
    }


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, timeout=10
    )
    return found.stdout.strip() or "unknown"


def advance(state: dict, total: int, at_commit: str) -> None:
    """One process's worth of inputs."""
    start, begun = state["next"], time.monotonic()
    for number, (verdict, said) in enumerate(tried(range(start, min(start + BATCH, total))), start):
        name = kind_of(number)[0].__name__
        counts = Counter(state["counts"].get(name, {}))
        counts[verdict] += 1
        state["counts"][name], state["next"] = dict(counts), number + 1
        if said and len(state["failures"]) < KEPT:
            state["failures"].append(
                {"number": number, "kind": name, "verdict": verdict, "commit": at_commit, "said": said}
            )
    state["seconds"] = round(state["seconds"] + time.monotonic() - begun, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after them; a later run goes on")
    parser.add_argument("--state", type=Path, required=True, help="how far it is; continued")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this input alone, in this process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only is not None:
        kind, rng = kind_of(args.only)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            print(f"{kind.__name__}: {kind(rng, Path(folder))}")
        return 0
    state = json.loads(args.state.read_text()) if args.state.exists() else fresh()
    if state["generators"] != fresh()["generators"]:
        parser.error(f"{args.state} is of other generators: move it away, and start anew")
    at_commit, end = commit(), time.monotonic() + args.seconds
    while state["next"] < args.inputs and time.monotonic() < end:
        advance(state, args.inputs, at_commit)
        write_json(args.state, state)
        print(f"{state['next']:,} of {args.inputs:,} in {state['seconds']:.0f} s, {failed(state)} failures", flush=True)
    here = machine(torch.device("cpu"))
    limits = {"memory_mb": MEMORY >> 20, "seconds": INPUT_S}
    result = {
        "machine": here,
        "commit": at_commit,
        "inputs": state["next"],
        "of": args.inputs,
        "limits": limits,
        **state,
    }
    write_json(RESULTS / f"fuzz-{slug(here)}.json", result)
    return 1 if failed(state) else 0


def failed(state: dict) -> int:
    """How many were neither taken nor refused."""
    return sum(count for found in state["counts"].values() for verdict, count in found.items()
               if verdict not in ("taken", "refused"))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
