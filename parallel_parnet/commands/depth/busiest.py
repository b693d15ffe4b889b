"""How much of a network is on its busiest lane: the two numbers that latency is fitted to.

A lane is what computes one operation at a time. On P lanes the operations of a level go round ceil(k / P) times, so
with one lane latency pays for every operation, and with as many as there are streams for every level: that is the
paper's claim, and everything between is a matter of P.
"""

from __future__ import annotations

from typing import NamedTuple

from parallel_parnet import Program


class Busiest(NamedTuple):
    """steps: operations one after another. gflops: their work."""

    steps: int
    gflops: float


def busiest(program: Program, size: int, batch: int, lanes: int) -> Busiest:
    """Of a program's levels on so many lanes, where each lane takes the largest operation that is left."""
    costs = {row.name: row.flops / 1e9 for row in program.cost(size, batch).operations}
    steps, work = 0, 0.0
    for group in program.launch_groups:
        shares = [(0.0, 0)] * min(lanes, len(group))
        for cost in sorted((costs[op.name] for op in group), reverse=True):
            least = shares.index(min(shares))
            shares[least] = (shares[least][0] + cost, shares[least][1] + 1)
        longest = max(shares)
        steps, work = steps + longest[1], work + longest[0]
    return Busiest(steps, work)


def brent(one_lane: float, share: float, lanes: int) -> tuple[float, float]:
    """The least and the most time on so many lanes of what takes `one_lane` on one, of which `share` is one after
    another: Brent's bounds (R. P. Brent, "The parallel evaluation of general arithmetic expressions", J. ACM 21(2),
    1974), where nothing is lost to waiting and to sharing memory."""
    return max(one_lane / lanes, one_lane * share), one_lane / lanes + one_lane * share * (1 - 1 / lanes)
