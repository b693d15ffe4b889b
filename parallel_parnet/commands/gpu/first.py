"""The first minute: whether each launch of the networks that decide is right, and how long a pass takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from parallel_parnet.executors.graph import capture
from parallel_parnet.executors.triton_backend import TritonSegment
from parallel_parnet.kernels.gpu.config import Table
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.parity import relative

from .device import event_times, quantiles
from .journal import Values
from .level_tuning import compile_config, levels_of
from .machines import target_of
from .networks import network, picture, planned, run
from .parity import deviation, poison
from .precompile import NetworkCase, compile_all, jobs_of, shapes_of, single_launches
from .probes import compile_probes
from .scope import DTYPE
from .work import Work, verdict

REPLAYS = 200


def check_first_kernels(work: Work) -> Values:
    """Compile what the first steps launch, on all cores: the networks' launches, and each level by itself."""
    target = target_of(work)
    table = Table.load(target.capability, multiprocessors=target.multiprocessors)
    cases = [NetworkCase(variant, DTYPE, 1) for variant in work.scope.decisive]
    jobs = jobs_of(single_launches(cases)) | {"probes": compile_probes}
    for variant in work.scope.decisive:
        for level in levels_of(shapes_of(variant), 1, DTYPE)[: work.scope.levels]:
            config = table.level(level.shapes, level.n, level.dtype)
            jobs[level.key] = partial(compile_config, level, config)
    return compile_all(jobs, target, work.end)


def check_first(work: Work) -> Values:
    """Each launch against its twin, on the features that the launches before it made; all logits against the reference;
    and the replay of a CUDA graph."""
    rows = []
    for variant in work.scope.decisive:
        program, reference = network(variant, work.device)
        x = picture(program, work.device)
        plan = planned(program, DTYPE, work.device)
        logits = once(plan, x)
        rows += deviations(work, variant, plan)
        error = partial(_error, logits, reference, x, work.scope.limit(DTYPE))
        rows.append(work.row(f"{variant} logits", error))
        rows.append(work.row(f"{variant} replay", partial(_replay, plan, x)))
    return verdict(rows, lambda row: row.get("deviation", 0) <= 1 and row.get("error", 0) <= work.scope.limit(DTYPE))


def once(plan: TritonSegment, x: torch.Tensor) -> torch.Tensor:
    """The logits of a pass over poisoned buffers."""
    poison(*plan.convolutions.values())
    return run(plan, x).clone()


def deviations(work: Work, variant: str, plan: TritonSegment) -> list[Values | None]:
    """A row for each launch that a pass has made."""
    levels: dict[int, list[Convolution]] = {}
    for name, conv in plan.convolutions.items():
        levels.setdefault(plan.backend.program.by_name[name].level, []).append(conv)
    return [work.row(f"{variant} level {number}", partial(_deviation, own)) for number, own in levels.items()]


def _deviation(convs: list[Convolution]) -> Values:
    return {"deviation": round(max(map(deviation, convs)), 4)}


def _error(logits: Tensor, reference: Callable[[Tensor], Tensor], x: Tensor, limit: float) -> Values:
    return {"error": relative(logits, reference(x)), "tolerance": limit}


def _replay(plan: TritonSegment, x: torch.Tensor) -> Values:
    _, replay = capture(lambda: run(plan, x), plan.device)
    return {"launches": len(plan.launches), "us": quantiles(event_times(replay, REPLAYS))}
