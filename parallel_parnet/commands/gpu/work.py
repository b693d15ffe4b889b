"""A step at work: what it may use, and its rows, each written as soon as it is measured and never measured again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from triton.errors import TritonError

from parallel_parnet import ParNetError

from .journal import Journal, Values
from .scope import Scope


@dataclass(frozen=True)
class Work:
    """Of the step of this name. end: when it begins nothing new, on the monotonic clock, which processes share."""

    step: str
    journal: Journal
    scope: Scope
    out: Path
    end: float

    @property
    def left(self) -> float:
        """Seconds in which something new may begin."""
        return self.end - time.monotonic()

    @property
    def device(self) -> torch.device:
        return self.scope.device

    @property
    def kept(self) -> dict[str, Values]:
        """Rows so far, by name, but for those with a "fault", which are tried again."""
        return {name: row for name, row in self.journal.rows(self.step).items() if "fault" not in row}

    def row(self, name: str, make: Callable[[], Values], seconds: float = 0.0) -> Values | None:
        """The row of this name, of an earlier run or made now; None where less than `seconds` are left to make it.

        What fails is a row with a "fault", and the next run tries it again; the others are measured all the same,
        unless the GPU answers nothing any more, which ends the step.
        """
        if (kept := self.kept.get(name)) is not None:
            return kept
        if self.left < seconds or self.left <= 0:
            return None
        try:
            values = make()
        except (RuntimeError, TritonError, ParNetError, AssertionError) as error:
            values = {"fault": f"{type(error).__name__}: {error}".splitlines()[0]}
        self.journal.add(self.step, name, values)
        if "fault" in values and self.device.type == "cuda":
            torch.cuda.synchronize()
        return values


def skipped(why: str) -> Values:
    """The verdict of a step that has nothing to do."""
    return {"passed": True, "left_out": 0, "skipped": why}


def verdict(
    rows: Iterable[Values | None], right: Callable[[Values], bool] = lambda row: True, **more: object
) -> Values:
    """Of a step: whether there are rows and all are right, how many failed and how many there was no time for."""
    rows = list(rows)
    made = [row for row in rows if row is not None]
    faults = [row["fault"] for row in made if "fault" in row]
    return {
        "passed": bool(made) and not faults and all(right(row) for row in made),
        "left_out": len(rows) - len(made),
        **({"faults": faults} if faults else {}),
        **more,
    }
