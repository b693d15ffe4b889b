"""What family (a), the same blocks in one to many streams, says of the claim: in words that follow the numbers."""

from __future__ import annotations

from .curves import executors, groups, select

HOLDS = 0.75  # of what so many lanes can give at best, which latency must gain for the claim to hold
NOTHING = 1.1  # times faster, below which depth is called worth nothing


def claims(rows: list[dict]) -> list[str]:
    """A line for each width and executor: latency in one stream, in as many as there are lanes, and beyond."""
    depth = groups(rows, "depth")
    return [_claim(select(rows, group, name)) for group in depth for name in executors(select(rows, group))]


def _fastest(row: dict) -> float:
    """Milliseconds on all lanes, or on one where the others only slow it down."""
    return min(row["median_ms"], row["one_lane_ms"] or row["median_ms"])


def _full(own: list[dict]) -> int:
    """The fewest streams that can fill the lanes; with one lane, or more lanes than streams, the most there are."""
    streams, lanes = sorted(row["streams"] for row in own), own[0]["lanes"]
    return next((k for k in streams if k >= lanes > 1), streams[-1])


def _claim(own: list[dict]) -> str:
    by_streams = {row["streams"]: row for row in own}
    first, full, lanes = by_streams[1], by_streams[_full(own)], own[0]["lanes"]
    one = _fastest(first)
    ratio, shared = one / _fastest(full), (first["one_lane_ms"] or one) / one
    slower = f" on one lane ({first['median_ms']:.2f} on {lanes})" if one < first["median_ms"] else ""
    text = (
        f"- {first['group']}, {first['executor']}, {lanes} lane{'s' * (lanes > 1)}: {one:.2f} ms in one stream of "
        f"depth {first['depth']}{slower}, {_fastest(full):.2f} ms in {full['streams']} of depth {full['depth']}, "
        f"speed-up {ratio:.2f}x: {verdict(ratio, lanes, shared)}."
    )
    beyond = [row["median_ms"] for k, row in by_streams.items() if k > full["streams"]]
    if lanes > 1 and beyond:
        text += f" With more streams than lanes: {min(beyond):.2f} to {max(beyond):.2f} ms."
    return text


def verdict(ratio: float, lanes: int, shared: float) -> str:
    """Of a gain on so many lanes. shared: how many times faster they are than one in one stream already."""
    if lanes == 1:
        return "latency follows work, not depth" if ratio < NOTHING else "fewer levels are faster even on one lane"
    if ratio >= HOLDS * lanes:
        return "latency follows depth, up to the number of lanes"
    if shared >= HOLDS * lanes:
        return "one stream already fills the lanes, which share its operations"
    if ratio >= NOTHING:
        return "latency follows depth in part"
    return "the claim does not hold"
