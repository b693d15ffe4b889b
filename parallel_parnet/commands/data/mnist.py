"""MNIST's layout: IDX files of grey pictures and of labels, packed by gzip or not; Fashion-MNIST has it as well."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from parallel_parnet import ParNetError

from .split import TEST, TRAIN, VAL, Split

PREFIX = {TRAIN: "train", VAL: "t10k", TEST: "t10k"}
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
MOST_BYTES = 1 << 30  # of a file, unpacked: a small .gz may claim any size


def find(folder: Path, part: str) -> Split | None:
    """The split where any of the four files is there; ParNetError where one that it needs is not, or is damaged."""
    if not any(_path(folder, prefix, IMAGES).is_file() for prefix in PREFIX.values()):
        return None
    images, labels = (read_idx(_path(folder, PREFIX[part], kind)) for kind in (IMAGES, LABELS))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not images.size:
        raise ParNetError(f"{folder}: {PREFIX[part]} has pictures {images.shape} but labels {labels.shape}")
    return Split(
        "MNIST's layout",
        TRAIN if part == TRAIN else TEST,
        labels.astype(np.int64),
        (),
        True,
        lambda i: f"{PREFIX[part]}/{i:05}",
        lambda i: Image.fromarray(images[i]),
    )


def read_idx(path: Path) -> np.ndarray:
    """A file of the IDX layout: two zero bytes, type 8 (uint8), number of dimensions, each size, the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08":
                raise ParNetError(f"{path}: not an IDX file of bytes")
            sizes = file.read(4 * head[3])
            shape = tuple(np.frombuffer(sizes, ">u4", count=head[3]).tolist())
            count = math.prod(shape)
            if count > MOST_BYTES:
                raise ParNetError(f"{path}: {count} bytes of pictures; at most {MOST_BYTES} are read")
            values = file.read(count + 1)
        if len(values) != count:
            raise ParNetError(f"{path}: truncated, or longer than its {count} values")
        return np.frombuffer(values, np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, ParNetError):
            raise
        raise ParNetError(f"{path}: cannot be read as an IDX file ({error})") from None


def _path(folder: Path, prefix: str, kind: str) -> Path:
    plain = folder / f"{prefix}-{kind}"
    return plain if plain.is_file() else plain.with_name(f"{plain.name}.gz")
