"""What an executor keeps for each shape of input, of which there are only so many."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Generic, TypeVar

import torch

from ..settings import outside_torch_modes

Key = TypeVar("Key", bound=Hashable)
Kept = TypeVar("Kept")

MAX_SHAPES = 8


class Shapes(Generic[Key, Kept]):
    """Keeps what was made when it was asked for the first time; of too many goes what was not asked for the longest.

    dropping: called before one goes, which may still be in use by a device, and before all do, with whoever keeps them.
    Neither it nor anything here refers to that one: an engine's memory is to go with the last reference to it, and not
    wait for Python to look for cycles.
    """

    def __init__(self, dropping: Callable[[], None] = lambda: None) -> None:
        self._dropping = dropping
        weakref.finalize(self, _dropped, dropping).atexit = False
        self._kept: dict[Key, Kept] = {}

    def __call__(self, key: Key, make: Callable[[Key], Kept]) -> Kept:
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= MAX_SHAPES:
                self._dropping()
                del self._kept[next(iter(self._kept))]
            found = self._kept[key] = outside_torch_modes(make)(key)
        elif len(self._kept) > 1:
            self._kept[key] = self._kept.pop(key)  # the last in the dictionary's order
        return found

    def clear(self) -> None:
        """Drop all that is kept."""
        if self._kept:
            self._dropping()
            self._kept.clear()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)


def _dropped(dropping: Callable[[], None]) -> None:
    """Wait where a GPU may be at work, but for a thread whose capture that would break. Nobody hears of a failure."""
    with suppress(Exception):
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            dropping()
