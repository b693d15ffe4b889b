"""One path for every placement, on one GPU: lanes as CUDA streams and as ranks, what "auto" makes of them, timed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from parallel_parnet import Engine, Placement, Program
from parallel_parnet.parity import LIMIT, relative
from parallel_parnet.program.contract import dtype_name

from ..common import DEMO_MODEL
from ..processes import command, environment, run_within
from .journal import Values
from .networks import network, picture
from .scope import DTYPE
from .timing import interleaved
from .work import Work, verdict

RANKS = 3
GPUS, INTERPRETED = ("cuda_graph", "triton", "cuda_streams"), ("cuda_graph",)


def check_placements(work: Work) -> Values:
    """Captured Triton kernels on one lane, with a CUDA stream for each of three, and on three ranks that share the GPU
    over gloo: equal up to rounding, timed. A placement's launches give the same bits captured or not; of two
    placements the compiler makes different kernels, which may round differently."""
    names = work.scope.decisive
    rows = [work.row(f"{name}, lanes", partial(_lanes, work, name), seconds=8) for name in names]
    rows += [work.row(f"{name}, ranks", partial(of_ranks, work, name), seconds=15) for name in names]
    return verdict(rows, lambda row: row.get("same_bits", True) and row["difference"] <= LIMIT[DTYPE])


def check_auto(work: Work) -> Values:
    """What "auto" tries on this GPU, drops and keeps, and that a saved engine keeps the verdict."""
    rows = [work.row(name, partial(_auto, work, name), seconds=4) for name in work.scope.decisive]
    return verdict(rows, lambda row: work.scope.dry or (row["executor"] == "cuda_graph" and row["kept"]))


def _lanes(work: Work, name: str) -> Values:
    program, _ = network(name, work.device)
    ways = engines(program, work.device, GPUS if work.device.type == "cuda" else INTERPRETED)
    time_them = partial(interleaved, rounds=work.scope.rounds)
    return {"network": name, **side_by_side(ways, picture(program, work.device), time_them)}


def _auto(work: Work, name: str) -> Values:
    program, _ = network(name, work.device)
    engine = Engine(program, None, work.device, DTYPE)
    x = picture(program, work.device)
    tried = engine.warm_up(x)
    with TemporaryDirectory() as folder:
        engine.save(Path(folder) / "engine.safetensors")
        again = Engine.load(Path(folder) / "engine.safetensors", engine.device)
    return {
        "network": name,
        "executor": engine.executor,
        "lanes": engine.placement.lanes,
        "tried_ms": {way: seconds * 1e3 for way, seconds in tried.items()},
        "dropped": engine.notes,
        "kept": again.executor == engine.executor and again.placement == engine.placement and not again.warm_up(x),
    }


def engines(program: Program, device: torch.device, executors: tuple[str, ...]) -> dict[str, Engine]:
    """Of each executor, on one lane and on a lane for each stream."""
    placements = {1: Placement.single(program), 3: Placement.by_streams(program, program.streams)}
    return {
        f"{executor}, {lanes} lane(s)": Engine(program, placement, device, DTYPE, executor)
        for lanes, placement in placements.items()
        for executor in executors
    }


def side_by_side(
    engines: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, time_them: Callable[[Mapping], dict]
) -> dict:
    """Of those that run Triton's kernels: whether the launches of a placement give the same bits captured or not, and
    the largest relative difference from the first; and how long each of all takes."""
    answers = {name: engine(x) for name, engine in engines.items() if not name.startswith("cuda_streams")}
    first = next(iter(answers.values()))
    by_lanes: dict[str, list[Tensor]] = {}
    for name, answer in answers.items():
        by_lanes.setdefault(name.partition(", ")[2], []).append(answer)
    return {
        "same_bits": all(torch.equal(answer, alike[0]) for alike in by_lanes.values() for answer in alike),
        "difference": max(relative(answer, first) for answer in answers.values()),
        "us": time_them({name: partial(engine, x) for name, engine in engines.items()}),
    }


def of_ranks(work: Work, name: str) -> Values:
    """The demo's pictures by one process and by ranks, through launch/infer.py; in a dry run, the demo's network by
    torch."""
    way = (DEMO_MODEL, "cpu", "eager") if work.scope.dry else (name, "cuda", "cuda_graph")
    with TemporaryDirectory() as folder:
        found = {ranks: infer(ranks, Path(folder) / f"{ranks}.json", work.end, *way) for ranks in (1, RANKS)}
    faults = [answer["fault"] for answer in found.values() if "fault" in answer]
    if faults:
        return {"network": name, "fault": "; ".join(faults)}
    alone, together = (torch.tensor(found[ranks]["logits"]) for ranks in (1, RANKS))
    return {
        "network": name,
        "difference": relative(together, alone),
        "median_ms": {f"{ranks} rank(s)": answer["latency_ms"]["median"] for ranks, answer in found.items()},
    }


def infer(ranks: int, file: Path, deadline: float, network: str, device: str, executor: str) -> dict:
    """What launch/infer.py writes, or how it failed."""
    line = [*command("infer", ranks), "--model", network, "--device", device, "--dtype", dtype_name(DTYPE)]
    line += ["--executor", executor, "--transport", "gloo", "--json", str(file)]
    line += ["--streams-per-gpu", str(-(-3 // ranks)), "--threads", "1"]  # on which random weights' last bits depend
    status, _, errors = run_within(line, max(1.0, deadline - time.monotonic()), environment())
    if status != 0:
        said = next((line for line in errors.splitlines() if "error" in line), "it said nothing")
        return {"fault": f"{ranks} rank(s): exit status {status}: {said}"}
    return json.loads(file.read_text())
