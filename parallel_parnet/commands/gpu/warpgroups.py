"""The kernel for a Hopper's warpgroups: its tiles timed on the GPU at hand, and the networks with what came of it,
beside Triton's kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import astuple, replace
from functools import partial
from itertools import cycle, islice, pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from parallel_parnet.executors.graph import capture
from parallel_parnet.files import write_json
from parallel_parnet.kernels.gpu.config import HOPPER, Table, read_levels, refused, tuned_name
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.gpu.geometry import WarpTile
from parallel_parnet.kernels.gpu.launch import Launch
from parallel_parnet.kernels.hopper.plan import candidates, takes
from parallel_parnet.parity import relative

from .device import event_times, in_a_graph, l2_bytes, quantiles
from .journal import Values
from .level_tuning import LAUNCHES, Level, RefusedError, levels_of, operands, prove, sets_beyond
from .machines import machine_of
from .networks import network, picture, planned, run
from .parity import deviation, poison
from .precompile import shapes_of
from .scope import DTYPE
from .timing import interleaved
from .work import Work, skipped, verdict

REPEATS = 7
NEEDED = "the kernel for warpgroups needs compute capability 9.0, cuda-bindings, and an NVRTC that fits the driver"
MOST_ALIKE = 2  # candidates that differ in nothing but chunks and stages
REPLAYED = 200  # passes whose bits are compared


class Candidates(NamedTuple):
    """Of a level, by their tiles. compiled: when all of them are."""

    operands: dict[tuple[WarpTile, ...], list[Convolution]]
    launches: dict[tuple[WarpTile, ...], Launch]
    compiled: Future[None]


def check_warpgroups(work: Work) -> Values:
    """A row for each level that the kernel takes, and a table of the fastest tiles. While a level is timed, the next
    one's candidates are compiled."""
    if not is_at_hand(work):
        return skipped(NEEDED)
    found = machine_of(work)
    levels = {level.key: level for variant in work.scope.timed for level in _levels(work, variant, found["l2_bytes"])}
    kept, compiler, coming = work.kept, ThreadPoolExecutor(1), dict[str, Candidates]()
    turns = pairwise([*(level for key, level in levels.items() if key not in kept), None])
    new = [work.row(now.key, partial(_tune, work, compiler, coming, now, then)) for now, then in turns if now]
    compiler.shutdown(wait=False, cancel_futures=True)  # out of time, nobody wants what is still being compiled
    rows = [*(row for key, row in kept.items() if key in levels), *new]
    made = {key: {"tiles": row["tiles"], "us": row["us"]["p50"], "l2": row["l2"]} for key, row in work.kept.items()}
    note = f"Each level by itself, over and over, on {time.strftime('%Y-%m-%d')}."
    write_json(_path(work, found), {**found, "note": note, "levels": made})
    return verdict(rows, table=_path(work, found).name)


def check_passes(work: Work) -> Values:
    """The networks with the kernel for warpgroups, and with weights that are sent for ahead, in turns, and the decisive
    ones, for which they are compiled by then, with Triton's; whether each launch, and all logits, are right, also where
    launches overlap, and the same in every replay."""
    if not is_at_hand(work):
        return skipped(NEEDED)
    found = machine_of(work)
    ours = Table.load(HOPPER, found["gpu"], multiprocessors=found["multiprocessors"])
    tuned = replace(ours, warpgroups=read_levels(_path(work, found)))
    tables = {"warpgroups": tuned, "ahead": replace(tuned, ahead=True)}
    ways = {name: {"triton": ours, **tables} if name in work.scope.decisive else tables for name in work.scope.timed}
    rows = [work.row(variant, partial(pass_of, work, variant, of_it)) for variant, of_it in ways.items()]
    return verdict(rows, partial(is_right, work))


def chosen(level: Level, most: int, table: Table) -> list[tuple[WarpTile, ...]]:
    """What the table has, and the most promising candidates of each number of pixels and of taps in turns, few of a
    kind."""
    kept: dict[tuple, dict[tuple, list]] = {}
    for _, tiles in candidates(level.shapes, level.n):
        of_these = kept.setdefault((tiles[0].bm, tiles[0].taps), {})
        alike = of_these.setdefault(tuple((t.bm, t.bn, t.split_k) for t in tiles), [])
        if len(alike) < MOST_ALIKE:
            alike.append(tiles)
    turns = zip_longest(*([tiles for alike in of_these.values() for tiles in alike] for of_these in kept.values()))
    of_table = table.of_warpgroups(level.shapes, level.n, level.dtype)
    promising = dict.fromkeys([of_table, *(tiles for turn in turns for tiles in turn)])
    return [tiles for tiles in promising if tiles][:most]


def is_at_hand(work: Work) -> bool:
    """Whether this GPU runs the kernel."""
    return work.device.type == "cuda" and tuple(machine_of(work)["capability"]) == HOPPER and not refused(work.device)


def _levels(work: Work, variant: str, cache: int) -> list[Level]:
    found = levels_of(shapes_of(variant), 1, DTYPE, cache)
    return [level for level in found if all(map(takes, level.shapes))][: work.scope.levels]


def pass_of(work: Work, variant: str, tables: Mapping[str, Table]) -> Values:
    """A network with each of the tables: times in turns, and the worst of what their graphs compute."""
    program, reference = network(variant, work.device)
    x = picture(program, work.device)
    plans = {name: planned(program, DTYPE, work.device, table=table) for name, table in tables.items()}
    expected, errors, worst, different = reference(x), [], 0.0, 0
    captured = {name: capture(partial(run, plan, x), work.device) for name, plan in plans.items()}
    for name, (logits, replay) in captured.items():  # as graphs, in which launches overlap
        poison(*plans[name].convolutions.values())
        replay()
        first = logits.clone()
        errors.append(relative(first, expected))
        worst = max(worst, *map(deviation, plans[name].convolutions.values()))
        for _ in range(REPLAYED if work.device.type == "cuda" else 1):
            replay()
            different += not torch.equal(logits, first)
    ways = {name: replay for name, (_, replay) in captured.items()}
    verdicts = {"deviation": round(worst, 4), "error": max(errors), "different": different}
    return {**verdicts, "us": interleaved(ways, work.scope.rounds)}


def is_right(work: Work, row: Values) -> bool:
    """Of what `pass_of` found."""
    return row["deviation"] <= 1 and row["error"] <= work.scope.limit(DTYPE) and not row["different"]


def _candidates(work: Work, compiler: Executor, level: Level) -> Candidates:
    """A level's, which are being compiled."""
    from parallel_parnet.kernels.hopper import launch as hopper  # here, since it needs CUDA's bindings

    known = Table.load(HOPPER, machine_of(work)["gpu"], warpgroups=True)
    made = {tiles: operands(level, tiles, 0, work.device) for tiles in chosen(level, work.scope.candidates, known)}
    launches = {tiles: hopper.level(convolutions) for tiles, convolutions in made.items()}
    return Candidates(made, launches, compiler.submit(hopper.prepare, list(launches.values())))


def _tune(work: Work, compiler: Executor, coming: dict[str, Candidates], level: Level, after: Level | None) -> Values:
    """The fastest tiles of a level whose answers are right, of those that were timed, and the times of all. coming: of
    this level, if the one before has been timed, and of the one after it from now on."""
    made = coming.pop(level.key, None) or _candidates(work, compiler, level)
    made.compiled.result()
    if after is not None:
        coming[after.key] = _candidates(work, compiler, after)
    times, refused = {}, []
    for tiles, launch in made.launches.items():
        try:
            times[tiles] = _timed(work, level, tiles, made.operands.pop(tiles), launch)
        except RefusedError as error:
            refused.append(f"{[astuple(tile) for tile in tiles]}: {error}")
    if not times:
        raise RefusedError(f"no candidate passed; the first: {refused[0]}")
    best = min(times, key=lambda tiles: times[tiles]["p50"])
    return {
        "tiles": [astuple(tile) for tile in best],
        "us": times[best],
        "l2": "cold" if level.cold else "warm",
        "timed": len(times),
        "refused": refused,
        "all": [[[astuple(tile) for tile in tiles], us["p50"]] for tiles, us in times.items()],
    }


def _timed(work: Work, level: Level, tiles: Sequence[WarpTile], first: list[Convolution], launch: Launch) -> Values:
    from parallel_parnet.kernels.hopper import launch as hopper

    prove(launch, first)
    on_a_gpu = work.device.type == "cuda"
    sets = sets_beyond(first, l2_bytes(work.device)) if level.cold and on_a_gpu else 1
    others = [hopper.level(operands(level, tiles, i, work.device)) for i in range(1, sets)]
    turns = list(islice(cycle([launch, *others]), max(LAUNCHES, sets) if on_a_gpu else 1))
    return quantiles([seconds / len(turns) for seconds in event_times(in_a_graph(turns, work.device), REPEATS)])


def _path(work: Work, found: Values) -> Path:
    return work.out / tuned_name(found["gpu"], "warpgroups")
