"""Schedules for people: in words, and as bars of characters."""

from __future__ import annotations

from .costs import UNITS
from .planner import Launched, Schedule, Sent
from .search import Plans


def duration(seconds: float) -> str:
    """Write seconds in a unit that suits them: "71.5 us"."""
    unit = next((unit for unit in ("s", "ms") if seconds >= UNITS[unit]), "us")
    return f"{seconds / UNITS[unit]:.1f} {unit}"


def critical_transfers(schedule: Schedule) -> list[Sent]:
    """List the transfers that the answer waits for."""
    return [item for item in schedule.critical_path if isinstance(item, Sent)]


def verdict(schedule: Schedule, link: str) -> str:
    """Say in one line: lanes, speed-up over one lane, and the transfers that the answer waits for."""
    lanes = schedule.placement.lanes
    if lanes == 1:
        return f"1 lane: {duration(schedule.makespan)}, without transfers"
    sent = critical_transfers(schedule)
    share = sum(s.end - s.start for s in sent) / schedule.makespan
    names = " and ".join(dict.fromkeys(s.transfer.feature for s in sent))
    waits = f"transferring {names} is on the critical path ({share:.0%} of it)" if sent else "it waits for no transfer"
    return f"{lanes} lanes over {link}: {duration(schedule.makespan)}, {schedule.speed_up:.2f}x over one lane; {waits}"


def explain(plans: Plans, link: str) -> str:
    """Explain the best plan and the runner-up in words, a paragraph for each."""
    best, second = plans.best, plans.runner_up
    lines = [verdict(best, link) + "."]
    if second and best.placement.lanes == 1:
        lines.append(f"More lanes are not faster over {link}: the transfers cost more than they save.")
    lower = best.bounds.lower
    limit = "the longest path through the network" if lower == best.bounds.span else "all work, evenly divided"
    lines.append(f"No placement on {best.bounds.lanes} lane(s) can beat {duration(lower)}, {limit}.")
    if second:
        gap = second.makespan / best.makespan - 1
        behind = "as fast up to 0.1%" if gap < 1e-3 else f"{gap:.1%} slower"
        lines.append(f"Runner-up, {behind}, with the streams divided otherwise:")
        lines += lanes_in_words(second)
    return "\n".join(lines)


def lanes_in_words(schedule: Schedule) -> list[str]:
    """Write a line for each lane: what it runs, and how long it is idle."""
    runs = schedule.placement.describe(schedule.program)
    return [f"  lane {i}: {what or 'nothing'}; idle {duration(schedule.idle(i))}" for i, what in enumerate(runs)]


def gantt(schedule: Schedule, width: int) -> str:
    """Draw lanes as rows of `width` characters, time from left to right; a row of transfers below each lane that sends.

    "|" starts a launch. Then s: stem, a digit: that stream, f: fusion, h: head; in turn where a launch runs several.
    ">" is a transfer, which ends with the number of the lane it goes to. "." is idle.
    """
    total = schedule.makespan

    def column(seconds: float) -> int:
        return min(width, round(seconds / total * width))

    def bar(items: list[tuple[float, float, str]]) -> str:
        row = ["."] * width
        for start, end, text in items:
            a, b = column(start), column(end)
            row[a:b] = text.ljust(b - a, text[-1])[: b - a]
        return "".join(row)

    lines = [" " * 10 + "0" + duration(total).rjust(width - 1)]
    for lane in range(schedule.placement.lanes):
        runs = [(run.start, run.end, "|" + _letters(schedule, run) * width) for run in schedule.lane(lane)]
        lines.append(f"lane {lane:<5}" + bar(runs))
        sent = [s for s in schedule.transfers if s.transfer.source == lane]
        if sent:
            arrows = [
                (s.start, s.end, ">" * (column(s.end) - column(s.start) - 1) + str(s.transfer.target)) for s in sent
            ]
            lines.append("  sends   " + bar(arrows).replace(".", " ").rstrip())
    lines.append("s stem, digit: a stream, f fusion, h head, | a launch, . idle; >>n a transfer to lane n")
    return "\n".join(lines)


def _letters(schedule: Schedule, run: Launched) -> str:
    operations = (schedule.program.by_name[name] for name in run.operations)
    return "".join(op.stage[0] if op.stream is None else str(op.stream) for op in operations)
