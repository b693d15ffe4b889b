"""A folder per class with its pictures in it, as ImageNet's are mostly kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from parallel_parnet import ParNetError
from parallel_parnet.preprocess import SUFFIXES, count_of, read_image

from .split import TEST, TRAIN, VAL, Split

VALIDATION = ("val", "valid", "validation")
PARTS = {TRAIN: ("train",), VAL: (*VALIDATION, "test"), TEST: ("test", *VALIDATION)}  # the first that is there


def find(folder: Path, part: str) -> Split | None:
    """The split where there are folders; ParNetError where one holds no picture, or the part is missing."""
    there = [name for name in (*PARTS[TRAIN], *PARTS[VAL]) if (folder / name).is_dir()]
    if divided := any(_folders(folder / name) for name in there):
        wanted = next((name for name in PARTS[part] if name in there), None)
        if wanted is None:
            raise ParNetError(f"{folder}: no {' or '.join(f'{n}/' for n in PARTS[part])} beside {', '.join(there)}/")
        folder = folder / wanted
    elif part == TRAIN and _folders(folder):
        raise ParNetError(f"{folder}: put the folders of classes into train/, and others with new pictures into val/")
    classes = _folders(folder)
    if not classes and divided:
        raise ParNetError(f"{folder}: has no folder per class; put the pictures of each class into one of its name")
    if not classes:
        return None
    others = [path for path in folder.iterdir() if not (path.name.startswith(".") or path.is_dir())]
    paths: list[Path] = []
    truth: list[int] = []
    for number, name in enumerate(classes):
        files = _files(folder / name)
        inside = [path for path in files if path.suffix.lower() in SUFFIXES]
        if not inside:
            raise ParNetError(f"{folder / name}: no pictures in the folder of this class ({', '.join(SUFFIXES)})")
        paths += inside
        truth += [number] * len(inside)
        others += [path for path in files if path.suffix.lower() not in SUFFIXES]
    return Split(
        "folders of classes",
        folder.name if divided else "",
        np.asarray(truth, np.int64),
        classes,
        False,
        lambda i: str(paths[i].relative_to(folder)),
        lambda i: read_image(paths[i]),
        count_of(others),
    )


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _files(folder: Path) -> list[Path]:
    """All in a folder and below it, sorted, also behind links, each folder once, since links may go round in circles.
    OSError for a folder that cannot be read, which rglob would pass over."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    root = Path(os.path.realpath(folder))
    seen = {str(root), *map(str, root.parents)}
    for inside, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = {name: os.path.realpath(os.path.join(inside, name)) for name in sorted(folders)}
        folders[:] = [name for name, path in real.items() if not (name.startswith(".") or path in seen)]
        seen.update(real[name] for name in folders)
        found += [Path(inside, name) for name in files if not name.startswith(".")]
    return sorted(found)
