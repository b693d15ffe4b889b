"""ParNet in training form (paper, figure 2): a stem, parallel streams of different resolutions, fusion, a head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import ParNetError
from .blocks import ACTIVATION, Fusion, Pair, ParNetBlock, RepVGGSSE
from .variants import Config, variant


class ParNet(nn.Module):
    """Pictures [N, 3, H, W], normalised, to logits [N, classes]. H and W must be multiples of 32.

    Names of submodules are those of the released code. Stream i reads inits.i, which halves the resolution of
    inits.(i-1); downsamples_2 carry stream 0's features to the last stream's resolution, fusing one stream at a time.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        act, (p, last) = config.activation, (config.planes[:-1], config.planes[-1])
        stem = min(64, p[0])
        first, second = config.stem_strides
        self.inits = nn.ModuleList(
            [nn.Sequential(ParNetBlock(3, stem, first, 1, act), ParNetBlock(stem, p[0], second, 1, act))]
        )
        self.inits.extend(ParNetBlock(p[i - 1], p[i], 2, 1, act) for i in range(1, len(p)))
        self.streams = nn.ModuleList(
            nn.Sequential(*(ParNetBlock(width, width, 1, 1, act) for _ in range(blocks)))
            for width, blocks in zip(p, config.blocks, strict=True)
        )
        self.downsamples_2 = nn.ModuleList()
        if len(p) > 1:
            self.downsamples_2.append(ParNetBlock(p[0], p[1], 2, 1, act))
        for i in range(1, len(p) - 1):
            self.downsamples_2.append(Fusion(Pair(p[i]), ParNetBlock(2 * p[i], p[i + 1], 2, 2, act)))
        final = ParNetBlock(p[-1], last, 2, 1, act)
        if len(p) > 1:
            self.combine: nn.Sequential = Fusion(Pair(p[-1]), ParNetBlock(2 * p[-1], p[-1], 1, 2, act), final)
        else:
            self.combine = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity(), final)
        fc = nn.Linear(last, config.num_classes)
        self.head = nn.ModuleDict({"dropout": nn.Dropout(config.dropout), "fc": fc})

    def forward(self, x_nchw: Tensor) -> Tensor:
        features = []
        for init, stream in zip(self.inits, self.streams, strict=True):
            x_nchw = init(x_nchw)
            features.append(stream(x_nchw))
        if len(features) == 1:
            y = self.combine(features[0])
        else:
            y = self.downsamples_2[0](features[0])
            for stream_features, fusion in zip(features[1:-1], self.downsamples_2[1:], strict=True):
                y = fusion(stream_features, y)
            y = self.combine(features[-1], y)
        return self.head["fc"](self.head["dropout"](torch.mean(y, (2, 3))))


def check_activation(model: ParNet) -> None:
    """ParNetError where a block has another activation than the configuration, by which models are folded and saved."""
    for name, block in model.named_modules():
        if isinstance(block, RepVGGSSE) and block.activation is not ACTIVATION[model.config.activation]:
            raise ParNetError(
                f"{name} has another activation than the model's configuration ({model.config.activation}): "
                "give it to create_model or load_checkpoint"
            )


def create_model(name: str | Config, num_classes: int | None = None, activation: str | None = None) -> ParNet:
    """A ParNet with fresh random weights, in training mode.

    name: a variant such as "parnet_s", or a Config of one's own.
    num_classes, activation ("silu" or "relu"): the variant's own where not given. Labels go with the classes.
    Raises ParNetError for an unknown name or values that make no network.
    """
    config = variant(name) if isinstance(name, str) else name
    if num_classes is not None and num_classes != config.num_classes:
        config = replace(config, num_classes=num_classes, labels=())
    if activation is not None:
        config = replace(config, activation=activation)
    return ParNet(config)
