"""Networks for experiments: the same block in any number of streams of any length, so that depth and work part.

Not ParNet: every stream works at one width and resolution, which ParNet's do not, so that moving a block from one
stream to another changes nothing but the depth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ParNetError
from ..network.variants import Config
from ..settings import with_own_settings
from .program import INPUT, Operation, Program


@with_own_settings
def parallel_chains(blocks: int, streams: int, width: int, size: int) -> Program:
    """Make a program of `blocks` RepVGG-SSE blocks, `width` channels at size / 2 pixels, in `streams` equal chains.

    Each chain reads one stem block; the classifier reads the averages of all chains. Depth is blocks / streams + 2;
    FLOPs and parameters hardly depend on the arrangement (the classifier has 10 classes). Random weights, scaled so
    that features neither vanish nor grow. Raises ParNetError where the blocks do not divide among the streams.
    """
    if blocks < 1 or streams < 1 or width < 1 or blocks % streams:
        raise ParNetError(f"{blocks} blocks in {streams} streams: the streams must divide the blocks")
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    stem = Operation("stem", "conv", "stem", None, 1, (INPUT,), 3, width, stride=2, gate="plain", activation="silu")
    operations, ends = [stem], []
    for stream in range(streams):
        previous = stem.name
        for block in range(blocks // streams):
            name = f"streams.{stream}.{block}"
            operations.append(
                Operation(
                    name, "conv", "stream", stream, block + 2, (previous,), width, width,
                    gate="identity", activation="silu",
                )
            )  # fmt: skip
            previous = name
        ends.append(previous)
    operations.sort(key=lambda op: op.level)
    level = blocks // streams + 2
    head = Operation("head.fc", "classifier", "head", None, level, tuple(ends), streams * width, 10)
    weights: dict[str, Tensor] = {}
    for op in operations:
        weights[f"{op.name}.weight"] = noise(op.cout, op.cin, 3, 3) / (9 * op.cin) ** 0.5
        bias = weights[f"{op.name}.bias"] = 0.1 * noise(op.cout)
        weights[f"{op.name}.gate_weight"] = noise(op.cout, op.cin) / op.cin**0.5
        weights[f"{op.name}.gate_bias"] = torch.zeros_like(bias)
        if op.gate == "identity":
            weights[f"{op.name}.scale"] = torch.ones_like(bias)
            weights[f"{op.name}.shift"] = torch.zeros_like(bias)
    weights["head.fc.weight"] = noise(10, streams * width) / (streams * width) ** 0.5
    weights["head.fc.bias"] = torch.zeros(10, dtype=torch.float32, device="cpu")
    config = Config((width, width), blocks=(blocks,), num_classes=10, image_size=size, crop=1.0)
    return Program(config, (*operations, head), weights)
