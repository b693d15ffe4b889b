"""The poster's comparison networks as torch modules, in the form that is fastest to run: folded, as `program/rivals.py`
has them, with the same names and so the same weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ConvRelu(nn.Conv2d):
    """Padded by half its kernel, then ReLU."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(cin, cout, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class Residual(nn.Module):
    """Convolutions with ReLU in between, plus the input or its projection, then ReLU."""

    def __init__(self, convolutions: Sequence[nn.Conv2d], projection: nn.Module) -> None:
        super().__init__()
        self.convolutions, self.projection = nn.Sequential(*convolutions), projection

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convolutions(x).add_(self.projection(x)), inplace=True)


def network(first: dict[str, nn.Module], blocks: Sequence[nn.Module], width: int) -> nn.Sequential:
    head = {"average": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(width, 1000)}
    return nn.Sequential(OrderedDict({**first, "blocks": nn.Sequential(*blocks), **head}))


def resnet(counts: tuple[int, ...], bottleneck: bool) -> nn.Sequential:
    """ResNet with so many blocks at each of four resolutions."""
    blocks: list[nn.Module] = []
    cin = 64
    for stage, count in enumerate(counts):
        width = 64 << stage
        cout = 4 * width if bottleneck else width
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            if bottleneck:
                inner = [ConvRelu(cin, width, 1), ConvRelu(width, width, 3, stride), nn.Conv2d(width, cout, 1)]
            else:
                inner = [ConvRelu(cin, width, 3, stride), nn.Conv2d(width, cout, 3, padding=1)]
            blocks.append(Residual(inner, nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride)))
            cin = cout
    return network({"stem": ConvRelu(3, 64, 7, 2), "pool": nn.MaxPool2d(3, 2, 1)}, blocks, cin)


def repvgg(counts: tuple[int, ...], widths: tuple[int, ...], groups: int) -> nn.Sequential:
    """RepVGG as deployed: 3x3 convolutions and ReLU alone."""
    blocks: list[nn.Module] = []
    first = cin = min(64, widths[0])
    for width, count in zip(widths, counts, strict=True):
        for block in range(count):
            grouped = groups if len(blocks) % 2 == 1 else 1
            blocks.append(ConvRelu(cin, width, 3, 2 if block == 0 else 1, grouped))
            cin = width
    return network({"stem": ConvRelu(3, first, 3, 2)}, blocks, cin)


PEERS: dict[str, Callable[[], nn.Sequential]] = {
    "resnet34": lambda: resnet((3, 4, 6, 3), bottleneck=False),
    "resnet50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
    "repvgg_b1g4": lambda: repvgg((4, 6, 16, 1), (128, 256, 512, 2048), 4),
    "repvgg_b2g4": lambda: repvgg((4, 6, 16, 1), (160, 320, 640, 2560), 4),
}
