"""Time kernel configurations on the GPU at hand and write its table, kernels/gpu/configs/tuned.<GPU>.json.

    python launch/tune.py --minutes 30
    python launch/tune.py --model parnet_s --dtype bfloat16 --dry-run

Nothing is tuned while the engine runs: it reads the table, and takes defaults where that is silent. Every distinct
level of the variants gets an equal share of the minutes and at most 40 candidates, all compiled ahead by all cores; the
table is written after each, so a run may be stopped at any time and continued by another. Both types of 16 bits share
their entries: of several only the last is tuned. What the kernel for a Hopper's warpgroups runs is left alone: its
tiles are timed by gpu-check. --dry-run lists the candidates and their predicted times, with or without a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from parallel_parnet.files import check_writable, write_json
from parallel_parnet.kernels.gpu.candidates import candidates
from parallel_parnet.kernels.gpu.config import CONFIGS, HOPPER, Table, read_levels, tuned_name
from parallel_parnet.kernels.gpu.rates import H200, Rates

from ..common import DTYPES, S_TO_XL, Parser, count, plain_console, positive
from ..common import table as lines
from .device import exact_fp32, l2_bytes, machine, measure_rates, require_gpu
from .level_tuning import (
    TRIALS,
    Level,
    Trial,
    compile_config,
    complaints,
    describe,
    levels_of,
    measure,
    tune,
    worth_trying,
)
from .precompile import Target, compiling, shapes_of, worker_pool


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("-m", "--model", nargs="+", default=S_TO_XL, help="variants (default: S, M, L and XL)")
    parser.add_argument("-b", "--batch-size", nargs="+", type=count, default=[1], help="default: 1")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    parser.add_argument("--minutes", type=positive, default=60, help="to stay within (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list candidates, run nothing")
    parser.add_argument("--show", type=count, default=5, help="candidates listed a level (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: kernels/gpu/configs/tuned.<GPU>.json")
    args = parser.parse_args()
    check_writable(args.out)
    return args


def wanted_levels(args: argparse.Namespace, cache: int) -> list[Level]:
    """Every distinct level of what was asked for. cache: bytes of L2."""
    found: dict[str, Level] = {}
    for model in args.model:
        program = shapes_of(model)
        for dtype in dict.fromkeys(DTYPES[name] for name in args.dtype):
            for n in args.batch_size:
                found |= {level.key: level for level in levels_of(program, n, dtype, cache)}
    return list(found.values())


def dry_run(levels: list[Level], show: int, console: Console) -> None:
    """The candidates of each level as a GPU like the H200 is predicted to run them."""
    table = Table.load(HOPPER)
    for level in levels:
        ranked = candidates(level.shapes, level.n, level.dtype, H200)
        tried = len(worth_trying(level, table, H200))
        floor = level.floor(H200) * 1e6
        title = f"{level.key}\n{len(ranked)} candidates, {tried} worth timing, computed floor {floor:.2f} us"
        rows = lines("configuration", "predicted, us", title=title)
        for candidate in ranked[:show]:
            rows.add_row(describe(candidate.config), f"{candidate.predicted * 1e6:.2f}")
        console.print(rows)
    console.print("predictions order the candidates; they are no measurement")


@dataclass(frozen=True)
class Tuning:
    """What levels are tuned with; the defaults are those of the target's table. most: candidates of a level at most."""

    device: torch.device
    target: Target
    rates: Mapping[torch.dtype, Rates]
    most: int = TRIALS


def tune_levels(
    levels: Sequence[Level], tuning: Tuning, end: float, done: Callable[[Level, Trial], object],
    first: int | None = None,
) -> list[Level]:  # fmt: skip
    """Tune level after level until `end` (`time.monotonic`), each with an equal share of what is left; those that there
    was no time for. All candidates go to the compilers at once, which are soon ahead of the timing.

    first: so many levels share the time, and those after them what is left then; all of them where not given.
    """
    table = Table.load(tuning.target.capability, multiprocessors=tuning.target.multiprocessors)
    configs = {level: worth_trying(level, table, tuning.rates[level.dtype], tuning.most) for level in levels}
    pool = worker_pool()
    # on a GPU the loaded module tells what is wrong, without one the compiler's tools do
    compiles = compile_config if tuning.device.type == "cuda" else complaints
    with compiling():
        waiting = {
            (level, config): pool.submit(compiles, level, config, tuning.target)
            for level, own in configs.items()
            for config in own
        }
    left_out = []
    sharing = len(levels) if first is None else first
    for i, level in enumerate(levels):
        now = time.monotonic()
        if i > 0 and now > end:
            left_out.append(level)
            continue
        trial = tune(
            configs[level],
            compiled=lambda config, level=level: outcome(waiting[level, config]),
            measured=lambda config, level=level: measure(level, config, tuning.device),
            deadline=now + (end - now) / ((sharing if i < sharing else len(levels)) - i),
        )
        done(level, trial)
    pool.shutdown(wait=False, cancel_futures=True)
    return left_out


def fill_table(wanted: list[Level], minutes: float, out: Path | None, console: Console) -> Path:
    """Tune level after level of those that Triton's kernels run on this GPU, writing after each."""
    started, device = time.monotonic(), require_gpu()
    exact_fp32()
    header, table = machine(device), Table.of_device(device)
    levels = [level for level in wanted if table.of_warpgroups(level.shapes, level.n, level.dtype) is None]
    if elsewhere := len(wanted) - len(levels):
        console.print(f"{elsewhere} of {len(wanted)} levels left alone: the kernel for warpgroups runs them here")
    path = out or CONFIGS / tuned_name(header["gpu"])
    entries = read_levels(path)
    rates = {dtype: measure_rates(device, dtype) for dtype in {level.dtype for level in levels}}

    def done(level: Level, trial: Trial) -> None:
        if trial.config is None:
            console.print(f"{level.key}: no configuration passed; the first: {trial.refused[0]}")
            return
        entries[level.key] = {"date": header["date"], **trial.entry(level, rates[level.dtype])}
        write_json(path, {**header, "levels": entries})
        default, best = trial.default.get("p50", float("nan")), trial.best["p50"]
        console.print(f"{level.key}: {default:.2f} -> {best:.2f} us, {describe(trial.config)}, {trial.timed} timed")

    tuning = Tuning(device, Target(tuple(header["capability"]), multiprocessors=header["multiprocessors"]), rates)
    if left_out := tune_levels(levels, tuning, started + 60 * minutes, done):
        console.print(f"{minutes:g} minutes are over: {len(left_out)} of {len(levels)} levels left out")
    return path


def outcome(compiling: Future) -> list[str]:
    """Complaints about a configuration that another process compiled, the compiler's own failure among them."""
    error = compiling.exception()
    return compiling.result() or [] if error is None else [f"does not compile: {type(error).__name__}: {error}"]


def main() -> int:
    args, console = parse_arguments(), plain_console()
    cache = 0 if args.dry_run else l2_bytes(require_gpu())
    levels = wanted_levels(args, cache)
    if args.dry_run:
        dry_run(levels, args.show, console)
    else:
        console.print(f"wrote {fill_table(levels, args.minutes, args.out, console)}")
    return 0
