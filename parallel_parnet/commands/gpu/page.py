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


def markdown(results: Results) -> str:
    """The whole report."""
    parts = ["# GPU check\n", _machine(results.get("machine", {}))]
    parts.append(_table(("step", "verdict", "seconds", "what"), verdicts(results)))
    if rows := results.get("networks", {}).get("rows"):
        parts.append(_parity(rows))
    parts += _placements(results.get("placements", {}))
    if rows := results.get("auto", {}).get("rows"):
        parts.append(_auto(rows))
    if rows := results.get("timings", {}).get("rows"):
        parts += [_networks(rows), *map(_levels, rows)]
    if levels := results.get("tuning", {}).get("levels"):
        parts.append(_tuning(levels))
    parts += [f"## {name}\n\n```\n{result['stderr']}\n```\n" for name, result in results.items() if "stderr" in result]
    return "\n".join(parts)


def _summary(name: str, result: Mapping) -> str:
    if "fault" in result:
        return result["fault"]
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    left = f", {result['left_out']} left out" if result.get("left_out") else ""
    if name == "machine":
        return f"{result['gpu']}, {result['copy_tb_per_s']} TB/s, {result['matmul_tflop_per_s']['bfloat16']} TFLOP/s"
    if name == "compile":
        return f"{result['compiled']} launches on {result['cores']} cores, {len(result['failed'])} failed{left}"
    if name == "kernels":
        return f"{len(result['rows'])} kernels, worst {result['worst']:.2f} of what rounding allows{left}"
    if name in ("networks", "executors"):
        return f"{len(result['rows'])} {name}, worst {result['worst']:.2f} of the tolerance{left}"
    if name == "placements":
        rows = (*result["rows"], *result["ranks"])
        return f"differences up to {max(row.get('difference', float('inf')) for row in rows):.1e}{left}"
    if name == "auto":
        return ", ".join(f"{row['network']}: {row['executor']}" for row in result["rows"]) + left
    if name == "repeats":
        return f"{sum(row['different'] for row in result['rows'])} runs of {_runs(result)} differ{left}"
    if name == "sanitizer":
        return ", ".join(f"{row['tool']}: {row.get('left_out', row.get('status'))}" for row in result["rows"])
    if name == "tuning":
        return f"{len(result['levels'])} levels{left}"
    if name == "inductor":
        return ", ".join(f"{way} {spread['p50']:.1f} us" for way, spread in result["us"].items())
    return f"{len(result['rows'])} networks{left}"


def _runs(result: Mapping) -> int:
    return sum(row["runs"] for row in result["rows"])


def _machine(found: Mapping) -> str:
    keys = ("gpu", "driver", "torch", "triton", "python", "date", "commit")
    return ", ".join(f"{key} {found[key]}" for key in keys if found.get(key)) + "\n"


def _parity(rows: Iterable[Mapping]) -> str:
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
    return f"{title}\n{_table(('network', 'dtype', 'batch', 'grouped', 'torch in this type', 'tolerance'), lines)}"


def _placements(found: Mapping) -> list[str]:
    """Lanes of one process as CUDA streams, and ranks that share the GPU."""
    parts = []
    if rows := found.get("rows"):
        ways = list(dict.fromkeys(way for row in rows for way in row["us"]))
        lines = [(row["network"], *(_spread(row["us"].get(way)) for way in ways)) for row in rows]
        parts.append(f"## Lanes on one GPU, microseconds: p50 (p20 to p80)\n\n{_table(('network', *ways), lines)}")
    if rows := [row for row in found.get("ranks", ()) if "median_ms" in row]:
        ways = list(rows[0]["median_ms"])
        lines = [(row["network"], *(f"{row['median_ms'][way]:.3f}" for way in ways)) for row in rows]
        parts.append(f"## Ranks that share the GPU, milliseconds: median\n\n{_table(('network', *ways), lines)}")
    return parts


def _auto(rows: Iterable[Mapping]) -> str:
    lines = [
        (row["network"], name, how)
        for row in rows
        for name, how in (
            *((name, f"{ms:.3f}") for name, ms in row["tried_ms"].items()),
            *((line, "dropped") for line in row["dropped"]),
        )
    ]
    return f"## What auto tried, the fastest first\n\n{_table(('network', 'executor', 'ms'), lines)}"


def _networks(rows: Iterable[Mapping]) -> str:
    """One pass by each way, and the grouped launches over the floor."""
    rows = list(rows)
    ways = list(dict.fromkeys(way for row in rows for way in row["us"]))
    lines = [
        (
            row["network"], row["dtype"], row["launches"], *(_spread(row["us"].get(way)) for way in ways),
            f"{row['computed_floor_us']:.1f}", f"{row['us']['grouped']['p50'] / row['computed_floor_us']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    title = (
        "## One pass at batch 1, microseconds: p50 (p20 to p80)\n\nPicture on the GPU to logits on the GPU, L2 warm.\n"
    )
    header = ("network", "dtype", "launches", *ways, "computed floor", "grouped / floor")
    return f"{title}\n{_table(header, lines)}"


def _levels(row: Mapping) -> str:
    lines = [
        (
            level["level"], _spread(level["us"]), f"{level['computed_floor_us']:.2f}",
            f"{level['us']['p50'] / level['computed_floor_us']:.2f}",
        )
        for level in row["levels"]
    ]  # fmt: skip
    title = f"## {row['network']}, {row['dtype']}, level by level, microseconds\n"
    return f"{title}\n{_table(('level', 'p50 (p20 to p80)', 'computed floor', 'ratio'), lines)}"


def _tuning(levels: Mapping[str, Mapping]) -> str:
    lines = [
        (name, _spread(level["default_us"]), _spread(level["us"]), level["timed"], len(level["refused"]))
        for name, level in levels.items()
    ]
    return "## Short tuning pass, microseconds of one launch, L2 cold\n\n" + _table(
        ("level", "default", "best", "timed", "refused"), lines
    )


def _spread(us: Mapping[str, float] | None) -> str:
    return f"{us['p50']:.1f} ({us['p20']:.1f} to {us['p80']:.1f})" if us else ""


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines) + "\n"
