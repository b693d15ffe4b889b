"""One writer of a file at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel_parnet import ParNetError


def lock(file: int, path: Path) -> None:
    """Hold an open file, until it is closed or the process ends; ParNetError, naming `path`, where another does. A file
    system without locks, such as some of networks and of FUSE, ends no run: a line says that nobody watches."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which the kernel lets go of, whatever ends the process
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _busy(path) from None
        print(f"{path}: no lock to be had there ({error.strerror}): see that no other run writes it", file=sys.stderr)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """While no other run may write `path`; ParNetError where one does. What is locked is PATH.lock, which lies beside
    it for as long: `path` itself is replaced as a whole, and a lock would go with what it was."""
    beside = path.with_name(f"{path.name}.lock")
    try:
        file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ParNetError(f"{beside}: cannot be written ({error.strerror})") from None
    try:
        lock(file, path)
        if not (os.path.exists(beside) and os.path.samestat(os.fstat(file), os.stat(beside))):
            raise _busy(path)  # until a moment ago: what was locked here is removed, and the next would lock another
        try:
            yield
        finally:
            os.unlink(beside)
    finally:
        os.close(file)


def _busy(path: Path) -> ParNetError:
    return ParNetError(f"{path}: another run is writing it; wait for it, or give another file")
