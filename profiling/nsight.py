"""Nsight Systems and Nsight Compute: the right command line for a launch command, and their exports as a timeline.

Options and columns as in the Nsight Systems User Guide (command line options), its "SQLite Export Schema Reference",
and the Nsight Compute CLI manual.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from ..errors import ParNetError
from .ranges import CAPTURED, DOMAIN
from .spans import REQUEST, Span
from .timeline import REAL, Bar, Operations, Timeline, arrows, bars_of

TORCHRUN = "torch.distributed.run"
TRACING = ("infer", "bench")  # commands that take --trace
NVTX_PUSH_POP, NVTX_DOMAIN = 59, 75  # eventType in NVTX_EVENTS


def split_launch(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a launch into torchrun with its own options, or nothing, and what each rank runs: the python, the script or
    -m and a module, its arguments; or `parnet` and its arguments."""
    words = list(command)
    modules = [i for i, (a, b) in enumerate(pairwise(words)) if a == "-m" and b != TORCHRUN]
    script = min([*modules, *(i for i, word in enumerate(words) if word.endswith(".py"))], default=None)
    if script is None:
        if words and Path(words[0]).name == "parnet":
            return [], words
        raise ParNetError("give the launch command after --, as: -- torchrun --nproc-per-node 3 launch/infer.py")
    before, rank = words[:script], words[script:]
    if "--no-python" in before:
        raise ParNetError("leave --no-python and python out of the launch: nsys or ncu takes python's place")
    if TORCHRUN in before:
        return before, [before[0], *rank]
    if before and Path(before[0]).name == "torchrun":
        return before, [str(Path(before[0]).with_name("python")), *rank]
    return [], [*(before or ["python"]), *rank]


def nsys_command(command: Sequence[str], folder: Path, capture: str = "nvtx") -> list[str]:
    """Make the command line for one report per rank in `folder`: torchrun starts `nsys profile` in place of python.

    capture: "nvtx" or "cudaProfilerApi", the traced requests alone, or "none", everything. infer and bench are told to
    --trace, since it is then that they run requests to be captured. ParNetError where another script is to be captured
    so, or the trace is to go elsewhere.
    """
    torchrun, rank = split_launch(command)
    ranges = {
        "nvtx": ["--capture-range=nvtx", f"--nvtx-capture={CAPTURED}@{DOMAIN}", "--capture-range-end=stop"],
        "cudaProfilerApi": ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"],
        "none": [],
    }[capture]
    profile = [
        "nsys", "profile", "--trace=cuda,nvtx", "--cuda-graph-trace=node", "--sample=none", "--cpuctxsw=none",
        *ranges, "--force-overwrite=true", f"--output={_report(torchrun, folder)}",
    ]  # fmt: skip
    called = _called(rank)
    traces = called in TRACING
    if traces and any(word.partition("=")[0] == "--trace" for word in rank):
        raise ParNetError(
            f"leave --trace out of the launch: it goes to {folder / 'trace.json.gz'}, beside what nsys saw"
        )
    if not traces and capture != "none":
        raise ParNetError(f"{called or shlex.join(rank)} has no --trace, which nsys would wait for: add --capture none")
    trace = ["--trace", str(folder / "trace.json.gz")] if traces else []
    return [*_in_ranks(torchrun, profile, rank), *trace]


def _report(torchrun: Sequence[str], folder: Path) -> Path:
    return folder / ("rank%q{RANK}" if torchrun else "rank0")  # nsys and ncu put the variable's value in


def _in_ranks(torchrun: Sequence[str], tool: Sequence[str], rank: Sequence[str]) -> list[str]:
    return [*torchrun, *(["--no-python"] if torchrun else []), *tool, *rank]


def _called(rank: Sequence[str]) -> str:
    """The command that each rank runs: a script's name, or what follows the package's."""
    for word, after in pairwise([*rank, ""]):
        if word.endswith(".py"):
            return Path(word).stem
        if Path(word).name in ("parnet", "parallel_parnet"):
            return after
    return ""


def ncu_command(
    command: Sequence[str], folder: Path, kernel: str, skip: int = 0, count: int = 1, lock_clocks: bool = True
) -> list[str]:
    """Make the command line of Nsight Compute on `count` launches of the kernels whose name matches a regular
    expression, after `skip`."""
    torchrun, rank = split_launch(command)
    profile = [
        "ncu", "--target-processes=all", "--set=full", "--graph-profiling=node", "--nvtx",
        f"--kernel-name=regex:{kernel}",
        f"--launch-skip={skip}", f"--launch-count={count}", *([] if lock_clocks else ["--clock-control=none"]),
        "--force-overwrite", f"--export={_report(torchrun, folder)}",
    ]  # fmt: skip
    return _in_ranks(torchrun, profile, rank)


def export_command(report: Path) -> list[str]:
    """Make the command line that exports a report to the database beside it that `read_rank` reads."""
    database = report.with_suffix(".sqlite")
    return ["nsys", "export", "--type=sqlite", "--force-overwrite=true", f"--output={database}", str(report)]


def read_rank(folder: Path, rank: int) -> tuple[list[Span], int]:
    """Read one rank's ranges and kernels, in seconds, and the moment from which they count, in ns since the epoch, from
    rank0.sqlite, rank1.sqlite, ...; ParNetError where that is missing or cut off."""
    database = folder / f"rank{rank}.sqlite"
    if not database.exists():
        command = export_command(database.with_suffix(".nsys-rep"))
        raise ParNetError(f"{database}: no such export; {shlex.join(command)}")
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            return _query(connection)
    except (sqlite3.Error, TypeError) as error:
        raise ParNetError(f"{database}: not a whole export of nsys ({error})") from None


def merge(timeline: Timeline, folder: Path) -> Timeline:
    """Put the real path as Nsight Systems saw it into a timeline: its ranges, and every kernel on its CUDA stream.

    `timeline` is what --trace wrote in that run. Ranks are put on one clock by their sessions' starts. ParNetError
    where a rank has no request, or its ranges name operations that the program does not have.
    """
    found = [read_rank(folder, rank) for rank in range(timeline.known.lanes)]
    first = min(epoch for _, epoch in found)
    bars: list[Bar] = []
    for lane, (spans, epoch) in enumerate(found):
        if REQUEST not in {span.name for span in spans}:
            raise ParNetError(
                f"{folder}: rank {lane} has no range {REQUEST!r} of domain {DOMAIN}: was anything captured?"
            )
        bars += _checked(timeline.known, bars_of(timeline.known, lane, REAL, spans, (first - epoch) * 1e-9), folder)
    by = _start(timeline.bars, timeline.known) - _start(bars, timeline.known)
    bars = [replace(bar, start=bar.start + by, end=bar.end + by) for bar in bars]
    bars += [bar for bar in timeline.bars if bar.row != REAL and bar.kind != "kernel"]
    return replace(timeline, bars=tuple(bars), arrows=tuple(arrows(timeline.known, bars)))


def _start(bars: Iterable[Bar], known: Operations) -> float:
    return min(bar.start for bar in bars if bar.lane == known.coordinator and (bar.row, bar.kind) == (REAL, REQUEST))


def _checked(known: Operations, bars: list[Bar], folder: Path) -> list[Bar]:
    labels = set(known.labels.values())
    for bar in bars:
        if bar.kind == "segment" and not labels.issuperset(bar.name.split(", ")):
            raise ParNetError(
                f"{folder}: lane {bar.lane} has a range {bar.name!r}, which the program of the trace does not: "
                "ranks with differing programs, or another run's exports"
            )
    return bars


def _query(connection: sqlite3.Connection) -> tuple[list[Span], int]:
    (epoch,) = connection.execute("SELECT utcEpochNs FROM TARGET_INFO_SESSION_START_TIME").fetchone()
    domain = connection.execute(
        "SELECT domainId FROM NVTX_EVENTS WHERE eventType = ? AND text = ?", (NVTX_DOMAIN, DOMAIN)
    ).fetchone()
    ranges = connection.execute(
        "SELECT coalesce(e.text, s.value), e.start, e.end FROM NVTX_EVENTS e LEFT JOIN StringIds s ON s.id = e.textId "
        "WHERE e.eventType = ? AND e.domainId = ? AND e.end IS NOT NULL", (NVTX_PUSH_POP, *(domain or (-1,))),
    ).fetchall()  # fmt: skip
    spans = [Span(name, start * 1e-9, end * 1e-9) for name, start, end in ranges if name != CAPTURED]
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "CUPTI_ACTIVITY_KIND_KERNEL" in tables:  # tables are made only where there is something to put in
        kernels = connection.execute(
            "SELECT s.value, k.start, k.end, k.streamId FROM CUPTI_ACTIVITY_KIND_KERNEL k "
            "JOIN StringIds s ON s.id = k.demangledName"
        )
        spans += [Span(name, start * 1e-9, end * 1e-9, f"CUDA stream {on}") for name, start, end, on in kernels]
    return spans, epoch
