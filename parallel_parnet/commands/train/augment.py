"""How pictures are varied: each alone while it is decoded, and then a batch at a time."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from parallel_parnet.preprocess import Preprocess, to_rgb

from .rand_augment import rand_augment
from .recipe import Recipe

TRIES = 10
LONGER = 4 / 3  # side of what is cut out, by the other at most
ERASED = (0.02, 1 / 3)  # shares of the area
NARROW = 0.3  # width by height of what is erased, at least


def decoded(image: Image.Image, recipe: Recipe, preprocess: Preprocess, random: Random) -> np.ndarray:
    """A picture as it is trained on, uint8 [size, size, 3]. random: decides all, whichever thread asks."""
    if recipe.crop_scale is None:
        pixels = preprocess.pixels(image)
    else:
        image, size = to_rgb(image), (preprocess.size,) * 2
        how = random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
        pixels = np.asarray(image.resize(size, how, _box(image.size, recipe.crop_scale, random)))
    if recipe.rand_augment is None:
        return pixels
    fill = tuple(round(255 * value) for value in preprocess.mean)
    return np.asarray(rand_augment(Image.fromarray(pixels), recipe.rand_augment, random, fill))


def _box(size: tuple[int, int], scale: tuple[float, float], random: Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a rectangle of any place and nearly any form; the middle where none fits."""
    w, h = size
    for _ in range(TRIES):
        area = w * h * random.uniform(*scale)
        form = math.exp(random.uniform(-math.log(LONGER), math.log(LONGER)))
        width, height = round(math.sqrt(area * form)), round(math.sqrt(area / form))
        if 0 < width <= w and 0 < height <= h:
            left, top = random.randint(0, w - width), random.randint(0, h - height)
            return left, top, left + width, top + height
    width, height = min(w, max(1, round(h * LONGER))), min(h, max(1, round(w * LONGER)))
    left, top = (w - width) // 2, (h - height) // 2
    return left, top, left + width, top + height


def mirrored_and_moved(pixels: Tensor, mirror: bool, shift: int) -> Tensor:
    """uint8 [N, H, W, 3], each picture mirrored or not, and moved by up to `shift` pixels over a black border."""
    n, h, w, _ = pixels.shape
    padded = F.pad(pixels, (0, 0, *(shift,) * 4))
    if mirror:
        padded = torch.where(torch.rand(n, 1, 1).unsqueeze(-1) < 0.5, padded.flip(2), padded)
    if not shift:
        return padded
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1, 1))
    rows, columns = torch.arange(h).view(1, h, 1) + dy, torch.arange(w).view(1, 1, w) + dx
    return padded[torch.arange(n).view(n, 1, 1), rows, columns]


def erased(x_nchw: Tensor, probability: float) -> Tensor:
    """Normalised pictures, of some a rectangle filled with noise (Zhong et al., arXiv 1708.04896; timm's "pixel")."""
    n, channels, h, w = x_nchw.shape
    for i in (torch.rand(n) < probability).nonzero().flatten().tolist():
        for _ in range(TRIES):
            share, form, y, x = torch.rand(4).tolist()
            area = h * w * (ERASED[0] + (ERASED[1] - ERASED[0]) * share)
            ratio = NARROW ** (2 * form - 1)
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < height < h and 0 < width < w:
                top, left = int(y * (h - height + 1)), int(x * (w - width + 1))
                noise = torch.randn(channels, height, width)
                x_nchw[i, :, top : top + height, left : left + width] = noise
                break
    return x_nchw
