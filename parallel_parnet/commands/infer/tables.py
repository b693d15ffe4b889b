"""What classifying gave, for people and for programs: the top-5 of a picture, tables of answers and times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, zip_longest
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from torch import Tensor

from parallel_parnet import ParNetError, Program
from parallel_parnet.executors.available import profiled_by

from ..common import table as make_table
from ..data.split import read_names

ORDINALS = ("1st", "2nd", "3rd", "4th", "5th")


def read_labels(path: Path | None, program: Program) -> list[str]:
    """A name for each class: from the file, the checkpoint, or numbers."""
    classes = program.config.num_classes
    if path is None:
        return list(program.config.labels) or [f"class {i}" for i in range(classes)]
    labels = list(read_names(path))
    if len(labels) != classes:
        raise ParNetError(f"{path}: {len(labels)} lines for {classes} classes; give one name per line")
    return labels


def fault_of(image: str, logits: Tensor) -> str | None:
    """What is wrong with a picture's logits [classes], if anything."""
    if logits.isfinite().all():
        return None
    return f"{image}: its logits are non-finite (NaN or inf), so the network's weights are out of all proportion"


def top5(logits: Tensor, labels: Sequence[str]) -> list[dict]:
    """The five most probable classes of one picture's logits [classes], most probable first."""
    values, indices = logits.softmax(0).topk(min(5, len(labels)))
    return [
        {"label": labels[i], "index": i, "probability": p}
        for p, i in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def show_predictions(predictions: list[dict], console: Console) -> None:
    """A row for each picture, with as many of its classes, five at most, as fit the terminal in one line."""
    rows = [
        [Path(row["image"]).name, *(f"{t['label']} {t['probability']:.1%}" for t in row["top5"])] for row in predictions
    ]
    columns = zip_longest(*rows, fillvalue="")
    ends = list(accumulate((max(map(cell_len, column)) + 3 for column in columns), initial=1))[1:]  # with borders
    shown = max(1, sum(end <= console.width for end in ends) - 1)
    table = make_table("picture", *ORDINALS[:shown], title=f"Top {shown}, with probabilities")
    for row in rows:
        table.add_row(*row[: shown + 1])
    console.print(table)


def show_latency(latency: dict[str, float], title: str, console: Console) -> None:
    """Percentiles in milliseconds."""
    table = make_table(*latency, title=title)
    table.add_row(*(str(value) if key == "n" else f"{value:.3f}" for key, value in latency.items()))
    console.print(table)


def show_stages(stages: list[dict[str, float]], executor: str, console: Console) -> None:
    """A row for each lane."""
    columns = list(dict.fromkeys(label for lane in stages for label in lane))
    table = make_table("lane", *columns, title=f"Time by stage, ms (each operation alone, by {profiled_by(executor)})")
    for lane, times in enumerate(stages):
        table.add_row(str(lane), *(f"{times[label]:.3f}" if label in times else "" for label in columns))
    console.print(table)


def show_setting(setting: dict, console: Console) -> None:
    """What ran, and where."""
    table = make_table("lane", "device", "threads", "runs", title="Placement")
    for lane in setting["placement"]["lanes"]:
        table.add_row(str(lane["lane"]), lane["device"], str(lane["threads"]), lane["runs"])
    console.print(table)
    if setting["arithmetic"] != setting["dtype"]:
        console.print(
            f"note: {setting['dtype']} was asked for; this device has no such arithmetic, {setting['arithmetic']} ran"
        )
    console.print(
        f"executor {setting['executor']}, {setting['dtype']}, {setting['size']} x {setting['size']} pixels, "
        f"batch {setting['batch_size']}, depth {setting['depth']}, {setting['world_size']} rank(s), "
        f"weights {setting['weights']}"
    )
    if "calibration" in setting:
        console.print(f"{setting['dtype']} by {setting['calibration']}")


def show_start_up(seconds: dict[str, float | None], steady_ms: float, console: Console) -> None:
    """What a start costs, stage by stage, and a pass after it."""
    stages = ", ".join(
        f"{stage} {t * 1e3:{'.0f' if t >= 0.1 else '.3g'}}" for stage, t in seconds.items() if t is not None
    )
    console.print(f"start-up, ms: {stages}; then {steady_ms:.3f} a pass")
