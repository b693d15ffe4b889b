"""Pictures to tensors, with Pillow: the same resize, crop and normalisation for training, testing and serving."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ParNetError
from .network.variants import Config
from .settings import with_own_settings

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
BACKGROUND = (0, 0, 0)  # of what is transparent: what such pixels mostly hold, and networks were trained on
LEVELS = {"L;2": 85, "L;4": 17}  # of grey in a PNG, by Pillow's names: 255 over the largest value
BITS, PHOTOMETRIC, ZERO_IS_WHITE = 258, 262, 0  # two of TIFF's tags, and what the second may say
LONGEST = 32  # times `size`, of a picture that is resized before the middle is cut out
STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # of modes whose colours were multiplied by their alpha


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side to size / crop, cut out the middle size x size, normalise RGB values in 0..1."""

    size: int
    crop: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, config: Config, size: int | None = None) -> Preprocess:
        """Make what `config`'s network was trained with, with `size` pixels instead of its own where given. ParNetError
        for a size below 1, and for a model, whose `config` it is."""
        if not isinstance(config, Config):
            raise ParNetError(
                f"Preprocess.of takes a Config, such as model.config, and this is a {type(config).__name__}"
            )
        if size is not None and size < 1:
            raise ParNetError(f"pictures of {size} pixels a side: give a positive number")
        return cls(size or config.image_size, config.crop, config.mean, config.std)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resize and cut any picture to uint8 [size, size, 3], its colours as `to_rgb` makes them."""
        cut, right, bottom = self._resized(to_rgb(image))
        return cut(right // 2, bottom // 2)

    def ten_crop(self, image: Image.Image) -> np.ndarray:
        """Cut any picture to uint8 [10, size, size, 3]: middle and corners of the resized one, then the same mirrored.

        Released evaluation code: imagenet/timm/data/transforms_factory.py, ImgNetTenCrop.
        """
        cut, right, bottom = self._resized(to_rgb(image))
        places = (right // 2, bottom // 2), (0, 0), (right, 0), (0, bottom), (right, bottom)
        five = np.stack([cut(*place) for place in places])
        return np.concatenate([five, five[:, :, ::-1]])

    def _resized(self, image: Image.Image) -> tuple[Callable[[int, int], np.ndarray], int, int]:
        """Return what cuts size x size out of the resized picture at (left, top), and the largest left and top."""
        if not min(image.size):
            raise ParNetError(f"a picture of {image.width} x {image.height} pixels: it has none")
        scale = round(self.size / self.crop) / min(image.size)
        target = [max(self.size, round(side * scale)) for side in image.size]
        right, bottom = (side - self.size for side in target)
        if max(target) > LONGEST * self.size:  # a line of pixels would fill the memory before it is cut
            x, y = (side / t for side, t in zip(image.size, target, strict=True))

            def resize_there(left: int, top: int) -> np.ndarray:
                inside = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
                return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC, inside))

            return resize_there, right, bottom
        whole = image.resize(target, Image.Resampling.BICUBIC) if target != list(image.size) else image

        def crop(left: int, top: int) -> np.ndarray:
            return np.asarray(whole.crop((left, top, left + self.size, top + self.size)))

        return crop, right, bottom

    @with_own_settings
    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise pixels, uint8 [..., H, W, 3], to fp32 [..., 3, H, W]."""
        if pixels.is_cpu:  # by numpy, in this thread: torch's threads, once awake, spin on the cores of an engine's
            middle, width = (np.asarray(v, np.float32) for v in (self.mean, self.std))
            values = pixels.numpy().astype(np.float32) / np.float32(255)
            return _channels_first((values - middle) / width)
        mean, std = (torch.tensor(v, dtype=torch.float32, device=pixels.device) for v in (self.mean, self.std))
        return ((pixels.float() / 255 - mean) / std).movedim(-1, -3).contiguous()

    def raw(self, picture: Path | str | Image.Image) -> Tensor:
        """Make a picture, a file or Pillow's, uint8 [3, size, size], which the engine normalises. ParNetError where it
        cannot be read."""
        return _channels_first(self.pixels(_opened(picture)))

    def __call__(self, picture: Path | str | Image.Image) -> Tensor:
        """Make a picture, a file or Pillow's, fp32 [3, size, size], normalised. ParNetError where it cannot be read."""
        return self.normalise(torch.from_numpy(self.pixels(_opened(picture)).copy()))


def _channels_first(pixels: np.ndarray) -> Tensor:
    """A copy of pixels [..., H, W, 3] as [..., 3, H, W]."""
    return torch.from_numpy(np.moveaxis(pixels, -1, -3).copy("C"))


def _opened(picture: Path | str | Image.Image) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, str | os.PathLike):
        raise ParNetError(f"a picture of type {type(picture).__name__}: give its path, or what Image.fromarray makes")
    return read_image(picture)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any picture to RGB with 8 bits a channel, upright as its EXIF orientation says, and on BACKGROUND where
    transparent.

    16-bit grey goes from 0..65535 to 0..255. ParNetError for grey of 32 bits or in floating point: no file says which
    value is white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ParNetError("grey of 32 bits a pixel, of which nobody knows what is white; save it with 8 or 16")
    if image.mode.startswith("I;16"):
        grey, hidden = np.asarray(image).astype(np.uint16), image.info.get("transparency")
        colour = np.repeat((grey / 257).round().astype(np.uint8)[..., None], 3, axis=2)
        if hidden is not None:
            colour[grey == hidden] = BACKGROUND
        return Image.fromarray(colour)
    if image.has_transparency_data:
        straight = image.convert(STRAIGHT.get(image.mode, image.mode)).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), straight).convert("RGB")
    return image.convert("RGB")


def read_image(path: Path | str) -> Image.Image:
    """Read a picture file, as `to_rgb` makes it. ParNetError for what is missing, no picture, damaged, or suspiciously
    large.

    Where damage was mended Pillow warns, by the caller's filters: they are the whole process's, and not for one of its
    threads to change for a while.
    """
    try:
        # no new Path, which interns the name: Python's table of such strings would grow as pictures are read
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ParNetError("not a file: a pipe or a device would be waited for")
        with Image.open(path) as image:
            rgb = to_rgb(_as_the_file_says(image))
        rgb.info.clear()  # it has been applied, and damage in it must not be met again, outside of here
        return rgb
    except FileNotFoundError:
        raise ParNetError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ParNetError(f"{path}: not a picture; give a PNG, JPEG or WebP file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ParNetError(f"{path}: over {Image.MAX_IMAGE_PIXELS} pixels; scale it down first") from None
    except ParNetError as error:
        raise ParNetError(f"{path}: {error}") from None
    except Exception as error:  # decoders, and readers of EXIF and XMP, raise whatever damage leads them to
        raise ParNetError(f"{path}: cannot be decoded ({type(error).__name__}: {error})") from None


def _check_area(image: Image.Image) -> None:
    """Raise what Pillow itself raises for twice as many pixels, and only warns of for these."""
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _as_the_file_says(image: ImageFile.ImageFile) -> Image.Image:
    """An opened picture, with what Pillow reads of the file and does not apply.

    It leaves a transparent level or colour as the file counts it, though it scales grey of 2 and 4 bits and colours of
    16 to 8; it reads grey of 16 bits as if zero were black; and it scales grey of a PGM to 0..65535, in 32 bits.
    """
    if image.format == "EPS":  # Pillow would run Ghostscript on it, without a limit of time
        raise ParNetError("an EPS file, which is a program and not pixels; save it as PNG")
    stored = image.tile[0].args if image.format == "PNG" and image.tile else None
    _check_area(image)
    image.load()
    _check_area(image)  # an icon may turn out larger than its header says
    hidden = image.info.get("transparency")
    if hidden is not None and stored in LEVELS:
        image.info["transparency"] = hidden * LEVELS[stored]
    elif hidden is not None and stored == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in hidden)
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        tags = image.getexif()
        if tags.get(PHOTOMETRIC) == ZERO_IS_WHITE:
            raise ParNetError("grey of 16 bits whose zero is white; save it with black as zero")
        if tags.get(BITS) not in (None, 16, (16,)):
            raise ParNetError(f"grey of {tags.get(BITS)} bits a pixel; save it with 8 or 16")
    return image.convert("I;16") if image.format == "PPM" and image.mode == "I" else image


def find_images(paths: Iterable[Path | str]) -> list[Path]:
    """List files as given, and of folders the pictures directly in them, by name. ParNetError where there is none, or a
    folder cannot be read."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not os.path.exists(path):
            raise ParNetError(f"{path}: no such file or folder")
        if os.path.isdir(path):
            inside = sorted(p for p in _visible(path) if p.suffix.lower() in SUFFIXES and not os.path.isdir(p))
            if not inside:
                raise ParNetError(f"{path}: no pictures in this folder ({', '.join(SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    return found


def count_of(files: Sequence[Path]) -> str:
    """Say how many files were passed over, and of which kinds; empty for none."""
    kinds = sorted({p.suffix.lower() or "no suffix" for p in files})
    shown = ", ".join(kinds[:5]) + (", ..." if len(kinds) > 5 else "")
    return f"{len(files)} file(s) passed over ({shown})" if files else ""


def passed_over(folder: Path) -> str | None:
    """Say what `find_images` left out of a folder, if anything: other files, and folders in it."""
    others = [p for p in _visible(folder) if os.path.isdir(p) or p.suffix.lower() not in SUFFIXES]
    files = [p for p in others if not os.path.isdir(p)]
    said = [count_of(files)] if files else []
    if folders := len(others) - len(files):
        said.append(f"{folders} folder(s) in it not searched")
    return f"{folder}: {', '.join(said)}" if said else None


def _visible(folder: Path) -> list[Path]:
    try:
        return [p for p in folder.iterdir() if not p.name.startswith(".")]
    except OSError as error:
        raise ParNetError(f"{folder}: cannot be read ({error.strerror})") from None
