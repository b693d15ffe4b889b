"""How many answers are right, how sure that is, and where two precisions disagree: read from files of answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from parallel_parnet import ParNetError

Z = 1.959964  # of a normal variable's middle 95%


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share, 0..1, of which `right` of `of` pictures are a sample (Wilson 1927)."""
    if not of:
        return 0.0, 1.0
    share, spread = right / of, Z * Z / of
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(right: int, of: int) -> dict:
    """Right answers as JSON holds them: counts, the share, and its interval."""
    low, high = wilson(right, of)
    return {"right": right, "of": of, "share": right / of if of else None, "low": low, "high": high}


def lines(path: Path) -> Iterator[dict]:
    """Each picture's line in the order of the file, or in its place the second, for one that was tried again."""
    rows: dict[str, dict] = {}
    with path.open("rb") as file:
        for line in file:
            row = json.loads(line)
            rows[row["image"]] = row
    yield from rows.values()


def score(path: Path) -> dict:
    """Top-1 and top-5 of a file of answers; pictures without an answer count in `skipped` alone."""
    of = top1 = top5 = skipped = 0
    for row in lines(path):
        if "reason" in row:
            skipped += 1
            continue
        of += 1
        top1 += row["top5"][0] == row["label"]
        top5 += row["label"] in row["top5"]
    return {"top1": share(top1, of), "top5": share(top5, of), "skipped": skipped}


def makers(path: Path) -> dict:
    """What made the answers of a file, as they say: of several all, in words."""
    found: dict[str, list] = {}
    for row in lines(path):
        for key, value in row.get("by", {}).items():
            known = found.setdefault(key, [])
            known += [value] * (value not in known)
    return {key: known[0] if len(known) == 1 else ", ".join(map(str, known)) for key, known in found.items()}


def compare(path: Path, other: Path) -> dict:
    """Of two files of answers to the same pictures in the same order: how many top-1 agree, and which do not.
    ParNetError for files of others."""
    agree = of = 0
    changed = []
    for number, (row, second) in enumerate(zip_longest(lines(path), lines(other), fillvalue={}), 1):
        if row.get("image") != second.get("image"):
            raise ParNetError(f"{path} and {other}: line {number} is not of the same picture; remove both")
        if "reason" in row or "reason" in second:
            continue
        of += 1
        first, there = row["top5"][0], second["top5"][0]
        agree += first == there
        if first != there:
            changed.append({"image": row["image"], "label": row["label"], "answer": first, "against": there})
    return {"agreement": share(agree, of), "changed": changed}
