"""What the check of the planner found, in words and as a page has it; nothing here measures.

A result is what `check` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from ..sections import NAMES, filled, table

TITLE, NEXT = "## Prediction against this machine", "## What the model leaves out"
HEADS = ("", "predicted", "measured", "error", "load")
TARGET = 0.1  # of the median error


def cells(result: Mapping) -> list[list[str]]:
    """The table's rows, under HEADS: the error of one lane, which is no prediction, in brackets."""
    return [
        [
            f"{_name(row['model'])}, {row['case']}",
            *(f"{row[key] * 1e3:.1f} ms" for key in ("predicted_s", "measured_s")),
            f"{row['error']:+.1%}" if row["lanes"] > 1 else f"({row['error']:+.1%})",
            f"{row['load_average']:.1f}",
        ]
        for row in result["cases"]
    ]


def middle_error(rows: Sequence[Mapping]) -> float | None:
    """The median error, signs aside, of what is predicted: of one lane that is the pass to which operations were
    scaled. None where there is only that."""
    return median(errors) if (errors := [abs(row["error"]) for row in rows if row["lanes"] > 1]) else None


def sentences(result: Mapping) -> list[str]:
    """Whether the target is met, what sharing does, and what lanes gave."""
    rows, count = result["cases"], result["processors"]
    middle, said = middle_error(rows), []
    if any(row["lanes"] == 1 for row in rows):
        said.append(
            "Operations' times are scaled to add up to a timed pass on one lane. The one-lane rows, with errors in "
            "brackets, are therefore no predictions and are not counted below."
        )
    if middle is not None:
        met = "met" if middle < TARGET else "missed"
        predictions = sum(row["lanes"] > 1 for row in rows)
        said.append(
            f"The median absolute error of {predictions} prediction{'s' * (predictions > 1)} is {middle:.1%}; "
            f"the target, under {TARGET:.0%}, is {met}."
        )
    for shared, what in (
        (False, f"With up to {count} lanes, each with a processor of its own,"),
        (True, f"With more lanes than the {count} processors that they share,"),
    ):
        errors = [row["error"] for row in rows if row["lanes"] > 1 and (row["lanes"] > count) == shared]
        if errors:
            said.append(f"{what} errors are {_span(errors)}.")
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        (one,) = (row for row in own if row["lanes"] == 1)
        best = min(own, key=lambda row: row["measured_s"])
        times = f"{_name(model)} measured: {one['measured_s'] * 1e3:.1f} ms on one lane"
        faster = f", {best['measured_s'] * 1e3:.1f} on {best['case']}, {one['measured_s'] / best['measured_s']:.2f}x."
        said.append(f"{times}, and no faster on more." if best is one else times + faster)
    return said


def section(result: Mapping, file: str) -> str:
    """The section of a page as Markdown. file: of the result, seen from the page."""
    first = (
        "`python launch/plan_check.py` measures operations and the link, predicts the latency of each placement, and "
        f"runs it in ranks with one thread each. On a {result['machine']}, {result['executor']}, {result['dtype']}, "
        f"link {result['link']['name']}, {result['date'][:10]} ([numbers]({file})); load is "
        "the machine's average over the minute before:"
    )
    said = filled(" ".join(sentences(result)))
    return "\n\n".join([TITLE, filled(first), table(HEADS, cells(result)), said]) + "\n"


def _name(model: str) -> str:
    return NAMES.get(model, model)


def _span(errors: Sequence[float]) -> str:
    return f"{min(errors):+.1%}" if len(errors) == 1 else f"{min(errors):+.1%} to {max(errors):+.1%}"
