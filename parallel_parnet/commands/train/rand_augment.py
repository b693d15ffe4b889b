"""RandAugment as timm's "rand-m9-mstd0.5" means it: of fifteen changes two, each done to every other picture.

Cubuk et al., "RandAugment" (arXiv 1909.13719), with timm's strengths, in which the released recipe counts. Kornia's was
tried: it does the same to all pictures of a batch, and counts magnitudes otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from PIL import Image, ImageEnhance, ImageOps

from .recipe import RandAugment

LAYERS, PROBABILITY, MOST = 2, 0.5, 10.0
DEGREES, SLANT, MOVED = 30.0, 0.3, 0.45  # at the largest magnitude; the last is a share of the picture's side
RESAMPLINGS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
Colour = tuple[int, int, int]
Change = Callable[[Image.Image, float, Random, Colour], Image.Image]


def rand_augment(image: Image.Image, setting: RandAugment, random: Random, fill: Colour) -> Image.Image:
    """An RGB picture, changed. random: decides all. fill: what comes in from outside."""
    for change in random.choices(CHANGES, k=LAYERS):
        if random.random() < PROBABILITY:
            level = min(MOST, max(0.0, random.gauss(setting.magnitude, setting.std))) / MOST
            image = change(image, level, random, fill)
    return image


def _signed(value: float, random: Random) -> float:
    return -value if random.random() < 0.5 else value


def _rotated(image: Image.Image, level: float, random: Random, fill: Colour) -> Image.Image:
    return image.rotate(_signed(DEGREES * level, random), random.choice(RESAMPLINGS), fillcolor=fill)


def _moved(a: float, b: float, c: float, d: float) -> Change:
    """Slanted or shifted: x + a level y + b level width, and y likewise, by either sign."""

    def change(image: Image.Image, level: float, random: Random, fill: Colour) -> Image.Image:
        by = _signed(level, random)
        (width, height), how = image.size, random.choice(RESAMPLINGS)
        matrix = (1, a * by, b * by * width, c * by, 1, d * by * height)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=fill)

    return change


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Change:
    return lambda image, level, random, fill: kind(image).enhance(0.1 + 1.8 * level)


def _brighter_where_dark(image: Image.Image, level: float, random: Random, fill: Colour) -> Image.Image:
    add = int(110 * level)
    return image.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)


CHANGES: tuple[Change, ...] = (
    lambda image, level, random, fill: ImageOps.autocontrast(image),
    lambda image, level, random, fill: ImageOps.equalize(image),
    lambda image, level, random, fill: ImageOps.invert(image),
    lambda image, level, random, fill: ImageOps.posterize(image, max(1, int(4 * level))),
    lambda image, level, random, fill: ImageOps.solarize(image, int(256 * level)),
    _brighter_where_dark,
    _rotated,
    _enhanced(ImageEnhance.Color),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Sharpness),
    _moved(SLANT, 0, 0, 0),
    _moved(0, 0, SLANT, 0),
    _moved(0, MOVED, 0, 0),
    _moved(0, 0, 0, MOVED),
)
