"""A folder per class with its pictures in it, as ImageNet's are mostly kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from parallel_parnet import ParNetError
from parallel_parnet.preprocess import SUFFIXES, read_image

from .split import TRAIN, Split

PARTS = ("train", "val", "validation", "test")


def find(folder: Path, part: str) -> Split | None:
    """The split where there are folders; ParNetError where one holds no picture, or the part is missing."""
    named = [name for name in PARTS if (folder / name).is_dir() and _folders(folder / name)]
    if named:
        wanted = [name for name in named if (name == TRAIN) == (part == TRAIN)]
        if not wanted:
            raise ParNetError(f"{folder}: no {'train/' if part == TRAIN else 'val/'} beside {', '.join(named)}/")
        folder = folder / wanted[0]
    elif part == TRAIN and _folders(folder):
        raise ParNetError(f"{folder}: put the folders of classes into train/, and others with new pictures into val/")
    classes = _folders(folder)
    if not classes:
        return None
    paths: list[Path] = []
    truth: list[int] = []
    for number, name in enumerate(classes):
        inside = _pictures(folder / name)
        if not inside:
            raise ParNetError(f"{folder / name}: no pictures in the folder of this class ({', '.join(SUFFIXES)})")
        paths += inside
        truth += [number] * len(inside)
    return Split(
        "folders of classes",
        np.asarray(truth, np.int64),
        classes,
        False,
        lambda i: str(paths[i].relative_to(folder)),
        lambda i: read_image(paths[i]),
    )


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _pictures(folder: Path) -> list[Path]:
    """All in a folder and below it, sorted. OSError for a folder that cannot be read, which rglob would pass over."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for inside, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(inside, name) for name in files if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted(found)
