#!/usr/bin/env python
"""Draw the three choices that make an executor: docs/path.svg.

python docs/draw_path.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet.files import write_atomically

WIDTH, LEFT, TOP, COLUMN, ROW = 920, 24, 64, 300, 46
COLUMNS = (
    ("backend", "how a lane computes a segment", "#bcdcf5", (
        ("eager", "torch, operation by operation"), ("inductor", "torch.compile"),
        ("openvino", "CPU; lanes of its own"), ("native", "CPU: our C, a level at a time"),
        ("triton", "GPU: a launch for each level"),
    )),
    ("lanes", "how segments follow each other", "#cbe8c2", (
        ("one queue", "a lane, or lanes in turn"), ("CUDA streams", "of one GPU, or a GPU for each lane"),
        ("ranks", "gloo, shared memory"), ("ranks", "NCCL, symmetric memory"),
    )),
    ("capture", "launched, or replayed", "#f9ddb1", (
        ("step by step", ""), ("a graph of the pass", "all lanes of a process in one"),
        ("a graph of each segment", "transfers run in between"), ("a graph of the rank's pass", "its transfers inside"),
    )),
)  # fmt: skip
SPELLED = (  # a name, its colour, and its boxes in each column
    ("triton", "#2b6cb0", (4, (0, 1, 2, 3), (0,))),
    ("cuda_graph", "#b00020", (4, (0, 1, 2, 3), (1, 1, 2, 3))),
    ("cuda_streams", "#777777", (0, (1, 2, 3), (1, 2, 3))),
)


def x_of(column: int) -> int:
    return LEFT + column * COLUMN


def y_of(row: int) -> int:
    """The middle of a box."""
    return TOP + 22 + row * ROW


def links(boxes: tuple) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From (column, row) to (column, row), each pair once."""
    backend, lanes, captures = boxes
    captures = captures * len(lanes) if len(captures) == 1 else captures
    found = [((0, backend), (1, lane)) for lane in lanes]
    return found + [((1, lane), (2, capture)) for lane, capture in zip(lanes, captures, strict=True)]


def main() -> None:
    height = TOP + 5 * ROW + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Backend, lanes and capture: three choices that combine</title>",
        "<style>text{font:13px sans-serif;fill:#222}.b{font-weight:bold}.s{font-size:11px;fill:#444}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for shift, (_, colour, boxes) in enumerate(SPELLED):
        for (c, row), (d, other) in links(boxes):
            start, end = (x_of(c) + 230, y_of(row) + 6 * (shift - 1)), (x_of(d), y_of(other) + 6 * (shift - 1))
            parts.append(
                f'<path d="M{start[0]} {start[1]} '
                f'C{start[0] + 35} {start[1]} {end[0] - 35} {end[1]} {end[0]} {end[1]}" '
                f'fill="none" stroke="{colour}" stroke-width="1.6"/>'
            )
    for column, (name, purpose, colour, boxes) in enumerate(COLUMNS):
        x = x_of(column)
        parts.append(f'<text x="{x}" y="28" class="b">{name}</text><text x="{x}" y="46" class="s">{purpose}</text>')
        for row, (title, more) in enumerate(boxes):
            y = y_of(row) - 19
            parts += [
                f'<rect x="{x}" y="{y}" width="230" height="38" rx="5" fill="{colour}" stroke="#555"/>',
                f'<text x="{x + 10}" y="{y + (16 if more else 23)}" class="b">{title}</text>',
                f'<text x="{x + 10}" y="{y + 31}" class="s">{more}</text>',
            ]
    for i, (name, colour, _) in enumerate(SPELLED):
        x, y = LEFT + 330 + 150 * i, height - 14
        parts += [
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 24}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>',
            f'<text x="{x + 30}" y="{y}">{name}</text>',
        ]
    write_atomically(Path(__file__).with_name("path.svg"), "\n".join([*parts, "</svg>\n"]))


if __name__ == "__main__":
    main()
