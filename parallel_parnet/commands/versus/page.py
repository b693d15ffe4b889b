"""The table, and the section of a page that is made of it; nothing here measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..sections import filled, table
from .simulated import WHAT
from .verdict import Row

TITLE, NEXT = "## Is it faster than ResNet?", "## Log"


def heads(cores: int) -> tuple[str, ...]:
    """Of the table, where all threads are so many."""
    measured = (
        ["1 thread, ms"] + [f"{cores} threads, ms"] * (cores > 1) + [f"best other library, {cores} thread(s), ms"]
    )
    return ("network", "top-1 %", "depth", "GFLOP", *measured, "3 lanes, simulated, ms", "1 and 3 GPUs, simulated, us")


def cells(row: Row) -> list[str]:
    """A network's line of the table: as published, by our engine, by the best peer, and simulated."""
    gpus, peer = row["gpus_us"], row["peer"]
    return [
        row["network"], f"{row['top1']:.2f}", f"{row['depth']}", f"{row['gflop']:.1f}",
        *(f"{times['ms']:.1f}" for times in row["threads"].values()),
        f"{row['peers'][peer]['ms']:.1f} ({peer.split(',')[0]})" if peer else "none",
        f"{row['lanes_ms']['3']:.1f}", f"{gpus['1']:.0f} and {gpus['3']:.0f}",
    ]  # fmt: skip


def section(header: Mapping, rows: Sequence[Row], sentences: Sequence[str], data: str, figure: str) -> str:
    """As Markdown. data, figure: the numbers and the picture, seen from the page."""
    first = (
        "`make versus` runs ParNet and the networks that it is compared with on our own kernels, so that only the "
        "networks differ, and lists the fastest of OpenVINO, ONNX Runtime, ncnn and MNN. On a "
        f"{header['machine']}, {header['cpu']}, batch 1, "
        f"{header['dtype']}, {header['date'][:10]} ([numbers]({data})):"
    )
    parts = [
        TITLE,
        filled(first),
        table(heads(header["threads"]), [cells(row) for row in rows]),
        f"![Top-1 accuracy and latency of {len(rows)} networks, from one thread to many lanes]({figure})",
        *map(filled, sentences),
        filled(WHAT),
    ]
    return "\n\n".join(parts) + "\n"
