"""The results of `gpu_check.py` as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Results = Mapping[str, Mapping]


def verdicts(results: Results) -> list[tuple[str, str, str, str]]:
    """A row for each step: its name, "passed" or "FAILED", its seconds, and its most telling number."""
    return [
        (name, "passed" if result["passed"] else "FAILED", f"{result['seconds']:.0f}", _summary(name, result))
        for name, result in results.items()
    ]


def markdown(results: Results, note: str = "") -> str:
    """The whole report. note: that it is a dry run, else nothing."""
    rows = {name: [row for row in result["rows"] if "fault" not in row] for name, result in results.items()}
    parts = [f"# GPU check{f': {note}' if note else ''}\n", _machine(rows.get("machine", []))]
    parts.append(_table(("step", "verdict", "seconds", "what"), verdicts(results)))
    tables = {
        "first": _first, "probes": _probes, "warpgroups": _warpgroups, "passes": _passes, "tuning": _tuning,
        "tuned": _tuned, "networks": _parity,
        "placements": _placements, "auto": _auto, "timings": _timings, "fp8": _fp8, "inductor": _inductor,
        "poster": _poster, "depth": _depth,
    }  # fmt: skip
    for name, table in tables.items():
        if rows.get(name):
            parts += table(rows[name])
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
    rows = [row for row in result["rows"] if "fault" not in row]
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


def _machine(rows: Sequence[Mapping]) -> str:
    keys = ("gpu", "driver", "torch", "triton", "python", "date", "commit")
    return ", ".join(f"{key} {rows[0][key]}" for key in keys if rows[0].get(key)) + "\n" if rows else ""


def _first(rows: Sequence[Mapping]) -> list[str]:
    lines = [
        (
            row["name"], *(f"{row[key]:.3g}" if key in row else "" for key in ("deviation", "error")),
            _spread(row.get("us")),
        )
        for row in rows
    ]  # fmt: skip
    title = (
        "## The first minute, bf16, batch 1\n\nDeviation from the twin in fp32, of what rounding allows; error of the "
        "logits, relative; replay of a CUDA graph in microseconds: p50 (p20 to p80).\n"
    )
    return [f"{title}\n{_table(('launch', 'deviation', 'error', 'replay'), lines)}"]


def _probes(rows: Sequence[Mapping]) -> list[str]:
    single = [(row["name"], _spread(row.get("us")), row.get("tb_per_s", "")) for row in rows if "warm_us" not in row]
    levels = [(row["name"], _spread(row["warm_us"]), _spread(row["cold_us"])) for row in rows if "warm_us" in row]
    return [
        f"## Probes\n\nMicroseconds of one launch: p50 (p20 to p80).\n\n{_table(('probe', 'us', 'TB/s'), single)}",
        f"## Levels with L2 warm and cold, microseconds of one launch\n\n{_table(('level', 'warm', 'cold'), levels)}",
    ]


def _warpgroups(rows: Sequence[Mapping]) -> list[str]:
    lines = [
        (
            row["name"],
            row["l2"],
            " ".join(map(str, row["tiles"])),
            _spread(row["us"]),
            row["timed"],
            len(row["refused"]),
        )
        for row in rows
    ]
    head = ("level", "L2", "tiles: bm, bn, chunk, splits, stages", "us", "timed", "refused")
    return [f"## The kernel for warpgroups, tuned, microseconds of one launch\n\n{_table(head, lines)}"]


def _passes(rows: Sequence[Mapping]) -> list[str]:
    lines = [(row["name"], f"{row['deviation']:.3g}", f"{row['error']:.3g}") for row in rows]
    title = (
        "## The kernel for warpgroups in networks, bf16, batch 1: worst deviation of a launch, error of the logits\n"
    )
    return [
        f"{title}\n{_table(('network', 'deviation', 'error'), lines)}",
        f"## A pass by it and by Triton's, microseconds: p50 (p20 to p80)\n\n{_ways(rows, 'name')}",
    ]


def _tuning(rows: Sequence[Mapping]) -> list[str]:
    lines = [
        (row["name"], row["l2"], _spread(row["default_us"]), _spread(row["us"]), row["timed"], len(row["refused"]))
        for row in rows
    ]
    head = ("level", "L2", "default", "best", "timed", "refused")
    return [f"## Tuning, microseconds of one launch\n\n{_table(head, lines)}"]


def _tuned(rows: Sequence[Mapping]) -> list[str]:
    return [
        f"## A pass by the defaults and by the tuned table, microseconds: p50 (p20 to p80)\n\n{_ways(rows, 'name')}"
    ]


def _parity(rows: Sequence[Mapping]) -> list[str]:
    lines = [
        (
            row["network"],
            row["dtype"],
            row["n"],
            *(f"{row[key]:.1e}" for key in ("error", "error_of_torch", "tolerance")),
        )
        for row in rows
    ]
    title = "## Logits against fp32 torch: relative error\n"
    head = ("network", "dtype", "batch", "grouped", "torch in this type", "tolerance")
    return [f"{title}\n{_table(head, lines)}"]


def _placements(rows: Sequence[Mapping]) -> list[str]:
    """Lanes of one process as CUDA streams, and ranks that share the GPU."""
    parts = []
    if lanes := [row for row in rows if "us" in row]:
        parts.append(f"## Lanes on one GPU, microseconds: p50 (p20 to p80)\n\n{_ways(lanes, 'network')}")
    if ranks := [row for row in rows if "median_ms" in row]:
        ways = list(ranks[0]["median_ms"])
        lines = [(row["network"], *(f"{row['median_ms'][way]:.3f}" for way in ways)) for row in ranks]
        parts.append(f"## Ranks that share the GPU, milliseconds: median\n\n{_table(('network', *ways), lines)}")
    return parts


def _auto(rows: Sequence[Mapping]) -> list[str]:
    lines = [
        (row["network"], name, how)
        for row in rows
        for name, how in (
            *((name, f"{ms:.3f}") for name, ms in row["tried_ms"].items()),
            *((line, "dropped") for line in row["dropped"]),
        )
    ]
    return [f"## What auto tried, the fastest first\n\n{_table(('network', 'executor', 'ms'), lines)}"]


def _timings(rows: Sequence[Mapping]) -> list[str]:
    """One pass by each way, and the grouped launches over the floor; then level by level."""
    ways = list(dict.fromkeys(way for row in rows for way in row["us"]))
    lines = [
        (
            row["network"], row["dtype"], row["launches"], *(_spread(row["us"].get(way)) for way in ways),
            f"{row['computed_floor_us']:.1f}", _over(row["us"]["grouped"], row["computed_floor_us"]),
        )
        for row in rows
    ]  # fmt: skip
    title = (
        "## One pass at batch 1, microseconds: p50 (p20 to p80)\n\nPicture on the GPU to logits on the GPU, L2 warm.\n"
    )
    header = ("network", "dtype", "launches", *ways, "computed floor", "grouped / floor")
    return [f"{title}\n{_table(header, lines)}", *map(_levels, rows)]


def _levels(row: Mapping) -> str:
    lines = [
        (
            level["level"], _spread(level["us"]), f"{level['computed_floor_us']:.2f}",
            _over(level["us"], level["computed_floor_us"]),
        )
        for level in row["levels"]
    ]  # fmt: skip
    title = f"## {row['network']}, {row['dtype']}, level by level, microseconds\n"
    return f"{title}\n{_table(('level', 'p50 (p20 to p80)', 'computed floor', 'ratio'), lines)}"


def _fp8(rows: Sequence[Mapping]) -> list[str]:
    keys = ("deviation", "error", "error_of_fp8", "tolerance")
    right, passes = ([row for row in rows if ("us" in row) == timed] for timed in (False, True))
    lines = [(row["name"], *(f"{row[key]:.3g}" if key in row else "" for key in keys)) for row in right]
    title = (
        "## FP8, batch 1\n\nDeviation from the twin in fp32, of what rounding allows; error of the logits from the "
        "twin's, relative, beside fp8's own from fp32.\n"
    )
    return [
        f"{title}\n{_table(('launch', *keys), lines)}",
        f"## A pass in fp8 and in bf16, microseconds: p50 (p20 to p80)\n\n{_ways(passes, 'name')}",
    ]


def _inductor(rows: Sequence[Mapping]) -> list[str]:
    return [f"## Beside torch.compile, microseconds of a pass: p50 (p20 to p80)\n\n{_ways(rows, 'name')}"]


def _poster(rows: Sequence[Mapping]) -> list[str]:
    lines = [(row["name"], row["contender"], f"{row['ms']:.4f}", row["timed_by"]) for row in rows]
    return [f"## The poster's networks, milliseconds of a pass\n\n{_table(('network', 'by', 'ms', 'clock'), lines)}"]


def _depth(rows: Sequence[Mapping]) -> list[str]:
    lines = [
        (member["network"], member["executor"], member["depth"], member["gflops"], f"{member['median_ms']:.4f}")
        for row in rows
        for member in row["members"]
    ]
    head = ("network", "executor", "depth", "GFLOP", "ms")
    return [f"## Latency against depth, milliseconds of a pass\n\n{_table(head, lines)}"]


def _ways(rows: Sequence[Mapping], name: str) -> str:
    """A line for each row, a column for each way of which it has times."""
    ways = list(dict.fromkeys(way for row in rows for way in row["us"]))
    return _table((name, *ways), [(row[name], *(_spread(row["us"].get(way)) for way in ways)) for row in rows])


def _over(us: Mapping[str, float], floor: float) -> str:
    return f"{us['p50'] / floor:.2f}" if floor else ""


def _spread(us: Mapping[str, float] | float | None) -> str:
    if isinstance(us, int | float):
        return f"{us:.1f}"
    return f"{us['p50']:.1f} ({us['p20']:.1f} to {us['p80']:.1f})" if us else ""


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines) + "\n"
