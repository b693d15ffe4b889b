"""What the numbers say: sentences, a table, and the section of a page; nothing here measures.

A result is what `command` writes: a header, and for each batch what `measure.measure` gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from ..bench.rows import SHORT, compared, says
from ..sections import NAMES, filled, table

Result = Mapping
TITLE, NEXT = "## What a batch costs", "## Log"  # the section, and the one that it stands before on a new page
SPEED, TIME = "infer_samples_per_sec", "infer_step_time"
HEADS = (
    "network", "batch", "ours, ms", "ours, pictures/s", "best peer", "its ms", "its pictures/s",
    "ours / peer (95% interval)", "runs",
)  # fmt: skip
WHAT = (
    "Times are for the whole batch: every picture in it waits for all of them. Each contender's logits are checked at "
    "each batch before it is timed; then contenders run in turns."
)


def name_of(result: Result) -> str:
    """The network, as people write it."""
    return NAMES.get(result["header"]["model"], result["header"]["model"])


def number(value: float) -> str:
    """With three digits or four."""
    return f"{value:.{0 if value >= 1000 else 1 if value >= 10 else 2}f}"


def cells(result: Result) -> list[list[str]]:
    """The table's rows, under HEADS; empty where no peer ran."""
    made = []
    for found in result["batches"]:
        mine, peer = (compared(found["rows"], ours) for ours in (True, False))
        assert mine is not None, "nothing is written where nothing of ours ran"
        ours = [name_of(result), str(found["batch"]), number(mine[TIME]), _speed(mine)]
        theirs = [""] * 4
        if peer is not None:
            ratio = "{:.2f} ({:.2f} to {:.2f})".format(*peer["ratio"])
            theirs = [peer["contender"], number(peer[TIME]), _speed(peer), ratio]
        made.append([*ours, *theirs, str(mine["n"])])
    return made


def sentences(result: Result) -> list[str]:
    """How ours and the best peer grow with the batch, and who is the faster one where."""
    fastest = [{True: compared(b["rows"], True), False: compared(b["rows"], False)} for b in result["batches"]]
    said = []
    for ours in (True, False):
        rows = [row[ours] for row in fastest if row[ours]]
        who = f"{name_of(result)}, {'ours' if ours else 'the best peer at each batch'}"
        if rows:
            said.append(_growth(who, rows))
    return [*said, *_verdict(name_of(result), result["batches"])]


def section(results: Sequence[Result], files: Sequence[str], figure: str) -> str:
    """The section of a page as Markdown, of results of one machine. files: of each result, and figure: seen from the
    page."""
    header = results[0]["header"]
    links = ", ".join(f"[{name_of(result)}]({file})" for result, file in zip(results, files, strict=True))
    processor = header.get("gpu") or header["cpu"]
    first = (
        f"`make throughput` runs batches with our executor and the installed peers. On a {header['machine']}, "
        f"{processor}, {header['threads']} thread(s), {SHORT[header['dtype']]}, {header['date'][:10]} "
        f"({links}):"
    )
    names = " and ".join(name_of(result) for result in results)
    parts = [
        TITLE,
        filled(first),
        table(HEADS, [row for result in results for row in cells(result)]),
        f"![Pictures a second against the latency of a batch, {names}, a line for each contender]({figure})",
        *(filled(" ".join(sentences(result))) for result in results),
        filled(WHAT),
    ]
    return "\n\n".join(parts) + "\n"


def _growth(who: str, rows: Sequence[Mapping]) -> str:
    first, last = rows[0], rows[-1]
    most = max(rows, key=lambda row: row["infer_samples_per_sec"])
    span = f"from batch {first['infer_batch_size']} to {last['infer_batch_size']}"
    if first is last:
        return f"{who}: {_speed(first)} pictures/s at batch {first['infer_batch_size']}."
    return (
        f"{who}: {span}, throughput goes from {_speed(first)} to {_speed(last)} pictures/s "
        f"({_times(last, first, SPEED)}x) and latency from {number(first[TIME])} to {number(last[TIME])} ms "
        f"({_times(last, first, TIME)}x); the peak is {_speed(most)} pictures/s at batch {most['infer_batch_size']}, "
        f"of which batch {first['infer_batch_size']} reaches {first[SPEED] / most[SPEED]:.0%}."
    )


def _verdict(name: str, batches: Sequence[Mapping]) -> list[str]:
    """Batches with the same verdict together, in their order."""
    found = []
    for one in batches:
        mine, peer = (compared(one["rows"], ours) for ours in (True, False))
        found.append(("no peer ran" if mine is None or peer is None else says(mine, peer), str(one["batch"])))
    runs = [(verdict, [batch for _, batch in run]) for verdict, run in groupby(found, key=lambda pair: pair[0])]
    return [f"{name} against the best peer: {'; '.join(f'{v} at batch {_listed(b)}' for v, b in runs)}."]


def _listed(words: Sequence[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def _speed(row: Mapping) -> str:
    return number(row[SPEED])


def _times(a: Mapping, b: Mapping, key: str) -> str:
    return f"{a[key] / b[key]:.2f}"
