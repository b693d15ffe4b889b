"""One path for every placement, on one GPU: lanes as CUDA streams and as ranks, what "auto" makes of them, timed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from parallel_parnet import Engine, Placement, Program, create_model, fold
from parallel_parnet.parity import LIMIT, relative

from ..common import DTYPES, settle
from ..processes import environment
from .device import require_gpu, run_within
from .timing import interleaved

NETWORKS = ("parnet_s", "parnet_xl")
DTYPE = "bfloat16"
RANKS = 3
COMMAND = "parallel_parnet.commands.infer"


def check_placements(deadline: float, out: Path) -> dict:
    """Captured Triton kernels on one lane, with a CUDA stream for each of three, and on three ranks that share the GPU
    over gloo: equal up to rounding, timed. A placement's launches give the same bits captured or not; of two
    placements the compiler makes different kernels, which may round differently."""
    device, rows = require_gpu(), []
    for network in NETWORKS:
        if time.monotonic() > deadline - 10:
            break
        program = fold(settle(create_model(network)))
        rows.append({"network": network, **side_by_side(engines(program, device), picture(program, device))})
    ranks = [of_ranks(network, deadline) for network in NETWORKS if time.monotonic() < deadline - 20]
    apart = [row.get("difference", float("inf")) for row in (*rows, *ranks)]
    passed = all(row["same_bits"] for row in rows) and max(apart, default=1.0) <= LIMIT[DTYPES[DTYPE]]
    return {"passed": passed, "left_out": 2 * len(NETWORKS) - len(rows) - len(ranks), "rows": rows, "ranks": ranks}


def check_auto(deadline: float, out: Path) -> dict:
    """What "auto" tries on this GPU, drops and keeps, and that a saved engine keeps the verdict."""
    device, rows = require_gpu(), []
    for network in NETWORKS:
        if time.monotonic() > deadline - 10:
            break
        program = fold(settle(create_model(network)))
        row = verdict(Engine(program, None, device, DTYPES[DTYPE]), picture(program, device))
        rows.append({"network": network, **row})
    passed = all(row["executor"] == "cuda_graph" and row["kept"] for row in rows) and len(rows) > 0
    return {"passed": passed, "left_out": len(NETWORKS) - len(rows), "rows": rows}


def engines(program: Program, device: torch.device) -> dict[str, Engine]:
    """Of each executor of GPUs, on one lane and on a lane for each stream."""
    placements = {1: Placement.single(program), 3: Placement.from_streams_per_gpu(program, 1, program.streams)}
    return {
        f"{executor}, {lanes} lane(s)": Engine(program, placement, device, DTYPES[DTYPE], executor)
        for lanes, placement in placements.items()
        for executor in ("cuda_graph", "triton", "cuda_streams")
    }


def side_by_side(
    engines: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, time_them: Callable[[Mapping], dict] = interleaved
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


def verdict(engine: Engine, x: Tensor) -> dict:
    """What was tried, in milliseconds, what was not, and whether a file keeps it."""
    tried = engine.warm_up(x)
    with TemporaryDirectory() as folder:
        engine.save(Path(folder) / "engine.safetensors")
        again = Engine.load(Path(folder) / "engine.safetensors", engine.device)
    return {
        "executor": engine.executor,
        "lanes": engine.placement.lanes,
        "tried_ms": {name: seconds * 1e3 for name, seconds in tried.items()},
        "dropped": engine.notes,
        "kept": again.executor == engine.executor and again.placement == engine.placement and not again.warm_up(x),
    }


def of_ranks(network: str, deadline: float) -> dict:
    """The demo's pictures by one process and by ranks, through launch/infer.py."""
    with TemporaryDirectory() as folder:
        found = {ranks: infer(network, ranks, Path(folder) / f"{ranks}.json", deadline) for ranks in (1, RANKS)}
    faults = [answer["fault"] for answer in found.values() if "fault" in answer]
    if faults:
        return {"network": network, "faults": faults}
    alone, together = (torch.tensor(found[ranks]["logits"]) for ranks in (1, RANKS))
    return {
        "network": network,
        "difference": relative(together, alone),
        "median_ms": {f"{ranks} rank(s)": answer["latency_ms"]["median"] for ranks, answer in found.items()},
    }


def infer(
    network: str, ranks: int, file: Path, deadline: float, device: str = "cuda", executor: str = "cuda_graph"
) -> dict:
    """What launch/infer.py writes, or how it failed."""
    ranked = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *ranked, COMMAND, "--model", network, "--device", device, "--dtype", DTYPE]
    command += ["--executor", executor, "--transport", "gloo", "--json", str(file)]
    command += ["--streams-per-gpu", str(-(-3 // ranks)), "--threads", "1"]  # on which random weights' last bits depend
    status, _, errors = run_within(command, max(1.0, deadline - time.monotonic()), environment())
    if status != 0:
        said = next((line for line in errors.splitlines() if "error" in line), "it said nothing")
        return {"fault": f"{ranks} rank(s): exit status {status}: {said}"}
    return json.loads(file.read_text())


def picture(program: Program, device: torch.device) -> Tensor:
    """Noise, at the network's own size."""
    side = program.config.image_size
    return torch.randn(1, 3, side, side, device=device)
