"""Every contender in a process of its own: no thread pool and no cache is shared, and nothing is taken in turns."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmark.report import Result, add_ratios, read
from parallel_parnet import ParNetError

LIMIT = 1800  # seconds for one contender


def isolated(script: str, arguments: Sequence[str], names: Sequence[str]) -> Result:
    """The results of running the script with these arguments for one contender after the other, as one result."""
    results = [_one(script, arguments, name) for name in names]
    merged: Result = {
        "header": results[0]["header"],
        "rows": [row for result in results for row in result["rows"]],
        "missing": {name: why for result in results for name, why in result["missing"].items()},
        "disagree": {name: error for result in results for name, error in result["disagree"].items()},
    }
    add_ratios(merged["rows"], paired=False)
    return merged


def _one(script: str, arguments: Sequence[str], name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, *arguments, "--only", name, "--out", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            raise ParNetError(f"--isolate: {name} was not done after {LIMIT} s") from None
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ParNetError(f"--isolate: {name}: {last.removeprefix('error: ')}")
        (file,) = Path(folder).glob("*.json")
        return read(file)
