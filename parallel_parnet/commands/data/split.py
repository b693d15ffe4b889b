"""Labelled pictures for training or for testing, whichever layout they come in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from parallel_parnet import ParNetError

TRAIN, VAL, TEST = "train", "val", "test"


@dataclass(frozen=True)
class Split:
    """Pictures 0 to N - 1, none of which is in memory before it is opened.

    layout: in words. part: of it, TRAIN, TEST, or by the name of its folder; empty where it is not divided.
    truth: int64 [N], the class of each by number. classes: a name per number, or none.
    ordered: whether the layout itself says which name has which number; else they are in the order of the alphabet.
    name: of a picture, which no other has. open: the picture; ParNetError where it cannot be read.
    left_out: files that are no pictures of it, in words, if any.
    """

    layout: str
    part: str
    truth: np.ndarray
    classes: tuple[str, ...]
    ordered: bool
    name: Callable[[int], str]
    open: Callable[[int], Image.Image]
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def count(self) -> int:
        """Classes: those with a name, else up to the largest number that occurs."""
        return len(self.classes) or int(self.truth.max()) + 1

    @property
    def digest(self) -> str:
        """Of all names and classes of pictures, in their order."""
        found = hashlib.sha256(self.truth.tobytes())
        for i in range(len(self)):
            found.update(f"{self.name(i)}\n".encode(errors="backslashreplace"))  # a file's may be no text
        return found.hexdigest()

    def told(self, folder: Path) -> str:
        """How many pictures of which folder and part of it, and what was left out, in a line."""
        part = f", split {self.part}" if self.part else ""
        left_out = f"; {self.left_out}" if self.left_out else ""
        return f"{len(self)} pictures of {folder}{part}{left_out}"

    def named(self, classes: tuple[str, ...]) -> Split:
        """Return the split with names for its classes; ParNetError where it has its own, or a larger number."""
        if self.classes:
            raise ParNetError(f"--labels: {self.layout} names its classes itself; leave it out")
        if self.count > len(classes):
            raise ParNetError(f"--labels: {len(classes)} names, but class {self.count - 1} occurs, counted from 0")
        return replace(self, classes=classes, ordered=True)


def read_names(path: Path) -> tuple[str, ...]:
    """A text file with a name per line, blank lines at its end left out; ParNetError where it cannot be read."""
    try:
        return tuple(path.read_text("utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error}: save it as UTF-8"
        raise ParNetError(f"{path}: cannot be read ({reason})") from None
