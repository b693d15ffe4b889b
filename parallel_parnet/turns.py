"""One call of an engine at a time, and none that would wait for ever."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from threading import RLock

from .errors import ParNetError


class Turns:
    """A lock for the calls of an engine: call it to get what a call holds, as a context, while it runs."""

    def __init__(self) -> None:
        self._lock, self._process = RLock(), os.getpid()

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one that takes turns, where the lock may be held for ever."""
        return os.getpid() != self._process

    def __call__(self) -> AbstractContextManager[object]:
        """Return the lock, to be held in a with statement. ParNetError in a fork, which lacks threads as well, and
        within a call of the same thread."""
        if self.is_forked:
            raise ParNetError(
                "this engine was made before a fork, which takes no threads along: make it in the child process, or "
                "start that by spawn"
            )
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise ParNetError(
                "an engine called from within its own call, as a signal handler or a finalizer may: call it after that"
            )
        return self._lock
