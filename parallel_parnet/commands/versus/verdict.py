"""What the numbers say, in words; nothing here measures.

A row is what `measure.measure` gives of a network. "Faster" and "slower" mean by more than `SAME`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Row = Mapping
SAME = 0.05  # share of the time up to which two networks count as equally fast


class Pair(NamedTuple):
    """A ParNet and the network that it is held against."""

    parnet: Row
    rival: Row


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """Each other network, and the least accurate ParNet that is as accurate or more; else the most accurate one."""
    parnets = sorted((row for row in rows if row["ours"]), key=lambda row: row["top1"])
    rivals = [row for row in rows if not row["ours"]]
    able = {id(rival): [p for p in parnets if p["top1"] >= rival["top1"]] for rival in rivals}
    return [Pair((able[id(rival)] or parnets[-1:])[0], rival) for rival in rivals]


def faster(mine: float, other: float) -> int:
    """1 where mine is the smaller by more than `SAME`, -1 where it is the larger, else 0."""
    return (mine * (1 + SAME) < other) - (other * (1 + SAME) < mine)


def relation(mine: float, other: float) -> str:
    """How a ParNet's time stands to the other's."""
    word = {1: "faster", -1: "slower", 0: "about as fast"}[faster(mine, other)]
    return f"{mine / other:.2f}x, {word}"


def crossover(mine: Mapping[str, float], other: Mapping[str, float]) -> str | None:
    """The fewest lanes from which on a ParNet is the faster one on as many lanes as the other; None where it never is.
    Both by number of lanes, as text."""
    found = None
    for lanes in sorted(mine.keys() & other.keys(), key=int, reverse=True):
        if faster(mine[lanes], other[lanes]) < 1:
            break
        found = lanes
    return found


def sentences(rows: Sequence[Row], cores: int) -> list[str]:
    """A paragraph for each pair, and one for all."""
    found = pairs(rows)
    return [*(paragraph(pair, cores) for pair in found), summary(found)]


def paragraph(pair: Pair, cores: int) -> str:
    """Accuracy, then who is the faster one: on one thread, on all, on simulated lanes and on simulated GPUs."""
    p, r = pair
    said = [f"{p['network']} ({p['top1']:.2f}%) against {r['network']} ({r['top1']:.2f}%)."]
    if p["top1"] < r["top1"]:
        said.append(f"No ParNet is as accurate: the nearest is {r['top1'] - p['top1']:.2f} points below.")
    for threads in dict.fromkeys(("1", str(cores))):
        mine, other = p["threads"][threads]["ms"], r["threads"][threads]["ms"]
        on = "one thread" if threads == "1" else f"all {threads} threads"
        said.append(f"Measured on {on}: {mine:.1f} ms against {other:.1f} ({relation(mine, other)}).")
    said.append(_simulated("lanes", "ms", p["lanes_ms"], r["lanes_ms"]))
    said.append(_simulated("GPUs", "us", p["gpus_us"], r["gpus_us"]))
    return " ".join(said)


def summary(found: Sequence[Pair]) -> str:
    """From how many threads, lanes and GPUs on ParNet is the faster one, and against whom."""
    parts = []
    for what, key in (
        ("threads of this machine", "threads"),
        ("simulated lanes", "lanes_ms"),
        ("simulated GPUs", "gpus_us"),
    ):
        said = []
        for p, r in found:
            mine, other = ({k: t["ms"] if key == "threads" else t for k, t in row[key].items()} for row in (p, r))
            lanes, most = crossover(mine, other), max(mine, key=int)
            when = f"never (up to {most})" if lanes is None else f"from {lanes} on"
            short = "" if p["top1"] >= r["top1"] else ", which is less accurate"
            said.append(f"{when} against {r['network']} ({p['network']}{short})")
        parts.append(f"On {what}: {'; '.join(said)}.")
    return f"Where ParNet is faster at equal accuracy. {' '.join(parts)}"


def _simulated(what: str, unit: str, mine: Mapping, other: Mapping) -> str:
    most, lanes = max(mine, key=int), crossover(mine, other)
    a, b = mine[most], other[most]
    when = f"never faster on up to {most}" if lanes is None else f"faster from {lanes} on"
    return f"Simulated on {most} {what}: {a:.1f} {unit} against {b:.1f} ({relation(a, b)}); {when}."
