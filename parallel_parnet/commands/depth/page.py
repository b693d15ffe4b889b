"""The experiment's page: what was measured, what the fit says, and where that contradicts the claim."""

from __future__ import annotations

from itertools import starmap
from pathlib import Path

from parallel_parnet.files import write_atomically

from ..sections import link, table
from .claims import claims
from .curves import executors, groups, select
from .fit import Fit, fit
from .points import points

GOOD = 0.95  # R2, below which the text says what is missing
MISSING = (
    f"Where R2 is below {GOOD}, a single a and b are not enough: a GFLOP costs more in narrow blocks than in wide "
    "ones, and a hand-over more for larger features."
)

NO_GPU = "On a GPU: not measured. There `--device cuda`, without `--executors`, writes that page."
CLAIM = (
    "The same 48 blocks, so the same work, in one stream or in several parallel ones. A lane computes one operation at "
    "a time. An executor that runs one operation after another has one lane. `native` has one per thread, and its "
    "threads share the operations of a level with fewer than them. One stream is also timed on one lane, and the "
    "faster time counts."
)
FIT = (
    "`T = a x steps + b x work + c`. Steps are the operations that the busiest lane computes one after another, and "
    "work is their work; for native, whose threads share operations, it is all work divided by the threads. With one "
    "lane, steps are all operations; with a lane for each stream, they are the depth. Least squares on relative "
    'errors over families (a) and (b), with 95% intervals by resampling. "Explain" is the share of the variance of '
    "relative latency."
)
FITTED = ("", "a, us a step", "b, us a GFLOP", "c, us", "steps explain", "work explains", "R2")
CAPTIONS = {  # of each figure: alternative text, caption
    "depth": (
        "Latency of the same blocks by number of streams",
        "(a) The same 48 blocks in 1, 2, ... streams: constant work, falling depth. Shaded: Brent's bounds for "
        "native's lanes, from its time on one lane; native is below them where its threads share an operation, and "
        "above where sharing a small one costs more than it saves. Dotted: that time with a lane for each stream.",
    ),
    "work": ("Latency by work", "(b) Depth 10, work from 1x to 16x: by wider blocks, and by more streams."),
    "lanes": (
        "Simulated and measured latency on one lane",
        "One lane, eager: the simulation's prediction, from operations measured alone, against the network measured as "
        "a whole. Placements on several real ranks are checked in docs/planner.md.",
    ),
    "scaling": (
        "Latency of ParNet-S to XL by image size",
        "ParNet-S to XL at 224, 256 and 320 pixels, with three streams, and with one stream of the same depth and "
        "work.",
    ),
}


def write_page(path: Path, rows: list[dict], header: dict, figures: dict[str, Path]) -> None:
    """Write the page as Markdown; figures by name."""
    cpu = f", {header['cpu']}, kernels in {header['isa']}" if header.get("cpu") else ""  # which older files lack
    commit = f", commit {header['commit'][:10]}" if header.get("commit") else ""
    tried = {name: _fit(rows, executor, column) for name, executor, column in _series(rows)}
    fits = {name: found for name, found in tried.items() if found}
    verdicts = "; ".join(_verdict(name, found) for name, found in fits.items())
    parts = [
        "# Latency against depth",
        f"Measured on {header['date']} on a {header['machine']}{cpu}, {header['dtype']}, {header['threads']} compute "
        f"thread(s), torch {header['torch']}{commit}: medians of interleaved runs after warm-up. To measure again, use "
        "a new folder (existing results are not measured again):",
        f"```\nmkdir again\n{_command(rows, header)}\n```",
        "\n".join([*([] if header["machine"].startswith("NVIDIA") else [NO_GPU]), *_unmeasured(rows, header)]),
        *_section("The claim", CLAIM, "\n".join(claims(rows))),
        *_section("What the fit says", FIT, table(FITTED, list(starmap(_fit_row, fits.items()))) if fits else ""),
        f"A step costs as much as this work, and dominates operations with less: {verdicts}." if fits else "",
        MISSING if any(found.r2 < GOOD for found in fits.values()) else "",
        *(
            f"![{short}]({link(file, path)})\n\n{caption}"
            for (short, caption), file in ((CAPTIONS[name], file) for name, file in figures.items())
        ),
        *_section("In numbers", "\n".join(_numbers(rows))),
        *_section("The published networks", _published(rows)),
    ]
    write_atomically(path, "\n\n".join(filter(None, parts)) + "\n")


def _section(title: str, *paragraphs: str) -> list[str]:
    """Nothing where the last one, of what was measured, is empty, as after --only."""
    return [f"## {title}", *paragraphs] if paragraphs[-1] else []


def _command(rows: list[dict], header: dict) -> str:
    """What measures the same networks in the same setting, whatever is the default where it is typed."""
    device = "cuda" if header["machine"].startswith("NVIDIA") else "cpu"
    words = ["--device", device, "--dtype", header["dtype"], *["--quick"] * header["quick"], "--out", "again"]
    line = f"python launch/latency_vs_depth.py {' '.join(words)} --executors {' '.join(executors(rows))}"
    return f"OMP_NUM_THREADS={header['threads']} {line}"


def _unmeasured(rows: list[dict], header: dict) -> list[str]:
    """What an executor has not measured yet, as after --only."""
    all_of_them = points(header["quick"])
    missing = {name: [g for g in all_of_them if not select(rows, g, name)] for name in executors(rows)}
    return [f"Not measured yet with {name}: {'; '.join(left)}." for name, left in missing.items() if left]


def _series(rows: list[dict]) -> list[tuple[str, str, str]]:
    """What is fitted: a name, whose rows, and the column of the latency."""
    measured = [(f"{name}, {_lanes(rows, name)}, measured", name, "median_ms") for name in executors(rows)]
    simulated = ("a lane per stream, simulated", "eager", "lanes_ms")
    return [*measured, simulated, ("the same with real links, simulated", "eager", "linked_lanes_ms")]


def _lanes(rows: list[dict], executor: str) -> str:
    lanes = max(row["lanes"] for row in select(rows, "", executor))
    return f"{lanes} lane{'s' * (lanes > 1)}"


def _fit(rows: list[dict], executor: str, column: str) -> Fit | None:
    chosen = [r for group in ("depth", "work") for r in select(rows, group, executor)]
    if not (select(chosen, "depth") and select(chosen, "work")):
        return None  # one family alone cannot part steps from work
    steps, work = ("steps", "busiest_gflops") if column == "median_ms" else ("depth", "span_gflops")
    return fit([r[steps] for r in chosen], [r[work] for r in chosen], [r[column] for r in chosen])


def _fit_row(name: str, f: Fit) -> list[str]:
    def cell(value: float, interval: tuple[float, float]) -> str:
        return f"{value * 1e3:.0f} ({interval[0] * 1e3:.0f} to {interval[1] * 1e3:.0f})"

    cells = [cell(f.a, f.a_interval), cell(f.b, f.b_interval), cell(f.c, f.c_interval)]
    return [name, *cells, f"{f.share_steps:.0%}", f"{f.share_work:.0%}", f"{f.r2:.2f}"]


def _verdict(name: str, f: Fit) -> str:
    if f.a_interval[0] <= 0:
        text = "a step's cost is not distinguishable from zero"
    elif f.crossover is None:
        text = "work's cost is not distinguishable from zero"
    else:
        text = f"{f.crossover * 1e3:.1f} MFLOP"
    return f"{text} (*{name}*)"


def _numbers(rows: list[dict]) -> list[str]:
    """What families (b) and (c) show."""
    parts = []
    for group in (group for family in ("work", "batch", "resolution") for group in groups(rows, family)):
        said, names = [], executors(select(rows, group))
        for executor in names:
            own = sorted(select(rows, group, executor), key=lambda r: r["gflops"])
            low, high = own[0], own[-1]
            said.append(f"{executor} {high['median_ms'] / low['median_ms']:.1f}")
        more = high["gflops"] / low["gflops"]
        parts.append(
            f"- {group}: {more:.0f}x the work at depth {low['depth']} multiplies latency by: {', '.join(said)}."
        )
    return parts


def _published(rows: list[dict]) -> str:
    """(d): the published networks."""
    names, published, lines = executors(rows), select(rows, "published"), []
    if not published:
        return ""
    for network in dict.fromkeys(r["network"] for r in published):
        own = {r["executor"]: r for r in published if r["network"] == network}
        first = next(iter(own.values()))
        cells = [f"{own[n]['median_ms']:.1f}" if n in own else "" for n in names]
        lines.append([network, f"{first['depth']}", f"{first['gflops']:.1f}", *cells])
    return table(("network", "depth", "GFLOP", *(f"{n}, ms" for n in names)), lines)
