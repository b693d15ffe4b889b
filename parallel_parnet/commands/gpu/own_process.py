"""Work in a fork of this process, under a limit: what hangs, or faults a GPU, costs that work and nothing else.

Importing torch, Triton and the kernels takes seconds, and a fork has them at once. It may use a GPU as long as this
process never does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, NoReturn

from ..processes import end_with_parent

FORK = multiprocessing.get_context("fork")


class Ended(NamedTuple):
    """answer: what the work returned, None where it did not. status: of its process; None where its time was over.
    said: what it and its children wrote to stdout and stderr."""

    answer: object
    status: int | None
    said: str


def in_own_process(work: Callable[[], object], seconds: float) -> Ended:
    """Run it in a process of its own; out of time, that is killed with its children."""
    end = time.monotonic() + seconds
    receiver, sender = FORK.Pipe(duplex=False)
    with TemporaryDirectory() as folder, receiver:
        file = Path(folder) / "said"
        file.touch()
        process = FORK.Process(target=_in_a_fork, args=(work, sender, file, os.getpid()))
        process.start()
        sender.close()
        answer = _answer(receiver, end)
        process.join(max(0.0, end - time.monotonic()))
        if (status := process.exitcode) is None:
            with suppress(ProcessLookupError):  # where it has not come so far as to lead a group
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        return Ended(answer, status, file.read_text(errors="replace"))


def _answer(receiver: Connection, end: float) -> object:
    try:
        return receiver.recv() if receiver.poll(max(0.0, end - time.monotonic())) else None
    except EOFError:
        return None


def _in_a_fork(work: Callable[[], object], sender: Connection, file: Path, parent: int) -> NoReturn:
    os.setsid()
    end_with_parent(parent)
    sys.stdout = sys.stderr = open(file, "a", buffering=1)  # noqa: SIM115 - until the process ends
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    status = 1
    try:
        sender.send(work())
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)  # at once: multiprocessing would wait for compilers that the work has left
