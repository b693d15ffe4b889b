"""What an executor keeps for each shape of input, of which there are only so many."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from ..settings import apart

Key = TypeVar("Key", bound=Hashable)
Kept = TypeVar("Kept")

MAX_SHAPES = 8


class Shapes(Generic[Key, Kept]):
    """Keeps what was made when it was asked for the first time; the oldest of too many goes.

    dropping: called before one goes, which may still be in use by a device. Nothing here refers to whoever keeps it: an
    engine's memory is to go with the last reference to it, and not wait for Python to look for cycles.
    """

    def __init__(self, dropping: Callable[[], None] = lambda: None) -> None:
        self._dropping = dropping
        self._kept: dict[Key, Kept] = {}

    def __call__(self, key: Key, make: Callable[[Key], Kept]) -> Kept:
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= MAX_SHAPES:
                self._dropping()
                del self._kept[next(iter(self._kept))]
            found = self._kept[key] = apart(make)(key)
        return found

    def clear(self) -> None:
        """Keep none of them."""
        if self._kept:
            self._dropping()
            self._kept.clear()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)
