"""The poster's speed table on this machine: accuracy and its own speeds quoted, ours measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from parallel_parnet import create_model, fold
from parallel_parnet.program.rivals import rival

from ..common import fit_norms
from ..sections import table
from .fused import fuse
from .measure import COMPARED, Settings, bars, contenders, set_up_all, time_all
from .ours import usual
from .poster_networks import PEERS
from .proof import agrees, expected_logits, left_out, prove_golden
from .rows import Result, Row, row_of, timm_columns
from .running import Entry
from .statistics import median_interval
from .subject import Subject

SIZE = 224
HEADS = (
    "network", "depth", "parameters, M", "GFLOP", "top-1, % (poster)", "pictures/s (poster)", "pictures/s here",
    "ms here (95% interval of the median)", "by",
)  # fmt: skip
# the ways that are fastest for most networks on each kind of device, beside this project's engine
WAYS = {"cpu": ("OpenVINO", "ONNX Runtime"), "cuda": ("CUDA graph of eager, fused", "torch.compile")}

NOTE = (
    'Accuracy, and speed where marked, are quoted from the poster of "Non-deep Networks" (its own hardware; ParNet-L '
    "and XL on three GPUs), not measured here. Weights here are random, on which latency does not depend."
)


@dataclass(frozen=True)
class Quoted:
    """As the poster of "Non-deep Networks" has it: ImageNet top-1 in percent, pictures a second on its hardware. depth:
    convolutions and classifier on the longest path; of RepVGG convolutions."""

    name: str
    depth: int
    top1: float
    speed: int


QUOTED = (
    Quoted("resnet34", 34, 74.12, 306),
    Quoted("resnet50", 50, 77.53, 222),
    Quoted("repvgg_b1g4", 28, 77.59, 376),
    Quoted("repvgg_b2g4", 28, 79.38, 300),
    Quoted("parnet_s", 12, 75.19, 280),
    Quoted("parnet_m", 12, 76.60, 265),
    Quoted("parnet_l", 12, 77.66, 249),
    Quoted("parnet_xl", 12, 78.55, 230),
)


def subject_of(name: str, device: torch.device, dtype: torch.dtype, threads: int) -> Subject:
    """A network of the table at batch 1, with random weights."""
    torch.manual_seed(0)
    if name in PEERS:
        network, program = PEERS[name]().eval().requires_grad_(False), rival(name)
        network.load_state_dict(dict(program.weights))
        return Subject(name, network, network, program, SIZE, 1, device, dtype, threads)
    model = fit_norms(create_model(name)).requires_grad_(False)
    return Subject(name, model, fuse(model), fold(model), SIZE, 1, device, dtype, threads)


def ways_of(subject: Subject) -> list[str]:
    """Names of the contenders that run a network here: ours, and of those that ParNet is compared with libraries."""
    libraries = () if subject.name.startswith("parnet") else WAYS[subject.device.type]
    return [*libraries, usual(subject)]


def measure_poster(
    header: dict, make: Callable[[str], Subject], settings: Settings, console: Console,
    ways: Callable[[Subject], list[str]] = ways_of, table: Sequence[Quoted] = QUOTED,
) -> Result:  # fmt: skip
    """A row for each network: the fastest of its ways, all networks timed in turns in one process."""
    prove_golden()
    entries: list[Entry] = []
    with bars(console) as progress:
        for quoted in table:
            subject = make(quoted.name)
            compared = subject.pictures(COMPARED)
            expected, chosen = expected_logits(subject, compared), contenders(ways(subject))
            entries += set_up_all(chosen, subject, compared, expected, progress, f"{quoted.name}: ")
    running = [entry for entry in entries if agrees(entry)]
    clocks = time_all(running, settings, lambda: None)
    rows = [_by_events(row_of(entry, header["possible"], clocks), entry) for entry in running]
    fastest = []
    for quoted in table:
        own = [row for row in rows if row["model"] == quoted.name]
        if own:
            row = min(own, key=lambda row: row["infer_step_time"])
            fastest.append({**row, "depth": quoted.depth, "top1_poster": quoted.top1, "speed_poster": quoted.speed})
    return {
        "header": header,
        "rows": fastest,
        **left_out(entries, lambda entry: f"{entry.subject.name}, {entry.name}"),
    }


def _by_events(row: Row, entry: Entry) -> Row:
    """With the time between two CUDA events, where it was taken, in place of that from call to answer: the host's share
    of a pass is the same for all."""
    if row["device_ms"] is None:
        return row
    interval = [round(t * 1e3, 5) for t in median_interval(entry.device)]
    return {**row, **timm_columns(entry.subject, row["device_ms"]["median"]), "median_interval_ms": interval}


def markdown(result: Result) -> str:
    """The table, with where and how it was measured beneath it."""
    header = result["header"]
    rows = [
        [
            row["model"], f"{row['depth']}", f"{row['param_count']:.1f}", f"{2 * row['infer_gmacs']:.1f}",
            f"{row['top1_poster']:.2f}", f"{row['speed_poster']}", f"{row['infer_samples_per_sec']:.1f}",
            "{:.2f} ({:.2f} to {:.2f})".format(row["infer_step_time"], *row["median_interval_ms"]), row["contender"],
        ]
        for row in result["rows"]
    ]  # fmt: skip
    where = (
        f"Here: {header['machine']}, {header.get('cpu') or header.get('gpu')}, {header['dtype']}, batch 1, "
        f"{header['threads']} thread(s), torch {header['torch']}, {header['date']}; medians of interleaved runs"
        f"{', between two CUDA events' if any(row['device_ms'] for row in result['rows']) else ''}."
    )
    absent = [f"Not measured: {name} ({why})." for name, why in result["missing"].items()]
    wrong = [f"Not compared: {name} ({how})." for name, how in result["disagree"].items()]
    return "\n".join([table(HEADS, rows), "", NOTE, where, *absent, *wrong]) + "\n"
