"""ParNet in training form (paper, figure 2): a stem, parallel streams of different resolutions, fusion, a head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..errors import ParNetError
from .blocks import ACTIVATION_FUNCTIONS, Fusion, Pair, ParNetBlock, RepVGGSSE
from .features import Backbone, FeatureInfo
from .parts import check_parts
from .variants import Config, variant


class ParNet(nn.Module):
    """Pictures [N, 3, H, W], normalised, to logits [N, classes], or without classes to averages [N, num_features].

    H and W must be multiples of `config.size_multiple`.

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
        self.head = nn.ModuleDict({"dropout": nn.Dropout(config.dropout), "fc": _classifier(config)})

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels and reduction of each stream's features and of the fused ones."""
        return FeatureInfo.of(self.config)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 where there is no classifier."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """The channels of the fused features, which the classifier reads."""
        return self.config.planes[-1]

    def get_classifier(self) -> nn.Module:
        """Return the classifier: a linear layer, or an identity where there is none."""
        return self.head["fc"]

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier in place of the old one, without labels; none for 0 classes."""
        like = next(self.parameters())
        self.config = replace(self.config, num_classes=num_classes, labels=())
        self.head["fc"] = _classifier(self.config).to(like.device, like.dtype)

    def forward_streams(self, x_nchw: Tensor, wanted: Collection[int] | None = None) -> dict[int, Tensor]:
        """Compute the streams' features, all or those wanted, by number: [N, planes[i], H, W], see `feature_info`."""
        found = {}
        for i, (init, stream) in enumerate(zip(self.inits, self.streams, strict=True)):
            x_nchw = init(x_nchw)
            if wanted is None or i in wanted:
                found[i] = stream(x_nchw)
        return found

    def forward_fusion(self, features: Sequence[Tensor]) -> Tensor:
        """Fuse all streams' features, from the finest, to [N, num_features, H, W]."""
        if len(features) == 1:
            return self.combine(features[0])
        y = self.downsamples_2[0](features[0])
        for stream_features, fusion in zip(features[1:-1], self.downsamples_2[1:], strict=True):
            y = fusion(stream_features, y)
        return self.combine(features[-1], y)

    def forward_features(self, x_nchw: Tensor) -> Tensor:
        """Compute the fused features [N, num_features, H, W] of pictures [N, 3, H, W], normalised."""
        return self.forward_fusion(list(self.forward_streams(x_nchw).values()))

    def forward_head(self, features_nchw: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits [N, classes] of fused features [N, num_features, H, W]; their averages [N, num_features] where
        there is no classifier, or with `pre_logits`."""
        averages = self.head["dropout"](torch.mean(features_nchw, (2, 3)))
        return averages if pre_logits else self.head["fc"](averages)

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_nchw))


def _classifier(config: Config) -> nn.Module:
    return nn.Linear(config.planes[-1], config.num_classes) if config.num_classes else nn.Identity()


def kind_of(model: object) -> str:
    """Say what takes the place of a ParNet, and, of what DDP, torch.compile and their like wrap around one, where that
    keeps it."""
    inside = [name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), nn.Module)]
    return f"{type(model).__name__}: give its .{inside[0]}" if inside else type(model).__name__


def check_model(model: ParNet) -> None:
    """Raise ParNetError where a block has another activation than the configuration, by which models are folded and
    saved, or where any part was replaced by another."""
    with torch.device("meta"):
        check_parts(model, ParNet(model.config))
    for name, block in model.named_modules():
        if isinstance(block, RepVGGSSE) and block.activation is not ACTIVATION_FUNCTIONS[model.config.activation]:
            raise ParNetError(
                f"{name} has another activation than the model's configuration ({model.config.activation}): "
                "give it to create_model or load_checkpoint"
            )


@overload
def create_model(name: str | Config, num_classes: int | None = ..., activation: str | None = ...) -> ParNet: ...
@overload
def create_model(
    name: str | Config,
    *,
    activation: str | None = ...,
    features_only: Literal[True],
    out_indices: Sequence[int] | None = ...,
) -> Backbone: ...
def create_model(
    name: str | Config,
    num_classes: int | None = None,
    activation: str | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
) -> ParNet | Backbone:
    """Make a ParNet with fresh random weights, in training mode; or, with features_only, a `Backbone`.

    name: a variant such as "parnet_s", or a Config of one's own.
    num_classes, activation ("silu" or "relu"): the variant's own where not given. Labels go with the classes; 0 classes
    leave the classifier out, as features_only does.
    out_indices: which features, see `Backbone`. What none of them needs is frozen (requires_grad).
    Raises ParNetError for an unknown name or values that make no network.
    """
    config = variant(name) if isinstance(name, str) else name
    if out_indices is not None and not features_only:
        raise ParNetError("out_indices chooses among features: give features_only=True as well")
    if features_only:
        num_classes = 0
    if num_classes is not None and num_classes != config.num_classes:
        config = replace(config, num_classes=num_classes, labels=())
    if activation is not None:
        config = replace(config, activation=activation)
    model = ParNet(config)
    if not features_only:
        return model
    backbone = Backbone(model, out_indices)
    backbone.freeze_unreached()
    return backbone
