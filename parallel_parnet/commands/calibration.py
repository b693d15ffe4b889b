"""--dtype int8 and fp8 of every command that has them: ranges from pictures, of int8 also from a file; the demo has
its own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parallel_parnet import ParNetError, Program, quantize
from parallel_parnet.int8.calibration import Calibration
from parallel_parnet.preprocess import Preprocess, find_images, read_image
from parallel_parnet.program.contract import E4M3

from .common import DEMO, DEMO_MODEL, ROOT
from .data.finding import open_split
from .data.split import TEST, TRAIN, VAL
from .decoding import ahead

INT8, FP8 = "int8", "fp8"
QUANTISED = {INT8: torch.int8, FP8: E4M3}
MOST = 256  # pictures that ranges are found from: on the demo, four times as many gave no better ones
BATCH = 16
OF_DEMO = DEMO / f"{DEMO_MODEL}.int8.json"


class Pictures(NamedTuple):
    """Numbered from 0. name: what they are, in words."""

    name: str
    count: int
    open: Callable[[int], Image.Image]

    def spread(self, most: int, without: frozenset[int] = frozenset()) -> list[int]:
        """At most so many of their numbers, as far from each other as can be, since neighbours are often of a class."""
        left = [i for i in range(self.count) if i not in without]
        return [left[i] for i in np.linspace(0, len(left) - 1, min(most, len(left))).round().astype(int)]

    def batches(self, numbers: list[int], preprocess: Preprocess) -> Iterator[Tensor]:
        """Normalised, fp32 [N, 3, size, size]. ParNetError, naming it, for a picture that cannot be read."""
        groups = (numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH))
        for _, pixels in ahead(groups, lambda group: np.stack([preprocess.pixels(self.open(i)) for i in group])):
            yield preprocess.normalise(torch.from_numpy(pixels))


def open_pictures(path: Path) -> Pictures:
    """Pictures of any layout that training or validating reads, for training where it tells them apart; else a picture,
    or those that lie in a folder; why not those for training, the name says. ParNetError where there is none."""
    reasons: list[str] = []
    for part in (TRAIN, VAL):
        try:
            split = open_split(path, part)
        except ParNetError as error:  # of another layout, without this part, or damaged
            reasons.append(str(error))
            continue
        use = TRAIN if part == TRAIN else TEST
        return Pictures(", since ".join([f"{split.layout}, to {use}", *reasons]), len(split), split.open)
    try:
        paths = find_images([path])
    except ParNetError as error:
        raise ParNetError(f"{error}; {reasons[0]}" if os.path.isdir(path) else str(error)) from None
    return Pictures("pictures", len(paths), lambda i: read_image(paths[i]))


def quantised(program: Program, args: argparse.Namespace, to: str = INT8) -> tuple[Program, str]:
    """The program in int8 or fp8, and how it came to be so, in words. ParNetError where nothing says what its ranges
    are. fp8's are wide, so the demo's few pictures are enough."""
    path = args.calibrate
    if path is None and args.checkpoint is None and args.model in (None, DEMO_MODEL) and args.num_classes is None:
        path = OF_DEMO if to == INT8 else DEMO / "pictures"
    if path is None:
        raise ParNetError(f"{to} needs ranges: give --calibrate FOLDER, with pictures like those that it will see")
    if path.suffix == ".json" and not os.path.isdir(path):
        if to != INT8:
            raise ParNetError(f"{path}: a file of ranges is for int8; give {to} a folder of pictures")
        found = Calibration.load(path)
        try:
            made = found.applied(program)
        except ParNetError as error:
            raise ParNetError(f"{path}: {error}") from None
        words = str(path.relative_to(ROOT) if path == OF_DEMO else path)
    else:
        pictures = open_pictures(path)
        numbers = pictures.spread(MOST)
        made = quantize(
            program, pictures.batches(numbers, Preprocess.of(program.config, args.img_size)), to=QUANTISED[to]
        )
        words = f"{len(numbers)} pictures of {args.calibrate or path.relative_to(ROOT)} ({pictures.name})"
    plain = [op.name for op in made.operations if f"{op.name}.weight_step" not in made.weights]
    return made, f"{words}; fp32 stays {', '.join(plain)}"
