#!/usr/bin/env python
"""Draw the package layers, in which imports go down only: docs/floors.svg.

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
    """A layer: its modules may import each other, without a cycle, and all layers below. colour: of the picture."""

    name: str
    purpose: str
    colour: str
    modules: tuple[str, ...]


P = "parallel_parnet"
FLOORS = (
    Floor("launch/", "scripts to start with python or torchrun, from a clone", "#e4e4e4", ("launch",)),
    Floor(
        "commands/",
        "infer, validate, train, quantize, export, bench, throughput, versus, plan, profile, depth, gpu, tune",
        "#f6c6c6",
        (f"{P}.commands", f"{P}.__main__"),
    ),
    Floor("the package", "the public names", "#e4e4e4", (P,)),
    Floor("int8/", "int8 and fp8: calibration and quantised programs", "#cbe8c2", (f"{P}.int8",)),
    Floor("engine, choice, saved", "which executor, on which lanes; saved engines", "#f9ddb1", (
        f"{P}.engine", f"{P}.choice", f"{P}.proof", f"{P}.saved", f"{P}.turns", f"{P}.gpu",
    )),
    Floor("executors/", "how a program runs, on one device or several", "#bcdcf5", (f"{P}.executors",)),
    Floor("profiling/, transport/", "traces and reports; transfers between ranks", "#cbe8c2", (
        f"{P}.profiling", f"{P}.transport",
    )),
    Floor("planning/", "predicted time of a placement, and the search for the fastest", "#e3cdea", (f"{P}.planning",)),
    Floor("program/", "the folded network, as data; placements", "#f9ddb1", (f"{P}.program",)),
    Floor("network/, preprocess", "the training form: blocks, checkpoints; image preprocessing", "#bcdcf5", (
        f"{P}.network", f"{P}.preprocess",
    )),
    Floor("kernels/", "gpu/ (Triton), hopper/ (CUDA C++), cpu/ (C), each with a torch twin; tensors only", "#cbe8c2", (
        f"{P}.kernels",
    )),
    Floor("files, errors, settings, forking, parity", "shared by all layers", "#e4e4e4", (
        f"{P}.files", f"{P}.errors", f"{P}.settings", f"{P}.forking", f"{P}.parity", f"{P}.cores",
    )),
)  # fmt: skip


def main() -> None:
    height = 2 * TOP + len(FLOORS) * (HEIGHT + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Package layers: imports go down only</title>",
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
