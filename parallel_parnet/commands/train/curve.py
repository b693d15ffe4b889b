"""How training went: a line of JSON for each epoch, and a figure."""

from __future__ import annotations

from pathlib import Path

from parallel_parnet.files import as_json, write_atomically

from ..drawing import need_matplotlib, save


def files(stem: Path) -> tuple[Path, Path]:
    """What `write` will write. ParNetError where the figure could not be drawn."""
    need_matplotlib(f"--curve {stem}")
    return stem.with_name(f"{stem.name}.jsonl"), stem.with_name(f"{stem.name}.png")


def write(epochs: list[dict], title: str, stem: Path) -> None:
    """STEM.jsonl and STEM.png, whole or as they were."""
    from matplotlib.figure import Figure

    lines, picture = files(stem)
    write_atomically(lines, "".join(as_json(row) + "\n" for row in epochs))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    at = [row["epoch"] for row in epochs]
    left.plot(at, [row["loss"] for row in epochs], "o-", color="#8a3ffc", markersize=3)
    left.set_xlabel("epoch")
    left.set_ylabel("loss in training (circles)")
    left.set_ylim(bottom=0)
    right.plot(at, [100 * row["test_accuracy"] for row in epochs], "s--", color="#00695c", markersize=3)
    right.set_ylabel("top-1 on test pictures, % (squares)")
    right.set_ylim(0, 103)
    left.xaxis.get_major_locator().set_params(integer=True)
    # with names that are the user's: a dollar is no formula, and bytes may be no text
    left.set_title(title.encode(errors="backslashreplace").decode(), parse_math=False)
    save(figure, picture)
