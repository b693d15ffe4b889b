"""The poster's comparison networks in the form that is fastest to run: batch norms folded, RepVGG re-parameterised.

Own definitions from the papers, with random weights, for timing: "Deep Residual Learning for Image Recognition"
(arXiv 1512.03385, table 1; stride in the 3x3 convolution of a bottleneck, as all current libraries have it) and
"RepVGG" (arXiv 2101.03697, tables 2 and 3: B1g4 and B2g4 group every second 3x3 layer by four).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups)


class Residual(nn.Module):
    """Convolutions with ReLU in between, plus the input or its projection, then ReLU."""

    def __init__(self, convolutions: list[nn.Conv2d], projection: nn.Module) -> None:
        super().__init__()
        self.convolutions, self.projection = nn.ModuleList(convolutions), projection

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, layer in enumerate(self.convolutions):
            y = layer(y) if i == 0 else layer(F.relu(y, inplace=True))
        return F.relu(y.add_(self.projection(x)), inplace=True)


def classifier(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]


def resnet(counts: tuple[int, ...], bottleneck: bool) -> nn.Sequential:
    """ResNet with so many blocks at each of four resolutions."""
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    cin = 64
    for stage, count in enumerate(counts):
        width = 64 << stage
        cout = 4 * width if bottleneck else width
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            if bottleneck:
                inner = [conv(cin, width, 1), conv(width, width, 3, stride), conv(width, cout, 1)]
            else:
                inner = [conv(cin, width, 3, stride), conv(width, cout, 3)]
            layers.append(Residual(inner, nn.Identity() if cin == cout else conv(cin, cout, 1, stride)))
            cin = cout
    return nn.Sequential(*layers, *classifier(cin))


def repvgg(widths: tuple[int, ...], groups: int) -> nn.Sequential:
    """RepVGG-B as deployed: 3x3 convolutions and ReLU alone, 1 + 4 + 6 + 16 + 1 of them."""
    layers: list[nn.Module] = [conv(3, 64, 3, 2), nn.ReLU(inplace=True)]
    cin, index = 64, 1
    for width, count in zip(widths, (4, 6, 16, 1), strict=True):
        for block in range(count):
            grouped = groups if index % 2 == 0 else 1
            layers += [conv(cin, width, 3, 2 if block == 0 else 1, grouped), nn.ReLU(inplace=True)]
            cin, index = width, index + 1
    return nn.Sequential(*layers, *classifier(cin))


# name: constructor, depth (convolutions and classifier on the longest path)
PEERS: dict[str, tuple[Callable[[], nn.Sequential], int]] = {
    "resnet34": (lambda: resnet((3, 4, 6, 3), bottleneck=False), 34),
    "resnet50": (lambda: resnet((3, 4, 6, 3), bottleneck=True), 50),
    "repvgg_b1g4": (lambda: repvgg((128, 256, 512, 2048), 4), 28),
    "repvgg_b2g4": (lambda: repvgg((160, 320, 640, 2560), 4), 28),
}
