#!/usr/bin/env python
"""Draw the floors of the house, from which imports run down only: docs/floors.svg.

python docs/draw_floors.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet.files import write_atomically

WIDTH, HEIGHT, GAP, LEFT, TOP = 760, 50, 8, 12, 12


class Floor(NamedTuple):
    """Modules of one floor may import each other, without a circle, and whatever lies below. colour: of the picture."""

    name: str
    purpose: str
    colour: str
    modules: tuple[str, ...]


P = "parallel_parnet"
FLOORS = (
    Floor("launch/", "what a person types from a clone", "#e4e4e4", ("launch",)),
    Floor("commands/", "what it starts: infer, bench, plan, depth, gpu, train, profile, export", "#f6c6c6", (
        f"{P}.commands", f"{P}.__main__",
    )),
    Floor("the package", "the public names", "#e4e4e4", (P,)),
    Floor("int8/", "integers for a program's numbers, found from pictures", "#cbe8c2", (f"{P}.int8",)),
    Floor("engine, choice, saved", "which executor, on what lanes, kept in a file", "#f9ddb1", (
        f"{P}.engine", f"{P}.choice", f"{P}.proof", f"{P}.saved", f"{P}.turns", f"{P}.gpu",
    )),
    Floor("executors/", "how a program runs, on one device or many", "#bcdcf5", (f"{P}.executors",)),
    Floor("profiling/, transport/", "where time goes; how features travel between ranks", "#cbe8c2", (
        f"{P}.profiling", f"{P}.transport",
    )),
    Floor("planning/", "how long it takes, from numbers", "#e3cdea", (f"{P}.planning",)),
    Floor("program/", "what runs, as data: folding, placement", "#f9ddb1", (f"{P}.program",)),
    Floor("network/, preprocess", "what is trained: blocks, checkpoints; pictures", "#bcdcf5", (
        f"{P}.network", f"{P}.preprocess",
    )),
    Floor("kernels/", "gpu/ (Triton), hopper/ (CUDA C++), cpu/ (C), each beside its twin: tensors alone", "#cbe8c2", (
        f"{P}.kernels",
    )),
    Floor("files, errors, settings, forking, parity", "what all may need", "#e4e4e4", (
        f"{P}.files", f"{P}.errors", f"{P}.settings", f"{P}.forking", f"{P}.parity", f"{P}.cores",
    )),
)  # fmt: skip


def main() -> None:
    height = 2 * TOP + len(FLOORS) * (HEIGHT + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>The floors of the house: imports run down only</title>",
        "<style>text{font:13px sans-serif;fill:#222}.b{font-weight:bold}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for i, floor in enumerate(FLOORS):
        y = TOP + i * (HEIGHT + GAP)
        parts += [
            f'<rect x="{LEFT}" y="{y}" width="{WIDTH - 2 * LEFT - 40}" height="{HEIGHT}" rx="5" fill="{floor.colour}" '
            'stroke="#555"/>',
            f'<text x="{LEFT + 14}" y="{y + 21}" class="b">{floor.name}</text>',
            f'<text x="{LEFT + 14}" y="{y + 39}">{floor.purpose}</text>',
        ]
    x = WIDTH - LEFT - 16
    parts.append(
        f'<path d="M{x} {TOP} V{height - TOP - 8} m-6 -9 l6 12 l6 -12" fill="none" stroke="#555" stroke-width="2"/>'
    )
    parts.append(f'<text transform="translate({x - 8} {height / 2}) rotate(-90)" text-anchor="middle">imports</text>')
    write_atomically(Path(__file__).with_name("floors.svg"), "\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
