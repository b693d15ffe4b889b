"""One call of an engine at a time, and none that would wait for ever."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from threading import RLock

from .errors import ParNetError


class Turns:
    """The lock of an engine: `with turns():` around a call, `turns.check()` where a call takes no lock of its own."""

    def __init__(self) -> None:
        self._lock, self._process = RLock(), os.getpid()

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one that takes turns, where the lock may be held for ever."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise ParNetError in a fork, which lacks the threads of its parent, and within a call of the same thread."""
        if os.getpid() != self._process:
            raise ParNetError(
                "this engine was made before a fork, which takes no threads along: make it in the child process, or "
                "start that by spawn"
            )
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise ParNetError(
                "an engine called from within its own call, as a signal handler or a finalizer may: call it after that"
            )

    def __call__(self) -> AbstractContextManager[object]:
        """Return the lock, to be held in a with statement. ParNetError as for `check`."""
        self.check()
        return self._lock
