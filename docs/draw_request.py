#!/usr/bin/env python
"""Draw one request over three ranks, time running down: docs/request.svg, from the program and its placement.

python docs/draw_request.py
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet import Placement, create_model, fold
from parallel_parnet.files import write_atomically
from parallel_parnet.profiling.colours import PALE
from parallel_parnet.program.placement import Segment
from parallel_parnet.program.program import INPUT, Program

COLUMN, LEFT, TOP, LEVEL, BOX = 270, 90, 236, 34, 128
RED, GREY = "#b00020", "#777"


def x_of(lane: int) -> float:
    return LEFT + lane * COLUMN


def y_of(level: float) -> float:
    """The top of a level."""
    return TOP + (level - 1) * LEVEL


def text(x: float, y: float, content: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" {style}>{content}</text>'


def arrow(source: int, target: int, y: float, label: str, margin: int = 4, colour: str = RED) -> str:
    """From one rank to another, from and to so many pixels beside their lines; grey ones are dashed."""
    side = 1 if target > source else -1
    start, end = x_of(source) + side * margin, x_of(target) - side * (margin + 3)
    return (
        f'<path d="M{start},{y} L{end},{y + 10}" stroke="{colour}" stroke-width="2" fill="none" '
        f'marker-end="url(#{colour[1:]})" stroke-dasharray="{"5 4" if colour == GREY else "none"}"/>'
        + text(x_of(target) - side * (margin + 72), y + (2 if side > 0 else 20), label, f'fill="{colour}"')
    )


def boxes(program: Program, segment: Segment) -> list[str]:
    """A segment's operations, one box for those of one stage and stream that follow each other."""
    parts, labels = [], [program.by_name[name].label for name in segment.operations]
    x = x_of(segment.lane) - BOX / 2
    for label in dict.fromkeys(labels):
        levels = [program.by_name[n].level for n, own in zip(segment.operations, labels, strict=True) if own == label]
        y, height = y_of(min(levels)) + 2, (max(levels) - min(levels) + 1) * LEVEL - 4
        parts.append(
            f'<rect x="{x}" y="{y}" width="{BOX}" height="{height}" rx="5" fill="{PALE[label]}" stroke="#555"/>'
            + text(x_of(segment.lane), y + height / 2 + 4, label, 'class="b"')
        )
    return parts


def main() -> None:
    program = fold(create_model("parnet_s"))
    placement = Placement.by_streams(program, 3)
    side = program.config.image_size
    width, bottom = LEFT + 2 * COLUMN + 130, y_of(program.depth + 1)
    height = bottom + 96
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11" text-anchor="middle">',
        "<style>.b{font-weight:bold;font-size:12px}.l{text-anchor:start}</style><defs>",
        *(
            f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
            for colour in (RED, GREY)
        ),
        f'</defs><rect width="{width}" height="{height}" fill="white"/>',
    ]
    for lane in range(placement.lanes):
        role = ", coordinator" if lane == placement.coordinator else ""
        parts.append(text(x_of(lane), 22, f"rank {lane}{role}", 'class="b"'))
        parts.append(f'<path d="M{x_of(lane)},32 V{bottom + 60}" stroke="#bbb" stroke-width="2"/>')
        parts.append(text(x_of(lane) + 12, 46, "receives posted" if lane == 0 else "waits for a header", 'class="l"'))
    for lane in (1, 2):
        parts.append(arrow(0, lane, 60 + 20 * lane, "header: run, N, H, W"))
        parts.append(arrow(0, lane, 112 + 20 * lane, f"picture, {math.prod((3, side, side)) * 4 / 1e3:.0f} kB"))
    reader = {name: op for op in reversed(program.operations) for name in op.inputs}
    for t in placement.transfers(program):
        if t.feature != INPUT:
            size = math.prod(program.shape(t.feature, 1, side, side)) * 4 / 1e3
            level = program.by_name[t.feature].level + 1
            assert level <= reader[t.feature].level, "a feature arrives before it is read"
            parts.append(arrow(t.source, t.target, y_of(level) + 4, f"{t.feature}, {size:.0f} kB", BOX // 2))
    for segment in placement.segments(program):
        parts += boxes(program, segment)
    for lane in (1, 2):
        parts.append(arrow(0, lane, TOP - 66 + 20 * lane, "header of the next", colour=GREY))
    parts.append(text(x_of(0), bottom + 16, "logits to the caller", 'class="b"'))
    parts.append(
        text(10, bottom + 84, "Red: this request, of ParNet-S at 224 x 224 in fp32. Dashed: Engine.map announces the "
             "next one before it computes this one.", 'class="l"')
    )  # fmt: skip
    write_atomically(Path(__file__).with_name("request.svg"), "\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
