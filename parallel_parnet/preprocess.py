"""Pictures to tensors, with Pillow: the same resize, crop and normalisation for training, testing and serving."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ParNetError
from .variants import Config

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side to size / crop, cut out the middle size x size, normalise RGB values in 0..1."""

    size: int
    crop: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, config: Config, size: int | None = None) -> Preprocess:
        """What `config`'s network was trained with; `size` pixels instead of its own where given."""
        return cls(size or config.image_size, config.crop, config.mean, config.std)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Any picture to uint8 [size, size, 3], upright as its EXIF orientation says."""
        image = ImageOps.exif_transpose(image).convert("RGB")
        scale = round(self.size / self.crop) / min(image.size)
        target = [max(self.size, round(side * scale)) for side in image.size]
        if target != list(image.size):
            image = image.resize(target, Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in target)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [..., H, W, 3] to fp32 [..., 3, H, W]."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return ((pixels / 255 - mean) / std).movedim(-1, -3).contiguous()

    def raw(self, path: Path | str) -> Tensor:
        """A picture file to uint8 [3, size, size], which the engine normalises; ParNetError where it cannot be read."""
        return torch.from_numpy(self.pixels(read_image(path)).copy()).movedim(-1, -3).contiguous()

    def __call__(self, path: Path | str) -> Tensor:
        """A picture file to fp32 [3, size, size], normalised; ParNetError where it cannot be read."""
        return self.normalise(torch.from_numpy(self.pixels(read_image(path)).copy()))


def read_image(path: Path | str) -> Image.Image:
    """A decoded picture; ParNetError for what is missing, no picture, damaged, or suspiciously large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return image.copy() if image.size != (0, 0) else image
    except FileNotFoundError:
        raise ParNetError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ParNetError(f"{path}: not a picture; give a PNG, JPEG or WebP file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ParNetError(f"{path}: over {Image.MAX_IMAGE_PIXELS} pixels; scale it down first") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's plugins raise all three for damaged files
        raise ParNetError(f"{path}: cannot be decoded ({error})") from None


def find_images(paths: Iterable[Path | str]) -> list[Path]:
    """Files as given, folders as the pictures directly in them, by name; ParNetError where there is none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ParNetError(f"{path}: no such file or folder")
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise ParNetError(f"{path}: no pictures in this folder ({', '.join(SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    return found
