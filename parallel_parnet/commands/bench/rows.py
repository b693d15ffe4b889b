"""Rows of results, their files, and what people read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from parallel_parnet import ParNetError
from parallel_parnet.files import write_csv, write_json
from parallel_parnet.program.contract import dtype_name

from ..common import slug
from ..common import table as make_table
from .proof import limit
from .running import Entry
from .statistics import median_interval, ratio, summary, verdicts
from .subject import Subject

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}
FEWEST = 50  # timed runs; rows with fewer say so
TELLING = 15  # with fewer, an interval by resampling says nothing
TIMM = (
    "model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "param_count",
    "infer_gmacs",
)  # fmt: skip
FP32 = "float32"
SHARES = (("gflop_per_s", "of_matmul"), ("gb_per_s", "of_copy"))
KINDS = ("header", "rows", "missing", "disagree")
AUTO = "ours: auto"

Row = dict
Result = dict


def timm_columns(subject: Subject, median_ms: float) -> Row:
    """timm's names: milliseconds a step, millions of parameters, GMAC a picture."""
    speed, gmacs = round(subject.batch / median_ms * 1e3, 3), round(subject.flops / subject.batch / 2e9, 3)
    parameters = round(subject.program.parameters / 1e6, 3)
    return dict(zip(TIMM, (subject.name, speed, median_ms, subject.batch, subject.size, parameters, gmacs)))


def row_of(entry: Entry, possible: Mapping[str, Mapping[str, float]], clocks: Sequence[float]) -> Row:
    """All about a contender that was timed, timm's columns first."""
    subject, runner, latency = entry.subject, entry.runner, summary(entry.latency)
    on_gpu = subject.device.type == "cuda"
    timed_on_gpu = on_gpu and all(map(math.isfinite, entry.device))
    return {
        **timm_columns(subject, latency["median"]),
        "contender": entry.name,
        "ours": entry.contender.ours,
        "dtype": dtype_name(subject.dtype),
        "arithmetic": runner.arithmetic,
        "settings": runner.settings,
        "error": entry.error,
        "limit": limit(entry),
        "setup_s": round(entry.setup, 3),
        "first_call_s": round(entry.first_call, 6),
        "n": len(entry.latency),
        "latency_ms": latency,
        "median_interval_ms": [round(t * 1e3, 5) for t in median_interval(entry.latency)],
        "enqueue_ms": summary(entry.enqueue) if on_gpu else None,
        "device_ms": summary(entry.device) if timed_on_gpu else None,
        "unstable": verdicts(entry.latency, entry.enqueue, entry.device, clocks),
        **_achieved(subject, runner.arithmetic.split(",")[0], latency["median"] / 1e3, possible),
        "rounds": entry.rounds,
        "samples_ms": [round(t * 1e3, 5) for t in entry.latency],
    }


def _achieved(subject: Subject, kind: str, seconds: float, possible: Mapping[str, Mapping[str, float]]) -> Row:
    """Rates over the median pass, and their shares of a matrix product's and a copy's. Bytes as the program has them:
    each operation's inputs, weights and output once. No share of a product that is slower than one of fp32, if that was
    timed: it says that torch has none for this machine, and not what the machine could do."""
    itemsize = getattr(torch, kind).itemsize
    flops = subject.flops / seconds
    product = possible[kind]["flop_per_s"]
    least = possible.get(FP32, possible[kind])["flop_per_s"]
    moved = subject.program.cost(subject.size, subject.batch, itemsize).bytes / seconds
    return {
        "gflop_per_s": round(flops / 1e9, 2),
        "of_matmul": round(flops / product, 4) if product >= least else None,
        "gb_per_s": round(moved / 1e9, 2),
        "of_copy": round(moved / possible[kind]["bytes_per_s"], 4),
    }


def compared(rows: Sequence[Row], ours: bool) -> Row | None:
    """The row of which ratios are made. Of ours it is auto's, which is what users run: the smallest of several medians
    would be the luckiest. Of the peers, or where auto did not run, the one with the smallest median latency, of few
    runs only where there is no other, since few runs have the most luck."""
    able = (row for row in rows if row["ours"] == ours)
    return min(
        able, key=lambda row: (row["contender"] != AUTO, row["n"] < TELLING, row["infer_step_time"]), default=None
    )


def reached(row: Row, rate: str, share: str) -> str:
    """A rate, and its share of what is possible where that is known."""
    return f"{row[rate]:.1f}" + ("" if row[share] is None else f" ({row[share]:.0%})")


def runs(row: Row) -> str:
    """How many, and whether they are too few to be a result, or to say anything of two medians."""
    few = "too few" if row["n"] < TELLING else "few" if row["n"] < FEWEST else ""
    return f"{row['n']}{few and f' ({few})'}"


def last_line(result: Result, path: Path) -> Row:
    """timm's columns of ours, and how it stands against the fastest peer."""
    mine, other = compared(result["rows"], ours=True), compared(result["rows"], ours=False)
    fastest = mine or other or {}
    return {
        **{key: fastest.get(key) for key in (*TIMM, "contender")},
        "best_peer": other and other["contender"],
        "ratio": other and other.get("ratio"),
        "unstable": sum(bool(row["unstable"]) for row in result["rows"]),
        "failed": result["failed"],
        "results": str(path),
    }


def add_ratios(rows: Sequence[Row], paired: bool) -> None:
    """To every peer's row, the latency of ours over its own: value and 95% interval.

    paired: rows were timed in turns in one process, so times of the same round belong together.
    """
    mine = compared(rows, ours=True)
    if mine is None:
        return
    for row in rows:
        if row["ours"]:
            continue
        a, b = mine["samples_ms"], row["samples_ms"]
        if paired:
            by_round = dict(zip(mine["rounds"], a, strict=True)), dict(zip(row["rounds"], b, strict=True))
            shared = sorted(by_round[0].keys() & by_round[1].keys())
            a, b = ([times[r] for r in shared] for times in by_round)
        if min(len(a), len(b)) > 1:
            row["ratio"] = [round(value, 5) for value in ratio(a, b, paired)]


def result_name(kind: str, header: Mapping) -> str:
    """A file's name without its ending, from what was measured on what: bench-infer-parnet_s-224-bf16-b1-..."""
    torch_version = ".".join(header["torch"].split("+")[0].split(".")[:2])
    model = re.sub("[^A-Za-z0-9_.]+", "-", header["model"])
    what = f"{model}-{header['size']}-{SHORT[header['dtype']]}-b{header['batch_size']}"
    return f"{kind}-{what}-{slug(header['machine'])}-torch{torch_version}"


def write(result: Result, folder: Path, name: str) -> Path:
    """The result as JSON, and beside it its rows as CSV without the single times; the path of the JSON."""
    path = folder / f"{name}.json"
    write_json(path, result)
    flat = [{k: v for k, v in row.items() if k not in ("rounds", "samples_ms")} for row in result["rows"]]
    write_csv(path.with_suffix(".csv"), flat)
    return path


def read(path: Path, keys: Iterable[str] = KINDS, command: str = "launch/bench.py") -> Result:
    """A result of a command, which has these keys; ParNetError where the file is missing or something else."""
    try:
        result = json.loads(path.read_text())
        if missing := [key for key in keys if key not in result]:
            raise KeyError(missing[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParNetError(f"{path}: no result of {command} ({error})") from None
    return result


def relation(row: Mapping, rows: Sequence[Mapping]) -> str:
    """Ours over this row, with its interval, and what it says; nothing of ours or what was not compared."""
    mine = compared(rows, ours=True)
    if mine is None or not row.get("ratio"):
        return ""
    value, low, high = row["ratio"]
    return f"{value:.3f} ({low:.3f} to {high:.3f}), {says(mine, row)}"


def says(mine: Mapping, row: Mapping) -> str:
    """What the ratio of ours to a compared row tells, in words."""
    _, low, high = row["ratio"]
    if min(mine["n"], row["n"]) < TELLING:
        return "too few runs to say"
    told = "ours faster" if high < 1 else "ours slower" if low > 1 else "no difference shown"
    return f"{told} as far as unstable times tell" if mine["unstable"] or row["unstable"] else told


def show(result: Result, console: Console) -> None:
    """Tables of latency and of set-up, then what is missing, what disagrees, and what to mistrust."""
    rows = sorted(result["rows"], key=lambda row: row["infer_step_time"])
    on_gpu = any(row["enqueue_ms"] for row in rows)
    extra = ("enqueue", "device") if on_gpu else ()
    heads = ("contender", "median", "p90", "p95", "p99", "min", "n", *extra, "ours / this")
    table = make_table(*heads, title="Latency of one pass, ms")
    for row in rows:
        latency = (f"{row['latency_ms'][key]:.3f}" for key in ("median", "p90", "p95", "p99", "min"))
        more = (f"{row[f'{key}_ms']['median']:.3f}" if row[f"{key}_ms"] else "" for key in extra)
        ratios = relation(row, rows)
        table.add_row(row["contender"], *latency, runs(row), *more, ratios, style="bold" if row["ours"] else None)
    console.print(table)
    heads = (
        "contender", "arithmetic", "error (limit)", "set-up s", "first call s", "GFLOP/s", "GB/s", "overhead us",
        "verdict",
    )  # fmt: skip
    table = make_table(*heads, title="Set-up, what is reached of what is possible, verdict")
    for row in rows:
        overhead = row.get("overhead_us")
        table.add_row(
            row["contender"], row["arithmetic"], f"{row['error']:.1e} ({row['limit']:.0e})",
            f"{row['setup_s']:.2f}", f"{row['first_call_s']:.2f}", *(reached(row, *pair) for pair in SHARES),
            "" if overhead is None else f"{overhead:.1f}",
            "unstable: " + "; ".join(row["unstable"]) if row["unstable"] else "stable",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        console.print(f"{row['contender']}: {row['settings']}", soft_wrap=True)
    for name, why in result["missing"].items():
        failed = name in result["failed"]
        said = f"failed: {name}: {why.removeprefix('failed: ')}" if failed else f"not here: {name}: {why}"
        console.print(said, soft_wrap=True)
    for name, how in result["disagree"].items():
        console.print(f"not compared: {name}: {how}", soft_wrap=True)
