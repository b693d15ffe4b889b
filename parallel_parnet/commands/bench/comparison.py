"""Two results of the same benchmark: what changed beyond noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .rows import Result, Row
from .statistics import VARIATION, ratio

SAME = ("model", "size", "batch_size", "dtype")  # results that differ in one of these answer different questions
PASSING = ("date", "command")


@dataclass(frozen=True)
class Change:
    """A contender's new median latency over its old one, with a 95% interval."""

    contender: str
    old_ms: float
    new_ms: float
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """A change must show in the interval, and exceed what differs between two runs of the same thing."""
        shows = self.low > 1 or self.high < 1  # an interval of NaN, of too few runs, shows nothing
        if not (shows and abs(self.value - 1) > VARIATION):
            return "no change"
        return "faster" if self.value < 1 else "slower"


def by_name(result: Result) -> dict[str, Row]:
    """Rows by contender, in a result of several networks by both."""
    one = result["header"]["model"]
    return {
        row["contender"] if row["model"] == one else f"{row['model']}, {row['contender']}": row
        for row in result["rows"]
    }


def changes(old: Result, new: Result) -> list[Change]:
    """For every contender that both results timed, on the same network."""
    before = by_name(old)
    found = []
    for name, row in by_name(new).items():
        if earlier := before.get(name):
            value = ratio(row["samples_ms"], earlier["samples_ms"], paired=False)
            found.append(Change(name, earlier["infer_step_time"], row["infer_step_time"], *value))
    return found


def differences(old: Result, new: Result) -> Iterator[tuple[str, object, object]]:
    """What else is not as it was: versions, machine, settings, and contenders that came or went."""
    a, b = old["header"], new["header"]
    for key in dict.fromkeys((*a, *b)):
        if key not in (*PASSING, *SAME, "possible", "clock_mhz") and a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)
    before, now = ({name: row["settings"] for name, row in by_name(result).items()} for result in (old, new))
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            yield f"settings of {name}", before.get(name), now.get(name)
