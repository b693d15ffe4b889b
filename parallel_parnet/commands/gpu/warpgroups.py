"""The kernel for a Hopper's warpgroups: its tiles timed on the GPU at hand, and the networks with what came of it,
beside Triton's kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from itertools import cycle, islice, zip_longest
from pathlib import Path

import torch

from parallel_parnet.files import write_json
from parallel_parnet.kernels.gpu.config import HOPPER, Table, bindings, read_levels, tuned_name
from parallel_parnet.kernels.gpu.geometry import WarpTile
from parallel_parnet.kernels.gpu.launch import Launch
from parallel_parnet.kernels.hopper.plan import candidates, takes
from parallel_parnet.parity import relative

from .device import capture, event_times, exact_fp32, in_a_graph, l2_bytes, quantiles
from .journal import Values
from .level_tuning import LAUNCHES, Level, RefusedError, levels_of, operands, sets_beyond
from .machines import machine_of
from .networks import network, picture, planned, run
from .parity import deviation, poison
from .precompile import shapes_of
from .scope import capability_of
from .timing import interleaved
from .work import Work, verdict

DTYPE = torch.bfloat16
REPEATS = 7
NEEDED = "the kernel for warpgroups needs compute capability 9.0, and cuda-bindings"
MOST_ALIKE = 2  # candidates that differ in nothing but chunks and stages
REPLAYED = 200  # passes whose bits are compared
ONE, TWO = "warpgroups", "two_places"  # tables of tiles for one and for two blocks to a multiprocessor


def check_warpgroups(work: Work) -> Values:
    """A row for each level that the kernel takes, and two tables: the fastest tiles, and those of which two blocks have
    a place on a multiprocessor, which gain by what runs before and after them."""
    if not is_at_hand(work):
        return skipped(NEEDED)
    exact_fp32()
    found = machine_of(work)
    levels = {level.key: level for variant in work.scope.tuned for level in _levels(work, variant, found["l2_bytes"])}
    rows = [work.row(key, partial(_tune, work, level)) for key, level in levels.items()]
    made = {row: values for row, values in work.journal.rows(work.step).items() if "fault" not in values}
    for name in (ONE, TWO):
        levels_of_it = {row: values | values.get(name, {}) for row, values in made.items()}
        write_json(_path(work, found, name), {**found, "tuned": time.strftime("%Y-%m-%d"), "levels": levels_of_it})
    return verdict(rows, lambda row: True, table=_path(work, found, ONE).name)


def check_passes(work: Work) -> Values:
    """The networks with Triton's kernels, and with those for warpgroups of either table, and with weights that are sent
    for ahead, in turns; whether each launch, and all logits, are right, also where launches overlap, and the same in
    every replay."""
    if not is_at_hand(work):
        return skipped(NEEDED)
    exact_fp32()
    found = machine_of(work)
    ours = Table.load(HOPPER, found["gpu"])
    tables = {name: replace(ours, warpgroups=read_levels(_path(work, found, name))) for name in (ONE, TWO)}
    tables = {"triton": ours, **tables, "ahead": replace(tables[ONE], ahead=True)}
    rows = [work.row(variant, partial(pass_of, work, variant, tables)) for variant in work.scope.timed]
    limit = work.scope.limit(DTYPE)
    return verdict(rows, lambda row: row["deviation"] <= 1 and row["error"] <= limit and not row["different"])


def chosen(level: Level, most: int) -> list[tuple[WarpTile, ...]]:
    """The most promising candidates of each number of places and taps in turns, few of a kind."""
    kept: dict[tuple, dict[tuple, list]] = {}
    for _, tiles in candidates(level.shapes, level.n):
        of_these = kept.setdefault((tiles[0].places, tiles[0].taps), {})
        alike = of_these.setdefault(tuple((t.bm, t.bn, t.split_k) for t in tiles), [])
        if len(alike) < MOST_ALIKE:
            alike.append(tiles)
    turns = zip_longest(*([tiles for alike in of_these.values() for tiles in alike] for of_these in kept.values()))
    return list(islice((tiles for turn in turns for tiles in turn if tiles), most))


def is_at_hand(work: Work) -> bool:
    """Whether this GPU runs the kernel."""
    return work.device.type == "cuda" and capability_of(machine_of(work)) == HOPPER and bindings()


def skipped(why: str) -> Values:
    """The verdict of a step that has nothing to do."""
    return {"passed": True, "left_out": 0, "skipped": why}


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
        for conv in plans[name].convolutions.values():
            poison(conv)
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


def _tune(work: Work, level: Level) -> Values:
    """The fastest tiles of a level whose answers are right, of those that were timed."""
    from parallel_parnet.kernels.hopper import launch as hopper  # here, since it needs CUDA's bindings

    tried, times, refused = chosen(level, work.scope.candidates), {}, []
    made = {tiles: operands(level, tiles, 0, work.device) for tiles in tried}
    launches = {tiles: hopper.level(convolutions) for tiles, convolutions in made.items()}
    hopper.prepare(launches.values())
    for tiles, launch in launches.items():
        try:
            times[tiles] = _timed(work, level, tiles, made.pop(tiles), launch)
        except RefusedError as error:
            refused.append(f"{[astuple(tile) for tile in tiles]}: {error}")
    if not times:
        raise RefusedError(f"no candidate passed; the first: {refused[0]}")
    about = {"l2": "cold" if level.cold else "warm", "timed": len(times), "refused": refused}
    by_places = {places: {tiles: us for tiles, us in times.items() if tiles[0].places == places} for places in (1, 2)}
    of_two = {TWO: _fastest(by_places[2])} if by_places[2] else {}
    return {**_fastest(by_places[1] or times), **about, **of_two}


def _fastest(times: Mapping[tuple[WarpTile, ...], Values]) -> Values:
    best = min(times, key=lambda tiles: times[tiles]["p50"])
    return {"tiles": [astuple(tile) for tile in best], "us": times[best]}


def _timed(work: Work, level: Level, tiles: Sequence[WarpTile], first: list, launch: Launch) -> Values:
    from parallel_parnet.kernels.hopper import launch as hopper

    for conv in first:
        poison(conv)
    launch()
    if (worst := max(map(deviation, first))) > 1:
        raise RefusedError(f"wrong by {worst:.1f} times what rounding allows")
    on_a_gpu = work.device.type == "cuda"
    sets = sets_beyond(first, l2_bytes(work.device)) if level.cold and on_a_gpu else 1
    others = [hopper.level(operands(level, tiles, i, work.device)) for i in range(1, sets)]
    turns = list(islice(cycle([launch, *others]), max(LAUNCHES, sets) if on_a_gpu else 1))
    return quantiles([seconds / len(turns) for seconds in event_times(in_a_graph(turns, work.device), REPEATS)])


def _path(work: Work, found: Values, name: str) -> Path:
    return work.out / tuned_name(found["gpu"], name)
