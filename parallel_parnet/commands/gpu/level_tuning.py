"""Timing candidates for one level of the network on a GPU, each checked before it may win.

Whether a level's inputs lie in the L2 cache when it starts depends on its network: all of ParNet-S stays there from
pass to pass, ParNet-XL's weights never do. So each is timed as it will run, and says how.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median

import torch
from triton.errors import TritonError

from parallel_parnet import Program
from parallel_parnet.executors.triton_backend import geometry
from parallel_parnet.kernels.gpu.candidates import candidates
from parallel_parnet.kernels.gpu.compiled import SPILLED, resources
from parallel_parnet.kernels.gpu.config import LevelConfig, Table, key
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile, WarpTile
from parallel_parnet.kernels.gpu.launch import Launch
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.model import floor
from parallel_parnet.kernels.gpu.rates import Rates
from parallel_parnet.kernels.gpu.samples import convolution, without_values

from .device import event_times, in_a_graph, l2_bytes, quantiles
from .eviction import eviction
from .parity import deviation, poison
from .precompile import Target, compile_launch

MOST_SETS = 48  # of inputs, as many as it takes to exceed the L2 cache twice
REPEATS = 20  # replays of a graph that runs every set once
LAUNCHES = 20  # in such a graph, of the one set that lies in the cache
WORTH_TRYING = 2.0  # times the best prediction: what is predicted slower is not timed
STEPS, STAGES = (32, 64, 128), (3, 4, 6)  # of the pipeline of a level's products
TRIALS = 40  # candidates of a level at most; many of them run the same code


class RefusedError(RuntimeError):
    """A configuration may not win; says why."""


@dataclass(frozen=True)
class Level:
    """The convolutions of one level, on n pictures. cold: timed with inputs that no cache holds."""

    shapes: tuple[Geometry, ...]
    n: int
    dtype: torch.dtype
    cold: bool = True

    @property
    def key(self) -> str:
        """Its name in a table."""
        return key(self.shapes, self.n, self.dtype)

    def floor(self, rates: Rates) -> float:
        """Seconds below which it cannot run."""
        return floor(self.shapes, self.n, self.dtype, rates)


@dataclass
class Trial:
    """What became of a level's candidates. best and default: p20, p50, p80 of one launch in microseconds."""

    config: LevelConfig | None = None
    best: dict[str, float] = field(default_factory=dict)
    default: dict[str, float] = field(default_factory=dict)
    timed: int = 0
    refused: list[str] = field(default_factory=list)

    def entry(self, of: Level, rates: Rates) -> dict:
        """As a table keeps it."""
        assert self.config is not None, "no candidate passed"
        return {
            "tiles": [[t.bm, t.bn, t.bk, t.split_k] for t in self.config.tiles],
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
            "us": self.best,
            "default_us": self.default,
            "l2": "cold" if of.cold else "warm",
            "computed_floor_us": round(of.floor(rates) * 1e6, 3),
            "timed": self.timed,
            "refused": self.refused,
        }


def levels_of(program: Program, n: int, dtype: torch.dtype, cache: int = 0) -> list[Level]:
    """The levels of convolutions of a program at its own picture size, each shape once. cache: bytes of L2; networks
    that fit are timed warm."""
    side, cold = program.config.image_size, footprint(program, n, dtype) > cache
    groups = [group for group in program.launch_groups if group[0].kind == "conv"]
    found = [Level(tuple(geometry(program, op, side, side) for op in group), n, dtype, cold) for group in groups]
    return list({level.key: level for level in found}.values())


def footprint(program: Program, n: int, dtype: torch.dtype) -> int:
    """Bytes of all weights and features."""
    side = program.config.image_size
    features = sum(math.prod(program.shape(op.name, n, side, side)) for op in program.operations)
    return (program.parameters + features) * dtype.itemsize


def worth_trying(wanted: Level, table: Table, rates: Rates, most: int = TRIALS) -> list[LevelConfig]:
    """The table's own choice first, then the candidates whose prediction leaves them a chance, one of each kind before
    those that differ in splits alone; `most` at most."""
    ranked = candidates(wanted.shapes, wanted.n, wanted.dtype, rates, STEPS, STAGES)
    limit = WORTH_TRYING * ranked[0].predicted
    own = table.level(wanted.shapes, wanted.n, wanted.dtype)
    found = [c.config for c in ranked if c.predicted <= limit]
    kinds = {(replace(c.tiles[0], split_k=1), c.num_warps, c.num_stages): c for c in reversed(found)}
    return list(islice(dict.fromkeys([own, *sorted(kinds.values(), key=found.index), *found]), most))


def tune(
    configs: Sequence[LevelConfig], compiled: Callable[[LevelConfig], list[str]],
    measured: Callable[[LevelConfig], list[float]], deadline: float,
) -> Trial:  # fmt: skip
    """Time the configurations until the deadline (`time.monotonic`); the first is the default and always timed.

    compiled: waits for a configuration's compiler and gives its complaints. measured: seconds of some launches; raises
    `RefusedError` where the answer is wrong, a RuntimeError or TritonError where the GPU will not have it.
    """
    trial = Trial()
    for config in configs:
        if trial.config is not None and time.monotonic() > deadline:
            break
        try:
            if complaints := compiled(config):
                raise RefusedError("; ".join(complaints))
            spread = quantiles(measured(config))
        except (RuntimeError, TritonError) as error:
            trial.refused.append(f"{describe(config)}: {error}".splitlines()[0])
            continue
        trial.timed += 1
        if config == configs[0]:
            trial.default = spread
        if trial.config is None or spread["p50"] < trial.best["p50"]:
            trial.config, trial.best = config, spread
    return trial


def compile_config(wanted: Level, config: LevelConfig, target: Target) -> None:
    """Compile a configuration in any process; the kernel and its launcher stay in Triton's cache."""
    compile_launch(_offline(wanted, config), target)


def complaints(wanted: Level, config: LevelConfig, target: Target) -> list[str]:
    """What is wrong with a configuration as compiled, as Triton's package's tools tell without a GPU."""
    return resources(compile_launch(_offline(wanted, config), target)).complaints(target.capability)


def load(prepared: Launch) -> None:
    """Onto the GPU. TritonError where it has not as much as the launch takes; `RefusedError` where, by its driver, too
    much is spilled."""
    compiled = prepared.compile()
    compiled._init_handles()
    if (spilled := 4 * compiled.n_spills) > SPILLED:
        raise RefusedError(f"spills {spilled} bytes")


def measure(wanted: Level, config: LevelConfig, device: torch.device) -> list[float]:
    """Seconds of one launch, cold or warm as the level says. `RefusedError` where the answer is not the twin's, or
    where registers are spilled."""
    first = operands(wanted, config.tiles, 0, device)
    prepared = launch_of(first, config)
    if device.type == "cuda":
        load(prepared)
    prove(prepared, first)
    launches = [prepared]
    if wanted.cold:
        sets = sets_beyond(first, l2_bytes(device)) if device.type == "cuda" else 2
        launches += [launch_of(operands(wanted, config.tiles, i, device), config) for i in range(1, sets)]
    elif device.type == "cuda":
        launches *= LAUNCHES
    if device.type == "cpu":
        return event_times(in_a_graph(launches, device), 1)
    evict = eviction(device)
    with_it = event_times(in_a_graph([each for launch in launches for each in (evict, launch)], device), REPEATS)
    alone = median(event_times(in_a_graph([evict] * len(launches), device), REPEATS))
    return [(seconds - alone) / len(launches) for seconds in with_it]


def prove(launch: Callable[[], object], convolutions: Sequence[Convolution]) -> None:
    """Run it once; `RefusedError` where an answer is not the twin's."""
    poison(*convolutions)
    launch()
    if (worst := max(map(deviation, convolutions))) > 1:
        raise RefusedError(f"wrong by {worst:.1f} times what rounding allows")


def sets_beyond(convolutions: Sequence[Convolution], cache: int) -> int:
    """How many sets of such operands it takes to exceed the cache twice, within reason."""
    moved = sum(t.numel() * t.element_size() for conv in convolutions for t in conv.x if t is not None)
    return min(MOST_SETS, max(2, -(-2 * cache // moved)))


def operands(
    wanted: Level, cut: Sequence[Tile] | Sequence[WarpTile], seed: int, device: torch.device | str
) -> list[Convolution]:
    """Random inputs. Their channel sums come in as many tiles as a producer with 64 rows a tile would make."""
    made = []
    for i, (shape, tile) in enumerate(zip(wanted.shapes, cut, strict=True)):
        tiles = -(-shape.h * shape.w // 64)
        made.append(
            convolution(shape, tile, wanted.n, wanted.dtype, 100 * seed + i, input_tiles=(tiles, tiles), device=device)
        )
    return made


def _offline(wanted: Level, config: LevelConfig) -> Launch:
    return launch_of([without_values(conv) for conv in operands(wanted, config.tiles, 0, "cpu")], config)


def launch_of(convolutions: list[Convolution], config: LevelConfig) -> Launch:
    return level(convolutions, config.num_warps, config.num_stages)


def describe(config: LevelConfig) -> str:
    """As in "64x64x64/1 64x64x64/3, 4 warps, 4 stages": each tile and its splits."""
    tiles = " ".join(f"{tile.bm}x{tile.bn}x{tile.bk}/{tile.split_k}" for tile in config.tiles)
    return f"{tiles}, {config.num_warps} warps, {config.num_stages} stages"
