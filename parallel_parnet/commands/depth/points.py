"""The networks of the experiment, in groups that are measured side by side."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from parallel_parnet import Config, Program, create_model, fold
from parallel_parnet.network.variants import variant
from parallel_parnet.program.families import parallel_chains
from parallel_parnet.program.rivals import rival

from ..bench.poster import QUOTED
from ..bench.poster_networks import PEERS
from ..common import S_TO_XL


@dataclass(frozen=True)
class Point:
    """One network at one batch and picture size; `build` makes it. streams: lanes that it can use."""

    group: str
    network: str
    build: Callable[[], Program]
    depth: int
    streams: int
    size: int
    batch: int = 1


def _arranged(group: str, blocks: int, streams: int, width: int, size: int = 32, batch: int = 1) -> Point:
    name, depth = f"{blocks} blocks of {width} in {streams}", blocks // streams + 2
    return Point(group, name, lambda: parallel_chains(blocks, streams, width, size), depth, streams, size, batch)


def _parnet(group: str, name: str, size: int) -> Point:
    return Point(group, name, lambda: fold(create_model(name).eval()), 12, 3, size)


@cache
def one_stream(name: str) -> Config:
    """A network of one stream with a variant's depth, and its FLOPs as nearly as its width allows."""
    wanted = variant(name)

    def config(width: int) -> Config:
        return Config((width, wanted.planes[-1]), blocks=(8,))

    def flops(network: Config) -> int:
        with torch.device("meta"):  # a network without values
            model = create_model(network)
        return fold(model).cost().flops

    goal = flops(wanted)
    width = bisect_left(range(400), goal, lo=64, key=lambda width: flops(config(width)))
    return min(config(width - 1), config(width), key=lambda network: abs(flops(network) - goal))


def _one_stream(group: str, name: str, size: int) -> Point:
    return Point(group, f"{name}, one stream", lambda: fold(create_model(one_stream(name)).eval()), 12, 1, size)


def points(quick: bool) -> dict[str, list[Point]]:
    """Groups by name: (a) depth at fixed work, (b) work at fixed depth, (c) batch and resolution, (d) published."""
    groups: dict[str, list[Point]] = {}

    def add(name: str, *members: Point) -> None:
        groups[name] = list(members)

    arrangements = (1, 2, 4, 12) if quick else (1, 2, 3, 4, 6, 8, 12, 24)
    for width in (16, 64) if quick else (16, 32, 64, 128):
        name = f"depth, width {width}"
        add(name, *(_arranged(name, 48, k, width) for k in arrangements))
    for width in (16,) if quick else (16, 32, 64):
        name = f"work by width, from {width}"
        add(name, *(_arranged(name, 8, 1, round(width * factor**0.5)) for factor in (1, 2, 4, 8, 16)))
        name = f"work by streams, width {width}"
        add(name, *(_arranged(name, 8 * k, k, width) for k in (1, 2, 4, 8, 16)))
    if not quick:
        add("batch", *(_arranged("batch", 24, 3, 32, batch=n) for n in (1, 2, 4, 8, 16)))
        add("resolution", *(_arranged("resolution", 24, 3, 32, size=s) for s in (32, 64, 96, 128, 160)))
    peers = [quoted for quoted in QUOTED if quoted.name in (("resnet34", "resnet50") if quick else PEERS)]
    add(
        "published",
        *(_parnet("published", name, 224) for name in S_TO_XL[: 1 if quick else 4]),
        *(Point("published", peer.name, partial(rival, peer.name), peer.depth, 1, 224) for peer in peers),
    )
    if not quick:
        for size in (224, 256, 320):
            name = f"scaling, {size} pixels"
            add(name, *(make(name, variant, size) for variant in S_TO_XL for make in (_parnet, _one_stream)))
    return groups
