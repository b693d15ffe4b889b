"""Results of launch/bench.py as one figure and one page of tables, beside the results.

    python launch/bench_report.py                                 # of this machine
    python launch/bench_report.py results/bench-infer-parnet_s-*.json

The page has every result of the machine; the figure has ParNet-S and XL at 224 pixels and batch 1, or the results that
are named, which must come from one machine. It is written as SVG and PNG, and needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from parallel_parnet import ParNetError
from parallel_parnet.files import write_atomically

from ..common import RESULTS, Parser, machine, slug
from ..drawing import FORMATS, save
from ..ranks import Ranks
from ..sections import table
from .bars import draw
from .rows import SHARES, Result, Row, reached, read, relation, runs

FIGURE = ("bench-infer-parnet_s-224-", "bench-infer-parnet_xl-224-")
TIME = "infer_step_time"
HEADS = (
    "contender", "arithmetic", "error", "median, ms", "p90", "p99", "min", "n", "first call, s",
    "GFLOP/s (of a product's)", "overhead, us", "ours / this", "verdict",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="JSON files, in the order of the figure's panels")
    args = parser.parse_args()
    here = slug(machine(Ranks.from_environment().device(None)))
    if not args.results:
        shown = [path for path in results_of(RESULTS, here) if path.name.startswith(FIGURE) and "-b1-" in path.name]
        args.results = sorted(shown, key=lambda path: [f"-{kind}-" in path.name for kind in ("int8", "bf16")])
    if not args.results:
        raise ParNetError("no results of this machine in results/: run make bench first, or name some files")
    return args


def results_of(folder: Path, machine: str) -> list[Path]:
    """Files of all results of a machine, which is named as in file names."""
    return sorted(folder.glob(f"bench-infer-*-{machine}-torch*.json"))


def page(results: Sequence[Result], figure: str) -> str:
    """Tables of all results as Markdown."""
    parts = [f"![latency by contender]({figure})"]
    for result in results:
        header = result["header"]
        size = header["size"]
        parts += [
            f"## {header['model']}, {size} x {size}, batch {header['batch_size']}, {header['dtype']}",
            f"{header['machine']}, {header.get('gpu') or header['cpu']}, {header['threads']} thread(s), torch "
            f"{header['torch']}, {header['date']}, commit {str(header['commit'])[:10]}.",
            f"```\n{header['command']}\n```",
            table(HEADS, [cells(row, result["rows"]) for row in sorted(result["rows"], key=lambda row: row[TIME])]),
            *(f"- not here: {name}: {why}" for name, why in result["missing"].items()),
            *(f"- not compared: {name}: {how}" for name, how in result["disagree"].items()),
        ]
    return "\n\n".join(parts) + "\n"


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """A row under HEADS; rows: all of its result."""
    return [
        f"**{row['contender']}**" if row["ours"] else row["contender"],
        row["arithmetic"],
        f"{row['error']:.1e}",
        *(f"{row['latency_ms'][key]:.3f}" for key in ("median", "p90", "p99", "min")),
        runs(row),
        f"{row['setup_s'] + row['first_call_s']:.2f}",
        reached(row, *SHARES[0]),
        "" if row.get("overhead_us") is None else f"{row['overhead_us']:.1f}",
        relation(row, rows),
        "unstable: " + "; ".join(row["unstable"]) if row["unstable"] else "stable",
    ]


def main() -> int:
    args = parse_arguments()
    results = [read(path) for path in args.results]
    machines = {result["header"]["machine"] for result in results}
    if len(machines) > 1:
        raise ParNetError(f"results of {len(machines)} machines ({'; '.join(sorted(machines))}): give those of one")
    folder = args.results[0].parent
    where = slug(machines.pop())
    name = f"latency-by-peer-{where}"
    figure = draw(results)
    everything = sorted({*args.results, *results_of(folder, where)})
    for ending in FORMATS:
        save(figure, folder / f"{name}{ending}")
    write_atomically(folder / f"{name}.md", page([read(path) for path in everything], f"{name}.svg"))
    print(folder / f"{name}.md")
    return 0
