"""Processes of their own: our commands, from a clone and from an install alike, and tools that are asked."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from .common import CLONE, ROOT

PR_SET_PDEATHSIG = 1  # of Linux
GRACE_S = 2.0  # in which a command that is told to end may end its children


def command(name: str, ranks: int = 1) -> list[str]:
    """What starts a command, by the name that a person types; in so many ranks by torchrun."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    return [sys.executable, "-m", *torchrun, "parallel_parnet", name]


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


def run_within(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of a command; out of time, it is ended with its children, and has no status. It
    ends with this process, which may be killed. By SIGTERM first: torchrun's ranks have sessions of their own, and only
    torchrun ends them."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return None, *process.communicate()
    return process.returncode, output, errors


def commit() -> str | None:
    """Of this clone; an install has none, and may lie in another repository."""
    return asked("git", "-C", str(ROOT), "rev-parse", "HEAD") if CLONE else None


def asked(*command: str) -> str | None:
    """The first line that a tool prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
