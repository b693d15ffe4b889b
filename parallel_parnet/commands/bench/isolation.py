"""Every contender in a process of its own: no thread pool and no cache is shared, and nothing is taken in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from parallel_parnet import ParNetError

from ..processes import command, environment, run_within
from .rows import Result, add_ratios, read

LIMIT = 1800  # seconds for one contender


def isolated(arguments: Sequence[str], names: Sequence[str]) -> Result:
    """The results of the benchmark with these arguments for one contender after the other, as one result."""
    results = [_one(arguments, name) for name in names]
    merged: Result = {
        "header": results[0]["header"],
        "rows": [row for result in results for row in result["rows"]],
        "missing": {name: why for result in results for name, why in result["missing"].items()},
        "disagree": {name: error for result in results for name, error in result["disagree"].items()},
        "failed": [name for result in results for name in result["failed"]],
    }
    add_ratios(merged["rows"], paired=False)
    return merged


def _one(arguments: Sequence[str], name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        line = [*command("bench"), *arguments, "--only", name, "--out", folder]
        status, _, errors = run_within(line, LIMIT, environment())
        if status is None:
            raise ParNetError(f"--isolate: {name} was not done after {LIMIT} s")
        files = list(Path(folder).glob("*.json"))
        if not files:
            last = (errors.strip().splitlines() or ["it said nothing"])[-1]
            raise ParNetError(f"--isolate: {name}: {last.removeprefix('error: ')}")
        return read(files[0])
