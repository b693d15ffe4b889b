"""The results of `gpu_check.py` as people read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..sections import table

Row = Mapping
Results = Mapping[str, Mapping]


def _over(us: Mapping[str, float], floor: float) -> str:
    return f"{us['p50'] / floor:.2f}" if floor else ""


@dataclass(frozen=True)
class Section:
    """A table of a step's rows, but for those that have nothing for it.

    columns: under each head a row's value of that key, or what is made of the row. ways: the key of the times of
    contenders, which have a column each. parts: the key of a list, whose members have a line each, beside their row's
    values.
    """

    step: str
    title: str
    columns: Mapping[str, str | Callable[[Row], object]]
    ways: str = ""
    parts: str = ""
    note: str = ""

    def text(self, rows: Sequence[Row]) -> str:
        """In Markdown; nothing where no row has a place."""
        if self.parts:
            rows = [{**row, **part} for row in rows for part in row[self.parts]]
        ways = list(dict.fromkeys(way for row in rows for way in row.get(self.ways, ())))
        lines = [
            (
                *(_value(row, of) for of in self.columns.values()),
                *(row.get(self.ways, {}).get(way) for way in ways),
            )
            for row in rows
        ]
        lines = [line for line in lines if any(value is not None for value in line[1:])]
        note = f"{self.note}\n\n" if self.note else ""
        return f"## {self.title}\n\n{note}{_table((*self.columns, *ways), lines)}" if lines else ""


SPREAD = "microseconds: p50 (p20 to p80)"
DEVIATION = "Deviation from the twin in fp32, of what rounding allows; error of the logits, relative"
SECTIONS = (
    Section(
        "first",
        f"The first minute, bf16, batch 1; replay of a CUDA graph, {SPREAD}",
        {"launch": "name", "deviation": "deviation", "error": "error", "replay": "us"},
        note=f"{DEVIATION}.",
    ),
    Section(
        "probes",
        f"Probes of one launch, {SPREAD}",
        {"probe": "name", "us": "us", "TB/s": "tb_per_s", "L2 warm": "warm_us", "L2 cold": "cold_us"},
    ),
    Section(
        "warpgroups",
        f"The kernel for warpgroups, tuned: one launch, {SPREAD}",
        {
            "level": "name", "L2": "l2", "tiles: bm, bn, chunk, splits, stages": "tiles", "us": "us", "timed": "timed",
            "refused": lambda row: len(row["refused"]),
        },
    ),
    Section(
        "passes",
        f"The kernel for warpgroups in networks, bf16, batch 1, and a pass by it and by Triton's, {SPREAD}",
        {"network": "name", "deviation": "deviation", "error": "error"},
        ways="us",
        note=f"{DEVIATION}.",
    ),
    Section(
        "tuning",
        f"Tuning: one launch, {SPREAD}",
        {
            "level": "name", "L2": "l2", "default": "default_us", "best": "us", "timed": "timed",
            "refused": lambda row: len(row["refused"]),
        },
    ),
    Section("tuned", f"A pass by the defaults and by the tuned table, {SPREAD}", {"network": "name"}, ways="us"),
    Section(
        "networks",
        "Logits against fp32 torch: relative error",
        {
            "network": "network", "dtype": "dtype", "batch": "n", "grouped": "error",
            "torch in this type": "error_of_torch", "tolerance": "tolerance",
        },
    ),
    Section("placements", f"Lanes on one GPU, {SPREAD}", {"network": "network"}, ways="us"),
    Section("placements", "Ranks that share the GPU, milliseconds: median", {"network": "network"}, ways="median_ms"),
    Section("auto", "What auto tried, milliseconds", {"network": "network"}, ways="tried_ms"),
    Section("auto", "What auto dropped", {"network": "network", "why": lambda row: "; ".join(row["dropped"]) or None}),
    Section(
        "timings",
        f"One pass at batch 1, {SPREAD}",
        {
            "network": "network", "dtype": "dtype", "launches": "launches", "computed floor": "computed_floor_us",
            "grouped / floor": lambda row: _over(row["us"]["grouped"], row["computed_floor_us"]),
        },
        ways="us",
        note="Picture on the GPU to logits on the GPU, L2 warm.",
    ),
    Section(
        "timings",
        f"Level by level, {SPREAD}",
        {
            "network": "network", "dtype": "dtype", "level": "level", "us": "us",
            "computed floor": "computed_floor_us",
            "ratio": lambda row: _over(row["us"], row["computed_floor_us"]),
        },
        parts="levels",
    ),
    Section(
        "fp8",
        f"FP8, batch 1, and a pass in it and in bf16, {SPREAD}",
        {
            "launch": "name", "deviation": "deviation", "error": "error", "fp8's own, from fp32": "error_of_fp8",
            "tolerance": "tolerance",
        },
        ways="us",
        note=f"{DEVIATION}, from the twin's.",
    ),
    Section("inductor", f"Beside torch.compile: a pass, {SPREAD}", {"network": "name"}, ways="us"),
    Section(
        "poster",
        "The poster's networks, milliseconds of a pass",
        {"network": "name", "by": "contender", "ms": "ms", "clock": "timed_by"},
    ),
    Section(
        "depth",
        "Latency against depth, milliseconds of a pass",
        {"network": "network", "executor": "executor", "depth": "depth", "GFLOP": "gflops", "ms": "median_ms"},
        parts="members",
    ),
)  # fmt: skip


def verdicts(results: Results) -> list[tuple[str, str, str, str]]:
    """A row for each step: its name, "passed" or "FAILED", its seconds, and its most telling number."""
    return [
        (name, "passed" if result["passed"] else "FAILED", f"{result['seconds']:.0f}", _summary(name, result))
        for name, result in results.items()
    ]


def markdown(results: Results, note: str = "") -> str:
    """The whole report. note: that it is a dry run, else nothing."""
    rows = {name: _right(result) for name, result in results.items()}
    parts = [f"# GPU check{f': {note}' if note else ''}\n", _machine(rows.get("machine", []))]
    parts.append(_table(("step", "verdict", "seconds", "what"), verdicts(results)))
    parts += [text for section in SECTIONS if (text := section.text(rows.get(section.step, [])))]
    faults = [(name, row["name"], row["fault"]) for name in results for row in results[name]["rows"] if "fault" in row]
    if faults:
        parts.append(f"## What failed\n\n{_table(('step', 'row', 'fault'), faults)}")
    parts += [f"## {name}\n\n```\n{result['said']}\n```\n" for name, result in results.items() if "said" in result]
    return "\n".join(parts)


def _summary(name: str, result: Mapping) -> str:
    if "fault" in result:
        return f"{result['fault']}; {len(result['rows'])} rows kept" if result["rows"] else result["fault"]
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    left = f", {result['left_out']} left out" if result.get("left_out") else ""
    left += f", {len(result['faults'])} failed" if result.get("faults") else ""
    left += f"; {result['lacking']}" if "lacking" in result else ""
    rows = _right(result)
    if name == "machine" and len(rows) > 1:
        copied, product = rows[1]["bytes"] / 1e12, rows[1]["flops"] / 1e12
        return f"{rows[0]['gpu']}, {copied:.3f} TB/s, {product:.1f} TFLOP/s{left}"
    if "compiled" in result:
        seconds = f"in {result['compile_s']} s on {result['cores']} cores"
        return f"{result['compiled']} compiled {seconds}, {len(result['failed'])} failed{left}"
    if name == "kernels":
        return f"{len(rows)} kernels, worst {result['worst']} of what rounding allows{left}"
    if name in ("networks", "executors"):
        return f"{len(rows)} {name}, worst {result['worst']} of the tolerance{left}"
    if name == "placements":
        return f"differences up to {max((row['difference'] for row in rows), default=float('inf')):.1e}{left}"
    if name == "auto":
        return ", ".join(f"{row['network']}: {row['executor']}" for row in rows) + left
    if name == "repeats":
        return f"{sum(row['different'] for row in rows)} runs of {sum(row['runs'] for row in rows)} differ{left}"
    if name == "sanitizer":
        return ", ".join(f"{row['name']}: {row['status']}" for row in rows) + left
    if name in ("tuning", "warpgroups"):
        return f"{len(rows)} levels, in {result['table']}{left}"
    return f"{len(rows)} rows{left}"


def _value(row: Row, of: str | Callable[[Row], object]) -> object:
    return row.get(of) if isinstance(of, str) else of(row)


def _right(result: Mapping) -> list[Row]:
    return [row for row in result["rows"] if "fault" not in row]


def _cell(value: object) -> str:
    """A spread of times, a number or words."""
    if isinstance(value, Mapping):
        return f"{value['p50']:.1f} ({value['p20']:.1f} to {value['p80']:.1f})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "/")


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return table(tuple(header), [list(map(_cell, row)) for row in rows]) + "\n"


def _machine(rows: Sequence[Row]) -> str:
    keys = ("gpu", "driver", "torch", "triton", "python", "date", "commit")
    return ", ".join(f"{key} {rows[0][key]}" for key in keys if rows[0].get(key)) + "\n" if rows else ""
