"""The networks that ParNet is compared with, as programs: folded, so that each block is as few convolutions as can be.

Own definitions from the papers, with random weights: "Deep Residual Learning for Image Recognition" (arXiv 1512.03385,
table 1; the stride of a bottleneck in its 3x3 convolution, as all current libraries have it) and "RepVGG" (arXiv
2101.03697, tables 2 and 3; the branches of a block are one 3x3 convolution, and of the networks with g4 in their name
every second one has four groups). Latency does not depend on the weights, and any will do to compare answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import ParNetError
from ..network.variants import Config
from ..settings import with_own_settings
from .program import INPUT, Operation, Program


class _Builder:
    """Operations in their order and weights, random, such that features neither vanish nor grow."""

    def __init__(self, seed: int) -> None:
        self.operations: list[Operation] = []
        self.weights: dict[str, Tensor] = {}
        self._levels = {INPUT: 0}
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def conv(
        self, name: str, x: str, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1,
        residual: str | None = None, relu: bool = True, gain: float = 1.0,
    ) -> str:  # fmt: skip
        """gain: of the weights, 1 where an even share of the values that ReLU leaves should be as large as before."""
        stage, stream = ("stem", None) if x == INPUT else ("stream", 0)  # all that follows the stem is one stream
        inputs = (x,) if residual is None else (x, residual)
        op = Operation(
            name, "conv", stage, stream, self._level(name, *inputs), inputs, cin, cout, stride, groups,
            activation="relu" if relu else "none", kernel=kernel, residual=residual is not None,
        )  # fmt: skip
        fan = cin // groups * kernel**2
        return self._add(op, gain * (2 / fan) ** 0.5 * self._noise(cout, cin // groups, kernel, kernel))

    def pool(self, name: str, x: str, width: int) -> str:
        self.operations.append(Operation(name, "maxpool", "stem", None, self._level(name, x), (x,), width, width, 2))
        return name

    def program(self, x: str, width: int, blocks: int, classes: int, size: int) -> Program:
        """Put a classifier behind the feature x, and return what was built."""
        op = Operation("fc", "classifier", "head", None, self._level("fc", x), (x,), width, classes)
        self._add(op, self._noise(classes, width) / width**0.5)
        config = Config((width, width), (blocks,), classes, activation="relu", image_size=size)
        return Program(config, tuple(sorted(self.operations, key=lambda op: op.level)), self.weights)

    def _level(self, name: str, *inputs: str) -> int:
        self._levels[name] = 1 + max(self._levels[x] for x in inputs)
        return self._levels[name]

    def _add(self, op: Operation, weight: Tensor) -> str:
        self.operations.append(op)
        self.weights |= {f"{op.name}.weight": weight, f"{op.name}.bias": 0.1 * self._noise(op.cout)}
        return op.name

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")


@with_own_settings
def resnet(
    counts: Sequence[int], bottleneck: bool, width: int = 64, classes: int = 1000, size: int = 224, seed: int = 0
) -> Program:
    """Make a ResNet of so many blocks at each resolution, first of `width` channels, 4 times as many with bottlenecks.

    A block's projection stands on the level of its first convolution. Levels are the paper's depth, and one for the
    maximum.
    """
    b, blocks = _Builder(seed), sum(counts)
    x, cin = b.pool("pool", b.conv("stem", INPUT, 3, width, 7, 2), width), width
    for stage, count in enumerate(counts):
        inner = width << stage
        cout = 4 * inner if bottleneck else inner
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        for block in range(count):
            name = f"blocks.{sum(counts[:stage]) + block}"
            stride = 2 if stage > 0 and block == 0 else 1
            residual = x
            if cin != cout:
                residual = b.conv(f"{name}.projection", x, cin, cout, 1, stride, relu=False, gain=0.7)
            for i, kernel in enumerate(kernels):
                last = i == len(kernels) - 1
                width_in, width_out = cin if i == 0 else inner, cout if last else inner
                x = b.conv(
                    f"{name}.convolutions.{i}", x, width_in, width_out, kernel, stride if i == kernels.index(3) else 1,
                    residual=residual if last else None, gain=(2 * blocks) ** -0.5 if last else 1.0,
                )  # fmt: skip
            cin = cout
    return b.program(x, cin, blocks, classes, size)


@with_own_settings
def repvgg(counts: Sequence[int], widths: Sequence[int], groups: int, classes: int = 1000, seed: int = 0) -> Program:
    """Make a RepVGG as deployed, of so many convolutions at each of four resolutions behind the first one."""
    b, index = _Builder(seed), 0
    cin = min(64, widths[0])
    x = b.conv("stem", INPUT, 3, cin, 3, 2)
    for count, cout in zip(counts, widths, strict=True):
        for block in range(count):
            grouped = groups if index % 2 == 1 else 1
            x = b.conv(f"blocks.{index}", x, cin, cout, 3, 2 if block == 0 else 1, grouped)
            cin, index = cout, index + 1
    return b.program(x, cin, index, classes, 224)


RIVALS: dict[str, Callable[..., Program]] = {
    "resnet34": partial(resnet, (3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(resnet, (3, 4, 6, 3), bottleneck=True),
    "repvgg_a0": partial(repvgg, (2, 4, 14, 1), (48, 96, 192, 1280), groups=1),
    "repvgg_b1g4": partial(repvgg, (4, 6, 16, 1), (128, 256, 512, 2048), groups=4),
    "repvgg_b2g4": partial(repvgg, (4, 6, 16, 1), (160, 320, 640, 2560), groups=4),
}


def rival(name: str, seed: int = 0) -> Program:
    """Make the network called `name`, with random weights; ParNetError with the known names otherwise."""
    if name not in RIVALS:
        raise ParNetError(f"unknown network {name!r}: choose one of {', '.join(RIVALS)}")
    return RIVALS[name](seed=seed)
