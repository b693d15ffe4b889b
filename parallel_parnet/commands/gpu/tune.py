"""Time kernel configurations on the GPU at hand and write its table, kernels/configs/device_name=<GPU>.json.

    python launch/tune.py --minutes 30
    python launch/tune.py --model parnet_s --dtype bfloat16 --dry-run

Nothing is tuned while the engine runs: it reads the table, and takes defaults where that is silent. Every distinct
level of the variants gets an equal share of the minutes; the table is written after each, so a run may be stopped at
any time and continued by another. --dry-run lists the candidates and their predicted times, with or without a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Lines

from parallel_parnet import ParNetError, create_model, fold
from parallel_parnet.files import write_json
from parallel_parnet.kernels.gpu.candidates import candidates
from parallel_parnet.kernels.gpu.config import CONFIGS, Table
from parallel_parnet.kernels.gpu.rates import H200

from ..common import DTYPES, Parser, plain_console
from .device import exact_fp32, machine, measure_rates, require_gpu
from .level_tuning import Level, complaints, describe, levels_of, measure, predicted_floor, tune, worth_trying
from .precompile import worker_pool

VARIANTS = ("parnet_s", "parnet_m", "parnet_l", "parnet_xl")
HOPPER = (9, 0)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", nargs="+", default=VARIANTS, help="variants (default: S, M, L and XL)")
    parser.add_argument("-b", "--batch-size", nargs="+", type=int, default=[1], help="default: 1")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float16", "bfloat16"], help="default: both 16")
    parser.add_argument("--minutes", type=float, default=60, help="to stay within (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list candidates, run nothing")
    parser.add_argument("--show", type=int, default=5, help="candidates listed a level (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: kernels/configs/device_name=<GPU>.json")
    args = parser.parse_args()
    if args.minutes <= 0 or min(args.batch_size) < 1 or args.show < 1:
        raise ParNetError("--minutes, --batch-size and --show must be positive")
    return args


def wanted_levels(args: argparse.Namespace) -> list[Level]:
    """Every distinct level of what was asked for."""
    found: dict[str, Level] = {}
    for model in args.model:
        program = fold(create_model(model).to("meta").eval())
        for dtype in dict.fromkeys(DTYPES[name] for name in args.dtype):
            for n in args.batch_size:
                found |= {level.key: level for level in levels_of(program, n, dtype)}
    return list(found.values())


def dry_run(levels: list[Level], show: int, console: Console) -> None:
    """The candidates of each level as a GPU like the H200 is predicted to run them."""
    table = Table.load(HOPPER)
    for level in levels:
        ranked = candidates(level.shapes, level.n, level.dtype, H200)
        tried = len(worth_trying(level, table, H200))
        floor = predicted_floor(level, H200) * 1e6
        title = f"{level.key}\n{len(ranked)} candidates, {tried} worth timing, computed floor {floor:.2f} us"
        lines = Lines("configuration", "predicted, us", title=title, title_justify="left")
        for candidate in ranked[:show]:
            lines.add_row(describe(candidate.config), f"{candidate.predicted * 1e6:.2f}")
        console.print(lines)
    console.print("predictions order the candidates; they are no measurement")


def read_table(path: Path) -> dict[str, Any]:
    """The levels of an earlier run."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())["levels"]
    except (OSError, ValueError, KeyError) as error:
        raise ParNetError(f"{path}: not a table of configurations ({error})") from None


def fill_table(levels: list[Level], minutes: float, out: Path | None, console: Console) -> Path:
    """Tune level after level, writing after each."""
    started, device = time.monotonic(), require_gpu()
    exact_fp32()
    header = machine(device)
    path = out or CONFIGS / f"device_name={header['gpu'].replace(' ', '_')}.json"
    done = read_table(path)
    table = Table.load(tuple(header["capability"]))
    rates = {dtype: measure_rates(device, dtype) for dtype in {level.dtype for level in levels}}
    end = started + 60 * minutes
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with worker_pool() as pool, progress:
        every = progress.add_task("levels", total=len(levels))
        for i, level in enumerate(levels):
            if i > 0 and time.monotonic() > end:
                console.print(f"stopped after {i} of {len(levels)} levels: {minutes:g} minutes are over")
                break
            configs = worth_trying(level, table, rates[level.dtype])
            now = time.monotonic()
            one = progress.add_task(level.key[:60], total=len(configs))
            waiting = {c: pool.submit(complaints, level, c, tuple(header["capability"])) for c in configs}
            trial = tune(
                configs,
                compiled=lambda config, waiting=waiting: outcome(waiting[config]),
                measured=lambda config, level=level: measure(level, config),
                deadline=now + (end - now) / (len(levels) - i),
                progress=lambda one=one: progress.advance(one),
            )
            for future in waiting.values():
                future.cancel()
            progress.remove_task(one)
            progress.advance(every)
            if trial.config is None:
                console.print(f"{level.key}: no configuration passed; the first: {trial.refused[0]}")
                continue
            done[level.key] = {"date": header["date"], **trial.entry(predicted_floor(level, rates[level.dtype]))}
            write_json(path, {**header, "levels": done})
            default, best = trial.default.get("p50", float("nan")), trial.best["p50"]
            console.print(f"{level.key}: {default:.2f} -> {best:.2f} us, {describe(trial.config)}, {trial.timed} timed")
    return path


def outcome(compiling: Future[list[str]]) -> list[str]:
    """Complaints about a configuration that another process compiled, the compiler's own failure among them."""
    error = compiling.exception()
    return compiling.result() if error is None else [f"does not compile: {type(error).__name__}: {error}"]


def main() -> int:
    args, console = parse_arguments(), plain_console()
    if not args.dry_run:
        require_gpu()
    levels = wanted_levels(args)
    if args.dry_run:
        dry_run(levels, args.show, console)
    else:
        console.print(f"wrote {fill_table(levels, args.minutes, args.out, console)}")
    return 0
