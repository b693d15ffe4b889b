"""What the planner's simulation makes of a network with a lane for each of its streams."""

from __future__ import annotations

from collections.abc import Mapping

from parallel_parnet import Placement, Program
from parallel_parnet.planning.costs import Costs, Link, Measured
from parallel_parnet.planning.planner import schedule

from .points import Point

FREE = Link("free", 0.0, float("inf"), "transfers cost nothing: what the streams alone allow")


def lane_per_stream(program: Program, point: Point, alone: Mapping[str, float], link: Link = FREE) -> float:
    """Seconds from picture to logits, each stream on a lane of its own, from seconds of each operation alone."""
    placement = Placement.by_streams(program, point.streams)
    device = Measured("this device", alone, "operations measured one by one, in eager mode")
    return schedule(program, placement, Costs.of(program, device, link, point.size, point.batch)).makespan
