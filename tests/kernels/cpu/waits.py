#!/usr/bin/env python
"""Milliseconds of a pass by the CPU kernels: alone, beside a busy process, and with more threads than cores.

python tests/kernels/cpu/waits.py --json results/waits.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from parallel_parnet import Engine, Program, create_model, fold, load_checkpoint  # noqa: E402
from parallel_parnet.commands.common import fit_norms, machine  # noqa: E402
from parallel_parnet.files import write_json  # noqa: E402

THREADS, TOO_MANY = 2, 64
PASSES = {"parnet_fashion": 1000, "parnet_s": 40}


def demo() -> Program:
    """The demo's network, whose passes are short."""
    return fold(load_checkpoint(ROOT / "launch" / "demo" / "parnet_fashion.safetensors"))


def times(program: Program, threads: int, passes: int) -> dict[str, float]:
    """The median and the 90th percentile of some passes, in milliseconds."""
    side = program.config.image_size
    engine, x = Engine(program, None, "cpu", executor="native", threads=threads), torch.randn(1, 3, side, side)
    found = []
    for _ in range(passes + 5):
        start = time.perf_counter()
        engine(x)
        found.append(time.perf_counter() - start)
    return dict(zip(("median", "p90"), (np.percentile(found[5:], [50, 90]) * 1e3).round(3).tolist(), strict=True))


@contextmanager
def a_busy_process() -> Iterator[None]:
    """One that computes for as long as it is let."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(0.5)
        try:
            yield
        finally:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all of it to this file")
    args = parser.parse_args()
    rows = {}
    for name, passes in PASSES.items():
        program = demo() if name == "parnet_fashion" else fold(fit_norms(create_model(name)))
        rows[name] = {"alone": times(program, THREADS, passes)}
        with a_busy_process():
            rows[name]["beside a busy process"] = times(program, THREADS, passes)
        rows[name][f"{TOO_MANY} threads"] = times(program, TOO_MANY, max(20, passes // 10))
        for how, found in rows[name].items():
            print(f"{name}, {how}: {found['median']:.2f} ms, p90 {found['p90']:.2f}")
    if args.json:
        write_json(args.json, {"machine": machine(torch.device("cpu")), "threads": THREADS, "ms": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
