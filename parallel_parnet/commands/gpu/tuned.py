"""The kernels tuned on the GPU at hand, and the networks that decide timed again with what came of it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from parallel_parnet.files import write_json
from parallel_parnet.kernels.gpu.config import Table, read_levels, tuned_name

from .journal import Values
from .level_tuning import Level, Trial, levels_of
from .machines import machine_of, rates_of, target_of
from .networks import planned
from .precompile import Target, compile_all, compile_launch, shapes_of
from .scope import DTYPE
from .tune import Tuning, tune_levels
from .warpgroups import is_at_hand, is_right, pass_of
from .work import Work, skipped, verdict

ELSEWHERE = "the kernel for warpgroups takes these levels; launch/tune.py tunes the others"
WIND_DOWN = 3  # seconds for the compilers that are at work when the tuning ends


def check_tuning(work: Work) -> Values:
    """A row for each level, by its name in a table, and the table, written after each. The levels of the networks that
    decide share the time; the others have what those leave. Nothing where another kernel than Triton's has them."""
    if is_at_hand(work):
        return skipped(ELSEWHERE)
    found, rates = machine_of(work), rates_of(work, DTYPE)
    levels = {variant: _levels(work, variant, found["l2_bytes"]) for variant in work.scope.timed}
    wanted = list({level.key: level for own in levels.values() for level in own}.values())
    first = {level.key for variant in work.scope.decisive for level in levels[variant]}
    kept = work.kept
    todo = [level for level in wanted if level.key not in kept]

    def done(level: Level, trial: Trial) -> None:
        if trial.config is None:
            row = {"fault": f"no configuration passed; the first: {trial.refused[0]}"}
        else:
            row = trial.entry(level, rates)
        work.journal.add(work.step, level.key, row)
        _write(work, found)

    tuning = Tuning(work.device, target_of(work), {DTYPE: rates}, work.scope.candidates)
    shared = sum(level.key in first for level in todo)
    left_out = tune_levels(todo, tuning, work.end - WIND_DOWN, done, shared) if todo else []
    _write(work, found)
    rows = work.journal.rows(work.step)
    return {**verdict(rows.values()), "left_out": len(left_out), "table": _path(work, found).name}


def check_tuned(work: Work) -> Values:
    """The networks that decide, with the defaults and with the table read back, in turns; and whether what each chooses
    is right."""
    if is_at_hand(work):
        return skipped(ELSEWHERE)
    path, target = _path(work, machine_of(work)), target_of(work)
    levels = len(read_levels(path))
    if not levels:
        return {"passed": False, "left_out": len(work.scope.decisive), "fault": "no level was tuned"}
    if not all(_row_name(variant, levels) in work.journal.rows(work.step) for variant in work.scope.decisive):
        jobs = {
            f"{variant} {i}": partial(compile_tuned, variant, i, path)
            for variant in work.scope.decisive
            for i in range(shapes_of(variant).launches)
        }
        compile_all(jobs, target, work.end)
    rows = [
        work.row(_row_name(variant, levels), partial(pass_of, work, variant, _tables(path, target)))
        for variant in work.scope.decisive
    ]
    return verdict(rows, partial(is_right, work))


def compile_tuned(variant: str, index: int, path: Path, target: Target) -> None:
    """One launch of a network as each table cuts it."""
    for table in _tables(path, target).values():
        plan = planned(shapes_of(variant), DTYPE, torch.device("meta"), table=table)
        compile_launch(plan.launches[index], target)


def _tables(path: Path, target: Target) -> dict[str, Table]:
    default = Table.load(target.capability, multiprocessors=target.multiprocessors)
    tuned = replace(default, levels=read_levels(path))
    return {"default": default, "tuned": tuned}


def _row_name(variant: str, levels: int) -> str:
    return f"{variant}, {levels} levels tuned"


def _levels(work: Work, variant: str, cache: int) -> list[Level]:
    return levels_of(shapes_of(variant), 1, DTYPE, cache)[: work.scope.levels]


def _path(work: Work, found: Values) -> Path:
    return work.out / tuned_name(found["gpu"])


def _write(work: Work, found: Values) -> None:
    """The table, of all rows so far, as `launch/tune.py` would write it."""
    note = {"note": work.scope.note} if work.scope.note else {}
    write_json(_path(work, found), {**found, **note, "tuned": time.strftime("%Y-%m-%d"), "levels": work.kept})
