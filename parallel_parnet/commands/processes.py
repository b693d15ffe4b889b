"""Commands in processes of their own, from a clone and from an install alike."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of Linux


def module(name: str) -> list[str]:
    """What starts a module below `parallel_parnet.commands`, in the environment that `environment` gives."""
    return [sys.executable, "-m", f"{__package__}.{name}"]


def command(name: str) -> list[str]:
    """The same for a command, by the name that a person types."""
    return [sys.executable, "-m", "parallel_parnet", name]


def environment(**more: str) -> dict[str, str]:
    """This process's, and `more`, with the package on the path whether it is installed or not."""
    found = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found), **more}


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """From now on this process gets the signal when the thread of `parent` that started it ends, however that ends: a
    command that was killed leaves nobody behind who works on, and takes cores or a GPU from the next."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)
