"""Timing candidates for one level of the network on a GPU, each checked before it may win."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from triton.errors import TritonError

from parallel_parnet import Program
from parallel_parnet.executors.triton_backend import geometry
from parallel_parnet.kernels.gpu.candidates import candidates, floor
from parallel_parnet.kernels.gpu.compiled import resources, stand_in
from parallel_parnet.kernels.gpu.config import LevelConfig, Table, key
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile
from parallel_parnet.kernels.gpu.launch import Launch
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.rates import Rates
from parallel_parnet.kernels.gpu.samples import convolution, without_values

from .device import capture, event_times, quantiles
from .parity import deviation, poison

MOST_SETS = 48  # of inputs, as many as it takes to exceed the L2 cache twice
REPEATS = 20  # replays of a graph that runs every set once
WORTH_TRYING = 1.5  # times the best prediction: what is predicted slower is not timed


class RefusedError(Exception):
    """A configuration may not win; says why."""


@dataclass(frozen=True)
class Level:
    """The convolutions of one level, on n pictures."""

    shapes: tuple[Geometry, ...]
    n: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """Its name in a table."""
        return key(self.shapes, self.n, self.dtype)


@dataclass
class Trial:
    """What became of a level's candidates. best and default: p20, p50, p80 of one launch in microseconds."""

    config: LevelConfig | None = None
    best: dict[str, float] = field(default_factory=dict)
    default: dict[str, float] = field(default_factory=dict)
    timed: int = 0
    refused: list[str] = field(default_factory=list)

    def entry(self, floor_seconds: float) -> dict:
        """As a table keeps it."""
        assert self.config is not None, "no candidate passed"
        return {
            "tiles": [[t.bm, t.bn, t.bk, t.split_k] for t in self.config.tiles],
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
            "us": self.best,
            "default_us": self.default,
            "computed_floor_us": round(floor_seconds * 1e6, 3),
            "timed": self.timed,
            "refused": self.refused,
        }


def levels_of(program: Program, n: int, dtype: torch.dtype) -> list[Level]:
    """The levels of convolutions of a program at its own picture size, each shape once."""
    side = program.config.image_size
    groups = [group for group in program.groups if group[0].kind == "conv"]
    found = [Level(tuple(geometry(program, op, side, side) for op in group), n, dtype) for group in groups]
    return list({level.key: level for level in found}.values())


def worth_trying(wanted: Level, table: Table, rates: Rates) -> list[LevelConfig]:
    """The table's own choice first, then the candidates whose prediction leaves them a chance."""
    ranked = candidates(wanted.shapes, wanted.n, wanted.dtype, rates)
    limit = WORTH_TRYING * ranked[0].predicted
    own = table.level(wanted.shapes, wanted.n, wanted.dtype)
    return list(dict.fromkeys([own, *(c.config for c in ranked if c.predicted <= limit)]))


def tune(
    configs: Sequence[LevelConfig],
    compiled: Callable[[LevelConfig], list[str]],
    measured: Callable[[LevelConfig], list[float]],
    deadline: float,
    progress: Callable[[], object],
) -> Trial:
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
        except (RefusedError, RuntimeError, TritonError) as error:
            trial.refused.append(f"{describe(config)}: {error}".splitlines()[0])
            continue
        finally:
            progress()
        trial.timed += 1
        if config == configs[0]:
            trial.default = spread
        if trial.config is None or spread["p50"] < trial.best["p50"]:
            trial.config, trial.best = config, spread
    return trial


def complaints(wanted: Level, config: LevelConfig, capability: tuple[int, int]) -> list[str]:
    """What is wrong with a configuration as compiled, in any process; the kernel stays in Triton's cache."""
    offline = [without_values(conv) for conv in operands(wanted, config, 0, "cpu")]
    with stand_in(capability):
        return resources(launch_of(offline, config).compile()).complaints(capability)


def measure(wanted: Level, config: LevelConfig) -> list[float]:
    """Seconds of one launch, over inputs that no cache holds. `RefusedError` where the answer is not the twin's."""
    device = torch.device("cuda", torch.cuda.current_device())
    first = operands(wanted, config, 0, device)
    prepared = launch_of(first, config)
    for conv in first:
        poison(conv)
    prepared()
    if (worst := max(map(deviation, first))) > 1:
        raise RefusedError(f"wrong by {worst:.1f} times what rounding allows")
    moved = sum(t.numel() * t.element_size() for conv in first for t in conv.x if t is not None)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    sets = min(MOST_SETS, max(2, -(-2 * cache // moved)))
    launches = [prepared, *(launch_of(operands(wanted, config, i, device), config) for i in range(1, sets))]
    _, replay = capture(lambda: [launch() for launch in launches], torch.device(device))
    return [seconds / sets for seconds in event_times(replay, REPEATS)]


def operands(wanted: Level, config: LevelConfig, seed: int, device: torch.device | str) -> list[Convolution]:
    """Random inputs. Their channel sums come in as many tiles as a producer with 64 rows a tile would make."""
    made = []
    for i, (shape, tile) in enumerate(zip(wanted.shapes, config.tiles, strict=True)):
        tiles = -(-shape.h * shape.w // 64)
        made.append(
            convolution(shape, tile, wanted.n, wanted.dtype, 100 * seed + i, input_tiles=(tiles, tiles), device=device)
        )
    return made


def launch_of(convolutions: list[Convolution], config: LevelConfig) -> Launch:
    return level(convolutions, config.num_warps, config.num_stages)


def describe(config: LevelConfig) -> str:
    """As in "64x64x64/1 64x64x64/3, 4 warps, 4 stages": each tile and its splits."""
    return f"{' '.join(map(_tile, config.tiles))}, {config.num_warps} warps, {config.num_stages} stages"


def predicted_floor(wanted: Level, rates: Rates) -> float:
    """Seconds below which the level cannot run."""
    return floor(wanted.shapes, wanted.n, wanted.dtype, rates)


def _tile(tile: Tile) -> str:
    return f"{tile.bm}x{tile.bn}x{tile.bk}/{tile.split_k}"
