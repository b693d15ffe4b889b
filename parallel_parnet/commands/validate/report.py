"""What validating found: as a table, as JSON with everything, and as a row of CSV that begins with timm's columns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from parallel_parnet import ParNetError
from parallel_parnet.files import check_writable, write_csv, write_json

from ..common import table as make_table

SHOWN = 10  # changed pictures on the terminal; files have them all
SUFFIXES = (".json", ".csv")


def check_result_files(paths: list[Path], reads: Iterable[Path | None] = ()) -> None:
    """ParNetError, before anything has run, for a file whose ending says no format, or that cannot be written or is
    read."""
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ParNetError(f"--results-file {path}: give a name that ends in {' or '.join(SUFFIXES)}")
    check_writable(*paths, reads=reads)


def show(result: dict, labels: list[str], console: Console) -> None:
    """The shares with their intervals, and where two precisions differ."""
    rows = make_table("", "right", "of", "share", "95% interval", title="Accuracy")
    against = result.get("against", {})
    named = {"top-1": result["top1"], "top-5": result["top5"]}
    if against:
        name = against["name"]
        named |= {f"top-1, {name}": against["top1"], f"top-5, {name}": against["top5"]}
        named |= {f"top-1 as {name}": against["agreement"]}
    if len(labels) <= 5:  # of which every answer names all
        named = {name: found for name, found in named.items() if not name.startswith("top-5")}
    for name, found in named.items():
        percent = f"{found['share']:.2%}" if found["of"] else ""
        interval = f"{found['low']:.2%} to {found['high']:.2%}"
        rows.add_row(name, str(found["right"]), str(found["of"]), percent, interval)
    console.print(rows)
    changed = against.get("changed", [])
    for row in changed[:SHOWN]:
        answer, there, truth = (labels[row[key]] for key in ("answer", "against", "label"))
        console.print(f"{row['image']}: {answer}, by {against['name']} {there}; it is {truth}")
    if len(changed) > SHOWN:
        console.print(f"and {len(changed) - SHOWN} more; --results-file FILE.json has them all")


def write(result: dict, paths: list[Path]) -> None:
    """Each file in the format that its ending says."""
    for path in paths:
        if path.suffix == ".json":
            write_json(path, result)
        else:
            write_csv(path, [_row(result)])


def _row(result: dict) -> dict:
    """One row; percentages to four places."""
    settings, row = result["settings"], {"model": Path(result["settings"]["checkpoint"]).name}
    for top in ("top1", "top5"):
        share = result[top]["share"] or 0.0
        row |= {top: round(100 * share, 4), f"{top}_err": round(100 - 100 * share, 4)}
    row |= {
        "param_count": round(settings["parameters"] / 1e6, 2), "img_size": settings["img_size"],
        "crop_pct": settings["crop_pct"], "interpolation": "bicubic",
    }  # fmt: skip
    for top in ("top1", "top5"):
        row |= {f"{top}_{end}": round(100 * result[top][end], 4) for end in ("low", "high")}
    row |= {"pictures": result["top1"]["of"], "skipped": result["skipped"]}
    if against := result.get("against"):
        row |= {"against": against["name"], "agreement": round(100 * (against["agreement"]["share"] or 0.0), 4)}
    return row | {key: value for key, value in settings.items() if key not in ("parameters", "img_size", "crop_pct")}
