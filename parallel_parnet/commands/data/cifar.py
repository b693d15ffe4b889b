"""CIFAR-10 and CIFAR-100 as they are handed out: batches in a binary layout, or pickled by Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from parallel_parnet import ParNetError

from . import pickles
from .split import TEST, TRAIN, Split, read_names

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # all red values, then green, then blue, each row by row


class Layout(NamedTuple):
    """name: in words. labels: by which batches in Python call them, and which byte of a binary record they are."""

    name: str
    classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    labels: str
    record: int


FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = (
    Layout("CIFAR-10 in binary", 10, tuple(f"{n}.bin" for n in FIVE), ("test_batch.bin",), "batches.meta.txt", "", 1),
    Layout("CIFAR-100 in binary", 100, ("train.bin",), ("test.bin",), "fine_label_names.txt", "", 2),
    Layout("CIFAR-10 in Python", 10, FIVE, ("test_batch",), "batches.meta", "labels", 0),
    Layout("CIFAR-100 in Python", 100, ("train",), ("test",), "meta", "fine_labels", 0),
)


def find(folder: Path, part: str) -> Split | None:
    """The split where any batch is there; ParNetError where one is missing, truncated, or holds something else."""
    for layout in LAYOUTS:
        if any((folder / name).is_file() for name in (*layout.train, *layout.test)):
            files = [folder / name for name in (layout.train if part == TRAIN else layout.test)]
            if missing := [path for path in files if not path.is_file()]:
                raise ParNetError(f"{missing[0]}: missing, of {layout.name}")
            read = _binary if layout.record else _pickled
            batches = [read(path, layout) for path in files]
            found = _split(batches, files, _names(folder / layout.names, layout), layout)
            return found if part == TRAIN else replace(found, part=TEST)
    return None


def _split(
    batches: list[tuple[np.ndarray, np.ndarray]], files: list[Path], names: tuple[str, ...], layout: Layout
) -> Split:
    where = [(batch, at) for batch, (_, labels) in enumerate(batches) for at in range(len(labels))]

    def picture(i: int) -> Image.Image:
        batch, at = where[i]
        return Image.fromarray(np.ascontiguousarray(batches[batch][0][at].reshape(3, SIDE, SIDE).transpose(1, 2, 0)))

    def name(i: int) -> str:
        batch, at = where[i]
        return f"{files[batch].name}/{at:05}"

    return Split(layout.name, TRAIN, np.concatenate([labels for _, labels in batches]), names, True, name, picture)


def _binary(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, PIXELS], left in the file until they are asked for, and labels int64 [N]."""
    size = path.stat().st_size
    if not size or size % (layout.record + PIXELS):
        raise ParNetError(f"{path}: truncated: {size} bytes are no whole number of pictures")
    records = np.memmap(path, np.uint8, "r").reshape(-1, layout.record + PIXELS)
    return records[:, layout.record :], _checked(records[:, layout.record - 1].tolist(), path, layout)


def _pickled(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    content = pickles.read(path)
    pixels, labels = content.get("data"), content.get(layout.labels)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ParNetError(f"{path}: holds no {layout.labels}, so it is no batch of {layout.name}")
    if not isinstance(pixels, np.ndarray) or pixels.shape != (len(labels), PIXELS) or not labels:
        raise ParNetError(f"{path}: its data are not {PIXELS} values for each of {len(labels)} labels")
    return pixels, _checked(labels, path, layout)


def _checked(labels: list[int], path: Path, layout: Layout) -> np.ndarray:
    """As int64; not before it is known that they are classes, since a pickle's integers may have any size."""
    if wrong := [at for at, label in enumerate(labels) if not 0 <= label < layout.classes]:
        raise ParNetError(f"{path}: the label of picture {wrong[0]} is none of 0 to {layout.classes - 1}")
    return np.asarray(labels, np.int64)


def _names(path: Path, layout: Layout) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    if layout.record:
        names: Any = read_names(path)
    else:
        names = pickles.read(path).get("label_names" if layout.classes == 10 else "fine_label_names")
    if not isinstance(names, list | tuple) or len(names) != layout.classes or not all(type(n) is str for n in names):
        raise ParNetError(f"{path}: expected {layout.classes} names of classes")
    return tuple(names)
