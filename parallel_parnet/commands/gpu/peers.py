"""The poster's networks and the families of depth, each as one CUDA graph, beside each other on this GPU."""

from __future__ import annotations

from functools import partial

import torch
from rich.console import Console

from parallel_parnet import fold
from parallel_parnet.planning.costs import LINKS
from parallel_parnet.program.contract import dtype_name
from parallel_parnet.program.families import parallel_chains

from ..bench.fused import fuse
from ..bench.measure import Settings
from ..bench.poster import QUOTED, Quoted, measure_poster, subject_of, ways_of
from ..bench.subject import Subject
from ..common import fit_norms
from ..depth.command import measure_group
from ..depth.points import Point, points
from .journal import Values
from .machines import rates_of
from .scope import DTYPE, NARROW, model
from .work import Work, verdict

BUDGET_S = 1.0  # of timed runs, for a group of the families
COMPILED = "torch.compile"  # takes minutes for some of these networks: `launch/bench.py --poster` has it


def check_poster(work: Work) -> Values:
    """The poster's table by CUDA graphs, in turns: a row for each network, by its fastest way."""
    dry = work.scope.dry
    quoted = (Quoted(NARROW, 9, 0.0, 0),) if dry else QUOTED
    done, names = work.journal.rows(work.step), {q.name for q in quoted}
    failed = done.keys() - work.kept.keys()
    if failed or names - done.keys():

        def ways(subject: Subject) -> list[str]:
            return ["ours: cuda_graph"] if dry else [way for way in ways_of(subject) if way != COMPILED]

        make = partial(_narrow if dry else subject_of, device=work.device, dtype=DTYPE, threads=torch.get_num_threads())
        settings = Settings(runs=2, least=2, warm_up=1) if dry else Settings(budget=work.left / 3)
        rates = rates_of(work, DTYPE)
        possible = {dtype_name(DTYPE): {"flop_per_s": rates.flops, "bytes_per_s": rates.bytes}}
        result = measure_poster({"possible": possible}, make, settings, Console(quiet=True), ways, quoted)
        for row in result["rows"]:
            clock = "CUDA events" if row["device_ms"] else "the host's clock"
            values = {"contender": row["contender"], "ms": row["infer_step_time"], "timed_by": clock, "n": row["n"]}
            work.journal.add(work.step, row["model"], {**values, "interval_ms": row["median_interval_ms"]})
        faults = {name: {"fault": why} for name, why in result["missing"].items() if "failed" in why}
        for name, fault in ({name: {} for name in failed} | faults).items():
            work.journal.add(work.step, name, fault)
    rows = work.journal.rows(work.step)
    return {**verdict(rows.values()), "left_out": len(names - rows.keys())}


def check_depth(work: Work) -> Values:
    """The quick selection of the families of `launch/latency_vs_depth.py`, a row for each."""
    dry = {"dry": [Point("dry", "one block", lambda: parallel_chains(1, 1, 8, 32), 3, 1, 32)]}
    groups = dry if work.scope.dry else points(quick=True)
    rows = [work.row(name, partial(_family, work, group), seconds=3) for name, group in groups.items()]
    return verdict(rows)


def _family(work: Work, group: list[Point]) -> Values:
    return {"members": measure_group(group, "cuda_graph", work.device, DTYPE, LINKS["nvlink"], BUDGET_S)}


def _narrow(name: str, device: torch.device, dtype: torch.dtype, threads: int) -> Subject:
    network = fit_norms(model(name)).requires_grad_(False)
    size = network.config.image_size
    return Subject(name, network, fuse(network), fold(network), size, 1, device, dtype, threads)
