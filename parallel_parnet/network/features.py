"""The features that other networks stand on, by timm's names: what they are, and a network that gives nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import ParNetError
from .variants import Config

if TYPE_CHECKING:
    from .model import ParNet

FUSED = "fused"


class FeatureInfo(list[dict[str, Any]]):
    """What is known of each feature, from the finest: num_chs (channels), reduction (picture pixels per pixel along one
    side) and module (its name as `fold` takes it: "streams.0", ..., and "fused" for what the classifier would read)."""

    @classmethod
    def of(cls, config: Config) -> FeatureInfo:
        """Describe the features of a network."""
        first, second = config.stem_strides
        reductions = [first * second * 2**i for i in range(config.streams + 1)]
        names = [*(f"streams.{i}" for i in range(config.streams)), FUSED]
        return cls(
            {"num_chs": channels, "reduction": reduction, "module": name}
            for channels, reduction, name in zip(config.planes, reductions, names, strict=True)
        )

    def channels(self) -> list[int]:
        """The channels of each feature."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """Picture pixels per pixel of each feature, along one side."""
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        """The names of the features, as `fold` takes them."""
        return [info["module"] for info in self]


class Backbone(nn.Module):
    """Pictures [N, 3, H, W], normalised, to a list of features [N, channels, H / reduction, W / reduction], as timm's.

    An `Engine` of `fold(backbone)` gives the same features in the same order, as a dict by `feature_info`'s modules.

    model: whose weights it shares; for training, one without a classifier (`model.reset_classifier(0)`), which nothing
    would reach. out_indices: which of `model.feature_info`, from the finest, counted from the end where negative; all
    where not given. feature_info: theirs. `fold` takes it as it is.
    Raises ParNetError for indices that are not there, twice there or not in order.
    """

    def __init__(self, model: ParNet, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.body = model
        count = len(model.feature_info)
        wanted = range(count) if out_indices is None else out_indices
        indices = [i + count if i < 0 else i for i in wanted]
        if not indices or indices != sorted({i for i in indices if 0 <= i < count}):
            raise ParNetError(f"out_indices {out_indices}: give some of 0 to {count - 1}, in order, each once")
        self.out_indices = tuple(indices)

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels, reduction and name of each feature that `forward` returns."""
        return FeatureInfo(self.body.feature_info[i] for i in self.out_indices)

    def freeze_unreached(self) -> None:
        """Freeze the parameters of the model that no feature needs, whose gradients DDP would wait for."""
        model, wanted = self.body, self.out_indices
        if model.config.streams not in wanted:  # the fused features need all
            model.requires_grad_(False)
            for part in (*model.inits[: wanted[-1] + 1], *(model.streams[i] for i in wanted)):
                part.requires_grad_(True)

    def forward(self, x_nchw: Tensor) -> list[Tensor]:
        last = self.body.config.streams
        fuses = last in self.out_indices
        found = self.body.forward_streams(x_nchw, range(last) if fuses else self.out_indices)
        if fuses:
            found[last] = self.body.forward_fusion([found[i] for i in range(last)])
        return [found[i] for i in self.out_indices]
