#!/usr/bin/env python
"""Measure what a feature costs between two ranks, for the sizes of the features of the networks.

    torchrun --nproc-per-node 2 launch/links.py --json results/links-gloo-loopback.json

A message goes there and back through the engine's transport; half the time of the round trip is one transfer. The
planner fits a line through the medians: latency and bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table

from common import Parser, Ranks, run
from parallel_parnet import ParNetError, create_model, fold
from parallel_parnet.costs import Link
from parallel_parnet.files import write_atomically
from parallel_parnet.program import INPUT
from parallel_parnet.transport import Transport, join_ranks

WARM_UP = 20


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["parnet_s", "parnet_xl"], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=200, help="round trips of each size (default: %(default)s)")
    parser.add_argument("--name", default="loopback", help="of the link (default: %(default)s)")
    parser.add_argument("--cpu", default=platform.processor() or platform.machine(), help="the machine, in words")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    if args.repeats < 2:
        raise ParNetError(f"--repeats {args.repeats}: must be at least 2")
    return args


def feature_sizes(models: list[str]) -> list[int]:
    """Bytes, in fp32, of the picture, the streams' features and the logits, small to large."""
    sizes = set()
    for model in models:
        program = fold(create_model(model))
        side = program.config.image_size
        names = [INPUT, *(op.name for op in program.operations if op.stage != "stem")]
        sizes |= {math.prod(program.shape(name, 1, side, side)) * 4 for name in names}
    return sorted(sizes)


def transfer_times(transport: Transport, sizes: list[int], repeats: int) -> dict[int, list[float]]:
    """Seconds of one transfer of each size: half of each round trip, on rank 0; rank 1 answers.

    The sizes take turns, so that a busy moment of the machine falls on all of them.
    """
    messages = {size: torch.zeros(size // 4) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    directions = [transport.send, transport.receive]
    for i in range(WARM_UP + repeats):
        for size, message in messages.items():
            start = time.perf_counter()
            for step in directions if transport.lane == 0 else reversed(directions):
                transport.wait(step(message, 1 - transport.lane, 0, "a message"), "a message")
            if i >= WARM_UP:
                times[size].append((time.perf_counter() - start) / 2)
    return times


def main() -> int:
    args, ranks = parse_arguments(), Ranks.from_environment()
    if ranks.world != 2:
        raise ParNetError(f"{ranks.world} rank(s): start two, torchrun --nproc-per-node 2 launch/links.py")
    ranks.take_threads()
    join_ranks(torch.device("cpu"), 60)
    rows = []
    for size, times in transfer_times(Transport.of_ranks(), feature_sizes(args.models), args.repeats).items():
        p10, p90 = quantiles(times, n=10)[0], quantiles(times, n=10)[-1]
        rows.append({"bytes": size, "median_s": median(times), "p10_s": p10, "p90_s": p90})
    if ranks.rank:
        return 0
    link = Link.fit(args.name, [(row["bytes"], row["median_s"]) for row in rows], "")
    table = Table("kB", "median us", "p10", "p90", "fit us", title=f"One transfer, {args.name}", title_justify="left")
    for row in rows:
        numbers = (row["median_s"], row["p10_s"], row["p90_s"], link.seconds(row["bytes"]))
        table.add_row(f"{row['bytes'] / 1e3:.1f}", *(f"{t * 1e6:.1f}" for t in numbers))
    Console(highlight=False).print(table)
    result = {
        "link": args.name,
        "transport": "gloo over loopback, through parallel_parnet.transport, one thread a rank",
        "cpu": args.cpu,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "repeats": args.repeats,
        "latency_s": link.latency_s,
        "bytes_per_s": link.bytes_per_s,
        "messages": rows,
    }
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("link", "latency_s", "bytes_per_s", "date")}))
    return 0


if __name__ == "__main__":
    run(main)
