"""Pictures for training and for testing, a batch at a time, decoded by threads a little ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parallel_parnet import ParNetError
from parallel_parnet.preprocess import Preprocess

from ..data.split import Split
from ..decoding import ahead
from .augment import decoded
from .recipe import Recipe


@dataclass
class Pictures:
    """A split as a network counts its classes. numbers: int64 [classes of the split]. skipped: a reason for each
    picture that could not be read, by its name."""

    split: Split
    numbers: np.ndarray
    preprocess: Preprocess
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.split)

    def for_training(self, groups: list[Tensor], recipe: Recipe, key: str) -> Iterator[tuple[Tensor, Tensor]]:
        """For each group of numbers of pictures, pixels uint8 [N, size, size, 3] and classes int64 [N].

        key: with a picture's number, decides how that is varied, so that threads and restarts change nothing.
        """

        def varied(i: int, image: Image.Image) -> np.ndarray:
            return decoded(image, recipe, self.preprocess, Random(f"{key} {i}"))

        return self._batches([group.tolist() for group in groups], varied)

    def for_testing(self, numbers: range, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What `for_training` gives, of pictures in turn, resized and cut as the engine's input is. Batches of which
        none can be read are left out."""
        groups = [list(numbers[i : i + batch_size]) for i in range(0, len(numbers), batch_size)]
        return self._batches(groups, lambda i, image: self.preprocess.pixels(image), may_be_empty=True)

    def _batches(
        self, groups: list[list[int]], make: Callable[[int, Image.Image], np.ndarray], may_be_empty: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        def read(group: list[int]) -> dict[int, np.ndarray]:
            made = {}
            for i in group:
                try:
                    made[i] = make(i, self.split.open(i))
                except ParNetError as error:
                    self.skipped[self.split.name(i)] = str(error)
            return made

        for group, made in ahead(groups, read):
            if not made and may_be_empty:
                continue
            if len(made) < 2 and not may_be_empty:  # a step needs some on every rank, and batch norm two
                few = f"{len(made) or 'none'} of {len(group)} pictures can be read, and a step takes two or more"
                raise ParNetError(f"{few}; {next(iter(self.skipped.values()))}")
            truth = self.numbers[self.split.truth[list(made)]]
            yield torch.from_numpy(np.stack(list(made.values()))), torch.from_numpy(truth)
