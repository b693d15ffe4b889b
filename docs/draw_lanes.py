#!/usr/bin/env python
"""Draw which lane runs which operation on which level, and what crosses: docs/lanes.svg, from the program itself.

python docs/draw_lanes.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet import Placement, create_model, fold
from parallel_parnet.files import write_atomically
from parallel_parnet.profiling.colours import PALE
from parallel_parnet.program.program import INPUT, Operation

STEP, ROW, BOX_W, BOX_H, LEFT, TOP = 78, 92, 66, 44, 104, 66
SHORT = {"stem": "stem", "fusion": "fuse", "head": "classify"}


def centre(level: int, lane: int) -> tuple[float, float]:
    return LEFT + (level - 1) * STEP + BOX_W / 2, TOP + lane * ROW + BOX_H / 2


def box(op: Operation, lane: int) -> str:
    x, y = centre(op.level, lane)
    title = SHORT.get(op.stage, op.label)
    block = f"block {op.name.split('.')[-1]}" if op.stage == "stream" else op.name
    return (
        f'<rect x="{x - BOX_W / 2}" y="{y - BOX_H / 2}" width="{BOX_W}" height="{BOX_H}" rx="5" '
        f'fill="{PALE[op.label]}" stroke="#555"/>'
        f'<text x="{x}" y="{y - 3}" class="b">{title}</text><text x="{x}" y="{y + 12}">{shorten(block)}</text>'
    )


def shorten(name: str) -> str:
    return name.replace("downsamples_2", "down").replace("combine", "comb")


def arrow(source: tuple[float, float], target: tuple[float, float]) -> str:
    (x0, y0), (x1, y1) = source, target
    up = 1 if y1 < y0 else -1
    y0, y1 = y0 - up * BOX_H / 2, y1 + up * (BOX_H / 2 + 4)
    middle = (y0 + y1) / 2
    return f'<path d="M{x0},{y0} C{x0},{middle} {x1},{middle} {x1},{y1}" class="t" marker-end="url(#a)"/>'


def main() -> None:
    program = fold(create_model("parnet_s"))
    placement = Placement.by_streams(program, 3)
    width, height = LEFT + program.depth * STEP + 8, TOP + placement.lanes * ROW + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="10.5" text-anchor="middle">',
        "<style>.b{font-weight:bold;font-size:12px}.t{fill:none;stroke:#b00020;stroke-width:2}.l{text-anchor:start}"
        "</style>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#b00020"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="34" class="l b">level</text><text x="8" y="{height - 14}" class="l">'
        "Boxes of one column can run at the same time. Red arrows: features that cross lanes. The stem is recomputed "
        "on each lane; only two features travel to the coordinator.</text>",
    ]
    parts += [f'<text x="{centre(level, 0)[0]}" y="34" class="b">{level}</text>' for level in range(1, 13)]
    for lane in range(placement.lanes):
        x, y = 8, centre(1, lane)[1]
        role = "coordinator" if lane == placement.coordinator else ""
        parts.append(f'<text x="{x}" y="{y}" class="l b">GPU {lane}</text>')
        parts.append(f'<text x="{x}" y="{y + 15}" class="l">{role}</text>')
    reader = {name: op for op in reversed(program.operations) for name in op.inputs}
    for t in placement.transfers(program):
        if t.feature != INPUT:
            source, target = program.by_name[t.feature].level, reader[t.feature].level
            parts.append(arrow(centre(source, t.source), centre(target, t.target)))
    parts += [box(op, lane) for op in program.operations for lane in placement.where[op.name]]
    write_atomically(Path(__file__).with_name("lanes.svg"), "\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
