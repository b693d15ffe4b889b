"""The sizes of ParNet that have a name: numbers only.

Widths of S, M, L and XL: "Non-deep Networks" (arXiv 2110.07641) and its released code, folder imagenet. The paper
gives the CIFAR networks only by depth (12) and parameters (1.3 M, 15.5 M, 35 M); their widths here are derived:
streams in the ratio 1 : 2 : 4, and a last width that brings the fused parameters within 0.3% of those figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import ParNetError

ACTIVATIONS = ("silu", "relu")
LEAST_STD = 1e-6
LARGEST_NUMBER = 3e38  # of float32, in which pictures are computed
MAX_STREAMS = 4
MOST = 1 << 20  # of anything that is counted: more is a damaged file, which would only fill the memory

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FASHION_MEAN, FASHION_STD = (0.286,) * 3, (0.353,) * 3
FASHION_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


@dataclass(frozen=True)
class Config:
    """Everything that fixes a network and the pictures it takes.

    planes: the width of each stream, then that of the last convolution; for 1 to MAX_STREAMS streams.
    blocks: blocks at stride 1 in each stream.
    stem_strides: strides of the two stem blocks; (2, 2) for photographs, (1, 1) for 32 x 32 pictures.
    image_size, crop, mean, std: the picture's shorter side is resized to image_size / crop, the middle square is cut
        out, and RGB values in 0..1 are normalised.
    num_classes: 0 where there is no classifier. labels: a name per class, or none.
    """

    planes: tuple[int, ...]
    blocks: tuple[int, ...] = (4, 5, 5)
    num_classes: int = 1000
    activation: str = "silu"
    stem_strides: tuple[int, int] = (2, 2)
    dropout: float = 0.0
    image_size: int = 224
    crop: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("planes", "blocks", "stem_strides", "mean", "std", "labels"):
            if not isinstance(getattr(self, name), tuple):
                raise ParNetError(f"{name} {getattr(self, name)!r}: give a tuple")
        streams = len(self.planes) - 1
        if not 1 <= streams <= MAX_STREAMS:
            raise ParNetError(
                f"planes {self.planes}: give 2 to {MAX_STREAMS + 1} widths (1 to {MAX_STREAMS} streams, then the last "
                "convolution)"
            )
        if len(self.blocks) != streams:
            raise ParNetError(f"blocks {self.blocks}: give one count for each of the {streams} streams")
        none = type(self.num_classes) is int and self.num_classes == 0
        counts = (*self.planes, *self.blocks, 1 if none else self.num_classes, self.image_size)
        if not all(type(count) is int and 1 <= count <= MOST for count in counts):
            raise ParNetError(f"widths, block counts, classes and pixels must be positive, to {MOST}: {self}")
        if bad := [p for p in self.planes[1:streams] if p % 4]:
            raise ParNetError(f"width {bad[0]}: streams that take part in fusion need a width divisible by 4")
        if self.activation not in ACTIVATIONS:
            raise ParNetError(f"activation {self.activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if any(type(s) is not int or s not in (1, 2) for s in self.stem_strides) or len(self.stem_strides) != 2:
            raise ParNetError(f"stem_strides {self.stem_strides}: two strides, each 1 or 2")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1 and _is_number(self.crop) and 0 < self.crop <= 1):
            raise ParNetError(
                f"dropout {self.dropout!r}, crop {self.crop!r}: give dropout in 0..1 and crop in 0..1, not 0"
            )
        for name, colours in (("mean", self.mean), ("std", self.std)):
            if len(colours) != 3 or not all(map(_is_number, colours)):
                raise ParNetError(f"{name} {colours}: give a number for each of red, green and blue")
        if min(self.std) < LEAST_STD:
            raise ParNetError(f"std {self.std}: pictures are divided by it, so it must be {LEAST_STD} at least")
        if self.labels and len(self.labels) != self.num_classes:
            raise ParNetError(f"{len(self.labels)} labels for {self.num_classes} classes: give one per class, or none")
        if not all(isinstance(label, str) for label in self.labels):
            raise ParNetError(f"labels {self.labels[:3]}...: give names")

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Config:
        """Make a Config of fields as JSON has them, lists for tuples. ParNetError for values that make no network."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)

    @property
    def streams(self) -> int:
        """The number of parallel streams."""
        return len(self.planes) - 1

    @property
    def size_multiple(self) -> int:
        """Picture heights and widths must be multiples of this: 32, or 64 where four streams need it."""
        return max(32, math.prod(self.stem_strides) * 2**self.streams)


def _cifar(*planes: int) -> Config:
    return Config(planes, num_classes=10, stem_strides=(1, 1), image_size=32, crop=1.0, mean=CIFAR_MEAN, std=CIFAR_STD)


VARIANTS: dict[str, Config] = {
    "parnet_s": Config((92, 192, 384, 1280)),
    "parnet_m": Config((128, 256, 512, 2048)),
    "parnet_l": Config((160, 320, 640, 2560), dropout=0.1),
    "parnet_xl": Config((200, 400, 800, 3200), dropout=0.1),
    "parnet_cifar_1m": _cifar(24, 48, 96, 496),
    "parnet_cifar_15m": _cifar(88, 176, 352, 1296),
    "parnet_cifar_35m": _cifar(132, 264, 528, 1984),
    "parnet_fashion": Config(
        (16, 32, 64, 96),
        num_classes=10,
        stem_strides=(2, 1),
        image_size=32,
        crop=1.0,
        mean=FASHION_MEAN,
        std=FASHION_STD,
        labels=FASHION_LABELS,
    ),
}


def list_models() -> list[str]:
    """List the names of the models that `create_model` knows, as timm's does."""
    return list(VARIANTS)


def variant(name: str) -> Config:
    """Return the configuration called `name`. ParNetError, with the known names, for another one."""
    if name not in VARIANTS:
        raise ParNetError(f"unknown model {name!r}: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]
