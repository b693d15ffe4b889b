"""Which layout a folder has, by the names of what lies in it."""

from __future__ import annotations

import os
from pathlib import Path

from parallel_parnet import ParNetError

from . import cifar, folders, mnist
from .split import Split


def open_split(folder: Path, part: str) -> Split:
    """The pictures of a folder for `part`: TRAIN, or VAL and TEST, each of which is the other where only that is there.

    Layouts: MNIST's four IDX files, CIFAR's batches, binary or in Python, and a folder per class, itself in train/ or
    val/ (valid/, validation/) or test/ where there are such. ParNetError, naming file or folder, for any other, what is
    truncated or not to be read, and a class without pictures.
    """
    if not os.path.isdir(folder):
        raise ParNetError(f"{folder}: no such folder")
    try:
        for layout in (mnist, cifar, folders):
            if (found := layout.find(folder, part)) is not None:
                return found
    except OSError as error:
        raise ParNetError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None
    raise ParNetError(
        f"{folder}: has neither a folder per class, nor MNIST's files (train-images-idx3-ubyte, ...), nor CIFAR's "
        f"batches (data_batch_1, data_batch_1.bin, ...)"
    )
